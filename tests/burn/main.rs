//! The burn engine on burn's CPU backend: the code that a CUDA GPU runs, without one.
//!
//! Judged by golden features of the real network, by the native engine (which was written
//! separately, with other kernels), and by the definition of the distances.

#![expect(clippy::unwrap_used, reason = "helpers of tests stand outside of test functions")]

mod distances;
mod encoder;
#[path = "../reference/goldens.rs"]
#[expect(dead_code, reason = "the scans are for the stages outside the engine")]
mod goldens;
mod gpu;
mod reference;
mod tiny;

use std::path::PathBuf;

/// The folder of real data and weights, or `None` with the reason on stdout.
fn shared(file: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("ODDSCAN_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let path = folder.join(file);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is absent; ODDSCAN_SHARED names the folder", path.display());
    None
}
