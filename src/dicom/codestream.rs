//! What compressed pixels say about themselves, before a codec reads them.
//!
//! A codec allocates what the codestream announces, and a few bytes can announce gigabytes. An
//! image of DICOM has the extents of its header and one component (PS3.5, 8.2). What announces
//! anything else is refused here.

use dicom_dictionary_std::uids;

use super::faults::EXPORT_AGAIN;
use crate::domain::error::{
    QuarantineReason::{self, Bomb, Corrupt, Truncated},
    Refusal,
};

/// Tiles of a JPEG 2000 image. The codec takes about 7 KB for each. Scanners write one or a few.
const MAX_TILES: u64 = 1024;

/// What a codestream announces.
#[derive(Debug, PartialEq, Eq)]
struct Announced {
    columns: u64,
    rows: u64,
    n_components: u64,
    n_tiles: u64,
}

/// Refuses compressed pixels that announce another image than the header: one of `extents` (columns
/// and rows), with `n_bytes` per pixel. `fragments` are the parts of all frames.
///
/// A frame begins with a fragment. Which fragments follow is not known here, so that each one that
/// begins like an image is checked together with those behind it.
///
/// # Errors
/// If a codestream announces another image, or ends before it announces any.
pub(super) fn check(
    syntax: &str,
    fragments: &[Vec<u8>],
    extents: [usize; 2],
    n_bytes: usize,
) -> Result<(), Refusal> {
    let [columns, rows] = extents.map(|extent| extent as u64);
    if syntax == uids::RLE_LOSSLESS {
        let mut frames = fragments.iter();
        return frames.try_for_each(|frame| check_rle(frame, columns * rows, n_bytes));
    }

    let is_jpeg_2000 = [uids::JPEG2000, uids::JPEG2000_LOSSLESS].contains(&syntax);
    for (index, fragment) in fragments.iter().enumerate() {
        let bytes = Bytes(fragments[index..].iter().flatten().copied());
        let announced = match is_jpeg_2000 {
            true if fragment.starts_with(CODESTREAM) => jpeg_2000(bytes),
            true if fragment.starts_with(BOXES) => jpeg_2000_in_boxes(bytes),
            false if fragment.starts_with(JPEG) => jpeg(bytes),
            // The codecs refuse a frame that begins so.
            _ => continue,
        };
        announced.ok_or_else(without_extents)?.check(columns, rows)?;
    }
    Ok(())
}

impl Announced {
    fn check(&self, columns: u64, rows: u64) -> Result<(), Refusal> {
        let Self { columns: have_columns, rows: have_rows, n_components, n_tiles } = *self;
        if (have_columns, have_rows) != (columns, rows) {
            let is_larger = have_columns.saturating_mul(have_rows) > columns.saturating_mul(rows);
            let found = format!("a compressed image of {have_columns} x {have_rows} pixels");
            let needed = format!("{columns} x {rows}, as columns and rows in the header say");
            return Err(refusal(if is_larger { Bomb } else { Corrupt }, found, needed));
        }
        if n_components != 1 {
            let found = format!("a compressed image with {n_components} components");
            return Err(refusal(Corrupt, found, "one, as the header says"));
        }
        if n_tiles > MAX_TILES {
            let found = format!("a compressed image in {n_tiles} tiles");
            return Err(refusal(Bomb, found, format!("at most {MAX_TILES}")));
        }
        Ok(())
    }
}

fn refusal(reason: QuarantineReason, found: String, needed: impl Into<String>) -> Refusal {
    Refusal::new(reason, found, needed, EXPORT_AGAIN)
}

fn without_extents() -> Refusal {
    let found = "a compressed image without its extents";
    Refusal::new(Corrupt, found, "a codestream that begins with its header", EXPORT_AGAIN)
}

/// The bytes of a codestream, read in turn. `None` at its end.
struct Bytes<I>(I);

impl<I: Iterator<Item = u8>> Bytes<I> {
    fn number(&mut self, n_bytes: usize) -> Option<u64> {
        (0..n_bytes).try_fold(0, |number, _| Some(number << 8 | u64::from(self.0.next()?)))
    }

    fn skip(&mut self, n_bytes: u64) -> Option<()> {
        match usize::try_from(n_bytes).ok()? {
            0 => Some(()),
            n_bytes => self.0.nth(n_bytes - 1).map(drop),
        }
    }
}

/// The beginning of a JPEG image.
const JPEG: &[u8] = &[0xff, 0xd8];

/// Reads the frame header of a JPEG image (ITU-T T.81, B.2.2). Bytes between two segments are
/// passed over, as the codec does.
fn jpeg(mut bytes: Bytes<impl Iterator<Item = u8>>) -> Option<Announced> {
    loop {
        while bytes.number(1)? != 0xff {}
        let mut marker = bytes.number(1)?;
        while marker == 0xff {
            marker = bytes.number(1)?;
        }

        match marker {
            // Fill bytes, restarts and the start of the image have no content.
            0x00 | 0x01 | 0xd0..=0xd8 => {}
            // The end, or the pixels.
            0xd9 | 0xda => return None,
            // Tables have numbers among those of the frame headers.
            0xc0..=0xcf if ![0xc4, 0xc8, 0xcc].contains(&marker) => {
                bytes.skip(3)?;
                let (rows, columns) = (bytes.number(2)?, bytes.number(2)?);
                return Some(Announced {
                    columns,
                    rows,
                    n_components: bytes.number(1)?,
                    n_tiles: 1,
                });
            }
            _ => {
                let length = bytes.number(2)?;
                bytes.skip(length.checked_sub(2)?)?;
            }
        }
    }
}

