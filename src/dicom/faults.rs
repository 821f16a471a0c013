//! Refusals of files that cannot be read.

use std::io;

use crate::domain::error::{
    QuarantineReason::{Corrupt, Io, Truncated},
    Refusal,
};

pub(super) const EXPORT_AGAIN: &str = "export or copy the series again";

/// The refusal of a file by the parser or a codec.
pub(super) fn unreadable(error: impl std::error::Error) -> Refusal {
    let mut text = error.to_string();
    let mut cause = error.source();
    let mut reason = Corrupt;
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        reason = match error.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::UnexpectedEof) => Truncated,
            // Codecs and parsers report faults of the content with these kinds.
            None
            | Some(
                io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::Other,
            ) => reason,
            // The file system is at fault.
            Some(_) => Io,
        };
        cause = error.source();
    }

    // The text may quote the file, so it is shortened and loses control characters.
    let text: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    let found = format!("a file that cannot be read as DICOM ({text})");
    Refusal::new(reason, found, "a DICOM file (PS3.10) without damage", EXPORT_AGAIN)
}
