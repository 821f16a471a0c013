//! The slices of a [`Volume`] along one axis, as the encoder wants them.

use super::{geometry::Axis, volume::Volume};

/// Mean that DINOv2 was trained with, per colour channel (ImageNet).
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Standard deviation that DINOv2 was trained with, per colour channel (ImageNet).
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Images for the encoder: `[n_images, 3, side, side]`, row-major, normalised with the ImageNet
/// mean and standard deviation.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageBatch {
    /// Number of images.
    pub n_images: usize,
    /// Pixels along each edge.
    pub side: usize,
    /// `n_images * 3 * side * side` normalised pixels.
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

/// The slices `indices` of the volume along `axis` as a batch for the encoder.
///
/// Rows and columns of a slice are the two other axes in ascending order, the lower one as row:
/// a sagittal slice is `[y, z]`, a coronal one `[x, z]`, an axial one `[x, y]`. The grey value
/// goes into all three colour channels.
pub fn image_batch(volume: &Volume, axis: Axis, indices: &[usize]) -> ImageBatch {
    let side = volume.side();
    let n_pixels = side * side;
    let mut pixels = vec![0.0; indices.len() * 3 * n_pixels];
    let (row_axis, column_axis) = in_plane(axis);
    for (image, &index) in pixels.chunks_exact_mut(3 * n_pixels).zip(indices) {
        let (grey, others) = image.split_at_mut(n_pixels);
        for row in 0..side {
            for column in 0..side {
                let mut voxel = [0; 3];
                voxel[axis.index()] = index;
                voxel[row_axis] = row;
                voxel[column_axis] = column;
                grey[row * side + column] = volume.voxels()[volume.shape().offset(voxel)];
            }
        }
        for (channel, colour) in others.chunks_exact_mut(n_pixels).enumerate() {
            normalise_into(grey, channel + 1, colour);
        }
        for pixel in grey {
            *pixel = (*pixel - IMAGENET_MEAN[0]) / IMAGENET_STD[0];
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

fn normalise_into(grey: &[f32], channel: usize, colour: &mut [f32]) {
    for (out, &pixel) in colour.iter_mut().zip(grey) {
        *out = (pixel - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel];
    }
}
