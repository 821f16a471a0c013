//! The slices of a [`Volume`] along one axis, in the form that the encoder needs.

use super::{geometry::Axis, volume::Volume};

/// Mean that DINOv2 was trained with, per colour channel (ImageNet).
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Standard deviation that DINOv2 was trained with, per colour channel (ImageNet).
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Images for the encoder: `[n_images, colours, side, side]`, row-major. One colour, grey in [0,
/// 1], for a network whose weights were made grey; else three, normalised with the ImageNet mean
/// and standard deviation.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageBatch {
    /// Pixels along each edge.
    pub side: usize,
    /// `n_images * colours * side * side` pixels.
    pub pixels: Vec<f32>,
    /// Number of consecutive images in a group. They share their patches, and their features are
    /// averaged.
    pub group: usize,
    /// For each group, the patches that are encoded, numbered row by row, ascending. The network
    /// skips the others.
    pub patches: Vec<Vec<u32>>,
}

impl ImageBatch {
    /// `n_images` images, each a group of its own, with all patches of `patch` pixels along each
    /// edge.
    pub fn whole(n_images: usize, side: usize, patch: usize, pixels: Vec<f32>) -> Self {
        let all: Vec<u32> = (0..(side / patch).pow(2) as u32).collect();
        Self { side, pixels, group: 1, patches: vec![all; n_images] }
    }

    /// Number of images, in all groups together.
    pub fn n_images(&self) -> usize {
        self.patches.len() * self.group
    }

    /// Pixels of an image, all its colours together.
    ///
    /// # Panics
    /// If the pixels do not make whole images.
    pub fn n_pixels(&self) -> usize {
        let n_images = self.n_images().max(1);
        assert!(self.pixels.len().is_multiple_of(n_images), "pixels of whole images");
        self.pixels.len() / n_images
    }
}

/// Patch features at one layer: `[n_rows, channels]`, row-major; a row for each patch of each group
/// of an [`ImageBatch`], in its order. Class and register tokens are dropped.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchFeatures {
    /// Features per patch.
    pub channels: usize,
    /// `n_rows * channels` features.
    pub values: Vec<f32>,
}

impl PatchFeatures {
    /// Averages the features of single images over each group of `images`.
    ///
    /// # Panics
    /// If their number does not fit `images`.
    pub fn pooled(self, images: &ImageBatch) -> Self {
        let Self { channels, mut values } = self;
        let group = images.group;
        let (mut read, mut written) = (0, 0);

        for patches in &images.patches {
            let n = patches.len() * channels;
            values.copy_within(read..read + n, written);
            let (means, others) = values.split_at_mut((written + n).max(read + n));
            let means = &mut means[written..written + n];
            for image in others[..(group - 1) * n].chunks_exact(n.max(1)) {
                means.iter_mut().zip(image).for_each(|(sum, value)| *sum += value);
            }
            means.iter_mut().for_each(|sum| *sum *= 1.0 / group as f32);
            (read, written) = (read + group * n, written + n);
        }

        assert_eq!(read, values.len(), "features of each image");
        values.truncate(written);
        Self { channels, values }
    }
}

/// The smallest cosine between a row of one and the same row of the other; 1 without rows. NaN if
/// any value is NaN.
///
/// # Panics
/// If their numbers of rows or channels differ.
pub fn least_cosine(a: &PatchFeatures, b: &PatchFeatures) -> f64 {
    assert_eq!((a.channels, a.values.len()), (b.channels, b.values.len()), "features of the same");
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let rows = a.values.chunks_exact(a.channels).zip(b.values.chunks_exact(b.channels));
    let cosines = rows.map(|(a, b)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt());
    // Unlike f64::min, this keeps NaN.
    cosines.fold(1.0, |least, c| if c < least || c.is_nan() { c } else { least })
}

/// Edge of the blocks in which slices are cut out: a cache line of voxels.
const BLOCK: usize = 16;