/// The beginning of a JPEG 2000 codestream, up to the marker of its extents.
const CODESTREAM: &[u8] = &[0xff, 0x4f, 0xff, 0x51];

/// Reads the extents of a JPEG 2000 codestream (ITU-T T.800, A.5.1).
fn jpeg_2000(mut bytes: Bytes<impl Iterator<Item = u8>>) -> Option<Announced> {
    bytes.skip(CODESTREAM.len() as u64 + 4)?;
    let mut pair = || Some([bytes.number(4)?, bytes.number(4)?]);
    let [end, start, tile, first_tile] = [pair()?, pair()?, pair()?, pair()?];
    let n_components = bytes.number(2)?;

    let n_tiles = |axis: usize| match tile[axis] {
        0 => None,
        extent => Some(end[axis].saturating_sub(first_tile[axis]).div_ceil(extent)),
    };
    Some(Announced {
        columns: end[0].saturating_sub(start[0]),
        rows: end[1].saturating_sub(start[1]),
        n_components,
        n_tiles: n_tiles(0)? * n_tiles(1)?,
    })
}

/// The beginning of a JPEG 2000 file. The standard wants bare codestreams, but some writers embed
/// files.
const BOXES: &[u8] = b"\0\0\0\x0cjP  \r\n\x87\n";

/// Reads the extents of the first codestream in a JPEG 2000 file (ITU-T T.800, I.4).
fn jpeg_2000_in_boxes(mut bytes: Bytes<impl Iterator<Item = u8>>) -> Option<Announced> {
    loop {
        let (length, kind) = (bytes.number(4)?, bytes.number(4)?);
        if kind == u64::from(u32::from_be_bytes(*b"jp2c")) {
            if length == 1 {
                bytes.skip(8)?;
            }
            return jpeg_2000(bytes);
        }
        let rest = match length {
            1 => bytes.number(8)?.checked_sub(16)?,
            length => length.checked_sub(8)?,
        };
        bytes.skip(rest)?;
    }
}

