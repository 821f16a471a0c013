//! The engine in burn: the same network and distances as natively, generic over burn's `Backend`.
//!
//! CUDA in production; burn's CPU backend in the tests, so that the code that a GPU runs is tested
//! on machines without one. Written for burn 0.21, whose tensors carry the backend as a type.

#[cfg(feature = "cuda")]
pub mod device;
pub mod encoder;
mod failure;
pub mod nearest;
pub mod vit;

pub use encoder::BurnEncoder;
pub use nearest::BurnDistances;

use burn::tensor::FloatDType;

/// The number format of the linear layers, which are nine tenths of the work.
///
/// Norms, attention, sums and features are f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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

impl Precision {
    fn dtype(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
            Self::F16 => FloatDType::F16,
        }
    }
}
