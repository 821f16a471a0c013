//! The header: size, kind of voxels, scaling, and the place of the voxels in the world.

use nifti::{NiftiHeader, NiftiType};

use super::refuse::{EXPORT_AGAIN, refuse};
use crate::{
    domain::{
        error::{
            QuarantineReason::{BadHeader, NonFinite, TooLarge, Truncated, Unsupported},
            Refusal, ScanError,
        },
        scan::Limits,
    },
    numeric::geometry::{Affine, AffineError, Shape3},
};

pub(super) const HEADER_BYTES: usize = 348;
/// Bytes of header and extension flag. The voxels start here or later.
pub(super) const FIRST_OFFSET: usize = 352;
/// Limit on the header extensions. A larger offset of the voxels is an error in the header.
pub(super) const MAX_EXTENSION_BYTES: usize = 16 << 20;
/// oddscan writes this into the header's description, and refuses to read such a file as a scan.
pub(super) const OWN_MARK: &str = "oddscan";

/// The header of a scan. A result on the same grid must copy it.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    pub(super) header: NiftiHeader,
    pub(super) shape: Shape3,
}

pub(super) fn parse_header(start: &[u8]) -> Result<NiftiHeader, ScanError> {
    if start.is_empty() {
        return refuse(Truncated, "an empty file", "a NIfTI file", EXPORT_AGAIN);
    }
    if start.get(128..132) == Some(b"DICM") {
        let action = "convert it, for instance with dcm2niix";
        return refuse(Unsupported, "a DICOM file", "a NIfTI-1 file", action);
    }

    let first: [u8; 4] = start.get(..4).map_or([0; 4], |b| [b[0], b[1], b[2], b[3]]);

    match (i32::from_le_bytes(first), i32::from_be_bytes(first)) {
        (348, _) | (_, 348) => {}
        (540, _) | (_, 540) => {
            let action = "convert it to NIfTI-1, for instance with nibabel or fslchfiletype";
            return refuse(Unsupported, "a NIfTI-2 file", "NIfTI-1", action);
        }
        (found, _) => {
            return refuse(
                BadHeader,
                format!("a header size of {found}"),
                "348, with which every NIfTI-1 file starts",
                "export as .nii or .nii.gz",
            );
        }
    }

    if start.len() < FIRST_OFFSET {
        let found = format!("{} bytes in all", start.len());
        return refuse(Truncated, found, "a header of 352 bytes", EXPORT_AGAIN);
    }

    match &start[344..348] {
        b"n+1\0" => {}
        b"ni1\0" => {
            let action = "join header and image into one .nii file";
            return refuse(Unsupported, "one half of an .hdr/.img pair", "a single file", action);
        }
        magic => {
            return refuse(
                Unsupported,
                format!("the magic {:?}", String::from_utf8_lossy(magic)),
                "n+1 (NIfTI-1, single file); Analyze 7.5 is not supported",
                "export as .nii or .nii.gz",
            );
        }
    }

    let header = NiftiHeader::from_reader(&start[..HEADER_BYTES]);
    let header = header.map_err(|error| {
        Refusal::new(BadHeader, format!("an unreadable header ({error})"), "NIfTI-1", EXPORT_AGAIN)
    })?;
    Ok(header)
}

/// Extents of the three axes. They are checked before anything is allocated.
pub(super) fn shape_of(header: &NiftiHeader, limits: &Limits) -> Result<Shape3, ScanError> {
    let rank = usize::from(header.dim[0]);
    let extents = &header.dim[1..];
    if !(3..=7).contains(&rank) {
        return refuse(
            if rank > 7 { BadHeader } else { Unsupported },
            format!("{rank} axes"),
            "3 axes; all further ones must have extent 1",
            "export one 3D volume per file",
        );
    }

    if let Some(extra) = extents[3..rank].iter().find(|&&extent| extent != 1) {
        return refuse(
            Unsupported,
            format!("a fourth or higher axis of extent {extra}"),
            "one frame",
            "export one volume of the series",
        );
    }

    let shape = [0, 1, 2].map(|axis| usize::from(extents[axis]));
    // The format's extents are signed. Negative ones appear here as large numbers.
    if shape.iter().any(|&extent| !(2..=32_767).contains(&extent)) {
        return refuse(
            BadHeader,
            format!("extents {shape:?}"),
            "2 to 32767 voxels along each axis",
            EXPORT_AGAIN,
        );
    }

    let n_voxels: u64 = shape.iter().map(|&extent| extent as u64).product();
    if n_voxels > limits.max_voxels {
        return refuse(
            TooLarge,
            format!("{n_voxels} voxels ({shape:?})"),
            format!("at most {} (intake.max_megavoxels)", limits.max_voxels),
            "raise intake.max_megavoxels if you expect scans of this size",
        );
    }
    Ok(Shape3(shape))
}

