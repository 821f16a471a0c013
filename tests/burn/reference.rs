//! The burn engine against `tests/reference/make_goldens.py`.

use std::num::NonZeroUsize;

use burn::backend::Flex;
use oddscan::{
    compute::{
        gpu::{BurnDistances, BurnEncoder, Precision},
        position::PositionResize,
    },
    domain::{PairDistances, SliceEncoder},
    numeric::{scoring::SearchReach, slice::ImageBatch},
};

use crate::{
    encoder::options,
    goldens::{Goldens, LAYERS, assert_close, weights},
};

#[test]
fn every_block_is_that_of_the_reference() {
    let goldens = Goldens::load();
    let images = ImageBatch { n_images: 3, side: 28, pixels: goldens.values("images") };
    for (position, mode) in [(PositionResize::Offset, "offset"), (PositionResize::Size, "size")] {
        for (final_norm, kind) in [(false, "plain"), (true, "normed")] {
            let options = options(&[1, 2, 3, 4], final_norm, position);
            let device = Default::default();
            let encoder =
                BurnEncoder::<Flex>::new(&weights(), &options, Precision::F32, device, "burn-cpu");
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
    let reaches =
        [(SearchReach::WholeVolume, "whole"), (SearchReach::Cells(NonZeroUsize::MIN), "cells")];
    for (reach, name) in reaches {
        for layer in LAYERS {
            let (a, b) = (goldens.tokens(0, layer), goldens.tokens(1, layer));
            let mut distances = BurnDistances::<Flex>::new(Default::default(), "burn-cpu");
            let found = distances.nearest(&a, &b, reach).unwrap();
            let there = goldens.values(&format!("{name}.distances.{layer}.0.1"));
            assert_close(&found.first_to_second, &there, 1e-5, name);
            let back = goldens.values(&format!("{name}.distances.{layer}.1.0"));
            assert_close(&found.second_to_first, &back, 1e-5, name);
        }
    }
}
