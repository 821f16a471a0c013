//! Tests of a device before it is used, because wrong results would be worse than slow ones.

use std::num::NonZeroUsize;

use half::f16;

use crate::{
    compute::{
        EncoderOptions, Precision,
        cpu::{CpuBrainNetwork, CpuDistances, CpuEncoder},
        position::PositionResize,
    },
    domain::{
        BrainNetwork, BrainPart, GridName, PairDistances, SliceEncoder,
        brain_weights::BrainWeights,
        error::DeviceError,
        scan::ScanId,
        weights::{Architecture, VitWeights},
    },
    numeric::{
        geometry::Shape3,
        projection::Normal,
        scoring::{PairColumns, SearchReach},
        slice::{ImageBatch, PatchFeatures, least_cosine},
        token::TokenGrid,
    },
};

/// The least cosine between the test's features and those of the CPU in f32. bf16 on a CPU has
/// 0.99996.
const LEAST_COSINE: f64 = 0.999;

/// The largest difference between a probability of brain in the test and that of the CPU in f32.
/// Weights and image rounded to TF32, as tensor cores may do, change it by 0.006. Swapped axes
/// change it by 0.1 or more in the tiny networks of oddscan's own tests.
const MOST_OFF_BRAIN: f32 = 0.02;

fn failed(device: &str, found: &str) -> DeviceError {
    let message = format!(
        "found {found}; use encoder.device = \"cpu\" and report the GPU and driver version"
    );
    DeviceError::Failed { device: device.to_owned(), message }
}

/// Encodes groups of images without some of their patches, with a small network that `make` copies
/// to the device.
///
/// # Errors
/// If the features differ from the CPU's, or the device fails.
pub(super) fn try_small_network(
    make: impl FnOnce(&VitWeights, &EncoderOptions) -> Result<Box<dyn SliceEncoder>, DeviceError>,
    precision: Precision,
) -> Result<(), DeviceError> {
    const PATCH: usize = 14;
    let architecture = Architecture {
        channels: 128,
        depth: 2,
        heads: 2,
        hidden: 256,
        patch: PATCH,
        registers: 1,
        position_side: 5,
    };
    let mut weights = VitWeights::random(architecture, 1).into_grey();
    for block in &mut weights.blocks {
        // The branches count in full, so that an error in them is visible.
        block.scale1.fill(1.0);
        block.scale2.fill(1.0);
    }
    let options = |precision| EncoderOptions {
        layers: vec![1, 2],
        final_norm: true,
        position: PositionResize::Offset,
        precision: Some(precision),
    };
    let (mut normal, side) = (Normal::new(2), 13 * PATCH);
    let patches = vec![vec![0, 17, 168], (0..169).collect(), (0..169).step_by(2).collect()];
    let pixels = (0..6 * side * side).map(|_| normal.uniform() as f32).collect();
    let images = ImageBatch { side, pixels, group: 2, patches };
    let mut device = make(&weights, &options(precision))?;
    let found = device.encode(&images)?;
    let expected = CpuEncoder::new(&weights, &options(Precision::F32)).encode(&images)?;
    let is_alike = |(a, b): (&PatchFeatures, &PatchFeatures)| {
        a.values.len() == b.values.len() && least_cosine(a, b) >= LEAST_COSINE
    };
    if found.len() == expected.len() && found.iter().zip(&expected).all(is_alike) {
        return Ok(());
    }
    Err(failed(device.device(), "features other than the CPU's"))
}

