//! Reads the elements of a data set and writes them anew, so that the parser meets nothing that
//! could harm it.
//!
//! The parser allocates what a length announces, and recurses into sequences. Here every value is
//! read first, and sequences have a limit. The new data set has the kind of every value, and a
//! delimiter after every sequence and item. Elements without their kind, or of the kind `UN`, get
//! the kind that the dictionary gives them (PS3.5, 6.2.2).

use std::io::{self, Read};

use dicom_core::{
    Tag, VR,
    dictionary::{DataDictionary, DataDictionaryEntry},
};
use dicom_dictionary_std::{StandardDataDictionary, tags};

use super::faults::EXPORT_AGAIN;
use crate::domain::{
    dicom_start::{ElementHead, Encoding, HEAD_BYTES, has_short_length, is_kind},
    error::{
        QuarantineReason::{Bomb, Corrupt, Io, Truncated},
        Refusal,
    },
};

/// The part of a file to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// All before the pixels.
    Header,
    /// All up to the end of the pixels.
    Pixels,
}

/// A reader that can look ahead.
pub(super) struct Source<R> {
    reader: R,
    buffer: Vec<u8>,
    /// Bytes of the buffer that were taken.
    n_taken: usize,
    /// Bytes that were taken, altogether.
    position: u64,
}

const BUFFER_BYTES: u64 = 16 << 10;

impl<R: Read> Source<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, buffer: Vec::new(), n_taken: 0, position: 0 }
    }

    /// The next `n_bytes`, or fewer at the end of the file.
    pub(super) fn peek(&mut self, n_bytes: usize) -> Result<&[u8], Refusal> {
        if self.buffer.len() - self.n_taken < n_bytes {
            self.buffer.drain(..self.n_taken);
            self.n_taken = 0;
            let wanted = BUFFER_BYTES.max(n_bytes as u64);
            self.reader.by_ref().take(wanted).read_to_end(&mut self.buffer).map_err(unread)?;
        }
        let ahead = &self.buffer[self.n_taken..];
        Ok(&ahead[..n_bytes.min(ahead.len())])
    }

    /// Passes over bytes that were looked at.
    pub(super) fn skip(&mut self, n_bytes: usize) {
        let n_bytes = n_bytes.min(self.buffer.len() - self.n_taken);
        self.n_taken += n_bytes;
        self.position += n_bytes as u64;
    }

    /// Appends the next bytes to `out`, at most `n_bytes`. Returns how many there were.
    pub(super) fn copy(&mut self, n_bytes: u32, out: &mut Vec<u8>) -> Result<u32, Refusal> {
        let ahead = &self.buffer[self.n_taken..];
        let from_buffer = ahead.len().min(n_bytes as usize);
        out.extend_from_slice(&ahead[..from_buffer]);
        self.skip(from_buffer);

        // The vector grows with what is there, not with what the length announces.
        let left = u64::from(n_bytes) - from_buffer as u64;
        let n_read = match left {
            0 => 0,
            left => self.reader.by_ref().take(left).read_to_end(out).map_err(unread)?,
        };
        self.position += n_read as u64;
        Ok((from_buffer + n_read) as u32)
    }
}

impl<R: Read> Read for Source<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let ahead = &self.buffer[self.n_taken..];
        if ahead.is_empty() {
            return self.reader.read(out);
        }
        let n_bytes = ahead.len().min(out.len());
        out[..n_bytes].copy_from_slice(&ahead[..n_bytes]);
        self.skip(n_bytes);
        Ok(n_bytes)
    }
}

/// The refusal of a file that the file system or the decompression does not give.
fn unread(error: io::Error) -> Refusal {
    let (reason, needed) = match error.kind() {
        io::ErrorKind::FileTooLarge => (Bomb, "a data set that fits its file"),
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => (Corrupt, "deflated data"),
        io::ErrorKind::UnexpectedEof => (Truncated, "the end of the deflated data"),
        _ => (Io, "a file that can be read"),
    };
    Refusal::new(reason, format!("a file that cannot be read ({error})"), needed, EXPORT_AGAIN)
}