/// Refuses a frame of runs (PS3.5, annex G) that does not have a segment for each byte of a pixel,
/// or whose segments give too few bytes.
fn check_rle(frame: &[u8], n_pixels: u64, n_bytes: usize) -> Result<(), Refusal> {
    let offset = |index: usize| {
        let bytes = frame.get(4 * index..4 * index + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    let n_segments = offset(0).ok_or_else(without_extents)?;
    if n_segments != n_bytes {
        let found = format!("a compressed frame of {n_segments} segments");
        return Err(refusal(Corrupt, found, format!("{n_bytes}, one for each byte of a pixel")));
    }

    for segment in 1..=n_segments {
        let start = offset(segment).ok_or_else(without_extents)?;
        let end = if segment < n_segments { offset(segment + 1) } else { Some(frame.len()) };
        let runs = end.and_then(|end| frame.get(start..end)).ok_or_else(without_extents)?;
        let n_unpacked = unpacked(runs);
        if n_unpacked < n_pixels {
            let found = format!("{n_unpacked} bytes in a segment of a compressed frame");
            return Err(refusal(Truncated, found, format!("{n_pixels}, one for each pixel")));
        }
    }
    Ok(())
}

/// Bytes that runs give.
fn unpacked(runs: &[u8]) -> u64 {
    let (mut rest, mut n_bytes) = (runs, 0);
    while let Some((&header, behind)) = rest.split_first() {
        let count = header.cast_signed();
        let (n_read, n_given) = match count {
            i8::MIN => (0, 0),
            // One byte, so many times.
            -127..0 if behind.is_empty() => (0, 0),
            -127..0 => (1, 1 + usize::from(count.unsigned_abs())),
            // So many bytes.
            0.. => {
                let n_read = behind.len().min(usize::from(header) + 1);
                (n_read, n_read)
            }
        };
        rest = &behind[n_read..];
        n_bytes += n_given as u64;
    }
    n_bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jpeg_of(rows: u16, columns: u16, n_components: u8) -> Vec<u8> {
        let [rows, columns] = [rows, columns].map(u16::to_be_bytes);
        let head = [&[0xff, 0xc3, 0, 11, 16][..], &rows, &columns, &[n_components]].concat();
        let table = b"\xff\xc4\0\x04\xff\xc3";
        [JPEG, b"\0fill\xff", table, &head, b"\xff\xda"].concat()
    }

    fn jpeg_2000_of(end: [u32; 2], start: [u32; 2], tile: [u32; 2], n: u16) -> Vec<u8> {
        let pairs = [end, start, tile, [0, 0]].concat();
        let pairs: Vec<u8> = pairs.into_iter().flat_map(u32::to_be_bytes).collect();
        [CODESTREAM, &[0, 41, 0, 0], &pairs, &n.to_be_bytes()].concat()
    }

    fn reason(syntax: &str, fragments: &[Vec<u8>]) -> Option<QuarantineReason> {
        check(syntax, fragments, [7, 5], 2).err().map(|refusal| refusal.reason)
    }

    #[test]
    fn a_jpeg_of_other_extents_or_components_than_its_header_is_refused() {
        let reason = |stream: Vec<u8>| reason(uids::JPEG_LOSSLESS_SV1, &[stream]);
        assert_eq!(reason(jpeg_of(5, 7, 1)), None);
        assert_eq!(reason(jpeg_of(65_000, 65_000, 1)), Some(Bomb));
        assert_eq!(reason(jpeg_of(7, 5, 1)), Some(Corrupt));
        assert_eq!(reason(jpeg_of(5, 7, 3)), Some(Corrupt));
        let whole = jpeg_of(5, 7, 1);
        let n_needed = whole.len() - 2;
        for n_bytes in JPEG.len()..n_needed {
            assert_eq!(reason(whole[..n_bytes].to_vec()), Some(Corrupt), "{n_bytes}");
        }
    }

    #[test]
    fn a_jpeg_2000_of_other_extents_components_or_many_tiles_is_refused() {
        let reason = |stream: Vec<u8>| reason(uids::JPEG2000, &[stream]);
        let (none, one) = ([0, 0], [7, 5]);
        assert_eq!(reason(jpeg_2000_of(one, none, one, 1)), None);
        assert_eq!(reason(jpeg_2000_of([10, 7], [3, 2], [8, 8], 1)), None);
        assert_eq!(reason(jpeg_2000_of([30_000, 30_000], none, one, 1)), Some(Bomb));
        assert_eq!(reason(jpeg_2000_of(one, none, one, 16_384)), Some(Corrupt));
        assert_eq!(reason(jpeg_2000_of(one, none, none, 1)), Some(Corrupt));
        assert_eq!(reason(jpeg_2000_of(one, [7, 5], one, 1)), Some(Corrupt));
        // The image is a corner of a large grid of tiles.
        assert_eq!(reason(jpeg_2000_of([107, 105], [100, 100], [2, 2], 1)), Some(Bomb));

        let boxed = |length: u32, more: &[u8], stream: &[u8]| {
            let head = [&[0, 0, 0, 9][..], b"ftypx", &length.to_be_bytes(), b"jp2c", more];
            [BOXES, &head.concat(), stream].concat()
        };
        let (sound, bomb) = (jpeg_2000_of(one, none, one, 1), jpeg_2000_of([9, 9], none, one, 1));
        assert_eq!(reason(boxed(0, &[], &sound)), None);
        assert_eq!(reason(boxed(1, &[0; 8], &bomb)), Some(Bomb));
        assert_eq!(reason(boxed(1, &[0; 8], &[])), Some(Corrupt));
    }

    #[test]
    fn a_header_in_two_fragments_and_the_image_of_a_later_frame_are_checked() {
        let (sound, bomb) = (jpeg_of(5, 7, 1), jpeg_of(999, 999, 1));
        let (start, end) = bomb.split_at(9);
        let reason = |fragments: &[&[u8]]| {
            let fragments: Vec<Vec<u8>> = fragments.iter().map(|bytes| bytes.to_vec()).collect();
            reason(uids::JPEG_BASELINE8_BIT, &fragments)
        };
        assert_eq!(reason(&[&sound, &sound]), None);
        assert_eq!(reason(&[&sound, start, end]), Some(Bomb));
        assert_eq!(reason(&[&sound, &bomb]), Some(Bomb));
    }

    #[test]
    fn runs_must_give_every_byte_of_every_pixel() {
        let frame = |n_segments: u32, second: u32, runs: &[u8]| {
            let mut head = [0_u8; 64];
            for (index, number) in [n_segments, 64, second].into_iter().enumerate() {
                head[4 * index..4 * index + 4].copy_from_slice(&number.to_le_bytes());
            }
            [&head[..], runs].concat()
        };
        let reason = |frame: Vec<u8>| reason(uids::RLE_LOSSLESS, &[frame]);
        // 35 zeros; a run of nothing, 3 literal bytes, 32 ones, and padding.
        let runs = [&[222, 0][..], &[128, 2, 7, 8, 9, 225, 1, 0]].concat();
        assert_eq!(reason(frame(2, 66, &runs)), None);
        assert_eq!(reason(frame(2, 66, &runs[..8])), Some(Truncated));
        assert_eq!(reason(frame(2, 64, &runs)), Some(Truncated));
        assert_eq!(reason(frame(2, 1 << 31, &runs)), Some(Corrupt));
        assert_eq!(reason(frame(1, 66, &runs)), Some(Corrupt));
        assert_eq!(reason(frame(0x3fff_fff0, 66, &runs)), Some(Corrupt));
        assert_eq!(reason(vec![2, 0]), Some(Corrupt));
    }
}
