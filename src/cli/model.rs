//! `oddscan model`: the encoder's weights.

use std::path::PathBuf;

use super::{CONFIG, Failure};
use crate::{compute::weights::VitWeights, model::find_weights};

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Show the weights that would be used, or those of a file.
    Info {
        /// A weights file.
        file: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Info { file, json } => info(file, json),
    }
}

fn info(file: Option<PathBuf>, json: bool) -> Result<(), Failure> {
    let path = find_weights(file.as_deref()).map_err(|error| Failure::new(CONFIG, error))?;
    let weights = VitWeights::load(&path).map_err(|error| Failure::new(CONFIG, error))?;
    let a = weights.architecture;
    let facts = serde_json::json!({
        "file": path,
        "model": a.to_string(),
        "sha256": weights.fingerprint,
        "parameters": weights.n_parameters(),
        "channels": a.channels,
        "blocks": a.depth,
        "heads": a.heads,
        "patch": a.patch,
        "registers": a.registers,
    });
    if json {
        println!("{facts}");
        return Ok(());
    }
    for (key, value) in facts.as_object().into_iter().flatten() {
        println!("{key:<11} {}", value.as_str().map_or(value.to_string(), str::to_owned));
    }
    Ok(())
}