/// Sequences and items within one another. Scanners need fewer than ten.
const MAX_LEVELS: usize = 64;

/// Elements, items and texts of a data set. The parser takes 50 to 200 bytes for each, which may
/// have two bytes in the file. An enhanced image of 20,000 frames has about a million.
const MAX_PARTS: usize = 2_000_000;

/// Kinds of values that are lists of texts, divided by backslashes.
const LISTS: [&[u8; 2]; 14] = [
    b"AE", b"AS", b"CS", b"DA", b"DS", b"DT", b"IS", b"LO", b"PN", b"SH", b"TM", b"UC", b"UI",
    b"UR",
];

/// A sequence or an item that has begun.
#[derive(Debug, Clone, Copy)]
struct Level {
    is_item: bool,
    /// Position in the file behind it; `None` if a delimiter ends it.
    end: Option<u64>,
    /// Whether it was stored as `UN`. Its content may then lack the kinds of values.
    is_foreign: bool,
}

/// The elements of a data set, see the top of this file. They are little endian, unless `encoding`
/// is big endian.
///
/// # Errors
/// If the file ends within an element, or sequences and items do not fit into one another.
pub(super) fn elements<R: Read>(
    source: &mut Source<R>,
    encoding: Encoding,
    part: Part,
) -> Result<Vec<u8>, Refusal> {
    let mut elements =
        Elements { source, encoding, out: Vec::new(), levels: Vec::new(), n_parts: 0 };
    elements.read_all(part)?;
    Ok(elements.out)
}

struct Elements<'a, R> {
    source: &'a mut Source<R>,
    encoding: Encoding,
    out: Vec<u8>,
    levels: Vec<Level>,
    /// Number of elements, items and texts so far.
    n_parts: usize,
}

const ITEM: (u16, u16) = (0xfffe, 0xe000);
const ITEM_END: (u16, u16) = (0xfffe, 0xe00d);
const SEQUENCE_END: (u16, u16) = (0xfffe, 0xe0dd);

