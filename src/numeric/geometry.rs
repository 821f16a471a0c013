//! The position of a voxel: shapes, axes and the affine between voxel indices and world
//! millimetres.
//!
//! World coordinates are RAS+ as in NIfTI: x grows to the patient's right, y to the front, z up.

use std::ops::Range;

use thiserror::Error;

/// One of the three axes of a volume in RAS+ orientation, named after the slices along it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Axis {
    /// x: slices from the patient's left to the right.
    Sagittal,
    /// y: slices from the back to the front.
    Coronal,
    /// z: slices from below upwards.
    Axial,
}

impl Axis {
    /// All axes, in the order in which the paper joins the views: axial, coronal, sagittal.
    pub const VIEWS: [Axis; 3] = [Axis::Axial, Axis::Coronal, Axis::Sagittal];

    /// Position of the axis in an `[x, y, z]` triple.
    pub fn index(self) -> usize {
        match self {
            Axis::Sagittal => 0,
            Axis::Coronal => 1,
            Axis::Axial => 2,
        }
    }

    /// The word used in settings and reports.
    pub fn name(self) -> &'static str {
        match self {
            Axis::Sagittal => "sagittal",
            Axis::Coronal => "coronal",
            Axis::Axial => "axial",
        }
    }
}

/// Number of voxels along x, y and z; x is the fastest in memory, as in NIfTI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape3(pub [usize; 3]);

impl Shape3 {
    /// A cube of `side` voxels.
    pub fn cube(side: usize) -> Self {
        Self([side; 3])
    }

    /// Number of voxels: the product of the extents.
    pub fn n_voxels(self) -> usize {
        self.0.iter().product()
    }

    /// Position of voxel `[x, y, z]` in memory.
    #[inline]
    pub fn offset(self, [x, y, z]: [usize; 3]) -> usize {
        x + self.0[0] * (y + self.0[1] * z)
    }

    /// The voxels at most `reach` away from one along each axis, including itself, x fastest.
    pub fn around(self, voxel: [usize; 3], reach: [usize; 3]) -> impl Iterator<Item = [usize; 3]> {
        let range = |axis: usize| {
            let (at, reach) = (voxel[axis], reach[axis]);
            at.saturating_sub(reach)..(at + reach + 1).min(self.0[axis])
        };
        let (x, y) = (range(0), range(1));
        let rows = range(2).flat_map(move |z| y.clone().map(move |y| (y, z)));
        rows.flat_map(move |(y, z)| x.clone().map(move |x| [x, y, z]))
    }

    /// Voxel `[x, y, z]` at a position in memory: the inverse of [`Shape3::offset`].
    #[inline]
    pub fn voxel(self, offset: usize) -> [usize; 3] {
        let [nx, ny, _] = self.0;
        [offset % nx, offset / nx % ny, offset / (nx * ny)]
    }

    /// Position in memory of the voxel nearest to a place, which is in voxels; `None` beyond the
    /// grid.
    #[inline]
    pub fn nearest(self, place: [f64; 3]) -> Option<usize> {
        let mut voxel = [0; 3];
        for axis in 0..3 {
            let index = place[axis] + 0.5;
            // Written so that NaN counts as outside. Extreme affines give such places.
            if !(0.0..self.0[axis] as f64).contains(&index) {
                return None;
            }
            // Converted via i32, which is much faster on the processor.
            voxel[axis] = index as i32 as usize;
        }
        Some(self.offset(voxel))
    }
}

/// A place in a voxel grid; whole numbers are voxel centres.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VoxelPoint(pub [f64; 3]);

/// A place in the world, mm, RAS+.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WorldPoint(pub [f64; 3]);

/// A voxel axis that runs along a world axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VoxelAxis {
    /// Position in an `[x, y, z]` triple of voxel indices.
    pub index: usize,
    /// Whether its indices grow against the world axis.
    pub is_reversed: bool,
}

/// What makes an affine unusable.
#[derive(Debug, Error, PartialEq)]
pub enum AffineError {
    /// An entry is NaN or infinite.
    #[error("the affine holds a number that is not finite; the header is damaged, export again")]
    NotFinite,
    /// The three axes do not span space.
    #[error(
        "the affine is singular (determinant {determinant:e}); three independent axes are needed"
    )]
    Singular {
        /// Determinant of the 3x3 part, mm^3.
        determinant: f64,
    },
}

/// Voxel index -> world mm (RAS+): the upper three rows of the homogeneous 4x4 matrix.
///
/// Always finite and invertible.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Affine {
    rows: [[f64; 4]; 3],
}

impl Affine {
    /// Checks that the matrix is finite and invertible.
    pub fn new(rows: [[f64; 4]; 3]) -> Result<Self, AffineError> {
        if rows.iter().flatten().any(|v| !v.is_finite()) {
            return Err(AffineError::NotFinite);
        }
        let affine = Self { rows };
        let determinant = affine.determinant();
        // 1e-9 mm^3 is a voxel of a thousandth of a millimetre. No scanner makes that.
        if !determinant.is_finite() || determinant.abs() < 1e-9 {
            return Err(AffineError::Singular { determinant });
        }
        Ok(affine)
    }

