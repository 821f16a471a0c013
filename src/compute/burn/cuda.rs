//! The engine in burn on an NVIDIA GPU.

use burn_cuda::{Cuda, CudaDevice};

use super::{BurnBrainNetwork, BurnDistances, BurnEncoder};
use crate::{
    compute::EncoderOptions,
    domain::{
        PairDistances, SliceEncoder, brain_weights::BrainWeights, error::DeviceError,
        weights::VitWeights,
    },
};

/// The networks of brain extraction on a GPU.
pub type CudaBrainNetwork = BurnBrainNetwork<Cuda>;

/// The encoder on GPU number `index`. Logs and metrics call the GPU `name`.
pub(in crate::compute) fn encoder(
    weights: &VitWeights,
    options: &EncoderOptions,
    index: usize,
    name: &str,
) -> Result<Box<dyn SliceEncoder>, DeviceError> {
    let device = CudaDevice::new(index);
    Ok(Box::new(BurnEncoder::<Cuda>::new(weights, options, device, name)?))
}

/// Distances on GPU number `index`. Errors call the GPU `name`.
pub(in crate::compute) fn distances(index: usize, name: &str) -> Box<dyn PairDistances> {
    Box::new(BurnDistances::<Cuda>::new(CudaDevice::new(index), name))
}

/// The networks of brain extraction on GPU number `index`. Logs and metrics call the GPU `name`.
pub(in crate::compute) fn brain_network(
    weights: &BrainWeights,
    index: usize,
    name: &str,
) -> Result<CudaBrainNetwork, DeviceError> {
    BurnBrainNetwork::new(weights, CudaDevice::new(index), name)
}
