//! The engine in burn: the same network and distances as natively, generic over burn's `Backend`.
//!
//! CUDA in production; burn's CPU backend in the tests, so that the code that a GPU runs is tested
//! on machines without one. Written for burn 0.21, whose tensors carry the backend as a type.

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod encoder;
pub(super) mod failure;
pub mod linknet;
pub mod nearest;
pub mod vit;

pub use encoder::BurnEncoder;
pub use linknet::BurnBrainNetwork;
pub use nearest::BurnDistances;
