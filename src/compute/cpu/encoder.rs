//! The vision transformer on the CPU.

use std::sync::Mutex;

use gemm::Parallelism;
use rayon::prelude::*;

use super::kernels::{add_bias, add_bias_gelu, add_scaled, layer_norm, softmax};
use crate::{
    compute::{
        EncoderOptions,
        position::resize_position_embedding,
        weights::{Architecture, BlockWeights, LinearWeights, VitWeights},
    },
    domain::{SliceEncoder, error::DeviceError},
    numeric::slice::{ImageBatch, PatchFeatures},
};

/// DINOv2 on all cores. Weights are shared between threads, buffers are not and are kept.
pub struct CpuEncoder {
    weights: VitWeights,
    options: EncoderOptions,
    /// Position embedding for the image side in use: `(image side, [1 + n_patches, channels])`.
    position: (usize, Vec<f32>),
    workspaces: Vec<Workspace>,
}

impl CpuEncoder {
    /// The encoder for these layers; the weights are copied.
    pub fn new(weights: &VitWeights, options: &EncoderOptions) -> Self {
        let workspaces = (0..rayon::current_num_threads()).map(|_| Workspace::default()).collect();
        let (weights, options) = (weights.clone(), options.clone());
        Self { weights, options, position: (0, Vec::new()), workspaces }
    }

    fn resize_position(&mut self, side: usize) {
        let Architecture { patch, position_side, channels, .. } = self.weights.architecture;
        if self.position.0 != side {
            let embedding = &self.weights.position_embedding;
            let mode = self.options.position;
            let resized =
                resize_position_embedding(embedding, position_side, side / patch, channels, mode);
            self.position = (side, resized);
        }
    }
}

impl SliceEncoder for CpuEncoder {
    fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError> {
        let Architecture { patch, channels, .. } = self.weights.architecture;
        assert_eq!(images.side % patch, 0, "image side is no multiple of the patch");
        let n_pixels = images.n_images * self.weights.colours() * images.side.pow(2);
        assert_eq!(images.pixels.len(), n_pixels, "images of the network's colours");
        self.resize_position(images.side);
        let n_patches = (images.side / patch).pow(2);
        let (n_images, per_image) = (images.n_images, n_patches * channels);
        let empty = || PatchFeatures {
            n_images,
            n_patches,
            channels,
            values: vec![0.0; n_images * per_image],
        };
        let mut features: Vec<PatchFeatures> =
            self.options.layers.iter().map(|_| empty()).collect();
        // One job per image: its pixels and the places of its features at each layer.
        let mut outputs: Vec<Vec<&mut [f32]>> = (0..n_images).map(|_| Vec::new()).collect();
        for layer in &mut features {
            for (output, values) in outputs.iter_mut().zip(layer.values.chunks_exact_mut(per_image))
            {
                output.push(values);
            }
        }
        let pixels = images.pixels.chunks_exact(images.pixels.len() / n_images.max(1));
        let jobs = Mutex::new(pixels.zip(outputs));
        let network = Network {
            weights: &self.weights,
            options: &self.options,
            position: &self.position.1,
            side: images.side,
        };
        self.workspaces.par_iter_mut().for_each(|workspace| {
            loop {
                let job = jobs.lock().expect("no holder of the lock can panic").next();
                let Some((pixels, mut outputs)) = job else { break };
                network.forward(pixels, workspace, &mut outputs);
            }
        });
        Ok(features)
    }

    fn patch(&self) -> usize {
        self.weights.architecture.patch
    }

    fn channels(&self) -> usize {
        self.weights.architecture.channels
    }

    fn device(&self) -> &str {
        "cpu"
    }
}

/// Buffers of one thread, grown once.
#[derive(Default)]
struct Workspace {
    patches: Vec<f32>,
    tokens: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attention: Vec<f32>,
    joined: Vec<f32>,
    branch: Vec<f32>,
    hidden: Vec<f32>,
}

impl Workspace {
    fn fit(&mut self, n_tokens: usize, architecture: &Architecture) {
        let Architecture { channels, hidden, .. } = *architecture;
        for (buffer, size) in [
            (&mut self.tokens, channels),
            (&mut self.normed, channels),
            (&mut self.qkv, 3 * channels),
            (&mut self.attention, n_tokens),
            (&mut self.joined, channels),
            (&mut self.branch, channels),
            (&mut self.hidden, hidden),
        ] {
            buffer.resize(n_tokens * size, 0.0);
        }
    }
}

/// Everything that is the same for all images of a batch.
struct Network<'a> {
    weights: &'a VitWeights,
    options: &'a EncoderOptions,
    position: &'a [f32],
    side: usize,
}

