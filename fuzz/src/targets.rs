//! The targets: each is a function of any bytes that must neither panic nor take much memory.
//!
//! libFuzzer runs them, and `tests/it/fuzz_corpus.rs` includes this file and replays the inputs
//! that were kept.

use std::{
    fs::{self, File},
    io::{self, Cursor, Write},
    os::fd::AsRawFd,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::abort,
    sync::Once,
};

use flate2::{Compression, write::GzEncoder};
use oddscan::{
    bids,
    config::Config,
    dicom::{
        self, Head, Pixels,
        unzip::{ZipLimits, unzip},
    },
    domain::acquisition::AcquisitionFacts,
    model,
    nifti::{self, Limits},
    process::convert::Event,
};
use rustix::fs::{MemfdFlags, memfd_create};

#[path = "ledger.rs"]
mod ledger;

/// A function of any bytes.
pub type Target = fn(&[u8]);

/// All targets by their names.
pub const ALL: [(&str, Target); 10] = [
    ("nifti", nifti),
    ("gzip", gzip),
    ("dicom", dicom),
    ("dicom_pixels", dicom_pixels),
    ("zip", zip),
    ("bids", bids),
    ("config", config),
    ("weights", weights),
    ("pickle", pickle),
    ("record", record),
];

/// Small limits, so that most inputs are decided fast.
const LIMITS: Limits = Limits { max_file_bytes: 1 << 20, max_voxels: 1 << 20 };

/// A file of any bytes as a scan, as a mask and as a map.
pub fn nifti(data: &[u8]) {
    let file = in_memory(data);
    let path = path_of(&file);
    let scan = nifti::read_scan(&path, &LIMITS);
    let _ = said(nifti::n_voxels(&path, &LIMITS));
    if let Some(scan) = said(scan) {
        let again = in_memory(&nifti::encode_scan(&scan.grid, &scan.volume.voxels));
        let again = said(nifti::read_scan(&path_of(&again), &LIMITS));
        let again = again.expect("what was written can be read").volume;
        assert_eq!(again.voxels, scan.volume.voxels, "voxels stay as they are");
        let mask = said(nifti::read_mask(&path, &LIMITS)).expect("a scan can be a mask");
        assert_eq!(mask.inside.len(), scan.volume.voxels.len());
    }
}

/// Any bytes as a gzip file, and as the content of one with several members: that is read like the
/// content itself.
pub fn gzip(data: &[u8]) {
    nifti(&[&[0x1f, 0x8b], data].concat());

    let [n_members, n_zeros, content @ ..] = data else { return };
    let (n_members, n_zeros) = (usize::from(n_members % 8) + 1, usize::from(*n_zeros));
    let mut packed = Vec::new();
    for part in content.chunks(content.len().div_ceil(n_members).max(1)) {
        let mut member = GzEncoder::new(packed, Compression::fast());
        member.write_all(part).expect("a Vec takes all bytes");
        packed = member.finish().expect("a Vec takes all bytes");
        packed.extend(vec![0; n_zeros]);
    }
    let (plain, packed) = (in_memory(content), in_memory(&packed));
    let [plain, packed] = [plain, packed].map(|file| nifti::read_scan(&path_of(&file), &LIMITS));
    match (plain, packed) {
        (Ok(plain), Ok(packed)) => {
            assert_eq!(plain.volume, packed.volume, "gzip changes nothing");
        }
        (Err(plain), Err(packed)) => assert_eq!(plain.to_string(), packed.to_string()),
        // What is not packed can itself begin like gzip.
        (plain, packed) => assert!(content.starts_with(&[0x1f, 0x8b]), "{plain:?}, {packed:?}"),
    }
}

/// Between the files of one input of [`dicom`].
const NEXT_FILE: &[u8] = b"NEXT";

