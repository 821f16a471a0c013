//! Loads DINOv2 weights from a safetensors file. Every tensor must be used, none may be missing,
//! and all shapes must match.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use sha2::{Digest, Sha256};

use crate::numeric::{
    projection::Normal,
    slice::{IMAGENET_MEAN, IMAGENET_STD},
};

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

impl Architecture {
    /// DINOv2 ViT-S, -B or -L with patches of 14 pixels and without registers, by its name as
    /// [`fmt::Display`] writes it.
    pub fn named(name: &str) -> Option<Self> {
        let of = |channels: usize, depth| Self {
            channels,
            depth,
            heads: channels / 64,
            hidden: 4 * channels,
            patch: 14,
            registers: 0,
            position_side: 37,
        };
        [of(384, 12), of(768, 12), of(1024, 24)].into_iter().find(|a| a.to_string() == name)
    }

    /// Additions and multiplications in the matrix products, for an image with `n_patches` patches
    /// and up to block `depth`.
    pub fn operations(&self, n_patches: usize, depth: usize) -> f64 {
        let Self { channels, hidden, patch, registers, .. } = *self;
        let n_tokens = (1 + registers + n_patches) as f64;
        let linear = (4 * channels * channels + 2 * channels * hidden) as f64 * n_tokens;
        let attention = 2.0 * n_tokens * n_tokens * channels as f64;
        let embedding = (n_patches * 3 * patch * patch * channels) as f64;
        2.0 * (embedding + depth as f64 * (linear + attention))
    }
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

/// Why a weights file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// No safetensors file.
    #[error("not a safetensors file ({0}); `oddscan model import` converts .pth and .onnx")]
    Format(String),
    /// The tensors are not those of a DINOv2 network.
    #[error("not the tensors of a DINOv2 network:{}", .0.iter().map(|f| format!("\n  {f}")).collect::<String>())]
    Tensors(Vec<String>),
}

