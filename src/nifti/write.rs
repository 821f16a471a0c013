//! Writes maps, masks and scans as NIfTI files on the grid of a scan.

use std::io::Write;

use flate2::{Compression, GzBuilder};
use nifti::{NiftiHeader, NiftiType};

use super::header::{FIRST_OFFSET, Grid, HEADER_BYTES, OWN_MARK};
use crate::numeric::{geometry::Shape3, volume::RawVolume};

/// The bytes of a `.nii.gz` with f32 voxels on the scan's grid: the anomaly map.
///
/// # Panics
/// If there is not one value per voxel.
pub fn encode_map(grid: &Grid, values: &[f32]) -> Vec<u8> {
    let highest = values.iter().copied().fold(0.0, f32::max);
    let mut header = result_header(grid, NiftiType::Float32, "anomaly map");
    header.cal_max = highest;
    write(&header, grid.shape, values.iter().map(|v| v.to_le_bytes()))
}

/// The bytes of a `.nii.gz` with f32 voxels on the scan's grid. It can be read as a scan.
///
/// # Panics
/// If there is not one value per voxel.
pub fn encode_scan(grid: &Grid, voxels: &[f32]) -> Vec<u8> {
    let mut header = result_header(grid, NiftiType::Float32, "");
    header.descrip = vec![0; 80];
    header.cal_max = 0.0;
    write(&header, grid.shape, voxels.iter().map(|v| v.to_le_bytes()))
}

/// The bytes of a `.nii.gz` with u8 voxels, 0 or 1, on the scan's grid. `what` goes into the
/// header's description: "anomaly mask" or "brain mask".
///
/// # Panics
/// If there is not one value per voxel.
pub fn encode_mask(grid: &Grid, inside: &[bool], what: &str) -> Vec<u8> {
    let mut header = result_header(grid, NiftiType::Uint8, what);
    header.cal_max = 1.0;
    write(&header, grid.shape, inside.iter().map(|&i| [u8::from(i)]))
}

/// The bytes of a `.nii.gz` with three f32 volumes on the scan's grid, one after the other: what
/// tokens, brightness and range add to the anomaly map.
///
/// # Panics
/// If there are not three values per voxel.
pub fn encode_parts(grid: &Grid, values: &[f32]) -> Vec<u8> {
    let mut header = result_header(grid, NiftiType::Float32, "parts of the anomaly map");
    header.dim[0] = 4;
    header.dim[4] = 3;
    let [nx, ny, nz] = grid.shape.0;
    write(&header, Shape3([nx, ny, 3 * nz]), values.iter().map(|v| v.to_le_bytes()))
}

/// The bytes of a plain `.nii.gz` with f32 voxels and the geometry in the sform, for the demo and
/// tests.
pub fn encode_volume(volume: &RawVolume) -> Vec<u8> {
    let rows = volume.affine.rows().map(|row| row.map(|entry| entry as f32));
    let spacing = volume.affine.spacing_mm();
    let mut header = NiftiHeader {
        // The crate's default is 1, without a rotation. ITK would use that as the geometry.
        qform_code: 0,
        sform_code: 2,
        srow_x: rows[0],
        srow_y: rows[1],
        srow_z: rows[2],
        xyzt_units: 2,
        ..NiftiHeader::default()
    };

    for (pixdim, spacing) in header.pixdim[1..].iter_mut().zip(spacing) {
        *pixdim = spacing as f32;
    }
    fill(&mut header, volume.shape, NiftiType::Float32);
    write(&header, volume.shape, volume.voxels.iter().map(|v| v.to_le_bytes()))
}

/// The scan's header without any text that could name a patient.
pub(super) fn result_header(grid: &Grid, kind: NiftiType, what: &str) -> NiftiHeader {
    let mut header = grid.header.clone();
    let mut description = format!("{OWN_MARK} {what}; research use only").into_bytes();
    description.resize(80, 0);
    header.descrip = description;
    header.aux_file = [0; 24];
    header.db_name = [0; 18];
    header.data_type = [0; 10];
    header.intent_name = [0; 16];
    header.intent_code = 0;
    header.cal_min = 0.0;
    fill(&mut header, grid.shape, kind);
    header
}

pub(super) fn fill(header: &mut NiftiHeader, shape: Shape3, kind: NiftiType) {
    let [nx, ny, nz] = shape.0.map(|extent| extent as u16);
    header.sizeof_hdr = HEADER_BYTES as i32;
    header.dim = [3, nx, ny, nz, 1, 1, 1, 1];
    header.datatype = kind as i16;
    header.bitpix = (kind.size_of() * 8) as i16;
    header.vox_offset = FIRST_OFFSET as f32;
    header.scl_slope = 1.0;
    header.scl_inter = 0.0;
    header.magic = *b"n+1\0";
}

pub(super) fn write<const N: usize>(
    header: &NiftiHeader,
    shape: Shape3,
    voxels: impl ExactSizeIterator<Item = [u8; N]>,
) -> Vec<u8> {
    assert_eq!(voxels.len(), shape.n_voxels(), "one value per voxel");
    let mut bytes = header_bytes(header);
    bytes.extend([0; FIRST_OFFSET - HEADER_BYTES]);
    bytes.extend(voxels.flatten());
    // Without time stamp and name, the same result has the same bytes.
    let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::new(1));
    gzip.write_all(&bytes).and_then(|()| gzip.finish()).expect("a Vec takes all bytes")
}

/// The 348 bytes of a header, little-endian. The crate's own writer only writes to a path.
pub(super) fn header_bytes(h: &NiftiHeader) -> Vec<u8> {
    let mut out = Vec::with_capacity(FIRST_OFFSET);
    out.extend(h.sizeof_hdr.to_le_bytes());
    out.extend(h.data_type);
    out.extend(h.db_name);
    out.extend(h.extents.to_le_bytes());
    out.extend(h.session_error.to_le_bytes());
    out.extend([h.regular, h.dim_info]);
    out.extend(h.dim.iter().flat_map(|v| v.to_le_bytes()));
    for value in [h.intent_p1, h.intent_p2, h.intent_p3] {
        out.extend(value.to_le_bytes());
    }
    for value in [h.intent_code, h.datatype, h.bitpix, h.slice_start] {
        out.extend(value.to_le_bytes());
    }
    out.extend(h.pixdim.iter().flat_map(|v| v.to_le_bytes()));
    for value in [h.vox_offset, h.scl_slope, h.scl_inter] {
        out.extend(value.to_le_bytes());
    }
    out.extend(h.slice_end.to_le_bytes());
    out.extend([h.slice_code, h.xyzt_units]);
    for value in [h.cal_max, h.cal_min, h.slice_duration, h.toffset] {
        out.extend(value.to_le_bytes());
    }
    out.extend(h.glmax.to_le_bytes());
    out.extend(h.glmin.to_le_bytes());
    let mut description = h.descrip.clone();
    description.resize(80, 0);
    out.extend(description);
    out.extend(h.aux_file);
    out.extend(h.qform_code.to_le_bytes());
    out.extend(h.sform_code.to_le_bytes());
    for value in [h.quatern_b, h.quatern_c, h.quatern_d, h.quatern_x, h.quatern_y, h.quatern_z] {
        out.extend(value.to_le_bytes());
    }
    for row in [h.srow_x, h.srow_y, h.srow_z] {
        out.extend(row.iter().flat_map(|v| v.to_le_bytes()));
    }
    out.extend(h.intent_name);
    out.extend(h.magic);
    assert_eq!(out.len(), HEADER_BYTES, "header layout");
    out
}
