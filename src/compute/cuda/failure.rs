//! Errors of the GPU.

use cudarc::{
    cublaslt::{result::CublasError, sys::cublasStatus_t},
    driver::{DriverError, sys::CUresult},
    nvrtc::CompileError,
};

use crate::domain::error::DeviceError;

/// An error of one of NVIDIA's libraries, or a network or GPU that is not supported.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{0}")]
    Driver(#[from] DriverError),
    #[error("cuBLASLt: {0}")]
    Blas(#[from] CublasError),
    #[error("NVRTC: {0:?}")]
    Compiler(CompileError),
    #[error("{0}")]
    Unfit(String),
}

impl Failure {
    pub(super) fn is_of_memory(&self) -> bool {
        matches!(
            self,
            Self::Driver(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))
                | Self::Blas(CublasError(cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED))
        )
    }

    pub(super) fn of_device(self, device: &str, batch: usize) -> DeviceError {
        if self.is_of_memory() {
            return DeviceError::OutOfMemory { batch };
        }
        DeviceError::Failed { device: device.to_owned(), message: self.to_string() }
    }
}