impl Network<'_> {
    /// One image, `[colours, side, side]`, to its patch features at each layer.
    fn forward(&self, pixels: &[f32], workspace: &mut Workspace, outputs: &mut [&mut [f32]]) {
        let architecture = &self.weights.architecture;
        let n_patches = (self.side / architecture.patch).pow(2);
        let n_first = 1 + architecture.registers;
        workspace.patches.resize(pixels.len(), 0.0);
        workspace.fit(n_first + n_patches, architecture);
        self.embed(pixels, n_first, workspace);
        let mut outputs = self.options.layers.iter().zip(outputs).peekable();
        for (index, block) in self.weights.blocks.iter().enumerate() {
            if outputs.peek().is_none() {
                break;
            }
            run_block(block, architecture, workspace);
            if let Some((_, out)) = outputs.next_if(|(layer, _)| **layer == index + 1) {
                let patches = &workspace.tokens[n_first * architecture.channels..];
                if self.options.final_norm {
                    layer_norm(patches, &self.weights.norm.weight, &self.weights.norm.bias, out);
                } else {
                    out.copy_from_slice(patches);
                }
            }
        }
    }

    /// Class token, registers and patches with their positions: `[n_tokens, channels]`.
    fn embed(&self, pixels: &[f32], n_first: usize, workspace: &mut Workspace) {
        let Architecture { channels, patch, .. } = self.weights.architecture;
        let grid = self.side / patch;
        let inputs = self.weights.colours() * patch * patch;
        for (index, row) in workspace.patches.chunks_exact_mut(inputs).enumerate() {
            let (top, left) = (index / grid * patch, index % grid * patch);
            for (line, out) in row.chunks_exact_mut(patch).enumerate() {
                let (colour, y) = (line / patch, top + line % patch);
                let start = (colour * self.side + y) * self.side + left;
                out.copy_from_slice(&pixels[start..start + patch]);
            }
        }
        let embedding = &self.weights.patch_embedding;
        let (first, patches) = workspace.tokens.split_at_mut(n_first * channels);
        linear(&workspace.patches, embedding, inputs, patches);
        add_bias(patches, &embedding.bias);
        let (class_position, positions) = self.position.split_at(channels);
        for (value, position) in patches.iter_mut().zip(positions) {
            *value += position;
        }
        let (class, registers) = first.split_at_mut(channels);
        for ((value, token), position) in
            class.iter_mut().zip(&self.weights.class_token).zip(class_position)
        {
            *value = token + position;
        }
        registers.copy_from_slice(&self.weights.register_tokens);
    }
}

fn run_block(block: &BlockWeights, architecture: &Architecture, workspace: &mut Workspace) {
    let Architecture { channels, hidden, heads, .. } = *architecture;
    let Workspace { tokens, normed, qkv, attention, joined, branch, hidden: wide, .. } = workspace;
    layer_norm(tokens, &block.norm1.weight, &block.norm1.bias, normed);
    linear(normed, &block.qkv, channels, qkv);
    add_bias(qkv, &block.qkv.bias);
    for head in 0..heads {
        attend(qkv, head, channels / heads, channels, attention, joined);
    }
    linear(joined, &block.projection, channels, branch);
    add_scaled(tokens, branch, &block.projection.bias, &block.scale1);
    layer_norm(tokens, &block.norm2.weight, &block.norm2.bias, normed);
    linear(normed, &block.fc1, channels, wide);
    add_bias_gelu(wide, &block.fc1.bias);
    linear(wide, &block.fc2, hidden, branch);
    add_scaled(tokens, branch, &block.fc2.bias, &block.scale2);
}

/// One head: softmax(Q K^T / sqrt(width)) V into its columns of `joined`.
fn attend(
    qkv: &[f32],
    head: usize,
    width: usize,
    channels: usize,
    attention: &mut [f32],
    joined: &mut [f32],
) {
    let n_tokens = joined.len() / channels;
    let stride = 3 * channels;
    let part = |index: usize| &qkv[index * channels + head * width..];
    let (query, key, value) = (part(0), part(1), part(2));
    let scale = 1.0 / (width as f32).sqrt();
    product(
        Matrix {
            data: query,
            rows: n_tokens,
            columns: width,
            row_stride: stride,
            column_stride: 1,
        },
        Matrix { data: key, rows: width, columns: n_tokens, row_stride: 1, column_stride: stride },
        scale,
        attention,
        n_tokens,
    );
    softmax(attention, n_tokens);
    product(
        Matrix {
            data: attention,
            rows: n_tokens,
            columns: n_tokens,
            row_stride: n_tokens,
            column_stride: 1,
        },
        Matrix {
            data: value,
            rows: n_tokens,
            columns: width,
            row_stride: stride,
            column_stride: 1,
        },
        1.0,
        &mut joined[head * width..],
        channels,
    );
}

/// `out = x * weight^T` without bias; `x` is `[n, inputs]`.
fn linear(x: &[f32], layer: &LinearWeights, inputs: usize, out: &mut [f32]) {
    let (rows, outputs) = (x.len() / inputs, layer.bias.len());
    product(
        Matrix { data: x, rows, columns: inputs, row_stride: inputs, column_stride: 1 },
        Matrix {
            data: &layer.weight,
            rows: inputs,
            columns: outputs,
            row_stride: 1,
            column_stride: inputs,
        },
        1.0,
        out,
        outputs,
    );
}

/// A matrix within a buffer.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl Matrix<'_> {
    /// Entries from the first to the last, gaps included.
    fn extent(&self) -> usize {
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }
}

/// `out = scale * left * right`, `out` with rows `out_stride` apart, on this thread alone.
pub(super) fn product(
    left: Matrix<'_>,
    right: Matrix<'_>,
    scale: f32,
    out: &mut [f32],
    out_stride: usize,
) {
    let (rows, inner, columns) = (left.rows, left.columns, right.columns);
    if rows == 0 || columns == 0 {
        return;
    }
    assert_eq!(inner, right.rows, "inner extents");
    assert!(left.extent() <= left.data.len(), "left buffer too short");
    assert!(right.extent() <= right.data.len(), "right buffer too short");
    assert!((rows - 1) * out_stride + columns <= out.len(), "out buffer too short");
    // SAFETY: the three extents were just checked against their buffers, and `out` is borrowed
    // mutably, so it overlaps neither input.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            inner,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            false,
            left.data.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            0.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
