//! Opens a DICOM file, whatever its beginning: with preamble and meta information, with a part of
//! them, or as a bare data set.
//!
//! The first element of the data set shows how it is encoded, as in pydicom. This counts more than
//! the transfer syntax of the meta information, because some exports state another one.

use std::io::{self, Read};

use dicom_dictionary_std::{tags, uids};
use dicom_object::{DefaultDicomObject, OpenFileOptions, file::ReadPreamble};
use flate2::read::{DeflateDecoder, ZlibDecoder};

use super::{
    elements::{Part, Source, elements},
    faults::{EXPORT_AGAIN, unreadable},
};
use crate::domain::{
    dicom_start::{
        ElementHead, Encoding, HEAD_BYTES, PREAMBLE_BYTES, START_BYTES, begins_with_mark, is_kind,
    },
    error::{
        QuarantineReason::{BadHeader, Corrupt, Truncated},
        Refusal,
    },
};

/// Explicit VR Big Endian. It is retired, but old archives have many such files.
pub(super) const EXPLICIT_VR_BIG_ENDIAN: &str = "1.2.840.10008.1.2.2";

/// A file, parsed.
pub(super) struct Opened {
    /// The data set. Its meta information states the transfer syntax of the pixels.
    pub object: DefaultDicomObject,
    /// Transfer syntax of the pixels; `None` if they are compressed and nothing states how.
    pub syntax: Option<String>,
    /// Whether the file is the directory of a disc.
    pub is_directory: bool,
}

/// The meta information of a file, as far as it is needed.
#[derive(Debug, Default, PartialEq)]
struct Meta {
    /// The stated transfer syntax.
    syntax: Option<String>,
    /// The stated kind of object.
    class: Option<String>,
}

/// Opens a file and reads a part of it.
///
/// # Errors
/// If it is no DICOM file, is encoded in no known way, ends too early, or is damaged.
pub(super) fn open(reader: impl Read, part: Part) -> Result<Opened, Refusal> {
    let mut source = Source::new(reader);
    skip_mark(&mut source)?;
    let meta = read_meta(&mut source)?;

    if meta.is_deflated() && Encoding::of_start(source.peek(HEAD_BYTES)?).is_none() {
        let is_zlib = source.peek(2)?.try_into().is_ok_and(begins_like_zlib);
        return read(&mut Source::new(Inflate::new(source, is_zlib)), &meta, part);
    }
    read(&mut source, &meta, part)
}

fn read<R: Read>(source: &mut Source<R>, meta: &Meta, part: Part) -> Result<Opened, Refusal> {
    let start = source.peek(HEAD_BYTES)?;
    if start.is_empty() {
        let found = "a file that ends before its data set";
        return Err(Refusal::new(Truncated, found, "a data set", EXPORT_AGAIN));
    }
    let encoding = Encoding::of_start(start).or_else(|| meta.encoding_of(start));
    let encoding = encoding.ok_or_else(|| in_no_encoding(meta))?;

    let is_directory = meta.class.as_deref() == Some(uids::MEDIA_STORAGE_DIRECTORY_STORAGE);
    // Nothing in the directory of a disc is needed.
    let bytes = if is_directory { Vec::new() } else { elements(source, encoding, part)? };
    let parsed_as = match encoding {
        Encoding::Implicit | Encoding::Explicit => uids::EXPLICIT_VR_LITTLE_ENDIAN,
        Encoding::ExplicitBig => EXPLICIT_VR_BIG_ENDIAN,
    };
    let file = io::Cursor::new(file_meta(parsed_as)).chain(io::Cursor::new(bytes));
    let options = OpenFileOptions::new().read_preamble(ReadPreamble::Never);
    let mut object = options.from_reader(file).map_err(unreadable)?;

    let pixels = object.get(tags::PIXEL_DATA);
    let is_plain = pixels.is_none_or(|pixels| pixels.value().primitive().is_some());
    let syntax = match &meta.syntax {
        Some(syntax) if !meta.is_deflated() && !NATIVE.contains(&syntax.as_str()) => {
            Some(syntax.clone())
        }
        _ => is_plain.then(|| parsed_as.to_owned()),
    };
    if let Some(syntax) = &syntax {
        object.meta_mut().transfer_syntax.clone_from(syntax);
    }

    Ok(Opened { object, syntax, is_directory })
}

