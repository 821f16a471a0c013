//! Which voxels of a head are brain. One network finds the brain, the other one outlines it.
//!
//! The steps are those of deepbet 1.0.2 (Fisch et al. 2024, doi 10.1016/j.compbiomed.2024.108845),
//! which was trained on T1-weighted heads of healthy adults. There are two differences. The
//! probability is brought back to the scan's grid by trilinear interpolation, not by the nearest
//! voxel. A box is at least one voxel thick.

use std::ops::Range;

use rayon::prelude::*;

use super::{BrainNetwork, BrainPart, error::DeviceError};
use crate::numeric::{
    geometry::{Shape3, VoxelAxis},
    mask::regions,
    resample::{Between, Source, resample, sources},
    scoring::quantile,
    volume::RawVolume,
};

/// Voxels along each edge of the whole field of view, in which the brain is located.
const LOCATE_SIDE: usize = 128;
/// Voxels along each edge of the box in which it is outlined.
const OUTLINE_SIDE: usize = 256;
/// How the scan's voxels become those of the networks.
const IN: Between = Between::Nearest;
/// How probabilities are brought back to the scan's voxels.
const BACK: Between = Between::Linear;
/// Intensities are clipped at these quantiles, at the dark and the bright end.
const CLIPPED: [f64; 2] = [0.005, 0.995];
/// Mean and standard deviation of what the networks were trained on.
const TRAINED: [f64; 2] = [0.449, 0.226];
/// A plane belongs to the brain's box if the brain covers more than this share of it.
const MIN_COVERED: f64 = 0.02;
/// The box is wider than the brain by this share on each side.
const MARGIN: f32 = 0.1;

/// Where brain is likely in a scan.
#[derive(Debug, Clone, PartialEq)]
pub struct BrainProbability {
    /// In [0, 1], on the scan's own grid, x fastest; 0 outside of the box.
    pub values: Vec<f32>,
    /// The box that was searched, in voxels along each axis of the scan's grid.
    pub searched: [Range<usize>; 3],
}

/// The probability of brain in each voxel; `None` if no brain is found in the scan.
///
/// # Errors
/// If the device of the network fails.
pub fn brain_probability(
    network: &dyn BrainNetwork,
    scan: &RawVolume,
) -> Result<Option<BrainProbability>, DeviceError> {
    let head = Head::of(scan);

    let mut image = head.cube(&head.whole(), LOCATE_SIDE);
    let Some(greys) = Greys::of(&image) else { return Ok(None) };
    greys.normalise(&mut image);
    let found = network.forward(BrainPart::Locate, &image, LOCATE_SIDE)?;
    let Some(located) = locate(&found, head.extents()) else { return Ok(None) };

    let mut image = head.cube(&located, OUTLINE_SIDE);
    greys.normalise(&mut image);
    let brain = network.forward(BrainPart::Outline, &image, OUTLINE_SIDE)?;
    Ok(Some(head.on_scan(&brain, &located)))
}

/// A scan with RAS+ axes, without a copy of its voxels.
struct Head<'a> {
    scan: &'a RawVolume,
    /// For each axis of the head, the axis of the scan.
    axes: [VoxelAxis; 3],
}

/// Voxels along each axis of a head.
type Box3 = [Range<usize>; 3];

impl<'a> Head<'a> {
    fn of(scan: &'a RawVolume) -> Self {
        Self { scan, axes: scan.affine.closest_axes() }
    }

    fn extents(&self) -> [usize; 3] {
        self.axes.map(|axis| self.scan.shape.0[axis.index])
    }

    fn whole(&self) -> Box3 {
        self.extents().map(|n| 0..n)
    }

    /// Converts an index along an axis of the head to one along the scan's axis, or back.
    fn mirrored(&self, axis: usize, index: usize) -> usize {
        if self.axes[axis].is_reversed { self.extents()[axis] - 1 - index } else { index }
    }

    /// A box of the head as a cube of `side` voxels.
    fn cube(&self, part: &Box3, side: usize) -> Vec<f32> {
        let axes = [0, 1, 2].map(|axis| {
            let stride = stride(self.scan.shape, self.axes[axis].index);
            let start = part[axis].start;
            let place = |index| self.mirrored(axis, start + index) * stride;
            let sources = sources(part[axis].len(), side, IN);
            sources.into_iter().map(|source| source.map(place)).collect()
        });
        resample(&self.scan.voxels, &axes)
    }

    /// Brings the probabilities of a cube back to the box of the head that it shows.
    fn on_scan(&self, cube: &[f32], part: &Box3) -> BrainProbability {
        let shape = Shape3::cube(OUTLINE_SIDE);
        let mut searched = [0..0, 0..0, 0..0];
        let mut axes: [Vec<Source>; 3] = Default::default();

        for (axis, range) in part.iter().enumerate() {
            let VoxelAxis { index: on_scan, is_reversed } = self.axes[axis];
            let place = |index| index * stride(shape, axis);
            let sources = sources(OUTLINE_SIDE, range.len(), BACK);
            axes[on_scan] = sources.into_iter().map(|source| source.map(place)).collect();
            if is_reversed {
                axes[on_scan].reverse();
            }
            let ends = [range.start, range.end - 1].map(|index| self.mirrored(axis, index));
            searched[on_scan] = ends[0].min(ends[1])..ends[0].max(ends[1]) + 1;
        }

        let values = pasted(&resample(cube, &axes), self.scan.shape, &searched);
        BrainProbability { values, searched }
    }
}

