//! The network.

use burn::backend::Flex;
use oddscan::{
    compute::{
        EncoderOptions, Precision, burn::BurnEncoder, cpu::CpuEncoder, position::PositionResize,
    },
    domain::{SliceEncoder, weights::VitWeights},
    numeric::slice::{ImageBatch, PatchFeatures},
};

use crate::{
    goldens::{Goldens, shared, worst_cosine},
    tiny,
};

pub fn options(layers: &[usize], final_norm: bool, position: PositionResize) -> EncoderOptions {
    let (layers, precision) = (layers.to_vec(), Some(Precision::F32));
    EncoderOptions { layers, final_norm, position, precision }
}

fn burn(weights: &VitWeights, options: &EncoderOptions, precision: Precision) -> BurnEncoder<Flex> {
    let options = EncoderOptions { precision: Some(precision), ..options.clone() };
    BurnEncoder::new(weights, &options, Default::default(), "burn-cpu").unwrap()
}

#[test]
fn every_layer_equals_that_of_the_native_engine() {
    for registers in [0, 4] {
        let weights = tiny::network(registers);
        for (final_norm, position) in
            [(true, PositionResize::Offset), (false, PositionResize::Size)]
        {
            let options = options(&[1, 2, 4], final_norm, position);
            let images = tiny::images(2);
            let expected = CpuEncoder::new(&weights, &options).encode(&images).unwrap();
            let found = burn(&weights, &options, Precision::F32).encode(&images).unwrap();
            assert_eq!(found.len(), 3);
            for (found, expected) in found.iter().zip(&expected) {
                assert_close(found, expected);
            }
        }
    }
}

#[test]
fn groups_of_images_with_patches_left_out_equal_those_of_the_native_engine() {
    let weights = tiny::network(4);
    let options = options(&[1, 4], true, PositionResize::Offset);
    let images = tiny::some_patches(5);
    let expected = CpuEncoder::new(&weights, &options).encode(&images).unwrap();
    let found = burn(&weights, &options, Precision::F32).encode(&images).unwrap();
    assert_eq!(found.len(), 2);
    for (found, expected) in found.iter().zip(&expected) {
        assert_close(found, expected);
    }
}

/// Both in f32 over sums of at most 192 terms of size one, four blocks deep.
fn assert_close(found: &PatchFeatures, expected: &PatchFeatures) {
    assert_eq!(found.channels, expected.channels);
    assert_eq!(found.values.len(), expected.values.len());
    for (found, expected) in found.values.iter().zip(&expected.values) {
        assert!((found - expected).abs() < 1e-4 * expected.abs().max(1.0), "{found} {expected}");
    }
}

#[test]
fn an_image_has_the_same_features_in_any_batch() {
    let weights = tiny::network(0);
    let options = options(&[2], true, PositionResize::Offset);
    let mut encoder = burn(&weights, &options, Precision::F32);
    let batch = tiny::images(3);
    let together = encoder.encode(&batch).unwrap().remove(0);
    let n_pixels = batch.pixels.len() / 3;
    for index in 0..3 {
        let pixels = batch.pixels[index * n_pixels..(index + 1) * n_pixels].to_vec();
        let single = ImageBatch::whole(1, batch.side, tiny::PATCH, pixels);
        let alone = encoder.encode(&single).unwrap().remove(0);
        let values = together.values.chunks(alone.values.len()).nth(index).unwrap().to_vec();
        assert_close(&PatchFeatures { values, ..alone.clone() }, &alone);
    }
}

#[test]
fn half_precision_keeps_the_direction_of_the_features() {
    let weights = tiny::network(4);
    let options = options(&[4], true, PositionResize::Offset);
    let images = tiny::images(1);
    let expected = burn(&weights, &options, Precision::F32).encode(&images).unwrap().remove(0);
    // Four linear layers per block round their factors: 2^-9 relative in bf16, 2^-12 in f16.
    for (precision, floor) in [(Precision::Bf16, 0.9999), (Precision::F16, 0.99999)] {
        let found = burn(&weights, &options, precision).encode(&images).unwrap().remove(0);
        let cosine = worst_cosine(&found.values, &expected.values, expected.channels);
        println!("{precision:?}: token cosine at least {cosine:.7}");
        assert!(cosine > floor && cosine < 1.0, "{precision:?} {cosine}");
    }
}

#[test]
fn an_image_that_is_no_multiple_of_the_patch_is_an_error_that_says_so() {
    let weights = tiny::network(0);
    let mut encoder = burn(&weights, &options(&[1], true, PositionResize::Size), Precision::F32);
    let images = ImageBatch::whole(1, 29, tiny::PATCH, vec![0.0; 3 * 29 * 29]);
    let error = encoder.encode(&images).unwrap_err().to_string();
    assert!(error.contains("burn-cpu") && error.contains("multiple of the patch"), "{error}");
}

#[test]
fn the_real_network_reaches_the_golden_features() {
    let (Some(weights), Some(golden)) = (
        shared("weights/dinov2_vits14.fp16.safetensors"),
        shared("weights/golden_astronaut_224.safetensors"),
    ) else {
        return;
    };
    let weights = oddscan::model::load_weights(&weights).unwrap();
    let golden = Goldens::open(&golden);
    let images = ImageBatch::whole(1, 224, 14, golden.values("input_224"));
    let plain = options(&[3, 6, 9, 12], false, PositionResize::Size);
    let normed = options(&[12], true, PositionResize::Size);
    let mut found = burn(&weights, &plain, Precision::F32).encode(&images).unwrap();
    found.extend(burn(&weights, &normed, Precision::F32).encode(&images).unwrap());
    let names = ["hidden_3", "hidden_6", "hidden_9", "hidden_12", "last_norm"];
    for (found, name) in found.iter().zip(names) {
        // The first token is the class token.
        let expected = golden.values(name).split_off(384);
        let cosine = worst_cosine(&found.values, &expected, 384);
        println!("{name}: token cosine at least {cosine:.7}");
        assert!(cosine >= 0.9999, "{name} {cosine}");
    }
}
