//! The intensities of a scan on a grid of about 1.6 mm: the evidence beside the tokens, whose cells
//! are 11 mm wide (ours; docs/quality/evidence.md).

use half::f16;

use super::{
    geometry::Shape3,
    morphology::{Grid, not},
    scoring::quantile,
    smoothing::smoothed_within,
    token::{Foreground, count_per_cell},
};

/// Voxels of the cube along each edge of a fine cell.
pub const VOXELS_PER_CELL: usize = 2;

/// Voxels of the brain that a foreground cell holds at least, of the eight that it has.
const MIN_BRAIN_VOXELS: u8 = 2;

/// Standard deviation of the smoothing, mm.
const SIGMA_MM: f64 = 1.0;

/// Depths are kept in this many steps per mm, up to 15.9 mm.
const STEPS_PER_MM: f64 = 16.0;

/// The intensities of a scan in the cells of its brain.
#[derive(Debug, Clone, PartialEq)]
pub struct FineVolume {
    /// The cells that hold brain, on a grid of [`VOXELS_PER_CELL`] voxels of the cube per cell.
    pub foreground: Foreground,
    /// For each cell its intensity, smoothed by 1 mm within the brain. 0 is the median of the scan,
    /// and 1 its upper quartile.
    pub values: Vec<f16>,
    /// For each cell the depth of its centre in the brain, in sixteenths of a mm, at most 255.
    pub depths: Vec<u8>,
    /// Edge of a cell, mm.
    pub cell_mm: f64,
}

impl FineVolume {
    /// Averages the intensities of a cube over its cells. `intensities`, `brain` and `beyond` are
    /// those of the voxels of the cube, whose edge has `side` voxels of `spacing_mm`. Cells that
    /// hold a voxel `beyond` the scanner's field of view are left out.
    ///
    /// Beyond the faces of the cube nothing is known. A brain that a face cuts has no rim there.
    pub fn of(
        intensities: &[f32],
        brain: &[bool],
        beyond: Option<&[bool]>,
        side: usize,
        spacing_mm: f64,
    ) -> Self {
        let shape = Shape3::cube(side / VOXELS_PER_CELL);
        let (means, inside) = cell_means(intensities, brain, side, shape);
        let cell_mm = spacing_mm * VOXELS_PER_CELL as f64;
        let smoothed = smoothed_within(&means, &inside, shape, [SIGMA_MM / cell_mm; 3]);
        let distances = Grid { shape, spacing: [cell_mm; 3] }.distance_to(&not(&inside));

        let n_beyond = beyond.map(|beyond| count_per_cell(beyond, side, shape));
        let is_cut = |cell: usize| n_beyond.as_ref().is_some_and(|n| n[cell] > 0);
        let is_inside = |&cell: &u32| inside[cell as usize] && !is_cut(cell as usize);
        let cells: Vec<u32> = (0..shape.n_voxels() as u32).filter(is_inside).collect();
        let values: Vec<f32> = cells.iter().map(|&cell| smoothed[cell as usize]).collect();
        let depth = |&cell: &u32| (distances[cell as usize] * STEPS_PER_MM).min(255.0) as u8;
        Self {
            depths: cells.iter().map(depth).collect(),
            values: standardised(&values).into_iter().map(bounded).collect(),
            foreground: Foreground { shape, cells },
            cell_mm,
        }
    }

    /// The depth of each cell in the brain, mm, at most 15.9.
    pub fn depths_mm(&self) -> impl Iterator<Item = f32> {
        self.depths.iter().map(|&depth| (f64::from(depth) / STEPS_PER_MM) as f32)
    }
}

/// The value in half precision, which ends at 65,504. Only a brain that is flat but for some spots
/// has values as large as the bound.
fn bounded(value: f32) -> f16 {
    const MOST: f32 = 1000.0;
    f16::from_f32(value.clamp(-MOST, MOST))
}

