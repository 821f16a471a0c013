//! The files that a command line names: scans, and the volumes of DICOM files.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    cli::{Failure, INTERNAL, IO, USAGE},
    config::Config,
    domain::{left_alone::LeftAlone, patient::Patient, scan::DicomFacts},
    ingest::{self, Links, Patterns},
    process::convert::{self, Bounds, Event, Listed},
};

/// A file to be read.
pub(in crate::cli) struct Named {
    pub(in crate::cli) path: PathBuf,
    /// Patient in the DICOM header. `None` for other files.
    pub(super) patient: Option<Patient>,
    /// Its DICOM series. `None` for other files.
    pub(super) dicom: Option<DicomFacts>,
}

impl From<PathBuf> for Named {
    fn from(path: PathBuf) -> Self {
        Self { path, patient: None, dicom: None }
    }
}

/// A file that was not scored, and why.
pub(in crate::cli) struct Refused {
    pub(in crate::cli) path: PathBuf,
    pub(in crate::cli) error: String,
    /// Picture that shows the reason. `None` if there is none.
    pub(in crate::cli) picture: Option<PathBuf>,
}

impl Refused {
    pub(in crate::cli) fn new(path: PathBuf, error: String) -> Self {
        Self { path, error, picture: None }
    }
}

/// Returns the named files and the scans in named folders. DICOM series are converted into
/// `unpacked`. Those that cannot be converted are returned as refused.
pub(in crate::cli) fn expand(
    named: &[PathBuf],
    config: &Config,
    unpacked: &Path,
) -> Result<(Vec<Named>, Vec<Refused>), Failure> {
    let patterns = Patterns::new(&config.intake.accept, &config.intake.ignore)
        .map_err(|error| Failure::new(INTERNAL, error))?;
    let cannot_list =
        |path: &Path, e| Failure::new(IO, format!("cannot list {}: {e}", path.display()));

    let mut files: Vec<Named> = Vec::new();
    let mut dicom = Vec::new();
    for path in named {
        if path.is_dir() && !patterns.is_scan(path) {
            let listed = ingest::list(path, &patterns, Links::ToFiles, || {})
                .map_err(|e| cannot_list(path, e))?;
            files.extend(listed.scans.into_iter().map(|candidate| candidate.path.into()));
            let has_mark = |file: &ingest::Candidate| ingest::has_dicom_mark(&file.path);
            let found = ingest::list_dicom(path, &patterns, has_mark, || {})
                .map_err(|e| cannot_list(path, e))?;
            dicom.extend(found.into_iter().map(|file| file.path));
        } else if patterns.is_scan(path) {
            files.push(path.clone().into());
        } else if ingest::is_zip(path) || ingest::has_dicom_mark(path) {
            dicom.push(path.clone());
        } else {
            eprintln!(
                "{}: neither a scan by its name (intake.accept, intake.ignore) nor a DICOM file",
                path.display()
            );
        }
    }

    // A folder and a file in it may both be named.
    let mut places = BTreeSet::new();
    files.retain(|file| places.insert(place(&file.path)));
    dicom.retain(|path| places.insert(place(path)));

    let refused = convert_series(&dicom, config, unpacked, &mut files)?;
    if files.is_empty() && refused.is_empty() {
        let needed = "no scan among the files; name NIfTI or DICOM files, zips or folders of them";
        return Err(Failure::new(USAGE, needed));
    }
    Ok((files, refused))
}

/// The real path of a file, however it was named. A link itself is not followed.
fn place(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    fs::canonicalize(folder).unwrap_or(folder.to_owned()).join(path.file_name().unwrap_or_default())
}

/// Converts DICOM files like the daemon and adds the volumes to `files`.
fn convert_series(
    dicom: &[PathBuf],
    config: &Config,
    unpacked: &Path,
    files: &mut Vec<Named>,
) -> Result<Vec<Refused>, Failure> {
    if dicom.is_empty() {
        return Ok(Vec::new());
    }
    // The process works in a folder of its own.
    let absolute = |path: &PathBuf| std::path::absolute(path).map(Listed::new);
    let listed: Result<Vec<_>, _> = dicom.iter().map(absolute).collect();
    let listed = listed.map_err(|error| Failure::new(IO, error))?;
    let work = unpacked.join("dicom");
    let n_bytes = dicom.iter().map(|path| fs::metadata(path).map_or(0, |meta| meta.len())).sum();
    let limits = &config.intake.limits;
    let events = convert::convert(listed, n_bytes, &work, limits, Bounds::NONE, || true)
        .map_err(|error| Failure::new(IO, error))?;

    let first = |inputs: &[usize]| inputs.first().map_or(PathBuf::new(), |&i| dicom[i].clone());
    let mut refused = Vec::new();
    for event in events.unwrap_or_default() {
        match event {
            Event::Converted { name, patient, dicom, left_out, .. } => {
                if !left_out.is_empty() {
                    let first = first(&left_out);
                    let n = left_out.len();
                    eprintln!("left out: {} ({n} in all): {}", first.display(), LeftAlone::Stray);
                }
                let path = work.join("out").join(format!("{name}.nii.gz"));
                files.push(Named { path, patient, dicom });
            }
            Event::Refused { refusal, inputs, .. } => {
                refused.push(Refused::new(first(&inputs), refusal.to_string()));
            }
            Event::Skipped { why, inputs, .. } => {
                eprintln!("left out: {} and its series: {why}", first(&inputs).display());
            }
            Event::Waiting { inputs } | Event::Postponed { inputs } => {
                let error =
                    "not converted: the converter crashed on too many files before it".to_owned();
                refused.push(Refused::new(first(&inputs), error));
            }
            Event::InHand { .. } | Event::Belongs { .. } => {}
        }
    }
    Ok(refused)
}