/// The files of a series, each of any bytes, converted like in the daemon's child process.
pub fn dicom(data: &[u8]) {
    like_the_child(|| {
        let files = split(data, NEXT_FILE);
        let heads: Vec<(usize, Head)> = files
            .iter()
            .enumerate()
            .filter_map(|(input, file)| Some((input, said(dicom::read_head(*file))?)))
            .collect();
        let heads: Vec<(usize, &Head)> = heads.iter().map(|(input, head)| (*input, head)).collect();

        for series in dicom::series(&heads) {
            let open = |input: usize| io::Result::Ok(files[input]);
            let Some(stacks) = said(dicom::stacks(&series, open)) else { continue };
            for stack in stacks {
                let name = stack.name();
                assert!(!name.contains('/'), "{name}");
                if let Ok(converted) = stack.convert(LIMITS.max_voxels, open) {
                    let volume = converted.volume;
                    assert_eq!(volume.voxels.len(), volume.shape.n_voxels());
                }
            }
        }
        for file in files {
            decode(file, 2);
        }
    });
}

/// Pixels of any bytes in a sound file. The first bytes choose compression, extents and bits.
pub fn dicom_pixels(data: &[u8]) {
    let [syntax, bits, columns, rows, pixels @ ..] = data else { return };
    let syntax = SYNTAXES[usize::from(*syntax) % SYNTAXES.len()];
    let file = image(syntax, *bits, [*columns, *rows].map(u16::from), pixels);
    like_the_child(|| decode(&file, 1));
}

fn decode(file: &[u8], n_frames: usize) {
    let Some(pixels) = said(Pixels::read(file)) else { return };
    for frame in 0..n_frames {
        said(pixels.frames(&[(frame, [2.0, -1.0])], |_, values| {
            assert!(values.iter().all(|value| value.is_finite()));
        }));
    }
}

/// Transfer syntaxes (PS3.6, table A-1).
const SYNTAXES: [&str; 9] = [
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.5",
];

/// A DICOM file with one frame. The two lowest bits of `bits` choose the bits of a pixel, the next
/// whether it is signed, and the others which part of its bits is stored.
fn image(syntax: &str, bits: u8, [columns, rows]: [u16; 2], pixels: &[u8]) -> Vec<u8> {
    let is_big = syntax == "1.2.840.10008.1.2.2";
    let is_plain = is_big || syntax == "1.2.840.10008.1.2.1";
    let short = |n: u16| if is_big { n.to_be_bytes() } else { n.to_le_bytes() };
    let long = |n: u32| if is_big { n.to_be_bytes() } else { n.to_le_bytes() };
    let tag = |group: u16, number: u16| [short(group), short(number)].concat();

    let mut syntax = syntax.as_bytes().to_vec();
    syntax.resize(syntax.len().next_multiple_of(2), 0);
    let mut file =
        [&[0; 128][..], b"DICM\x02\0\x10\0UI", &[syntax.len() as u8, 0], &syntax].concat();
    let allocated = [8, 16, 32, 64][usize::from(bits % 4)];
    let stored = (allocated * (u16::from(bits >> 3) + 1)).div_ceil(32);
    for (number, value) in [
        (0x02, 1),
        (0x10, rows),
        (0x11, columns),
        (0x100, allocated),
        (0x101, stored),
        (0x102, stored - 1),
        (0x103, u16::from(bits >> 2 & 1)),
    ] {
        file.extend([&tag(0x28, number)[..], b"US", &short(2), &short(value)].concat());
    }
    file.extend([&tag(0x28, 4)[..], b"CS", &short(12), b"MONOCHROME2 "].concat());
    file.extend([&tag(0x7fe0, 0x10)[..], if is_plain { b"OW" } else { b"OB" }, &[0; 2]].concat());
    if is_plain {
        file.extend(long(pixels.len() as u32));
        file.extend(pixels);
        return file;
    }
    let item = [0xfe, 0xff, 0x00, 0xe0];
    file.extend([&[0xff; 4], &item, &[0; 4], &item, &long(pixels.len() as u32)[..]].concat());
    file.extend(pixels);
    file.extend([0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0]);
    file
}

