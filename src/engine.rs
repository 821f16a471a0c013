//! Prepares the method: loads the weights, chooses the device, and makes the fingerprint. Only
//! results with the same fingerprint may be compared.

mod error;
mod load;
mod method;

use std::sync::Arc;

use tracing::info;

use self::{
    load::{load_brain_weights, load_landmarks, load_network, load_template},
    method::fingerprint,
};
use crate::{
    compute::{
        Devices, EncoderOptions,
        cpu::CpuEncoder,
        device::choose::{on_cpu, on_gpu},
        tokenise::Tokeniser,
    },
    config::{Config, DeviceChoice, Preset},
    domain::{
        PairDistances, brain_weights::BrainWeights, landmarks::LandmarkSet, weights::VitWeights,
    },
    nifti,
    numeric::{projection::Projection, registration::Template},
    process::hook::Hook,
};

pub use error::EngineError;
#[cfg(test)]
pub(crate) use method::tests;
pub use method::{BrainNetworkInUse, Method};

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
            scores_cut_cells: config.preset == Preset::Paper,
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

/// Slices per batch. The CPU engine gains nothing from more slices than its threads need, and the
/// watchdog, a stop and the progress bar wait for a whole batch. So each thread gets the slices of
/// one token, and all threads have equal work.
fn batch_slices(config: &Config, device: &str, patch: usize) -> usize {
    let most = config.encoder.batch_slices;
    let per_token = config.tokens.depth(patch).div_ceil(config.tokens.slice_stride);
    if device == "cpu" { most.min(per_token * rayon::current_num_threads()) } else { most }
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
