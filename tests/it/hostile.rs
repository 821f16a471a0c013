//! Faulty files. Each is refused with its reason, none causes a panic, and memory does not depend
//! on what a header claims.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use flate2::{Compression, bufread::GzDecoder, write::GzEncoder};
use oddscan::{
    domain::error::{QuarantineReason as Reason, ScanError},
    nifti::{Limits, Scan, read_scan},
};
use proptest::{prelude::*, test_runner::RngSeed};

use crate::support::{scan_bytes, skip};

pub const LIMITS: Limits = Limits { max_file_bytes: 16 << 20, max_voxels: 1_000_000 };

/// A good scan, not compressed: 26 x 30 x 24 voxels of f32.
pub fn plain() -> Vec<u8> {
    let mut bytes = Vec::new();
    GzDecoder::new(&*scan_bytes(1)).read_to_end(&mut bytes).unwrap();
    bytes
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

/// A good scan with other bytes at some places.
pub fn patched(patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = plain();
    for (offset, patch) in patches {
        bytes[*offset..offset + patch.len()].copy_from_slice(patch);
    }
    bytes
}

/// Compressed zeros behind a header that announces a small scan.
pub fn bomb(n_bytes: usize) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(&plain()).unwrap();
    let zeros = vec![0; 1 << 20];
    (0..n_bytes >> 20).for_each(|_| gzip.write_all(&zeros).unwrap());
    gzip.finish().unwrap()
}

/// The header alone with other extents and type, and nothing after it.
fn huge(extents: [i16; 3], datatype: i16) -> Vec<u8> {
    let mut bytes = plain();
    for (axis, extent) in extents.iter().enumerate() {
        bytes[42 + 2 * axis..44 + 2 * axis].copy_from_slice(&extent.to_le_bytes());
    }
    bytes[70..72].copy_from_slice(&datatype.to_le_bytes());
    bytes.truncate(352);
    bytes
}

/// Offsets in the header: NIfTI-1, nifti1.h.
pub mod at {
    pub const DIM0: usize = 40;
    pub const DIM1: usize = 42;
    pub const DIM4: usize = 48;
    pub const DATATYPE: usize = 70;
    pub const PIXDIM: usize = 76;
    pub const VOX_OFFSET: usize = 108;
    pub const SCL_SLOPE: usize = 112;
    pub const XYZT_UNITS: usize = 123;
    pub const QFORM_CODE: usize = 252;
    pub const SFORM_CODE: usize = 254;
    pub const QUATERN_B: usize = 256;
    pub const QOFFSET_X: usize = 268;
    pub const SROW_X: usize = 280;
    pub const MAGIC: usize = 344;
    pub const FLAG: usize = 348;
    pub const VOXELS: usize = 352;
}

/// Every hostile file: its name, its content, and the reason for which it must be refused.
pub fn hostile_files() -> Vec<(&'static str, Vec<u8>, Reason)> {
    let good = scan_bytes(1);
    let flipped = {
        let mut bytes = good.clone();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        bytes
    };
    let wrong_crc = {
        let mut bytes = good.clone();
        let crc = bytes.len() - 8;
        bytes[crc] ^= 1;
        bytes
    };
    let short = |value: i16| value.to_le_bytes();
    let float = |value: f32| value.to_le_bytes();
    vec![
        ("empty", Vec::new(), Reason::Truncated),
        ("truncated-gz", good[..good.len() / 2].to_vec(), Reason::Truncated),
        ("truncated-plain", plain()[..5000].to_vec(), Reason::Truncated),
        ("truncated-header", plain()[..200].to_vec(), Reason::Truncated),
        ("bit-flip", flipped, Reason::Corrupt),
        ("wrong-crc", wrong_crc, Reason::Corrupt),
        ("trailing", [plain(), vec![0; 100]].concat(), Reason::Corrupt),
        ("trailing-gz", [&good[..], b"and a letter"].concat(), Reason::Corrupt),
        ("bomb", bomb(64 << 20), Reason::Bomb),
        ("text", b"this is no image, it is a letter to a friend".repeat(20), Reason::BadHeader),
        ("dicom", [vec![0; 128], b"DICM".to_vec(), vec![0; 400]].concat(), Reason::Unsupported),
        ("nifti-2", [&540_i32.to_le_bytes()[..], &[0; 600]].concat(), Reason::Unsupported),
        ("pair", patched(&[(at::MAGIC, b"ni1\0")]), Reason::Unsupported),
        ("analyze", patched(&[(at::MAGIC, b"\0\0\0\0")]), Reason::Unsupported),
        ("huge-header", huge([32_000, 32_000, 32_000], 64), Reason::TooLarge),
        ("large-claim", huge([100, 100, 100], 64), Reason::Truncated),
        ("negative-extent", patched(&[(at::DIM1, &short(-4))]), Reason::BadHeader),
        ("two-axes", patched(&[(at::DIM0, &short(2))]), Reason::Unsupported),
        ("many-axes", patched(&[(at::DIM0, &short(300))]), Reason::BadHeader),
        (
            "two-frames",
            patched(&[(at::DIM0, &short(4)), (at::DIM4, &short(2))]),
            Reason::Unsupported,
        ),
        ("rgb24", patched(&[(at::DATATYPE, &short(128))]), Reason::Unsupported),
        ("complex", patched(&[(at::DATATYPE, &short(32))]), Reason::Unsupported),
        ("no-such-type", patched(&[(at::DATATYPE, &short(77))]), Reason::BadHeader),
        ("nan-offset", patched(&[(at::VOX_OFFSET, &float(f32::NAN))]), Reason::BadHeader),
        ("far-offset", patched(&[(at::VOX_OFFSET, &float(1e9))]), Reason::BadHeader),
        ("nan-slope", patched(&[(at::SCL_SLOPE, &float(f32::NAN))]), Reason::BadHeader),
        (
            "bad-extension",
            patched(&[(at::VOX_OFFSET, &float(368.0)), (at::FLAG, &[1]), (352, &[255; 16])]),
            Reason::BadHeader,
        ),
        ("flat-affine", patched(&[(at::SROW_X, &[0; 16])]), Reason::BadHeader),
        (
            "long-quaternion",
            patched(&[
                (at::SFORM_CODE, &short(0)),
                (at::QFORM_CODE, &short(1)),
                (at::QUATERN_B, &float(1.5)),
            ]),
            Reason::BadHeader,
        ),
        ("nan-affine", patched(&[(at::SROW_X, &float(f32::NAN))]), Reason::NonFinite),
        ("nan", patched(&[(at::VOXELS + 4000, &float(f32::NAN))]), Reason::NonFinite),
        ("infinite", patched(&[(at::VOXELS, &float(f32::INFINITY))]), Reason::NonFinite),
    ]
}

