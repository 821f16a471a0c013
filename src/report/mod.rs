//! The result files of one scan: map, mask, picture, sidecar, and the optional files of
//! `[results]`.
//!
//! Files appear whole or not at all. The sidecar is written last and holds the hashes of the
//! others. So it shows that the set is complete, and which map belongs to it.

mod alignment;
mod canvas;
pub mod picture;
mod sidecar;
mod time;

use std::{io, path::Path};

use sha2::{Digest, Sha256};

use crate::{
    domain::scan::ScanId,
    files::{remove_if_there, write_atomic},
};

pub use alignment::{AlignmentPicture, alignment_picture, itk_transform};
pub use sidecar::{
    EncoderFacts, FileFacts, Files, IntensityFacts, MethodFacts, QualityFacts, RESEARCH_USE_ONLY,
    SCHEMA, Scores, Sidecar, Standing, ThresholdFacts, WindowFacts,
};
pub use time::utc;

/// The files of one result before they are written.
#[derive(Debug, Clone, PartialEq)]
pub struct ResultSet {
    /// Anomaly map, `.nii.gz`.
    pub map_nii_gz: Vec<u8>,
    /// Anomaly mask, `.nii.gz`.
    pub mask_nii_gz: Vec<u8>,
    /// Picture, PNG.
    pub picture_png: Vec<u8>,
    /// The brain on the scan's grid, `.nii.gz`, if the settings ask for it.
    pub brain_nii_gz: Option<Vec<u8>>,
    /// What each kind of evidence adds to the map, `.nii.gz`, if the settings ask for it.
    pub parts_nii_gz: Option<Vec<u8>>,
    /// The volume that was converted from DICOM files, `.nii.gz`, if the settings ask for it.
    pub scan_nii_gz: Option<Vec<u8>>,
    /// The template's place, if the settings ask for it and the scan was aligned.
    pub alignment: Option<AlignmentFiles>,
    /// The sidecar. [`write_results`] fills in its `files`.
    pub sidecar: Sidecar,
}

/// The template's place in a scan, as files.
#[derive(Debug, Clone, PartialEq)]
pub struct AlignmentFiles {
    /// Output of [`alignment_picture`].
    pub picture_png: Vec<u8>,
    /// Output of [`itk_transform`].
    pub transform_tfm: Vec<u8>,
}

/// What follows the stem and `_anomaly` in the names of all files but the sidecar.
const SUFFIXES: [&str; 8] = [
    "-map.nii.gz",
    "-mask.nii.gz",
    ".png",
    "-brain.nii.gz",
    "-parts.nii.gz",
    "-scan.nii.gz",
    "-alignment.png",
    "-alignment.tfm",
];

/// Writes a result as `<folder>/<stem>_anomaly...` and replaces an older one.
///
/// An older result may have files that this one lacks. They are removed after the new sidecar,
/// which no longer names them, is written.
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

    let mut absent = Vec::new();
    let mut optional = |suffix, bytes: Option<&Vec<u8>>| match bytes {
        Some(bytes) => facts(suffix, bytes).map(Some),
        None => {
            absent.push(format!("{stem}_anomaly{suffix}"));
            Ok(None)
        }
    };

    let alignment = results.alignment.as_ref();
    let (picture, transform) =
        alignment.map(|files| (&files.picture_png, &files.transform_tfm)).unzip();
    let files = Files {
        map: facts("-map.nii.gz", &results.map_nii_gz)?,
        mask: facts("-mask.nii.gz", &results.mask_nii_gz)?,
        picture: facts(".png", &results.picture_png)?,
        brain: optional("-brain.nii.gz", results.brain_nii_gz.as_ref())?,
        parts: optional("-parts.nii.gz", results.parts_nii_gz.as_ref())?,
        scan: optional("-scan.nii.gz", results.scan_nii_gz.as_ref())?,
        alignment_picture: optional("-alignment.png", picture)?,
        alignment_transform: optional("-alignment.tfm", transform)?,
    };

    write_sidecar(folder, stem, &Sidecar { files: Some(files), ..results.sidecar.clone() })?;
    absent.iter().try_for_each(|name| remove_if_there(&folder.join(name)))
}

