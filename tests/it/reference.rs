//! Every stage of the method against `tests/reference/make_goldens.py`, which was written from the
//! method and not from this code. Each stage starts from the golden values of the one before. The
//! last test runs all stages.

use std::ops::ControlFlow;

use oddscan::{
    compute::{
        EncoderOptions, Precision,
        cpu::{CpuDistances, CpuEncoder},
        position::{PositionResize, resize_position_embedding},
        tokenise::Tokeniser,
    },
    config::Config,
    domain::{
        PairDistances, SliceEncoder,
        error::ScanError,
        evidence::NoFineVolumes,
        scan::ScanId,
        window::Membership,
        window_scores::{ScoredMember, WindowDistances, WindowScores, score_members},
    },
    numeric::{
        fusion::Weights,
        mask::{GridPlacement, score_map},
        preprocess::{Canonical, CubeSettings, brain_mask, canonicalise, cube_affine},
        projection::Projection,
        scoring::{Fraction, ScanScores, SearchReach, label_free_threshold},
        slice::ImageBatch,
        token::TokenGrid,
    },
};
use serde_json::{Value, json};

use crate::goldens::{
    CUBE_SIDE, Case, Goldens, LAYERS, SHAPE, SIDE, assert_close, cases, shared, weights,
    worst_cosine,
};

const SEED: u64 = 20_260_211;
const CUBE: CubeSettings =
    CubeSettings { side: CUBE_SIDE, field_of_view_mm: 150.3, min_brain_ml: 1.0 };
const N_SCANS: usize = 3;
const MODES: [(PositionResize, &str); 2] =
    [(PositionResize::Offset, "offset"), (PositionResize::Size, "size")];

fn canonical(goldens: &Goldens, number: usize) -> Canonical {
    let scan = goldens.scan(number);
    canonicalise(&scan, &brain_mask(&scan, None).unwrap(), &CUBE, None, None).unwrap()
}

