//! Chooses the engine of a device. An engine on a GPU is first compared with the CPU's engine.

pub mod choose;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(test, feature = "cuda"))]
pub mod fallback;
#[cfg(feature = "cuda")]
pub mod probe;
#[cfg(any(test, feature = "cuda"))]
mod trial;