/// Voxels from one index to the next along an axis.
fn stride(shape: Shape3, axis: usize) -> usize {
    shape.0[..axis].iter().product()
}

/// The values of a box in a grid of zeros.
fn pasted(values: &[f32], shape: Shape3, part: &Box3) -> Vec<f32> {
    let mut all = vec![0.0; shape.n_voxels()];
    let [x, y, z] = part.clone();
    let rows = z.flat_map(|z| y.clone().map(move |y| (y, z)));
    for ((y, z), row) in rows.zip(values.chunks_exact(x.len())) {
        let start = shape.offset([x.start, y, z]);
        all[start..start + row.len()].copy_from_slice(row);
    }
    all
}

/// The range of intensities of a scan.
struct Greys {
    low: f32,
    high: f32,
}

impl Greys {
    /// `None` if the image has no contrast.
    fn of(image: &[f32]) -> Option<Self> {
        let mut sorted = image.to_vec();
        let [low, high] = CLIPPED.map(|share| quantile(&mut sorted, share) as f32);
        (high > low).then_some(Self { low, high })
    }

    /// Clips to the range, then shifts and scales to the mean and the deviation of the training.
    fn normalise(&self, image: &mut [f32]) {
        /// Fixes the order of the sums, whatever the number of threads.
        const CHUNK: usize = 1 << 16;
        let Self { low, high } = *self;

        let sums: Vec<[f64; 2]> = image
            .par_chunks_mut(CHUNK)
            .map(|chunk| {
                let mut sums = [0.0; 2];
                for value in chunk {
                    *value = ((*value - low) / (high - low)).clamp(0.0, 1.0);
                    let value = f64::from(*value);
                    sums = [sums[0] + value, sums[1] + value * value];
                }
                sums
            })
            .collect();

        let n = image.len() as f64;
        let [sum, squares] = [0, 1].map(|moment| sums.iter().map(|sums| sums[moment]).sum::<f64>());
        let mean = sum / n;
        // Unbiased, as torch.std. In a box without contrast every voxel becomes the mean.
        let variance = ((squares - mean * sum) / (n - 1.0)).max(0.0);
        let scale = if variance > 0.0 { TRAINED[1] / variance.sqrt() } else { 0.0 };
        let shift = TRAINED[0] - scale * mean;

        let map = |value: &mut f32| *value = (scale * f64::from(*value) + shift) as f32;
        image.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().for_each(map));
    }
}

/// The box, with a margin, around the largest connected part with a probability above 0.5. It is in
/// voxels of a head of these extents.
fn locate(probability: &[f32], extents: [usize; 3]) -> Option<Box3> {
    let shape = Shape3::cube(LOCATE_SIDE);
    let likely = probability.iter().map(|&value| value > 0.5).collect();
    let brain = regions(likely, shape, 1).into_iter().next()?;

    let mut covered = [[0_usize; LOCATE_SIDE]; 3];
    for voxel in brain.into_iter().map(|offset| shape.voxel(offset)) {
        (0..3).for_each(|axis| covered[axis][voxel[axis]] += 1);
    }

    let mut located = [0..0, 0..0, 0..0];
    for axis in 0..3 {
        let is_brain = |&n: &usize| n as f64 / (LOCATE_SIDE * LOCATE_SIDE) as f64 > MIN_COVERED;
        let first = covered[axis].iter().position(is_brain)?;
        let last = covered[axis].iter().rposition(is_brain)?;
        located[axis] = widened(first..last + 1, extents[axis]);
    }
    Some(located)
}

