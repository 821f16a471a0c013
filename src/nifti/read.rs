//! Reads scans, maps and masks within limits.

use std::{
    io::{self, Read},
    path::Path,
};

use super::{
    content::{content, read_start, stream_error},
    header::{
        FIRST_OFFSET, Grid, HEADER_BYTES, MAX_EXTENSION_BYTES, OWN_MARK, affine_of, parse_header,
        scaling, shape_of, voxel_type,
    },
    refuse::{EXPORT_AGAIN, refuse},
};
use nifti::{Endianness, NiftiHeader, NiftiType};

use crate::{
    domain::{
        error::{
            QuarantineReason::{BadHeader, Bomb, Corrupt, NonFinite, Truncated, Unsupported},
            ScanError,
        },
        scan::Limits,
    },
    numeric::volume::{RawMask, RawVolume},
};

/// A scan with the header that its results must copy.
#[derive(Debug, Clone, PartialEq)]
pub struct Scan {
    /// Voxels and affine.
    pub volume: RawVolume,
    /// The header, which maps and masks on the same grid need.
    pub grid: Grid,
}

/// Reads a scan.
///
/// # Errors
/// [`ScanError::Refused`] if the content is no supported scan, [`ScanError::Io`] if the file cannot
/// be read.
pub fn read_scan(path: &Path, limits: &Limits) -> Result<Scan, ScanError> {
    let scan = read_volume(path, limits)?;
    if scan.grid.header.descrip.starts_with(OWN_MARK.as_bytes()) {
        let action = "keep results out of the incoming folder";
        return refuse(Unsupported, "a result that oddscan wrote", "a scan", action);
    }
    Ok(scan)
}

fn read_volume(path: &Path, limits: &Limits) -> Result<Scan, ScanError> {
    let scan = read(path, limits)?;
    let voxels = &scan.volume.voxels;
    let n_bad = voxels.iter().filter(|v| !v.is_finite()).count();
    if n_bad > 0 {
        return refuse(
            NonFinite,
            format!("{n_bad} of {} voxels NaN or infinite", voxels.len()),
            "finite voxels",
            "set them to 0 if they mean background, then export again",
        );
    }
    Ok(scan)
}

/// Reads a volume of any origin; oddscan's own maps are allowed.
///
/// # Errors
/// As [`read_scan`].
pub fn read_map(path: &Path, limits: &Limits) -> Result<RawVolume, ScanError> {
    Ok(read_volume(path, limits)?.volume)
}

/// Reads a mask of any origin; oddscan's own are allowed. Every value other than 0 is inside.
///
/// # Errors
/// As [`read_scan`].
pub fn read_mask(path: &Path, limits: &Limits) -> Result<RawMask, ScanError> {
    let Scan { volume, .. } = read_volume(path, limits)?;
    let inside = volume.voxels.iter().map(|&v| v != 0.0).collect();
    Ok(RawMask { shape: volume.shape, inside, affine: volume.affine })
}

/// The number of voxels that a file's header announces.
///
/// # Errors
/// As [`read_scan`].
pub fn n_voxels(path: &Path, limits: &Limits) -> Result<u64, ScanError> {
    let start = read_start(&mut content(path, limits)?)?;
    Ok(shape_of(&parse_header(&start)?, limits)?.n_voxels() as u64)
}

fn read(path: &Path, limits: &Limits) -> Result<Scan, ScanError> {
    read_stream(content(path, limits)?, limits)
}

fn read_stream(mut reader: impl Read, limits: &Limits) -> Result<Scan, ScanError> {
    let start = read_start(&mut reader)?;
    let header = parse_header(&start)?;
    let shape = shape_of(&header, limits)?;
    let kind = voxel_type(&header)?;
    let affine = affine_of(&header, shape)?;
    skip_extensions(&mut reader, &header, &start[HEADER_BYTES..])?;

    let n_bytes = shape.n_voxels() * kind.size_of();
    let mut body = Vec::new();
    // The buffer grows with the real content of the file, whatever the header announces.
    reader.by_ref().take(n_bytes as u64).read_to_end(&mut body).map_err(stream_error)?;
    if body.len() < n_bytes {
        return refuse(
            Truncated,
            format!("{} bytes of voxels", body.len()),
            format!("{n_bytes}, as the header announces"),
            EXPORT_AGAIN,
        );
    }

    check_end(&mut reader, n_bytes)?;
    let voxels = decode(&body, kind, header.endianness, scaling(&header)?);
    Ok(Scan { volume: RawVolume { shape, voxels, affine }, grid: Grid { header, shape } })
}

