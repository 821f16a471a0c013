//! NIfTI-1 files to [`RawVolume`] and [`RawMask`], and maps and masks back onto the same grid.
//!
//! The crate `nifti` parses the header and names the data types. The body is read here, because
//! the crate never checks the gzip checksum, panics on complex and RGB voxels, and allocates what
//! a hostile header asks for (see its issues); memory here is bounded by [`Limits`] and by what
//! the file really holds. What is refused says what was found, what was needed and what to do.

mod content;
mod header;
mod read;
mod refuse;
mod write;

pub use crate::domain::scan::Limits;
pub use header::Grid;
pub use read::{Scan, n_voxels, read_map, read_mask, read_scan};
pub use write::{encode_map, encode_mask, encode_scan, encode_volume};
