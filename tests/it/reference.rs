//! Every stage of the method against `tests/reference/make_goldens.py`, which was written from the
//! method and not from this code. Each stage starts from the golden values of the one before; the
//! last test goes all the way.

use std::{num::NonZeroUsize, ops::ControlFlow};

use oddscan::{
    compute::{
        EncoderOptions,
        cpu::{CpuDistances, CpuEncoder},
        position::{PositionResize, resize_position_embedding},
        weights::VitWeights,
    },
    domain::{PairDistances, SliceEncoder, tokenise::Tokeniser},
    numeric::{
        geometry::Axis,
        mask::{GridPlacement, map_samples, score_map},
        preprocess::{Canonical, CubeSettings, brain_mask, canonicalise, cube_affine},
        projection::Projection,
        scoring::{
            Fraction, MapProfile, NearestDistances, ScanScores, SearchReach, label_free_threshold,
            level_places, mean_over_layers, mutual_scores,
        },
        slice::ImageBatch,
        token::{TokenGrid, TokenSettings},
    },
};

use crate::goldens::{Goldens, LAYERS, SHAPE, SIDE, assert_close, shared, weights, worst_cosine};

const CUBE: CubeSettings = CubeSettings { side: 28, field_of_view_mm: 150.3, min_brain_ml: 1.0 };
const N_SCANS: usize = 3;
const MODES: [(PositionResize, &str); 2] =
    [(PositionResize::Offset, "offset"), (PositionResize::Size, "size")];

