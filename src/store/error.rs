//! What the store can fail with, and the layout that it reads.

use std::path::PathBuf;

/// Layout of the store; grows with every change that an older version would misread.
pub const FORMAT: u32 = 2;

/// What the store can fail with. All of it is fatal: going on could lose or double a scan.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be made.
    #[error("cannot make the store folder {}", path.display())]
    Folder {
        /// Folder.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Another process has it open.
    #[error("the store in {} is in use: does another oddscan work with this state folder?", folder.display())]
    InUse {
        /// Folder.
        folder: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// sled failed.
    #[error("the store failed; check the disk and the permissions of the state folder")]
    Sled(#[from] sled::Error),
    /// Written by another version.
    #[error(
        "the store has format {found}, this version reads {FORMAT}; install the version that wrote it, or give another directories.state and let the scans be encoded again"
    )]
    Format {
        /// Format found.
        found: u32,
    },
    /// A value is damaged.
    #[error(
        "the store is damaged: {what} of scan {scan}; restore the state folder, or remove it and let the scans be encoded again"
    )]
    Damaged {
        /// Kind of value.
        what: &'static str,
        /// Short id, or the key in hex.
        scan: String,
    },
}
