//! Loads the weights of the brain extraction networks. Every tensor must be used, none may be
//! missing, and all shapes must match.
//!
//! deepbet 1.0.2 (Fisch et al. 2024, doi 10.1016/j.compbiomed.2024.108845, MIT licence) has two
//! networks of one architecture, a LinkNet (Chaurasia and Culurciello 2017) over volumes. Both are
//! in one safetensors file. A tensor is called `locate.` or `outline.` and its original name.

use std::collections::BTreeSet;

use safetensors::SafeTensors;
use sha2::{Digest, Sha256};

use super::{BrainPart, weights::values_of};
use crate::numeric::projection::Normal;

/// The kernel of a convolution over a volume, with the same extent along each axis.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// `[outputs, inputs, z, y, x]`; of a transposed convolution `[inputs, outputs, z, y, x]`.
    pub shape: [usize; 5],
    /// Row-major.
    pub weight: Vec<f32>,
    /// `[outputs]`; empty where the original has none.
    pub bias: Vec<f32>,
}

/// One stage of the encoder: two residual blocks of two convolutions each. Every convolution of a
/// network but the last is followed by an instance norm.
#[derive(Debug, Clone)]
pub struct DownWeights {
    /// First block; its first convolution halves the side, if there is a shortcut.
    pub first: [Kernel; 2],
    /// What the first block adds instead of its input.
    pub shortcut: Option<Kernel>,
    /// Second block.
    pub second: [Kernel; 2],
}

/// One stage of the decoder.
#[derive(Debug, Clone)]
pub struct UpWeights {
    /// Reduces the channels to a quarter.
    pub narrow: Kernel,
    /// Transposed; doubles the side in all stages but the last.
    pub enlarge: Kernel,
    /// Changes to the channels of the encoder stage whose output is added.
    pub widen: Kernel,
}

/// All weights of one network.
#[derive(Debug, Clone)]
pub struct LinkNetWeights {
    /// Halves the side.
    pub stem: Kernel,
    /// From the finest stage to the coarsest.
    pub down: [DownWeights; 4],
    /// From the coarsest stage to the finest.
    pub up: [UpWeights; 4],
    /// Transposed; doubles the side.
    pub enlarge: Kernel,
    /// At half of the input's side.
    pub smooth: Kernel,
    /// Transposed; doubles the side. Two outputs: background and brain.
    pub classify: Kernel,
}

/// Both networks.
#[derive(Debug, Clone)]
pub struct BrainWeights {
    /// Finds the brain in a whole head.
    pub locate: LinkNetWeights,
    /// Outlines it in the box around it.
    pub outline: LinkNetWeights,
    /// SHA-256 of the file, 64 hex digits.
    pub fingerprint: String,
}

/// The instance norms add this to a variance: epsilon of torch.nn.InstanceNorm3d.
pub(crate) const NORM_EPSILON: f64 = 1e-5;

/// Why a file of brain extraction weights cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BrainWeightsError {
    /// No safetensors file.
    #[error("not a safetensors file ({0}); get it with `oddscan model fetch --brain`")]
    Format(String),
    /// The tensors are not those of the networks.
    #[error("not the tensors of deepbet's two networks:{}", .0.iter().map(|f| format!("\n  {f}")).collect::<String>())]
    Tensors(Vec<String>),
}