/// Any bytes as a zip of DICOM files.
pub fn zip(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let limits = ZipLimits { max_members: 100, max_member_bytes: 1 << 20, max_bytes: 4 << 20 };
    like_the_child(|| {
        let unzipped = unzip(Cursor::new(data), data.len() as u64, folder.path(), &limits);
        let unzipped = unzipped.expect("the folder can be written");
        let Some(unzipped) = said(unzipped) else { return };
        let in_folder = fs::read_dir(folder.path()).expect("the folder is there").count();
        assert_eq!(unzipped.files.len(), in_folder, "no other file");
        let n_bytes: u64 = unzipped.files.iter().map(|path| size_of_file(path)).sum();
        assert!(n_bytes <= limits.max_bytes, "{n_bytes}");
        for path in unzipped.files {
            drop(said(dicom::read_head(File::open(path).expect("it was unpacked"))));
        }
    });
}

fn size_of_file(path: &Path) -> u64 {
    path.metadata().expect("it was unpacked").len()
}

/// Any bytes as the JSON beside a scan.
pub fn bids(data: &[u8]) {
    let mut facts = AcquisitionFacts::default();
    let before = facts.clone();
    match bids::read_facts(data, &mut facts) {
        Ok(_) => assert!(facts.has_json),
        Err(_) => assert_eq!(facts, before, "unchanged"),
    }
}

/// Any text as the settings of a site.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(text) {
        Ok(config) => drop(config.layers(12)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Any bytes as weights of each of the networks, in each of the formats.
pub fn weights(data: &[u8]) {
    let file = in_memory(data);
    drop(said(model::import(&path_of(&file))));
    drop(said(model::load_weights(&path_of(&file))));
    drop(said(model::load_brain_weights(&path_of(&file))));
}

/// Any bytes as the pickle in weights of PyTorch, beside one storage.
pub fn pickle(data: &[u8]) {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, content) in [("a/data.pkl", data), ("a/data/0", &[7; 64])] {
        zip.start_file(name, stored).expect("a Vec takes all bytes");
        zip.write_all(content).expect("a Vec takes all bytes");
    }
    let file = in_memory(&zip.finish().expect("a Vec takes all bytes").into_inner());
    drop(said(model::import(&path_of(&file))));
}

/// Any bytes as an entry of the ledger, and as a line of the process that converts DICOM.
pub fn record(data: &[u8]) {
    ledger::record(data);
    if let Ok(event) = serde_json::from_slice::<Event>(data) {
        let _ = (event.inputs(), event.left_out());
    }
}

/// The result without its error, whose text must not panic either.
fn said<T, E: std::fmt::Display>(result: Result<T, E>) -> Option<T> {
    result.map_err(|error| assert!(!error.to_string().is_empty())).ok()
}

/// A file that is no file of a disk.
fn in_memory(data: &[u8]) -> File {
    let mut file: File = memfd_create("input", MemfdFlags::CLOEXEC).expect("memory").into();
    file.write_all(data).expect("memory");
    file
}

fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

fn split<'a>(data: &'a [u8], between: &[u8]) -> Vec<&'a [u8]> {
    let mut parts = Vec::new();
    let mut rest = data;
    while let Some(at) = rest.windows(between.len()).position(|bytes| bytes == between) {
        parts.push(&rest[..at]);
        rest = &rest[at + between.len()..];
    }
    parts.push(rest);
    parts
}

/// Runs work that the daemon leaves to a child process, which refuses files whose codec panics.
fn like_the_child(work: impl FnOnce()) {
    drop(catch_unwind(AssertUnwindSafe(work)));
}

/// Lets every panic end the process, except for those in a dependency. Call it before a target.
pub fn abort_on_own_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|panic| {
            let of_dependency =
                |place: &std::panic::Location<'_>| place.file().contains("/registry/");
            if !panic.location().is_some_and(of_dependency) {
                eprintln!("{panic}");
                abort();
            }
        }));
    });
}