/// Converts planes of the cube to voxels of an axis with `n` voxels, and adds the margin.
///
/// In f32 and with ties to even, as PyTorch computes them.
fn widened(planes: Range<usize>, n: usize) -> Range<usize> {
    let scale = n as f32 / LOCATE_SIDE as f32;
    let centre = (scale * ((planes.start + planes.end) as f32 / 2.0)).round_ties_even();
    let size = ((1.0 + 2.0 * MARGIN) * (scale * planes.len() as f32)).round_ties_even();
    // The casts turn negative values into 0.
    let start = ((centre - size / 2.0) as usize).min(n - 1);
    start..((centre + size / 2.0) as usize).clamp(start + 1, n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::geometry::Affine;

    /// Takes all voxels above the mean for brain.
    struct Bright;

    impl BrainNetwork for Bright {
        fn forward(
            &self,
            _: BrainPart,
            image: &[f32],
            side: usize,
        ) -> Result<Vec<f32>, DeviceError> {
            assert_eq!(image.len(), side.pow(3));
            Ok(image.iter().map(|&v| f32::from(u8::from(v > TRAINED[0] as f32))).collect())
        }
    }

    /// A bright box `[4..12, 10..22, 5..20]` in a head of `[20, 30, 26]` voxels along RAS+ axes,
    /// and a bright speck far from it.
    fn value([x, y, z]: [usize; 3]) -> f32 {
        let is_brain = (4..12).contains(&x) && (10..22).contains(&y) && (5..20).contains(&z);
        if is_brain || [x, y, z] == [18, 27, 24] { 90.0 } else { (x + y + z) as f32 / 10.0 }
    }

    const EXTENTS: [usize; 3] = [20, 30, 26];

    fn head(
        shape: Shape3,
        rows: [[f64; 4]; 3],
        to_head: impl Fn([usize; 3]) -> [usize; 3],
    ) -> RawVolume {
        let voxels = (0..shape.n_voxels()).map(|o| value(to_head(shape.voxel(o)))).collect();
        RawVolume { shape, voxels, affine: Affine::new(rows).unwrap() }
    }

    fn straight() -> RawVolume {
        let rows = [[2.0, 0.1, 0.0, 0.0], [0.0, 1.0, 0.2, 0.0], [0.1, 0.0, 3.0, 0.0]];
        head(Shape3(EXTENTS), rows, |v| v)
    }

    #[test]
    fn the_box_is_searched_with_its_margin_and_found_where_it_is() {
        let scan = straight();
        let found = brain_probability(&Bright, &scan).unwrap().unwrap();
        // 8, 12 and 15 voxels around 8, 16 and 12.5, times 1.2: 9.6, 14.4 and 18.
        assert_eq!(found.searched, [3..13, 9..23, 3..21]);
        for (offset, &probability) in found.values.iter().enumerate() {
            let [x, y, z] = scan.shape.voxel(offset);
            let is_brain = (4..12).contains(&x) && (10..22).contains(&y) && (5..20).contains(&z);
            assert_eq!(probability > 0.5, is_brain, "{x} {y} {z}: {probability}");
        }
    }

    #[test]
    fn the_order_of_the_voxels_in_the_file_does_not_matter() {
        let expected = brain_probability(&Bright, &straight()).unwrap().unwrap();
        // Sagittal slices: voxel x runs to the back, voxel y up, voxel z to the left.
        let shape = Shape3([EXTENTS[1], EXTENTS[2], EXTENTS[0]]);
        let rows = [[0.0, 0.1, -2.0, 0.0], [-1.0, 0.2, 0.0, 0.0], [0.1, 3.0, 0.0, 0.0]];
        let to_head = |[x, y, z]: [usize; 3]| [EXTENTS[0] - 1 - z, EXTENTS[1] - 1 - x, y];
        let found = brain_probability(&Bright, &head(shape, rows, to_head)).unwrap().unwrap();
        for (offset, &probability) in found.values.iter().enumerate() {
            let there = Shape3(EXTENTS).offset(to_head(shape.voxel(offset)));
            assert_eq!(probability, expected.values[there]);
        }
        assert_eq!(found.searched, [30 - 23..30 - 9, 3..21, 20 - 13..20 - 3]);
    }

    #[test]
    fn a_scan_without_contrast_or_with_specks_alone_has_no_brain() {
        let mut scan = straight();
        scan.voxels.fill(7.0);
        assert_eq!(brain_probability(&Bright, &scan).unwrap(), None);
        let is_speck = |offset: usize| scan.shape.voxel(offset).iter().all(|v| v % 9 == 0);
        let specks = (0..scan.voxels.len()).map(|o| f32::from(u8::from(is_speck(o)))).collect();
        assert_eq!(
            brain_probability(&Bright, &RawVolume { voxels: specks, ..scan }).unwrap(),
            None
        );
    }

    #[test]
    fn an_image_is_normalised_to_the_statistics_of_the_training() {
        let mut image: Vec<f32> = (0..200_001).map(|v| v as f32).collect();
        let greys = Greys::of(&image).unwrap();
        assert_eq!((greys.low, greys.high), (1000.0, 199_000.0));
        greys.normalise(&mut image);
        let n = image.len() as f64;
        let mean = image.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let squares = image.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>();
        let deviation = (squares / (n - 1.0)).sqrt();
        assert!((mean - 0.449).abs() < 1e-6 && (deviation - 0.226).abs() < 1e-6);
        assert_eq!((image[0], image[200_000]), (image[900], image[199_100]));
    }

    #[test]
    fn boxes_keep_to_the_grid_and_are_never_empty() {
        // 128 planes of 128: a margin would go beyond both ends.
        assert_eq!(widened(0..128, 240), 0..240);
        // Centre 24 * 2.0 = 48, size 1.2 * 32 = 38.4 rounds to 38.
        assert_eq!(widened(16..32, 256), 29..67);
        assert_eq!(widened(2..9, 1), 0..1);
        assert_eq!(widened(120..128, 3), 2..3);
    }
}
