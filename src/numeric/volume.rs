//! A scan on its own grid ([`RawVolume`], [`RawMask`]) and as the cube that the method uses
//! ([`Volume`]).

use std::ops::Range;

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

impl RawVolume {
    /// The scan with 0 outside the brain. `brain` is on the same grid.
    pub fn within(&self, brain: &RawMask) -> Self {
        let voxel = |(&voxel, &inside): (&f32, &bool)| if inside { voxel } else { 0.0 };
        Self { voxels: self.voxels.iter().zip(&brain.inside).map(voxel).collect(), ..*self }
    }
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
    /// The mask on another grid, by the nearest voxel; `to_mask` maps that grid's voxels to this
    /// one's.
    pub fn onto(&self, shape: Shape3, to_mask: &Affine) -> Vec<bool> {
        let is_inside =
            |offset: usize| self.at(to_mask.apply(shape.voxel(offset).map(|v| v as f64)));
        (0..shape.n_voxels()).into_par_iter().map(is_inside).collect()
    }

    /// Whether the mask contains the voxel nearest to this point (in voxel coordinates); false
    /// outside the grid.
    // Called for every voxel of a cube. Without inlining, the calls take a tenth of the time for a
    // cube.
    #[inline(always)]
    pub fn at(&self, place: [f64; 3]) -> bool {
        self.shape.nearest(place).is_some_and(|offset| self.inside[offset])
    }

    /// For each row along x with voxels inside, the positions in memory from the first to the last
    /// of them.
    pub fn spans(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let width = self.shape.0[0];
        self.inside.chunks_exact(width.max(1)).enumerate().filter_map(move |(row, inside)| {
            let first = inside.iter().position(|&inside| inside)?;
            let last = inside.iter().rposition(|&inside| inside)?;
            Some(row * width + first..row * width + last + 1)
        })
    }

    /// The values of the voxels inside, in the order of memory. `all` has a value per voxel.
    pub fn values(&self, all: &[f32]) -> Vec<f32> {
        let mut values = Vec::with_capacity(all.len() / 4);
        for span in self.spans() {
            let voxels = all[span.clone()].iter().zip(&self.inside[span]);
            values.extend(voxels.filter(|(_, inside)| **inside).map(|(value, _)| value));
        }
        values
    }

    /// Number of voxels inside at the first and at the last layer of the grid along each axis.
    pub fn n_at_faces(&self) -> [[usize; 2]; 3] {
        let n_in_layer = |axis: usize, layer: usize| {
            let mut ends = self.shape.0;
            ends[axis] = 1;
            let of_layer = |offset: &usize| {
                let mut voxel = Shape3(ends).voxel(*offset);
                voxel[axis] = layer;
                self.inside[self.shape.offset(voxel)]
            };
            (0..Shape3(ends).n_voxels()).filter(of_layer).count()
        };
        [0, 1, 2].map(|axis| [0, self.shape.0[axis] - 1].map(|layer| n_in_layer(axis, layer)))
    }

    /// The corners of the box around the voxels inside, half a voxel beyond their centres, in
    /// voxels; infinite where there are none.
    pub fn voxel_box(&self) -> [[f64; 3]; 2] {
        let [low, high] = self.box_around(|voxel| voxel);
        [low.map(|v| v - 0.5), high.map(|v| v + 0.5)]
    }

    /// The lowest and the highest world coordinates, mm, of the voxel centres inside; infinite
    /// where there are none.
    pub fn world_box(&self) -> [[f64; 3]; 2] {
        self.box_around(|voxel| self.affine.apply(voxel))
    }

    /// The lowest and the highest coordinates of the voxels inside, each mapped by an affine
    /// `place`.
    fn box_around(&self, place: impl Fn([f64; 3]) -> [f64; 3]) -> [[f64; 3]; 2] {
        let (mut low, mut high) = ([f64::INFINITY; 3], [f64::NEG_INFINITY; 3]);
        // Coordinates only grow or only fall along a row, so that its ends are enough.
        for offset in self.spans().flat_map(|span| [span.start, span.end - 1]) {
            let place = place(self.shape.voxel(offset).map(|v| v as f64));
            for axis in 0..3 {
                low[axis] = low[axis].min(place[axis]);
                high[axis] = high[axis].max(place[axis]);
            }
        }
        [low, high]
    }
}

