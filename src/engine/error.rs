//! Why the engine cannot start.

use std::path::PathBuf;

use crate::{
    domain::{error::DeviceError, weights::WeightsError},
    model::{LoadError, ModelError},
    process::hook::HookError,
};

/// Why the engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// None of the usual places has a file of weights.
    #[error(transparent)]
    NoWeights(#[from] ModelError),
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
