//! The burn engine against `tests/reference/make_goldens.py`.

use burn::backend::Flex;
use oddscan::{
    compute::{
        burn::{BurnDistances, BurnEncoder},
        position::PositionResize,
    },
    domain::{PairDistances, SliceEncoder},
    numeric::slice::ImageBatch,
};

use crate::{
    encoder::options,
    goldens::{CUBE_SIDE, Goldens, LAYERS, assert_close, cases, weights},
};

#[test]
fn every_block_is_that_of_the_reference() {
    let goldens = Goldens::load();
    let images = ImageBatch::whole(3, CUBE_SIDE, 6, goldens.values("images"));
    for (position, mode) in [(PositionResize::Offset, "offset"), (PositionResize::Size, "size")] {
        for (final_norm, kind) in [(false, "plain"), (true, "normed")] {
            let options = options(&[1, 2, 3, 4], final_norm, position);
            let device = Default::default();
            let encoder = BurnEncoder::<Flex>::new(&weights(), &options, device, "burn-cpu");
            let found = encoder.unwrap().encode(&images).unwrap();
            for (layer, features) in (1..).zip(found) {
                let name = format!("features.{mode}.{kind}.{layer}");
                // f32 against f64, sums of at most 147 terms, four blocks deep.
                assert_close(&features.values, &goldens.values(&name), 2e-5, &name);
            }
        }
    }
}

#[test]
fn the_distances_are_those_of_the_reference() {
    let goldens = Goldens::load();
    for case in cases() {
        for layer in LAYERS {
            let (a, b) = (goldens.tokens(&case, 0, layer, 0), goldens.tokens(&case, 1, layer, 0));
            let mut distances = BurnDistances::<Flex>::new(Default::default(), "burn-cpu");
            let found = distances.nearest(&a, &b, case.reach).unwrap();
            let there = goldens.values(&format!("{}.distances.{layer}.0.0.1", case.name));
            assert_close(&found.first_to_second, &there, 1e-5, case.name);
            let back = goldens.values(&format!("{}.distances.{layer}.0.1.0", case.name));
            assert_close(&found.second_to_first, &back, 1e-5, case.name);
        }
    }
}
