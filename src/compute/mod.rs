//! The engines, one folder each: `cpu` natively; `cuda` with cuBLASLt and kernels of our own, for
//! NVIDIA GPUs; `burn` through burn. `device` chooses one, and tries it first.

#[cfg(feature = "burn")]
pub mod burn;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod position;
pub mod tokenise;

use std::fmt;

use position::PositionResize;
use serde::{Deserialize, Serialize};

use crate::domain::{PairDistances, SliceEncoder};

/// Encoder and distances on one device.
pub type Devices = (Box<dyn SliceEncoder>, Box<dyn PairDistances>);

/// What the encoder returns: which layers, and in which form. Shared by all engines.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderOptions {
    /// Blocks whose output is returned, counted from 1, ascending; later blocks are not computed.
    pub layers: Vec<usize>,
    /// Whether the network's final layer norm is applied to each of them (the original's
    /// `get_intermediate_layers` does by default).
    pub final_norm: bool,
    /// How the position embedding is resized.
    pub position: PositionResize,
    /// Number format of the products; without one, that which finds as much as f32 and takes the
    /// least time on the device. The CPU takes f32 where it does not have it.
    pub precision: Option<Precision>,
}

impl EncoderOptions {
    /// The number format on a GPU.
    pub fn precision_on_gpu(&self) -> Precision {
        self.precision.unwrap_or(Precision::F16)
    }
}

/// The number format of the matrix products and of what lies between them. Sums, norms and the
/// stream of tokens that the blocks add to are f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 24 significant bits in memory. On CUDA the tensor cores round the factors of each product
    /// to the 11 bits of TF32.
    #[default]
    F32,
    /// 8 significant bits, the exponents of f32.
    Bf16,
    /// 11 significant bits, values up to 65,504.
    F16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}