/// The transfer syntaxes of pixels without compression. The data set shows which of them it is.
const NATIVE: [&str; 3] =
    [uids::IMPLICIT_VR_LITTLE_ENDIAN, uids::EXPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN];

impl Meta {
    /// The stated encoding, if the first element fits it. This is for data sets that begin with a
    /// private element.
    fn encoding_of(&self, start: &[u8]) -> Option<Encoding> {
        let encoding = match self.syntax.as_deref()? {
            uids::IMPLICIT_VR_LITTLE_ENDIAN => Encoding::Implicit,
            EXPLICIT_VR_BIG_ENDIAN => Encoding::ExplicitBig,
            _ => Encoding::Explicit,
        };
        let head = ElementHead::read(start, encoding)?;
        let fits = match head.kind {
            Some(kind) => is_kind(kind),
            None => encoding == Encoding::Implicit && head.length.is_none_or(|n| n < 1 << 28),
        };
        fits.then_some(encoding)
    }

    fn is_deflated(&self) -> bool {
        self.syntax.as_deref() == Some(uids::DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)
    }
}

fn in_no_encoding(meta: &Meta) -> Refusal {
    let found = match &meta.syntax {
        Some(syntax) => format!(
            "a data set that is not in the encoding that its header states (transfer syntax \
             {syntax}), nor in another one"
        ),
        None => "a data set in no known encoding, and no transfer syntax".to_owned(),
    };
    let needed = "a data set in implicit or explicit VR (PS3.5, annex A)";
    Refusal::new(Corrupt, found, needed, EXPORT_AGAIN)
}

/// Passes over the preamble and the mark, if they are there.
fn skip_mark<R: Read>(source: &mut Source<R>) -> Result<(), Refusal> {
    let start = source.peek(START_BYTES)?;
    let has_mark = start.get(PREAMBLE_BYTES..).is_some_and(|rest| rest.starts_with(b"DICM"));
    let n_bytes = if has_mark {
        PREAMBLE_BYTES + 4
    } else if begins_with_mark(start) {
        4
    } else if may_be_data_set(start) {
        0
    } else {
        return Err(no_dicom(start.len()));
    };
    source.skip(n_bytes);
    Ok(())
}

/// Whether a file without the mark may begin with meta information or with a data set. A person or
/// a name has said that the file is DICOM, so that this is less strict than
/// [`begins_like_dicom`](crate::domain::dicom_start::begins_like_dicom).
fn may_be_data_set(start: &[u8]) -> bool {
    let head = Encoding::of_start(start).and_then(|encoding| ElementHead::read(start, encoding));
    head.is_some_and(|head| (0x0002..=0x0028).contains(&head.tag.0) && head.tag.0 % 2 == 0)
}

fn no_dicom(n_bytes: usize) -> Refusal {
    let needed = "the mark DICM after a preamble (PS3.10), or a data set without them";
    let (reason, found) = match n_bytes {
        0 => (Truncated, "an empty file".to_owned()),
        n_bytes if n_bytes < PREAMBLE_BYTES + 4 => {
            (Truncated, format!("a file of {n_bytes} bytes that does not begin like DICOM"))
        }
        _ => (Corrupt, "a file that does not begin like DICOM".to_owned()),
    };
    Refusal::new(reason, found, needed, "remove it if it is no image; else export it again")
}

/// Limit on one value of the meta information, bytes.
const MAX_META_BYTES: u32 = 1 << 20;