/// Encodes blank images with the network in use. This shows now, and not only at the first scan,
/// whether the network fits into memory and whether its values fit the number format. It also
/// reserves the memory of a batch before other programs take it.
///
/// # Errors
/// If a feature is not finite, or the device fails.
pub(super) fn try_blank_images(
    encoder: &mut dyn SliceEncoder,
    colours: usize,
    mut n_images: usize,
) -> Result<(), DeviceError> {
    let (patch, side) = (encoder.patch(), 16 * encoder.patch());
    let features = loop {
        let pixels = vec![0.0; n_images * colours * side * side];
        match encoder.encode(&ImageBatch::whole(n_images, side, patch, pixels)) {
            // Batches of scans will become smaller, too.
            Err(DeviceError::OutOfMemory { .. }) if n_images > 1 => n_images /= 2,
            done => break done?,
        }
    };
    if features.iter().flat_map(|layer| &layer.values).all(|value| value.is_finite()) {
        return Ok(());
    }
    Err(failed(encoder.device(), "NaN or infinite features for blank images"))
}

/// Compares a pair of artificial scans over the whole volume and within reach. If the device keeps
/// tokens, it also compares kept tokens.
///
/// # Errors
/// If the distances differ from the CPU's, or the device fails.
pub(super) fn try_distances(
    distances: &mut dyn PairDistances,
    device: &str,
) -> Result<(), DeviceError> {
    const CHANNELS: usize = 72;
    let tokens = |seed: u64| {
        let mut normal = Normal::new(seed);
        // One scan has no tokens at the far end, so that some tokens of the other have none within
        // reach.
        let is_kept = |&cell: &u32| u64::from(cell) % 7 != seed && (seed == 1 || cell < 320);
        let cells: Vec<u32> = (0..512).filter(is_kept).collect();
        let features = (0..cells.len() * CHANNELS).map(|_| f16::from_f64(normal.next())).collect();
        TokenGrid::new(Shape3::cube(8), CHANNELS, cells, features).expect("cells ascend")
    };
    let (first, second) = (tokens(1), tokens(2));
    let names = [1, 2].map(|n| GridName { scan: ScanId([n; 32]), grid: 0 });
    distances.keep(names[0], &first)?;
    distances.keep(names[1], &second)?;
    for reach in [SearchReach::WholeVolume, SearchReach::Patches(NonZeroUsize::MIN)] {
        let both =
            |columns: PairColumns| [columns.first_to_second, columns.second_to_first].concat();
        let given = distances.nearest(&first, &second, reach)?;
        let kept = distances.nearest_of_kept(names[0], &names[1..], reach)?.pop().flatten();
        let expected = both(CpuDistances::in_single().nearest(&first, &second, reach)?);
        for found in [Some(given), kept].into_iter().flatten().map(both) {
            // NaN is never alike. Infinity is alike only to infinity.
            let is_like = |(a, b): (&f32, &f32)| a == b || (a - b).abs() <= 1e-3 * b.min(f32::MAX);
            if found.len() != expected.len() || !found.iter().zip(&expected).all(is_like) {
                return Err(failed(device, "distances other than the CPU's"));
            }
        }
    }
    Ok(())
}

