//! The engine in burn: the same network and distances as the native engine, generic over burn's
//! `Backend`.
//!
//! Production uses CUDA. The tests use burn's CPU backend, so that machines without a GPU test the
//! code that a GPU runs. It is written for burn 0.21, whose tensors have the backend as a type
//! parameter.

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
