//! What the daemon has found, as files: map, mask, picture and sidecar of one scan.
//!
//! Files appear whole or not at all. The sidecar is written last and names the hashes of the other
//! three: it is the mark that the set is complete, and tells which map belongs to it.

mod alignment;
mod atomic;
mod canvas;
pub mod picture;
mod sidecar;

use std::{io, path::Path};

use sha2::{Digest, Sha256};

pub use alignment::{AlignmentPicture, alignment_picture, itk_transform};
pub use atomic::{remove_leftovers, write_atomic};
pub use sidecar::{
    EncoderFacts, FileFacts, Files, IntensityFacts, MethodFacts, QualityFacts, RESEARCH_USE_ONLY,
    SCHEMA, Scores, Sidecar, Standing, ThresholdFacts, WindowFacts,
};

/// The files of one result before they are written.
#[derive(Debug, Clone, PartialEq)]
pub struct ResultSet {
    /// Anomaly map, `.nii.gz`.
    pub map_nii_gz: Vec<u8>,
    /// Anomaly mask, `.nii.gz`.
    pub mask_nii_gz: Vec<u8>,
    /// Picture, PNG.
    pub picture_png: Vec<u8>,
    /// Everything else; its `files` are filled in here.
    pub sidecar: Sidecar,
}

/// Writes a result under `<folder>/<stem>_anomaly...`, over an older one, the sidecar last.
pub fn write_results(folder: &Path, stem: &str, results: &ResultSet) -> io::Result<()> {
    let facts = |suffix: &str, bytes: &[u8]| -> io::Result<FileFacts> {
        let name = format!("{stem}_anomaly{suffix}");
        write_atomic(&folder.join(&name), bytes)?;
        Ok(FileFacts {
            name,
            n_bytes: bytes.len() as u64,
            sha256: hex::encode(Sha256::digest(bytes)),
        })
    };
    let files = Files {
        map: facts("-map.nii.gz", &results.map_nii_gz)?,
        mask: facts("-mask.nii.gz", &results.mask_nii_gz)?,
        picture: facts(".png", &results.picture_png)?,
    };
    write_sidecar(folder, stem, &Sidecar { files: Some(files), ..results.sidecar.clone() })
}

/// Writes a sidecar alone: for a scan that waits for its window to fill.
pub fn write_sidecar(folder: &Path, stem: &str, sidecar: &Sidecar) -> io::Result<()> {
    let text = serde_json::to_string_pretty(sidecar).map_err(io::Error::other)? + "\n";
    write_atomic(&folder.join(format!("{stem}_anomaly.json")), text.as_bytes())
}

/// Reads a sidecar.
pub fn read_sidecar(path: &Path) -> io::Result<Sidecar> {
    serde_json::from_str(&std::fs::read_to_string(path)?).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sidecar::tests::scored;

    fn results(content: &str, revision: u64) -> ResultSet {
        ResultSet {
            map_nii_gz: format!("map {content}").into_bytes(),
            mask_nii_gz: format!("mask {content}").into_bytes(),
            picture_png: format!("picture {content}").into_bytes(),
            sidecar: Sidecar { revision, ..scored() },
        }
    }

    #[test]
    fn the_sidecar_names_the_files_that_belong_to_it() {
        let folder = tempfile::tempdir().unwrap();
        for (content, revision) in [("old", 1), ("new", 2)] {
            write_results(folder.path(), "sub-1_T1w", &results(content, revision)).unwrap();
            let sidecar = read_sidecar(&folder.path().join("sub-1_T1w_anomaly.json")).unwrap();
            assert_eq!(sidecar.revision, revision);
            let map = sidecar.files.unwrap().map;
            let bytes = std::fs::read(folder.path().join(&map.name)).unwrap();
            assert_eq!(bytes, format!("map {content}").into_bytes());
            assert_eq!(map.sha256, hex::encode(Sha256::digest(&bytes)));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4);
    }
}
