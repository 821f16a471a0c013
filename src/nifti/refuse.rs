//! The errors for a file that cannot be read.

use std::io;

use crate::domain::error::{QuarantineReason, Refusal, ScanError};

pub(super) const EXPORT_AGAIN: &str = "export or copy the file again";

pub(super) fn refuse<T>(
    reason: QuarantineReason,
    found: impl Into<String>,
    needed: impl Into<String>,
    action: &str,
) -> Result<T, ScanError> {
    Err(Refusal::new(reason, found, needed, action).into())
}

pub(super) fn io_error(source: io::Error) -> ScanError {
    ScanError::Io { doing: "reading a scan", source }
}
