//! How good is a scan? This is measured without other scans.
//!
//! There is one figure: noise. It uses a mask that gives 0 for constant and linear intensities
//! (Immerkær 1996, "Fast noise variance estimation"):
//!
//! ```text
//!  1 -2  1
//! -2  4 -2
//!  1 -2  1
//! ```
//!
//! Noise of standard deviation s gives values of 6 s. Immerkær averages their magnitudes, which
//! includes edges. Here it is the median, so that the folds of the brain count little. Measured in
//! docs/quality.md: the figure follows noise that is added to real scans, and does not follow
//! motion.

use super::{
    geometry::Shape3,
    scoring::quantile,
    volume::{RawMask, RawVolume},
};

/// Fewer places than this, each with its eight neighbours in the brain, are too few to measure.
const MIN_PLACES: usize = 1000;

/// Standard deviation of the mask's response to noise of standard deviation 1.
const GAIN: f64 = 6.0;

/// Median magnitude of a standard normal value.
const MEDIAN_SIZE: f64 = 0.674_489_750_196_081_7;

/// Noise in the brain, as a share of the brain's contrast, which is the distance between the 10th
/// and the 90th percentile of its intensities. It is contrast and not brightness, because contrast
/// distinguishes tissues at any scale of the scanner.
///
/// `brain` is on the scan's grid. The planes are perpendicular to the longest voxel edge, because
/// neighbours are nearest there. Resampled scans have less noise than the original, because
/// interpolation averages. `None` if the brain is too small or has no contrast.
pub fn noise(raw: &RawVolume, brain: &RawMask) -> Option<f64> {
    let contrast = contrast(raw, brain);
    let across = across(raw);

    let mut answers = Vec::new();
    for span in brain.spans() {
        let [first, y, z] = raw.shape.voxel(span.start);
        for (x, offset) in (first..).zip(span) {
            if brain.inside[offset] {
                answers.extend(answer(raw, brain, [x, y, z], across));
            }
        }
    }

    if answers.len() < MIN_PLACES || contrast <= 0.0 {
        return None;
    }
    Some(quantile(&mut answers, 0.5) / (MEDIAN_SIZE * GAIN * contrast))
}

fn contrast(raw: &RawVolume, brain: &RawMask) -> f64 {
    let mut inside = brain.values(&raw.voxels);
    if inside.is_empty() {
        return 0.0;
    }
    quantile(&mut inside, 0.9) - quantile(&mut inside, 0.1)
}

/// The axis with the longest voxel edge; the last one if several are equal.
fn across(raw: &RawVolume) -> usize {
    let edges = raw.affine.spacing_mm();
    (0..3).fold(0, |longest, axis| if edges[axis] >= edges[longest] { axis } else { longest })
}

/// The magnitude of the mask's response at a voxel; `None` at the rim of the brain or of the grid.
fn answer(raw: &RawVolume, brain: &RawMask, place: [usize; 3], across: usize) -> Option<f32> {
    const WEIGHTS: [f32; 3] = [1.0, -2.0, 1.0];
    let Shape3([nx, ny, _]) = raw.shape;
    let strides = [1, nx, nx * ny];

    let [one, other] = [[1, 2], [0, 2], [0, 1]][across];
    if [one, other].iter().any(|&axis| place[axis] == 0 || place[axis] + 1 == raw.shape.0[axis]) {
        return None;
    }

    let corner = raw.shape.offset(place) - strides[one] - strides[other];
    let mut sum = 0.0;
    for (i, down) in WEIGHTS.iter().enumerate() {
        for (j, right) in WEIGHTS.iter().enumerate() {
            let at = corner + i * strides[one] + j * strides[other];
            if !brain.inside[at] {
                return None;
            }
            sum += down * right * raw.voxels[at];
        }
    }

    Some(sum.abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::{geometry::Affine, projection::Normal};

    /// 20 x 24 x 22 voxels, the longest edge along y, all brain.
    fn scan(voxel: impl FnMut([usize; 3]) -> f32) -> (RawVolume, RawMask) {
        let shape = Shape3([20, 24, 22]);
        let affine =
            Affine::new([[1.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.2, 0.0], [0.0, -0.2, 1.5, 0.0]])
                .unwrap();
        let voxels = (0..shape.n_voxels()).map(|offset| shape.voxel(offset)).map(voxel).collect();
        let brain = RawMask { shape, inside: vec![true; shape.n_voxels()], affine };
        (RawVolume { shape, voxels, affine }, brain)
    }

    #[test]
    fn the_answer_at_a_voxel_worked_by_hand() {
        // A single voxel of 5 in nothing: four times 5 there, twice beside it, once at its corners,
        // and only in its own plane, which is that of x and z.
        let (raw, mut brain) = scan(|place| if place == [7, 8, 9] { 5.0 } else { 0.0 });
        let at = |place| answer(&raw, &brain, place, across(&raw));
        assert_eq!(at([7, 8, 9]), Some(20.0));
        assert_eq!((at([8, 8, 9]), at([7, 8, 8])), (Some(10.0), Some(10.0)));
        assert_eq!(
            (at([6, 8, 10]), at([7, 7, 9]), at([9, 8, 9])),
            (Some(5.0), Some(0.0), Some(0.0))
        );
        assert_eq!((at([0, 8, 9]), at([7, 8, 21])), (None, None), "the rim of the grid");
        brain.inside[raw.shape.offset([8, 8, 10])] = false;
        let at = |place| answer(&raw, &brain, place, across(&raw));
        assert_eq!(at([7, 8, 9]), None, "the rim of the brain");
    }

    #[test]
    fn a_ramp_has_no_noise_and_what_has_no_contrast_has_no_figure() {
        let (raw, brain) = scan(|[x, y, z]| (x + 2 * y + 3 * z) as f32);
        assert_eq!(noise(&raw, &brain), Some(0.0));
        let (flat, brain) = scan(|_| 7.0);
        assert_eq!(noise(&flat, &brain), None);
        let (raw, mut brain) = scan(|[x, ..]| x as f32);
        brain.inside.fill(false);
        assert_eq!(noise(&raw, &brain), None);
    }

    /// Tissue of 100 and 200 in blocks, with Rician noise.
    fn blocks(sigma: f64) -> f64 {
        let mut random = Normal::new(11);
        let (raw, brain) = scan(|[x, y, z]| {
            let tissue = if (x / 7 + y / 7 + z / 7) % 2 == 0 { 100.0 } else { 200.0 };
            let (real, imaginary) = (tissue + sigma * random.next(), sigma * random.next());
            real.hypot(imaginary) as f32
        });
        let contrast = contrast(&raw, &brain);
        noise(&raw, &brain).unwrap() * contrast
    }

    #[test]
    fn the_figure_is_the_noise_that_was_added_and_edges_hardly_count() {
        assert_eq!(blocks(0.0), 0.0);
        let mut last = 0.0;
        for sigma in [2.0, 5.0, 10.0, 20.0] {
            let found = blocks(sigma);
            // A quarter of the places lie at edges and shift the median.
            assert!((0.95..1.4).contains(&(found / sigma)), "{sigma}: {found}");
            assert!(found > last, "more noise, more of it");
            last = found;
        }
    }
}
