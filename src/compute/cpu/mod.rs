//! The native CPU engine: the same network as in burn, with plain buffers.
//!
//! Each thread computes one image at a time, from the first patch to the last layer. So the
//! features of an image depend neither on the batch nor on the number of threads, to the last bit.
//!
//! `product` multiplies matrices tile by tile, with the loops of each instruction set in `tile`.
//! The steps between products are in `kernels`. `linknet` extracts brains, with the convolutions in
//! `convolution` and the steps between them in `features`. `whole_volume` and `within_reach` find
//! nearest tokens, with the kernels in `search`.

mod attention;
mod convolution;
mod distances;
mod dots;
mod encoder;
mod features;
mod instructions;
mod kernels;
mod linknet;
mod product;
mod row;
mod search;
mod tile;
mod tokens;
mod vectorised;
mod whole_volume;
mod within_reach;

pub use distances::CpuDistances;
pub use encoder::CpuEncoder;
pub use instructions::Instructions;
pub use linknet::CpuBrainNetwork;
