//! `oddscan check-config`: are these settings usable?

use std::path::PathBuf;

use super::{CONFIG, Failure, engine_code};
use crate::{config::Config, engine::Ingredients, telemetry};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The file.
    file: PathBuf,
    /// Look at the settings alone, as on a machine that has no weights.
    #[arg(long)]
    settings_only: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let file = &arguments.file;
    let config = Config::load(Some(file)).map_err(|error| Failure::new(CONFIG, error))?;
    println!(
        "{}: the settings are ok (preset {}, watching {})",
        file.display(),
        config.tree["preset"],
        config.directories.incoming.display()
    );
    for (index, rule) in config.cohorts.iter().enumerate() {
        println!("cohort rule {}, {rule}", index + 1);
    }
    let others = if config.cohorts.is_empty() { "all scans" } else { "scans that no rule takes" };
    println!("{others}: by the suffix of the file name");
    if arguments.settings_only {
        return Ok(());
    }
    telemetry::start_logging("warn");
    let found = Ingredients::load(&config).map_err(|e| Failure::new(engine_code(&e), e))?;
    let template = if found.has_template() { "with" } else { "without" };
    println!("network {}, {template} a template", found.model());
    if let Some(hook) = found.hook() {
        println!("preprocessing by {}, version {}", hook.name(), hook.version());
    }
    Ok(())
}
