//! How a DICOM file begins, and how the header of an element is written.
//!
//! Most files begin with a preamble and the mark `DICM` (PS3.10, 7.1). Bare data sets have neither:
//! old exports begin with their first element. Whoever lists a folder or a zip must tell them from
//! all other files, and whoever reads them must find out how their elements are encoded.

/// How the elements of a data set are written (PS3.5, annex A).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Little endian, without the kind of each value.
    Implicit,
    /// Little endian, with the kind of each value.
    Explicit,
    /// Big endian, with the kind of each value. Retired, but old archives have many such files.
    ExplicitBig,
}

/// The header of an element or of an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ElementHead {
    /// Group and number.
    pub tag: (u16, u16),
    /// Kind of the value (VR), if it is stated.
    pub kind: Option<[u8; 2]>,
    /// Bytes of the value; `None` if a delimiter ends it.
    pub length: Option<u32>,
    /// Bytes of the header itself.
    pub n_bytes: usize,
}

/// As many bytes from the beginning of a file show whether it is DICOM.
pub const START_BYTES: usize = 1024;

/// As many bytes hold the header of any element.
pub const HEAD_BYTES: usize = 12;

/// Length of the preamble, bytes.
pub const PREAMBLE_BYTES: usize = 128;

/// Kinds of values whose length has two bytes.
const SHORT: [&[u8; 2]; 21] = [
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT", b"PN",
    b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US",
];

