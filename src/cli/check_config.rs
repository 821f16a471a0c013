//! `oddscan check-config`: are these settings usable?

use std::path::Path;

use super::{CONFIG, Failure};
use crate::config::Config;

pub(super) fn run(file: &Path) -> Result<(), Failure> {
    let config = Config::load(Some(file)).map_err(|error| Failure::new(CONFIG, error))?;
    println!(
        "{}: ok (preset {:?}, watching {})",
        file.display(),
        config.preset,
        config.directories.incoming.display()
    );
    for (index, rule) in config.cohorts.iter().enumerate() {
        println!("cohort rule {}, {rule}", index + 1);
    }
    let others = if config.cohorts.is_empty() { "all scans" } else { "scans that no rule takes" };
    println!("{others}: by the suffix of the file name");
    Ok(())
}
