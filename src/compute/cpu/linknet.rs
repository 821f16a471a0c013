//! The brain extraction networks on the CPU: a LinkNet over volumes (see
//! [`brain_weights`](crate::domain::brain_weights)).
//!
//! The result does not depend on the number of threads, to the last bit. A cube of 256 voxels along
//! each edge takes about 200 MB in addition to the image.

use super::{
    convolution::{Form, convolve},
    features::{Features, norm, norm_add_relu, norm_relu, norm_relu_add, norm_relu_pool},
    kernels::sigmoid,
};
use crate::domain::{
    BrainNetwork, BrainPart,
    brain_weights::{BrainWeights, DownWeights, Kernel, LinkNetWeights, UpWeights},
    error::DeviceError,
};

/// deepbet's networks on the CPU.
pub struct CpuBrainNetwork {
    weights: BrainWeights,
}

impl CpuBrainNetwork {
    /// The networks with these weights.
    pub fn new(weights: BrainWeights) -> Self {
        Self { weights }
    }
}

impl BrainNetwork for CpuBrainNetwork {
    fn forward(
        &self,
        part: BrainPart,
        image: &[f32],
        side: usize,
    ) -> Result<Vec<f32>, DeviceError> {
        assert_eq!(side % 32, 0, "the side is no multiple of 32");
        assert_eq!(image.len(), side.pow(3), "the image is no cube of this side");
        Ok(probability(self.weights.part(part), image, side))
    }
}

/// The network's second output after the softmax, `[z, y, x]`.
fn probability(network: &LinkNetWeights, image: &[f32], side: usize) -> Vec<f32> {
    let mut decoded = convolve(&decoded(network, image, side), &network.enlarge, Form::Doubling, 1);
    norm_relu(&mut decoded);
    let mut decoded = convolve(&decoded, &network.smooth, Form::Plain, 0);
    norm_relu(&mut decoded);
    let classify = brain_against_background(&network.classify);
    let mut brain = convolve(&decoded, &classify, Form::Doubling, 0);
    brain.for_each_row(|_, _, row| sigmoid(row));
    brain.values
}

/// Output of encoder and decoder for an image, at a quarter of its side.
fn decoded(network: &LinkNetWeights, image: &[f32], side: usize) -> Features {
    let mut decoded = stem(&network.stem, image, side);
    let mut encoded = Vec::new();
    for weights in &network.down {
        let next = down(&decoded, weights);
        encoded.push(std::mem::replace(&mut decoded, next));
    }
    for (weights, skip) in network.up.iter().zip(encoded.iter().rev()) {
        decoded = up(&decoded, weights, skip);
    }
    decoded
}

fn stem(kernel: &Kernel, image: &[f32], side: usize) -> Features {
    let image = Features::of_image(image, side, 3);
    norm_relu_pool(&convolve(&image, kernel, Form::Halving, 0), 1)
}

fn down(input: &Features, weights: &DownWeights) -> Features {
    let first = match &weights.shortcut {
        None => residual(input, &weights.first, Form::Plain, input),
        Some(kernel) => {
            let mut shortcut = convolve(input, kernel, Form::Halving, 0);
            norm(&mut shortcut);
            residual(input, &weights.first, Form::Halving, &shortcut)
        }
    };
    residual(&first, &weights.second, Form::Plain, &first)
}

/// A residual block: two convolutions, the first of the form `form`, plus `shortcut`.
fn residual(input: &Features, kernels: &[Kernel; 2], form: Form, shortcut: &Features) -> Features {
    let mut branch = convolve(input, &kernels[0], form, 1);
    norm_relu(&mut branch);
    let mut branch = convolve(&branch, &kernels[1], Form::Plain, 1);
    norm_add_relu(&mut branch, shortcut);
    branch
}

fn up(input: &Features, weights: &UpWeights, skip: &Features) -> Features {
    let mut narrow = convolve(input, &weights.narrow, Form::Plain, 1);
    norm_relu(&mut narrow);
    let form = if skip.side > input.side { Form::Doubling } else { Form::Transposed };
    let mut enlarged = convolve(&narrow, &weights.enlarge, form, 0);
    norm_relu(&mut enlarged);
    let mut wide = convolve(&enlarged, &weights.widen, Form::Plain, 1);
    norm_relu_add(&mut wide, skip);
    wide
}

/// Replaces the two outputs of the last layer by one: brain minus background. The softmax of two
/// values depends only on this difference.
fn brain_against_background(kernel: &Kernel) -> Kernel {
    let [inputs, _, z, y, x] = kernel.shape;
    let outputs = kernel.weight.chunks_exact(2 * x * y * z).map(|both| both.split_at(x * y * z));
    let difference = |(background, brain): (&[f32], &[f32])| -> Vec<f32> {
        brain.iter().zip(background).map(|(brain, background)| brain - background).collect()
    };
    Kernel {
        shape: [inputs, 1, z, y, x],
        weight: outputs.flat_map(difference).collect(),
        bias: difference(kernel.bias.split_at(1)),
    }
}
