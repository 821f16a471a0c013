//! Files that are odd and right: they are read, and as other programs read them.

use std::fs;

use oddscan::{
    domain::error::ScanError,
    nifti::{Scan, read_scan},
};

use crate::hostile::{LIMITS, at, patched};

fn read(bytes: &[u8]) -> Result<Scan, ScanError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scan.nii.gz");
    fs::write(&path, bytes).unwrap();
    read_scan(&path, &LIMITS)
}

/// The affine of the scan with other header fields and no sform.
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
    // The sign that the format does know, qfac.
    let flipped = affine(1, [-1.0, 6.0, 5.0, 4.0], [0.0; 3]);
    assert_eq!(flipped[2], [0.0, 0.0, -4.0, 3.0]);
}
