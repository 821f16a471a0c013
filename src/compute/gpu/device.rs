//! The CUDA device: what it needs, whether that is there, and the engine on it.

use std::{
    convert::Infallible,
    fmt,
    path::{Path, PathBuf},
};

use burn_cuda::{Cuda, CudaDevice};
use cudarc::driver::{CudaContext, result as driver, result::DriverError};

use half::{bf16, f16};
use tracing::warn;

use super::{
    BurnBrainNetwork, BurnDistances, BurnEncoder,
    failure::guarded,
    trial::{try_blank_images, try_brain_network, try_distances, try_small_network},
};
use crate::{
    compute::{
        EncoderOptions, Precision,
        brain_weights::BrainWeights,
        cpu::CpuDistances,
        cuda::{CudaDistances, CudaEncoder, PART},
        weights::VitWeights,
    },
    domain::{PairDistances, SliceEncoder, error::DeviceError},
};

/// Encoder and distances on one device.
pub type CudaEngine = (Box<dyn SliceEncoder>, Box<dyn PairDistances>);

/// The engine on the CUDA GPU number `index`, which will be given up to `batch_slices` images at a
/// time.
///
/// # Errors
/// If there is no such GPU, or the driver, the run-time compiler or, for f32, the CUDA headers are
/// missing, with what was found and what to do; or if the GPU does not give what the CPU does in a
/// short trial.
pub fn cuda_encoder(
    weights: &VitWeights,
    options: &EncoderOptions,
    index: usize,
    batch_slices: usize,
) -> Result<CudaEngine, DeviceError> {
    // cudarc panics where a library lacks a function or its own memory on the GPU is not to be had.
    guarded(&format!("cuda:{index}"), 0, || {
        Ok::<_, Infallible>(start(weights, options, index, batch_slices))
    })?
}

fn start(
    weights: &VitWeights,
    options: &EncoderOptions,
    index: usize,
    batch_slices: usize,
) -> Result<CudaEngine, DeviceError> {
    let name = format!("cuda:{index}");
    let failed = |message| DeviceError::Failed { device: name.clone(), message };
    let precision = options.precision_on_gpu();
    let found = CudaProbe::look();
    let missing = found.missing(precision == Precision::F32);
    missing.map_or(Ok(()), |missing| Err(failed(missing)))?;
    if index >= found.gpus.len() {
        return Err(failed(format!(
            "found {found}; needed a GPU number {index}; choose one of those, counted from 0"
        )));
    }
    let device = CudaDevice::new(index);
    // Else the GPU is set up for the trial, torn down, and set up again.
    let set_up = CudaContext::new(index).map_err(|error| failed(error.to_string()))?;
    let make = |weights: &VitWeights, options: &EncoderOptions| -> Result<_, DeviceError> {
        let encoder: Box<dyn SliceEncoder> = match precision {
            Precision::F32 => {
                Box::new(BurnEncoder::<Cuda>::new(weights, options, device.clone(), &name)?)
            }
            Precision::F16 => Box::new(CudaEncoder::<f16>::new(weights, options, index, &name)?),
            Precision::Bf16 => Box::new(CudaEncoder::<bf16>::new(weights, options, index, &name)?),
        };
        Ok(encoder)
    };
    try_small_network(make, precision)?;
    let mut encoder = make(weights, options)?;
    try_blank_images(&mut *encoder, weights.colours(), batch_slices.min(PART))?;
    let distances = CudaDistances::new(index, &name).and_then(|mut distances| {
        try_distances(&mut distances, &name)?;
        Ok(Box::new(distances) as Box<dyn PairDistances>)
    });
    drop(set_up);
    let distances = distances.unwrap_or_else(|reason| {
        let in_burn = found.missing(true).is_none();
        warn!(%reason, in_burn, "near distances are taken on the CPU, others through burn if it can");
        if !in_burn {
            return Box::new(CpuDistances::new());
        }
        Box::new(BurnDistances::<Cuda>::new(device.clone(), &name))
    });
    Ok((encoder, distances))
}

/// The networks of brain extraction on the CUDA GPU number `index`, which the encoder uses already.
///
/// # Errors
/// If the CUDA headers are missing, which an encoder in f16 does without; or if the networks fail
/// on the GPU, or do not give there what the CPU does in a short trial.
pub fn cuda_brain_network(
    weights: &BrainWeights,
    index: usize,
) -> Result<BurnBrainNetwork<Cuda>, DeviceError> {
    let name = format!("cuda:{index}");
    let found = CudaProbe::look();
    if found.headers.is_none() {
        let message = format!(
            "found {found}; brain extraction needed include/cuda_fp16.h: install the CUDA toolkit, or \
             set CUDA_PATH to the folder above include"
        );
        return Err(DeviceError::Failed { device: name, message });
    }
    let make =
        |weights: &BrainWeights| BurnBrainNetwork::new(weights, CudaDevice::new(index), &name);
    try_brain_network(make, weights, &name)?;
    make(weights)
}

/// What a CUDA GPU needs at run time, and what of it was found; the same places are searched as
/// by burn.
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
    /// Looks at this machine. Loads the libraries, allocates nothing on a GPU.
    pub fn look() -> Self {
        // SAFETY: loading a library runs its initialisers. Those of NVIDIA's libraries are meant to
        // be run by any process.
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

    /// Everything that is missing, with what was found and what to do; `None` if a GPU can be
    /// used, also `by_burn`, which needs the headers and panics without.
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

/// What was found on this machine: `Ok` if a GPU can be used, else what is missing and what to do.
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

/// Where cubecl 0.10 takes the headers from, if they are there.
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
    fn the_probe_runs_with_and_without_a_gpu() {
        match cuda_availability() {
            Ok(found) => println!("{found}"),
            Err(missing) => eprintln!("skipped: no CUDA GPU ({missing})"),
        }
    }
}
