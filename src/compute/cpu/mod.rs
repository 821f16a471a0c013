//! The native CPU engine: the same network as in burn, on plain buffers.
//!
//! One image per thread at a time, each from its first patch to its last layer, so that its
//! features depend neither on the batch nor on the number of threads, to the last bit. Products
//! come from the crate `gemm`; what lies between them is in `kernels`.

mod distances;
mod encoder;
mod kernels;

pub use distances::CpuDistances;
pub use encoder::CpuEncoder;
