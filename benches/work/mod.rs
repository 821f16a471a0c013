//! The pieces of work that are measured: the most expensive steps for a scan, on made-up data.

pub mod around;

use std::num::NonZeroUsize;

use half::f16;
use oddscan::{
    compute::{
        EncoderOptions, Precision,
        cpu::{CpuDistances, CpuEncoder},
        position::PositionResize,
    },
    domain::{
        PairDistances, SliceEncoder,
        weights::{Architecture, VitWeights},
    },
    numeric::{
        geometry::Shape3,
        projection::Normal,
        scoring::{Fraction, NearestDistances, SearchReach, mutual_scores},
        slice::ImageBatch,
        token::TokenGrid,
    },
};

/// Runs one image of `side` pixels through a network.
pub fn encode(architecture: Architecture, side: usize, precision: Precision) -> impl FnMut() {
    let weights = VitWeights::random(architecture, 1).into_grey();
    let layers = vec![architecture.depth];
    let position = PositionResize::Offset;
    let precision = Some(precision);
    let options = EncoderOptions { layers, final_norm: true, position, precision };
    let mut encoder = CpuEncoder::new(&weights, &options);
    let mut normal = Normal::new(2);
    let pixels = (0..side * side).map(|_| normal.uniform() as f32).collect();
    let images = ImageBatch::whole(1, side, architecture.patch, pixels);
    move || drop(std::hint::black_box(encoder.encode(&images)))
}

/// Compares one pair of scans; `reach` is in patches, 0 means the whole volume.
pub fn compare(mut distances: CpuDistances, side: usize, reach: usize) -> impl FnMut() {
    let [first, second] = [3, 4].map(|seed| tokens(seed, side));
    let reach = NonZeroUsize::new(reach).map_or(SearchReach::WholeVolume, SearchReach::Patches);
    move || drop(std::hint::black_box(distances.nearest(&first, &second, reach)))
}

/// Computes the scores of one scan from the distances to `n_others` others.
pub fn score(n_tokens: usize, n_others: usize) -> impl FnMut() {
    let mut normal = Normal::new(5);
    let mut column = || (0..n_tokens).map(|_| 1.0 + normal.uniform() as f32).collect();
    let nearest = NearestDistances::new(n_tokens, (0..n_others).map(|_| column()).collect());
    let keep = Fraction::new(0.4).expect("a share");
    move || drop(std::hint::black_box(mutual_scores(&nearest, keep)))
}

/// Random tokens of 384 channels in every cell of a cube but its corners.
fn tokens(seed: u64, side: usize) -> TokenGrid {
    const CHANNELS: usize = 384;
    let (shape, radius) = (Shape3::cube(side), 0.6 * side as f64);
    let is_within = |cell: &u32| {
        let centre = (side as f64 - 1.0) / 2.0;
        let apart = shape.voxel(*cell as usize).map(|at| (at as f64 - centre).powi(2));
        apart.iter().sum::<f64>() < radius * radius
    };
    let cells: Vec<u32> = (0..shape.n_voxels() as u32).filter(is_within).collect();
    let mut normal = Normal::new(seed);
    let features = (0..cells.len() * CHANNELS).map(|_| f16::from_f64(0.05 * normal.next()));
    let features = features.collect();
    TokenGrid::new(shape, CHANNELS, cells, features).expect("cells ascend, features are finite")
}
