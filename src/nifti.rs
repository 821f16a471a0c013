//! NIfTI-1 files to [`RawVolume`] and [`RawMask`], and maps and masks back onto the same grid.
//!
//! The crate `nifti` parses the header and names the data types. The body is read here, because
//! the crate never checks the gzip checksum, panics on complex and RGB voxels, and allocates what
//! a hostile header asks for (see its issues); memory here is bounded by [`Limits`] and by what
//! the file really holds. What is refused says what was found, what was needed and what to do.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use flate2::{Compression, GzBuilder, bufread::GzDecoder};
use nifti::{Endianness, NiftiHeader, NiftiType};
use rustix::fs::OFlags;

pub use crate::domain::scan::Limits;
use crate::{
    domain::error::{
        QuarantineReason::{
            self, BadHeader, Bomb, Corrupt, NonFinite, TooLarge, Truncated, Unsupported,
        },
        Refusal, ScanError,
    },
    numeric::{
        geometry::{Affine, AffineError, Shape3},
        volume::{RawMask, RawVolume},
    },
};

/// The header of a scan: everything that a result on the same grid must copy.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    header: NiftiHeader,
    shape: Shape3,
}

/// A scan with the header that its results copy.
#[derive(Debug, Clone, PartialEq)]
pub struct Scan {
    /// Voxels and affine.
    pub volume: RawVolume,
    /// Header geometry.
    pub grid: Grid,
}

const HEADER_BYTES: usize = 348;
/// Header and extension flag; the voxels start here or later.
const FIRST_OFFSET: usize = 352;
/// Larger header extensions are no extensions.
const MAX_EXTENSION_BYTES: usize = 16 << 20;
/// What oddscan writes into the header's description, and refuses to read again.
const OWN_MARK: &str = "oddscan";
const EXPORT_AGAIN: &str = "export or copy the file again";

/// Reads a scan.
///
/// # Errors
/// [`ScanError::Refused`] for every content that is no supported scan, [`ScanError::Io`] when the
/// file cannot be read.
pub fn read_scan(path: &Path, limits: &Limits) -> Result<Scan, ScanError> {
    let scan = read_volume(path, limits)?;
    if scan.grid.header.descrip.starts_with(OWN_MARK.as_bytes()) {
        let action = "keep results out of the incoming folder";
        return refuse(Unsupported, "a result of oddscan", "a scan", action);
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
            "set them to 0 where they mean background, then export again",
        );
    }
    Ok(scan)
}

/// Reads a volume of any origin, our own maps too.
///
/// # Errors
/// As [`read_scan`].
pub fn read_map(path: &Path, limits: &Limits) -> Result<RawVolume, ScanError> {
    Ok(read_volume(path, limits)?.volume)
}

/// Reads a mask, our own too: everything that is not 0 is inside.
///
/// # Errors
/// As [`read_scan`].
pub fn read_mask(path: &Path, limits: &Limits) -> Result<RawMask, ScanError> {
    let Scan { volume, .. } = read_volume(path, limits)?;
    let inside = volume.voxels.iter().map(|&v| v != 0.0).collect();
    Ok(RawMask { shape: volume.shape, inside, affine: volume.affine })
}

fn refuse<T>(
    reason: QuarantineReason,
    found: impl Into<String>,
    needed: impl Into<String>,
    action: &str,
) -> Result<T, ScanError> {
    Err(Refusal::new(reason, found, needed, action).into())
}

fn io_error(source: io::Error) -> ScanError {
    ScanError::Io { doing: "reading a scan", source }
}

/// The size of a volume by its header, voxels.
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

/// What the file holds, unpacked.
fn content(path: &Path, limits: &Limits) -> Result<Box<dyn Read>, ScanError> {
    let file = open(path).map_err(io_error)?;
    let meta = file.metadata().map_err(io_error)?;
    if !meta.is_file() {
        let action = "export files; folders, pipes and devices are not read";
        return refuse(Unsupported, "no regular file", "a NIfTI file", action);
    }
    if meta.len() > limits.max_file_bytes {
        return refuse(
            TooLarge,
            format!("{} bytes", meta.len()),
            format!("at most {} (intake.max_file_mib)", limits.max_file_bytes),
            "raise intake.max_file_mib if such files are meant",
        );
    }
    let mut start = [0; 2];
    let mut file = BufReader::with_capacity(1 << 18, file);
    let n_start = read_up_to(&mut file, &mut start).map_err(io_error)?;
    let whole = io::Cursor::new(start).take(n_start as u64).chain(file);
    Ok(if start == [0x1f, 0x8b] {
        Box::new(GzipMembers::new(BufReader::with_capacity(1 << 18, whole)))
    } else {
        Box::new(whole)
    })
}

