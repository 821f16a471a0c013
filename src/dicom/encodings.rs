//! Tests: files of every beginning and encoding give the same header and pixels, and damaged ones
//! do no harm.

use std::io::Write;

use dicom_dictionary_std::uids;

use super::{Head, Pixels, elements::Part, open::open, read_head};
use crate::domain::{
    dicom_start::{Encoding, has_short_length},
    error::{
        QuarantineReason::{self, BadHeader, Bomb, Corrupt, Truncated},
        Refusal,
    },
};

const BIG: &str = "1.2.840.10008.1.2.2";
const DEFLATED: &str = uids::DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN;

/// An element with its kind and the bytes of its value.
type Element = ((u16, u16), [u8; 2], Vec<u8>);

fn text(tag: (u16, u16), kind: &[u8; 2], text: &str) -> Element {
    let mut value = text.as_bytes().to_vec();
    if value.len() % 2 == 1 {
        value.push(if kind == b"UI" { 0 } else { b' ' });
    }
    (tag, *kind, value)
}

fn shorts(encoding: Encoding, tag: (u16, u16), kind: &[u8; 2], numbers: &[u16]) -> Element {
    let is_big = encoding == Encoding::ExplicitBig;
    let bytes = |number: &u16| if is_big { number.to_be_bytes() } else { number.to_le_bytes() };
    (tag, *kind, numbers.iter().flat_map(bytes).collect())
}

/// A slice of 3 x 2 pixels.
fn slice(encoding: Encoding) -> Vec<Element> {
    let short = |tag, number| shorts(encoding, tag, b"US", &[number]);
    vec![
        text((8, 5), b"CS", "ISO_IR 100"),
        text((8, 8), b"CS", "ORIGINAL\\PRIMARY\\M"),
        text((8, 0x16), b"UI", "1.2.840.10008.5.1.4.1.1.4"),
        text((8, 0x18), b"UI", "1.2.3.4"),
        text((8, 0x60), b"CS", "MR"),
        text((0x18, 0x81), b"DS", "2.5"),
        text((0x20, 0xe), b"UI", "1.2.9"),
        text((0x20, 0x11), b"IS", "7"),
        text((0x20, 0x32), b"DS", "-1.5\\2\\3.25"),
        text((0x20, 0x37), b"DS", "1\\0\\0\\0\\1\\0"),
        short((0x28, 2), 1),
        text((0x28, 4), b"CS", "MONOCHROME2"),
        short((0x28, 0x10), 2),
        short((0x28, 0x11), 3),
        text((0x28, 0x30), b"DS", "0.9\\1.1"),
        short((0x28, 0x100), 16),
        short((0x28, 0x101), 16),
        short((0x28, 0x102), 15),
        short((0x28, 0x103), 0),
        shorts(encoding, (0x7fe0, 0x10), b"OW", &PIXELS),
    ]
}

const PIXELS: [u16; 6] = [1, 2, 3, 256, 65535, 6];

/// The header of an element. The length `u32::MAX` is undefined.
fn head(encoding: Encoding, tag: (u16, u16), kind: [u8; 2], length: u32) -> Vec<u8> {
    let is_big = encoding == Encoding::ExplicitBig;
    let short = |n: u16| if is_big { n.to_be_bytes() } else { n.to_le_bytes() };
    let long = |n: u32| if is_big { n.to_be_bytes() } else { n.to_le_bytes() };
    let tag = [short(tag.0), short(tag.1)].concat();
    match encoding {
        Encoding::Implicit => [&tag[..], &long(length)].concat(),
        _ if has_short_length(kind) => [&tag[..], &kind, &short(length as u16)].concat(),
        _ => [&tag[..], &kind, &[0; 2], &long(length)].concat(),
    }
}

fn written(encoding: Encoding, elements: &[Element]) -> Vec<u8> {
    let one = |(tag, kind, value): &Element| {
        [head(encoding, *tag, *kind, value.len() as u32), value.clone()].concat()
    };
    elements.iter().flat_map(one).collect()
}

fn bare(encoding: Encoding) -> Vec<u8> {
    written(encoding, &slice(encoding))
}

/// Meta information with this transfer syntax.
fn meta(syntax: Option<&str>) -> Vec<u8> {
    let class = text((2, 2), b"UI", "1.2.840.10008.5.1.4.1.1.4");
    let syntax = syntax.map(|syntax| text((2, 0x10), b"UI", syntax));
    let elements: Vec<Element> = [Some(class), syntax].into_iter().flatten().collect();
    written(Encoding::Explicit, &elements)
}

