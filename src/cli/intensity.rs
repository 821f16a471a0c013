//! `oddscan intensity`: learns landmarks for intensity standardisation from scans.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::{CONFIG, Failure, IO, REFUSED, engine_code, score};
use crate::{
    companions,
    config::{Config, Standardise},
    domain::{
        error::ScanError,
        landmarks::{LandmarkSet, Learnt},
        scan::ScanId,
    },
    engine::{Engine, Method},
    files,
    numeric::{
        intensity::{self, Landmarks},
        preprocess,
    },
    prepare::{
        Prepared,
        acquisition::{must_be_magnitude, read_json},
        read_and_find_brain,
    },
    refusals, telemetry,
};

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Learn the landmarks of each cohort from its scans, for `intensity.landmarks`.
    ///
    /// Use about ten scans of each cohort or more, healthy ones if possible. The file is part of
    /// the method: with another file all scans are encoded again.
    Learn(Learn),
}

#[derive(clap::Args)]
pub(super) struct Learn {
    /// Settings of the daemon. Cohort rules and alignment are applied like there.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The file to write. An existing file is replaced.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Percentiles of the brain's intensities that serve as landmarks, in rising order.
    #[arg(long, value_delimiter = ',', default_values_t = intensity::PERCENTILES)]
    percentiles: Vec<f64>,
    /// Scans, or folders of them, as for `oddscan score`.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

pub(super) fn run(command: Command) -> Result<(), Failure> {
    let Command::Learn(arguments) = command;
    learn(&arguments)
}

/// One scan: its cohort, its id, and its landmarks as shares of its level of white matter.
struct Seen {
    cohort: String,
    id: ScanId,
    values: Vec<f64>,
}

fn learn(arguments: &Learn) -> Result<(), Failure> {
    intensity::check_percentiles(&arguments.percentiles)
        .map_err(|why| Failure::new(super::USAGE, why))?;
    let mut config =
        Config::load(arguments.config.as_deref()).map_err(|e| Failure::new(CONFIG, e))?;
    // The file in the settings may be the one to write, so it may not exist yet.
    config.intensity.standardise = Standardise::None;
    telemetry::start_logging("warn");

    let unpacked = tempfile::tempdir().map_err(|error| Failure::new(IO, error))?;
    let (files, mut refused) = score::expand(&arguments.files, &config, unpacked.path())?;
    let engine = Engine::start(&config).map_err(|e| Failure::new(engine_code(&e), e))?;

    let mut seen: Vec<Seen> = Vec::new();
    for score::Named { path, .. } in &files {
        match look(path, &config, &engine.method, &arguments.percentiles) {
            // A copy would count twice.
            Ok(scan) if seen.iter().any(|other| other.id == scan.id) => {}
            Ok(scan) => seen.push(scan),
            Err(error) => {
                refused.push(score::Refused::new(path.clone(), error.to_string()));
            }
        }
    }

    let mut by_cohort: BTreeMap<String, Vec<Seen>> = BTreeMap::new();
    for scan in seen {
        by_cohort.entry(scan.cohort.clone()).or_default().push(scan);
    }

    let mut cohorts = BTreeMap::new();
    for (name, scans) in by_cohort {
        let values: Vec<Vec<f64>> = scans.iter().map(|scan| scan.values.clone()).collect();
        let mean = Landmarks::mean_of(&arguments.percentiles, &values);
        let mean = mean.map_err(|why| Failure::new(REFUSED, format!("cohort {name}: {why}")))?;
        let mut scans: Vec<ScanId> = scans.iter().map(|scan| scan.id).collect();
        scans.sort_unstable();
        println!("{name}: {} scans, values {:.3?}", scans.len(), mean.values());
        let learnt = Learnt { values: mean.values().to_vec(), n_scans: scans.len(), scans };
        cohorts.insert(name, learnt);
    }

    for score::Refused { path, error, .. } in &refused {
        eprintln!("not used: {}: {error}", path.display());
    }

    let set = LandmarkSet::new(arguments.percentiles.clone(), cohorts)
        .map_err(|why| Failure::new(REFUSED, why))?;
    files::write_atomic(&arguments.out, set.to_json().as_bytes()).map_err(|error| {
        Failure::new(IO, format!("cannot write {}: {error}", arguments.out.display()))
    })?;
    println!("{}: sha256 {}", arguments.out.display(), set.digest());
    Ok(())
}

/// Prepares a scan like the daemon, but does not encode it.
fn look(
    path: &Path,
    config: &Config,
    method: &Method,
    percentiles: &[f64],
) -> Result<Seen, ScanError> {
    let mask = companions::companion_mask(path);
    let work = tempfile::tempdir().map_err(|source| ScanError::Internal {
        doing: "making a folder for preprocessing",
        source,
    })?;
    let work = work.path().join("work");
    let json = companions::companion_json(path).map(|json| read_json(path, &json));
    must_be_magnitude(path, json.as_ref())?;
    let (id, source) =
        read_and_find_brain(path, mask.as_deref(), &config.intake.limits, method, &work, || {})?;

    // A scan that the daemon would refuse is not used.
    let prepared = Prepared::new(id, &source, path, json, config, method)?;

    let white =
        preprocess::white_level(&source.raw, &source.brain).map_err(refusals::of_preprocessing)?;
    let own = intensity::of_scan(&source.raw, &source.brain, percentiles);
    Ok(Seen {
        cohort: prepared.acquisition.cohort.name,
        id,
        values: own.into_iter().map(|value| value / white).collect(),
    })
}