/// Runs both networks of brain extraction on an image of noise. They have the shapes of `weights`,
/// but random values.
///
/// # Errors
/// If the probabilities differ from the CPU's, or the device fails.
pub(super) fn try_brain_network<N: BrainNetwork>(
    make: impl FnOnce(&BrainWeights) -> Result<N, DeviceError>,
    weights: &BrainWeights,
    device: &str,
) -> Result<(), DeviceError> {
    /// With this side, the coarsest stage has 3 x 3 x 3 voxels, so that its norms have an effect.
    const SIDE: usize = 96;
    let weights = weights.random_alike(3);
    let mut normal = Normal::new(4);
    let image: Vec<f32> = (0..SIDE.pow(3)).map(|_| normal.uniform() as f32).collect();

    let network = make(&weights)?;
    let cpu = CpuBrainNetwork::new(weights);
    for part in [BrainPart::Locate, BrainPart::Outline] {
        let found = network.forward(part, &image, SIDE)?;
        let expected = cpu.forward(part, &image, SIDE)?;
        // NaN is never alike.
        let is_like = |(a, b): (&f32, &f32)| (a - b).abs() <= MOST_OFF_BRAIN;
        if found.len() != expected.len() || !found.iter().zip(&expected).all(is_like) {
            return Err(DeviceError::Failed {
                device: device.to_owned(),
                message: "found probabilities of brain other than the CPU's; report the GPU and \
                          driver version"
                    .to_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The CPU, with one feature of the last layer, one distance, or one voxel of the second
    /// network that is wrong.
    struct Wrong<T>(T, f32);

    impl SliceEncoder for Wrong<CpuEncoder> {
        fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError> {
            let mut features = self.0.encode(images)?;
            features.last_mut().unwrap().values[1000] += self.1;
            Ok(features)
        }

        fn patch(&self) -> usize {
            self.0.patch()
        }

        fn channels(&self) -> usize {
            self.0.channels()
        }

        fn device(&self) -> &str {
            "wrong"
        }
    }

    impl PairDistances for Wrong<CpuDistances> {
        fn nearest(
            &mut self,
            first: &TokenGrid,
            second: &TokenGrid,
            reach: SearchReach,
        ) -> Result<PairColumns, DeviceError> {
            let mut columns = self.0.nearest(first, second, reach)?;
            columns.second_to_first[7] += self.1;
            Ok(columns)
        }
    }

    #[test]
    fn a_device_with_one_wrong_feature_is_found_out() {
        let trial = |off: f32| {
            let make = |weights: &VitWeights, options: &EncoderOptions| {
                let encoder = Wrong(CpuEncoder::new(weights, options), off);
                Ok(Box::new(encoder) as Box<dyn SliceEncoder>)
            };
            try_small_network(make, Precision::Bf16)
        };
        trial(0.0).unwrap();
        for off in [10.0, f32::NAN] {
            let error = trial(off).unwrap_err().to_string();
            assert!(error.contains("wrong") && error.contains("features other than"), "{error}");
        }
    }

    #[test]
    fn a_device_with_one_wrong_distance_is_found_out() {
        let trial = |off: f32| try_distances(&mut Wrong(CpuDistances::new(), off), "wrong");
        trial(0.0).unwrap();
        for off in [0.1, f32::NAN, f32::INFINITY] {
            let error = trial(off).unwrap_err().to_string();
            assert!(error.contains("distances other than"), "{error}");
        }
    }

    impl BrainNetwork for Wrong<CpuBrainNetwork> {
        fn forward(
            &self,
            part: BrainPart,
            image: &[f32],
            side: usize,
        ) -> Result<Vec<f32>, DeviceError> {
            let mut probability = self.0.forward(part, image, side)?;
            if part == BrainPart::Outline {
                probability[5000] += self.1;
            }
            Ok(probability)
        }
    }

    #[test]
    fn a_device_with_one_wrong_voxel_of_brain_is_found_out() {
        let path =
            concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/linknet/weights.safetensors");
        let weights = BrainWeights::from_bytes(&std::fs::read(path).unwrap()).unwrap();
        let trial = |off: f32| {
            let make =
                |weights: &BrainWeights| Ok(Wrong(CpuBrainNetwork::new(weights.clone()), off));
            try_brain_network(make, &weights, "wrong")
        };
        trial(0.0).unwrap();
        for off in [0.1, f32::NAN] {
            let error = trial(off).unwrap_err().to_string();
            assert!(error.contains("wrong") && error.contains("probabilities"), "{error}");
        }
    }

    #[test]
    fn numbers_that_are_none_are_found_in_the_features_of_a_blank_image() {
        let architecture = Architecture::named("dinov2_vits14").unwrap();
        let weights = VitWeights::random(Architecture { depth: 1, ..architecture }, 3);
        let position = PositionResize::Offset;
        let options =
            EncoderOptions { layers: vec![1], final_norm: true, position, precision: None };
        let trial = |off: f32| {
            let mut encoder = Wrong(CpuEncoder::new(&weights, &options), off);
            try_blank_images(&mut encoder, weights.colours(), 2)
        };
        trial(0.0).unwrap();
        assert!(trial(f32::INFINITY).unwrap_err().to_string().contains("infinite features"));
    }
}