impl VitWeights {
    /// Reads the content of a safetensors file with the original's tensor names or those of Hugging
    /// Face; f32, f16 and bf16 become f32.
    ///
    /// # Errors
    /// All missing, unused, misshapen and non-finite tensors at once.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WeightsError> {
        let file =
            SafeTensors::deserialize(bytes).map_err(|e| WeightsError::Format(e.to_string()))?;
        let mut tensors = Tensors::new(&file);
        let weights = tensors.network(hex::encode(Sha256::digest(bytes)));
        tensors.finish()?;
        weights.ok_or_else(|| WeightsError::Tensors(vec!["no patch embedding".into()]))
    }

    /// A network of random weights, for measuring speed: tokens keep the scale that they have in
    /// a trained one.
    pub fn random(architecture: Architecture, seed: u64) -> Self {
        let Architecture { channels, depth, hidden, patch, registers, position_side, .. } =
            architecture;

        let mut normal = Normal::new(seed);
        let mut around = |mean: f64, deviation: f64, n: usize| -> Vec<f32> {
            (0..n).map(|_| (mean + deviation * normal.next()) as f32).collect()
        };
        let mut linear = |outputs: usize, inputs: usize| LinearWeights {
            weight: around(0.0, (inputs as f64).powf(-0.5), outputs * inputs),
            bias: around(0.0, 0.1, outputs),
        };

        let norm = || NormWeights { weight: vec![1.0; channels], bias: vec![0.0; channels] };
        let mut block = || BlockWeights {
            norm1: norm(),
            qkv: linear(3 * channels, channels),
            projection: linear(channels, channels),
            scale1: vec![0.1; channels],
            norm2: norm(),
            fc1: linear(hidden, channels),
            fc2: linear(channels, hidden),
            scale2: vec![0.1; channels],
        };
        let blocks = (0..depth).map(|_| block()).collect();

        Self {
            architecture,
            patch_embedding: linear(channels, 3 * patch * patch),
            class_token: around(0.0, 1.0, channels),
            register_tokens: around(0.0, 1.0, registers * channels),
            position_embedding: around(0.0, 0.1, (1 + position_side.pow(2)) * channels),
            blocks,
            norm: norm(),
            fingerprint: format!("random, seed {seed}"),
        }
    }

    /// Colours of the images: 3, or 1 after [`VitWeights::into_grey`].
    pub fn colours(&self) -> usize {
        let Architecture { channels, patch, .. } = self.architecture;
        self.patch_embedding.weight.len() / (channels * patch * patch)
    }

    /// The same network for grey images in [0, 1]. The original needs three copies of an image,
    /// each normalised in its own way. This step is linear and becomes part of the patch embedding.
    /// Only a third of the pixels is then sent to the device.
    pub fn into_grey(mut self) -> Self {
        if self.colours() == 1 {
            return self;
        }

        let LinearWeights { weight, bias } = &mut self.patch_embedding;
        let n_pixels = self.architecture.patch.pow(2);
        let mut grey = Vec::with_capacity(weight.len() / 3);
        for (row, bias) in weight.chunks_exact(3 * n_pixels).zip(bias) {
            let mut shift = f64::from(*bias);
            let mut sums = vec![0.0_f64; n_pixels];
            for (colour, part) in row.chunks_exact(n_pixels).enumerate() {
                let (mean, scale) =
                    (f64::from(IMAGENET_MEAN[colour]), f64::from(IMAGENET_STD[colour]));
                for (sum, &weight) in sums.iter_mut().zip(part) {
                    *sum += f64::from(weight) / scale;
                    shift -= f64::from(weight) * mean / scale;
                }
            }
            *bias = shift as f32;
            grey.extend(sums.into_iter().map(|sum| sum as f32));
        }
        *weight = grey;
        self
    }

    /// Number of weights.
    pub fn n_parameters(&self) -> usize {
        self.named().iter().map(|(_, _, values)| values.len()).sum()
    }

    /// The content of a safetensors file in the original's tensor names, in f16 or f32.
    pub fn to_safetensors(&self, half: bool) -> Vec<u8> {
        let dtype = if half { Dtype::F16 } else { Dtype::F32 };
        let encoded: BTreeMap<String, (Vec<usize>, Vec<u8>)> = self
            .named()
            .into_iter()
            .map(|(name, shape, values)| (name, (shape, encode(values, half))))
            .collect();
        let views = encoded.iter().map(|(name, (shape, data))| {
            let view = TensorView::new(dtype, shape.clone(), data);
            (name, view.expect("shape and data come from the same tensor"))
        });
        safetensors::serialize(views, None).expect("names are unique and data is complete")
    }

    /// Every tensor under the original's name with its shape.
    fn named(&self) -> Vec<(String, Vec<usize>, &[f32])> {
        let a = self.architecture;
        let (d, h, p) = (a.channels, a.hidden, a.patch);

        let mut all: Vec<(String, Vec<usize>, &[f32])> = vec![
            ("cls_token".into(), vec![1, 1, d], &self.class_token),
            ("pos_embed".into(), vec![1, 1 + a.position_side.pow(2), d], &self.position_embedding),
            ("patch_embed.proj.weight".into(), vec![d, 3, p, p], &self.patch_embedding.weight),
            ("patch_embed.proj.bias".into(), vec![d], &self.patch_embedding.bias),
            ("norm.weight".into(), vec![d], &self.norm.weight),
            ("norm.bias".into(), vec![d], &self.norm.bias),
        ];

        if a.registers > 0 {
            let shape = vec![1, a.registers, d];
            all.push(("register_tokens".into(), shape, &self.register_tokens));
        }

        for (n, block) in self.blocks.iter().enumerate() {
            let parts: [(&str, Vec<usize>, &[f32]); 14] = [
                ("norm1.weight", vec![d], &block.norm1.weight),
                ("norm1.bias", vec![d], &block.norm1.bias),
                ("attn.qkv.weight", vec![3 * d, d], &block.qkv.weight),
                ("attn.qkv.bias", vec![3 * d], &block.qkv.bias),
                ("attn.proj.weight", vec![d, d], &block.projection.weight),
                ("attn.proj.bias", vec![d], &block.projection.bias),
                ("ls1.gamma", vec![d], &block.scale1),
                ("norm2.weight", vec![d], &block.norm2.weight),
                ("norm2.bias", vec![d], &block.norm2.bias),
                ("mlp.fc1.weight", vec![h, d], &block.fc1.weight),
                ("mlp.fc1.bias", vec![h], &block.fc1.bias),
                ("mlp.fc2.weight", vec![d, h], &block.fc2.weight),
                ("mlp.fc2.bias", vec![d], &block.fc2.bias),
                ("ls2.gamma", vec![d], &block.scale2),
            ];
            all.extend(parts.map(|(name, shape, v)| (format!("blocks.{n}.{name}"), shape, v)));
        }
        all
    }
}

