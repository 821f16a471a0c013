//! Kernels from their source, and how many threads run them.

use std::sync::Arc;

use cudarc::{
    driver::{CudaContext, CudaModule, LaunchConfig},
    nvrtc::{CompileOptions, compile_ptx_with_opts},
};

use super::failure::Failure;

/// Threads per block of the kernels that treat entries or tokens one by one.
pub(super) const THREADS: u32 = 256;

/// Compiles kernels for this GPU, with `halves.cu` in front of them.
///
/// # Errors
/// If the GPU is older than Ampere, or they do not compile.
pub(super) fn compile(
    context: &Arc<CudaContext>,
    source: &str,
    defines: &[String],
) -> Result<Arc<CudaModule>, Failure> {
    let (major, minor) = context.compute_capability()?;
    if major < 8 {
        return Err(Failure::Unfit(format!(
            "found compute capability {major}.{minor}; needed 8.0; set encoder.precision = \"f32\""
        )));
    }
    let mut options = vec![format!("--gpu-architecture=compute_{major}{minor}")];
    options.extend_from_slice(defines);
    let options = CompileOptions { options, ..CompileOptions::default() };
    let source = [include_str!("halves.cu"), source].concat();
    let compiled = compile_ptx_with_opts(source, options).map_err(Failure::Compiler)?;
    Ok(context.load_module(compiled)?)
}

/// Blocks of [`THREADS`] for so many threads.
pub(super) fn threads(n: usize) -> LaunchConfig {
    let blocks = n.div_ceil(THREADS as usize) as u32;
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 }
}
