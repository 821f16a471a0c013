//! Where the files of a result lie, and what they are called.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Number of files that a result can have beside its sidecar.
pub(super) const N_FILES: usize = SUFFIXES.len();

/// What follows the stem and `_anomaly` in the names of all files but the sidecar. `Files` and
/// `ResultSet` have arrays in this order.
pub(super) const SUFFIXES: [&str; 8] = [
    "-map.nii.gz",
    "-mask.nii.gz",
    ".png",
    "-brain.nii.gz",
    "-parts.nii.gz",
    "-scan.nii.gz",
    "-alignment.png",
    "-alignment.tfm",
];

const SIDECAR: &str = ".json";

/// Hidden names begin with this, followed by the key of their stem.
const HIDDEN: &str = ".oddscan-next-";

/// Number of characters of a key.
const KEY: usize = 16;

/// The place of one result.
///
/// A hidden name has a hash of the stem in it and not the stem, because a stem can be as long as
/// names may be.
pub(super) struct Place<'a> {
    pub(super) folder: &'a Path,
    stem: &'a str,
    key: String,
}

impl<'a> Place<'a> {
    pub(super) fn new(folder: &'a Path, stem: &'a str) -> Self {
        Self { folder, stem, key: key(stem) }
    }

    /// The name that users look for.
    pub(super) fn name(&self, suffix: &str) -> String {
        format!("{}_anomaly{suffix}", self.stem)
    }

    /// The name of a file until it gets the one that users look for.
    pub(super) fn hidden_name(&self, suffix: &str) -> String {
        format!("{HIDDEN}{}{suffix}", self.key)
    }

    pub(super) fn path(&self, suffix: &str) -> PathBuf {
        self.folder.join(self.name(suffix))
    }

    pub(super) fn hidden_path(&self, suffix: &str) -> PathBuf {
        self.folder.join(self.hidden_name(suffix))
    }

    pub(super) fn sidecar(&self) -> PathBuf {
        self.path(SIDECAR)
    }

    /// The sidecar of a result whose files are being removed.
    pub(super) fn removed_sidecar(&self) -> PathBuf {
        self.hidden_path("-removed")
    }
}

/// The first hex digits of the SHA-256 of a stem.
pub(super) fn key(stem: &str) -> String {
    let mut hex = hex::encode(Sha256::digest(stem));
    hex.truncate(KEY);
    hex
}

/// The key in a hidden name.
pub(super) fn key_of(name: &str) -> Option<&str> {
    name.strip_prefix(HIDDEN)?.get(..KEY)
}

/// The stem in a name that users look for.
pub(super) fn stem_of(name: &str) -> Option<&str> {
    let mut suffixes = SUFFIXES.iter().chain([&SIDECAR]);
    suffixes.find_map(|suffix| name.strip_suffix(suffix)?.strip_suffix("_anomaly"))
}
