//! The vision transformer on the CPU.

use std::sync::Mutex;

use half::bf16;
use rayon::prelude::*;

use super::{
    attention::{self, attend},
    kernels::{add_scaled, layer_norm, store_biased, store_gelu},
    product::{Element, Kernel, Panels, Rows, multiply},
    tile::{kernel_bf16, kernel_f32},
};
use crate::{
    compute::{EncoderOptions, Precision, position::resize_position_embedding},
    domain::{
        SliceEncoder,
        error::DeviceError,
        weights::{Architecture, BlockWeights, LinearWeights, NormWeights, VitWeights},
    },
    numeric::slice::{ImageBatch, PatchFeatures},
};

/// DINOv2 on all cores of the CPU, with products in f32 or bf16.
pub struct CpuEncoder(Box<dyn SliceEncoder>);

impl CpuEncoder {
    /// The encoder for these layers, with products of [`CpuEncoder::precision`].
    pub fn new(weights: &VitWeights, options: &EncoderOptions) -> Self {
        match (Self::precision(weights, options), kernel_bf16()) {
            (Precision::Bf16, Some(kernel)) => {
                Self(Box::new(Encoder::new(kernel, weights, options)))
            }
            _ => Self(Box::new(Encoder::new(kernel_f32(), weights, options))),
        }
    }

    /// The number format of the products. It is bf16 if processor and network allow it, and if the
    /// options ask for bf16 or for no format. Otherwise it is f32.
    pub fn precision(weights: &VitWeights, options: &EncoderOptions) -> Precision {
        let Architecture { channels, heads, hidden, .. } = weights.architecture;
        let fits = |inner| bf16::padded(inner) == inner;
        let fits = fits(channels / heads) && fits(channels) && fits(hidden);
        let has_kernel = kernel_bf16().is_some();
        let is_wanted = options.precision.is_none_or(|wanted| wanted == Precision::Bf16);
        if is_wanted && fits && has_kernel { Precision::Bf16 } else { Precision::F32 }
    }
}

impl SliceEncoder for CpuEncoder {
    fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError> {
        self.0.encode(images)
    }

    fn patch(&self) -> usize {
        self.0.patch()
    }

    fn channels(&self) -> usize {
        self.0.channels()
    }

    fn device(&self) -> &str {
        self.0.device()
    }
}

/// The network with products of `E`. Threads share the weights. Each thread keeps its own buffers.
struct Encoder<E> {
    network: Network<E>,
    position_embedding: Vec<f32>,
    workspaces: Vec<Workspace<E>>,
}

impl<E: Element> Encoder<E> {
    fn new(kernel: Kernel<E>, weights: &VitWeights, options: &EncoderOptions) -> Self {
        Self {
            network: Network::new(kernel, weights, options),
            position_embedding: weights.position_embedding.clone(),
            workspaces: (0..rayon::current_num_threads()).map(|_| Workspace::default()).collect(),
        }
    }

    fn resize_position(&mut self, side: usize) {
        let network = &mut self.network;
        let Architecture { patch, position_side, channels, .. } = network.architecture;
        if network.side != side {
            let mode = network.options.position;
            network.position = resize_position_embedding(
                &self.position_embedding,
                position_side,
                side / patch,
                channels,
                mode,
            );
            network.side = side;
        }
    }
}

