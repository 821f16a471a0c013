//! Brain extraction networks held to `make_linknet.py`.

use std::path::PathBuf;

use oddscan::{
    domain::{BrainNetwork, BrainPart, brain_weights::BrainWeights},
    numeric::projection::Normal,
};

use crate::goldens::{Goldens, assert_close};

/// Voxels along each edge of the image.
const SIDE: usize = 96;
/// Every so many voxels of the result are kept.
const STEP: usize = 211;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/linknet").join(name)
}

/// Two tiny networks of different widths.
pub fn weights() -> BrainWeights {
    oddscan::model::load_brain_weights(&fixture("weights.safetensors")).unwrap()
}

/// A cube of uniform noise, x fastest.
pub fn image() -> Vec<f32> {
    let mut normal = Normal::new(5);
    (0..SIDE.pow(3)).map(|_| normal.uniform() as f32).collect()
}

/// Both networks give the reference's probabilities.
pub fn check(network: &dyn BrainNetwork) {
    let (goldens, image) = (Goldens::open(&fixture("goldens.safetensors")), image());
    for (part, name) in [(BrainPart::Locate, "locate"), (BrainPart::Outline, "outline")] {
        let found = network.forward(part, &image, SIDE).unwrap();
        assert_eq!(found.len(), image.len());
        let kept: Vec<f32> = found.into_iter().step_by(STEP).collect();
        // f32 against f64, through 30 convolutions with norms that divide by the spread of as few
        // as 27 values. Swapped axes are off by 0.1 and more.
        assert_close(&kept, &goldens.values(name), 2e-5, name);
    }
}
