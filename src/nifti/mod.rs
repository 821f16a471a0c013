//! Reads NIfTI-1 files as volumes and masks, and writes maps and masks onto the same grid.
//!
//! The crate `nifti` parses the header and names the data types. The body is read here, because the
//! crate never checks the gzip checksum, panics on complex and RGB voxels, and allocates whatever a
//! hostile header asks for (see its issues). Here, [`Limits`] and the real size of the file limit
//! the memory. Each refusal says what was found, what was needed and what to do.

mod content;
mod foreign;
mod header;
mod read;
mod refuse;
mod write;

pub use crate::domain::scan::Limits;
pub use content::check_size;
pub use foreign::foreign_format;
pub use header::Grid;
pub use read::{Scan, n_voxels, read_map, read_mask, read_scan};
pub use write::{encode_map, encode_mask, encode_parts, encode_scan, encode_volume};