/// The header and the extension flag, as far as they are there.
fn read_start(reader: &mut impl Read) -> Result<Vec<u8>, ScanError> {
    let mut start = vec![0; FIRST_OFFSET];
    let n_start = read_up_to(reader, &mut start).map_err(stream_error)?;
    start.truncate(n_start);
    Ok(start)
}

/// Opens a file, through links too: a person may name a link to a scan. Does not wait for a writer
/// where the file is a pipe.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

fn read_up_to(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut n_read = 0;
    while n_read < buffer.len() {
        match reader.read(&mut buffer[n_read..])? {
            0 => break,
            n => n_read += n,
        }
    }
    Ok(n_read)
}

/// The content of a gzip file: of one member after the other. Zeros after a member are skipped, as
/// gzip and Python do: tapes and some archives pad files to whole blocks. flate2's own
/// `MultiGzDecoder` takes them for a member that was cut off.
struct GzipMembers<R> {
    /// `None` at the end of the file.
    member: Option<GzDecoder<R>>,
}

/// What lies after a member is neither another one nor zeros.
#[derive(Debug, thiserror::Error)]
#[error("other data after the end of the compressed stream")]
struct TrailingData;

impl<R: BufRead> GzipMembers<R> {
    fn new(file: R) -> Self {
        Self { member: Some(GzDecoder::new(file)) }
    }

    /// Goes to the start of the next member.
    fn next_member(mut file: R) -> io::Result<Option<GzDecoder<R>>> {
        loop {
            let buffer = file.fill_buf()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let n_zeros = buffer.iter().take_while(|&&byte| byte == 0).count();
            match buffer.get(n_zeros) {
                None => file.consume(n_zeros),
                // The first byte of gzip's magic; the rest is the decoder's to judge.
                Some(0x1f) => {
                    file.consume(n_zeros);
                    return Ok(Some(GzDecoder::new(file)));
                }
                Some(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, TrailingData)),
            }
        }
    }
}

impl<R: BufRead> Read for GzipMembers<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let n_read = member.read(buffer)?;
            if n_read > 0 || buffer.is_empty() {
                return Ok(n_read);
            }
            // The checksum was right: `read` reports a wrong one.
            if let Some(member) = self.member.take() {
                self.member = Self::next_member(member.into_inner())?;
            }
        }
        Ok(0)
    }
}