/// Reads to the end of the stream, where gzip keeps its checksum.
fn check_end(reader: &mut impl Read, n_bytes: usize) -> Result<(), ScanError> {
    const ENOUGH: u64 = 1 << 20;
    let surplus = io::copy(&mut reader.take(ENOUGH), &mut io::sink()).map_err(stream_error)?;
    if surplus == 0 {
        return Ok(());
    }

    let reason = if surplus >= ENOUGH { Bomb } else { Corrupt };
    let amount = if surplus >= ENOUGH { "over " } else { "" };
    refuse(
        reason,
        format!("{amount}{surplus} bytes after the voxels"),
        format!("an end after {n_bytes} bytes of voxels, as the header announces"),
        "the header and the content contradict each other; export again",
    )
}

fn skip_extensions(
    reader: &mut impl Read,
    header: &NiftiHeader,
    flag: &[u8],
) -> Result<(), ScanError> {
    let offset = f64::from(header.vox_offset);
    let range = FIRST_OFFSET as f64..=(FIRST_OFFSET + MAX_EXTENSION_BYTES) as f64;
    if !range.contains(&offset) || offset.fract() != 0.0 {
        return refuse(
            BadHeader,
            format!("vox_offset {offset}"),
            format!("a whole number from {} to {}", range.start(), range.end()),
            EXPORT_AGAIN,
        );
    }

    let mut extensions = Vec::new();
    let n_bytes = offset as usize - FIRST_OFFSET;
    reader.take(n_bytes as u64).read_to_end(&mut extensions).map_err(stream_error)?;
    if extensions.len() < n_bytes {
        return refuse(Truncated, "an end within the header extensions", "voxels", EXPORT_AGAIN);
    }

    let size: Option<[u8; 4]> = extensions.get(..4).and_then(|bytes| bytes.try_into().ok());
    if let (true, Some(size)) = (flag[0] != 0, size) {
        let size = match header.endianness {
            Endianness::Little => i32::from_le_bytes(size),
            Endianness::Big => i32::from_be_bytes(size),
        };
        if size < 8 || size as usize > n_bytes {
            return refuse(
                BadHeader,
                format!("a header extension of {size} bytes"),
                format!("one that fits the {n_bytes} bytes before the voxels"),
                EXPORT_AGAIN,
            );
        }
    }
    Ok(())
}

fn decode(
    body: &[u8],
    kind: NiftiType,
    endianness: Endianness,
    (slope, inter): (f64, f64),
) -> Vec<f32> {
    macro_rules! numbers {
        ($type:ty) => {
            body.chunks_exact(size_of::<$type>())
                .map(|bytes| {
                    let bytes = bytes.try_into().expect("chunks have the type's size");
                    let value = match endianness {
                        Endianness::Little => <$type>::from_le_bytes(bytes),
                        Endianness::Big => <$type>::from_be_bytes(bytes),
                    };
                    (value as f64 * slope + inter) as f32
                })
                .collect()
        };
    }
    match kind {
        NiftiType::Uint8 => numbers!(u8),
        NiftiType::Int8 => numbers!(i8),
        NiftiType::Uint16 => numbers!(u16),
        NiftiType::Int16 => numbers!(i16),
        NiftiType::Uint32 => numbers!(u32),
        NiftiType::Int32 => numbers!(i32),
        NiftiType::Uint64 => numbers!(u64),
        NiftiType::Int64 => numbers!(i64),
        NiftiType::Float32 => numbers!(f32),
        NiftiType::Float64 => numbers!(f64),
        other => unreachable!("{other:?} was refused with the header"),
    }
}
