//! `oddscan quarantine`: lists refused files, puts them back, or deletes them.

use std::path::{Path, PathBuf};

use super::{CONFIG, Failure, IO, USAGE};
use crate::{
    config::{Config, Directories},
    quarantine::{self, Entry},
};

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Show every refused file: what was found, what is needed, what to do.
    List {
        #[command(flatten)]
        settings: Settings,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Put refused files back into the incoming folder, to be read again.
    Requeue {
        #[command(flatten)]
        settings: Settings,
        #[command(flatten)]
        entries: Entries,
    },
    /// Delete refused files and their reasons permanently.
    Drop {
        #[command(flatten)]
        settings: Settings,
        #[command(flatten)]
        entries: Entries,
    },
}

#[derive(clap::Args)]
pub(super) struct Settings {
    /// Settings of the daemon; only its folders are used.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Settings {
    fn folders(&self) -> Result<Directories, Failure> {
        let config = Config::load(self.config.as_deref());
        Ok(config.map_err(|error| Failure::new(CONFIG, error))?.directories)
    }
}

#[derive(clap::Args)]
#[group(required = true)]
pub(super) struct Entries {
    /// Entries as `list` names them, like truncated/sub-1_T1w.nii.gz.
    entries: Vec<PathBuf>,
    /// All entries with this reason, like registration_failed.
    #[arg(long, value_name = "REASON", conflicts_with = "entries")]
    reason: Option<String>,
}

impl Entries {
    fn names(&self, folder: &Path) -> Result<Vec<PathBuf>, Failure> {
        let Some(reason) = &self.reason else { return Ok(self.entries.clone()) };
        let names = listed(folder)?.into_iter().map(|entry| entry.name);
        let names: Vec<PathBuf> = names.filter(|name| name.starts_with(reason)).collect();
        if names.is_empty() {
            let text = format!("no entry has the reason {reason}");
            return Err(Failure::new(USAGE, text));
        }
        Ok(names)
    }
}

pub(super) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::List { settings, json } => list(&settings.folders()?.quarantine, *json),
        Command::Requeue { settings, entries } => {
            let Directories { quarantine, incoming, .. } = settings.folders()?;
            each(&entries.names(&quarantine)?, |name| {
                let place = quarantine::requeue(&quarantine, name, &incoming)?;
                println!("{} is back at {}", name.display(), place.display());
                Ok(())
            })
        }
        Command::Drop { settings, entries } => {
            let Directories { quarantine, .. } = settings.folders()?;
            each(&entries.names(&quarantine)?, |name| {
                quarantine::drop_entry(&quarantine, name)?;
                println!("{} is deleted", name.display());
                Ok(())
            })
        }
    }
}

fn listed(folder: &Path) -> Result<Vec<Entry>, Failure> {
    quarantine::entries(folder)
        .map_err(|error| Failure::new(IO, format!("cannot read {}: {error}", folder.display())))
}

fn list(folder: &Path, json: bool) -> Result<(), Failure> {
    let entries = listed(folder)?;
    if json {
        println!("{}", serde_json::json!(entries));
        return Ok(());
    }
    for Entry { name, reason, picture } in &entries {
        println!("{}", name.display());
        match reason.as_ref().map(|reason| &reason.refusal) {
            None => println!("  its reason.json cannot be read"),
            Some(refusal) => println!(
                "  found {}\n  needed {}\n  {}",
                refusal.found, refusal.needed, refusal.action
            ),
        }
        if let Some(picture) = picture {
            println!("  look at {}", folder.join(picture).display());
        }
    }
    println!("{} in {}", entries.len(), folder.display());
    Ok(())
}

/// Applies `act` to every entry, also after a failure. Reports all failures together.
fn each(names: &[PathBuf], act: impl Fn(&Path) -> std::io::Result<()>) -> Result<(), Failure> {
    let failed = names.iter().filter_map(|name| Some((name, act(name).err()?)));
    let failed: Vec<String> =
        failed.map(|(name, error)| format!("{}: {error}", name.display())).collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(Failure::new(IO, failed.join("\n")))
}
