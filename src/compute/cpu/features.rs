//! The values in the convolutional network, as cubes of voxels with channels, and the steps between
//! convolutions.

use rayon::prelude::*;

use super::vectorised::{multiply_add, vectorised};
use crate::domain::brain_weights::NORM_EPSILON;

/// A cube of voxels with channels: `[z, y, x, channel]` within a border of zeros. So a convolution
/// needs no special case for the edge.
pub(super) struct Features {
    /// Voxels along each edge, without the border.
    pub(super) side: usize,
    pub(super) channels: usize,
    /// Voxels of the border on each side.
    pub(super) border: usize,
    pub(super) values: Vec<f32>,
}

impl Features {
    pub(super) fn zeros(side: usize, channels: usize, border: usize) -> Self {
        let values = vec![0.0; (side + 2 * border).pow(3) * channels];
        Self { side, channels, border, values }
    }

    /// One channel, from values without a border.
    pub(super) fn of_image(image: &[f32], side: usize, border: usize) -> Self {
        let mut features = Self::zeros(side, 1, border);
        features
            .for_each_row(|z, y, row| row.copy_from_slice(&image[(z * side + y) * side..][..side]));
        features
    }

    /// Entries from one row along x to the next, including the border.
    pub(super) fn row_stride(&self) -> usize {
        (self.side + 2 * self.border) * self.channels
    }

    /// Entries from one plane to the next.
    pub(super) fn plane_stride(&self) -> usize {
        (self.side + 2 * self.border) * self.row_stride()
    }

    /// Entries of a row without the border.
    fn row_len(&self) -> usize {
        self.side * self.channels
    }

    /// The voxels of a row along x, without the border.
    pub(super) fn row(&self, z: usize, y: usize) -> &[f32] {
        let start = (z + self.border) * self.plane_stride()
            + (y + self.border) * self.row_stride()
            + self.border * self.channels;
        &self.values[start..start + self.row_len()]
    }

    /// Calls `write` with z, y and each row along x. It processes planes in parallel.
    pub(super) fn for_each_row(&mut self, write: impl Fn(usize, usize, &mut [f32]) + Sync) {
        let (side, border, row_len) = (self.side, self.border, self.row_len());
        let (row_stride, plane_stride) = (self.row_stride(), self.plane_stride());
        let first = border * self.channels;
        let planes = self.values.par_chunks_mut(plane_stride).enumerate();
        planes.skip(border).take(side).for_each(|(plane, values)| {
            let rows = values.chunks_exact_mut(row_stride).skip(border).take(side);
            for (y, row) in rows.enumerate() {
                write(plane - border, y, &mut row[first..first + row_len]);
            }
        });
    }
}

/// An instance norm without weights. It scales each channel to mean 0 and variance 1 (biased) over
/// the voxels of the image itself. It holds a factor and a shift for each entry of a row, so that
/// rows need no loop over channels.
pub(super) struct Norm {
    scale: Vec<f32>,
    shift: Vec<f32>,
}

impl Norm {
    /// Sums are taken in f64 along columns of a plane, then plane by plane. The order does not
    /// depend on the number of threads.
    pub(super) fn of(features: &Features) -> Self {
        let (side, channels, row_len) = (features.side, features.channels, features.row_len());
        let of_plane = |z: usize| {
            let mut sums = vec![0.0_f64; 2 * row_len];
            let (values, squares) = sums.split_at_mut(row_len);
            (0..side).for_each(|y| add_moments(features.row(z, y), values, squares));
            [values, squares].map(|sums| {
                (0..channels).map(|c| sums[c..].iter().step_by(channels).sum::<f64>()).collect()
            })
        };
        let planes: Vec<[Vec<f64>; 2]> = (0..side).into_par_iter().map(of_plane).collect();
        let mean = |moment: usize, channel: usize| {
            planes.iter().map(|plane| plane[moment][channel]).sum::<f64>() / side.pow(3) as f64
        };
        let mut norm =
            Self { scale: Vec::with_capacity(row_len), shift: Vec::with_capacity(row_len) };
        for channel in 0..channels {
            let (average, square) = (mean(0, channel), mean(1, channel));
            let scale = 1.0 / ((square - average * average).max(0.0) + NORM_EPSILON).sqrt();
            norm.scale.push(scale as f32);
            norm.shift.push((-average * scale) as f32);
        }
        [&mut norm.scale, &mut norm.shift]
            .into_iter()
            .for_each(|values| *values = values.repeat(side));
        norm
    }
}

