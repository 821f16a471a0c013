//! `oddscan eval`: measures how well maps and masks find known lesions.

mod baselines;
mod case;
mod figures;
mod froc;
mod summary;
mod tables;

use std::{
    fs,
    path::{Path, PathBuf},
};

use self::{
    case::{Case, Folders},
    summary::summarise,
    tables::tables,
};
use super::{Failure, IO, REFUSED, USAGE};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Folder with results of `oddscan score` or of the daemon.
    #[arg(long, value_name = "DIR")]
    maps: PathBuf,
    /// Folder with lesion masks on the grid of the scans: `<subject>_lesion.nii.gz`. A scan without
    /// one counts as healthy. `<subject>_normalWMH.nii.gz` holds hyperintensities that count as
    /// normal: marked regions on these are counted apart, not as false ones. For AUROC and average
    /// precision their voxels are healthy.
    #[arg(long, value_name = "DIR")]
    truth: PathBuf,
    /// Folder with brain masks: `<subject>_brain.nii.gz`. Default: the folder of the lesion masks.
    /// Without a mask, a scan's brain is where its map is not 0.
    #[arg(long, value_name = "DIR")]
    brain: Option<PathBuf>,
    /// Folder with the scans themselves, from which the baselines are computed (brightness,
    /// darkness, deviation from the median of the scans of the cohort). Default: the folder of the
    /// lesion masks.
    #[arg(long, value_name = "DIR")]
    scans: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let Arguments { maps, truth, brain, scans, json } = arguments;
    let folders = Folders { maps, truth, brain: brain.as_ref().unwrap_or(truth) };
    let stems = stems(maps)?;
    let mut cases = Vec::new();
    let mut notes = Vec::new();
    for stem in &stems {
        match Case::read(folders, stem) {
            Ok(case) => cases.push(case),
            Err(error) => notes.push(format!("not evaluated: {stem}: {error}")),
        }
    }
    let n_refused = notes.len();

    if !cases.is_empty() {
        let (evaluation, missing) = summarise(cases, scans.as_ref().unwrap_or(truth));
        notes.extend(missing);
        if *json {
            println!("{}", serde_json::json!(evaluation));
        } else {
            print!("{}", tables(&evaluation));
        }
    }

    for note in &notes {
        eprintln!("{note}");
    }
    match n_refused {
        0 => Ok(()),
        n => Err(Failure::new(REFUSED, format!("{n} of {} maps were not evaluated", stems.len()))),
    }
}

/// The scans with maps in a folder.
fn stems(maps: &Path) -> Result<Vec<String>, Failure> {
    let cannot = |error| Failure::new(IO, format!("cannot list {}: {error}", maps.display()));
    let entries = fs::read_dir(maps).map_err(cannot)?;
    let mut stems: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter_map(|name| Some(name.strip_suffix("_anomaly-map.nii.gz")?.to_owned()))
        .collect();
    stems.sort();
    if stems.is_empty() {
        let text = format!(
            "found no *_anomaly-map.nii.gz in {}; name a folder of results",
            maps.display()
        );
        return Err(Failure::new(USAGE, text));
    }
    Ok(stems)
}
