//! The result files of one scan: map, mask, picture, sidecar, and the optional files of
//! `[results]`.
//!
//! Files appear whole or not at all. The sidecar names the others with their sizes and hashes. It
//! always names files that belong to it ([`write_results`]).

mod alignment;
mod canvas;
pub mod picture;
mod place;
mod set;
mod sidecar;
mod write;

use std::{io, path::Path};

pub use alignment::{AlignmentPicture, alignment_picture, itk_transform};
pub use set::{AlignmentFiles, ResultSet};
pub use sidecar::{
    EncoderFacts, FileFacts, Files, IntensityFacts, MethodFacts, QualityFacts, RESEARCH_USE_ONLY,
    SCHEMA, Scores, Sidecar, Standing, ThresholdFacts, WindowFacts,
};
pub use write::{remove_results, tidy_results, write_results, write_sidecar};

/// Reads a sidecar, also one of an older version.
pub fn read_sidecar(path: &Path) -> io::Result<Sidecar> {
    serde_json::from_str(&std::fs::read_to_string(path)?).map_err(io::Error::other)
}