vectorised! {
    fn add_moments(row: &[f32], sums: &mut [f64], squares: &mut [f64]) {
        for ((value, sum), square) in row.iter().zip(sums).zip(squares) {
            let value = f64::from(*value);
            *sum += value;
            *square += value * value;
        }
    }
}

/// Applies the instance norm to all voxels.
pub(super) fn norm(features: &mut Features) {
    let Norm { scale, shift } = Norm::of(features);
    features.for_each_row(|_, _, row| norm_row(row, &scale, &shift));
}

/// Replaces each value by max(0, instance norm).
pub(super) fn norm_relu(features: &mut Features) {
    let Norm { scale, shift } = Norm::of(features);
    features.for_each_row(|_, _, row| norm_relu_row(row, &scale, &shift));
}

/// max(0, instance norm + other), at the end of a residual block.
pub(super) fn norm_add_relu(features: &mut Features, other: &Features) {
    let Norm { scale, shift } = Norm::of(features);
    features.for_each_row(|z, y, row| norm_add_relu_row(row, &scale, &shift, other.row(z, y)));
}

/// max(0, instance norm) + other, where the decoder adds features of the encoder.
pub(super) fn norm_relu_add(features: &mut Features, other: &Features) {
    let Norm { scale, shift } = Norm::of(features);
    features.for_each_row(|z, y, row| norm_relu_add_row(row, &scale, &shift, other.row(z, y)));
}

/// max(0, value), which compilers turn into one instruction.
#[inline(always)]
fn relu(value: f32) -> f32 {
    if value > 0.0 { value } else { 0.0 }
}

vectorised! {
    fn norm_row(row: &mut [f32], scale: &[f32], shift: &[f32]) {
        for ((value, scale), shift) in row.iter_mut().zip(scale).zip(shift) {
            *value = multiply_add::<FUSED>(*value, *scale, *shift);
        }
    }
}

vectorised! {
    fn norm_relu_row(row: &mut [f32], scale: &[f32], shift: &[f32]) {
        for ((value, scale), shift) in row.iter_mut().zip(scale).zip(shift) {
            *value = relu(multiply_add::<FUSED>(*value, *scale, *shift));
        }
    }
}

vectorised! {
    fn norm_add_relu_row(row: &mut [f32], scale: &[f32], shift: &[f32], other: &[f32]) {
        for (((value, scale), shift), other) in row.iter_mut().zip(scale).zip(shift).zip(other) {
            *value = relu(multiply_add::<FUSED>(*value, *scale, *shift) + other);
        }
    }
}

vectorised! {
    fn norm_relu_add_row(row: &mut [f32], scale: &[f32], shift: &[f32], other: &[f32]) {
        for (((value, scale), shift), other) in row.iter_mut().zip(scale).zip(shift).zip(other) {
            *value = relu(multiply_add::<FUSED>(*value, *scale, *shift)) + other;
        }
    }
}

/// The largest of 3 x 3 x 3 voxels around every second one (stride 2, padding 1) of
/// Replaces each value by max(0, instance norm).
///
/// The norm's factors are positive, so the norm does not change which value is the largest. So it
/// is computed only for an eighth of the voxels, after the maximum.
pub(super) fn norm_relu_pool(features: &Features, border: usize) -> Features {
    let Norm { scale, shift } = Norm::of(features);
    let (side, channels) = (features.side, features.channels);
    let around = |at: usize| (2 * at).saturating_sub(1)..(2 * at + 2).min(side);
    let mut pooled = Features::zeros(side.div_ceil(2), channels, border);
    pooled.for_each_row(|z, y, row| {
        let mut largest = vec![f32::NEG_INFINITY; side * channels];
        for (z, y) in around(z).flat_map(|z| around(y).map(move |y| (z, y))) {
            keep_larger(features.row(z, y), &mut largest);
        }
        for (x, voxel) in row.chunks_exact_mut(channels).enumerate() {
            voxel.fill(f32::NEG_INFINITY);
            around(x).for_each(|x| keep_larger(&largest[x * channels..][..channels], voxel));
        }
        norm_relu_row(row, &scale, &shift);
    });
    pooled
}

