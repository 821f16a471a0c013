//! The engines of an NVIDIA GPU. The number format decides which one is used. Each is tested first.

use std::convert::Infallible;

use cudarc::driver::CudaContext;
use half::{bf16, f16};
use tracing::warn;

use super::{
    probe::CudaProbe,
    trial::{try_blank_images, try_brain_network, try_distances, try_small_network},
};
use crate::{
    compute::{
        Devices, EncoderOptions, Precision,
        burn::{
            cuda::{self as burn, CudaBrainNetwork},
            failure::guarded,
        },
        cpu::CpuDistances,
        cuda::{CudaDistances, CudaEncoder, PART},
    },
    domain::{
        PairDistances, SliceEncoder, brain_weights::BrainWeights, error::DeviceError,
        weights::VitWeights,
    },
};

/// The engine on CUDA GPU number `index`, for batches of up to `batch_slices` images.
///
/// # Errors
/// If there is no such GPU; if the driver, the run-time compiler or, for f32, the CUDA headers are
/// missing; or if the GPU's results in a short test differ from the CPU's. The text says what was
/// found and what to do.
pub fn cuda_encoder(
    weights: &VitWeights,
    options: &EncoderOptions,
    index: usize,
    batch_slices: usize,
) -> Result<Devices, DeviceError> {
    // cudarc panics if a library lacks a function, or if it gets no memory of its own on the GPU.
    guarded(&format!("cuda:{index}"), 0, || {
        Ok::<_, Infallible>(start(weights, options, index, batch_slices))
    })?
}

fn start(
    weights: &VitWeights,
    options: &EncoderOptions,
    index: usize,
    batch_slices: usize,
) -> Result<Devices, DeviceError> {
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
    // Without this, the GPU would be set up for the test, torn down, and set up again.
    let set_up = CudaContext::new(index).map_err(|error| failed(error.to_string()))?;
    let make = |weights: &VitWeights, options: &EncoderOptions| -> Result<_, DeviceError> {
        let encoder: Box<dyn SliceEncoder> = match precision {
            Precision::F32 => burn::encoder(weights, options, index, &name)?,
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
        warn!(%reason, in_burn, "the CPU computes distances within reach, and burn all others if it can");
        if !in_burn {
            return Box::new(CpuDistances::new());
        }
        burn::distances(index, &name)
    });
    Ok((encoder, distances))
}

/// The networks of brain extraction on CUDA GPU number `index`, which the encoder already uses.
///
/// # Errors
/// If the CUDA headers are missing (an encoder in f16 does not need them), if the networks fail on
/// the GPU, or if their results in a short test differ from the CPU's.
pub fn cuda_brain_network(
    weights: &BrainWeights,
    index: usize,
) -> Result<CudaBrainNetwork, DeviceError> {
    let name = format!("cuda:{index}");
    let found = CudaProbe::look();
    if found.headers.is_none() {
        let message = format!(
            "found {found}; brain extraction needed include/cuda_fp16.h: install the CUDA toolkit, or \
             set CUDA_PATH to the folder above include"
        );
        return Err(DeviceError::Failed { device: name, message });
    }
    let make = |weights: &BrainWeights| burn::brain_network(weights, index, &name);
    try_brain_network(make, weights, &name)?;
    make(weights)
}
