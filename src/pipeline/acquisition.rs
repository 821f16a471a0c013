//! How a scan was acquired and into which cohort that puts it: the same for the daemon and the
//! one-shot command.

use std::{fs, io, path::Path};

use super::steps;
use crate::{
    bids,
    config::Config,
    domain::{
        acquisition::AcquisitionFacts,
        cohort::{CohortKey, Undecided},
    },
    engine::Method,
    files,
};

/// What is known of a scan's acquisition, and what follows from it.
#[derive(Debug, Clone, PartialEq)]
pub struct Acquisition {
    /// What is known.
    pub facts: AcquisitionFacts,
    /// The cohort.
    pub cohort: CohortKey,
    /// What a reader of the results should know of both.
    pub notes: Vec<String>,
}

/// Finds the cohort of a scan by its name, its grid, and the JSON beside it. A JSON that is of no
/// use never loses a scan: it is as if there were none, and a note says so.
pub fn acquisition(
    scan: &Path,
    json: Option<io::Result<Vec<u8>>>,
    spacing_mm: [f64; 3],
    config: &Config,
    method: &Method,
) -> Acquisition {
    let mut facts = AcquisitionFacts::of(&steps::stem_of(scan), spacing_mm);
    let mut notes = Vec::new();
    if let Some(json) = json {
        // The kind of the error: its text may hold a path.
        let read = json.map_err(|error| format!("it cannot be read ({})", error.kind()));
        match read.and_then(|bytes| bids::read_facts(&bytes, &mut facts)) {
            Ok(unusable) if unusable.is_empty() => {}
            Ok(unusable) => notes.push(format!(
                "the JSON beside the scan has no usable value for {}; taken as not known",
                unusable.join(", ")
            )),
            Err(why) => notes.push(format!("the JSON beside the scan is of no use: {why}")),
        }
    }
    let file_name = scan.file_name().unwrap_or_default().to_string_lossy();
    let Config { cohorts, window, .. } = config;
    let thick_mm = window.thick_slice_mm;
    let (cohort, undecided) =
        CohortKey::choose(cohorts, &facts, &file_name, thick_mm, &method.fingerprint);
    notes.extend(undecided.map(|rule| left_open(rule, &facts)));
    Acquisition { facts, cohort, notes }
}

/// The content of the JSON beside a scan. Where the scan is a link, which only a person can have
/// named, the JSON may be one too.
pub fn read_json(scan: &Path, json: &Path) -> io::Result<Vec<u8>> {
    if scan.is_symlink() {
        return files::read_small(&fs::canonicalize(json)?, bids::MAX_BYTES);
    }
    files::read_small(json, bids::MAX_BYTES)
}

fn left_open(Undecided { rule, missing }: Undecided, facts: &AcquisitionFacts) -> String {
    let source =
        if facts.has_json { "the JSON beside it does not say" } else { "no JSON was read" };
    format!(
        "the cohort rule {rule} does not take the scan: its {} is not known ({source})",
        missing.join(", ")
    )
}