impl BrainWeights {
    /// Reads the content of a safetensors file; f32, f16 and bf16 become f32.
    ///
    /// # Errors
    /// All missing, unused, misshapen and non-finite tensors at once.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BrainWeightsError> {
        let file = SafeTensors::deserialize(bytes)
            .map_err(|error| BrainWeightsError::Format(error.to_string()))?;
        let mut tensors = Tensors { file: &file, used: BTreeSet::new(), faults: Vec::new() };
        let (locate, outline) = (tensors.network("locate"), tensors.network("outline"));
        tensors.finish()?;
        let fingerprint = hex::encode(Sha256::digest(bytes));
        Ok(Self { locate, outline, fingerprint })
    }

    /// The network of one step.
    pub fn part(&self, part: BrainPart) -> &LinkNetWeights {
        match part {
            BrainPart::Locate => &self.locate,
            BrainPart::Outline => &self.outline,
        }
    }

    /// Networks of the same shapes with random weights, for trials of a device. For an image of
    /// noise their probabilities cover [0, 1].
    pub fn random_alike(&self, seed: u64) -> Self {
        let mut made_up = self.clone();
        let mut normal = Normal::new(seed);
        let networks = [&mut made_up.locate, &mut made_up.outline];
        for kernel in networks.into_iter().flat_map(LinkNetWeights::kernels_mut) {
            // This fits the last layer, whose inputs come first in the shape. The norms behind all
            // the others undo any scale.
            let deviation = (kernel.shape[0] as f64).powf(-0.5);
            for value in kernel.weight.iter_mut().chain(&mut kernel.bias) {
                *value = (deviation * normal.next()) as f32;
            }
        }
        made_up
    }
}

impl LinkNetWeights {
    fn kernels_mut(&mut self) -> impl Iterator<Item = &mut Kernel> {
        let Self { stem, down, up, enlarge, smooth, classify } = self;
        let down = down.iter_mut().flat_map(|DownWeights { first, shortcut, second }| {
            first.iter_mut().chain(shortcut).chain(second)
        });
        let up =
            up.iter_mut().flat_map(|UpWeights { narrow, enlarge, widen }| [narrow, enlarge, widen]);
        [stem].into_iter().chain(down).chain(up).chain([enlarge, smooth, classify])
    }
}

/// Takes tensors out of a file by name and shape, and notes everything that does not fit.
struct Tensors<'a> {
    file: &'a SafeTensors<'a>,
    used: BTreeSet<String>,
    faults: Vec<String>,
}

impl Tensors<'_> {
    fn take(&mut self, name: String, shape: &[usize]) -> Vec<f32> {
        let values = values_of(self.file, &name, shape);
        self.used.insert(name);
        values.unwrap_or_else(|fault| {
            self.faults.push(fault);
            Vec::new()
        })
    }

    /// A kernel of `side` voxels along each axis, from the first channels to the second ones.
    fn kernel(&mut self, name: &str, [first, second]: [usize; 2], side: usize) -> Kernel {
        let shape = [first, second, side, side, side];
        let weight = self.take(format!("{name}.weight"), &shape);
        Kernel { shape, weight: turned(&weight, side), bias: Vec::new() }
    }

    fn with_bias(&mut self, name: &str, shape: [usize; 2], side: usize, outputs: usize) -> Kernel {
        let bias = self.take(format!("{name}.bias"), &[outputs]);
        Kernel { bias, ..self.kernel(name, shape, side) }
    }

    /// Channels of the encoder's stages, derived from the shapes in the file. deepbet has 16, 32,
    /// 64 and 128.
    fn widths(&mut self, network: &str) -> [usize; 4] {
        [0, 1, 2, 3].map(|stage| {
            let name = format!("{network}.down{stage}.block2.double_conv.0.weight");
            let tensor = self.file.tensor(&name).ok();
            let found = tensor.and_then(|tensor| tensor.shape().first().copied());
            let width = found.filter(|width| *width > 0 && width % 4 == 0);
            if let (Some(found), None) = (found, width) {
                self.faults.push(format!("{name} has {found} outputs, a multiple of 4 is needed"));
            }
            // [`Self::take`] reports a missing tensor.
            width.unwrap_or(16 << stage)
        })
    }

    fn network(&mut self, network: &str) -> LinkNetWeights {
        let widths = self.widths(network);
        let at = |name: &str| format!("{network}.{name}");
        let (width, half) = (widths[0], widths[0] / 2);
        LinkNetWeights {
            stem: self.kernel(&at("init.0"), [width, 1], 7),
            down: [0, 1, 2, 3].map(|stage| self.down(&at(&format!("down{stage}")), widths, stage)),
            up: [0, 1, 2, 3].map(|stage| self.up(&at(&format!("up{stage}")), widths, 3 - stage)),
            enlarge: self.with_bias(&at("tp_conv1.0"), [width, half], 3, half),
            smooth: self.with_bias(&at("conv.0"), [half, half], 3, half),
            classify: self.with_bias(&at("tp_conv2"), [half, 2], 2, 2),
        }
    }

    fn down(&mut self, name: &str, widths: [usize; 4], stage: usize) -> DownWeights {
        let (inputs, outputs) = (widths[stage.saturating_sub(1)], widths[stage]);
        let mut convolution =
            |block: &str, inputs| self.kernel(&format!("{name}.{block}"), [outputs, inputs], 3);

        let first = [
            convolution("block1.double_conv.0", inputs),
            convolution("block1.double_conv.3", outputs),
        ];
        let second = [
            convolution("block2.double_conv.0", outputs),
            convolution("block2.double_conv.3", outputs),
        ];

        let shortcut = (stage > 0)
            .then(|| self.kernel(&format!("{name}.block1.downsample.0"), [outputs, inputs], 1));
        DownWeights { first, shortcut, second }
    }

    /// The stage of the decoder that follows a stage of the encoder.
    fn up(&mut self, name: &str, widths: [usize; 4], stage: usize) -> UpWeights {
        let (inputs, outputs) = (widths[stage], widths[stage.saturating_sub(1)]);
        let narrow = inputs / 4;
        UpWeights {
            narrow: self.kernel(&format!("{name}.conv1.0"), [narrow, inputs], 1),
            enlarge: self.kernel(&format!("{name}.tp_conv.0"), [narrow, narrow], 3),
            widen: self.kernel(&format!("{name}.conv2.0"), [outputs, narrow], 1),
        }
    }

    /// Fails unless every tensor was used.
    fn finish(mut self) -> Result<(), BrainWeightsError> {
        for name in self.file.names() {
            if !self.used.contains(name) {
                self.faults.push(format!("{name} is not known; is this another network?"));
            }
        }
        self.faults.sort();
        if self.faults.is_empty() { Ok(()) } else { Err(BrainWeightsError::Tensors(self.faults)) }
    }
}