fn encode(values: &[f32], half: bool) -> Vec<u8> {
    if half {
        values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()
    } else {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }
}

/// The two name schemes of the same network.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    Original,
    HuggingFace,
}

/// Takes tensors out of a file by name and shape, and notes everything that does not fit.
struct Tensors<'a> {
    file: &'a SafeTensors<'a>,
    names: Names,
    prefix: &'static str,
    used: BTreeSet<String>,
    faults: Vec<String>,
}

impl<'a> Tensors<'a> {
    fn new(file: &'a SafeTensors<'a>) -> Self {
        let has = |name: &str| file.tensor(name).is_ok();
        let (names, prefix) = if has("dinov2.embeddings.cls_token") {
            (Names::HuggingFace, "dinov2.")
        } else if has("embeddings.cls_token") {
            (Names::HuggingFace, "")
        } else {
            (Names::Original, "")
        };
        Self { file, names, prefix, used: BTreeSet::new(), faults: Vec::new() }
    }

    fn pick(&self, original: &str, hugging_face: &str) -> String {
        match self.names {
            Names::Original => original.to_owned(),
            Names::HuggingFace => format!("{}{hugging_face}", self.prefix),
        }
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.file.tensor(name).ok().map(|tensor| tensor.shape().to_vec())
    }

    /// A tensor of exactly this shape. Otherwise it is empty and a fault is noted, so that
    /// [`Self::finish`] fails.
    fn take(&mut self, name: &str, shape: &[usize]) -> Vec<f32> {
        self.used.insert(name.to_owned());
        values_of(self.file, name, shape).unwrap_or_else(|fault| {
            self.faults.push(fault);
            Vec::new()
        })
    }

    fn norm(&mut self, name: &str, channels: usize) -> NormWeights {
        NormWeights {
            weight: self.take(&format!("{name}.weight"), &[channels]),
            bias: self.take(&format!("{name}.bias"), &[channels]),
        }
    }

    fn linear(&mut self, name: &str, out: usize, inputs: usize) -> LinearWeights {
        LinearWeights {
            weight: self.take(&format!("{name}.weight"), &[out, inputs]),
            bias: self.take(&format!("{name}.bias"), &[out]),
        }
    }

    /// Shape of the network, derived from the shapes in the file.
    fn architecture(&mut self) -> Option<Architecture> {
        let patch_name =
            self.pick("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight");
        let patch_shape = self.shape(&patch_name)?;
        let [channels, 3, patch, _] = patch_shape[..] else { return None };
        let position = self.shape(&self.pick("pos_embed", "embeddings.position_embeddings"))?;
        let registers = self.shape(&self.pick("register_tokens", "embeddings.register_tokens"));

        let block = |n: usize| match self.names {
            Names::Original => format!("blocks.{n}.norm1.weight"),
            Names::HuggingFace => format!("{}encoder.layer.{n}.norm1.weight", self.prefix),
        };
        let depth = (0..).take_while(|&n| self.file.tensor(&block(n)).is_ok()).count();
        let fc1 = self.pick("blocks.0.mlp.fc1.weight", "encoder.layer.0.mlp.fc1.weight");
        let hidden = self.shape(&fc1)?.first().copied()?;

        // The DINOv2 family has 64 features per head; narrower networks are for tests.
        let head = if channels >= 64 { 64 } else { 16 };
        let position_side = position.get(1)?.checked_sub(1)?.isqrt();
        let fits = channels % head == 0
            && [channels, hidden, patch, depth, position_side].iter().all(|&extent| extent > 0);
        fits.then_some(Architecture {
            channels,
            depth,
            heads: channels / head,
            hidden,
            patch,
            registers: registers.and_then(|shape| shape.get(1).copied()).unwrap_or(0),
            position_side,
        })
    }

