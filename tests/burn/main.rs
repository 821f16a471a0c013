//! The burn engine on burn's CPU backend: the code that a CUDA GPU runs, without one.
//!
//! Judged by golden features of the real network, by the native engine (which was written
//! separately, with other kernels), and by the definition of the distances.

#![expect(clippy::unwrap_used, reason = "helpers of tests stand outside of test functions")]

mod brain_network;
mod distances;
mod encoder;
#[path = "../reference/goldens.rs"]
#[expect(dead_code, reason = "the scans are for the stages outside the engine")]
mod goldens;
mod gpu;
#[path = "../reference/linknet.rs"]
mod linknet;
mod reference;
mod tiny;