pub(super) fn voxel_type(header: &NiftiHeader) -> Result<NiftiType, ScanError> {
    use NiftiType::{Float32, Float64, Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, Uint64};
    match header.data_type() {
        Ok(
            kind @ (Int8 | Int16 | Int32 | Int64 | Uint8 | Uint16 | Uint32 | Uint64 | Float32
            | Float64),
        ) => Ok(kind),
        Ok(kind) => refuse(
            Unsupported,
            format!("voxels of type {kind:?}"),
            "one real number per voxel (integers of 8 to 64 bits, f32 or f64)",
            "export the magnitude image",
        ),
        Err(_) => refuse(
            BadHeader,
            format!("the data type code {}", header.datatype),
            "a NIfTI-1 data type",
            EXPORT_AGAIN,
        ),
    }
}

/// Slope and intercept; a slope of 0 means none.
pub(super) fn scaling(header: &NiftiHeader) -> Result<(f64, f64), ScanError> {
    let (slope, inter) = (f64::from(header.scl_slope), f64::from(header.scl_inter));
    if slope == 0.0 {
        return Ok((1.0, 0.0));
    }
    if !slope.is_finite() || !inter.is_finite() {
        return refuse(
            BadHeader,
            format!("scl_slope {slope}, scl_inter {inter}"),
            "finite scaling",
            EXPORT_AGAIN,
        );
    }
    Ok((slope, inter))
}

/// Voxel -> world mm: sform, else qform. Without both, the pixel sizes count, with the origin in
/// the middle and x pointing left, as in nibabel.
pub(super) fn affine_of(header: &NiftiHeader, shape: Shape3) -> Result<Affine, ScanError> {
    let rows = if header.sform_code > 0 {
        [header.srow_x, header.srow_y, header.srow_z].map(|row| row.map(f64::from))
    } else if header.qform_code > 0 {
        qform(header)?
    } else {
        let size = voxel_size(header);
        let step = [-size[0], size[1], size[2]];
        [0, 1, 2].map(|axis| {
            let mut row = [0.0; 4];
            row[axis] = step[axis];
            row[3] = -step[axis] * (shape.0[axis] as f64 - 1.0) / 2.0;
            row
        })
    };

    let to_mm = match header.xyzt_units & 7 {
        1 => 1000.0,
        3 => 0.001,
        _ => 1.0,
    };
    Affine::new(rows.map(|row| row.map(|entry| entry * to_mm))).map_err(|error| {
        let reason = if error == AffineError::NotFinite { NonFinite } else { BadHeader };
        let action = "check the header's sform, qform and pixdim, then export again";
        Refusal::new(reason, error.to_string(), "an invertible affine", action).into()
    })
}

/// Edge lengths of a voxel. The format requires positive lengths, but some converters put an axis'
/// direction into the sign. No reader expects it there: nibabel and oddscan take the absolute
/// values. Used as a direction, the sign would swap left and right.
pub(super) fn voxel_size(header: &NiftiHeader) -> [f64; 3] {
    [1, 2, 3].map(|axis| f64::from(header.pixdim[axis]).abs())
}

/// The rotation of the unit quaternion, scaled by the pixel sizes (NIfTI-1, method 2).
pub(super) fn qform(header: &NiftiHeader) -> Result<[[f64; 4]; 3], ScanError> {
    let [a, b, c, d] = unit_quaternion(header)?;
    let flip = if header.pixdim[0] < 0.0 { -1.0 } else { 1.0 };
    let size = voxel_size(header);
    let size = [size[0], size[1], size[2] * flip];

    let rotation = [
        [a * a + b * b - c * c - d * d, 2.0 * (b * c - a * d), 2.0 * (b * d + a * c)],
        [2.0 * (b * c + a * d), a * a + c * c - b * b - d * d, 2.0 * (c * d - a * b)],
        [2.0 * (b * d - a * c), 2.0 * (c * d + a * b), a * a + d * d - c * c - b * b],
    ];
    let origin = [header.quatern_x, header.quatern_y, header.quatern_z].map(f64::from);
    Ok([0, 1, 2].map(|row| {
        let [x, y, z] = rotation[row];
        [x * size[0], y * size[1], z * size[2], origin[row]]
    }))
}

/// The header holds three parts of a unit quaternion. The fourth, `a`, follows from the length 1.
/// If the squared length of the three differs from 1 by less than rounding in 24 bits, `a` is 0: a
/// turn by 180 degrees. The limit is nibabel's (`nifti1.quaternion_threshold`).
pub(super) fn unit_quaternion(header: &NiftiHeader) -> Result<[f64; 4], ScanError> {
    const ROUNDING: f64 = 3.0 * f32::EPSILON as f64;
    let [b, c, d] = [header.quatern_b, header.quatern_c, header.quatern_d].map(f64::from);
    let length2 = b * b + c * c + d * d;
    let missing = 1.0 - length2;
    if missing <= -ROUNDING {
        return refuse(
            BadHeader,
            format!("quatern_b, c, d = {b}, {c}, {d} with a squared length of {length2}"),
            "part of a unit quaternion: at most 1",
            "check the header's qform, then export again",
        );
    }

    if missing.abs() < ROUNDING {
        let length = length2.sqrt();
        return Ok([0.0, b / length, c / length, d / length]);
    }
    Ok([missing.sqrt(), b, c, d])
}
