//! Which engine runs on which device. An engine on a GPU is compared with the CPU's before it is
//! trusted.

pub mod choose;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(test, feature = "cuda"))]
pub mod fallback;
#[cfg(feature = "cuda")]
pub mod probe;
#[cfg(any(test, feature = "cuda"))]
mod trial;
