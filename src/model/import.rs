//! Converts weights of other programs to [`VitWeights`], from safetensors, PyTorch's zip format or
//! ONNX.

use std::{fs::File, io::Read, path::Path};

use super::{load::MAX_WEIGHTS_BYTES, onnx, pickle, tensor::to_safetensors};
use crate::domain::weights::{VitWeights, WeightsError};

/// Why a file cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file cannot be read.
    #[error("the file cannot be read")]
    Io(#[from] std::io::Error),
    /// The file is too large for a vision transformer; its size in bytes.
    #[error("the file has {0} bytes, at most {MAX_WEIGHTS_BYTES} are read; is it the right file?")]
    TooLarge(u64),
    /// Neither safetensors, nor .pth, nor ONNX; the first bytes of the file.
    #[error(
        "neither safetensors, nor a .pth of PyTorch 1.6 or newer, nor ONNX; found a file that starts with {0:02x?}"
    )]
    Unknown(Vec<u8>),
    /// A .pth file that is damaged, or holds something other than tensors.
    #[error("the .pth file cannot be used: {0}")]
    Pickle(String),
    /// An ONNX file that is damaged, or holds another network.
    #[error("the ONNX file cannot be used: {0}")]
    Onnx(String),
    /// The tensors are not those of a DINOv2 network.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

/// Reads weights in any of the known formats. The content decides on the format.
///
/// # Errors
/// If the file is not exactly a DINOv2 network; see [`VitWeights::from_bytes`].
pub fn import(path: &Path) -> Result<VitWeights, ImportError> {
    let file = File::open(path)?;
    let n_bytes = file.metadata()?.len();
    if n_bytes > MAX_WEIGHTS_BYTES {
        return Err(ImportError::TooLarge(n_bytes));
    }
    let mut bytes = Vec::new();
    file.take(MAX_WEIGHTS_BYTES).read_to_end(&mut bytes)?;
    import_bytes(&bytes)
}

fn import_bytes(bytes: &[u8]) -> Result<VitWeights, ImportError> {
    let start = &bytes[..bytes.len().min(16)];
    if start.get(8) == Some(&b'{') {
        return Ok(VitWeights::from_bytes(bytes)?);
    }
    let tensors = if start.starts_with(b"PK\x03\x04") {
        pickle::tensors(bytes).map_err(ImportError::Pickle)?
    } else if start.first() == Some(&0x08) {
        // Field 1 of the message: the version of the format.
        onnx::tensors(bytes).map_err(ImportError::Onnx)?
    } else {
        return Err(ImportError::Unknown(start.to_vec()));
    };
    Ok(VitWeights::from_bytes(&to_safetensors(&tensors))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_none_of_the_formats_is_named_by_its_first_bytes() {
        let error = import_bytes(b"GIF89a").unwrap_err().to_string();
        assert!(error.contains("47, 49, 46"), "{error}");
        assert!(matches!(import_bytes(b""), Err(ImportError::Unknown(_))));
    }
}
