//! The objects of the method and their rules: scans, cohorts, windows, findings, errors. No I/O.
//!
//! The traits here are the only seams between the method and a device. The encoder and the
//! distances have three real implementations: the native CPU engine, CUDA, and burn. The brain
//! extraction network has two: the native CPU engine and burn.

pub mod acquisition;
pub mod brain_network;
pub mod brain_weights;
pub mod cohort;
pub mod damage;
pub mod dicom_start;
pub mod error;
pub mod evidence;
pub mod finding;
pub mod follow_up;
pub mod head;
pub mod identity;
pub mod landmarks;
pub mod left_alone;
pub mod not_ready;
pub mod patient;
pub mod quality;
pub mod refresh;
pub mod repair;
pub mod scan;
pub mod sequence;
pub mod series_key;
pub mod time;
pub mod weights;
pub mod window;
pub mod window_scores;

use crate::numeric::{
    scoring::{PairColumns, SearchReach},
    slice::{ImageBatch, PatchFeatures},
    token::TokenGrid,
};
use error::DeviceError;
use scan::ScanId;

/// A frozen vision transformer that describes slices.
pub trait SliceEncoder: Send {
    /// The features of every patch at every layer that the encoder was built for, in the order of
    /// those layers, averaged over the images of each group.
    ///
    /// They do not depend on the other images of the batch.
    fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError>;

    /// Pixels along the edge of a patch.
    fn patch(&self) -> usize;

    /// Features per patch.
    fn channels(&self) -> usize;

    /// Name of the device in logs and metric labels: `cpu`, `cuda:0`.
    fn device(&self) -> &str;

    /// The device's own memory; `None` if it has none or does not report it.
    fn memory(&self) -> Option<DeviceMemory> {
        None
    }

    /// Whether the processor is free for other work while the device encodes.
    fn is_async(&self) -> bool {
        false
    }
}

/// Memory of a device, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In use now, by any process.
    pub used: u64,
    /// Size of the memory.
    pub total: u64,
}

/// The steps of brain extraction, each with a network of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BrainPart {
    /// Finds the brain in the whole field of view.
    Locate,
    /// Outlines the brain in the box around it.
    Outline,
}

/// Two frozen convolutional networks that find the brain in a head.
pub trait BrainNetwork: Send + Sync {
    /// The probability of brain in each voxel of an image. Both are `[side, side, side]`, x
    /// fastest.
    ///
    /// The side is a multiple of 32. The axes are RAS+, and intensities are normalised as in
    /// [`brain_network`].
    fn forward(&self, part: BrainPart, image: &[f32], side: usize)
    -> Result<Vec<f32>, DeviceError>;
}

/// Names one grid of tokens of a scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GridName {
    /// The scan that the tokens describe.
    pub scan: ScanId,
    /// Position among the grids of the scan.
    pub grid: usize,
}

/// Distances from each token of one scan to its nearest token in another. If the two scans are
/// swapped, the columns are swapped, too, and equal to the last bit.
pub trait PairDistances: Send {
    /// Both directions of one pair of grids, which have the same shape and channels.
    fn nearest(
        &mut self,
        first: &TokenGrid,
        second: &TokenGrid,
        reach: SearchReach,
    ) -> Result<PairColumns, DeviceError>;

    /// Gives the device tokens to keep under a name, in place of earlier tokens of that name. It
    /// keeps them if it has memory of its own, and only while they fit.
    fn keep(&mut self, _name: GridName, _tokens: &TokenGrid) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Like [`PairDistances::nearest`], for one grid and each of several others of the same shape
    /// and channels. `None` where the device does not hold both grids.
    fn nearest_of_kept(
        &mut self,
        _name: GridName,
        others: &[GridName],
        _reach: SearchReach,
    ) -> Result<Vec<Option<PairColumns>>, DeviceError> {
        Ok(others.iter().map(|_| None).collect())
    }
}