    fn network(&mut self, fingerprint: String) -> Option<VitWeights> {
        let architecture = self.architecture()?;
        let Architecture { channels, depth, patch, registers, position_side, .. } = architecture;

        let pick = |original, hugging_face| self.pick(original, hugging_face);
        let class = pick("cls_token", "embeddings.cls_token");
        let position = pick("pos_embed", "embeddings.position_embeddings");
        let register = pick("register_tokens", "embeddings.register_tokens");
        let patches = pick("patch_embed.proj", "embeddings.patch_embeddings.projection");
        let norm = pick("norm", "layernorm");

        let register_tokens = match registers {
            0 => Vec::new(),
            _ => self.take(&register, &[1, registers, channels]),
        };
        let weight = self.take(&format!("{patches}.weight"), &[channels, 3, patch, patch]);
        let bias = self.take(&format!("{patches}.bias"), &[channels]);

        Some(VitWeights {
            architecture,
            patch_embedding: LinearWeights { weight, bias },
            class_token: self.take(&class, &[1, 1, channels]),
            register_tokens,
            position_embedding: self.take(&position, &[1, 1 + position_side.pow(2), channels]),
            blocks: (0..depth).map(|n| self.block(n, &architecture)).collect(),
            norm: self.norm(&norm, channels),
            fingerprint,
        })
    }

    fn block(&mut self, n: usize, architecture: &Architecture) -> BlockWeights {
        let Architecture { channels, hidden, .. } = *architecture;
        let prefix = self.pick(&format!("blocks.{n}"), &format!("encoder.layer.{n}"));
        let at = |name: &str| format!("{prefix}.{name}");
        let (projection, scale1, scale2) = match self.names {
            Names::Original => ("attn.proj", "ls1.gamma", "ls2.gamma"),
            Names::HuggingFace => {
                ("attention.output.dense", "layer_scale1.lambda1", "layer_scale2.lambda1")
            }
        };

        BlockWeights {
            norm1: self.norm(&at("norm1"), channels),
            qkv: self.qkv(&prefix, channels),
            projection: self.linear(&at(projection), channels, channels),
            scale1: self.take(&at(scale1), &[channels]),
            norm2: self.norm(&at("norm2"), channels),
            fc1: self.linear(&at("mlp.fc1"), hidden, channels),
            fc2: self.linear(&at("mlp.fc2"), channels, hidden),
            scale2: self.take(&at(scale2), &[channels]),
        }
    }

    /// Query, key and value: joined in the original, separate at Hugging Face.
    fn qkv(&mut self, prefix: &str, channels: usize) -> LinearWeights {
        if self.names == Names::Original {
            // The file states the extent, which may be absurd. No tensor is as large as the
            // saturated product.
            let joined = channels.saturating_mul(3);
            return self.linear(&format!("{prefix}.attn.qkv"), joined, channels);
        }

        let mut joined = LinearWeights { weight: Vec::new(), bias: Vec::new() };
        for part in ["query", "key", "value"] {
            let part =
                self.linear(&format!("{prefix}.attention.attention.{part}"), channels, channels);
            joined.weight.extend(part.weight);
            joined.bias.extend(part.bias);
        }
        joined
    }

    /// Fails unless every tensor was used. The mask token serves training only.
    fn finish(mut self) -> Result<(), WeightsError> {
        for name in self.file.names() {
            if !self.used.contains(name) && !name.ends_with("mask_token") {
                self.faults.push(format!("{name} is not known; is this another network?"));
            }
        }
        self.faults.sort();
        if self.faults.is_empty() { Ok(()) } else { Err(WeightsError::Tensors(self.faults)) }
    }
}