impl<E: Element> SliceEncoder for Encoder<E> {
    fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError> {
        let Architecture { patch, channels, .. } = self.network.architecture;
        assert_eq!(images.side % patch, 0, "image side is no multiple of the patch");
        let n_pixels = self.network.colours * images.side.pow(2);
        assert_eq!(images.n_pixels(), n_pixels, "images of the network's colours");
        self.resize_position(images.side);
        let group = images.group;
        let patches_of = (0..images.n_images()).map(|image| &images.patches[image / group][..]);
        let n_rows: usize = patches_of.clone().map(<[u32]>::len).sum();
        let empty = || PatchFeatures { channels, values: vec![0.0; n_rows * channels] };
        let mut features: Vec<PatchFeatures> =
            self.network.options.layers.iter().map(|_| empty()).collect();
        // The places of the features of each image, at each layer.
        let mut outputs: Vec<Vec<&mut [f32]>> = patches_of.clone().map(|_| Vec::new()).collect();
        for layer in &mut features {
            let mut left = &mut layer.values[..];
            for (output, patches) in outputs.iter_mut().zip(patches_of.clone()) {
                let (own, others) = left.split_at_mut(patches.len() * channels);
                output.push(own);
                left = others;
            }
        }
        let pixels = images.pixels.chunks_exact(n_pixels);
        let jobs = Mutex::new(pixels.zip(patches_of).zip(outputs));
        self.workspaces.par_iter_mut().for_each(|workspace| {
            loop {
                let job = jobs.lock().expect("no holder of the lock can panic").next();
                let Some(((pixels, patches), mut outputs)) = job else { break };
                self.network.forward(pixels, patches, workspace, &mut outputs);
            }
        });
        Ok(features.into_iter().map(|features| features.pooled(images)).collect())
    }

    fn patch(&self) -> usize {
        self.network.architecture.patch
    }

    fn channels(&self) -> usize {
        self.network.architecture.channels
    }

    fn device(&self) -> &str {
        "cpu"
    }
}

/// Buffers of one thread, which grow only once.
#[derive(Default)]
struct Workspace<E> {
    patches: Vec<E>,
    tokens: Vec<f32>,
    normed: Vec<E>,
    qkv: Vec<E>,
    attention: attention::Scratch<E>,
    joined: Vec<E>,
    hidden: Vec<E>,
}

impl<E: Element> Workspace<E> {
    fn fit(&mut self, n_tokens: usize, architecture: &Architecture) {
        let Architecture { channels, hidden, .. } = *architecture;
        self.tokens.resize(n_tokens * channels, 0.0);
        for (buffer, size) in [
            (&mut self.normed, channels),
            (&mut self.qkv, 3 * channels),
            (&mut self.joined, channels),
            (&mut self.hidden, hidden),
        ] {
            buffer.resize(n_tokens * size, E::default());
        }
    }
}

/// The weights, prepared for products of `E`, and all other values that the images of a batch
/// share.
struct Network<E> {
    kernel: Kernel<E>,
    architecture: Architecture,
    options: EncoderOptions,
    colours: usize,
    patch_embedding: Linear<E>,
    /// `[1 + registers, channels]`.
    first_tokens: Vec<f32>,
    blocks: Vec<Block<E>>,
    norm: NormWeights,
    /// Edge of the images that `position` is for, pixels.
    side: usize,
    /// `[1 + n_patches, channels]`.
    position: Vec<f32>,
}

struct Linear<E> {
    weight: Panels<E>,
    bias: Vec<f32>,
}

impl<E: Element> Linear<E> {
    fn new(weights: &LinearWeights) -> Self {
        let inputs = weights.weight.len() / weights.bias.len();
        let weight = Panels::of_columns(&weights.weight, inputs);
        Self { weight, bias: weights.bias.clone() }
    }
}

struct Block<E> {
    norm1: NormWeights,
    qkv: Linear<E>,
    projection: Linear<E>,
    scale1: Vec<f32>,
    norm2: NormWeights,
    fc1: Linear<E>,
    fc2: Linear<E>,
    scale2: Vec<f32>,
}

impl<E: Element> Block<E> {
    fn new(weights: &BlockWeights) -> Self {
        Self {
            norm1: weights.norm1.clone(),
            qkv: Linear::new(&weights.qkv),
            projection: Linear::new(&weights.projection),
            scale1: weights.scale1.clone(),
            norm2: weights.norm2.clone(),
            fc1: Linear::new(&weights.fc1),
            fc2: Linear::new(&weights.fc2),
            scale2: weights.scale2.clone(),
        }
    }
}

