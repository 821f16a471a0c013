//! The fast engine for NVIDIA GPUs. cuBLASLt computes the network's products, and oddscan's own
//! kernels (`kernels.cu`) the steps between them, in f16 or bf16. Another kernel of oddscan
//! (`nearest.cu`) finds the nearest tokens.
//!
//! `tests/kernels` runs the kernels on a CPU.
//!
//! The engine in burn computes the same in f32, at a tenth of the speed. Its products do not use
//! the instructions that make Hopper fast. It fuses the steps between them only if kernels are
//! chosen by measurements, which take minutes at each first start (`docs/performance.md`).
//!
//! This engine needs an NVIDIA GPU of the generation Ampere or newer (2020, compute capability
//! 8.0), NVRTC and cuBLASLt. Both libraries are part of the CUDA toolkit.

mod distances;
mod encoder;
mod failure;
mod module;
mod parts;

pub use distances::CudaDistances;
pub use encoder::CudaEncoder;
pub(super) use parts::PART;