fn read(folder: &Path, bytes: &[u8]) -> Result<Scan, ScanError> {
    let path = folder.join("scan.nii.gz");
    fs::write(&path, bytes).unwrap();
    read_scan(&path, &LIMITS)
}

#[test]
fn every_hostile_file_is_refused_with_its_reason_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes, reason) in hostile_files() {
        match read(folder.path(), &bytes) {
            Err(ScanError::Refused(refusal)) => {
                assert_eq!(refusal.reason, reason, "{name}: {refusal}");
                for part in [&refusal.found, &refusal.needed, &refusal.action] {
                    assert!(!part.is_empty(), "{name}: {refusal:?}");
                }
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn a_file_above_the_limits_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scan.nii");
    // Sparse: it has no blocks.
    fs::File::create(&path).unwrap().set_len(LIMITS.max_file_bytes + 1).unwrap();
    let error = read_scan(&path, &LIMITS).unwrap_err();
    assert!(matches!(&error, ScanError::Refused(r) if r.reason == Reason::TooLarge), "{error}");
    assert!(error.to_string().contains("max_file_mib"), "{error}");
}

#[test]
fn folders_and_forbidden_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.nii");
    fs::create_dir(&path).unwrap();
    let error = read_scan(&path, &LIMITS).unwrap_err();
    assert!(matches!(&error, ScanError::Refused(r) if r.reason == Reason::Unsupported), "{error}");
    assert!(matches!(read_scan(&folder.path().join("none"), &LIMITS), Err(ScanError::Io { .. })));
    let path = folder.path().join("secret.nii.gz");
    fs::write(&path, scan_bytes(1)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
    match fs::File::open(&path) {
        Ok(_) => skip("in part, this user may read everything"),
        Err(_) => assert!(matches!(read_scan(&path, &LIMITS), Err(ScanError::Io { .. }))),
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        rng_seed: RngSeed::Fixed(1),
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_bytes_in_the_header_are_read_or_refused(
        patches in prop::collection::vec((0_usize..360, any::<u8>()), 1..12),
        cut in 0_usize..20_000,
        is_compressed in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = plain();
        for (offset, value) in patches {
            bytes[offset] = value;
        }
        bytes.truncate(bytes.len() - cut);
        let bytes = if is_compressed { gzip(&bytes) } else { bytes };
        if let Ok(scan) = read(folder.path(), &bytes) {
            let volume = scan.volume;
            prop_assert_eq!(volume.voxels.len(), volume.shape.n_voxels());
            prop_assert!(volume.voxels.iter().all(|voxel| voxel.is_finite()));
        }
    }

    #[test]
    fn any_damage_to_a_compressed_scan_is_seen(place in 10_usize..1_000_000, bit in 0_u8..8) {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = scan_bytes(1);
        // The first ten bytes, the gzip header, are not covered by its checksum.
        let place = 10 + place % (bytes.len() - 10);
        bytes[place] ^= 1 << bit;
        match read(folder.path(), &bytes) {
            // A few bits of the stream have no meaning, like the padding before the checksum.
            Ok(scan) => prop_assert_eq!(scan, read(folder.path(), &scan_bytes(1)).unwrap()),
            Err(error) => prop_assert!(matches!(error, ScanError::Refused(_))),
        }
    }
}
