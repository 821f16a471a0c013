//! What is computed: the method, and the fingerprint that says which results may be compared.

use std::{fmt, sync::Arc};

use serde_json::json;
use sha2::{Digest, Sha256};
use tracing::{info, warn};

use crate::{
    compute::device::choose::{brain_network_on_cpu, brain_network_on_gpu},
    config::{AlignmentChoice, Config},
    domain::{
        BrainNetwork, brain_weights::BrainWeights, landmarks::LandmarkSet, weights::VitWeights,
    },
    numeric::{preprocess::CubeSettings, registration::Template},
    process::hook::Hook,
};

/// Increases whenever the code computes other tokens, or other intensities beside them, from the
/// same settings and weights. Leaving out the cells that the field of view cuts did not: the tokens
/// of all other cells are the same.
const TOKENS_VERSION: u32 = 4;

/// Everything that shapes the tokens and the scores. Sidecars show it, and the fingerprint
/// separates scans that must not be compared.
#[derive(Debug, Clone)]
pub struct Method {
    /// First 16 hex digits of the hash over weights, layers, preprocessing, pooling, projection.
    pub fingerprint: String,
    /// Name of the network, like `dinov2_vits14`.
    pub model: String,
    /// SHA-256 of the weights file, hex.
    pub weights_sha256: String,
    /// Encoder blocks that are scored, counted from 1.
    pub layers: Vec<usize>,
    /// Device of the encoder, like `cpu` or `cuda:0`.
    pub device: String,
    /// Number format of the encoder's matrix products.
    pub precision: String,
    /// Size of the canonical cube and what it must contain.
    pub cube: CubeSettings,
    /// Number of token grids per layer: one for each view, or one for all views.
    pub n_parts: usize,
    /// Edge of the encoder's patch, pixels.
    pub patch: usize,
    /// Share of a cell's voxels that must be in the brain.
    pub min_brain_fraction: f64,
    /// Whether cells are scored that the scanner's field of view cuts, as the paper does.
    pub scores_cut_cells: bool,
    /// Which scans are aligned to the template.
    pub alignment: AlignmentChoice,
    /// The template. `None` if none was found or needed.
    pub template: Option<Arc<Template>>,
    /// SHA-256 of the template's voxels and affine, hex.
    pub template_sha256: Option<String>,
    /// The networks for brain extraction. `None` if the template finds brains.
    pub brain_network: Option<BrainNetworkInUse>,
    /// Whether the brain of a head may come from a T1 of the same session.
    pub uses_session_t1: bool,
    /// The site's own preprocessing. `None` if the settings name none.
    pub hook: Option<Arc<Hook>>,
    /// Landmarks for standardising intensities. `None` if the settings ask for none.
    pub landmarks: Option<Arc<LandmarkSet>>,
}

impl Method {
    /// Number of token grids per scan.
    pub fn n_grids(&self) -> usize {
        self.layers.len() * self.n_parts
    }
}

/// The networks for brain extraction, on their device.
#[derive(Clone)]
pub struct BrainNetworkInUse {
    network: Arc<dyn BrainNetwork>,
    /// SHA-256 of the weights file, hex.
    pub sha256: String,
}

impl BrainNetworkInUse {
    /// Puts the networks on the encoder's device. If they do not run on that GPU, they run on the
    /// CPU, even if the settings demand the GPU: scans only take longer then.
    pub(super) fn beside(encoder_device: &str, weights: BrainWeights) -> Self {
        let sha256 = weights.fingerprint.clone();
        let on_gpu = (encoder_device != "cpu").then(|| brain_network_on_gpu(&weights));
        let (network, device) = match on_gpu {
            Some(Ok(network)) => (network, encoder_device),
            Some(Err(reason)) => {
                warn!(%reason, "the networks for brain extraction cannot run on the GPU");
                (brain_network_on_cpu(weights), "cpu")
            }
            None => (brain_network_on_cpu(weights), "cpu"),
        };
        info!(device, "the networks for brain extraction are ready");
        Self { network, sha256 }
    }

    /// The networks.
    pub fn network(&self) -> &dyn BrainNetwork {
        &*self.network
    }
}

impl fmt::Debug for BrainNetworkInUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BrainNetworkInUse").field("sha256", &self.sha256).finish_non_exhaustive()
    }
}

/// Hash over everything that shapes stored tokens, in a fixed order (JSON maps are sorted). The
/// number format of the products is left out. It moves a token by only a fiftieth of the distance
/// to its nearest match, and the devices that replace each other have different ones.
pub(super) fn fingerprint(
    config: &Config,
    weights: &VitWeights,
    layers: &[usize],
    hook: Option<&Hook>,
    landmarks: Option<&LandmarkSet>,
    template_sha256: Option<&str>,
) -> String {
    let mut shaping = json!({
        "tokens_version": TOKENS_VERSION,
        "weights": weights.fingerprint,
        "layers": layers,
        "final_norm": config.encoder.final_norm,
        "position_resize": config.encoder.position_resize,
        "volume": config.tree.get("volume"),
        "tokens": config.tree.get("tokens"),
    });

    // Only if it can change the tokens of scans with a brain mask. The usual template is one file,
    // and a site may fetch it later.
    if config.alignment.mode == AlignmentChoice::Always || config.alignment.template.is_some() {
        // The content of the file counts, not its path.
        let mode = config.tree.get("alignment").and_then(|alignment| alignment.get("mode"));
        shaping["alignment"] = json!({ "mode": mode, "template": template_sha256 });
    }
    if let Some(hook) = hook {
        shaping["preprocess"] = json!(hook.identity());
    }
    // The content counts, not the path. Without landmarks, fingerprints are the same as before
    // oddscan had landmarks.
    if let Some(landmarks) = landmarks {
        shaping["landmarks"] = json!(landmarks.digest());
    }
    hex::encode(&Sha256::digest(shaping.to_string())[..8])
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// 512 cells of 22 mm.
    pub(crate) fn method() -> Method {
        Method {
            fingerprint: String::new(),
            model: String::new(),
            weights_sha256: String::new(),
            layers: vec![1],
            device: String::new(),
            precision: String::new(),
            cube: CubeSettings { side: 112, field_of_view_mm: 176.0, min_brain_ml: 200.0 },
            n_parts: 1,
            patch: 14,
            min_brain_fraction: 0.3,
            scores_cut_cells: false,
            alignment: AlignmentChoice::Never,
            hook: None,
            template: None,
            template_sha256: None,
            brain_network: None,
            uses_session_t1: false,
            landmarks: None,
        }
    }
}
