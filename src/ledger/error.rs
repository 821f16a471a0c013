//! The error of the ledger.

use std::io;

/// The ledger cannot be read or written. A daemon that continued could lose a scan or take it in
/// twice.
#[derive(Debug, thiserror::Error)]
#[error("{doing}; check the disk and the permissions of the state folder")]
pub struct LedgerError {
    /// What was being done, without the name of a file.
    pub doing: &'static str,
    /// Error of the operating system.
    pub source: io::Error,
}

/// Says what was being done when a call failed.
pub(super) fn failed(doing: &'static str) -> impl Fn(io::Error) -> LedgerError {
    move |source| LedgerError { doing, source }
}
