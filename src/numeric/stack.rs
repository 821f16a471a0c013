//! Joins slices to one grid. A scanner exports each slice with its own place in space.
//!
//! Places are in the coordinates of DICOM (PS3.3, C.7.6.2): LPS+, x grows to the patient's left, y
//! to the back, z up. The grid's affine is in RAS+ as everywhere else, so that x and y change their
//! sign. Voxel axes are column, row counted from the bottom, and slice along the normal `row x
//! column`, as in dcm2niix.

use thiserror::Error;

use super::geometry::{Affine, AffineError};

/// The place of one slice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plane {
    /// Centre of the first pixel, LPS mm.
    pub origin: [f64; 3],
    /// Direction in which the column index grows along a row, of unit length.
    pub along_row: [f64; 3],
    /// Direction in which the row index grows along a column, of unit length.
    pub along_column: [f64; 3],
    /// Distance between neighbours along a row and along a column, mm.
    pub spacing_mm: [f64; 2],
}

/// Slices in order, on one grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Stack {
    /// Positions in the list of planes, in the order of the third voxel axis.
    pub order: Vec<usize>,
    /// Voxel `[column, n_rows - 1 - row, slice]` -> world, RAS+ mm.
    pub affine: Affine,
}

/// Why slices do not make a volume.
#[derive(Debug, PartialEq, Error)]
pub enum StackError {
    /// Fewer than three different places.
    #[error("{n} slices")]
    TooFew {
        /// Different places.
        n: usize,
    },
    /// A number is NaN, infinite, or a spacing not above 0.
    #[error("a slice position, direction or pixel spacing that is no usable number")]
    NoNumber,
    /// Row and column directions are not two perpendicular unit vectors.
    #[error("row and column directions that are not of length 1 and at right angles")]
    Askew,
    /// Slices differ in direction or in the size of their pixels.
    #[error("slices that differ in direction or pixel spacing")]
    Mixed,
    /// Every place has the same number of images, more than one.
    #[error("{times} images at each of {n} places")]
    Repeated {
        /// Images at each place.
        times: usize,
        /// Places.
        n: usize,
    },
    /// Some places have more images than others.
    #[error("{n} slices at a place where another one lies")]
    Doubled {
        /// Surplus slices.
        n: usize,
    },
    /// A slice is missing, or distances differ.
    #[error("gaps of {smallest_mm:.3} to {largest_mm:.3} mm between neighbouring slices")]
    Uneven {
        /// Smallest distance of neighbours.
        smallest_mm: f64,
        /// Largest distance of neighbours.
        largest_mm: f64,
    },
    /// The line through the slices is not along their normal.
    #[error("slices shifted by {shift_mm:.3} mm against each other")]
    Sheared {
        /// Largest distance from the line through the first slice along the normal.
        shift_mm: f64,
    },
    /// The affine of the grid is unusable.
    #[error(transparent)]
    Grid(#[from] AffineError),
}

/// Largest accepted deviation from equal distances, as a share of the distance. Rounding in the
/// header explains it: some scanners write positions with one decimal. A missing slice deviates by
/// a whole distance.
const UNEVEN: f64 = 0.05;
/// Directions with a smaller cosine differ.
const SAME_DIRECTION: f64 = 0.9999;
/// Slices nearer to each other are at the same place, mm. No scanner makes thinner ones.
const SAME_PLACE_MM: f64 = 0.01;
/// Accepted drift across the whole stack, as a share of a voxel's in-plane size.
const SHEARED: f64 = 0.5;

fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

fn cross(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

fn minus(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

impl Plane {
    /// Whether two slices could belong to one stack.
    pub fn is_parallel_to(&self, other: &Self) -> bool {
        let is_near = |a: f64, b: f64| (a - b).abs() <= 1e-3 * b.abs();
        dot(self.along_row, other.along_row) >= SAME_DIRECTION
            && dot(self.along_column, other.along_column) >= SAME_DIRECTION
            && is_near(self.spacing_mm[0], other.spacing_mm[0])
            && is_near(self.spacing_mm[1], other.spacing_mm[1])
    }

    fn check(&self) -> Result<(), StackError> {
        let numbers = self.origin.iter().chain(&self.along_row).chain(&self.along_column);
        let are_finite = numbers.chain(&self.spacing_mm).all(|v| v.is_finite());
        if !are_finite || self.spacing_mm.iter().any(|&spacing| spacing <= 0.0) {
            return Err(StackError::NoNumber);
        }
        let is_unit = |v: [f64; 3]| (dot(v, v) - 1.0).abs() < 1e-2;
        let is_rotation = is_unit(self.along_row)
            && is_unit(self.along_column)
            && dot(self.along_row, self.along_column).abs() < 1e-2;
        if is_rotation { Ok(()) } else { Err(StackError::Askew) }
    }
}

/// Orders slices along their common normal and checks that they make an even grid with `n_rows`
/// rows.
///
/// # Errors
/// If they do not: what is wrong with them.
pub fn stack(planes: &[Plane], n_rows: usize) -> Result<Stack, StackError> {
    let Some(first) = planes.first() else { return Err(StackError::TooFew { n: 0 }) };
    for plane in planes {
        plane.check()?;
        if !plane.is_parallel_to(first) {
            return Err(StackError::Mixed);
        }
    }

    let normal = cross(first.along_row, first.along_column);
    let height: Vec<f64> = planes.iter().map(|plane| dot(plane.origin, normal)).collect();
    let mut order: Vec<usize> = (0..planes.len()).collect();
    order.sort_by(|&a, &b| height[a].total_cmp(&height[b]));
    check_places(&order.iter().map(|&index| height[index]).collect::<Vec<_>>())?;

    let steps = || order.windows(2).map(|pair| height[pair[1]] - height[pair[0]]);
    let smallest_mm = steps().fold(f64::INFINITY, f64::min);
    let largest_mm = steps().fold(0.0, f64::max);
    let lowest = planes[order[0]];
    let highest = planes[order[order.len() - 1]];
    let step_mm = dot(minus(highest.origin, lowest.origin), normal) / (order.len() - 1) as f64;
    if largest_mm - step_mm > UNEVEN * step_mm || step_mm - smallest_mm > UNEVEN * step_mm {
        return Err(StackError::Uneven { smallest_mm, largest_mm });
    }

    let shift_mm = planes.iter().map(|plane| off_line(plane, &lowest, normal)).fold(0.0, f64::max);
    if shift_mm > SHEARED * first.spacing_mm[0].min(first.spacing_mm[1]) {
        return Err(StackError::Sheared { shift_mm });
    }
    Ok(Stack { affine: affine(&lowest, normal, step_mm, n_rows)?, order })
}

/// Checks that no two of the ascending heights are the same, and that there are at least three.
fn check_places(heights: &[f64]) -> Result<(), StackError> {
    let mut times = vec![1_usize];
    for pair in heights.windows(2) {
        if pair[1] - pair[0] < SAME_PLACE_MM {
            *times.last_mut().expect("it starts with one") += 1;
        } else {
            times.push(1);
        }
    }

    let (n, most) = (times.len(), times[0]);
    if times.iter().any(|&other| other != most) {
        return Err(StackError::Doubled { n: heights.len() - n });
    }
    if most > 1 {
        return Err(StackError::Repeated { times: most, n });
    }
    if n < 3 { Err(StackError::TooFew { n }) } else { Ok(()) }
}

/// Distance of a slice's first pixel from the line along the normal through that of the lowest
/// slice.
fn off_line(plane: &Plane, lowest: &Plane, normal: [f64; 3]) -> f64 {
    let way = minus(plane.origin, lowest.origin);
    let along = dot(way, normal);
    let off: [f64; 3] = std::array::from_fn(|axis| way[axis] - along * normal[axis]);
    dot(off, off).sqrt()
}

fn affine(
    lowest: &Plane,
    normal: [f64; 3],
    step_mm: f64,
    n_rows: usize,
) -> Result<Affine, AffineError> {
    let [along_row, along_column] = lowest.spacing_mm;
    let to_last_row = (n_rows.max(1) - 1) as f64 * along_column;
    let to_ras = [-1.0, -1.0, 1.0];
    Affine::new(std::array::from_fn(|axis| {
        let sign = to_ras[axis];
        [
            sign * lowest.along_row[axis] * along_row,
            -sign * lowest.along_column[axis] * along_column,
            sign * normal[axis] * step_mm,
            sign * (lowest.origin[axis] + lowest.along_column[axis] * to_last_row),
        ]
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::geometry::{VoxelPoint, WorldPoint};

    /// Oblique, with unequal spacings, in the order given.
    fn planes(order: &[usize]) -> Vec<Plane> {
        let (sin, cos) = 0.3_f64.sin_cos();
        let along_row = [0.0, cos, sin];
        let along_column = [0.0, sin, -cos];
        // row x column points to -x, the patient's right.
        let place = |&k: &usize| [80.0 - 1.5 * k as f64, -90.0, 70.0];
        let plane = |k| Plane { origin: place(k), along_row, along_column, spacing_mm: [0.5, 0.7] };
        order.iter().map(plane).collect()
    }

    #[test]
    fn shuffled_slices_are_ordered_and_every_pixel_keeps_its_place() {
        let shuffled = planes(&[3, 0, 4, 1, 2]);
        let stack = stack(&shuffled, 11).unwrap();
        assert_eq!(stack.order, [1, 3, 4, 0, 2]);
        // The pixel in row 2 and column 3 of slice 4, by the standard's equation C.7.6.2.1-1.
        let Plane { origin, along_row, along_column, .. } = shuffled[2];
        let lps: [f64; 3] = std::array::from_fn(|axis| {
            origin[axis] + 0.5 * 3.0 * along_row[axis] + 0.7 * 2.0 * along_column[axis]
        });
        let WorldPoint(ras) = stack.affine.to_world(VoxelPoint([3.0, 8.0, 4.0]));
        for (axis, sign) in [-1.0, -1.0, 1.0].into_iter().enumerate() {
            assert!((ras[axis] - sign * lps[axis]).abs() < 1e-12, "{ras:?} {lps:?}");
        }
    }

    #[test]
    fn gaps_and_doubles_are_told_apart() {
        let error = |order: &[usize]| stack(&planes(order), 11).unwrap_err();
        let uneven = StackError::Uneven { smallest_mm: 1.5, largest_mm: 3.0 };
        assert_eq!(error(&[0, 1, 2, 4, 5]).to_string(), uneven.to_string());
        assert_eq!(error(&[0, 1, 2, 2, 3]), StackError::Doubled { n: 1 });
        assert_eq!(error(&[0, 1, 2, 0, 1, 2]), StackError::Repeated { times: 2, n: 3 });
        assert_eq!(error(&[0, 1]), StackError::TooFew { n: 2 });
        assert_eq!(error(&[]), StackError::TooFew { n: 0 });
    }

    #[test]
    fn positions_rounded_to_a_tenth_of_a_millimetre_are_even() {
        let mut rounded = planes(&[0, 1, 2, 3, 4, 5, 6]);
        for (k, plane) in rounded.iter_mut().enumerate() {
            plane.origin[0] = (10.0 * (80.0 - 1.57 * k as f64)).round() / 10.0;
        }
        assert!(stack(&rounded, 11).is_ok());
    }

    #[test]
    fn what_is_no_grid_is_refused() {
        let with = |change: fn(&mut Plane)| {
            let mut planes = planes(&[0, 1, 2, 3]);
            change(&mut planes[3]);
            stack(&planes, 11).unwrap_err()
        };
        assert_eq!(with(|p| p.origin[1] = f64::NAN), StackError::NoNumber);
        assert_eq!(with(|p| p.spacing_mm[0] = 0.0), StackError::NoNumber);
        assert_eq!(with(|p| p.along_row = [0.0; 3]), StackError::Askew);
        assert_eq!(with(|p| p.along_row = p.along_row.map(|v| -v)), StackError::Mixed);
        assert_eq!(with(|p| p.spacing_mm[1] = 0.8), StackError::Mixed);
        assert!(matches!(with(|p| p.origin[2] += 3.0), StackError::Sheared { .. }));
    }
}
