//! The vision transformer DINOv2 in burn (Oquab et al. 2023): layer norms with epsilon 1e-6, erf
//! GELU, LayerScale, bias on query, key and value.

use burn::{
    prelude::{Backend, Int, Tensor, TensorData},
    tensor::{
        FloatDType, TensorPrimitive, activation::gelu, module::attention,
        ops::AttentionModuleOptions,
    },
};

use crate::{
    compute::Precision,
    domain::weights::{Architecture, BlockWeights, LinearWeights, NormWeights, VitWeights},
};

const NORM_EPSILON: f64 = 1e-6;

/// The network's weights on a device.
pub struct Vit<B: Backend> {
    architecture: Architecture,
    patch_embedding: Linear<B>,
    class_token: Tensor<B, 2>,
    registers: Option<Tensor<B, 2>>,
    blocks: Vec<Block<B>>,
    norm: Norm<B>,
}

/// The position embedding for images of one size: `class` is `[1, channels]`, `patches` is
/// `[n_patches, channels]`.
pub struct Positions<B: Backend> {
    class: Tensor<B, 2>,
    patches: Tensor<B, 2>,
}

impl<B: Backend> Vit<B> {
    /// Copies the weights of the first `n_blocks` blocks to `device`.
    pub fn new(
        weights: &VitWeights,
        n_blocks: usize,
        precision: Precision,
        device: &B::Device,
    ) -> Self {
        let dtype = dtype(precision);
        let Architecture { channels, registers, .. } = weights.architecture;
        let blocks = weights.blocks.iter().take(n_blocks);
        Self {
            architecture: weights.architecture,
            patch_embedding: Linear::new(&weights.patch_embedding, dtype, device),
            class_token: matrix(&weights.class_token, [1, channels], device),
            registers: (registers > 0)
                .then(|| matrix(&weights.register_tokens, [registers, channels], device)),
            blocks: blocks.map(|block| Block::new(block, dtype, device)).collect(),
            norm: Norm::new(&weights.norm, device),
        }
    }

    /// The network's number of blocks, channels, heads and so on.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// Copies a position embedding `[1 + n_patches, channels]`, already resized, to the device.
    pub fn positions(&self, embedding: &[f32], device: &B::Device) -> Positions<B> {
        let channels = self.architecture.channels;
        let (class, patches) = embedding.split_at(channels);
        Positions {
            class: matrix(class, [1, channels], device),
            patches: matrix(patches, [patches.len() / channels, channels], device),
        }
    }

    /// The features `[n_images, n_patches, channels]` of these patches after each of the blocks
    /// `layers` (counted from 1, ascending). Images are `[n_images, colours, side, side]`. Later
    /// blocks are not computed.
    ///
    /// # Panics
    /// If the side is no multiple of the patch, or the device fails.
    pub fn forward(
        &self,
        images: Tensor<B, 4>,
        positions: &Positions<B>,
        patches: Tensor<B, 1, Int>,
        layers: &[usize],
        final_norm: bool,
    ) -> Vec<Tensor<B, 3>> {
        let [n_images, ..] = images.dims();
        let [n_patches] = patches.dims();
        let channels = self.architecture.channels;
        let n_first = 1 + self.architecture.registers;
        let n_tokens = n_first + n_patches;
        let last = layers.last().copied().unwrap_or(0);
        let mut tokens = self.embed(images, positions, patches);
        let mut features = Vec::with_capacity(layers.len());
        for (index, block) in self.blocks.iter().enumerate().take(last) {
            tokens = block.forward(tokens, n_images, self.architecture.heads);
            if layers.contains(&(index + 1)) {
                let patches = tokens
                    .clone()
                    .reshape([n_images, n_tokens, channels])
                    .narrow(1, n_first, n_patches);
                features.push(if final_norm { self.norm.forward(patches) } else { patches });
            }
        }
        features
    }

    /// Class token, registers and these patches of all images with their positions, one row each:
    /// `[n_images * n_tokens, channels]`. Registers have no position.
    fn embed(
        &self,
        images: Tensor<B, 4>,
        positions: &Positions<B>,
        patches: Tensor<B, 1, Int>,
    ) -> Tensor<B, 2> {
        let Architecture { channels, patch, .. } = self.architecture;
        let [n_patches] = patches.dims();
        let [n_images, colours, side, _] = images.dims();
        assert_eq!(side % patch, 0, "image side is no multiple of the patch");
        let grid = side / patch;
        let pixels = images
            .reshape([n_images, colours, grid, patch, grid, patch])
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([n_images, grid * grid, colours * patch * patch])
            .select(1, patches.clone())
            .reshape([n_images * n_patches, colours * patch * patch]);
        let positions_of_patches = positions.patches.clone().select(0, patches);
        let patches = self.patch_embedding.forward(pixels).cast(FloatDType::F32);
        let patches =
            patches.reshape([n_images, n_patches, channels]) + positions_of_patches.unsqueeze();
        let class = self.class_token.clone() + positions.class.clone();
        let first = match &self.registers {
            Some(registers) => Tensor::cat(vec![class, registers.clone()], 0),
            None => class,
        };
        let n_first = first.dims()[0];
        let first = first.unsqueeze::<3>().expand([n_images, n_first, channels]);
        Tensor::cat(vec![first, patches], 1).reshape([n_images * (n_first + n_patches), channels])
    }
}

