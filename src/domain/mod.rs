//! What things are and may become: scans, cohorts, windows, findings, errors. No I/O.
//!
//! The two traits here are the only seams between the method and a device; each has two real
//! implementations, burn (CUDA) and the native CPU engine.

pub mod acquisition;
pub mod cohort;
pub mod error;
pub mod finding;
pub mod landmarks;
pub mod quality;
pub mod scan;
pub mod sequence;
pub mod tokenise;
pub mod window;

use crate::numeric::{
    scoring::{PairColumns, SearchReach},
    slice::{ImageBatch, PatchFeatures},
    token::TokenGrid,
};
use error::DeviceError;

/// A frozen vision transformer that describes slices.
pub trait SliceEncoder: Send {
    /// The features of every patch at every layer that the encoder was built for, in the order of those
    /// layers, averaged over the images of each group.
    ///
    /// They do not depend on the other images of the batch.
    fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError>;

    /// Pixels along the edge of a patch.
    fn patch(&self) -> usize;

    /// Features per patch.
    fn channels(&self) -> usize;

    /// The device in words, as it stands in logs and metric labels: `cpu`, `cuda:0`.
    fn device(&self) -> &str;
}

/// Distances from each token of one scan to its nearest token of another.
pub trait PairDistances: Send {
    /// Both directions of one pair of grids, which have the same shape and channels.
    fn nearest(
        &mut self,
        first: &TokenGrid,
        second: &TokenGrid,
        reach: SearchReach,
    ) -> Result<PairColumns, DeviceError>;
}
