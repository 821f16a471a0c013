//! `oddscan score`: scores files as one window per cohort, without daemon and store.

mod encode;
mod named;
mod window;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde_json::json;

use self::{
    encode::{EncodedScan, Encoding},
    window::Scoring,
};
use super::{CONFIG, Failure, IO, REFUSED, engine_code};
use crate::{
    config::Config,
    domain::{
        cohort::CohortKey,
        finding::{Finding, Tail},
        identity::{IdentityChoice, IdentityKey, Pseudonyms},
        window::WindowIdentity,
    },
    engine::Engine,
    pipeline::identity_key,
    telemetry,
};

pub(super) use named::{Named, Refused, expand};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Settings; see `config/default.toml`. `[service]` is not used, and of the folders only the
    /// key of hashes in the state folder. Names stay in clear unless this file itself has
    /// `results.identity`.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder for maps, masks, pictures and sidecars. `refused/<stem>_registration.png` in it shows
    /// a scan that cannot be aligned.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// Score cohorts with fewer patients than `window.min_scans`, too. Their results have no
    /// percentile and say little.
    #[arg(long)]
    force: bool,
    /// Scans (.nii, .nii.gz), DICOM files or zips of them, or folders. Scans of one cohort are
    /// compared. A [[cohort]] rule of the settings chooses it, else the end of the file name
    /// (`_FLAIR`, `_T1w`) and whether the slices are thick. `<subject>_brain.nii.gz` beside a scan
    /// is its brain mask; `<stem>.json` says how it was acquired.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let config = Config::load(arguments.config.as_deref()).map_err(|e| Failure::new(CONFIG, e))?;
    let pseudonyms = pseudonyms(&config, arguments.config.as_deref())?;
    telemetry::start_logging("warn");
    let unpacked = tempfile::tempdir().map_err(|error| Failure::new(IO, error))?;
    let (files, unconverted) = expand(&arguments.files, &config, unpacked.path())?;
    fs::create_dir_all(&arguments.out).map_err(|error| {
        Failure::new(IO, format!("cannot create {}: {error}", arguments.out.display()))
    })?;

    let mut engine = Engine::start(&config).map_err(|e| Failure::new(engine_code(&e), e))?;
    let n_files = files.len() + unconverted.len();
    let prepared = unpacked.path().join("prepared");
    fs::create_dir(&prepared).map_err(|error| Failure::new(IO, error))?;

    let mut refused = unconverted;
    let mut encoding = Encoding {
        config: &config,
        engine: &mut engine,
        prepared: &prepared,
        out: &arguments.out,
        refused: &mut refused,
        pseudonyms: &pseudonyms,
        stems: BTreeSet::new(),
        pictures: BTreeSet::new(),
    };
    let members = encoding.encode_all(&files)?;
    let mut cohorts: BTreeMap<CohortKey, Vec<EncodedScan>> = BTreeMap::new();
    for member in members {
        cohorts.entry(member.record.cohort.clone()).or_default().push(member);
    }

    let mut scoring = Scoring {
        config: &config,
        engine: &mut engine,
        pseudonyms: &pseudonyms,
        warnings: BTreeMap::new(),
    };
    let mut scored = Vec::new();
    for (key, members) in cohorts {
        let window = scoring.window(key, &members);
        let min_scans = if arguments.force { 0 } else { config.window.min_scans };
        if let Some(error) = too_few(&window.identity(), min_scans) {
            let all = members.into_iter().map(|member| (member.path, error.clone()));
            refused.extend(all.map(|(path, error)| Refused::new(path, error)));
            continue;
        }
        scored.extend(scoring.score(&window, members, &arguments.out)?);
    }

    print_table(&scored, &refused, &arguments);
    for (warning, stems) in &scoring.warnings {
        let whose =
            if stems.len() == 1 { stems[0].clone() } else { format!("{} scans", stems.len()) };
        eprintln!("warning ({whose}): {warning}");
    }

    if refused.is_empty() {
        return Ok(());
    }
    let n_refused = refused.len();
    Err(Failure::new(REFUSED, format!("{n_refused} of {n_files} files were not scored")))
}