struct Block<B: Backend> {
    norm1: Norm<B>,
    qkv: Linear<B>,
    projection: Linear<B>,
    scale1: Tensor<B, 2>,
    norm2: Norm<B>,
    fc1: Linear<B>,
    fc2: Linear<B>,
    scale2: Tensor<B, 2>,
}

impl<B: Backend> Block<B> {
    fn new(weights: &BlockWeights, dtype: FloatDType, device: &B::Device) -> Self {
        let linear = |layer: &LinearWeights| Linear::new(layer, dtype, device);
        Self {
            norm1: Norm::new(&weights.norm1, device),
            qkv: linear(&weights.qkv),
            projection: linear(&weights.projection),
            scale1: matrix(&weights.scale1, [1, weights.scale1.len()], device),
            norm2: Norm::new(&weights.norm2, device),
            fc1: linear(&weights.fc1),
            fc2: linear(&weights.fc2),
            scale2: matrix(&weights.scale2, [1, weights.scale2.len()], device),
        }
    }

    /// The sum over the blocks, `tokens`, stays in f32. The branches have the precision of the
    /// products.
    fn forward(&self, tokens: Tensor<B, 2>, n_images: usize, heads: usize) -> Tensor<B, 2> {
        let single = FloatDType::F32;
        let normed = self.norm1.forward(tokens.clone());
        let joined = attend(self.qkv.forward(normed), n_images, heads);
        let branch = self.projection.forward(joined).cast(single);
        let tokens = tokens + branch * self.scale1.clone();
        let wide = gelu(self.fc1.forward(self.norm2.forward(tokens.clone())));
        tokens + self.fc2.forward(wide).cast(single) * self.scale2.clone()
    }
}

/// Query, key and value `[n_images * n_tokens, 3 * channels]` to the joined heads
/// `[n_images * n_tokens, channels]`: softmax(Q K^T / sqrt(width)) V for each image and head.
///
/// burn fuses this on its CPU backend. On CUDA it does so only with its feature `autotune`. That
/// chooses kernels by measurements, so features could change from run to run.
fn attend<B: Backend>(qkv: Tensor<B, 2>, n_images: usize, heads: usize) -> Tensor<B, 2> {
    let [rows, columns] = qkv.dims();
    let (n_tokens, channels) = (rows / n_images, columns / 3);
    let parts =
        qkv.reshape([n_images, n_tokens, 3, heads, channels / heads]).permute([2, 0, 3, 1, 4]);
    let part = |index: usize| parts.clone().narrow(0, index, 1).squeeze_dim::<4>(0);
    attention(part(0), part(1), part(2), None, None, AttentionModuleOptions::default())
        .permute([0, 2, 1, 3])
        .reshape([rows, channels])
}

struct Linear<B: Backend> {
    /// `[in, out]`, in the precision of the products. It is a view of PyTorch's `[out, in]`.
    weight: Tensor<B, 2>,
    /// `[1, out]`, in the precision of the products.
    bias: Tensor<B, 2>,
}

impl<B: Backend> Linear<B> {
    fn new(weights: &LinearWeights, dtype: FloatDType, device: &B::Device) -> Self {
        let outputs = weights.bias.len();
        let shape = [outputs, weights.weight.len() / outputs];
        Self {
            weight: matrix(&weights.weight, shape, device).cast(dtype).transpose(),
            bias: matrix(&weights.bias, [1, outputs], device).cast(dtype),
        }
    }

    /// `[n, in]` to `[n, out]`, in the precision of the products.
    fn forward(&self, input: Tensor<B, 2>) -> Tensor<B, 2> {
        input.cast(self.weight.dtype()).matmul(self.weight.clone()) + self.bias.clone()
    }
}

struct Norm<B: Backend> {
    weight: Tensor<B, 1>,
    bias: Tensor<B, 1>,
}

impl<B: Backend> Norm<B> {
    fn new(weights: &NormWeights, device: &B::Device) -> Self {
        let vector = |values: &[f32]| matrix(values, [1, values.len()], device).squeeze_dim(0);
        Self { weight: vector(&weights.weight), bias: vector(&weights.bias) }
    }

    /// Layer norm over the last axis.
    fn forward<const D: usize>(&self, input: Tensor<B, D>) -> Tensor<B, D> {
        // This is the backend's own norm without burn's module, because the CPU backend fuses it.
        Tensor::from_primitive(TensorPrimitive::Float(B::layer_norm(
            input.into_primitive().tensor(),
            self.weight.clone().into_primitive().tensor(),
            Some(self.bias.clone().into_primitive().tensor()),
            NORM_EPSILON,
        )))
    }
}

fn matrix<B: Backend>(values: &[f32], shape: [usize; 2], device: &B::Device) -> Tensor<B, 2> {
    let data = TensorData::new(values.to_vec(), shape);
    Tensor::from_data(data, (device, FloatDType::F32.into()))
}

fn dtype(precision: Precision) -> FloatDType {
    match precision {
        Precision::F32 => FloatDType::F32,
        Precision::Bf16 => FloatDType::BF16,
        Precision::F16 => FloatDType::F16,
    }
}
