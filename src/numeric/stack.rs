//! Joins slices to one grid. A scanner exports each slice with its own place in space.
//!
//! Places are in the coordinates of DICOM (PS3.3, C.7.6.2): LPS+, x grows to the patient's left, y
//! to the back, z up. The grid's affine is in RAS+ as everywhere else, so that x and y change their
//! sign. Voxel axes are column, row counted from the bottom, and slice along the normal `row x
//! column`, as in dcm2niix.

use std::fmt;

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
    /// Places of an even grid have no slice.
    #[error(
        "gaps of {smallest_mm:.3} to {largest_mm:.3} mm between neighbouring slices: {missing}"
    )]
    Missing {
        /// Smallest distance of neighbours.
        smallest_mm: f64,
        /// Largest distance of neighbours.
        largest_mm: f64,
        /// The empty places.
        missing: Missing,
    },
    /// The distances differ, and no even grid with empty places explains it.
    #[error(
        "distances of {smallest_mm:.3} to {largest_mm:.3} mm between neighbouring slices, which \
         lie up to {deviation_mm:.3} mm beside an even grid"
    )]
    Uneven {
        /// Smallest distance of neighbours.
        smallest_mm: f64,
        /// Largest distance of neighbours.
        largest_mm: f64,
        /// Largest distance of a slice from its place on the even grid that fits best.
        deviation_mm: f64,
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

/// The empty places of an even grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Missing {
    /// Empty places.
    pub n: usize,
    /// All places of the grid.
    pub of: usize,
    /// For each gap, how many slices lie below it.
    pub after: Vec<usize>,
    /// Whether nothing else explains the gaps. Otherwise positions may also have been rounded.
    pub is_sure: bool,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is = if self.n == 1 { "is" } else { "are" };
        write!(f, "{} of {} {is} missing, after slice ", self.n, self.of)?;
        let shown: Vec<String> = self.after.iter().take(3).map(usize::to_string).collect();
        let more = if self.after.len() > 3 { " and others" } else { "" };
        write!(f, "{}{more} in the order of their places", shown.join(", "))?;
        let unless = ", unless the exporter rounded the positions";
        f.write_str(if self.is_sure { "" } else { unless })
    }
}

/// Largest accepted distance of a slice from its place on the even grid that fits best, as a share
/// of the grid's step. With one or two slices missing it is at least 0.18 (simulated, stacks of 4
/// to 200 slices).
const EVEN: f64 = 0.1;
/// A slice farther than this from the places of a grid is not on it, as a share of its step.
const OFF_GRID: f64 = 0.2;
/// Directions with a smaller cosine differ.
const SAME_DIRECTION: f64 = 0.9999;
/// Accepted difference of two sizes of a pixel, as a share. Headers state 0.4296875 as 0.429.
const SAME_SPACING: f64 = 2e-3;
/// Slices nearer to each other are at the same place, mm. No scanner makes thinner ones.
const SAME_PLACE_MM: f64 = 0.05;
/// Accepted drift across the whole stack, as a share of a voxel's in-plane size.
const SHEARED: f64 = 0.5;

/// How far rounded directions may be from unit vectors at right angles.
const ROUNDED_DIRECTION: f64 = 0.02;

fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