impl<R: Read> Elements<'_, R> {
    fn read_all(&mut self, part: Part) -> Result<(), Refusal> {
        loop {
            self.end_levels()?;
            let Some(head) = self.peek_head()? else { return Ok(()) };
            let tag = Tag(head.tag.0, head.tag.1);
            self.count(1)?;

            if self.levels.is_empty() && tag >= tags::PIXEL_DATA && head.tag.0 != ITEM.0 {
                return match part {
                    Part::Pixels if tag == tags::PIXEL_DATA => self.pixels(&head),
                    Part::Header | Part::Pixels => Ok(()),
                };
            }

            self.source.skip(head.n_bytes);
            if head.tag.0 == ITEM.0 { self.delimiter(&head)? } else { self.element(&head)? }
        }
    }

    /// The next header, which is not taken yet. `None` at the end of the file.
    fn peek_head(&mut self) -> Result<Option<ElementHead>, Refusal> {
        let is_foreign = self.levels.last().is_some_and(|level| level.is_foreign);
        let is_root = self.levels.is_empty();
        let bytes = self.source.peek(HEAD_BYTES)?;
        if bytes.is_empty() && is_root {
            return Ok(None);
        }

        let has_kind = bytes.get(4..6).is_some_and(|kind| is_kind([kind[0], kind[1]]));
        let encoding = match has_kind {
            false if is_foreign => Encoding::Implicit,
            _ => self.encoding,
        };
        let head = ElementHead::read(bytes, encoding);
        let needed = "the rest of the file";
        head.map(Some).ok_or_else(|| truncated("within the header of an element".into(), needed))
    }

    /// Ends the sequences and items whose length is reached.
    fn end_levels(&mut self) -> Result<(), Refusal> {
        while let Some(&Level { is_item, end: Some(end), .. }) = self.levels.last() {
            if self.source.position < end {
                break;
            } else if self.source.position > end {
                return Err(corrupt("an element that is longer than its item or sequence"));
            }
            self.end_level(is_item);
        }
        Ok(())
    }

    fn end_level(&mut self, is_item: bool) {
        self.levels.pop();
        self.put_tag(if is_item { ITEM_END } else { SEQUENCE_END });
        self.put_length(Some(0));
    }

    fn delimiter(&mut self, head: &ElementHead) -> Result<(), Refusal> {
        let in_item = self.levels.last().map(|level| level.is_item);
        match (head.tag, in_item) {
            (ITEM, Some(false)) => {
                self.begin_level(true, head.length, false)?;
                self.put_tag(ITEM);
                self.put_length(None);
            }
            (ITEM_END, Some(true)) => self.end_level(true),
            (SEQUENCE_END, Some(false)) => self.end_level(false),
            // Some writers state a length and set a delimiter, too.
            (ITEM_END, _) | (SEQUENCE_END, None) => {}
            _ => return Err(corrupt("an item or the end of a sequence outside of a sequence")),
        }
        Ok(())
    }

    fn begin_level(
        &mut self,
        is_item: bool,
        length: Option<u32>,
        is_foreign: bool,
    ) -> Result<(), Refusal> {
        if self.levels.len() >= MAX_LEVELS {
            let most = MAX_LEVELS / 2;
            let found = format!("sequences nested more than {most} deep");
            let needed = format!("at most {most}");
            return Err(Refusal::new(Corrupt, found, needed, EXPORT_AGAIN));
        }
        let is_foreign = is_foreign || self.levels.last().is_some_and(|level| level.is_foreign);
        let end = length.map(|length| self.source.position + u64::from(length));
        self.levels.push(Level { is_item, end, is_foreign });
        Ok(())
    }

    fn element(&mut self, head: &ElementHead) -> Result<(), Refusal> {
        if self.levels.last().is_some_and(|level| !level.is_item) {
            return Err(corrupt("an element where an item of a sequence belongs"));
        }

        // The pixels of an icon may be compressed like those of the image.
        if head.length.is_none() && Tag(head.tag.0, head.tag.1) == tags::PIXEL_DATA {
            return self.pixels(head);
        }

        let in_dictionary = in_dictionary(head.tag);
        let is_stated = head.kind == Some(*b"SQ");
        let is_implied = head.kind.is_none() && in_dictionary == Some(VR::SQ);
        let Some(length) = head.length.filter(|_| !is_stated && !is_implied) else {
            let is_foreign = self.encoding != Encoding::Implicit && !is_stated;
            self.begin_level(false, head.length, is_foreign)?;
            self.put_head(head.tag, *b"SQ", None);
            return Ok(());
        };

        let kind = kind(head, length);
        self.put_head(head.tag, kind, Some(length));
        let start = self.out.len();
        self.copy(length, head.tag)?;
        if LISTS.contains(&&kind) {
            self.count(self.out[start..].iter().filter(|&&byte| byte == b'\\').count())?;
        }
        Ok(())
    }

    fn count(&mut self, n_parts: usize) -> Result<(), Refusal> {
        self.n_parts += n_parts;
        if self.n_parts > MAX_PARTS {
            let found = format!("a data set of over {MAX_PARTS} elements, items and texts");
            let needed = format!("at most {MAX_PARTS}");
            return Err(Refusal::new(Bomb, found, needed, EXPORT_AGAIN));
        }
        Ok(())
    }

    fn pixels(&mut self, head: &ElementHead) -> Result<(), Refusal> {
        self.source.skip(head.n_bytes);
        if let Some(length) = head.length {
            self.put_head(head.tag, kind(head, length), Some(length));
            return self.copy(length, head.tag);
        }

        // Compressed: an offset table and the parts of the frames, as items.
        self.put_head(head.tag, *b"OB", None);
        loop {
            // Some writers leave the last delimiter out.
            if self.source.peek(1)?.is_empty() {
                break;
            }
            let Some(item) = self.peek_head()? else { break };
            self.count(1)?;
            self.source.skip(item.n_bytes);
            match (item.tag, item.length) {
                (SEQUENCE_END, _) => break,
                (ITEM, Some(length)) => {
                    self.put_tag(ITEM);
                    self.put_length(Some(length));
                    self.copy(length, head.tag)?;
                }
                _ => return Err(corrupt("compressed pixels that are no items")),
            }
        }
        self.put_tag(SEQUENCE_END);
        self.put_length(Some(0));
        Ok(())
    }

    /// Copies a value.
    fn copy(&mut self, length: u32, tag: (u16, u16)) -> Result<(), Refusal> {
        let n_bytes = self.source.copy(length, &mut self.out)?;
        if n_bytes < length {
            let tag = Tag(tag.0, tag.1);
            let at = format!("within the element {tag}, after {n_bytes} bytes of it");
            return Err(truncated(at, format!("{length} bytes, as its length says")));
        }
        Ok(())
    }

    fn put_head(&mut self, tag: (u16, u16), kind: [u8; 2], length: Option<u32>) {
        self.put_tag(tag);
        self.out.extend(kind);
        match length.map(u16::try_from) {
            Some(Ok(length)) if has_short_length(kind) => self.put_short(length),
            _ => {
                self.out.extend([0; 2]);
                self.put_length(length);
            }
        }
    }

    fn put_tag(&mut self, (group, number): (u16, u16)) {
        self.put_short(group);
        self.put_short(number);
    }

    fn put_short(&mut self, number: u16) {
        let is_big = self.encoding == Encoding::ExplicitBig;
        self.out.extend(if is_big { number.to_be_bytes() } else { number.to_le_bytes() });
    }

    /// Appends a length; `None` is a value that a delimiter ends.
    fn put_length(&mut self, length: Option<u32>) {
        let length = length.unwrap_or(u32::MAX);
        let is_big = self.encoding == Encoding::ExplicitBig;
        self.out.extend(if is_big { length.to_be_bytes() } else { length.to_le_bytes() });
    }
}