fn reaches() -> [(SearchReach, &'static str); 2] {
    [(SearchReach::WholeVolume, "whole"), (SearchReach::Cells(NonZeroUsize::MIN), "cells")]
}

fn keep() -> Fraction {
    Fraction::new(0.4).unwrap()
}

fn canonical(goldens: &Goldens, number: usize) -> Canonical {
    let scan = goldens.scan(number);
    canonicalise(&scan, &brain_mask(&scan, None).unwrap(), &CUBE).unwrap()
}

#[test]
fn the_settings_are_those_of_the_reference() {
    let text = include_str!("../fixtures/reference/settings.json");
    let settings = &serde_json::from_str::<serde_json::Value>(text).unwrap()["settings"];
    assert_eq!(settings["cube"]["side"], CUBE.side);
    assert_eq!(settings["cube"]["field_of_view_mm"], CUBE.field_of_view_mm);
    assert_eq!(settings["layers"], serde_json::json!(LAYERS));
    assert_eq!(settings["keep_fraction"], keep().get());
    let rest = [("place_share", 0.3), ("smoothing_cells", 0.4), ("clean_scan_fraction", 0.25)];
    for (key, value) in rest {
        assert_eq!(settings[key], value, "{key}");
    }
    let a = weights().architecture;
    let network = serde_json::json!({
        "channels": a.channels, "depth": a.depth, "hidden": a.hidden, "patch": a.patch,
        "position_side": a.position_side,
        // The file does not tell the heads: they are 64 channels wide, and at least one.
        "heads": settings["network"]["heads"],
    });
    assert_eq!(settings["network"], network);
}

#[test]
fn the_canonical_cube_is_that_of_the_reference() {
    let goldens = Goldens::load();
    for number in 0..N_SCANS {
        let volume = canonical(&goldens, number).volume;
        let cube = goldens.values(&format!("scan{number}.cube"));
        // Positions in f64 on both sides, values in f32 here.
        assert_close(volume.voxels(), &cube, 1e-5, "cube");
        let brain: Vec<f32> = volume.brain().iter().map(|&b| f32::from(u8::from(b))).collect();
        assert_eq!(brain, goldens.values(&format!("scan{number}.brain")));
    }
}

#[test]
fn the_position_embedding_is_that_of_the_reference() {
    let (goldens, weights) = (Goldens::load(), weights());
    for (mode, name) in MODES {
        let found = resize_position_embedding(&weights.position_embedding, 5, SIDE, 32, mode);
        assert_close(&found, &goldens.values(&format!("position.{name}")), 1e-6, name);
    }
}

#[test]
fn every_block_is_that_of_the_reference() {
    let goldens = Goldens::load();
    let images = ImageBatch { n_images: 3, side: 28, pixels: goldens.values("images") };
    for (position, mode) in MODES {
        for (final_norm, kind) in [(false, "plain"), (true, "normed")] {
            let options = EncoderOptions { layers: vec![1, 2, 3, 4], final_norm, position };
            let found = CpuEncoder::new(&weights(), &options).encode(&images).unwrap();
            for (layer, features) in (1..).zip(found) {
                let name = format!("features.{mode}.{kind}.{layer}");
                // f32 against f64, sums of at most 147 terms, four blocks deep.
                assert_close(&features.values, &goldens.values(&name), 2e-5, &name);
            }
        }
    }
}

#[test]
fn the_projection_is_that_of_the_reference() {
    let found = Projection::new(20_260_211, 32, 8);
    // Sine, cosine and logarithm may differ in the last bit of f64.
    assert_close(found.entries(), &Goldens::load().values("projection"), 1e-7, "projection");
}

fn tokens(goldens: &Goldens, number: usize) -> Vec<TokenGrid> {
    let options = EncoderOptions {
        layers: LAYERS.to_vec(),
        final_norm: true,
        position: PositionResize::Offset,
    };
    let settings = TokenSettings {
        views: vec![Axis::Axial, Axis::Coronal, Axis::Sagittal],
        slice_stride: 1,
        min_brain_fraction: 0.3,
        smoothing_cells: 0.4,
    };
    let encoder = Box::new(CpuEncoder::new(&weights(), &options));
    let projection = Projection::new(20_260_211, 32, 8);
    let mut tokeniser = Tokeniser::new(encoder, Some(projection), settings, LAYERS.len(), 14);
    let volume = canonical(goldens, number).volume;
    tokeniser.tokens(&volume, |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn the_tokens_are_those_of_the_reference() {
    let goldens = Goldens::load();
    for number in 0..N_SCANS {
        for (layer, found) in LAYERS.into_iter().zip(tokens(&goldens, number)) {
            assert_eq!(found.cells(), goldens.cells(number));
            let values: Vec<f32> = found.features().iter().map(|f| f.to_f32()).collect();
            let name = format!("scan{number}.tokens.{layer}");
            // One rounding step of f16 below 1.
            assert_close(&values, &goldens.values(&name), 5e-4, &name);
        }
    }
}

#[test]
fn the_distances_are_those_of_the_reference() {
    let goldens = Goldens::load();
    for (reach, name) in reaches() {
        for layer in LAYERS {
            for (own, other) in [(0, 1), (0, 2), (1, 2)] {
                let (a, b) = (goldens.tokens(own, layer), goldens.tokens(other, layer));
                let found = CpuDistances::new().nearest(&a, &b, reach).unwrap();
                let there = format!("{name}.distances.{layer}.{own}.{other}");
                assert_close(&found.first_to_second, &goldens.values(&there), 1e-6, &there);
                let back = format!("{name}.distances.{layer}.{other}.{own}");
                assert_close(&found.second_to_first, &goldens.values(&back), 1e-6, &back);
            }
        }
    }
}

/// The scores of all scans from columns `[own][layer]`.
fn levelled(goldens: &Goldens, columns: impl Fn(usize, usize) -> Vec<Vec<f32>>) -> Vec<ScanScores> {
    let cells: Vec<Vec<u32>> = (0..N_SCANS).map(|number| goldens.cells(number)).collect();
    let of_scan = |own: usize| {
        let layer = |layer| {
            mutual_scores(&NearestDistances::new(cells[own].len(), columns(own, layer)), keep())
        };
        mean_over_layers(&(0..LAYERS.len()).map(layer).collect::<Vec<_>>())
    };
    let mut scores: Vec<_> = (0..N_SCANS).map(of_scan).collect();
    level_places(&mut scores, &cells.iter().map(Vec::as_slice).collect::<Vec<_>>(), 0.3);
    scores.into_iter().map(ScanScores::new).collect()
}

fn others(own: usize) -> impl Iterator<Item = usize> {
    (0..N_SCANS).filter(move |&other| other != own)
}

#[test]
fn scores_threshold_and_map_are_those_of_the_reference() {
    let goldens = Goldens::load();
    for (_, reach) in reaches() {
        let scores = levelled(&goldens, |own, layer| {
            let column = |other| format!("{reach}.distances.{}.{own}.{other}", LAYERS[layer]);
            others(own).map(|other| goldens.values(&column(other))).collect()
        });
        let profile = |own: usize| {
            let samples = map_samples(SIDE, &goldens.cells(own), &scores[own].tokens);
            MapProfile::new(samples, Fraction::new(0.01).unwrap())
        };
        for (own, found) in scores.iter().enumerate() {
            let golden = |what: &str| goldens.values(&format!("{reach}.scan{own}.{what}"));
            assert_close(&found.tokens, &golden("scores"), 1e-6, "scores");
            assert_close(&[found.max], &golden("max"), 1e-6, "max");
            assert_close(&[found.top1_mean], &golden("top1_mean"), 1e-6, "top1_mean");
            let map = map(&goldens, own, &goldens.cells(own), &golden("scores"));
            assert_close(&map, &golden("map"), 1e-5, "map");
            let profiles: Vec<_> = others(own).map(profile).collect();
            let clean = Fraction::new(0.25).unwrap();
            let threshold = label_free_threshold(&profile(own), &profiles, clean);
            assert_close(&[threshold], &golden("threshold"), 1e-5, "threshold");
        }
    }
}

fn map(goldens: &Goldens, number: usize, cells: &[u32], scores: &[f32]) -> Vec<f32> {
    let scan = goldens.scan(number);
    let brain = brain_mask(&scan, None).unwrap();
    let cube = cube_affine(&brain, &CUBE).unwrap();
    score_map(cells, scores, &GridPlacement { side: SIDE, patch: 7, cube }, &brain)
}

#[test]
fn the_whole_way_from_scan_to_map_is_that_of_the_reference() {
    let goldens = Goldens::load();
    let grids: Vec<_> = (0..N_SCANS).map(|number| tokens(&goldens, number)).collect();
    for (reach, name) in reaches() {
        let scores = levelled(&goldens, |own, layer| {
            let column = |other: usize| {
                let (a, b) = (&grids[own][layer], &grids[other][layer]);
                CpuDistances::new().nearest(a, b, reach).unwrap().first_to_second
            };
            others(own).map(column).collect()
        });
        for (own, scores) in scores.iter().enumerate() {
            let found = map(&goldens, own, grids[own][0].cells(), &scores.tokens);
            assert_eq!(found.len(), SHAPE.n_voxels());
            let golden = goldens.values(&format!("{name}.scan{own}.map"));
            // Tokens are rounded to f16: 5e-4 each, and distances are sums over 24 of them.
            assert_close(&found, &golden, 1e-3, name);
        }
    }
}

#[test]
fn the_real_network_reaches_its_golden_features() {
    let (Some(weights), Some(small), Some(native)) = (
        shared("weights/dinov2_vits14.fp16.safetensors"),
        shared("weights/golden_astronaut_224.safetensors"),
        shared("weights/golden_astronaut_518.safetensors"),
    ) else {
        return;
    };
    let weights = VitWeights::load(&weights).unwrap();
    for (file, side, layers, normed) in
        [(small, 224, vec![3, 6, 9, 12], "last_norm"), (native, 518, vec![], "last_norm_518")]
    {
        let goldens = Goldens::open(&file);
        let images =
            ImageBatch { n_images: 1, side, pixels: goldens.values(&format!("input_{side}")) };
        let encode = |layers: &[usize], final_norm| {
            let position = PositionResize::Size;
            let options = EncoderOptions { layers: layers.to_vec(), final_norm, position };
            CpuEncoder::new(&weights, &options).encode(&images).unwrap()
        };
        let mut found = encode(&layers, false);
        let mut names: Vec<String> = layers.iter().map(|layer| format!("hidden_{layer}")).collect();
        found.extend(encode(&[12], true));
        names.push(normed.to_owned());
        for (found, name) in found.iter().zip(names) {
            // The first token is the class token.
            let expected = goldens.values(&name).split_off(found.channels);
            let cosine = worst_cosine(&found.values, &expected, found.channels);
            println!("{name}: token cosine at least {cosine:.7}");
            assert!(cosine >= 0.9999, "{name} {cosine}");
        }
    }
}
