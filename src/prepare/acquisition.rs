//! How a scan was acquired, and which cohort follows from that. The daemon and `oddscan score`
//! share this code.

use std::{fs, io, path::Path};

use crate::{
    bids, companions,
    config::Config,
    domain::{
        acquisition::{AcquisitionFacts, doubt_of, signal_part_of},
        cohort::{CohortKey, UNKNOWN, Undecided},
        error::{QuarantineReason, Refusal},
        sequence::{self, is_no_magnitude, judge},
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
    let mut sequence = None;

    if let Some(json) = json {
        // Only the kind of the error, because its text may contain a path.
        let read = json.map_err(|error| format!("it cannot be read ({})", error.kind()));
        match read.and_then(|bytes| bids::read_facts(&bytes, &mut facts)) {
            Ok(read) => {
                sequence = Some(read.sequence);
                notes.extend(read.notes);
                if !read.unusable.is_empty() {
                    notes.push(format!(
                        "the JSON beside the scan has no usable value for {}; they count as unknown",
                        read.unusable.join(", ")
                    ));
                }
            }
            Err(why) => notes.push(format!("the JSON beside the scan cannot be used: {why}")),
        }
    }

    let file_name = scan.file_name().unwrap_or_default().to_string_lossy();
    let Config { cohorts, window, .. } = config;
    let thick_mm = window.thick_slice_mm;
    let (cohort, undecided) =
        CohortKey::choose(cohorts, &facts, &file_name, thick_mm, &method.fingerprint);
    notes.extend(undecided.map(|rule| left_open(rule, &facts)));
    let stem = companions::stem_of(scan);
    notes.extend(doubt_about_kind(&stem, facts.suffix.as_deref(), &cohort, sequence.as_ref()));
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

/// Refuses a file whose name or JSON says that it holds no magnitudes. Phases look like noise to
/// the method.
///
/// # Errors
/// The refusal, if they say so. A JSON that cannot be read says nothing.
pub fn must_be_magnitude(scan: &Path, json: Option<&io::Result<Vec<u8>>>) -> Result<(), Refusal> {
    let by_json = || {
        let bytes = json?.as_ref().ok()?;
        let read = bids::read_facts(bytes, &mut AcquisitionFacts::default()).ok()?;
        let is_other = is_no_magnitude(&read.sequence.image_type);
        is_other
            .then_some("a phase, real or imaginary part, by the ImageType in its JSON".to_owned())
    };
    let by_name = signal_part_of(&companions::stem_of(scan));
    let by_name = by_name.map(|part| format!("the {part} of a complex image, by its name"));

    let Some(found) = by_name.or_else(by_json) else { return Ok(()) };
    let action = "leave phase images out of the export; if it holds magnitudes, correct the file name \
                  or the ImageType";
    Err(Refusal::new(QuarantineReason::Unsupported, found, "a magnitude image", action))
}

/// What a reader should know about the kind of image: why it stays open, or that the JSON says
/// another one than the name. Quotes nothing but suffixes.
fn doubt_about_kind(
    stem: &str,
    suffix: Option<&str>,
    cohort: &CohortKey,
    sequence: Option<&sequence::Acquisition>,
) -> Option<String> {
    const ADVICE: &str = "End the file name in its suffix, such as _T1w, or write a [[cohort]] rule \
                          (for DICOM files, with series)";
    let judgement = sequence.map(judge);

    let Some(suffix) = suffix else {
        if cohort.name != UNKNOWN {
            return None;
        }
        return match (doubt_of(stem), judgement) {
            (Some(doubt), _) => Some(format!("which sequence it is stays open: {doubt}. {ADVICE}")),
            (None, Some(sequence::Judgement { doubt: Some(doubt), .. })) => {
                Some(format!("which sequence it is stays open: {doubt}. {ADVICE}"))
            }
            (None, Some(judgement)) => Some(format!(
                "the JSON beside the scan says {}, but only the file name counts. {ADVICE}",
                judgement.suffix
            )),
            (None, None) => None,
        };
    };

    // A rule may know better, and maps and planes have no timing of their own.
    let is_by_name = cohort.name.starts_with(&suffix.to_lowercase());
    let is_judged = sequence::KINDS.contains(&suffix);
    let found = judgement.filter(|_| is_by_name && is_judged)?.suffix;
    (found != UNKNOWN && found != suffix).then(|| {
        format!(
            "the file name says {suffix}, and the JSON beside it says {found}; the name counts. \
             Correct the name, or ScanningSequence, EchoTime, RepetitionTime, InversionTime, \
             SeriesDescription or ContrastBolusIngredient in the JSON"
        )
    })
}

fn left_open(Undecided { rule, missing }: Undecided, facts: &AcquisitionFacts) -> String {
    let source =
        if facts.has_json { "the JSON beside it does not say" } else { "no JSON was read" };
    format!(
        "the cohort rule {rule} does not take the scan: its {} is not known ({source})",
        missing.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doubt(stem: &str, cohort: &str, json: Option<&str>) -> String {
        let mut facts = AcquisitionFacts::of(stem, [1.0; 3]);
        let read = json.map(|json| bids::read_facts(json.as_bytes(), &mut facts).unwrap());
        let sequence = read.map(|read| read.sequence);
        let cohort = CohortKey { name: cohort.to_owned(), method: String::new() };
        doubt_about_kind(stem, facts.suffix.as_deref(), &cohort, sequence.as_ref())
            .unwrap_or_default()
    }

    #[test]
    fn a_scan_of_unknown_kind_says_why_and_what_to_set() {
        let mprage = r#"{"ScanningSequence": "GR\\IR", "EchoTime": 0.003, "RepetitionTime": 2.3,
            "InversionTime": 0.9, "SeriesDescription": "t1 pre", "ContrastBolusIngredient": "Gd"}"#;
        let text = doubt("3_t1_pre_unknown", "unknown", Some(mprage));
        assert!(
            text.contains("about a contrast agent") && text.contains("[[cohort]] rule"),
            "{text}"
        );
        let text = doubt("scan", "unknown", Some(&mprage.replace("t1 pre", "t1")));
        assert!(text.contains("says T1ce, but only the file name counts"), "{text}");
        let text = doubt("sub-1_inv-1_T1w", "unknown", None);
        assert!(text.contains("(inv-). End the file name"), "{text}");

        for (stem, cohort, json) in [
            ("scan", "unknown", None),
            ("scan", "own", Some(mprage)),
            ("sub-1_T1w", "t1w", Some(mprage)),
            ("sub-1_T1w", "t1w", None),
        ] {
            assert_eq!(doubt(stem, cohort, json), "", "{stem}");
        }
    }

    #[test]
    fn a_name_that_the_json_contradicts_counts_and_the_scan_says_so() {
        let t2 = r#"{"ScanningSequence": "SE", "EchoTime": 0.1, "RepetitionTime": 5}"#;
        let text = doubt("sub-1_T1w", "t1w-thick", Some(t2));
        assert!(
            text.starts_with("the file name says T1w, and the JSON beside it says T2w"),
            "{text}"
        );
        assert_eq!(doubt("sub-1_T2w", "t2w", Some(t2)), "");
        assert_eq!(doubt("sub-1_T1w", "own", Some(t2)), "", "a rule decided");
        assert_eq!(doubt("sub-1_T2map", "t2map", Some(t2)), "");
    }

    #[test]
    fn phase_images_are_refused_by_name_or_json_with_what_to_do() {
        let check = |name: &str, json: Option<&str>| {
            let json = json.map(|json| Ok(json.as_bytes().to_vec()));
            must_be_magnitude(Path::new(name), json.as_ref())
        };
        let phase = r#"{"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}"#;
        let by_name = check("swi_e1_ph.nii.gz", None).unwrap_err();
        assert_eq!(by_name.found, "the phase of a complex image, by its name");
        assert_eq!(by_name.reason, QuarantineReason::Unsupported);
        assert!(check("sub-1_T1w.nii", Some(phase)).unwrap_err().found.contains("ImageType"));
        for json in [None, Some("{"), Some(r#"{"ImageType": ["ORIGINAL", "PRIMARY", "M"]}"#)] {
            assert_eq!(check("sub-1_part-mag_T1w.nii", json), Ok(()));
        }
    }
}
