//! Finds which requirements of a CUDA GPU at run time this machine meets.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use cudarc::driver::{result as driver, result::DriverError};

use crate::compute::burn::failure::guarded;

/// The requirements of a CUDA GPU at run time that were found. The search covers the same places as
/// burn's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaProbe {
    /// Whether the driver, `libcuda`, can be loaded.
    pub driver: bool,
    /// Whether the run-time compiler, `libnvrtc`, can be loaded.
    pub compiler: bool,
    /// Whether the matrix products, `libcublasLt`, can be loaded.
    pub products: bool,
    /// The folder that holds the CUDA headers `cuda_runtime.h` and `cuda_fp16.h`.
    pub headers: Option<PathBuf>,
    /// Name and memory of each GPU.
    pub gpus: Vec<String>,
    /// What the driver said instead of listing GPUs.
    pub driver_error: Option<String>,
}

impl CudaProbe {
    /// Examines this machine. It loads the libraries and allocates nothing on a GPU.
    pub fn look() -> Self {
        // SAFETY: loading a library runs its initialisers. Those of NVIDIA's libraries may run in
        // any process.
        let (driver, compiler, products) = unsafe {
            (
                cudarc::driver::sys::is_culib_present(),
                cudarc::nvrtc::sys::is_culib_present(),
                cudarc::cublaslt::sys::is_culib_present(),
            )
        };
        let gpus = if driver { guarded("cuda", 0, gpus) } else { Ok(Vec::new()) };
        let (gpus, driver_error) = match gpus {
            Ok(gpus) => (gpus, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        Self { driver, compiler, products, headers: headers(), gpus, driver_error }
    }

    /// All missing requirements, with what was found and what to do; `None` if a GPU can be used.
    /// With `by_burn` the headers are required, too, because burn panics without them.
    pub fn missing(&self, by_burn: bool) -> Option<String> {
        let mut needs = Vec::new();
        if !self.driver {
            needs.push("libcuda.so.1: install the NVIDIA driver".to_owned());
        } else if self.gpus.is_empty() {
            needs.push("a GPU: give the service access to /dev/nvidia*".to_owned());
        }
        if !self.compiler {
            needs.push(
                "libnvrtc.so: install the CUDA toolkit, or put its folder into LD_LIBRARY_PATH"
                    .to_owned(),
            );
        }
        if !self.products {
            needs.push(
                "libcublasLt.so: install the CUDA toolkit, or put its folder into LD_LIBRARY_PATH"
                    .to_owned(),
            );
        }
        if by_burn && self.headers.is_none() {
            needs.push(
                "include/cuda_fp16.h: install the CUDA toolkit, or set CUDA_PATH to the folder above \
                 include, or set encoder.precision = \"f16\""
                    .to_owned(),
            );
        }
        (!needs.is_empty()).then(|| format!("found {self}; needed {}", needs.join("; ")))
    }
}

impl fmt::Display for CudaProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = |there: bool| if there { "found" } else { "not found" };
        write!(f, "libcuda {}, libnvrtc {}, ", found(self.driver), found(self.compiler))?;
        write!(f, "libcublasLt {}, ", found(self.products))?;
        match &self.headers {
            Some(folder) => write!(f, "CUDA headers in {}, ", folder.display())?,
            None => write!(f, "CUDA headers not found, ")?,
        }
        match (&self.driver_error, self.gpus.is_empty()) {
            (Some(error), _) => write!(f, "no list of GPUs ({error})"),
            (None, true) => write!(f, "no GPU"),
            (None, false) => write!(f, "GPU {}", self.gpus.join(", ")),
        }
    }
}

/// What was found on this machine if a GPU can be used; otherwise what is missing and what to do.
pub fn cuda_availability() -> Result<String, String> {
    let found = CudaProbe::look();
    found.missing(false).map_or_else(|| Ok(found.to_string()), Err)
}

fn gpus() -> Result<Vec<String>, DriverError> {
    driver::init()?;
    (0..driver::device::get_count()?)
        .map(|index| {
            let gpu = driver::device::get(index)?;
            // SAFETY: `gpu` comes from the driver.
            let bytes = unsafe { driver::device::total_mem(gpu)? };
            let gib = bytes as f64 / f64::from(1 << 30);
            Ok(format!("{index}: {} with {gib:.1} GiB", driver::device::get_name(gpu)?))
        })
        .collect()
}

/// The folder from which cubecl 0.10 takes the headers, if they exist.
fn headers() -> Option<PathBuf> {
    let toolkit = match std::env::var_os("CUDA_PATH") {
        Some(path) => PathBuf::from(path),
        None if Path::new("/usr/local/cuda").exists() => "/usr/local/cuda".into(),
        None if Path::new("/opt/cuda").exists() => "/opt/cuda".into(),
        None if Path::new("/usr/bin/nvcc").exists() => "/usr".into(),
        None => return None,
    };
    let include = toolkit.join("include");
    ["cuda_runtime.h", "cuda_fp16.h"]
        .iter()
        .all(|name| include.join(name).exists())
        .then_some(include)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> CudaProbe {
        CudaProbe {
            driver: false,
            compiler: false,
            products: false,
            headers: None,
            gpus: Vec::new(),
            driver_error: None,
        }
    }

    #[test]
    fn a_machine_without_cuda_is_told_everything_that_is_missing_at_once() {
        let missing = nothing().missing(true).unwrap();
        for part in
            ["libcuda not found", "NVIDIA driver", "libnvrtc.so", "libcublasLt.so", "CUDA_PATH"]
        {
            assert!(missing.contains(part), "{part}: {missing}");
        }
    }

    #[test]
    fn a_complete_machine_lacks_nothing() {
        let found = CudaProbe {
            driver: true,
            compiler: true,
            products: true,
            headers: Some("/usr/local/cuda/include".into()),
            gpus: vec!["0: A GPU with 16.0 GiB".into()],
            driver_error: None,
        };
        assert_eq!(found.missing(true), None);
        let without_headers = CudaProbe { headers: None, ..found.clone() };
        assert_eq!(without_headers.missing(false), None);
        assert!(without_headers.missing(true).unwrap().contains("f16"));
        assert!(found.to_string().ends_with("GPU 0: A GPU with 16.0 GiB"));
    }

    #[test]
    fn a_machine_with_or_without_a_gpu_is_told_what_the_probe_found() {
        let probe = CudaProbe::look();
        let available = cuda_availability();
        assert_eq!(available.is_ok(), probe.missing(false).is_none());
        let said = available.unwrap_or_else(|missing| missing);
        assert!(said.contains(&probe.to_string()), "{said}");
    }
}