/// Writes only a sidecar, for a scan whose window holds too few patients.
pub fn write_sidecar(folder: &Path, stem: &str, sidecar: &Sidecar) -> io::Result<()> {
    let text = serde_json::to_string_pretty(sidecar).map_err(io::Error::other)? + "\n";
    write_atomic(&folder.join(format!("{stem}_anomaly.json")), text.as_bytes())
}

/// Removes the results that a scan has under another stem, once they lie under their new one. Files
/// of another scan stay. The sidecar goes last: after a kill it says whose the others are.
pub fn remove_results(folder: &Path, stem: &str, scan: ScanId) -> io::Result<()> {
    let sidecar = folder.join(format!("{stem}_anomaly.json"));
    match read_sidecar(&sidecar) {
        Ok(found) if found.scan_id == scan => {}
        Ok(_) => return Ok(()),
        // There is none, or oddscan did not write it.
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::Other].contains(&error.kind()) => {
            return Ok(());
        }
        Err(error) => return Err(error),
    }

    for suffix in SUFFIXES {
        remove_if_there(&folder.join(format!("{stem}_anomaly{suffix}")))?;
    }
    remove_if_there(&sidecar)
}

/// Reads a sidecar, also one of an older version.
pub fn read_sidecar(path: &Path) -> io::Result<Sidecar> {
    serde_json::from_str(&std::fs::read_to_string(path)?).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::report::sidecar::tests::scored;

    fn results(content: &str, revision: u64) -> ResultSet {
        ResultSet {
            map_nii_gz: format!("map {content}").into_bytes(),
            mask_nii_gz: format!("mask {content}").into_bytes(),
            picture_png: format!("picture {content}").into_bytes(),
            brain_nii_gz: None,
            parts_nii_gz: None,
            scan_nii_gz: None,
            alignment: None,
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

    #[test]
    fn files_that_are_no_longer_asked_for_go_and_the_sidecar_names_those_that_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("sub-1_T1w-2_anomaly-brain.nii.gz");
        fs::write(&other, "of another scan").unwrap();
        let alignment =
            AlignmentFiles { picture_png: b"where".to_vec(), transform_tfm: b"by what".to_vec() };
        let all = ResultSet {
            brain_nii_gz: Some(b"brain".to_vec()),
            alignment: Some(alignment),
            ..results("all", 1)
        };
        let aligned = ResultSet { brain_nii_gz: None, ..all.clone() };
        for (set, n_more) in [(all, 3), (aligned, 2), (results("few", 3), 0)] {
            write_results(folder.path(), "sub-1_T1w", &set).unwrap();
            let sidecar = read_sidecar(&folder.path().join("sub-1_T1w_anomaly.json")).unwrap();
            let Files { brain, alignment_picture, alignment_transform, .. } =
                sidecar.files.unwrap();
            let named = [&brain, &alignment_picture, &alignment_transform].into_iter().flatten();
            for file in named.clone() {
                let bytes = fs::read(folder.path().join(&file.name)).unwrap();
                assert_eq!(file.sha256, hex::encode(Sha256::digest(&bytes)));
            }
            assert_eq!(named.count(), n_more);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 5 + n_more);
        }
        assert!(other.exists());
    }

    #[test]
    fn results_under_an_old_stem_go_with_all_their_files_and_those_of_another_scan_stay() {
        let folder = tempfile::tempdir().unwrap();
        let left = || fs::read_dir(folder.path()).unwrap().count();
        let all = ResultSet {
            brain_nii_gz: Some(b"brain".to_vec()),
            parts_nii_gz: Some(b"parts".to_vec()),
            scan_nii_gz: Some(b"scan".to_vec()),
            alignment: Some(AlignmentFiles { picture_png: Vec::new(), transform_tfm: Vec::new() }),
            ..results("all", 1)
        };
        write_results(folder.path(), "ROE_T1w", &all).unwrap();
        assert_eq!(left(), 1 + SUFFIXES.len());
        remove_results(folder.path(), "ROE_T1w", ScanId([8; 32])).unwrap();
        assert_eq!(left(), 1 + SUFFIXES.len(), "of another scan");
        remove_results(folder.path(), "ROE_T1w", all.sidecar.scan_id).unwrap();
        assert_eq!(left(), 0);
        remove_results(folder.path(), "ROE_T1w", all.sidecar.scan_id).unwrap();
    }
}