/// The value between voxel centres (trilinear), constant beyond the outermost ones.
#[inline(always)]
pub fn interpolate(values: &[f32], shape: Shape3, place: [f64; 3]) -> f64 {
    let Shape3([nx, ny, nz]) = shape;
    // Converted via i32, which is much faster on the processor than usize.
    let low = |axis: usize| {
        let highest = (shape.0[axis] - 1) as i32;
        let place = place[axis].clamp(0.0, f64::from(highest));
        let low = (place as i32).min((highest - 1).max(0));
        (low as usize, place - f64::from(low))
    };
    let [(x, fx), (y, fy), (z, fz)] = [low(0), low(1), low(2)];

    let corner = shape.offset([x, y, z]);
    // An axis of one voxel has no next voxel.
    let step = |n: usize, stride: usize| if n > 1 { stride } else { 0 };
    let (dx, dy, dz) = (step(nx, 1), step(ny, nx), step(nz, nx * ny));

    let row = |first: usize| {
        let [a, b] = [first, first + dx].map(|at| f64::from(values[at]));
        (1.0 - fx) * a + fx * b
    };
    let plane = |first: usize| (1.0 - fy) * row(first) + fy * row(first + dy);
    (1.0 - fz) * plane(corner) + fz * plane(corner + dz)
}

/// The canonical volume: a cube `[side, side, side]` along the world axes (RAS+), x fastest.
///
/// Only [`preprocess::canonicalise`](super::preprocess::canonicalise) makes one. This guarantees
/// that every voxel is finite, in [0, 1], and 0 outside the brain.
#[derive(Debug, Clone, PartialEq)]
pub struct Volume {
    pub(super) side: usize,
    pub(super) voxels: Vec<f32>,
    pub(super) brain: Vec<bool>,
    pub(super) beyond: Option<Vec<bool>>,
    pub(super) affine: Affine,
}

impl Volume {
    /// Memory that it takes, bytes.
    pub fn n_bytes(&self) -> usize {
        let n_beyond = self.beyond.as_ref().map_or(0, Vec::len);
        size_of_val(&*self.voxels) + size_of_val(&*self.brain) + n_beyond
    }

    /// The voxels beyond the faces of the scan's grid that cut the brain. `None` if the brain lies
    /// within the grid.
    pub fn beyond(&self) -> Option<&[bool]> {
        self.beyond.as_deref()
    }

    /// The same volume, of which all cells with enough brain are scored, also those that the
    /// scanner's field of view cuts.
    pub fn with_cut_cells(self) -> Self {
        Self { beyond: None, ..self }
    }

    /// Voxels along each edge.
    pub fn side(&self) -> usize {
        self.side
    }

    /// `[side, side, side]`.
    pub fn shape(&self) -> Shape3 {
        Shape3::cube(self.side)
    }

    /// Intensities in [0, 1], 0 outside the brain.
    pub fn voxels(&self) -> &[f32] {
        &self.voxels
    }

    /// Which voxels are in the brain.
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
    fn the_box_of_a_mask_is_that_of_its_voxel_centres() {
        let shape = Shape3([5, 4, 3]);
        let rows = [[-1.0, 0.2, 0.0, 3.0], [0.3, 2.0, -0.1, 0.0], [0.0, 0.1, 1.5, -7.0]];
        let affine = Affine::new(rows).unwrap();
        let few = [[1, 0, 0], [3, 0, 0], [4, 2, 1], [0, 3, 2], [2, 3, 2]].map(|v| shape.offset(v));
        let inside = (0..shape.n_voxels()).map(|offset| few.contains(&offset)).collect();
        let mask = RawMask { shape, inside, affine };
        let offsets: Vec<f32> = (0..shape.n_voxels()).map(|offset| offset as f32).collect();
        assert_eq!(mask.values(&offsets), few.map(|offset| offset as f32));
        assert_eq!(mask.spans().collect::<Vec<_>>(), [1..4, 34..35, 55..58]);
        let places = few.map(|offset| affine.apply(shape.voxel(offset).map(|v| v as f64)));
        let of = |best: fn(f64, f64) -> f64, from: f64| {
            [0, 1, 2].map(|axis| places.iter().map(|place| place[axis]).fold(from, best))
        };
        let expected = [of(f64::min, f64::INFINITY), of(f64::max, f64::NEG_INFINITY)];
        assert_eq!(mask.world_box(), expected);
        assert_eq!(mask.n_at_faces(), [[1, 1], [2, 2], [2, 2]]);
        let empty = RawMask { inside: vec![false; shape.n_voxels()], ..mask };
        assert_eq!((empty.spans().count(), empty.world_box()[0]), (0, [f64::INFINITY; 3]));
    }

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
