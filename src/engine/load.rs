//! Reads what the settings name: weights, template, networks for brain extraction, landmarks.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use tracing::{info, warn};

use super::error::EngineError;
use crate::{
    config::{AlignmentChoice, AlignmentSettings, BrainChoice, Config, DeviceChoice, Standardise},
    domain::{
        brain_weights::BrainWeights, landmarks::LandmarkSet, scan::ScanId, weights::VitWeights,
    },
    model::{self, find_brain_weights, find_template, find_weights},
    nifti::{self, Limits},
    numeric::{registration::Template, token::TokenSettings},
};

/// Loads the network, checks it against the settings, and returns it with the blocks to score.
pub(super) fn load_network(config: &Config) -> Result<(VitWeights, Vec<usize>), EngineError> {
    let path = find_weights(config.encoder.weights.as_deref())?;
    let weights = model::load_weights(&path)
        .map_err(|source| EngineError::Weights { path, source })?
        .into_grey();
    let layers = config.layers(weights.architecture.depth);
    check_fit(config, &weights, &layers)?;
    Ok((weights, layers))
}

/// The template for alignment, and the hash of its content. If only heads need it, it may be
/// missing: heads are then refused, with the advice to fetch it. It must not be missing if the
/// site's preprocessing finds the brains of heads.
pub(super) fn load_template(config: &Config) -> Result<Option<(Template, String)>, EngineError> {
    let AlignmentSettings { mode, template, .. } = &config.alignment;
    if *mode == AlignmentChoice::Never {
        return Ok(None);
    }
    let Some(path) = find_template(template.as_deref()) else {
        // The site's preprocessing finds the brain of a head, but it does not put it into MNI
        // space.
        let is_needed = *mode == AlignmentChoice::Always || config.preprocess.is_some();
        if let Some(named) = template {
            let path = named.display();
            return Err(EngineError::Template(format!(
                "there is no template {path} (alignment.template); correct the path, or leave it out and \
                 run `oddscan model fetch`"
            )));
        }
        if is_needed {
            return Err(EngineError::Template(
                "there is no template for the alignment; run `oddscan model fetch`, name one with \
                 alignment.template, or set alignment.mode = \"never\""
                    .to_owned(),
            ));
        }
        warn!("no template: whole heads are refused; `oddscan model fetch` fetches it");
        return Ok(None);
    };

    let scan = nifti::read_scan(&path, &TEMPLATE_LIMITS).map_err(|error| {
        EngineError::Template(format!("the template {} cannot be used: {error}", path.display()))
    })?;
    let sha256 = hex::encode(ScanId::of(&scan.volume).0);
    Ok(Some((Template::new(scan.volume), sha256)))
}

/// The networks for brain extraction. If the settings leave the choice, they may be missing: the
/// template then finds the brain.
pub(super) fn load_brain_weights(config: &Config) -> Result<Option<BrainWeights>, EngineError> {
    let AlignmentSettings { mode, brain, brain_weights: named, .. } = &config.alignment;
    if *mode == AlignmentChoice::Never || *brain == BrainChoice::Template {
        return Ok(None);
    }
    let Some(path) = find_brain_weights(named.as_deref()) else {
        if named.is_none() && *brain == BrainChoice::Auto {
            info!(
                "no networks for brain extraction (`oddscan model fetch --brain`): the template is used"
            );
            return Ok(None);
        }
        let place = named.as_ref().map_or(String::new(), |path| format!(" {}", path.display()));
        return Err(EngineError::BrainNetwork(format!(
            "there are no networks for brain extraction{place} (alignment.brain_weights); run `oddscan \
             model fetch --brain`, or set alignment.brain = \"template\""
        )));
    };

    let weights = model::load_brain_weights(&path).map_err(|error| {
        let path = path.display();
        EngineError::BrainNetwork(format!(
            "the brain extraction weights {path} cannot be used: {error}"
        ))
    })?;
    Ok(Some(weights))
}

/// The landmarks, if the settings ask for them.
pub(super) fn load_landmarks(config: &Config) -> Result<Option<LandmarkSet>, EngineError> {
    if config.intensity.standardise == Standardise::None {
        return Ok(None);
    }
    let path = &config.intensity.landmarks;
    let read = read_landmarks(path).map_err(|error| error.to_string());
    let set = read.and_then(|text| LandmarkSet::parse(&text));
    set.map(Some).map_err(|why| EngineError::Landmarks { path: path.clone(), why })
}

/// This is enough for a thousand cohorts of hundreds of scans.
const MAX_LANDMARK_BYTES: u64 = 1 << 26;

fn read_landmarks(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_LANDMARK_BYTES).read_to_end(&mut text)?;
    Ok(text)
}

/// Templates at 0.5 mm have 70 million voxels.
const TEMPLATE_LIMITS: Limits = Limits { max_file_bytes: 1 << 29, max_voxels: 100_000_000 };

fn check_fit(config: &Config, weights: &VitWeights, layers: &[usize]) -> Result<(), EngineError> {
    if config.encoder.device == DeviceChoice::Cuda && !cfg!(feature = "cuda") {
        return Err(EngineError::Misfit(
            "encoder.device = \"cuda\", but this binary was built without CUDA; build it with \
             --features cuda, or use \"auto\" or \"cpu\""
                .to_owned(),
        ));
    }
    let architecture = weights.architecture;

    let (side, patch) = (config.volume.side, architecture.patch);
    if side % patch != 0 {
        return Err(EngineError::Misfit(format!(
            "volume.side = {side} is no multiple of the patch of {architecture} ({patch}); use {}",
            side.div_ceil(patch) * patch
        )));
    }

    if let Some(layer) = layers.iter().find(|&&layer| layer > architecture.depth) {
        let depth = architecture.depth;
        return Err(EngineError::Misfit(format!(
            "encoder.layers names block {layer}; {architecture} has {depth}, name 1 to {depth}"
        )));
    }

    let TokenSettings { slice_stride, join_views, .. } = config.tokens;
    let depth = config.tokens.depth(patch);
    if patch % depth != 0 || (join_views && depth != patch) {
        let needed = if join_views { "0, the whole patch" } else { "a divisor of the patch" };
        return Err(EngineError::Misfit(format!(
            "tokens.slices_per_token = {depth} does not fit {architecture}; use {needed} ({patch})"
        )));
    }

    if slice_stride > depth {
        return Err(EngineError::Misfit(format!(
            "tokens.slice_stride = {slice_stride} skips whole tokens; use at most \
             tokens.slices_per_token ({depth})"
        )));
    }
    Ok(())
}