/// The mean over the brain's voxels of each cell, and whether the cell holds enough of them.
fn cell_means(
    intensities: &[f32],
    brain: &[bool],
    side: usize,
    shape: Shape3,
) -> (Vec<f32>, Vec<bool>) {
    let mut sums = vec![(0.0_f64, 0_u8); shape.n_voxels()];
    let rows = intensities.chunks_exact(side).zip(brain.chunks_exact(side));
    for (row, (values, inside)) in rows.enumerate() {
        let [y, z] = [row % side, row / side].map(|index| index / VOXELS_PER_CELL);
        // The last row of an odd side belongs to no cell.
        if y.max(z) >= shape.0[0] {
            continue;
        }
        let start = shape.offset([0, y, z]);
        let cells = &mut sums[start..start + shape.0[0]];
        let voxels = values.chunks_exact(VOXELS_PER_CELL).zip(inside.chunks_exact(VOXELS_PER_CELL));
        for ((sum, n), (values, inside)) in cells.iter_mut().zip(voxels) {
            for (&value, _) in values.iter().zip(inside).filter(|(_, inside)| **inside) {
                *sum += f64::from(value);
                *n += 1;
            }
        }
    }
    let mean = |&(sum, n): &(f64, u8)| if n > 0 { (sum / f64::from(n)) as f32 } else { 0.0 };
    (sums.iter().map(mean).collect(), sums.iter().map(|&(_, n)| n >= MIN_BRAIN_VOXELS).collect())
}

/// The values with their median at 0 and their upper quartile at 1; all 0 if these are equal.
pub fn standardised(values: &[f32]) -> Vec<f32> {
    let mut sorted = values.to_vec();
    if sorted.is_empty() {
        return sorted;
    }
    let [median, quartile] = [0.5, 0.75].map(|share| quantile(&mut sorted, share));
    let unit = quartile - median;
    let standard = |&value: &f32| ((f64::from(value) - median) / unit) as f32;
    if unit > 0.0 { values.iter().map(standard).collect() } else { vec![0.0; values.len()] }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cube of 8 voxels of 2 mm; the brain is all but the first plane along x.
    fn half_filled(value: impl Fn([usize; 3]) -> f32) -> FineVolume {
        let shape = Shape3::cube(8);
        let voxels = (0..shape.n_voxels()).map(|offset| shape.voxel(offset));
        let intensities: Vec<f32> = voxels.clone().map(value).collect();
        let brain: Vec<bool> = voxels.map(|voxel| voxel[0] >= 4).collect();
        FineVolume::of(&intensities, &brain, None, 8, 2.0)
    }

    #[test]
    fn a_cell_is_foreground_if_it_holds_brain_and_lies_as_deep_as_its_centre() {
        let fine = half_filled(|_| 1.0);
        assert_eq!(fine.foreground.shape, Shape3::cube(4));
        assert_eq!(fine.foreground.cells.len(), 2 * 4 * 4);
        // Cells are 4 mm wide: the next centre outside is one cell away, or two.
        let depths: Vec<f32> = fine.depths_mm().take(2).collect();
        assert_eq!(depths, [4.0, 8.0]);
        assert!(fine.values.iter().all(|value| value.to_f32() == 0.0), "nothing varies");
    }

    #[test]
    fn a_cell_that_the_field_of_view_cuts_is_left_out() {
        let beyond: Vec<bool> = (0..512).map(|o| Shape3::cube(8).voxel(o)[1] >= 5).collect();
        let cut = FineVolume::of(&[1.0; 512], &[true; 512], Some(&beyond), 8, 2.0);
        assert_eq!(cut.foreground.cells.len(), 4 * 2 * 4, "rows 0 and 1 of four");
        let sizes = [cut.values.len(), cut.depths.len()];
        assert_eq!(sizes, [cut.foreground.cells.len(); 2]);
    }

    #[test]
    fn what_lies_outside_the_brain_changes_nothing() {
        let within = |[x, y, z]: [usize; 3]| (x * y + z) as f32;
        let scan = half_filled(within);
        let bright = half_filled(|voxel| if voxel[0] < 4 { 900.0 } else { within(voxel) });
        assert_eq!(scan, bright);
        let brighter = half_filled(|voxel| 3.0 * within(voxel) + 2.0);
        for (one, other) in scan.values.iter().zip(&brighter.values) {
            assert!((one.to_f32() - other.to_f32()).abs() < 4e-3, "{one} {other}");
        }
    }

    #[test]
    fn a_flat_brain_with_a_bright_spot_stays_finite() {
        let spot = |[x, y, z]: [usize; 3]| match (x, y, z) {
            (6, 6, 6) => 1e30,
            (x, y, _) => 1.0 + 1e-6 * (x * y) as f32,
        };
        let fine = half_filled(spot);
        assert!(fine.values.iter().all(|value| value.to_f32().abs() <= 1000.0));
    }

    #[test]
    fn standard_values_have_their_median_at_0_and_their_upper_quartile_at_1() {
        assert_eq!(standardised(&[3.0, 1.0, 2.0, 5.0, 4.0]), [0.0, -2.0, -1.0, 2.0, 1.0]);
        assert_eq!(standardised(&[7.0, 7.0]), [0.0, 0.0]);
        assert_eq!(standardised(&[]), [0.0; 0]);
    }
}
