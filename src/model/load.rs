//! Reads oddscan's own files of weights, up to a size that no network reaches.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use crate::domain::{
    brain_weights::{BrainWeights, BrainWeightsError},
    weights::{VitWeights, WeightsError},
};

/// Limit on the file. ViT-g in f32 has 4.5 GB.
pub(super) const MAX_WEIGHTS_BYTES: u64 = 6 << 30;

/// Limit on the file. deepbet's networks in f32 have 17 MB.
const MAX_BRAIN_BYTES: u64 = 256 << 20;

/// Why a file of weights cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError<E> {
    /// The file cannot be read.
    #[error("the file cannot be read")]
    Io(#[from] io::Error),
    /// The file is too large for any network.
    #[error("the file has {found} bytes, at most {needed} are read; is it the right file?")]
    TooLarge {
        /// Size of the file, bytes.
        found: u64,
        /// The limit, bytes.
        needed: u64,
    },
    /// The file does not hold the network.
    #[error(transparent)]
    Content(E),
}

/// Reads the encoder's weights from a safetensors file.
///
/// # Errors
/// See [`VitWeights::from_bytes`].
pub fn load_weights(path: &Path) -> Result<VitWeights, LoadError<WeightsError>> {
    VitWeights::from_bytes(&read(path, MAX_WEIGHTS_BYTES)?).map_err(LoadError::Content)
}

/// Reads the networks of brain extraction from a safetensors file.
///
/// # Errors
/// See [`BrainWeights::from_bytes`].
pub fn load_brain_weights(path: &Path) -> Result<BrainWeights, LoadError<BrainWeightsError>> {
    BrainWeights::from_bytes(&read(path, MAX_BRAIN_BYTES)?).map_err(LoadError::Content)
}

fn read<E>(path: &Path, needed: u64) -> Result<Vec<u8>, LoadError<E>> {
    let file = File::open(path)?;
    let found = file.metadata()?.len();
    if found > needed {
        return Err(LoadError::TooLarge { found, needed });
    }
    let mut bytes = Vec::new();
    file.take(needed).read_to_end(&mut bytes)?;
    Ok(bytes)
}
