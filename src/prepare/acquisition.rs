//! How a scan was acquired, and which cohort follows from that. The daemon and `oddscan score`
//! share this code.

use std::{fs, io, path::Path};

use crate::{
    bids, companions,
    config::Config,
    domain::{
        acquisition::AcquisitionFacts,
        cohort::{CohortKey, Undecided},
    },
    engine::Method,
    files,
};

/// The known facts of a scan's acquisition and the cohort that follows from them.
#[derive(Debug, Clone, PartialEq)]
pub struct Acquisition {
    /// Facts from the file name, the grid and the JSON.
    pub facts: AcquisitionFacts,
    /// Cohort that the facts choose.
    pub cohort: CohortKey,
    /// Notes about both for readers of the results, one sentence each.
    pub notes: Vec<String>,
}

/// Finds the cohort of a scan by its name, its grid, and the JSON beside it. An unusable JSON does
/// not refuse the scan: it is ignored, and a note says so.
pub fn acquisition(
    scan: &Path,
    json: Option<io::Result<Vec<u8>>>,
    spacing_mm: [f64; 3],
    config: &Config,
    method: &Method,
) -> Acquisition {
    let mut facts = AcquisitionFacts::of(&companions::stem_of(scan), spacing_mm);
    let mut notes = Vec::new();

    if let Some(json) = json {
        // Only the kind of the error, because its text may contain a path.
        let read = json.map_err(|error| format!("it cannot be read ({})", error.kind()));
        match read.and_then(|bytes| bids::read_facts(&bytes, &mut facts)) {
            Ok(unusable) if unusable.is_empty() => {}
            Ok(unusable) => notes.push(format!(
                "the JSON beside the scan has no usable value for {}; they count as unknown",
                unusable.join(", ")
            )),
            Err(why) => notes.push(format!("the JSON beside the scan cannot be used: {why}")),
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

/// The content of the JSON beside a scan. If the scan is a link, the JSON may be one, too: only a
/// person can have named a link.
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