/// The values of a tensor of exactly this shape, or what is wrong with it. Memory is allocated only
/// for values that the file holds, whatever shape it states.
pub(super) fn values_of(
    file: &SafeTensors<'_>,
    name: &str,
    shape: &[usize],
) -> Result<Vec<f32>, String> {
    let tensor =
        file.tensor(name).map_err(|_| format!("{name} is missing, shape {shape:?} is needed"))?;
    if tensor.shape() != shape {
        let found = tensor.shape();
        return Err(format!("{name} has shape {found:?}, {shape:?} is needed"));
    }
    let values = decode(&tensor).map_err(|fault| format!("{name} {fault}"))?;
    if values.iter().any(|v| !v.is_finite()) {
        return Err(format!("{name} holds NaN or infinity; the file is damaged"));
    }
    Ok(values)
}

fn decode(tensor: &TensorView<'_>) -> Result<Vec<f32>, String> {
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => {
            Ok(data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        Dtype::F16 => {
            Ok(data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect())
        }
        Dtype::BF16 => {
            Ok(data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect())
        }
        other => Err(format!("has type {other:?}; F32, F16 or BF16 is needed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A safetensors file of zeros with these tensors.
    fn file(tensors: &[(&str, &[u64])]) -> Vec<u8> {
        let mut n_bytes = 0;
        let entries = tensors.iter().map(|(name, shape)| {
            let start = n_bytes;
            n_bytes += 4 * shape.iter().product::<u64>();
            let entry = serde_json::json!(
                { "dtype": "F32", "shape": shape, "data_offsets": [start, n_bytes] }
            );
            ((*name).to_owned(), entry)
        });
        let header = serde_json::Map::from_iter(entries);
        let header = serde_json::Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + n_bytes as usize, 0);
        bytes
    }

    #[test]
    fn a_grey_network_embeds_as_the_original_does_with_three_normalised_copies() {
        let architecture = Architecture {
            channels: 64,
            depth: 1,
            heads: 1,
            hidden: 8,
            patch: 2,
            registers: 0,
            position_side: 1,
        };
        let colour = VitWeights::random(architecture, 5);
        let grey = colour.clone().into_grey();
        assert_eq!((colour.colours(), grey.colours()), (3, 1));
        let pixels = [0.1, 0.4, 0.9, 0.3_f64];
        for channel in 0..64 {
            let embed = |network: &VitWeights, inputs: &[f64]| {
                let LinearWeights { weight, bias } = &network.patch_embedding;
                let row = &weight[channel * inputs.len()..(channel + 1) * inputs.len()];
                let products = row.iter().zip(inputs).map(|(w, x)| f64::from(*w) * x);
                products.sum::<f64>() + f64::from(bias[channel])
            };
            let normalised = |c: usize| {
                let (mean, scale) = (f64::from(IMAGENET_MEAN[c]), f64::from(IMAGENET_STD[c]));
                pixels.map(|pixel| (pixel - mean) / scale)
            };
            let copies = [normalised(0), normalised(1), normalised(2)].concat();
            assert!((embed(&colour, &copies) - embed(&grey, &pixels)).abs() < 1e-5);
        }
        assert_eq!(grey.clone().into_grey().patch_embedding.weight, grey.patch_embedding.weight);
    }

    #[test]
    fn extents_that_nothing_stands_behind_cost_no_memory() {
        for channels in [1 << 40, 1 << 58] {
            let bytes = file(&[
                ("patch_embed.proj.weight", &[channels, 3, 14, 0]),
                ("pos_embed", &[1, 5, 0]),
                ("blocks.0.norm1.weight", &[0]),
                ("blocks.0.mlp.fc1.weight", &[1 << 60, 0]),
            ]);
            assert!(bytes.len() < 1000);
            let error = VitWeights::from_bytes(&bytes).unwrap_err().to_string();
            let needed = format!("[{channels}, 3, 14, 0], [{channels}, 3, 14, 14] is needed");
            assert!(error.contains(&needed), "{error}");
            assert!(error.contains(&format!("cls_token is missing, shape [1, 1, {channels}]")));
        }
    }
}
