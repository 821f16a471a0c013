//! `oddscan check-config`: checks whether settings can be used.

use std::path::PathBuf;

use super::{CONFIG, Failure, engine_code, say};
use crate::{
    config::Config,
    engine::{EngineError, Ingredients},
    telemetry,
};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The settings file.
    file: PathBuf,
    /// Check only the settings, for example on a machine without weights.
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
    if config.directories.incoming.try_exists().is_ok_and(|exists| !exists) {
        println!(
            "{} does not exist; the daemon will create it",
            config.directories.incoming.display()
        );
    }

    telemetry::start_logging("warn");
    let found = Ingredients::load_all(&config).map_err(all_but_one_said)?;
    let template = if found.has_template() { "with" } else { "without" };
    println!("network {}, {template} a template", found.model());
    if let Some(hook) = found.hook() {
        println!("preprocessing by {}, version {}", hook.name(), hook.version());
    }
    Ok(())
}

/// Prints all errors except the last, which it returns.
fn all_but_one_said(mut missing: Vec<EngineError>) -> Failure {
    let last = missing.pop().expect("an error says what is missing");
    missing.iter().for_each(|error| say(error));
    Failure::new(engine_code(&last), last)
}
