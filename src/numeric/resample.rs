//! Resamples to another number of voxels over the same field of view, like PyTorch's `interpolate`.
//!
//! Places are computed in f32 as in PyTorch, so that ties between two voxels are decided in the
//! same way.

use rayon::prelude::*;

use super::geometry::Shape3;

/// How a value between voxel centres is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Between {
    /// From the voxel that covers the place: PyTorch's `nearest-exact`.
    Nearest,
    /// The weighted mean of the voxels around it, constant beyond the outermost centres: PyTorch's
    /// `trilinear` with `align_corners=False`.
    Linear,
}

/// The voxels along an axis that give a value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Source {
    /// The voxel at or before the place.
    pub below: usize,
    /// The next one, or the same at the upper end.
    pub above: usize,
    /// Weight of the next one, in [0, 1).
    pub share: f32,
}

impl Source {
    /// The same with both voxels mapped, for example to positions in memory.
    pub fn map(self, place: impl Fn(usize) -> usize) -> Self {
        Self { below: place(self.below), above: place(self.above), ..self }
    }
}

/// For each of `n_to` voxels along an axis, its place among `n_from` voxels of the same extent.
///
/// # Panics
/// If there are no voxels to take values from.
pub fn sources(n_from: usize, n_to: usize, between: Between) -> Vec<Source> {
    assert!(n_from > 0, "an axis without voxels has no values");
    let (scale, last) = (n_from as f32 / n_to as f32, n_from - 1);
    let source = |index: usize| {
        let place = (index as f32 + 0.5) * scale;
        match between {
            Between::Nearest => {
                let nearest = (place as usize).min(last);
                Source { below: nearest, above: nearest, share: 0.0 }
            }
            Between::Linear => {
                let place = (place - 0.5).max(0.0);
                let below = (place as usize).min(last);
                Source { below, above: (below + 1).min(last), share: place - below as f32 }
            }
        }
    };
    (0..n_to).map(source).collect()
}

/// The values at all combinations of places, x fastest. Each place is a position in memory. The sum
/// of the three axes' positions is that of a value.
pub fn resample(values: &[f32], axes: &[Vec<Source>; 3]) -> Vec<f32> {
    let [along_x, along_y, along_z] = axes;
    let shape = Shape3([along_x.len(), along_y.len(), along_z.len()]);
    let is_exact = axes.iter().flatten().all(|source| source.share == 0.0);

    let mut all = vec![0.0; shape.n_voxels()];
    let planes = all.par_chunks_mut((shape.0[0] * shape.0[1]).max(1)).zip(along_z);
    planes.for_each(|(plane, z)| {
        for (row, y) in plane.chunks_exact_mut(shape.0[0]).zip(along_y) {
            for (value, x) in row.iter_mut().zip(along_x) {
                *value = if is_exact {
                    values[x.below + y.below + z.below]
                } else {
                    trilinear(values, [x, y, z])
                };
            }
        }
    });

    all
}

fn trilinear(values: &[f32], [x, y, z]: [&Source; 3]) -> f32 {
    let mean = |below: f32, above: f32, share: f32| (1.0 - share) * below + share * above;
    let row = |start: usize| mean(values[start + x.below], values[start + x.above], x.share);
    let plane = |start: usize| mean(row(start + y.below), row(start + y.above), y.share);
    mean(plane(z.below), plane(z.above), z.share)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(values: &[f32], n_to: usize, between: Between) -> Vec<f32> {
        let origin = vec![Source { below: 0, above: 0, share: 0.0 }];
        resample(values, &[sources(values.len(), n_to, between), origin.clone(), origin])
    }

    #[test]
    fn lines_are_resampled_as_pytorch_does() {
        // torch.nn.functional.interpolate(torch.tensor([[[0., 1., 4., 9., 16.]]]), n, mode=...)
        let values = [0.0, 1.0, 4.0, 9.0, 16.0];
        assert_eq!(line(&values, 3, Between::Nearest), [0.0, 4.0, 16.0]);
        assert_eq!(line(&values, 8, Between::Nearest), [0., 0., 1., 4., 4., 9., 16., 16.]);
        let close = |found: Vec<f32>, expected: &[f32]| {
            assert_eq!(found.len(), expected.len());
            let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
            assert!(apart.fold(0.0, f32::max) < 1e-5, "{found:?} {expected:?}");
        };
        close(line(&values, 3, Between::Linear), &[1.0 / 3.0, 4.0, 41.0 / 3.0]);
        let eight = [0.0, 0.4375, 1.1875, 3.0625, 5.5625, 8.6875, 12.9375, 16.0];
        close(line(&values, 8, Between::Linear), &eight);
        assert_eq!(line(&[3.0], 4, Between::Linear), [3.0; 4]);
    }

    #[test]
    fn the_same_number_of_voxels_changes_nothing() {
        let values: Vec<f32> = (0..5 * 7 * 11).map(|v| v as f32).collect();
        for between in [Between::Nearest, Between::Linear] {
            let axis = |n, stride: usize| -> Vec<Source> {
                sources(n, n, between).into_iter().map(|s| s.map(|at| at * stride)).collect()
            };
            assert_eq!(resample(&values, &[axis(5, 1), axis(7, 5), axis(11, 35)]), values);
        }
    }

    #[test]
    fn the_three_axes_are_interpolated_one_after_the_other() {
        // x + 10 y + 100 z is reproduced by a trilinear mean.
        let shape = Shape3([2, 3, 4]);
        let ramp = |[x, y, z]: [f32; 3]| x + 10.0 * y + 100.0 * z;
        let values: Vec<f32> =
            (0..shape.n_voxels()).map(|o| ramp(shape.voxel(o).map(|v| v as f32))).collect();
        let axis = |place: usize, stride: usize| {
            vec![Source { below: place * stride, above: (place + 1) * stride, share: 0.25 }]
        };
        let found = resample(&values, &[axis(0, 1), axis(1, 2), axis(2, 6)]);
        assert_eq!(found, [ramp([0.25, 1.25, 2.25])]);
    }
}
