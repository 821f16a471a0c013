//! The scans for the demo: made up, or those of a folder.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::super::{CONFIG, Failure, USAGE};
use super::phantom::{Lesion, phantom};
use crate::{
    companions,
    config::Config,
    ingest::{self, Links, Patterns},
    nifti,
    numeric::volume::RawVolume,
};

/// Number of made-up scans: enough for a window, and few enough for half a minute on two cores.
pub(super) const N_MADE_UP: u64 = 8;

/// Which of them have a lesion, and where.
const LESIONS: [(u64, Lesion); 2] = [
    (2, Lesion { centre: [34.0, -38.0, 24.0], radius_mm: 13.0 }),
    (5, Lesion { centre: [-30.0, 22.0, 30.0], radius_mm: 9.0 }),
];

/// A scan with the files beside it.
pub(in crate::cli) struct Scan {
    path: PathBuf,
    brain: Option<PathBuf>,
    truth: Option<PathBuf>,
}

impl Scan {
    fn at(path: PathBuf) -> Self {
        let [brain, truth] = ["brain", "lesion"].map(|what| companions::companion(&path, what));
        Self { brain, truth, path }
    }

    pub(in crate::cli) fn path(&self) -> &Path {
        &self.path
    }

    pub(in crate::cli) fn brain(&self) -> Option<&Path> {
        self.brain.as_deref()
    }

    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Start of the file names of its results.
    pub(super) fn stem(&self) -> String {
        companions::output_stem(&companions::stem_of(&self.path))
    }

    /// Mask of the known lesion.
    pub(super) fn truth(&self) -> Option<&Path> {
        self.truth.as_deref()
    }

    /// Writes it like a scanner: first under another name, then renamed. Its mask is written before
    /// it.
    pub(in crate::cli) fn drop_into(&self, incoming: &Path) -> io::Result<()> {
        for path in self.brain.iter().chain([&self.path]) {
            let name = path.file_name().unwrap_or_default();
            let partial = incoming.join(name).with_added_extension("partial");
            fs::copy(path, &partial)?;
            fs::rename(partial, incoming.join(name))?;
        }
        Ok(())
    }
}

/// The scans of the folder `source`, or `n` made-up scans in `folder`. At least two.
pub(in crate::cli) fn of(
    source: Option<&Path>,
    folder: &Path,
    n: u64,
) -> Result<Vec<Scan>, Failure> {
    let scans = source.map_or_else(|| made_up(folder, n), listed)?;
    if scans.len() < 2 {
        let found = scans.len();
        return Err(Failure::new(USAGE, format!("found {found} scans; at least 2 are needed")));
    }
    Ok(scans)
}

/// The scans in a folder, by the daemon's own rules.
fn listed(folder: &Path) -> Result<Vec<Scan>, Failure> {
    let intake = Config::load(None).map_err(|error| Failure::new(CONFIG, error))?.intake;
    let patterns = Patterns::new(&intake.accept, &intake.ignore)
        .map_err(|error| Failure::new(USAGE, error))?;
    let listed = ingest::list(folder, &patterns, Links::ToFiles, || {}).map_err(|error| {
        Failure::new(USAGE, format!("cannot list {}: {error}", folder.display()))
    })?;
    Ok(listed.scans.into_iter().map(|candidate| Scan::at(candidate.path)).collect())
}

/// Writes made-up scans and the masks of their lesions into a folder.
fn made_up(folder: &Path, n: u64) -> Result<Vec<Scan>, Failure> {
    fs::create_dir_all(folder).map_err(Failure::of_file)?;
    (0..n).map(|index| make_up(folder, index).map_err(Failure::of_file)).collect()
}

fn make_up(folder: &Path, index: u64) -> io::Result<Scan> {
    let lesion = LESIONS.iter().find(|(ill, _)| *ill == index).map(|(_, lesion)| *lesion);
    let made = phantom(index + 1, lesion);
    let subject = format!("phantom-{:02}", index + 1);
    if lesion.is_some() {
        let voxels = made.lesion.inside.iter().map(|&inside| f32::from(u8::from(inside))).collect();
        let mask = RawVolume { voxels, ..made.scan.clone() };
        fs::write(folder.join(format!("{subject}_lesion.nii.gz")), nifti::encode_volume(&mask))?;
    }
    let path = folder.join(format!("{subject}_FLAIR.nii.gz"));
    fs::write(&path, nifti::encode_volume(&made.scan))?;
    Ok(Scan::at(path))
}