    /// A grid along the world axes with cubic voxels, its voxel `[0, 0, 0]` centred at `origin`.
    pub fn scaling(spacing_mm: f64, origin: WorldPoint) -> Result<Self, AffineError> {
        let o = origin.0;
        Self::new([
            [spacing_mm, 0.0, 0.0, o[0]],
            [0.0, spacing_mm, 0.0, o[1]],
            [0.0, 0.0, spacing_mm, o[2]],
        ])
    }

    /// The upper three rows of the homogeneous matrix.
    pub fn rows(&self) -> [[f64; 4]; 3] {
        self.rows
    }

    /// World place of a voxel place.
    #[inline]
    pub fn to_world(&self, VoxelPoint(v): VoxelPoint) -> WorldPoint {
        WorldPoint(self.rows.map(|r| r[0] * v[0] + r[1] * v[1] + r[2] * v[2] + r[3]))
    }

    /// Voxel edge lengths along the grid's own axes, mm.
    pub fn spacing_mm(&self) -> [f64; 3] {
        [0, 1, 2].map(|c| self.rows.iter().map(|r| r[c] * r[c]).sum::<f64>().sqrt())
    }

    /// Volume of one voxel, mm^3.
    pub fn voxel_volume_mm3(&self) -> f64 {
        self.determinant().abs()
    }