/// Writes the slices `indices` of the volume along `axis` into `pixels`, `[n, side, side]`.
///
/// Rows and columns of a slice are the two other axes in ascending order, the lower one as row: a
/// sagittal slice is `[y, z]`, a coronal one `[x, z]`, an axial one `[x, y]`. The pixels are grey
/// values, for a network of one colour.
///
/// # Panics
/// If `pixels` does not have the size of the slices.
pub fn slice_pixels(volume: &Volume, axis: Axis, indices: &[usize], pixels: &mut [f32]) {
    let side = volume.side();
    assert_eq!(pixels.len(), indices.len() * side * side, "pixels of the slices");

    let strides = [1, side, side * side];
    let (row_axis, column_axis) = in_plane(axis);
    let [row_step, column_step] = [row_axis, column_axis].map(|axis| strides[axis]);

    // Neighbouring voxels share a cache line, and so do neighbouring pixels. Within a block all
    // slices use both completely before the cache drops them.
    let corners = (0..side).step_by(BLOCK);
    for (top, left) in corners.clone().flat_map(|top| corners.clone().map(move |left| (top, left)))
    {
        let columns = left..side.min(left + BLOCK);
        for (slice, &index) in pixels.chunks_exact_mut(side * side).zip(indices) {
            let slice_start = index * strides[axis.index()];
            for row in top..side.min(top + BLOCK) {
                let line = &mut slice[row * side..][columns.clone()];
                let first = slice_start + row * row_step + left * column_step;
                let voxels = volume.voxels()[first..].iter().step_by(column_step);
                line.iter_mut().zip(voxels).for_each(|(pixel, &voxel)| *pixel = voxel);
            }
        }
    }
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
        let volume = Volume { side: 3, voxels, brain: vec![true; 27], beyond: None, affine };
        for axis in Axis::VIEWS {
            let mut pixels = [f32::NAN; 18];
            slice_pixels(&volume, axis, &[2, 0], &mut pixels);
            let (rows, columns) = in_plane(axis);
            for (at, &pixel) in pixels.iter().enumerate() {
                let mut voxel = [0; 3];
                voxel[axis.index()] = [2, 0][at / 9];
                voxel[rows] = at / 3 % 3;
                voxel[columns] = at % 3;
                assert_eq!(pixel, shape.offset(voxel) as f32);
            }
        }
    }

    #[test]
    fn pooling_averages_the_images_of_each_group_patch_by_patch() {
        let mut images = ImageBatch::whole(2, 2, 1, vec![0.0; 16]);
        images.group = 2;
        images.patches = vec![vec![0, 3], vec![1]];
        let values = vec![1.0, 2.0, 3.0, 6.0, 10.0, 20.0, 30.0, 60.0, 5.0, 6.0, 7.0, 8.0];
        let features = PatchFeatures { channels: 2, values };
        assert_eq!(features.pooled(&images).values, [5.5, 11.0, 16.5, 33.0, 6.0, 7.0]);
    }

    #[test]
    fn the_least_cosine_is_that_of_the_worst_row_and_nan_is_worse() {
        let features = |values: [f32; 6]| PatchFeatures { channels: 2, values: values.to_vec() };
        let a = features([1.0, 0.0, 0.0, 2.0, 3.0, 3.0]);
        let b = features([5.0, 0.0, 4.0, 3.0, 1.0, 1.0]);
        assert!((least_cosine(&a, &b) - 0.6).abs() < 1e-12);
        assert!(least_cosine(&a, &features([f32::NAN, 0.0, 4.0, 3.0, 1.0, 1.0])).is_nan());
    }

    #[test]
    fn groups_of_one_image_stay_as_they_are() {
        let images = ImageBatch::whole(3, 2, 1, vec![0.0; 12]);
        let features = PatchFeatures { channels: 1, values: (0..12).map(|v| v as f32).collect() };
        assert_eq!(features.clone().pooled(&images), features);
    }
}
