//! The engines of this binary: always one for the CPU, and one for NVIDIA GPUs if it was built with
//! CUDA.

use std::sync::Arc;

use tracing::info;

use crate::{
    compute::{
        Devices, EncoderOptions,
        cpu::{CpuBrainNetwork, CpuDistances, CpuEncoder, Instructions},
    },
    domain::{BrainNetwork, brain_weights::BrainWeights, error::DeviceError, weights::VitWeights},
};

/// Encoder and distances on the CPU.
pub(crate) fn on_cpu(weights: &VitWeights, options: &EncoderOptions) -> Devices {
    let (precision, instructions) =
        (CpuEncoder::precision(weights, options), Instructions::in_use());
    info!(%precision, %instructions, "products on the CPU");
    (Box::new(CpuEncoder::new(weights, options)), Box::new(CpuDistances::new()))
}

/// The networks of brain extraction on the CPU.
pub(crate) fn brain_network_on_cpu(weights: BrainWeights) -> Arc<dyn BrainNetwork> {
    Arc::new(CpuBrainNetwork::new(weights))
}

/// The GPU that is used, counted from 0.
#[cfg(feature = "cuda")]
const GPU_INDEX: usize = 0;

/// Encoder and distances on an NVIDIA GPU.
#[cfg(feature = "cuda")]
pub(crate) fn on_gpu(
    weights: &VitWeights,
    options: &EncoderOptions,
    batch_slices: usize,
) -> Result<Devices, DeviceError> {
    super::cuda::cuda_encoder(weights, options, GPU_INDEX, batch_slices)
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn on_gpu(_: &VitWeights, _: &EncoderOptions, _: usize) -> Result<Devices, DeviceError> {
    Err(built_without_cuda())
}

/// The networks of brain extraction on an NVIDIA GPU. After a failure there, they run on the CPU.
#[cfg(feature = "cuda")]
pub(crate) fn brain_network_on_gpu(
    weights: &BrainWeights,
) -> Result<Arc<dyn BrainNetwork>, DeviceError> {
    let gpu = super::cuda::cuda_brain_network(weights, GPU_INDEX)?;
    let cpu = CpuBrainNetwork::new(weights.clone());
    Ok(Arc::new(super::fallback::FallbackBrainNetwork::new(gpu, cpu)))
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn brain_network_on_gpu(_: &BrainWeights) -> Result<Arc<dyn BrainNetwork>, DeviceError> {
    Err(built_without_cuda())
}

#[cfg(not(feature = "cuda"))]
fn built_without_cuda() -> DeviceError {
    DeviceError::Failed {
        device: "cuda".into(),
        message: "this binary was built without CUDA; build it with --features cuda".into(),
    }
}
