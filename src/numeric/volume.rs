//! A scan as scanned ([`RawVolume`], [`RawMask`]) and as the method sees it ([`Volume`]).

use rayon::prelude::*;

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

impl RawMask {
    /// The mask on another grid, by the nearest voxel; `to_mask` maps that grid's voxels to this one's.
    pub fn onto(&self, shape: Shape3, to_mask: &Affine) -> Vec<bool> {
        let is_inside =
            |offset: usize| self.at(to_mask.apply(shape.voxel(offset).map(|v| v as f64)));
        (0..shape.n_voxels()).into_par_iter().map(is_inside).collect()
    }

    /// Whether the voxel nearest to a voxel place is inside; beyond the grid nothing is.
    #[inline]
    pub fn at(&self, place: [f64; 3]) -> bool {
        let mut voxel = [0; 3];
        for axis in 0..3 {
            let index = (place[axis] + 0.5).floor();
            // Said so that a place that is no number, as wild affines make, lies outside.
            if !(0.0..self.shape.0[axis] as f64).contains(&index) {
                return false;
            }
            voxel[axis] = index as usize;
        }
        self.inside[self.shape.offset(voxel)]
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::geometry::WorldPoint;

    #[test]
    fn a_place_that_is_no_number_lies_outside_of_every_mask() {
        let shape = Shape3([2, 3, 4]);
        let affine = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        let brain = RawMask { shape, inside: vec![true; shape.n_voxels()], affine };
        assert!(brain.at([0.0; 3]) && brain.at([1.4, 2.4, 3.4]) && brain.at([-0.5; 3]));
        assert!(!brain.at([1.5, 0.0, 0.0]) && !brain.at([-0.6, 0.0, 0.0]));
        for wild in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(!brain.at([wild, 0.0, 0.0]));
        }
    }
}