    /// Determinant of the 3x3 part: negative on left-handed grids.
    pub fn determinant(&self) -> f64 {
        let [a, b, c] = self.rows;
        a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0])
            + a[2] * (b[0] * c[1] - b[1] * c[0])
    }

    /// For each world axis x, y, z, the voxel axis that follows it most closely. Reading the voxels
    /// in this order gives RAS+ axes without resampling.
    ///
    /// Like nibabel's `as_closest_canonical`: the voxel axes choose in order, each the nearest of
    /// the remaining world axes.
    pub fn closest_axes(&self) -> [VoxelAxis; 3] {
        let mut chosen = [None; 3];
        for index in 0..3 {
            let along = |world: usize| self.rows[world][index];
            let left = (0..3).filter(|&world| chosen[world].is_none());
            // If several are equal, the first.
            let nearest = left.rev().max_by(|&a, &b| along(a).abs().total_cmp(&along(b).abs()));
            let world = nearest.expect("three axes choose among three");
            chosen[world] = Some(VoxelAxis { index, is_reversed: along(world) < 0.0 });
        }
        chosen.map(|axis| axis.expect("each world axis was chosen once"))
    }

    /// World -> voxel: the inverse map, itself an affine (from mm to voxel units).
    pub fn inverse(&self) -> Affine {
        let [a, b, c] = self.rows;
        let d = self.determinant();
        let m = [
            [
                (b[1] * c[2] - b[2] * c[1]) / d,
                (a[2] * c[1] - a[1] * c[2]) / d,
                (a[1] * b[2] - a[2] * b[1]) / d,
            ],
            [
                (b[2] * c[0] - b[0] * c[2]) / d,
                (a[0] * c[2] - a[2] * c[0]) / d,
                (a[2] * b[0] - a[0] * b[2]) / d,
            ],
            [
                (b[0] * c[1] - b[1] * c[0]) / d,
                (a[1] * c[0] - a[0] * c[1]) / d,
                (a[0] * b[1] - a[1] * b[0]) / d,
            ],
        ];
        let rows = m.map(|r| [r[0], r[1], r[2], -(r[0] * a[3] + r[1] * b[3] + r[2] * c[3])]);
        Affine { rows }
    }

    /// First `inner`, then `self`: `p -> self(inner(p))`.
    pub fn after(&self, inner: &Affine) -> Affine {
        let m = &inner.rows;
        let rows = self.rows.map(|r| {
            let mut out = [0, 1, 2, 3].map(|c| r[0] * m[0][c] + r[1] * m[1][c] + r[2] * m[2][c]);
            out[3] += r[3];
            out
        });
        Affine { rows }
    }

    /// The x below `n` for which `[x, y, z]` is mapped into the box between two corners, and at
    /// most two more on either side.
    pub fn row_within(&self, y: f64, z: f64, [low, high]: [[f64; 3]; 2], n: usize) -> Range<usize> {
        let start = self.apply([0.0, y, z]);
        let (mut first, mut last) = (0.0_f64, n as f64);

        for axis in 0..3 {
            let step = self.rows[axis][0];
            if step == 0.0 {
                if !(low[axis]..=high[axis]).contains(&start[axis]) {
                    return 0..0;
                }
                continue;
            }
            let [one, other] = [low, high].map(|corner| (corner[axis] - start[axis]) / step);
            first = first.max(one.min(other) - 1.0);
            last = last.min(one.max(other) + 2.0);
        }

        let first = (first as usize).min(n);
        first..(last as usize).clamp(first, n)
    }

    /// Applies the map to a plain triple, for maps between any two spaces.
    #[inline]
    pub fn apply(&self, v: [f64; 3]) -> [f64; 3] {
        self.to_world(VoxelPoint(v)).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oblique() -> Affine {
        Affine::new([[-1.9, 0.2, 0.1, 90.0], [0.15, 0.8, -0.4, -126.0], [0.1, 0.3, 1.1, -72.0]])
            .unwrap()
    }

    #[test]
    fn the_inverse_undoes_the_affine() {
        let there_and_back = oblique().inverse().after(&oblique());
        for (r, row) in there_and_back.rows().iter().enumerate() {
            for (c, value) in row.iter().enumerate() {
                let wanted = if r == c { 1.0 } else { 0.0 };
                assert!((value - wanted).abs() < 1e-12, "row {r} column {c}: {value}");
            }
        }
    }

    #[test]
    fn after_applies_the_inner_map_first() {
        let shift = Affine::scaling(2.0, WorldPoint([1.0, 2.0, 3.0])).unwrap();
        let p = [3.0, 5.0, 7.0];
        assert_eq!(oblique().after(&shift).apply(p), oblique().apply(shift.apply(p)));
    }

    #[test]
    fn offset_and_voxel_are_inverse_on_unequal_extents() {
        let shape = Shape3([5, 7, 11]);
        for offset in 0..shape.n_voxels() {
            assert_eq!(shape.offset(shape.voxel(offset)), offset);
        }
        assert_eq!(shape.offset([1, 2, 3]), 1 + 5 * (2 + 7 * 3));
    }

    #[test]
    fn a_row_within_a_box_lacks_nothing_and_holds_little_else() {
        let turned = |angle: f64| {
            let (s, c) = angle.sin_cos();
            Affine::new([[c, -s, 0.0, 3.0], [s, c, 0.1, -2.0], [0.0, 0.2, -1.1, 9.0]]).unwrap()
        };
        let corners = [[-0.5, -0.5, -0.5], [4.5, 6.5, 8.5]];
        let is_within = |place: [f64; 3]| {
            (0..3).all(|axis| (corners[0][axis]..=corners[1][axis]).contains(&place[axis]))
        };
        for affine in [0.0, 0.4, 1.6, 3.0].map(turned) {
            for (y, z) in (0..12).flat_map(|y| (0..12).map(move |z| (f64::from(y), f64::from(z)))) {
                let row = affine.row_within(y, z, corners, 20);
                let inside: Vec<usize> =
                    (0..20).filter(|&x| is_within(affine.apply([x as f64, y, z]))).collect();
                assert!(inside.iter().all(|x| row.contains(x)), "{row:?} {inside:?}");
                assert!(row.end <= 20 && row.len() <= inside.len() + 4, "{row:?} {inside:?}");
            }
        }
        let wild = Affine { rows: [[1e300, 1e300, f64::MAX, 0.0]; 3] };
        assert!(wild.row_within(1e9, 1e9, corners, 20).is_empty());
    }

    #[test]
    fn a_flat_or_nan_affine_is_refused() {
        let flat = [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]];
        assert!(matches!(Affine::new(flat), Err(AffineError::Singular { .. })));
        let mut nan = oblique().rows();
        nan[1][3] = f64::NAN;
        assert_eq!(Affine::new(nan), Err(AffineError::NotFinite));
    }

    #[test]
    fn spacing_and_volume_of_an_anisotropic_left_handed_grid() {
        let affine =
            Affine::new([[-2.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
                .unwrap();
        assert_eq!(affine.spacing_mm(), [2.0, 0.5, 3.0]);
        assert_eq!(affine.voxel_volume_mm3(), 3.0);
        assert!(affine.determinant() < 0.0);
    }

    #[test]
    fn voxel_axes_are_found_along_the_world_axes_that_they_follow() {
        let axis = |index, is_reversed| VoxelAxis { index, is_reversed };
        assert_eq!(oblique().closest_axes(), [axis(0, true), axis(1, false), axis(2, false)]);
        // Sagittal slices: voxel x runs to the back, voxel y up, voxel z to the left.
        let sagittal =
            Affine::new([[0.0, 0.1, -1.2, 80.0], [-0.9, 0.2, 0.0, 99.0], [0.2, 0.9, 0.1, -50.0]]);
        let found = sagittal.unwrap().closest_axes();
        assert_eq!(found, [axis(2, true), axis(0, true), axis(1, false)]);
        // At 45 degrees the first voxel axis takes the first world axis.
        let turned =
            Affine::new([[1.0, -1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]);
        let found = turned.unwrap().closest_axes();
        assert_eq!(found, [axis(0, false), axis(1, false), axis(2, false)]);
    }
}
