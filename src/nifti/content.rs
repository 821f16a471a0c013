//! The unpacked content of a file: every byte of it, or an error.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use flate2::bufread::GzDecoder;
use rustix::fs::OFlags;

use super::{
    header::FIRST_OFFSET,
    refuse::{EXPORT_AGAIN, io_error, refuse},
};
use crate::domain::{
    error::{
        QuarantineReason::{Corrupt, TooLarge, Truncated, Unsupported},
        Refusal, ScanError,
    },
    scan::Limits,
};

/// Opens a file and unpacks it while it is read.
pub(super) fn content(path: &Path, limits: &Limits) -> Result<Box<dyn Read>, ScanError> {
    let file = open(path).map_err(io_error)?;
    let meta = file.metadata().map_err(io_error)?;
    if !meta.is_file() {
        let action = "export a file; folders, pipes and devices are not read";
        return refuse(Unsupported, "no regular file", "a NIfTI file", action);
    }
    check_size(meta.len(), limits)?;

    let mut start = [0; 2];
    let mut file = BufReader::with_capacity(1 << 18, file);
    let n_start = read_up_to(&mut file, &mut start).map_err(io_error)?;
    let whole = io::Cursor::new(start).take(n_start as u64).chain(file);
    Ok(if start == [0x1f, 0x8b] {
        Box::new(GzipMembers::new(BufReader::with_capacity(1 << 18, whole)))
    } else {
        Box::new(whole)
    })
}

/// Refuses a file of more bytes than the limits allow.
///
/// # Errors
/// The refusal, if the file is too large.
pub fn check_size(n_bytes: u64, limits: &Limits) -> Result<(), Refusal> {
    let most = limits.max_file_bytes;
    if n_bytes <= most {
        return Ok(());
    }
    let needed = format!("at most {most} (intake.max_file_mib)");
    let action = "raise intake.max_file_mib if you expect files of this size";
    Err(Refusal::new(TooLarge, format!("{n_bytes} bytes"), needed, action))
}

/// The header and the extension flag, or less if the file is shorter.
pub(super) fn read_start(reader: &mut impl Read) -> Result<Vec<u8>, ScanError> {
    let mut start = vec![0; FIRST_OFFSET];
    let n_start = read_up_to(reader, &mut start).map_err(stream_error)?;
    start.truncate(n_start);
    Ok(start)
}

/// Opens a file. It follows links, because a person may name a link to a scan. If the file is a
/// pipe, it does not wait for a writer.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

pub(super) fn read_up_to(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut n_read = 0;
    while n_read < buffer.len() {
        match reader.read(&mut buffer[n_read..])? {
            0 => break,
            n => n_read += n,
        }
    }
    Ok(n_read)
}

/// The content of a gzip file, member by member. Zeros after a member are skipped, as in gzip and
/// Python, because tapes and some archives pad files to whole blocks. flate2's own `MultiGzDecoder`
/// treats such zeros as a member that was cut off.
pub(super) struct GzipMembers<R> {
    /// `None` at the end of the file.
    member: Option<GzDecoder<R>>,
}

/// The data after a member is neither another member nor zeros.
#[derive(Debug, thiserror::Error)]
#[error("other data after the end of the compressed stream")]
pub(super) struct TrailingData;

impl<R: BufRead> GzipMembers<R> {
    fn new(file: R) -> Self {
        Self { member: Some(GzDecoder::new(file)) }
    }

    /// Goes to the start of the next member.
    fn next_member(mut file: R) -> io::Result<Option<GzDecoder<R>>> {
        loop {
            let buffer = file.fill_buf()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let n_zeros = buffer.iter().take_while(|&&byte| byte == 0).count();

            match buffer.get(n_zeros) {
                None => file.consume(n_zeros),
                // The first byte of gzip's magic. The decoder checks the rest.
                Some(0x1f) => {
                    file.consume(n_zeros);
                    return Ok(Some(GzDecoder::new(file)));
                }
                Some(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, TrailingData)),
            }
        }
    }
}

impl<R: BufRead> Read for GzipMembers<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let n_read = member.read(buffer)?;
            if n_read > 0 || buffer.is_empty() {
                return Ok(n_read);
            }
            // The checksum was right: `read` reports a wrong one.
            if let Some(member) = self.member.take() {
                self.member = Self::next_member(member.into_inner())?;
            }
        }
        Ok(0)
    }
}

/// The error for a failed read of the content. Either the compressed stream or the disk is at
/// fault.
pub(super) fn stream_error(error: io::Error) -> ScanError {
    let refusal = match error.kind() {
        _ if error.get_ref().is_some_and(|cause| cause.is::<TrailingData>()) => Refusal::new(
            Corrupt,
            error.to_string(),
            "no data, zeros, or another gzip stream after it",
            "something was added to the file, or a copy changed it; copy it again",
        ),
        io::ErrorKind::UnexpectedEof => {
            Refusal::new(Truncated, "a compressed stream that ends early", "its end", EXPORT_AGAIN)
        }
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => Refusal::new(
            Corrupt,
            format!("a damaged compressed stream ({error})"),
            "a gzip stream with the right checksum",
            EXPORT_AGAIN,
        ),
        _ => return io_error(error),
    };
    refusal.into()
}
