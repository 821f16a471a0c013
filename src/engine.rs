//! Prepares the method: loads the weights, chooses the device, and makes the fingerprint. Only
//! results with the same fingerprint may be compared.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::json;
use sha2::{Digest, Sha256};
use tracing::{info, warn};

use crate::{
    compute::{
        Devices, EncoderOptions,
        cpu::CpuEncoder,
        device::choose::{brain_network_on_cpu, brain_network_on_gpu, on_cpu, on_gpu},
        tokenise::Tokeniser,
    },
    config::{AlignmentChoice, AlignmentSettings, BrainChoice, Config, DeviceChoice, Standardise},
    domain::{
        BrainNetwork, PairDistances,
        brain_weights::BrainWeights,
        error::DeviceError,
        landmarks::LandmarkSet,
        scan::ScanId,
        weights::{VitWeights, WeightsError},
    },
    model::{self, LoadError, find_brain_weights, find_template, find_weights},
    nifti::{self, Limits},
    numeric::{
        preprocess::CubeSettings, projection::Projection, registration::Template,
        token::TokenSettings,
    },
    process::hook::{Hook, HookError},
};

/// Increases whenever the code computes other tokens from the same settings and weights.
const TOKENS_VERSION: u32 = 3;

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
    fn beside(encoder_device: &str, weights: BrainWeights) -> Self {
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

/// Encoder and distances on their device, with the method that they compute.
pub struct Engine {
    /// Turns volumes into tokens.
    pub tokeniser: Tokeniser,
    /// Computes distances between tokens of two scans.
    pub distances: Box<dyn PairDistances>,
    /// Method that both compute.
    pub method: Method,
    /// Whether a binary built for CUDA found no working GPU and uses the CPU.
    pub fell_back: bool,
}

/// Why the engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// None of the usual places has a file of weights.
    #[error(transparent)]
    NoWeights(#[from] crate::model::ModelError),
    /// The weights cannot be used.
    #[error("the weights {} cannot be used", path.display())]
    Weights {
        /// File of the weights.
        path: PathBuf,
        /// What is wrong with it.
        source: LoadError<WeightsError>,
    },
    /// The settings need a template, but there is no usable one.
    #[error("{0}")]
    Template(String),
    /// The networks for brain extraction cannot be used, or the settings need them and they are
    /// missing.
    #[error("{0}")]
    BrainNetwork(String),
    /// The site's own preprocessing cannot be started.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The landmarks that the settings name cannot be used.
    #[error(
        "the landmarks {} (intensity.landmarks) cannot be used: {why}",
        path.display()
    )]
    Landmarks {
        /// File of the landmarks.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The settings do not fit the network or this binary.
    #[error("{0}")]
    Misfit(String),
    /// The demanded device does not work.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// The files and programs that the settings name, loaded and checked against each other. This needs
/// no device.
pub struct Ingredients {
    weights: VitWeights,
    layers: Vec<usize>,
    template: Option<(Template, String)>,
    brain_weights: Option<BrainWeights>,
    hook: Option<Hook>,
    landmarks: Option<LandmarkSet>,
}

impl Ingredients {
    /// Loads weights, template and landmarks, and asks the site's own preprocessing for its
    /// version.
    pub fn load(config: &Config) -> Result<Self, EngineError> {
        Self::load_all(config).map_err(|mut faults| faults.swap_remove(0))
    }

    /// Like [`Ingredients::load`], but with one error for each missing part.
    pub fn load_all(config: &Config) -> Result<Self, Vec<EngineError>> {
        let network = load_network(config);
        let start_hook = |settings| Hook::start(settings, nifti::read_map);
        let hook = config.preprocess.as_ref().map(start_hook).transpose();
        let (template, landmarks) = (load_template(config), load_landmarks(config));
        let brain_weights = load_brain_weights(config);
        match (network, hook, template, brain_weights, landmarks) {
            (Ok((weights, layers)), Ok(hook), Ok(template), Ok(brain_weights), Ok(landmarks)) => {
                Ok(Self { weights, layers, template, brain_weights, hook, landmarks })
            }
            (network, hook, template, brain_weights, landmarks) => {
                let hook = hook.err().map(EngineError::from);
                let faults =
                    [network.err(), hook, template.err(), brain_weights.err(), landmarks.err()];
                Err(faults.into_iter().flatten().collect())
            }
        }
    }

    /// Name of the network, like `dinov2_vits14`.
    pub fn model(&self) -> String {
        self.weights.architecture.to_string()
    }

    /// Whether there is a template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The site's own preprocessing, if there is any.
    pub fn hook(&self) -> Option<&Hook> {
        self.hook.as_ref()
    }
}

impl Engine {
    /// Loads what the settings name and chooses the device.
    pub fn start(config: &Config) -> Result<Self, EngineError> {
        let Ingredients { weights, layers, template, brain_weights, hook, landmarks } =
            Ingredients::load(config)?;
        let (template, template_sha256) = template.unzip();
        let architecture = weights.architecture;
        let options = EncoderOptions {
            layers: layers.clone(),
            final_norm: config.encoder.final_norm,
            position: config.encoder.position_resize,
            precision: config.encoder.precision,
        };

        if let Some(hook) = &hook {
            info!(name = hook.name(), version = hook.version(), "scans are preprocessed");
        }

        let (encoder, distances) =
            choose_device(config.encoder.device, &weights, &options, config.encoder.batch_slices)?;
        let projection = config.projection.channels.map(|channels| {
            Projection::new(config.projection.seed, architecture.channels, channels.get())
        });

        let method = Method {
            fingerprint: fingerprint(
                config,
                &weights,
                &layers,
                hook.as_ref(),
                landmarks.as_ref(),
                template_sha256.as_deref(),
            ),
            model: architecture.to_string(),
            weights_sha256: weights.fingerprint.clone(),
            layers,
            precision: match encoder.device() {
                "cpu" => CpuEncoder::precision(&weights, &options),
                _ => options.precision_on_gpu(),
            }
            .to_string(),
            device: encoder.device().to_owned(),
            cube: config.volume,
            n_parts: config.tokens.n_parts(),
            patch: architecture.patch,
            min_brain_fraction: config.tokens.min_brain_fraction,
            alignment: config.alignment.mode,
            template: template.map(Arc::new),
            template_sha256,
            brain_network: brain_weights
                .map(|weights| BrainNetworkInUse::beside(encoder.device(), weights)),
            uses_session_t1: config.alignment.uses_session_t1,
            hook: hook.map(Arc::new),
            landmarks: landmarks.map(Arc::new),
        };
        info!(
            model = method.model,
            device = method.device,
            method = method.fingerprint,
            "engine ready"
        );

        let tokeniser = Tokeniser::new(
            encoder,
            projection,
            config.tokens.clone(),
            method.layers.len(),
            batch_slices(config, &method.device, method.patch),
        );

        let fell_back = cfg!(feature = "cuda")
            && config.encoder.device == DeviceChoice::Auto
            && method.device == "cpu";
        Ok(Self { tokeniser, distances, method, fell_back })
    }
}

/// Loads the network, checks it against the settings, and returns it with the blocks to score.
fn load_network(config: &Config) -> Result<(VitWeights, Vec<usize>), EngineError> {
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
fn load_template(config: &Config) -> Result<Option<(Template, String)>, EngineError> {
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
fn load_brain_weights(config: &Config) -> Result<Option<BrainWeights>, EngineError> {
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
fn load_landmarks(config: &Config) -> Result<Option<LandmarkSet>, EngineError> {
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

/// Slices per batch. The CPU engine gains nothing from more slices than its threads need, and the
/// watchdog, a stop and the progress bar wait for a whole batch. So each thread gets the slices of
/// one token, and all threads have equal work.
fn batch_slices(config: &Config, device: &str, patch: usize) -> usize {
    let most = config.encoder.batch_slices;
    let per_token = config.tokens.depth(patch).div_ceil(config.tokens.slice_stride);
    if device == "cpu" { most.min(per_token * rayon::current_num_threads()) } else { most }
}

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

/// Hash over everything that shapes stored tokens, in a fixed order (JSON maps are sorted). The
/// number format of the products is left out. It moves a token by only a fiftieth of the distance
/// to its nearest match, and the devices that replace each other have different ones.
fn fingerprint(
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

/// The device that the settings ask for.
pub(crate) fn choose_device(
    choice: DeviceChoice,
    weights: &VitWeights,
    options: &EncoderOptions,
    batch_slices: usize,
) -> Result<Devices, EngineError> {
    let cpu = || on_cpu(weights, options);
    let cuda = || on_gpu(weights, options, batch_slices);
    match choice {
        DeviceChoice::Cpu => Ok(cpu()),
        DeviceChoice::Cuda => Ok(cuda()?),
        DeviceChoice::Auto => match cuda() {
            Ok(devices) => {
                info!("encoder.device = auto: a CUDA GPU works and is used");
                Ok(devices)
            }
            Err(reason) => {
                info!(%reason, "encoder.device = auto: the native CPU engine is used");
                Ok(cpu())
            }
        },
    }
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