impl<E: Element> Network<E> {
    fn new(kernel: Kernel<E>, weights: &VitWeights, options: &EncoderOptions) -> Self {
        let architecture = weights.architecture;
        let n_blocks = options.layers.iter().copied().max().unwrap_or(0);
        let first_tokens = [&weights.class_token[..], &weights.register_tokens].concat();
        Self {
            kernel,
            architecture,
            options: options.clone(),
            colours: weights.colours(),
            patch_embedding: Linear::new(&weights.patch_embedding),
            first_tokens,
            blocks: weights.blocks.iter().take(n_blocks).map(Block::new).collect(),
            norm: weights.norm.clone(),
            side: 0,
            position: Vec::new(),
        }
    }

    /// Computes the features of these patches of an image, `[colours, side, side]`, at each layer.
    fn forward(
        &self,
        pixels: &[f32],
        patches: &[u32],
        workspace: &mut Workspace<E>,
        outputs: &mut [&mut [f32]],
    ) {
        let architecture = &self.architecture;
        let n_first = 1 + architecture.registers;
        workspace.fit(n_first + patches.len(), architecture);
        self.embed(pixels, patches, workspace);
        let mut outputs = self.options.layers.iter().zip(outputs).peekable();
        for (index, block) in self.blocks.iter().enumerate() {
            self.run_block(block, workspace);
            if let Some((_, out)) = outputs.next_if(|(layer, _)| **layer == index + 1) {
                let patches = &workspace.tokens[n_first * architecture.channels..];
                if self.options.final_norm {
                    layer_norm(patches, &self.norm.weight, &self.norm.bias, out);
                } else {
                    out.copy_from_slice(patches);
                }
            }
        }
    }

    /// Writes class token, registers and these patches with their positions: `[n_tokens,
    /// channels]`.
    fn embed(&self, pixels: &[f32], patches: &[u32], workspace: &mut Workspace<E>) {
        let Architecture { channels, patch, .. } = self.architecture;
        let grid = self.side / patch;
        let inputs = self.colours * patch * patch;
        let stride = E::padded(inputs);
        workspace.patches.resize(patches.len() * stride, E::default());
        let rows = workspace.patches.chunks_exact_mut(stride);
        for (index, row) in patches.iter().map(|&index| index as usize).zip(rows) {
            let (top, left) = (index / grid * patch, index % grid * patch);
            for (line, out) in row[..inputs].chunks_exact_mut(patch).enumerate() {
                let (colour, y) = (line / patch, top + line % patch);
                let start = (colour * self.side + y) * self.side + left;
                let values = &pixels[start..start + patch];
                out.iter_mut().zip(values).for_each(|(out, &value)| *out = E::of(value));
            }
        }
        let (first, tokens) = workspace.tokens.split_at_mut(self.first_tokens.len());
        let Linear { weight, bias } = &self.patch_embedding;
        let rows = Rows { values: &workspace.patches, n: patches.len(), stride };
        multiply(self.kernel, rows, weight, |place, tile| {
            store_biased(tile, place, bias, tokens, channels);
        });
        let (class_position, positions) = self.position.split_at(channels);
        for (token, &patch) in tokens.chunks_exact_mut(channels).zip(patches) {
            let position = &positions[patch as usize * channels..];
            token.iter_mut().zip(position).for_each(|(value, position)| *value += position);
        }
        first.copy_from_slice(&self.first_tokens);
        first.iter_mut().zip(class_position).for_each(|(value, position)| *value += position);
    }

