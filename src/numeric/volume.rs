//! A scan as scanned ([`RawVolume`], [`RawMask`]) and as the method sees it ([`Volume`]).

use super::geometry::{Affine, Shape3};

/// A scan on its own grid: voxels `[nx, ny, nz]`, x fastest, in the scanner's units, all finite.
#[derive(Debug, Clone, PartialEq)]
pub struct RawVolume {
    /// Extents of the grid.
    pub shape: Shape3,
    /// `shape.n_voxels()` finite intensities.
    pub voxels: Vec<f32>,
    /// Voxel index -> world mm.
    pub affine: Affine,
}

/// A binary region on its own grid, `[nx, ny, nz]`, x fastest.
#[derive(Debug, Clone, PartialEq)]
pub struct RawMask {
    /// Extents of the grid.
    pub shape: Shape3,
    /// `shape.n_voxels()` entries.
    pub inside: Vec<bool>,
    /// Voxel index -> world mm.
    pub affine: Affine,
}

/// The canonical volume: a cube `[side, side, side]` along the world axes (RAS+), x fastest.
///
/// Only [`preprocess::canonicalise`](super::preprocess::canonicalise) makes one, so that its
/// promises hold: every voxel is finite and in [0, 1], and 0 outside the brain.
#[derive(Debug, Clone, PartialEq)]
pub struct Volume {
    pub(super) side: usize,
    pub(super) voxels: Vec<f32>,
    pub(super) brain: Vec<bool>,
    pub(super) affine: Affine,
}

impl Volume {
    /// Voxels along each edge.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Extents: a cube.
    pub fn shape(&self) -> Shape3 {
        Shape3::cube(self.side)
    }

    /// Intensities in [0, 1], 0 outside the brain.
    pub fn voxels(&self) -> &[f32] {
        &self.voxels
    }

    /// Which voxels lie in the brain.
    pub fn brain(&self) -> &[bool] {
        &self.brain
    }

    /// Cube voxel -> world mm.
    pub fn affine(&self) -> &Affine {
        &self.affine
    }
}