/// Kernels `[.., x, y, z]` as `[.., z, y, x]`: the original's arrays have z as the fastest axis,
/// our volumes x.
fn turned(weight: &[f32], side: usize) -> Vec<f32> {
    let place = |index: usize| {
        let (x, y, z) = (index % side, index / side % side, index / (side * side));
        (x * side + y) * side + z
    };
    let n_taps = side.pow(3);
    weight.chunks_exact(n_taps).flat_map(|taps| (0..n_taps).map(move |i| taps[place(i)])).collect()
}

#[cfg(test)]
mod tests {
    use safetensors::{Dtype, tensor::TensorView};

    use super::*;

    /// Names and shapes of one network of these widths.
    fn tensors(network: &str, [a, b, c, d]: [usize; 4]) -> Vec<(String, Vec<usize>)> {
        let mut all = vec![
            ("init.0.weight".to_owned(), vec![a, 1, 7, 7, 7]),
            ("tp_conv1.0.weight".to_owned(), vec![a, a / 2, 3, 3, 3]),
            ("tp_conv1.0.bias".to_owned(), vec![a / 2]),
            ("conv.0.weight".to_owned(), vec![a / 2, a / 2, 3, 3, 3]),
            ("conv.0.bias".to_owned(), vec![a / 2]),
            ("tp_conv2.weight".to_owned(), vec![a / 2, 2, 2, 2, 2]),
            ("tp_conv2.bias".to_owned(), vec![2]),
        ];
        for (stage, (inputs, outputs)) in [(a, a), (a, b), (b, c), (c, d)].into_iter().enumerate() {
            for (block, inputs) in [(1, inputs), (2, outputs)] {
                for (layer, inputs) in [(0, inputs), (3, outputs)] {
                    let name = format!("down{stage}.block{block}.double_conv.{layer}.weight");
                    all.push((name, vec![outputs, inputs, 3, 3, 3]));
                }
            }
            if stage > 0 {
                let name = format!("down{stage}.block1.downsample.0.weight");
                all.push((name, vec![outputs, inputs, 1, 1, 1]));
            }
        }
        for (stage, (inputs, outputs)) in [(d, c), (c, b), (b, a), (a, a)].into_iter().enumerate() {
            let quarter = inputs / 4;
            all.push((format!("up{stage}.conv1.0.weight"), vec![quarter, inputs, 1, 1, 1]));
            all.push((format!("up{stage}.tp_conv.0.weight"), vec![quarter, quarter, 3, 3, 3]));
            all.push((format!("up{stage}.conv2.0.weight"), vec![outputs, quarter, 1, 1, 1]));
        }
        all.into_iter().map(|(name, shape)| (format!("{network}.{name}"), shape)).collect()
    }

