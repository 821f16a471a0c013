//! Gaussian smoothing inside a mask.

use rayon::prelude::*;

use super::geometry::Shape3;

/// The Gaussian ends here, standard deviations. It is the default of SciPy.
const REACH_SIGMAS: f64 = 4.0;

/// The values, smoothed by a Gaussian inside the mask; 0 outside. `sigmas` are the standard
/// deviations along the three axes, in voxels.
///
/// Smoothed values are divided by the smoothed mask (normalised convolution, Knutsson and Westin
/// 1993), so that the background does not darken the rim of the mask.
pub fn smoothed_within(
    values: &[f32],
    inside: &[bool],
    shape: Shape3,
    sigmas: [f64; 3],
) -> Vec<f32> {
    let within = values.iter().zip(inside);
    let within = within.map(|(&value, &inside)| if inside { f64::from(value) } else { 0.0 });
    let sums = smoothed(within.collect(), shape, sigmas);
    let weights = inside.iter().map(|&inside| f64::from(u8::from(inside))).collect();
    let weights = smoothed(weights, shape, sigmas);

    let values = sums.into_iter().zip(weights).zip(inside);
    values
        .map(|((sum, weight), &inside)| if inside { (sum / weight) as f32 } else { 0.0 })
        .collect()
}

/// A Gaussian along each axis. Places beyond the grid count as 0.
fn smoothed(values: Vec<f64>, shape: Shape3, sigmas: [f64; 3]) -> Vec<f64> {
    (0..3).fold(values, |values, axis| smoothed_along(axis, &values, shape, sigmas[axis]))
}

fn smoothed_along(axis: usize, values: &[f64], shape: Shape3, sigma: f64) -> Vec<f64> {
    let reach = (REACH_SIGMAS * sigma + 0.5) as usize;
    let weight = |apart: usize| (-0.5 * (apart as f64 / sigma).powi(2)).exp();
    let weights: Vec<f64> = (0..=reach).map(weight).collect();

    let (n, width) = (shape.0[axis], shape.0[0]);
    let stride: usize = shape.0[..axis].iter().product();
    let near = |at: usize| at.saturating_sub(reach)..(at + reach + 1).min(n);
    let mut sums = vec![0.0; values.len()];
    sums.par_chunks_mut(width.max(1)).enumerate().for_each(|(row, sums)| {
        let start = row * width;
        if axis == 0 {
            let line = &values[start..][..width];
            for (at, sum) in sums.iter_mut().enumerate() {
                near(at).for_each(|other| *sum += weights[other.abs_diff(at)] * line[other]);
            }
            return;
        }
        // Whole rows at once, so that no cell asks for its place.
        let at = start / stride % n;
        for other in near(at) {
            let weight = weights[other.abs_diff(at)];
            let line = &values[start - at * stride + other * stride..][..width];
            sums.iter_mut().zip(line).for_each(|(sum, value)| *sum += weight * value);
        }
    });
    sums
}