    fn run_block(&self, block: &Block<E>, workspace: &mut Workspace<E>) {
        let (kernel, Architecture { channels, hidden, heads, .. }) =
            (self.kernel, self.architecture);
        let Workspace { tokens, normed, qkv, attention, joined, hidden: wide, .. } = workspace;
        layer_norm(tokens, &block.norm1.weight, &block.norm1.bias, normed);
        multiply(kernel, Rows::of(normed, channels), &block.qkv.weight, |place, tile| {
            store_biased(tile, place, &block.qkv.bias, qkv, 3 * channels);
        });
        attend(kernel, qkv, heads, channels, attention, joined);
        let Linear { weight, bias } = &block.projection;
        multiply(kernel, Rows::of(joined, channels), weight, |place, tile| {
            add_scaled(tile, place, bias, &block.scale1, tokens, channels);
        });
        layer_norm(tokens, &block.norm2.weight, &block.norm2.bias, normed);
        multiply(kernel, Rows::of(normed, channels), &block.fc1.weight, |place, tile| {
            store_gelu(tile, place, &block.fc1.bias, wide, hidden);
        });
        let Linear { weight, bias } = &block.fc2;
        multiply(kernel, Rows::of(wide, hidden), weight, |place, tile| {
            add_scaled(tile, place, bias, &block.scale2, tokens, channels);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compute::position::PositionResize,
        numeric::{projection::Normal, slice::least_cosine},
    };

    fn weights() -> VitWeights {
        let architecture = Architecture {
            channels: 64,
            depth: 3,
            heads: 2,
            hidden: 128,
            patch: 14,
            registers: 4,
            position_side: 5,
        };
        VitWeights::random(architecture, 1).into_grey()
    }

    fn images(n_images: usize) -> ImageBatch {
        let (mut normal, side) = (Normal::new(2), 9 * 14);
        let pixels = (0..n_images * side * side).map(|_| normal.uniform() as f32).collect();
        ImageBatch::whole(n_images, side, 14, pixels)
    }

    fn encoder(precision: Precision) -> CpuEncoder {
        let position = PositionResize::Offset;
        let (layers, precision) = (vec![1, 3], Some(precision));
        let options = EncoderOptions { layers, final_norm: true, position, precision };
        CpuEncoder::new(&weights(), &options)
    }

    #[test]
    fn features_depend_on_the_image_alone() {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut encoder = encoder(precision);
            let all = images(5);
            let together = encoder.encode(&all).unwrap();
            let per_image = all.pixels.len() / 5;
            for (index, pixels) in all.pixels.chunks_exact(per_image).enumerate() {
                let one = ImageBatch::whole(1, all.side, 14, pixels.to_vec());
                for (alone, together) in encoder.encode(&one).unwrap().iter().zip(&together) {
                    let n = alone.values.len();
                    assert_eq!(alone.values, together.values[index * n..(index + 1) * n]);
                }
            }
        }
    }

    #[test]
    fn patches_that_are_left_out_are_not_seen() {
        let side = 9 * 14;
        for precision in [Precision::F32, Precision::Bf16] {
            let mut encoder = encoder(precision);
            let patches = vec![vec![], vec![1, 9, 80]];
            let mut batch = ImageBatch { group: 2, patches, ..images(4) };
            let found = encoder.encode(&batch).unwrap();
            assert_eq!(found[0].values.len(), 3 * 64);
            // Patches 0 and 10 of the third image.
            let third = 2 * side * side;
            batch.pixels[third] += 1.0;
            batch.pixels[third + (14 + 3) * side + 14 + 5] += 1.0;
            assert_eq!(encoder.encode(&batch).unwrap(), found);
            // Patch 9.
            batch.pixels[third + 14 * side] += 1.0;
            assert_ne!(encoder.encode(&batch).unwrap(), found);
        }
    }

    #[test]
    fn bf16_keeps_the_direction_of_every_token() {
        let [found, expected] =
            [Precision::Bf16, Precision::F32].map(|p| encoder(p).encode(&images(2)).unwrap());
        if found == expected {
            eprintln!("skipped: this processor has no products of bf16");
            return;
        }
        for (found, expected) in found.iter().zip(&expected) {
            let cosine = least_cosine(found, expected);
            assert!(cosine > 0.999, "{cosine}");
        }
    }
}
