//! The errors of the store, and the format that it reads.

use std::path::PathBuf;

use crate::domain::scan::ScanId;

/// Number of the store's format. It grows with every change that an older version would misread.
pub const FORMAT: u32 = 3;

/// The format before, which had the only records of scans and files. It is still opened, so that
/// these can be taken out.
pub(super) const OLD_FORMAT: u32 = 2;

/// An error of the store. All but damage are fatal: the next start repairs the store, or makes a
/// new one.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store's folder cannot be made.
    #[error("cannot make the store folder {}", path.display())]
    Folder {
        /// Folder that the settings name.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// Another process has the store open.
    #[error("the store in {} is in use: does another oddscan work with this state folder?", folder.display())]
    InUse {
        /// Folder of the store.
        folder: PathBuf,
        /// Error of the attempt to lock it.
        source: std::io::Error,
    },
    /// sled failed, usually because the disk did.
    #[error("the store failed; check the disk and the permissions of the state folder")]
    Sled(#[from] sled::Error),
    /// A version with another format wrote the store.
    #[error(
        "the store has format {found}, this version reads {FORMAT}; install the version that wrote it, or give another directories.state and let the scans be encoded again"
    )]
    Format {
        /// Number of the store's format; `u32::MAX` if it cannot be read.
        found: u32,
    },
    /// A value is missing, or its checksum is wrong.
    #[error(
        "the store is damaged: {what} of scan {scan}; the scan is encoded again from its archived source"
    )]
    Damaged {
        /// Kind of value: "tokens", "distances" and so on.
        what: &'static str,
        /// The scan that it belongs to.
        scan: ScanId,
    },
}
