//! DINOv2 weights from a safetensors file, strictly: every tensor used, none missing, shapes equal.

use std::fmt;

/// The shape of a vision transformer of the DINOv2 family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Architecture {
    /// Features per token (384, 768 or 1024 for S, B and L).
    pub channels: usize,
    /// Number of transformer blocks.
    pub depth: usize,
    /// Attention heads; each has `channels / heads` features.
    pub heads: usize,
    /// Hidden width of the feed-forward part (4 * channels).
    pub hidden: usize,
    /// Pixels along the edge of a patch.
    pub patch: usize,
    /// Register tokens between the class token and the patches; 0 for the plain models.
    pub registers: usize,
    /// Patches along the edge of the grid that the position embedding was trained on (37).
    pub position_side: usize,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = match self.channels {
            384 => "s",
            768 => "b",
            1024 => "l",
            _ => "x",
        };
        write!(f, "dinov2_vit{size}{}", self.patch)?;
        if self.registers > 0 { write!(f, "_reg{}", self.registers) } else { Ok(()) }
    }
}

/// Scale and shift of a layer norm, each `[channels]`.
#[derive(Debug, Clone)]
pub struct NormWeights {
    /// Scale.
    pub weight: Vec<f32>,
    /// Shift.
    pub bias: Vec<f32>,
}

/// A linear layer as PyTorch stores it: `weight` is `[out, in]` row-major, `bias` is `[out]`.
#[derive(Debug, Clone)]
pub struct LinearWeights {
    /// `[out, in]`, row-major.
    pub weight: Vec<f32>,
    /// `[out]`.
    pub bias: Vec<f32>,
}

/// One transformer block.
#[derive(Debug, Clone)]
pub struct BlockWeights {
    /// Before the attention.
    pub norm1: NormWeights,
    /// Query, key and value joined: `[3 * channels, channels]`.
    pub qkv: LinearWeights,
    /// After the heads are joined: `[channels, channels]`.
    pub projection: LinearWeights,
    /// LayerScale of the attention branch, `[channels]`.
    pub scale1: Vec<f32>,
    /// Before the feed-forward part.
    pub norm2: NormWeights,
    /// `[hidden, channels]`.
    pub fc1: LinearWeights,
    /// `[channels, hidden]`.
    pub fc2: LinearWeights,
    /// LayerScale of the feed-forward branch, `[channels]`.
    pub scale2: Vec<f32>,
}

/// All weights of one vision transformer, in f32 whatever the file holds.
#[derive(Debug, Clone)]
pub struct VitWeights {
    /// Shape of the network.
    pub architecture: Architecture,
    /// Patch embedding: `[channels, 3 * patch * patch]`, the convolution kernel flattened.
    pub patch_embedding: LinearWeights,
    /// `[channels]`.
    pub class_token: Vec<f32>,
    /// `[registers, channels]`.
    pub register_tokens: Vec<f32>,
    /// `[1 + position_side^2, channels]`: the class position first.
    pub position_embedding: Vec<f32>,
    /// `depth` blocks.
    pub blocks: Vec<BlockWeights>,
    /// The norm after the last block.
    pub norm: NormWeights,
    /// SHA-256 of the file, 64 hex digits.
    pub fingerprint: String,
}
