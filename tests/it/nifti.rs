//! Unusual but valid files. They are read in the same way as by other programs.

use std::{fs, os::unix::fs::symlink, path::Path};

use oddscan::{
    domain::error::{QuarantineReason as Reason, Refusal, ScanError},
    nifti::{Scan, read_scan},
};

use crate::{
    hostile::{LIMITS, at, gzip, patched, plain},
    support::scan_bytes,
};

fn read(bytes: &[u8]) -> Result<Scan, ScanError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scan.nii.gz");
    fs::write(&path, bytes).unwrap();
    read_scan(&path, &LIMITS)
}

fn refusal(bytes: &[u8]) -> Refusal {
    match read(bytes) {
        Err(ScanError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

/// The affine of the scan with other header fields and without an sform.
fn affine(qform_code: i16, pixdim: [f32; 4], quaternion: [f32; 3]) -> [[f64; 4]; 3] {
    read(&posed(qform_code, pixdim, quaternion)).unwrap().volume.affine.rows()
}

fn posed(qform_code: i16, pixdim: [f32; 4], quaternion: [f32; 3]) -> Vec<u8> {
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    patched(&[
        (at::SFORM_CODE, &[0, 0]),
        (at::QFORM_CODE, &qform_code.to_le_bytes()),
        (at::PIXDIM, &floats(&pixdim)),
        (at::QUATERN_B, &floats(&quaternion)),
        (at::QOFFSET_X, &floats(&[1.0, 2.0, 3.0])),
    ])
}

#[test]
fn a_negative_pixel_size_does_not_swap_left_and_right() {
    for qform_code in [0, 1] {
        let right = affine(qform_code, [1.0, 6.0, 5.0, 4.0], [0.0; 3]);
        for signs in [[-1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]] {
            let [x, y, z] = signs;
            let odd = affine(qform_code, [1.0, 6.0 * x, 5.0 * y, 4.0 * z], [0.0; 3]);
            assert_eq!(odd, right, "qform_code {qform_code}, signs {signs:?}");
        }
    }
    // The sign that the format defines, qfac.
    let flipped = affine(1, [-1.0, 6.0, 5.0, 4.0], [0.0; 3]);
    assert_eq!(flipped[2], [0.0, 0.0, -4.0, 3.0]);
}

#[test]
fn a_quaternion_that_is_rounded_is_a_turn_by_180_degrees() {
    // About the axis n = (0.6, 0.8, 0) the turn is 2 n n' - 1.
    let turn = [[-0.28, 0.96, 0.0], [0.96, 0.28, 0.0], [0.0, 0.0, -1.0]];
    for excess in [-2e-7_f64, 0.0, 2e-7] {
        let part = |n: f64| (n * (1.0 + excess).sqrt()) as f32;
        let rows = affine(1, [1.0; 4], [part(0.6), part(0.8), 0.0]);
        for (row, wanted) in rows.iter().zip(turn) {
            for (entry, wanted) in row.iter().zip(wanted) {
                // The direction has 24 bits.
                assert!((entry - wanted).abs() < 2e-7, "excess {excess}: {rows:?}");
            }
        }
        // Its length is exact, so that no axis is stretched.
        for axis in 0..3 {
            let length = rows.iter().map(|row| row[axis].powi(2)).sum::<f64>().sqrt();
            assert!((length - 1.0).abs() < 1e-12, "excess {excess}, axis {axis}: {length}");
        }
    }
}

#[test]
fn a_quaternion_longer_than_a_unit_is_refused() {
    for quaternion in [[0.8, 0.8, 0.0], [1.000_001, 0.0, 0.0], [0.0, 0.0, -3e38]] {
        let refusal = refusal(&posed(1, [1.0; 4], quaternion));
        assert_eq!(refusal.reason, Reason::BadHeader, "{refusal}");
        assert!(refusal.found.contains("quatern"), "{refusal}");
        assert!(refusal.action.contains("qform"), "{refusal}");
    }
    let found = refusal(&posed(1, [1.0; 4], [1.0, 0.5, 0.0])).found;
    assert_eq!(found, "quatern_b, c, d = 1, 0.5, 0 with a squared length of 1.25");
}

#[test]
fn zeros_after_a_compressed_scan_are_padding() {
    let whole = scan_bytes(1);
    let wanted = read(&whole).unwrap();
    // One, a block of a tape, and more than any buffer holds.
    for n_zeros in [1, 512, 1 << 20] {
        let padded = [whole.clone(), vec![0; n_zeros]].concat();
        assert_eq!(read(&padded).unwrap(), wanted, "{n_zeros} zeros");
    }
}

#[test]
fn a_scan_compressed_in_parts_is_one_scan() {
    let (start, end) = (plain()[..9000].to_vec(), plain()[9000..].to_vec());
    let wanted = read(&plain()).unwrap();
    for zeros in [0, 700] {
        let padding = vec![0; zeros];
        let parts = [gzip(&start), padding.clone(), gzip(&end), gzip(&[]), padding];
        assert_eq!(read(&parts.concat()).unwrap(), wanted, "{zeros} zeros between");
    }
    let cut = [gzip(&start), gzip(&end)[..4].to_vec()].concat();
    assert_eq!(refusal(&cut).reason, Reason::Truncated);
}

#[test]
fn other_data_after_a_compressed_scan_is_refused_by_name() {
    for garbage in [&b"<html>404</html>"[..], b"\0\0x", b"\n"] {
        let refusal = refusal(&[&scan_bytes(1), garbage].concat());
        assert_eq!(refusal.reason, Reason::Corrupt, "{refusal}");
        assert!(refusal.found.contains("after the end of the compressed stream"), "{refusal}");
        assert!(refusal.needed.contains("zeros"), "{refusal}");
    }
}

#[test]
fn a_link_to_a_scan_is_read_and_a_pipe_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (file, link, pipe) =
        (folder.path().join("a.nii"), folder.path().join("b.nii"), folder.path().join("c.nii"));
    fs::write(&file, plain()).unwrap();
    symlink(&file, &link).unwrap();
    make_pipe(&pipe);
    assert_eq!(read_scan(&link, &LIMITS).unwrap(), read_scan(&file, &LIMITS).unwrap());
    // Nothing writes into it. If it were opened like a file, the test would never end.
    let error = read_scan(&pipe, &LIMITS).unwrap_err();
    assert!(matches!(&error, ScanError::Refused(r) if r.reason == Reason::Unsupported), "{error}");
}

fn make_pipe(path: &Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
}