/// What results say instead of names. Results are in clear, because a person has named the files
/// and looks for their results. If a site's settings choose another form, that counts, and the
/// hashes are those of its daemon if this person may read the key.
fn pseudonyms(config: &Config, settings: Option<&Path>) -> Result<Pseudonyms, Failure> {
    let is_chosen = settings.is_some_and(|path| Config::states(path, "results", "identity"));
    let choice = if is_chosen { config.results.identity } else { IdentityChoice::Clear };
    let random = || identity_key::random().map_err(|error| Failure::new(IO, error));
    if choice != IdentityChoice::Hashed {
        // No hash is made.
        return Ok(Pseudonyms::new(choice, IdentityKey::new([0; 32])));
    }

    let state = &config.directories.state;
    let key = match identity_key::read(state) {
        Ok(Some(key)) => key,
        Ok(None) | Err(_) => {
            eprintln!(
                "note: there is no key of hashes that can be read in {}. The hashes in these results \
                 are made with a key of their own; no other results have the same. results.identity \
                 = \"path\" writes names in clear",
                state.display()
            );
            random()?
        }
    };
    Ok(Pseudonyms::new(choice, key))
}

/// The reason why a cohort cannot be scored, if it has too few scans to compare: `min_scans` is the
/// number of patients that it needs.
fn too_few(cohort: &WindowIdentity, min_scans: usize) -> Option<String> {
    let label = cohort.cohort.label();
    let (n_scans, n_references) = (cohort.members.len(), cohort.n_references());
    let n_patients = cohort.n_patients();
    if n_scans < 2 {
        Some(format!("alone in its cohort ({label}): there is no scan to compare it with"))
    } else if n_references < 2 {
        Some(format!(
            "{n_references} of {n_scans} scans of its cohort ({label}) are references ([quality]); 2 are \
             needed"
        ))
    } else if n_patients < 2 {
        Some(format!(
            "the {n_references} scans of its cohort ({label}) are of one patient; scans of 2 \
             patients are needed (window.compare_same_patient)"
        ))
    } else if n_patients < min_scans {
        let what = if cohort.same_patient.is_empty() { "reference scans" } else { "patients" };
        Some(format!(
            "its cohort ({label}) has {n_patients} {what}; {min_scans} are needed (window.min_scans). Add \
             scans, lower window.min_scans, or give --force: results of fewer scans say little"
        ))
    } else {
        None
    }
}

fn print_table(scored: &[(EncodedScan, Finding)], refused: &[Refused], arguments: &Arguments) {
    if arguments.json {
        let scans: Vec<_> = scored
            .iter()
            .map(|(member, finding)| {
                json!({
                    "file": member.path,
                    "stem": member.stem,
                    "cohort": member.record.cohort.label(),
                    "score_max": finding.score_max,
                    "score_top1_mean": finding.score_top1_mean,
                    "percentile": finding.percentile,
                    "mask_ml": finding.mask_ml(),
                    "tail_probability": finding.tail.map(|tail| tail.probability),
                    "stands_out": finding.tail.and_then(|tail| tail.stands_out),
                })
            })
            .collect();
        let refused: Vec<_> = refused.iter().map(refused_json).collect();
        println!("{}", json!({ "scored": scans, "refused": refused, "out": arguments.out }));
        return;
    }
    if !scored.is_empty() {
        println!(
            "{:<36} {:>8} {:>8} {:>11} {:>9} {:>11}",
            "scan", "score", "max", "percentile", "mask ml", "stands out"
        );
    }
    for (member, finding) in scored {
        println!(
            "{:<36} {:>8.3} {:>8.3} {:>11} {:>9.1} {:>11}",
            member.stem,
            finding.score_top1_mean,
            finding.score_max,
            percent(finding.percentile),
            finding.mask_ml(),
            verdict(finding.tail)
        );
    }
    for Refused { path, error, picture } in refused {
        eprintln!("not scored: {}: {error}", path.display());
        if let Some(picture) = picture {
            eprintln!("  look at {}", picture.display());
        }
    }
    println!("results in {}   (research use only)", arguments.out.display());
}

/// Whether a scan stands out, with its tail probability; `-` if its map is of tokens alone.
fn verdict(tail: Option<Tail>) -> String {
    let Some(Tail { probability, stands_out, .. }) = tail else { return "-".to_owned() };
    let verdict = stands_out.map_or("?", |stands_out| if stands_out { "yes" } else { "no" });
    format!("{verdict} {probability:.2}")
}

/// A percentile for a table; `-` if there is none.
pub(super) fn percent(percentile: Option<f64>) -> String {
    percentile.map_or("-".to_owned(), |share| format!("{:.0}%", 100.0 * share))
}

fn refused_json(refused: &Refused) -> serde_json::Value {
    let mut said = json!({ "file": refused.path, "reason": refused.error });
    if let Some(picture) = &refused.picture {
        said["picture"] = json!(picture);
    }
    said
}