fn file(syntax: Option<&str>, data_set: &[u8]) -> Vec<u8> {
    [&[0; 128][..], b"DICM", &meta(syntax), data_set].concat()
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn pixels(bytes: &[u8]) -> Result<Vec<f32>, Refusal> {
    let mut pixels = Vec::new();
    Pixels::read(bytes)?.frames(&[(0, [1.0, 0.0])], |_, values| pixels = values)?;
    Ok(pixels)
}

fn head_and_pixels(bytes: &[u8]) -> (Head, Vec<f32>) {
    let head = read_head(bytes).unwrap();
    assert_eq!((&head.fault, head.unwanted), (&None, None));
    (head, pixels(bytes).unwrap())
}

fn reason(bytes: &[u8]) -> QuarantineReason {
    read_head(bytes).unwrap_err().reason
}

#[test]
fn every_beginning_and_every_encoding_give_the_same_header_and_pixels() {
    use Encoding::{Explicit, ExplicitBig, Implicit};
    let (explicit, implicit) = (uids::EXPLICIT_VR_LITTLE_ENDIAN, uids::IMPLICIT_VR_LITTLE_ENDIAN);
    let wanted = head_and_pixels(&file(Some(explicit), &bare(Explicit)));
    assert_eq!(wanted.1, PIXELS.map(f32::from));
    assert_eq!(wanted.0.frames[0].plane.spacing_mm, [1.1, 0.9]);
    assert_eq!(wanted.0.acquisition.echo_time_ms, Some(2.5));

    let private = "1.2.3.4.5";
    let mut files = vec![
        ("without meta information, zlib", file(Some(DEFLATED), &zlib(&bare(Explicit)))),
        ("deflated", file(Some(DEFLATED), &deflated(&bare(Explicit)))),
        ("called deflated", file(Some(DEFLATED), &bare(Explicit))),
    ];
    for encoding in [Implicit, Explicit, ExplicitBig] {
        let data_set = bare(encoding);
        for syntax in [None, Some(explicit), Some(implicit), Some(BIG)] {
            files.push(("preamble and mark", file(syntax, &data_set)));
            files.push(("mark", [&b"DICM"[..], &meta(syntax), &data_set].concat()));
            files.push(("meta information", [&meta(syntax)[..], &data_set].concat()));
        }
        files.push(("mark alone", [&[0; 128][..], b"DICM", &data_set].concat()));
        files.push(("bare", data_set));
    }
    for (what, bytes) in files {
        assert_eq!(head_and_pixels(&bytes), wanted, "{what}: {bytes:x?}");
    }
    let refusal = pixels(&file(Some(private), &bare(Explicit))).unwrap_err();
    assert!(refusal.found.contains(private), "{refusal}");
}

#[test]
fn wide_pixels_of_a_big_endian_file_and_a_private_first_element_are_read() {
    let big = Encoding::ExplicitBig;
    let wide: Vec<u8> = PIXELS.iter().flat_map(|&n| (u32::from(n) << 4).to_be_bytes()).collect();
    let short = |number, value| shorts(big, (0x28, number), b"US", &[value]);
    let others =
        [short(0x100, 32), short(0x101, 32), short(0x102, 31), ((0x7fe0, 0x10), *b"OW", wide)];
    let wanted = PIXELS.map(|number| f32::from(number) * 16.0);
    assert_eq!(pixels(&file(Some(BIG), &with(big, &others))).unwrap(), wanted);

    let private = written(Encoding::Explicit, &[text((0x4453, 0x10), b"LO", "DR Systems")]);
    let later = written(Encoding::Explicit, &[text((0x7fe1, 0x10), b"LO", "x")]);
    let syntax = uids::EXPLICIT_VR_LITTLE_ENDIAN;
    let refusal = read_head(&file(Some(syntax), &[private, later].concat())[..]).unwrap_err();
    assert_eq!(refusal.found, "no SeriesInstanceUID", "it was read");
}

#[test]
fn what_is_no_dicom_or_in_no_encoding_is_refused_with_the_true_cause() {
    let garbage = [0xee; 300];
    for (bytes, wanted, found) in [
        (Vec::new(), Truncated, "an empty file"),
        (b"garbage".to_vec(), Truncated, "a file of 7 bytes"),
        (garbage.to_vec(), Corrupt, "does not begin like DICOM"),
        (file(None, &garbage), Corrupt, "no transfer syntax"),
        (file(Some(BIG), &garbage), Corrupt, "not in the encoding that its header states"),
        (file(Some(BIG), &[]), Truncated, "ends before its data set"),
        (file(Some(DEFLATED), &[7; 99]), Corrupt, "cannot be read"),
    ] {
        let refusal = read_head(&bytes[..]).unwrap_err();
        assert_eq!(refusal.reason, wanted, "{refusal}");
        assert!(refusal.found.contains(found), "{refusal}");
    }

    let mut compressed = slice(Encoding::Explicit);
    compressed.pop();
    let item = [&[0xfe, 0xff, 0, 0xe0, 0, 0, 0, 0][..], &[0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0]];
    let begin = head(Encoding::Explicit, (0x7fe0, 0x10), *b"OB", u32::MAX);
    let compressed = [written(Encoding::Explicit, &compressed), begin, item.concat()].concat();
    let refusal = pixels(&file(None, &compressed)).unwrap_err();
    assert_eq!((refusal.reason, &refusal.needed[..]), (BadHeader, "a transfer syntax"));
}

#[test]
fn a_file_that_is_cut_anywhere_or_has_absurd_lengths_does_no_harm() {
    for encoding in [Encoding::Implicit, Encoding::Explicit, Encoding::ExplicitBig] {
        for whole in [bare(encoding), file(Some(BIG), &bare(encoding))] {
            for n_bytes in 0..whole.len() {
                let cut = &whole[..n_bytes];
                let _ = read_head(cut);
                // The pixels are the end of the file.
                assert!(pixels(cut).is_err(), "{n_bytes}");
            }
        }

        // Four GiB that are not there, in each place.
        for kind in [*b"UT", *b"OB", *b"OW", *b"UN", *b"FD"] {
            for tag in [(0x28, 0x30), (0x29, 0x1001), (0x7fe0, 0x10)] {
                let long = head(encoding, tag, kind, u32::MAX - 1);
                let start = written(encoding, &slice(encoding)[..5]);
                let bytes = [start, long, vec![0; 50]].concat();
                let error = open(&bytes[..], Part::Pixels).err().unwrap();
                assert_eq!(error.reason, Truncated, "{error}");
            }
        }
    }
    let deflated = deflated(&bare(Encoding::Explicit));
    for n_bytes in 0..deflated.len() {
        // The last bytes of a deflated stream hold its end alone.
        let found = pixels(&file(Some(DEFLATED), &deflated[..n_bytes]));
        assert!(found.is_err() || found.unwrap() == PIXELS.map(f32::from), "{n_bytes}");
    }
}

#[test]
fn deep_sequences_and_deflated_bombs_are_refused() {
    let start = written(Encoding::Explicit, &slice(Encoding::Explicit)[..5]);
    let sequence = head(Encoding::Explicit, (0x18, 0x9006), *b"SQ", u32::MAX);
    let item = [0xfe, 0xff, 0, 0xe0, 0xff, 0xff, 0xff, 0xff];
    let nested = [start.clone(), [&sequence[..], &item].concat().repeat(100_000)].concat();
    assert_eq!(reason(&nested), Corrupt);

    // Defined lengths, each up to the end of the file.
    let levels = (1..500_u32).rev().flat_map(|level| {
        let sequence = head(Encoding::Explicit, (0x18, 0x9006), *b"SQ", 20 * level - 12);
        [sequence, head(Encoding::Implicit, (0xfffe, 0xe000), [0; 2], 20 * (level - 1))].concat()
    });
    assert_eq!(reason(&[start.clone(), levels.collect()].concat()), Corrupt);

    let zeros = head(Encoding::Explicit, (0x18, 0x1002), *b"OB", 80 << 20);
    let bomb = deflated(&[start, zeros, vec![0; 80 << 20]].concat());
    assert_eq!(reason(&file(Some(DEFLATED), &bomb)), Bomb);
}

#[test]
fn a_data_set_of_more_parts_than_an_image_has_is_refused_as_a_bomb() {
    let encoding = Encoding::Explicit;
    let start = written(encoding, &slice(encoding)[..5]);
    let list = |number: u16| text((0x19, 0x1000 + number), b"LO", &"1\\".repeat(32_000));
    let lists = |n| written(encoding, &(0..n).map(list).collect::<Vec<_>>());
    let refusal = read_head(&[start.clone(), lists(63)].concat()[..]).unwrap_err();
    assert_eq!(refusal.reason, Bomb, "{refusal}");
    assert_eq!(reason(&[start.clone(), lists(62)].concat()), BadHeader, "without a series");

    let pixels = head(encoding, (0x7fe0, 0x10), *b"OB", u32::MAX);
    let items = [0xfe, 0xff, 0, 0xe0, 0, 0, 0, 0].repeat(2_000_000);
    let error = open(&[start, pixels, items].concat()[..], Part::Pixels).err().unwrap();
    assert_eq!(error.reason, Bomb, "{error}");
}

/// The slice with other elements instead of its own.
fn with(encoding: Encoding, others: &[Element]) -> Vec<u8> {
    let mut elements = slice(encoding);
    for other in others {
        elements.retain(|(tag, ..)| *tag != other.0);
        elements.push(other.clone());
    }
    elements.sort_by_key(|(tag, ..)| *tag);
    written(encoding, &elements)
}

#[test]
fn numbers_of_other_kinds_are_read_and_what_is_no_number_is_quoted() {
    let encoding = Encoding::Explicit;
    let wanted = head_and_pixels(&bare(encoding));
    let spacing = |kind, value| text((0x28, 0x30), kind, value);
    let binary: Vec<u8> = [0.9_f64, 1.1].iter().flat_map(|number| number.to_le_bytes()).collect();
    let unknown = |tag, value| (tag, *b"UN", value);
    let short = |tag, number: u16| unknown(tag, number.to_le_bytes().to_vec());
    for others in [
        vec![spacing(b"UT", "0.9\\1.1")],
        vec![spacing(b"LT", "0.90\\ 1.10 ")],
        vec![spacing(b"ST", "9.0E-01\\+1.1")],
        vec![spacing(b"DS", "0,9\\1,1")],
        vec![((0x28, 0x30), *b"FD", binary)],
        vec![
            unknown((0x18, 0x81), b"2.5 ".to_vec()),
            unknown((0x20, 0x32), b"-1.5\\2\\3.25 ".to_vec()),
            unknown((0x20, 0x37), b"1\\0\\0\\0\\1\\0 ".to_vec()),
            unknown((0x28, 0x30), b"0.9\\1.1\0".to_vec()),
            unknown((8, 0x60), b"MR".to_vec()),
            short((0x28, 0x10), 2),
            short((0x28, 0x11), 3),
            short((0x28, 0x100), 16),
            short((0x28, 0x101), 16),
        ],
    ] {
        assert_eq!(head_and_pixels(&with(encoding, &others)), wanted, "{others:x?}");
    }

    let found = |other: Element| read_head(&with(encoding, &[other])[..]).unwrap().fault.unwrap();
    assert_eq!(found(spacing(b"DS", "0.9 mm")).found, "PixelSpacing \"0.9 mm\"");
    assert_eq!(found(spacing(b"DS", "1\\1\\1")).found, "PixelSpacing \"1\\1\\1\"");
    assert_eq!(found(spacing(b"DS", "")).found, "no PixelSpacing");
    assert_eq!(found(text((0x28, 0x1053), b"DS", "a")).found, "RescaleSlope \"a\"");
}

#[test]
fn a_sequence_of_unknown_kind_is_read_without_the_kinds_of_its_values() {
    let item = |encoding, elements: &[Element]| {
        let begin = head(Encoding::Implicit, (0xfffe, 0xe000), [0; 2], u32::MAX);
        let end = head(Encoding::Implicit, (0xfffe, 0xe00d), [0; 2], 0);
        [begin, written(encoding, elements), end].concat()
    };
    let spacing = text((0x28, 0x30), b"DS", "0.9\\1.1");
    let measures = |encoding, kind, inner| {
        let end = head(Encoding::Implicit, (0xfffe, 0xe0dd), [0; 2], 0);
        let begin = head(encoding, (0x28, 0x9110), kind, u32::MAX);
        [begin, item(inner, std::slice::from_ref(&spacing)), end].concat()
    };
    let mut elements = slice(Encoding::Explicit);
    elements.retain(|(tag, ..)| *tag != spacing.0);
    let pixels = elements.pop().unwrap();
    for (kind, inner) in [(*b"UN", Encoding::Implicit), (*b"SQ", Encoding::Explicit)] {
        let sequence = measures(Encoding::Explicit, kind, inner);
        let start = written(Encoding::Explicit, &elements);
        let end = written(Encoding::Explicit, std::slice::from_ref(&pixels));
        let head = read_head(&[start, sequence, end].concat()[..]).unwrap();
        assert_eq!(head.fault, None);
        assert_eq!(head.frames[0].plane.spacing_mm, [1.1, 0.9]);
    }
}