/// A failed read of the content: the compressed stream is at fault, or the disk.
fn stream_error(error: io::Error) -> ScanError {
    let refusal = match error.kind() {
        _ if error.get_ref().is_some_and(|cause| cause.is::<TrailingData>()) => Refusal::new(
            Corrupt,
            error.to_string(),
            "nothing there, zeros, or another gzip stream",
            "the file was joined with another or not copied as it is; copy it again",
        ),
        io::ErrorKind::UnexpectedEof => {
            Refusal::new(Truncated, "a compressed stream that ends early", "its end", EXPORT_AGAIN)
        }
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => Refusal::new(
            Corrupt,
            format!("a damaged compressed stream ({error})"),
            "a gzip stream with the right checksum",
            EXPORT_AGAIN,
        ),
        _ => return io_error(error),
    };
    refusal.into()
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
    // Grows with what the file really holds, whatever the header announces.
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

/// Reads on to the end of the stream, where gzip keeps its checksum.
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

fn parse_header(start: &[u8]) -> Result<NiftiHeader, ScanError> {
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
            return refuse(Unsupported, "half of an .hdr/.img pair", "a single file", action);
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

/// Extents of the three axes, checked before anything is allocated.
fn shape_of(header: &NiftiHeader, limits: &Limits) -> Result<Shape3, ScanError> {
    let rank = usize::from(header.dim[0]);
    let extents = &header.dim[1..];
    if !(3..=7).contains(&rank) {
        return refuse(
            if rank > 7 { BadHeader } else { Unsupported },
            format!("{rank} axes"),
            "3 axes (or more, all further ones of extent 1)",
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
    // The format's extents are signed; negative ones arrive here as large numbers.
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
            "raise intake.max_megavoxels if such scans are meant",
        );
    }
    Ok(Shape3(shape))
}

fn voxel_type(header: &NiftiHeader) -> Result<NiftiType, ScanError> {
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
fn scaling(header: &NiftiHeader) -> Result<(f64, f64), ScanError> {
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

/// Voxel -> world mm: sform, else qform, else the pixel sizes around the middle with x pointing
/// left, as nibabel does.
fn affine_of(header: &NiftiHeader, shape: Shape3) -> Result<Affine, ScanError> {
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

/// Voxel edge lengths. The format has them positive; some converters put an axis' direction into
/// their sign, where no reader looks for it: nibabel takes the absolute values, and so do we. Taken
/// as a direction, the sign would swap left and right.
fn voxel_size(header: &NiftiHeader) -> [f64; 3] {
    [1, 2, 3].map(|axis| f64::from(header.pixdim[axis]).abs())
}

/// The rotation of the unit quaternion, scaled by the pixel sizes (NIfTI-1, method 2).
fn qform(header: &NiftiHeader) -> Result<[[f64; 4]; 3], ScanError> {
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

/// The header holds three parts of a unit quaternion; the fourth, `a`, is what is missing to
/// length 1. A squared length that differs from 1 by less than rounding in 24 bits makes means a
/// turn by 180 degrees, where `a` is 0. The limit is nibabel's (`nifti1.quaternion_threshold`).
fn unit_quaternion(header: &NiftiHeader) -> Result<[f64; 4], ScanError> {
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

/// The bytes of a `.nii.gz` with f32 voxels on the scan's grid, to be read as that scan again.
///
/// # Panics
/// If there is not one value per voxel.
pub fn encode_scan(grid: &Grid, voxels: &[f32]) -> Vec<u8> {
    let mut header = result_header(grid, NiftiType::Float32, "");
    header.descrip = vec![0; 80];
    header.cal_max = 0.0;
    write(&header, grid.shape, voxels.iter().map(|v| v.to_le_bytes()))
}

/// The bytes of a `.nii.gz` with u8 voxels, 0 or 1, on the scan's grid; `what` says in the header
/// what they are: "anomaly mask", "brain mask".
///
/// # Panics
/// If there is not one value per voxel.
pub fn encode_mask(grid: &Grid, inside: &[bool], what: &str) -> Vec<u8> {
    let mut header = result_header(grid, NiftiType::Uint8, what);
    header.cal_max = 1.0;
    write(&header, grid.shape, inside.iter().map(|&i| [u8::from(i)]))
}

/// The bytes of a plain `.nii.gz` with f32 voxels, geometry in the sform: for the demo and tests.
pub fn encode_volume(volume: &RawVolume) -> Vec<u8> {
    let rows = volume.affine.rows().map(|row| row.map(|entry| entry as f32));
    let spacing = volume.affine.spacing_mm();
    let mut header = NiftiHeader {
        // The crate's default is 1, with no rotation: ITK would take that for the geometry.
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

/// The scan's header with everything that could name a patient cleared.
fn result_header(grid: &Grid, kind: NiftiType, what: &str) -> NiftiHeader {
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

fn fill(header: &mut NiftiHeader, shape: Shape3, kind: NiftiType) {
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

fn write<const N: usize>(
    header: &NiftiHeader,
    shape: Shape3,
    voxels: impl ExactSizeIterator<Item = [u8; N]>,
) -> Vec<u8> {
    assert_eq!(voxels.len(), shape.n_voxels(), "one value per voxel");
    let mut bytes = header_bytes(header);
    bytes.extend([0; FIRST_OFFSET - HEADER_BYTES]);
    bytes.extend(voxels.flatten());
    // No time stamp and no name: the same result has the same bytes.
    let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::new(1));
    gzip.write_all(&bytes).and_then(|()| gzip.finish()).expect("a Vec takes all bytes")
}

/// The 348 bytes of a header, little-endian. The crate's own writer only writes to a path.
fn header_bytes(h: &NiftiHeader) -> Vec<u8> {
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
