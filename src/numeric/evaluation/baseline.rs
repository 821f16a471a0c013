//! Simple maps to hold an anomaly map against: what a scan shows without any comparison of
//! features.

use half::f16;
use rayon::prelude::*;

use crate::numeric::{
    fine::FineVolume,
    scoring::quantile,
    smoothing::smoothed_within,
    volume::{RawMask, RawVolume},
};

/// Standard deviation of the Gaussian that smooths the brightness, mm.
pub const SIGMA_MM: f64 = 1.0;

/// The scan's intensity, smoothed inside the brain; 0 outside. `brain` is on the scan's grid.
pub fn brightness(scan: &RawVolume, brain: &RawMask) -> Vec<f32> {
    let sigmas = scan.affine.spacing_mm().map(|spacing| SIGMA_MM / spacing);
    smoothed_within(&scan.voxels, &brain.inside, scan.shape, sigmas)
}

/// Fewest other scans whose median says what is usual at a place.
pub const MIN_OTHERS: usize = 2;

/// For each scan of a window, how far its standardised intensity is from the median of the other
/// scans at the same place: a value, 0 or above, per foreground cell. It is 0 where fewer than
/// [`MIN_OTHERS`] other scans have the cell.
///
/// # Panics
/// If the grids of the volumes differ.
pub fn deviations(window: &[FineVolume]) -> Vec<Vec<f32>> {
    let grids: Vec<Vec<f32>> = window.iter().map(dense).collect();
    assert!(grids.windows(2).all(|pair| pair[0].len() == pair[1].len()), "one grid for all scans");

    let of_scan = |(own, volume): (usize, &FineVolume)| -> Vec<f32> {
        let cells = volume.foreground.cells.par_iter().zip(&volume.values);
        let deviation = |(&cell, value): (&u32, &f16)| {
            let others = grids.iter().enumerate().filter(|(scan, _)| *scan != own);
            let others = others.map(|(_, grid)| grid[cell as usize]);
            let mut others: Vec<f32> = others.filter(|value| !value.is_nan()).collect();
            if others.len() < MIN_OTHERS {
                return 0.0;
            }
            (f64::from(value.to_f32()) - quantile(&mut others, 0.5)).abs() as f32
        };
        cells.map(deviation).collect()
    };
    window.iter().enumerate().map(of_scan).collect()
}

/// The values by cell; NaN where there are none.
fn dense(volume: &FineVolume) -> Vec<f32> {
    let mut grid = vec![f32::NAN; volume.foreground.shape.n_voxels()];
    for (&cell, value) in volume.foreground.cells.iter().zip(&volume.values) {
        grid[cell as usize] = value.to_f32();
    }
    grid
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::{
        geometry::{Affine, Shape3},
        token::Foreground,
    };

    /// A scan of voxels of 1 by 2 by 4 mm, and its brain.
    fn scan(shape: [usize; 3], voxels: &[f32], inside: &[bool]) -> (RawVolume, RawMask) {
        let shape = Shape3(shape);
        let rows = [[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0]];
        let affine = Affine::new(rows).unwrap();
        (
            RawVolume { shape, voxels: voxels.to_vec(), affine },
            RawMask { shape, inside: inside.to_vec(), affine },
        )
    }

    fn assert_near(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            // Results are f32.
            assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} instead of {expected}");
        }
    }

    #[test]
    fn brightness_is_a_mean_over_the_brain_alone() {
        // The first voxel is bright and outside of the brain. The others weigh 1 and e^-1/2.
        let (raw, brain) = scan([3, 1, 1], &[100.0, 8.0, 2.0], &[false, true, true]);
        let w = (-0.5_f64).exp();
        let expected = [0.0, (8.0 + 2.0 * w) / (1.0 + w), (2.0 + 8.0 * w) / (1.0 + w)];
        assert_near(&brightness(&raw, &brain), &expected);
    }

    #[test]
    fn a_longer_voxel_is_smoothed_less() {
        // Voxels along y are 2 mm apart, two standard deviations.
        let (raw, brain) = scan([1, 2, 1], &[8.0, 2.0], &[true, true]);
        let w = (-2.0_f64).exp();
        let expected = [(8.0 + 2.0 * w) / (1.0 + w), (2.0 + 8.0 * w) / (1.0 + w)];
        assert_near(&brightness(&raw, &brain), &expected);
    }

    #[test]
    fn an_even_brain_stays_even_in_three_dimensions() {
        let inside: Vec<bool> = (0..5 * 4 * 3).map(|offset| offset % 7 != 0).collect();
        let (raw, brain) = scan([5, 4, 3], &[3.0; 60], &inside);
        let expected: Vec<f64> =
            inside.iter().map(|&inside| if inside { 3.0 } else { 0.0 }).collect();
        assert_near(&brightness(&raw, &brain), &expected);
    }

    fn fine(cells: &[u32], values: &[f32]) -> FineVolume {
        let foreground = Foreground { shape: Shape3::cube(2), cells: cells.to_vec() };
        FineVolume {
            depths: vec![0; cells.len()],
            cell_mm: 1.0,
            foreground,
            values: values.iter().map(|&value| f16::from_f32(value)).collect(),
        }
    }

    #[test]
    fn equal_scans_do_not_deviate() {
        let window = vec![fine(&[0, 3, 5], &[1.0, -2.0, 0.5]); 3];
        assert_eq!(deviations(&window), vec![vec![0.0; 3]; 3]);
    }

    #[test]
    fn a_deviation_is_the_distance_from_the_median_of_the_others() {
        let window = [
            fine(&[0, 1], &[5.0, 9.0]),
            fine(&[0, 1], &[1.0, 1.0]),
            fine(&[0, 2], &[2.0, 7.0]),
            fine(&[0], &[4.0]),
        ];
        // At cell 0 the medians of the others are 2, 4, 4 and 2. At cell 1 and at cell 2 there are
        // too few others.
        let expected = [vec![3.0, 0.0], vec![3.0, 0.0], vec![2.0, 0.0], vec![2.0]];
        assert_eq!(deviations(&window), expected);
    }
}
