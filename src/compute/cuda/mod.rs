//! The fast engine for NVIDIA GPUs: the network's products by cuBLASLt, what lies between them by
//! kernels of our own (`kernels.cu`), in f16 or bf16; the nearest tokens by a kernel of our own
//! (`nearest.cu`).
//!
//! `tests/kernels` runs the kernels on a CPU.
//!
//! The engine in burn computes the same in f32, at a tenth of the speed: its products do not use
//! the instructions that Hopper's speed rests on, and what lies between them is not fused unless
//! kernels are chosen by measuring, which takes minutes at each first start
//! (`docs/performance.md`). This one needs an NVIDIA GPU from Ampere on (2020, compute capability
//! 8.0), NVRTC and cuBLASLt, which come with the CUDA toolkit.

mod distances;
mod encoder;
mod failure;
mod module;
mod parts;

pub use distances::CudaDistances;
pub use encoder::CudaEncoder;
pub(super) use parts::PART;
