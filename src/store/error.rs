//! The errors of the store, and the format that it reads.

use std::path::PathBuf;

use super::kv::KvError;
use crate::domain::scan::ScanId;

/// Number of the store's format. It grows with every change that an older version would misread.
pub const FORMAT: u32 = 3;

/// The format before, which had the only records of scans and files. It is still opened, so that
/// these can be taken out.
pub(super) const OLD_FORMAT: u32 = 2;

/// An error of the store. All but [`StoreError::Damaged`] are fatal: the next start repairs the
/// store, or makes a new one.
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
    /// The database failed, usually because the disk did.
    #[error("the store failed; check the disk and the permissions of the state folder")]
    Failed(#[from] KvError),
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
        "the store is damaged: {what} of {}; the scan is encoded again from its archived source",
        owner(*scan)
    )]
    Damaged {
        /// Kind of value: "tokens", "distances" and so on.
        what: &'static str,
        /// Scan that the value belongs to; `None` if its key has none.
        scan: Option<ScanId>,
    },
}

impl StoreError {
    /// Whether the files of the store are not as they were written.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Failed(KvError::Damaged(_)) | Self::Damaged { .. })
    }

    /// Whether the disk fails to give back what it holds.
    pub(super) fn is_bad_read(&self) -> bool {
        let Self::Failed(KvError::Io(source)) = self else { return false };
        source.raw_os_error() == Some(libc::EIO)
    }
}

fn owner(scan: Option<ScanId>) -> String {
    scan.map_or_else(|| "no scan".to_owned(), |scan| format!("scan {scan}"))
}