fn in_dictionary((group, number): (u16, u16)) -> Option<VR> {
    let entry = StandardDataDictionary.by_tag(Tag(group, number));
    entry.map(|entry| entry.vr().relaxed())
}

/// The kind of a value, so that the parser reads all its bytes: `UN` if they do not fit its kind.
fn kind(head: &ElementHead, length: u32) -> [u8; 2] {
    let stated = head.kind.filter(|kind| kind != b"UN" && is_kind(*kind));
    let from_dictionary = || {
        let vr = in_dictionary(head.tag).filter(|vr| *vr != VR::SQ)?;
        vr.to_string().as_bytes().try_into().ok()
    };
    let kind = stated.or_else(from_dictionary).unwrap_or(*b"UN");

    let unit = match &kind {
        b"US" | b"SS" | b"OW" => 2,
        b"UL" | b"SL" | b"FL" | b"AT" | b"OL" | b"OF" => 4,
        b"FD" | b"OD" | b"OV" | b"SV" | b"UV" => 8,
        _ => 1,
    };
    let fits =
        length.is_multiple_of(unit) && (u16::try_from(length).is_ok() || !has_short_length(kind));
    if fits { kind } else { *b"UN" }
}

fn truncated(at: String, needed: impl Into<String>) -> Refusal {
    Refusal::new(Truncated, format!("a file that ends {at}"), needed, EXPORT_AGAIN)
}

fn corrupt(found: &str) -> Refusal {
    Refusal::new(Corrupt, found, "a data set (PS3.5) without damage", EXPORT_AGAIN)
}
