//! The engines, one folder each: `cpu` is native, `cuda` uses cuBLASLt and oddscan's own kernels on
//! NVIDIA GPUs, `burn` uses the crate burn. `device` chooses an engine and tests it first.

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

/// Which layers the encoder returns, and in which form. All engines use these options.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderOptions {
    /// Blocks whose output is returned, counted from 1, ascending. Later blocks are not computed.
    pub layers: Vec<usize>,
    /// Whether the network's final layer norm is applied to each of them. The original's
    /// `get_intermediate_layers` does so by default.
    pub final_norm: bool,
    /// How the position embedding is resized.
    pub position: PositionResize,
    /// Number format of the products. `None` means the fastest format of the device that finds as
    /// much as f32. A CPU that lacks the format uses f32.
    pub precision: Option<Precision>,
}

impl EncoderOptions {
    /// The number format on a GPU: the configured one, or the default of GPUs.
    pub fn precision_on_gpu(&self) -> Precision {
        self.precision.unwrap_or(Precision::F16)
    }
}

/// The number format of the matrix products and of the values between them. Sums, norms and the
/// stream of tokens that the blocks add to are always f32.
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