fn cross(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

fn minus(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

/// Directions of rows and columns, of which a header states rounded values, as unit vectors at
/// right angles. `None` if they are farther from that than rounding explains.
pub fn directions(along_row: [f64; 3], along_column: [f64; 3]) -> Option<[[f64; 3]; 2]> {
    let unit = |v: [f64; 3]| v.map(|x| x / dot(v, v).sqrt());
    let is_near_unit = |v: [f64; 3]| (dot(v, v).sqrt() - 1.0).abs() <= ROUNDED_DIRECTION;
    let is_right = dot(along_row, along_column).abs() <= ROUNDED_DIRECTION;
    if !is_right || !is_near_unit(along_row) || !is_near_unit(along_column) {
        return None;
    }

    let row = unit(along_row);
    let along = dot(row, along_column);
    let column = std::array::from_fn(|axis| along_column[axis] - along * row[axis]);
    Some([row, unit(column)])
}

impl Plane {
    /// Whether two slices could belong to one stack: same directions, same size of pixels.
    pub fn is_parallel_to(&self, other: &Self) -> bool {
        let is_near = |a: f64, b: f64| (a - b).abs() <= SAME_SPACING * b.abs();
        self.has_directions_of(other)
            && is_near(self.spacing_mm[0], other.spacing_mm[0])
            && is_near(self.spacing_mm[1], other.spacing_mm[1])
    }

    /// Whether rows and columns of two slices run in the same directions.
    pub fn has_directions_of(&self, other: &Self) -> bool {
        dot(self.along_row, other.along_row) >= SAME_DIRECTION
            && dot(self.along_column, other.along_column) >= SAME_DIRECTION
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
/// rows. `nominal_mm`: distances of slices that the header states, which tell rounded positions
/// from missing slices.
///
/// The affine goes through the first and the last slice.
///
/// # Errors
/// If they do not: what is wrong with them.
pub fn stack(planes: &[Plane], n_rows: usize, nominal_mm: &[f64]) -> Result<Stack, StackError> {
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
    let heights: Vec<f64> = order.iter().map(|&index| height[index]).collect();
    check_places(&heights)?;
    check_distances(&heights, rounding_mm(planes, normal), nominal_mm)?;

    let lowest = planes[order[0]];
    let highest = planes[order[order.len() - 1]];
    let step_mm = dot(minus(highest.origin, lowest.origin), normal) / (order.len() - 1) as f64;
    let shift_mm = planes.iter().map(|plane| off_line(plane, &lowest, normal)).fold(0.0, f64::max);
    if shift_mm > SHEARED * first.spacing_mm[0].min(first.spacing_mm[1]) {
        return Err(StackError::Sheared { shift_mm });
    }
    Ok(Stack { affine: affine(&lowest, normal, step_mm, n_rows)?, order })
}

/// Groups parallel slices that lie at one place, in the order along their normal. Slices beside
/// each other at one height are at different places.
pub fn places(planes: &[Plane]) -> Vec<Vec<usize>> {
    let Some(first) = planes.first() else { return Vec::new() };
    let normal = cross(first.along_row, first.along_column);
    let along = |axis: [f64; 3]| move |index: usize| dot(planes[index].origin, axis);
    runs((0..planes.len()).collect(), along(normal))
        .into_iter()
        .flat_map(|level| runs(level, along(first.along_row)))
        .flat_map(|row| runs(row, along(first.along_column)))
        .collect()
}

/// Orders by value, and begins a new group where two neighbours are at different places.
fn runs(mut indices: Vec<usize>, value: impl Fn(usize) -> f64) -> Vec<Vec<usize>> {
    indices.sort_by(|&a, &b| value(a).total_cmp(&value(b)));
    // A distance that is no number separates, too.
    let is_same = |&a: &usize, &b: &usize| value(b) - value(a) < SAME_PLACE_MM;
    indices.chunk_by(is_same).map(<[usize]>::to_vec).collect()
}

/// Separates the slices of the largest even grid from those that are not on it: beside its places,
/// or shifted sideways. `None` if there is no such grid without gaps, or if it has all slices.
///
/// A slice at a place of the grid is never separated. Gaps before it are missing slices.
pub fn off_grid(
    planes: &[Plane],
    n_rows: usize,
    nominal_mm: &[f64],
) -> Option<(Vec<usize>, Vec<usize>)> {
    let first = planes.first()?;
    let normal = cross(first.along_row, first.along_column);
    let middle = |axis: [f64; 3]| median(planes.iter().map(|plane| dot(plane.origin, axis)));
    let sideways = [first.along_row, first.along_column].map(|axis| (axis, middle(axis)));
    let most = SHEARED * first.spacing_mm[0].min(first.spacing_mm[1]);
    let is_above = |plane: &Plane| {
        sideways.iter().all(|(axis, middle)| (dot(plane.origin, *axis) - middle).abs() <= most)
    };

    let mut heights: Vec<f64> =
        planes.iter().filter(|plane| is_above(plane)).map(|p| dot(p.origin, normal)).collect();
    heights.sort_by(f64::total_cmp);
    heights.dedup_by(|b, a| *b - *a < SAME_PLACE_MM);
    let Run { start, step, is_even } = longest_run(&heights)?;

    // Positions may be whole millimetres by chance. Rounding shows in the run itself.
    let rounding_mm = if is_even { 0.0 } else { rounding_mm(planes, normal) };
    let allowed = OFF_GRID + rounding_mm / step;
    let is_on = |plane: &Plane| {
        let place = (dot(plane.origin, normal) - start) / step;
        is_above(plane) && (place - place.round()).abs() <= allowed
    };
    let (on, off): (Vec<usize>, Vec<usize>) =
        (0..planes.len()).partition(|&index| is_on(&planes[index]));
    let grid: Vec<Plane> = on.iter().map(|&index| planes[index]).collect();
    (!off.is_empty() && stack(&grid, n_rows, nominal_mm).is_ok()).then_some((on, off))
}

/// Places at nearly equal distances.
struct Run {
    start: f64,
    step: f64,
    /// Whether the distances are the same to a thousandth.
    is_even: bool,
}

/// The longest run of places at distances near the median one.
fn longest_run(heights: &[f64]) -> Option<Run> {
    let usual = median(heights.windows(2).map(|pair| pair[1] - pair[0]));
    let is_usual = |a: &f64, b: &f64| (b - a - usual).abs() <= 0.25 * usual;
    let run = heights.chunk_by(is_usual).max_by_key(|run| run.len())?;
    let step = (run[run.len() - 1] - run[0]) / (run.len() - 1) as f64;
    let is_even = run.windows(2).all(|pair| (pair[1] - pair[0] - step).abs() <= 1e-3 * step);
    (run.len() >= 3 && step > 0.0).then_some(Run { start: run[0], step, is_even })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// How far rounding may have moved a slice along the normal, mm. The exporter rounded a coordinate
/// if it is whole millimetres or tenths in all slices. The tenth above one half is for the fitted
/// line, which the rounded positions move, too.
fn rounding_mm(planes: &[Plane], normal: [f64; 3]) -> f64 {
    let unit_mm = |axis: usize| {
        let is_multiple = |unit: &f64| {
            let mut counts = planes.iter().map(|plane| plane.origin[axis] / unit);
            counts.all(|count| (count - count.round()).abs() < 1e-6)
        };
        [1.0, 0.1].into_iter().find(is_multiple).unwrap_or(0.0)
    };
    (0..3).map(|axis| 0.6 * unit_mm(axis) * normal[axis].abs()).sum()
}

/// Checks that at least three ascending heights are those of an even grid.
///
/// The drift over the stack decides, not the single distance: rounding changes a distance by much
/// more than it moves a slice, and a missing slice moves all later ones by a whole step.
fn check_distances(
    heights: &[f64],
    rounding_mm: f64,
    nominal_mm: &[f64],
) -> Result<(), StackError> {
    let n = heights.len();
    let step_mm = (heights[n - 1] - heights[0]) / (n - 1) as f64;
    let counted: Vec<f64> = (0..n).map(|place| place as f64).collect();
    let deviation_mm = deviation(&counted, heights);
    if deviation_mm <= EVEN * step_mm {
        return Ok(());
    }

    let is_rounded = deviation_mm <= EVEN * step_mm + rounding_mm;
    let gaps = heights.windows(2).map(|pair| pair[1] - pair[0]);
    let (smallest_mm, largest_mm) =
        gaps.fold((f64::INFINITY, 0.0_f64), |(low, high), gap| (low.min(gap), high.max(gap)));
    match missing(heights, rounding_mm) {
        None if is_rounded => Ok(()),
        None => Err(StackError::Uneven { smallest_mm, largest_mm, deviation_mm }),
        Some((mut missing, dense_mm)) => {
            // Both a wider grid whose positions were rounded and a denser one with empty places
            // can explain the distances. The header decides.
            let states = |step: f64, other: f64| {
                nominal_mm.iter().any(|nominal| {
                    let off = (nominal - step).abs();
                    off <= 0.02 * step && off < (nominal - other).abs()
                })
            };
            if is_rounded && states(step_mm, dense_mm) {
                return Ok(());
            }
            missing.is_sure = !is_rounded || states(dense_mm, step_mm);
            Err(StackError::Missing { smallest_mm, largest_mm, missing })
        }
    }
}

/// The empty places of the grid with the usual distance, or with the smallest one, and its step,
/// mm. `None` if neither grid has the slices at its places, or if it has no empty ones.
fn missing(heights: &[f64], rounding_mm: f64) -> Option<(Missing, f64)> {
    let gaps: Vec<f64> = heights.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let smallest = gaps.iter().copied().fold(f64::INFINITY, f64::min);
    let of_step = |step: f64| {
        let steps: Vec<f64> = gaps.iter().map(|gap| (gap / step).round().max(1.0)).collect();
        let mut places = vec![0.0];
        for step in &steps {
            places.push(places[places.len() - 1] + step);
        }

        let last = places[places.len() - 1];
        let allowed = (EVEN * step + rounding_mm).min(0.25 * step);
        let of = (last as usize).saturating_add(1);
        let fits = of > heights.len() && deviation(&places, heights) <= allowed;
        let is_gap = |(below, steps): (usize, &f64)| (*steps > 1.0).then_some(below + 1);
        let after = steps.iter().enumerate().filter_map(is_gap).collect();
        let missing = Missing { n: of - heights.len().min(of), of, after, is_sure: true };
        fits.then(|| (missing, (heights[heights.len() - 1] - heights[0]) / last))
    };
    [median(gaps.iter().copied()), smallest].into_iter().find_map(of_step)
}

/// Largest distance of the points from the line that fits them best (least squares).
fn deviation(x: &[f64], y: &[f64]) -> f64 {
    let n = x.len() as f64;
    let (mean_x, mean_y) = (x.iter().sum::<f64>() / n, y.iter().sum::<f64>() / n);
    let covered: f64 = x.iter().map(|x| (x - mean_x) * (x - mean_x)).sum();
    let shared: f64 = x.iter().zip(y).map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let slope = shared / covered;
    let off = x.iter().zip(y).map(|(x, y)| (y - mean_y - slope * (x - mean_x)).abs());
    // `max` would lose a NaN.
    off.fold(0.0, |worst: f64, off| if worst.is_nan() || off <= worst { worst } else { off })
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
        let stack = stack(&shuffled, 11, &[]).unwrap();
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
        let error = |order: &[usize]| stack(&planes(order), 11, &[]).unwrap_err();
        assert_eq!(
            error(&[0, 1, 2, 4, 5]).to_string(),
            "gaps of 1.500 to 3.000 mm between neighbouring slices: 1 of 6 is missing, after slice \
             3 in the order of their places"
        );
        assert_eq!(error(&[0, 1, 2, 2, 3]), StackError::Doubled { n: 1 });
        assert_eq!(error(&[0, 1, 2, 0, 1, 2]), StackError::Repeated { times: 2, n: 3 });
        assert_eq!(error(&[0, 1]), StackError::TooFew { n: 2 });
        assert_eq!(error(&[]), StackError::TooFew { n: 0 });
    }

    /// Axial slices at these heights.
    fn at(heights: &[f64]) -> Vec<Plane> {
        let plane = |&height: &f64| Plane {
            origin: [-90.27, -120.0, height],
            along_row: [1.0, 0.0, 0.0],
            along_column: [0.0, 1.0, 0.0],
            spacing_mm: [1.0, 1.0],
        };
        heights.iter().map(plane).collect()
    }

    fn steps(n: usize, step: f64) -> Vec<f64> {
        (0..n).map(|place| place as f64 * step).collect()
    }

    #[test]
    fn rounded_and_jittered_positions_are_even_and_missing_slices_are_counted() {
        let rounded = |step: f64, unit: f64| -> Vec<f64> {
            steps(90, step).iter().map(|height| (height / unit).round() * unit).collect()
        };
        let without = |gone: &[usize], heights: Vec<f64>| -> Vec<f64> {
            let all = heights.into_iter().enumerate();
            all.filter(|(place, _)| !gone.contains(place)).map(|(_, height)| height).collect()
        };
        let judge = |heights: &[f64], nominal: &[f64]| match stack(&at(heights), 11, nominal) {
            Ok(_) => "even".to_owned(),
            Err(StackError::Missing { missing, .. }) => {
                format!("{}/{}{}", missing.n, missing.of, if missing.is_sure { "" } else { "?" })
            }
            Err(error) => format!("{error}"),
        };

        // Tenths of a millimetre.
        assert_eq!(judge(&rounded(0.55, 0.1), &[]), "even");
        assert_eq!(judge(&rounded(1.57, 0.1), &[]), "even");
        assert_eq!(judge(&without(&[44], rounded(0.55, 0.1)), &[]), "1/90");
        // Whole millimetres: the header tells a step of 1.2 from gaps in a step of 1.
        assert_eq!(judge(&rounded(1.2, 1.0), &[1.2]), "even");
        assert_eq!(judge(&rounded(1.2, 1.0), &[]), "18/108?");
        assert_eq!(judge(&without(&[44], rounded(1.0, 1.0)), &[1.0]), "1/90");
        assert_eq!(judge(&without(&[44], rounded(1.0, 1.0)), &[]), "1/90?");
        assert_eq!(judge(&without(&[1, 88], rounded(2.0, 1.0)), &[]), "2/90");
        // Every third slice.
        let third: Vec<usize> = (0..29).map(|k| 3 * k + 2).collect();
        assert_eq!(judge(&without(&third, steps(90, 0.937)), &[]), "29/90");
        // Each slice up to 8 % of a step beside its place.
        let jitter = |k: usize| 0.16 * ((k * 7919 % 101) as f64 / 100.0 - 0.5);
        let jittered: Vec<f64> = (0..90).map(|k| k as f64 + jitter(k) + 0.003).collect();
        assert_eq!(judge(&jittered, &[]), "even");
        // A step that grows is no grid, and nothing is missing.
        let growing: Vec<f64> =
            (0..30).map(|k| f64::from(k) * (1.0 + 0.01 * f64::from(k))).collect();
        assert!(judge(&growing, &[]).starts_with("distances of 1.010 to 1.570 mm"));
    }

    #[test]
    fn slices_beside_the_grid_are_separated_and_those_behind_a_gap_are_not() {
        let split = |heights: &[f64]| off_grid(&at(heights), 11, &[]).map(|(_, off)| off);
        let with = |more: &[f64]| [&steps(20, 1.5), more].concat();
        assert_eq!(split(&with(&[-20.2])), Some(vec![20]), "an appended reference");
        assert_eq!(split(&with(&[31.0, 12.7])), Some(vec![20, 21]));
        let whole = [&steps(20, 2.0)[..], &[47.0]].concat();
        assert_eq!(split(&whole), Some(vec![20]), "whole millimetres that are not rounded");
        assert_eq!(split(&with(&[])), None);
        assert_eq!(split(&with(&[33.0, 34.5])), None, "three slices are missing");
        // A slice at a place of the stack, but 40 mm to the side.
        let mut shifted = at(&with(&[15.0]));
        shifted[20].origin[0] += 40.0;
        assert_eq!(off_grid(&shifted, 11, &[]).map(|(_, off)| off), Some(vec![20]));
        assert_eq!(places(&shifted).len(), 21);
    }

    #[test]
    fn what_lies_nearer_than_any_scanner_slices_is_at_one_place() {
        let found = places(&at(&[0.0, 2.0, 0.03, 1.0, 2.0, f64::NAN]));
        assert_eq!(found, [vec![0, 2], vec![3], vec![1, 4], vec![5]]);
    }

    #[test]
    fn what_is_no_grid_is_refused() {
        let with = |change: fn(&mut Plane)| {
            let mut planes = planes(&[0, 1, 2, 3]);
            change(&mut planes[3]);
            stack(&planes, 11, &[]).unwrap_err()
        };
        assert_eq!(with(|p| p.origin[1] = f64::NAN), StackError::NoNumber);
        assert_eq!(with(|p| p.spacing_mm[0] = 0.0), StackError::NoNumber);
        assert_eq!(with(|p| p.along_row = [0.0; 3]), StackError::Askew);
        assert_eq!(with(|p| p.along_row = p.along_row.map(|v| -v)), StackError::Mixed);
        assert_eq!(with(|p| p.spacing_mm[1] = 0.8), StackError::Mixed);
        assert!(matches!(with(|p| p.origin[2] += 3.0), StackError::Sheared { .. }));
    }
}
