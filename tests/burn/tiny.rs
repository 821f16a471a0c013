//! A tiny seeded network, images and token grids.

use half::f16;
use oddscan::{
    domain::weights::{Architecture, BlockWeights, LinearWeights, NormWeights, VitWeights},
    numeric::{geometry::Shape3, projection::Normal, slice::ImageBatch, token::TokenGrid},
};

/// Pixels along an image edge: four patches, fewer than the position embedding has.
pub const SIDE: usize = 28;

/// Pixels along the edge of a patch.
pub const PATCH: usize = 7;

/// Four blocks of 48 channels, with every tensor random, so that none can be left out unnoticed.
pub fn network(registers: usize) -> VitWeights {
    let architecture = Architecture {
        channels: 48,
        depth: 4,
        heads: 3,
        hidden: 192,
        patch: PATCH,
        registers,
        position_side: 5,
    };
    let Architecture { channels, hidden, patch, position_side, .. } = architecture;
    let mut random = Random(Normal::new(17));
    VitWeights {
        architecture,
        patch_embedding: random.linear(channels, 3 * patch * patch),
        class_token: random.around(0.0, 1.0, channels),
        register_tokens: random.around(0.0, 1.0, registers * channels),
        position_embedding: random.around(0.0, 1.0, (1 + position_side.pow(2)) * channels),
        blocks: (0..architecture.depth).map(|_| random.block(channels, hidden)).collect(),
        norm: random.norm(channels),
        fingerprint: "0".repeat(64),
    }
}

pub fn images(n_images: usize) -> ImageBatch {
    let pixels = Random(Normal::new(23)).around(0.0, 1.0, n_images * 3 * SIDE * SIDE);
    ImageBatch::whole(n_images, SIDE, PATCH, pixels)
}

/// Groups of two images, with some of the sixteen patches.
pub fn some_patches(n_groups: usize) -> ImageBatch {
    let some = |(step, from): (usize, u32)| (from..16).step_by(step).collect::<Vec<u32>>();
    let all = [(3, 1), (1, 0), (1, 0), (5, 15), (2, 4)].into_iter().cycle();
    ImageBatch { group: 2, patches: all.map(some).take(n_groups).collect(), ..images(2 * n_groups) }
}

/// The cells of a cube that `keep` wants, with random features.
pub fn tokens(seed: u64, side: usize, channels: usize, keep: impl Fn(u32) -> bool) -> TokenGrid {
    let cells: Vec<u32> = (0..side.pow(3) as u32).filter(|&cell| keep(cell)).collect();
    let features = Random(Normal::new(seed)).around(0.0, 1.0, cells.len() * channels);
    let features = features.into_iter().map(f16::from_f32).collect();
    TokenGrid::new(Shape3::cube(side), channels, cells, features).unwrap()
}

struct Random(Normal);

impl Random {
    fn around(&mut self, mean: f64, deviation: f64, n: usize) -> Vec<f32> {
        (0..n).map(|_| (mean + deviation * self.0.next()) as f32).collect()
    }

    fn linear(&mut self, outputs: usize, inputs: usize) -> LinearWeights {
        LinearWeights {
            weight: self.around(0.0, (inputs as f64).powf(-0.5), outputs * inputs),
            bias: self.around(0.0, 0.5, outputs),
        }
    }

    fn norm(&mut self, channels: usize) -> NormWeights {
        NormWeights {
            weight: self.around(1.0, 0.3, channels),
            bias: self.around(0.0, 0.3, channels),
        }
    }

    fn block(&mut self, channels: usize, hidden: usize) -> BlockWeights {
        BlockWeights {
            norm1: self.norm(channels),
            qkv: self.linear(3 * channels, channels),
            projection: self.linear(channels, channels),
            scale1: self.around(0.7, 0.3, channels),
            norm2: self.norm(channels),
            fc1: self.linear(hidden, channels),
            fc2: self.linear(channels, hidden),
            scale2: self.around(0.7, 0.3, channels),
        }
    }
}