/// Kinds of values whose length has four bytes, after two reserved bytes.
const LONG: [&[u8; 2]; 13] =
    [b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"];

/// The standard begins no data set with a group from here on.
const LAST_FIRST_GROUP: u16 = 0x0400;

/// The elements with which a bare data set may begin, their kind, and their largest length, bytes.
const FIRST: [(u16, u16, &[u8; 2], u32); 16] = [
    (0x0002, 0x0000, b"UL", 4),
    (0x0002, 0x0001, b"OB", 2),
    (0x0002, 0x0002, b"UI", 64),
    (0x0002, 0x0003, b"UI", 64),
    (0x0002, 0x0010, b"UI", 64),
    (0x0008, 0x0000, b"UL", 4),
    (0x0008, 0x0001, b"UL", 4),
    (0x0008, 0x0005, b"CS", 256),
    (0x0008, 0x0008, b"CS", 256),
    (0x0008, 0x0012, b"DA", 16),
    (0x0008, 0x0013, b"TM", 28),
    (0x0008, 0x0014, b"UI", 64),
    (0x0008, 0x0016, b"UI", 64),
    (0x0008, 0x0018, b"UI", 64),
    (0x0008, 0x0020, b"DA", 16),
    (0x0008, 0x0060, b"CS", 16),
];

/// Whether two bytes are a kind of value.
pub fn is_kind(letters: [u8; 2]) -> bool {
    has_short_length(letters) || LONG.contains(&&letters)
}

/// Whether the length of values of this kind has two bytes.
pub fn has_short_length(kind: [u8; 2]) -> bool {
    SHORT.contains(&&kind)
}

impl Encoding {
    /// The encoding of a data set that begins with these bytes, as its first element shows it.
    pub fn of_start(start: &[u8]) -> Option<Self> {
        let (group, letters) = (start.get(..2)?, start.get(4..6)?);
        let little = u16::from_le_bytes([group[0], group[1]]);
        let is_first = |group: u16| (1..LAST_FIRST_GROUP).contains(&group);

        if is_kind([letters[0], letters[1]]) {
            // A big-endian 0008 reads as 0800 in little endian.
            return match (is_first(little), is_first(little.swap_bytes())) {
                (true, _) => Some(Self::Explicit),
                (false, true) => Some(Self::ExplicitBig),
                (false, false) => None,
            };
        }
        let head = ElementHead::read(start, Self::Implicit)?;
        let is_sane = head.length.is_none_or(|length| length < 1 << 28);
        (is_first(little) && is_sane).then_some(Self::Implicit)
    }

    /// Two bytes as a number.
    fn short(self, bytes: [u8; 2]) -> u16 {
        match self {
            Self::Implicit | Self::Explicit => u16::from_le_bytes(bytes),
            Self::ExplicitBig => u16::from_be_bytes(bytes),
        }
    }

    /// Four bytes as a length.
    fn length(self, bytes: [u8; 4]) -> Option<u32> {
        let length = match self {
            Self::Implicit | Self::Explicit => u32::from_le_bytes(bytes),
            Self::ExplicitBig => u32::from_be_bytes(bytes),
        };
        (length != u32::MAX).then_some(length)
    }
}

impl ElementHead {
    /// Reads a header from its bytes. `None` if they are too few.
    ///
    /// A kind of two other letters has a long length, as all later kinds of the standard. Where no
    /// letters stand in an explicit data set, the element is written without its kind.
    pub fn read(bytes: &[u8], encoding: Encoding) -> Option<Self> {
        let two = |at: usize| Some([*bytes.get(at)?, *bytes.get(at + 1)?]);
        let four = |at: usize| bytes.get(at..at + 4)?.try_into().ok();
        let tag = (encoding.short(two(0)?), encoding.short(two(2)?));

        let letters = two(4)?;
        let has_kind = encoding != Encoding::Implicit
            && tag.0 != 0xfffe
            && letters.iter().all(u8::is_ascii_uppercase);
        let (kind, length, n_bytes) = if !has_kind {
            (None, encoding.length(four(4)?), 8)
        } else if has_short_length(letters) {
            (Some(letters), Some(u32::from(encoding.short(two(6)?))), 8)
        } else {
            (Some(letters), encoding.length(four(8)?), HEAD_BYTES)
        };
        Some(Self { tag, kind, length, n_bytes })
    }
}

/// Whether a file with this beginning is DICOM. `start` is the whole file or at least
/// [`START_BYTES`] of it.
///
/// Without the mark, two elements must look like those of a data set, so that texts, pictures and
/// other binary files do not pass.
pub fn begins_like_dicom(start: &[u8]) -> bool {
    let has_mark = start.get(PREAMBLE_BYTES..).is_some_and(|rest| rest.starts_with(b"DICM"));
    has_mark || begins_with_mark(start) || begins_like_data_set(start)
}

/// Whether a file begins with the mark itself, without a preamble.
pub fn begins_with_mark(start: &[u8]) -> bool {
    start.starts_with(b"DICM\x02\0")
}

fn begins_like_data_set(start: &[u8]) -> bool {
    let Some(encoding) = Encoding::of_start(start) else { return false };
    let Some(first) = ElementHead::read(start, encoding) else { return false };
    let Some(length) = first.length else { return false };
    let Some(&(.., kind, most)) = FIRST.iter().find(|known| (known.0, known.1) == first.tag) else {
        return false;
    };

    let is_its_kind = first.kind.is_none_or(|found| found == *kind);
    let is_length = if kind == b"UL" { length == 4 } else { length <= most && length % 2 == 0 };
    let end = first.n_bytes + length as usize;
    let Some(value) = start.get(first.n_bytes..end).filter(|_| is_its_kind && is_length) else {
        return false;
    };
    let is_value = match kind {
        b"UL" | b"OB" => true,
        b"UI" => value.iter().all(|byte| byte.is_ascii_digit() || b".\0 ".contains(byte)),
        _ => value.iter().all(|byte| matches!(byte, 0 | b' '..=b'~')),
    };

    // The meta information of a file is explicit, whatever follows it.
    let next = &start[end..];
    let encoding = Encoding::of_start(next).filter(|_| first.tag.0 == 2).unwrap_or(encoding);
    let is_followed = ElementHead::read(next, encoding).is_some_and(|second| {
        let has_kind = encoding == Encoding::Implicit || second.kind.is_some_and(is_kind);
        second.tag > first.tag && second.tag.0 < LAST_FIRST_GROUP && has_kind
    });
    is_value && is_followed
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An element of text.
    fn element(encoding: Encoding, tag: (u16, u16), kind: &[u8; 2], value: &[u8]) -> Vec<u8> {
        let n_bytes = u16::try_from(value.len()).unwrap();
        let head = match encoding {
            Encoding::Implicit => {
                let length = u32::from(n_bytes).to_le_bytes();
                [&tag.0.to_le_bytes()[..], &tag.1.to_le_bytes(), &length].concat()
            }
            Encoding::Explicit => {
                [tag.0.to_le_bytes(), tag.1.to_le_bytes(), *kind, n_bytes.to_le_bytes()].concat()
            }
            Encoding::ExplicitBig => {
                [tag.0.to_be_bytes(), tag.1.to_be_bytes(), *kind, n_bytes.to_be_bytes()].concat()
            }
        };
        [&head[..], value].concat()
    }

    fn data_set(encoding: Encoding) -> Vec<u8> {
        let first = element(encoding, (8, 5), b"CS", b"ISO_IR 100");
        [first, element(encoding, (8, 8), b"CS", b"ORIGINAL\\PRIMARY")].concat()
    }

    const ALL: [Encoding; 3] = [Encoding::Implicit, Encoding::Explicit, Encoding::ExplicitBig];

    #[test]
    fn a_bare_data_set_is_dicom_in_each_encoding() {
        for encoding in ALL {
            let start = data_set(encoding);
            assert_eq!(Encoding::of_start(&start), Some(encoding));
            assert!(begins_like_dicom(&start), "{encoding:?}");
            let head = ElementHead::read(&start, encoding).unwrap();
            assert_eq!((head.tag, head.length, head.n_bytes), ((8, 5), Some(10), 8));
            assert_eq!(head.kind, (encoding != Encoding::Implicit).then_some(*b"CS"));
        }
    }

    #[test]
    fn the_mark_counts_after_a_preamble_and_at_the_beginning_and_meta_information_without_it() {
        let class = element(Encoding::Explicit, (2, 2), b"UI", b"1.2.840.10008.5.1.4.1.1.4\0");
        assert!(begins_like_dicom(&[&[7; 128][..], b"DICM"].concat()));
        assert!(begins_like_dicom(&[&b"DICM"[..], &class].concat()));
        for encoding in ALL {
            assert!(begins_like_dicom(&[class.clone(), data_set(encoding)].concat()));
        }
    }

    #[test]
    fn other_files_are_not_taken_for_dicom() {
        let mut noise = 1_u32;
        let mut noise = || {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (noise >> 24) as u8
        };
        let random: Vec<Vec<u8>> = (0..2000).map(|_| (0..300).map(|_| noise()).collect()).collect();
        let nifti = [&348_i32.to_le_bytes()[..], &[0; 344]].concat();
        let others: [&[u8]; 16] = [
            b"",
            b"DICM files are in the next folder",
            b"to a friend, with some lines of text\n",
            b"{\"Modality\": \"MR\", \"EchoTime\": 0.003}",
            b"\xff\xfet\0e\0x\0t\0",
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
            b"\xff\xd8\xff\xe0\0\x10JFIF\0",
            b"GIF89a\x01\0\x01\0",
            b"II*\0\x08\0\0\0\x0e\0\0\x01\x03\0",
            b"PK\x03\x04\x14\0\0\0\x08\0",
            b"\x1f\x8b\x08\0\0\0\0\0\0\x03",
            b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0",
            b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ",
            b"%PDF-1.7\n%\xe2\xe3\xcf\xd3",
            &nifti,
            &[0; 2000],
        ];
        for start in others.into_iter().chain(random.iter().map(Vec::as_slice)) {
            assert!(!begins_like_dicom(start), "{start:?}");
        }
        // Small numbers of 16 and 32 bits are common at the beginning of binary files.
        for numbers in [[8_u32, 16, 24, 32], [8, 5, 10, 0], [2, 0, 4, 1], [8, 4, 4, 8]] {
            let long: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            let short: Vec<u8> =
                numbers.iter().flat_map(|&number| (number as u16).to_le_bytes()).collect();
            assert!(!begins_like_dicom(&[&long[..], &[0; 100]].concat()), "{numbers:?}");
            assert!(!begins_like_dicom(&[&short[..], &[0; 100]].concat()), "{numbers:?}");
        }
    }

    #[test]
    fn a_cut_beginning_is_not_dicom_and_does_no_harm() {
        for encoding in ALL {
            let start = data_set(encoding);
            assert!((0..18).all(|n_bytes| !begins_like_dicom(&start[..n_bytes])));
        }
    }
}