vectorised! {
    fn keep_larger(row: &[f32], largest: &mut [f32]) {
        for (value, largest) in row.iter().zip(largest) {
            *largest = if *value > *largest { *value } else { *largest };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Channel 0 counts the voxels, channel 1 holds the squares of that.
    fn counted(side: usize, border: usize) -> Features {
        let mut features = Features::zeros(side, 2, border);
        features.for_each_row(|z, y, row| {
            for (x, voxel) in row.chunks_exact_mut(2).enumerate() {
                let value = ((z * side + y) * side + x) as f32;
                voxel.copy_from_slice(&[value, value * value]);
            }
        });
        features
    }

    fn channel(features: &Features, channel: usize) -> Vec<f32> {
        let rows = (0..features.side).flat_map(|z| (0..features.side).map(move |y| (z, y)));
        rows.flat_map(|(z, y)| features.row(z, y).iter().skip(channel).step_by(2))
            .copied()
            .collect()
    }

    #[test]
    fn each_channel_is_normalised_by_itself_and_the_border_stays_zero() {
        let mut features = counted(3, 2);
        norm(&mut features);
        for c in 0..2 {
            let values = channel(&features, c);
            let mean = values.iter().sum::<f32>() / 27.0;
            let variance = values.iter().map(|v| v * v).sum::<f32>() / 27.0;
            assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-5, "{mean} {variance}");
        }
        // The variance of 0 to 26 is (27^2 - 1) / 12.
        let first = -13.0 / (728.0_f32 / 12.0 + 1e-5).sqrt();
        assert!((channel(&features, 0)[0] - first).abs() < 1e-6);
        let n_set = |values: &[f32]| values.iter().filter(|value| **value != 0.0).count();
        let n_inside = n_set(&channel(&features, 0)) + n_set(&channel(&features, 1));
        assert_eq!(n_inside, n_set(&features.values));
    }

    #[test]
    fn ends_of_blocks_clip_before_or_after_the_sum() {
        let mut other = counted(3, 0);
        other.values.fill(-0.5);
        let normed = |end: fn(&mut Features, &Features)| {
            let mut features = counted(3, 1);
            end(&mut features, &other);
            channel(&features, 0)
        };
        let plain = normed(|features, _| norm(features));
        let expected = |of: fn(f32) -> f32| plain.iter().map(|&v| of(v)).collect::<Vec<_>>();
        assert_eq!(normed(|features, _| norm_relu(features)), expected(|v| v.max(0.0)));
        assert_eq!(normed(norm_add_relu), expected(|v| (v - 0.5).max(0.0)));
        assert_eq!(normed(norm_relu_add), expected(|v| v.max(0.0) - 0.5));
    }

    #[test]
    fn pooling_takes_the_largest_around_every_second_voxel() {
        for (side, picked) in [(4, [1, 3]), (3, [1, 2])] {
            let features = counted(side, 0);
            let mut normed = counted(side, 0);
            norm_relu(&mut normed);
            let pooled = norm_relu_pool(&features, 1);
            assert_eq!(pooled.side, 2);
            let all = channel(&normed, 0);
            let corners = picked.map(|z| picked.map(|y| picked.map(|x| (z * side + y) * side + x)));
            let expected: Vec<f32> =
                corners.as_flattened().as_flattened().iter().map(|&at| all[at]).collect();
            assert_eq!(channel(&pooled, 0), expected);
        }
    }
}