    /// A file of these tensors, each value its place in its tensor.
    fn file(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
        let data: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, shape)| {
                let values = 0..shape.iter().product::<usize>();
                values.flat_map(|value| (value as f32).to_le_bytes()).collect()
            })
            .collect();
        let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
            (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    fn both() -> Vec<(String, Vec<usize>)> {
        [tensors("locate", [4, 8, 8, 12]), tensors("outline", [8, 4, 4, 8])].concat()
    }

    fn faults(tensors: &[(String, Vec<usize>)]) -> String {
        BrainWeights::from_bytes(&file(tensors)).unwrap_err().to_string()
    }

    #[test]
    fn two_networks_of_any_widths_are_read_whole() {
        let weights = BrainWeights::from_bytes(&file(&both())).unwrap();
        assert_eq!(weights.part(BrainPart::Locate).down[3].second[1].shape, [12, 12, 3, 3, 3]);
        assert_eq!(weights.part(BrainPart::Outline).classify.shape, [4, 2, 2, 2, 2]);
        assert_eq!(weights.fingerprint, hex::encode(Sha256::digest(file(&both()))));
        // Input 0 of output 1: the place [x, y, z] = [0, 1, 2] of the original.
        let kernel = &weights.locate.down[0].first[0];
        let turned = kernel.weight[27 * 4..][(2 * 3 + 1) * 3];
        assert_eq!(turned, (27 * 4 + 3 + 2) as f32);
    }

    #[test]
    fn all_that_does_not_fit_is_said_at_once() {
        let mut tensors = both();
        tensors.retain(|(name, _)| name != "locate.conv.0.bias");
        let shape = tensors.iter_mut().find(|(name, _)| name == "outline.init.0.weight").unwrap();
        shape.1 = vec![8, 1, 5, 5, 5];
        tensors.push(("outline.head.weight".to_owned(), vec![1]));
        let found = faults(&tensors);
        for fault in [
            "locate.conv.0.bias is missing, shape [2] is needed",
            "outline.init.0.weight has shape [8, 1, 5, 5, 5], [8, 1, 7, 7, 7] is needed",
            "outline.head.weight is not known",
        ] {
            assert!(found.contains(fault), "{fault}: {found}");
        }
    }

    #[test]
    fn widths_that_cannot_be_quartered_are_refused() {
        let tensors = [tensors("locate", [4, 6, 8, 12]), tensors("outline", [4; 4])].concat();
        assert!(faults(&tensors).contains("has 6 outputs, a multiple of 4 is needed"));
    }

    #[test]
    fn one_network_alone_and_other_files_are_refused() {
        assert!(faults(&tensors("locate", [4; 4])).contains("outline.tp_conv2.bias is missing"));
        let error = BrainWeights::from_bytes(b"no weights").unwrap_err().to_string();
        assert!(error.contains("model fetch --brain"), "{error}");
        let mut bytes = file(&both());
        let last = bytes.len() - 4;
        bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
        let error = BrainWeights::from_bytes(&bytes).unwrap_err().to_string();
        assert!(error.contains("holds NaN or infinity"), "{error}");
    }
}