#[test]
fn the_settings_are_those_of_the_reference() {
    let text = include_str!("../fixtures/reference/settings.json");
    let settings = &serde_json::from_str::<Value>(text).unwrap()["settings"];
    assert_eq!(settings["cube"]["side"], CUBE.side);
    assert_eq!(settings["cube"]["field_of_view_mm"], CUBE.field_of_view_mm);
    assert_eq!(settings["layers"], json!(LAYERS));
    for case in cases() {
        let method = json!({
            "projection": case.projected.then(|| json!({ "seed": SEED, "channels": 8 })),
            "join_views": case.tokens.join_views,
            "slices_per_token": case.tokens.slices_per_token,
            "skip_background": case.tokens.skip_background,
            "smoothing_patches": case.tokens.smoothing_patches,
            "reach_patches": match case.reach {
                SearchReach::WholeVolume => None,
                SearchReach::Patches(cells) => Some(cells),
            },
            "keep_fraction": case.keep_fraction,
            "positional_correction": case.positional_correction,
        });
        assert_eq!(settings["methods"][case.name], method);
    }
    let a = weights().architecture;
    let network = json!({
        "channels": a.channels, "depth": a.depth, "hidden": a.hidden, "patch": a.patch,
        "position_side": a.position_side,
        // The file does not state the number of heads. Each has 64 channels, and there is at least
        // one.
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
    let images = ImageBatch::whole(3, CUBE_SIDE, 6, goldens.values("images"));
    for (position, mode) in MODES {
        for (final_norm, kind) in [(false, "plain"), (true, "normed")] {
            let options = EncoderOptions {
                layers: vec![1, 2, 3, 4],
                final_norm,
                position,
                precision: Some(Precision::F32),
            };
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
    let found = Projection::new(SEED, 32, 8);
    // Sine, cosine and logarithm may differ in the last bit of f64.
    assert_close(found.entries(), &Goldens::load().values("projection"), 1e-7, "projection");
}

/// The grids of tokens of a scan: layer by layer, within a layer part by part.
fn tokens(goldens: &Goldens, case: &Case, scan: usize) -> Vec<TokenGrid> {
    let options = EncoderOptions {
        layers: LAYERS.to_vec(),
        final_norm: true,
        position: PositionResize::Offset,
        precision: Some(Precision::F32),
    };
    let encoder = Box::new(CpuEncoder::new(&weights().into_grey(), &options));
    let projection = case.projected.then(|| Projection::new(SEED, 32, 8));
    let settings = case.tokens.clone();
    let mut tokeniser = Tokeniser::new(encoder, projection, settings, LAYERS.len(), 14);
    let volume = canonical(goldens, scan).volume;
    tokeniser.tokens(&volume, |_| ControlFlow::Continue(())).unwrap()
}

/// Layer and part of each grid of a scan.
fn grids(case: &Case) -> impl Iterator<Item = (usize, usize)> {
    let n_parts = case.tokens.n_parts();
    LAYERS.into_iter().flat_map(move |layer| (0..n_parts).map(move |part| (layer, part)))
}

#[test]
fn the_tokens_are_those_of_the_reference() {
    let goldens = Goldens::load();
    for case in cases() {
        for scan in 0..N_SCANS {
            for ((layer, part), found) in grids(&case).zip(tokens(&goldens, &case, scan)) {
                let golden = goldens.tokens(&case, scan, layer, part);
                assert_eq!(found.foreground(), golden.foreground());
                let values = |grid: &TokenGrid| -> Vec<f32> {
                    grid.features().iter().map(|f| f.to_f32()).collect()
                };
                let name = format!("{}.scan{scan}.tokens.{layer}.{part}", case.name);
                // One rounding step of f16 below 1.
                assert_close(&values(&found), &values(&golden), 5e-4, &name);
            }
        }
    }
}

#[test]
fn the_distances_are_those_of_the_reference() {
    let goldens = Goldens::load();
    for case in cases() {
        for (layer, part) in grids(&case) {
            for (own, other) in [(0, 1), (0, 2), (1, 2)] {
                let tokens = |scan| goldens.tokens(&case, scan, layer, part);
                let found =
                    CpuDistances::new().nearest(&tokens(own), &tokens(other), case.reach).unwrap();
                let name = format!("{}.distances.{layer}.{part}", case.name);
                let there = format!("{name}.{own}.{other}");
                assert_close(&found.first_to_second, &goldens.values(&there), 1e-6, &there);
                let back = format!("{name}.{other}.{own}");
                assert_close(&found.second_to_first, &goldens.values(&back), 1e-6, &back);
            }
        }
    }
}

fn id(scan: usize) -> ScanId {
    ScanId([scan as u8; 32])
}

/// Columns for scoring, by scan, other scan and grid.
struct Columns<F>(F);

impl<F: FnMut(usize, usize, usize) -> Vec<f32>> WindowDistances for Columns<F> {
    fn column(&mut self, of: ScanId, other: ScanId, grid: usize) -> Result<Vec<f32>, ScanError> {
        Ok((self.0)(of.0[0].into(), other.0[0].into(), grid))
    }

    fn column_without(
        &mut self,
        _: ScanId,
        _: ScanId,
        _: usize,
        _: &[usize],
    ) -> Result<Vec<f32>, ScanError> {
        unreachable!("nothing is filtered")
    }
}

fn scores(
    goldens: &Goldens,
    case: &Case,
    columns: impl FnMut(usize, usize, usize) -> Vec<f32>,
) -> WindowScores {
    let settings = format!(
        "[scoring]\nkeep_fraction = {:?}\npositional_correction = {:?}\nfalse_positive_fraction = 0.01",
        case.keep_fraction, case.positional_correction
    );
    let settings = Config::parse(&settings).unwrap().scoring;
    let member = |scan| {
        let part = |part| goldens.tokens(case, scan, LAYERS[0], part).foreground().clone();
        let parts = (0..case.tokens.n_parts()).map(part).collect();
        ScoredMember {
            id: id(scan),
            parts,
            membership: Membership::REFERENCE,
            weights: Weights::OF_TOKENS_ALONE,
        }
    };
    let members: Vec<ScoredMember> = (0..N_SCANS).map(member).collect();
    score_members(&members, &LAYERS, &settings, &mut Columns(columns), &NoFineVolumes).unwrap()
}

#[test]
fn scores_threshold_and_map_are_those_of_the_reference() {
    let goldens = Goldens::load();
    for case in cases() {
        let layout: Vec<(usize, usize)> = grids(&case).collect();
        let scores = scores(&goldens, &case, |own, other, grid| {
            let (layer, part) = layout[grid];
            goldens.values(&format!("{}.distances.{layer}.{part}.{own}.{other}", case.name))
        });
        for (own, found) in scores.scans.iter().enumerate() {
            let golden = |what: &str| goldens.values(&format!("{}.scan{own}.{what}", case.name));
            assert_close(&found.cells, &golden("scores"), 1e-6, "scores");
            assert_close(&[found.max], &golden("max"), 1e-6, "max");
            assert_close(&[found.top1_mean], &golden("top1_mean"), 1e-6, "top1_mean");
            // Maps have 14 significant bits.
            assert_close(&map(&goldens, own, found), &golden("map"), 6.2e-5, "map");
            let clean = Fraction::new(0.25).unwrap();
            let threshold = label_free_threshold(&scores.profiles, own, clean);
            assert_close(&[threshold], &golden("threshold"), 1e-5, "threshold");
        }
    }
}

fn map(goldens: &Goldens, scan: usize, scores: &ScanScores) -> Vec<f32> {
    let brain = brain_mask(&goldens.scan(scan), None).unwrap();
    let placement =
        GridPlacement { cube_side: CUBE.side, cube: cube_affine(&brain, &CUBE).unwrap() };
    score_map(&scores.foreground, &scores.cells, &placement, &brain)
}

#[test]
fn the_whole_way_from_scan_to_map_is_that_of_the_reference() {
    let goldens = Goldens::load();
    for case in cases() {
        let of_scan: Vec<_> = (0..N_SCANS).map(|scan| tokens(&goldens, &case, scan)).collect();
        let scores = scores(&goldens, &case, |own, other, grid| {
            let (a, b) = (&of_scan[own][grid], &of_scan[other][grid]);
            CpuDistances::new().nearest(a, b, case.reach).unwrap().first_to_second
        });
        for (own, scores) in scores.scans.iter().enumerate() {
            let found = map(&goldens, own, scores);
            assert_eq!(found.len(), SHAPE.n_voxels());
            let golden = goldens.values(&format!("{}.scan{own}.map", case.name));
            // Tokens are rounded to f16: 5e-4 each, and distances are sums over 24 or more of them.
            assert_close(&found, &golden, 1e-3, case.name);
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
    let weights = oddscan::model::load_weights(&weights).unwrap();
    for (file, side, layers, normed) in
        [(small, 224, vec![3, 6, 9, 12], "last_norm"), (native, 518, vec![], "last_norm_518")]
    {
        let goldens = Goldens::open(&file);
        let images = ImageBatch::whole(1, side, 14, goldens.values(&format!("input_{side}")));
        let encode = |layers: &[usize], final_norm| {
            let position = PositionResize::Size;
            let options = EncoderOptions {
                layers: layers.to_vec(),
                final_norm,
                position,
                precision: Some(Precision::F32),
            };
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
