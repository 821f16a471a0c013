//! Compiles kernels from their source, and chooses their number of threads.

use std::{ffi::CString, sync::Arc};

use cudarc::{
    driver::{CudaContext, CudaModule, LaunchConfig},
    nvrtc::{
        CompileOptions, Ptx, compile_ptx_with_opts,
        result::{self as nvrtc, NvrtcError},
        sys,
    },
};

use super::failure::Failure;

/// Threads per block, for kernels that process entries or tokens one by one.
pub(super) const THREADS: u32 = 256;

/// Compiles kernels for this GPU, with `halves.cu` in front of them.
///
/// # Errors
/// If the GPU is older than Ampere, or the kernels do not compile.
pub(super) fn compile(
    context: &Arc<CudaContext>,
    source: &str,
    defines: &[String],
) -> Result<Arc<CudaModule>, Failure> {
    let (major, minor) = context.compute_capability()?;
    if major < 8 {
        return Err(Failure::Unfit(format!(
            "found compute capability {major}.{minor}; needed 8.0, or encoder.precision = \"f32\""
        )));
    }
    let source = [include_str!("halves.cu"), source].concat();
    let options = |target: String| -> Vec<String> {
        let own = [format!("--gpu-architecture={target}"), "--std=c++17".to_owned()];
        own.into_iter().chain(defines.iter().cloned()).collect()
    };
    // Machine code is tried first, because a driver that is older than NVRTC cannot read its PTX.
    if let Ok(code) = machine_code(&source, &options(format!("sm_{major}{minor}"))) {
        return Ok(context.load_module(code)?);
    }
    // An NVRTC that is older than the GPU cannot make its machine code, so the driver translates
    // PTX. This call also returns a log with its errors.
    let options =
        CompileOptions { options: options("compute_80".to_owned()), ..Default::default() };
    let ptx = compile_ptx_with_opts(source, options).map_err(Failure::Compiler)?;
    Ok(context.load_module(ptx)?)
}

fn machine_code(source: &str, options: &[String]) -> Result<Ptx, NvrtcError> {
    let source = CString::new(source).expect("kernels hold no zero byte");
    let program = nvrtc::create_program(&source, None)?;
    let code = || {
        let mut size = 0;
        // SAFETY: `program` is destroyed below; the buffer is as long as NVRTC says.
        unsafe {
            nvrtc::compile_program(program, options)?;
            sys::nvrtcGetCUBINSize(program, &raw mut size).result()?;
            let mut code = vec![0_u8; size];
            sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result()?;
            Ok(code)
        }
    };
    let code = code();
    // SAFETY: nothing uses the program after this.
    unsafe { nvrtc::destroy_program(program)? };
    code.map(Ptx::from_binary)
}

/// The launch with blocks of [`THREADS`] for at least `n` threads.
pub(super) fn threads(n: usize) -> LaunchConfig {
    let blocks = n.div_ceil(THREADS as usize) as u32;
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_become_machine_code_wherever_nvrtc_is() {
        // SAFETY: loading a library runs its initialisers, which may run in any process.
        if !unsafe { sys::is_culib_present() } {
            eprintln!("skipped: no libnvrtc.so");
            return;
        }
        let sources = [include_str!("kernels.cu"), include_str!("nearest.cu")];
        for (source, target) in sources.iter().flat_map(|source| [(source, 80), (source, 90)]) {
            let source = [include_str!("halves.cu"), source].concat();
            let defines = ["-DWIDTH=64".to_owned(), "-DBF16".to_owned()];
            for n_defines in 1..=2 {
                let target = format!("--gpu-architecture=sm_{target}");
                let options = [&[target, "--std=c++17".to_owned()], &defines[..n_defines]].concat();
                machine_code(&source, &options).unwrap();
            }
        }
    }
}