/// Reads the meta information: all elements of group 0002. Its stated length may be wrong or
/// missing.
fn read_meta<R: Read>(source: &mut Source<R>) -> Result<Meta, Refusal> {
    let mut meta = Meta::default();
    loop {
        let start = source.peek(HEAD_BYTES)?;
        if !start.starts_with(&[2, 0]) {
            return Ok(meta);
        }

        // It is always explicit; some writers err.
        let has_kind = start.get(4..6).is_some_and(|kind| is_kind([kind[0], kind[1]]));
        let encoding = if has_kind { Encoding::Explicit } else { Encoding::Implicit };
        let Some(head) = ElementHead::read(start, encoding) else {
            return Err(cut("within its meta information"));
        };
        let Some(length) = head.length.filter(|&length| length <= MAX_META_BYTES) else {
            let found = format!("meta information with the length {:?}", head.length);
            let needed = format!("at most {MAX_META_BYTES} bytes");
            return Err(Refusal::new(BadHeader, found, needed, EXPORT_AGAIN));
        };

        source.skip(head.n_bytes);
        let mut value = Vec::new();
        if source.copy(length, &mut value)? < length {
            return Err(cut("within its meta information"));
        }
        match head.tag.1 {
            0x0002 => meta.class = uid(&value),
            0x0010 => meta.syntax = uid(&value),
            _ => {}
        }
    }
}

fn cut(at: &str) -> Refusal {
    Refusal::new(Truncated, format!("a file that ends {at}"), "the whole file", EXPORT_AGAIN)
}

/// A UID, without its padding. Nothing else passes, because refusals quote it.
fn uid(value: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(value).ok()?;
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    let is_uid = !text.is_empty()
        && text.len() <= 64
        && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    is_uid.then(|| text.to_owned())
}

/// Meta information for the parser.
fn file_meta(syntax: &str) -> Vec<u8> {
    let element = |number: u16, uid: &str| {
        let mut value = uid.as_bytes().to_vec();
        value.resize(value.len().next_multiple_of(2), 0);
        let length = (value.len() as u16).to_le_bytes();
        [&2_u16.to_le_bytes()[..], &number.to_le_bytes(), b"UI", &length, &value].concat()
    };
    // The parser wants the first two. Nothing reads them afterwards.
    let values = [element(2, "1.2"), element(3, "1.2"), element(16, syntax)].concat();
    let length = (values.len() as u32).to_le_bytes();
    [&b"DICM\x02\0\0\0UL\x04\0"[..], &length, &values].concat()
}

/// Whether two bytes begin a zlib stream (RFC 1950, 2.2). The standard wants a deflated data set
/// without this frame, but some writers leave it.
fn begins_like_zlib(start: [u8; 2]) -> bool {
    start[0] & 0x0f == 8 && u16::from_be_bytes(start).is_multiple_of(31)
}

/// A deflated data set may be this many times larger than its file, plus [`FREE_BYTES`]. Headers
/// and slices deflate by a factor of 2 to 10, a bomb by a thousand.
const MAX_RATIO: u64 = 100;
const FREE_BYTES: u64 = 16 << 20;

/// Inflates a data set, within limits.
enum Inflate<R> {
    Raw(DeflateDecoder<R>),
    Zlib(ZlibDecoder<R>),
}

impl<R: Read> Inflate<R> {
    fn new(reader: R, is_zlib: bool) -> Self {
        if is_zlib {
            Self::Zlib(ZlibDecoder::new(reader))
        } else {
            Self::Raw(DeflateDecoder::new(reader))
        }
    }
}

impl<R: Read> Read for Inflate<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let (n_read, n_in, n_out) = match self {
            Self::Raw(decoder) => (decoder.read(out)?, decoder.total_in(), decoder.total_out()),
            Self::Zlib(decoder) => (decoder.read(out)?, decoder.total_in(), decoder.total_out()),
        };
        if n_out > n_in.saturating_mul(MAX_RATIO).saturating_add(FREE_BYTES) {
            let text = format!("{n_in} deflated bytes give more than {n_out}");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        Ok(n_read)
    }
}
