//! The slices of a [`Volume`] along one axis, as the encoder wants them.

use super::{geometry::Axis, volume::Volume};

/// Mean that DINOv2 was trained with, per colour channel (ImageNet).
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Standard deviation that DINOv2 was trained with, per colour channel (ImageNet).
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Images for the encoder: `[n_images, colours, side, side]`, row-major. One colour, grey in [0, 1], for
/// a network whose weights were made grey; else three, normalised with the ImageNet mean and
/// standard deviation.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageBatch {
    /// Number of images.
    pub n_images: usize,
    /// Pixels along each edge.
    pub side: usize,
    /// `n_images * colours * side * side` pixels.
    pub pixels: Vec<f32>,
}

/// Patch features of a batch at one layer: `[n_images, n_patches, channels]`, row-major; patches
/// in image order (row by row), class and register tokens dropped.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchFeatures {
    /// Number of images.
    pub n_images: usize,
    /// Patches per image.
    pub n_patches: usize,
    /// Features per patch.
    pub channels: usize,
    /// `n_images * n_patches * channels` features.
    pub values: Vec<f32>,
}

impl PatchFeatures {
    /// The mean over each `group` consecutive images.
    ///
    /// # Panics
    /// If the images are not whole groups.
    pub fn pooled(&self, group: usize) -> Self {
        let Self { n_images, n_patches, channels, ref values } = *self;
        assert!(group > 0 && n_images.is_multiple_of(group), "whole groups");
        let (per_image, scale) = (n_patches * channels, 1.0 / group as f32);
        let mut pooled = Vec::with_capacity(values.len() / group);
        for images in values.chunks_exact((group * per_image).max(1)) {
            let (first, others) = images.split_at(per_image);
            let start = pooled.len();
            pooled.extend_from_slice(first);
            let sums = &mut pooled[start..];
            for image in others.chunks_exact(per_image) {
                sums.iter_mut().zip(image).for_each(|(sum, value)| *sum += value);
            }
            sums.iter_mut().for_each(|sum| *sum *= scale);
        }
        Self { n_images: n_images / group, n_patches, channels, values: pooled }
    }
}

/// The slices `indices` of the volume along `axis` as a batch for the encoder.
///
/// Rows and columns of a slice are the two other axes in ascending order, the lower one as row:
/// a sagittal slice is `[y, z]`, a coronal one `[x, z]`, an axial one `[x, y]`. Grey values, as a
/// network of one colour wants them.
pub fn image_batch(volume: &Volume, axis: Axis, indices: &[usize]) -> ImageBatch {
    let side = volume.side();
    let mut pixels = Vec::with_capacity(indices.len() * side * side);
    let (row_axis, column_axis) = in_plane(axis);
    let strides = [1, side, side * side];
    for &index in indices {
        for row in 0..side {
            let start = index * strides[axis.index()] + row * strides[row_axis];
            let line = volume.voxels()[start..].iter().step_by(strides[column_axis]);
            pixels.extend(line.take(side));
        }
    }
    ImageBatch { n_images: indices.len(), side, pixels }
}

/// The two axes of a slice along `axis`: (rows, columns), in ascending order.
pub fn in_plane(axis: Axis) -> (usize, usize) {
    match axis {
        Axis::Sagittal => (1, 2),
        Axis::Coronal => (0, 2),
        Axis::Axial => (0, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::geometry::{Affine, Shape3, WorldPoint};

    #[test]
    fn a_slice_has_the_lower_of_its_two_axes_as_rows() {
        let shape = Shape3::cube(3);
        let voxels = (0..27).map(|offset| offset as f32).collect();
        let affine = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        let volume = Volume { side: 3, voxels, brain: vec![true; 27], affine };
        for axis in Axis::VIEWS {
            let batch = image_batch(&volume, axis, &[2, 0]);
            assert_eq!(batch.n_images, 2);
            let (rows, columns) = in_plane(axis);
            for (at, &pixel) in batch.pixels.iter().enumerate() {
                let mut voxel = [0; 3];
                voxel[axis.index()] = [2, 0][at / 9];
                voxel[rows] = at / 3 % 3;
                voxel[columns] = at % 3;
                assert_eq!(pixel, shape.offset(voxel) as f32);
            }
        }
    }

    #[test]
    fn pooling_averages_each_group() {
        let values = vec![1.0, 2.0, 3.0, 6.0, 10.0, 20.0, 30.0, 60.0];
        let features = PatchFeatures { n_images: 4, n_patches: 1, channels: 2, values };
        let pooled = features.pooled(2);
        assert_eq!((pooled.n_images, pooled.values), (2, vec![2.0, 4.0, 20.0, 40.0]));
        assert_eq!(features.pooled(1), features);
    }
}
