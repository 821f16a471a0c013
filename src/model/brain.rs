//! The weights of the brain extraction networks.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{
    fetch::{FetchError, Fetched, Package, PackedFile, from_package, keep_bytes},
    folders::find_beside_weights,
    import::ImportError,
    pickle,
    tensor::{Tensors, to_safetensors},
};
use crate::domain::brain_weights::BrainWeights;

/// Name of the file with both networks, beside the encoder's weights.
pub const BRAIN_FILE: &str = "deepbet_1.0.2.safetensors";

/// Two networks in TorchScript format: one locates the brain, one outlines it.
const PACKED: Package<2> = Package {
    name: "deepbet==1.0.2",
    files: [
        PackedFile {
            entry: "data/models/bbox_model.pt",
            sha256: "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa",
            max_bytes: 32 << 20,
        },
        PackedFile {
            entry: "data/models/model.pt",
            sha256: "de8ee7c69654d0dd3935dc4a5d84571d8ecf4637a6bfc01df399c4c2bc86e0fd",
            max_bytes: 32 << 20,
        },
    ],
};

const LICENCE: &str = "deepbet: MIT, Medical Machine Learning Lab, University of Münster; cite \
    Fisch et al. 2024, doi 10.1016/j.compbiomed.2024.108845";
const CAVEAT: &str = "trained on T1w of healthy adults";

/// The named file, or the one that [`fetch_brain_weights`] puts beside the encoder's weights.
pub fn find_brain_weights(configured: Option<&Path>) -> Option<PathBuf> {
    find_beside_weights(configured, BRAIN_FILE)
}

/// Downloads the networks of deepbet 1.0.2 from PyPI, checks their SHA-256, and converts them into
/// `folder`. Nothing in them is executed.
///
/// # Errors
/// If download, checksum or conversion fails. The folder then holds no new file that is incomplete
/// or unchecked.
pub fn fetch_brain_weights(folder: &Path) -> Result<Fetched, FetchError> {
    std::fs::create_dir_all(folder)?;
    let unpacked = tempfile::tempdir()?;
    let files = ["locate.pt", "outline.pt"].map(|name| unpacked.path().join(name));
    from_package(&PACKED, [&files[0], &files[1]])?;
    let bytes = joined([&std::fs::read(&files[0])?, &std::fs::read(&files[1])?])?;
    BrainWeights::from_bytes(&bytes)?;

    let [first, second] = &PACKED.files;
    let fetched = Fetched {
        path: folder.join(BRAIN_FILE),
        model: "deepbet_1.0.2".to_owned(),
        source: format!("pypi:{}/{},{}", PACKED.name, first.entry, second.entry),
        source_sha256: format!("{},{}", first.sha256, second.sha256),
        sha256: hex::encode(Sha256::digest(&bytes)),
        licence: LICENCE,
        caveat: Some(CAVEAT),
    };
    keep_bytes(&bytes, fetched)
}

/// Joins the tensors of the network that locates and the one that outlines into one file.
fn joined(networks: [&[u8]; 2]) -> Result<Vec<u8>, ImportError> {
    let mut all = Tensors::new();
    for (prefix, bytes) in ["locate", "outline"].into_iter().zip(networks) {
        let tensors = pickle::tensors(bytes).map_err(ImportError::Pickle)?;
        all.extend(tensors.into_iter().map(|(name, tensor)| (format!("{prefix}.{name}"), tensor)));
    }
    Ok(to_safetensors(&all))
}
