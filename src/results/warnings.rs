//! What a reader should know before trusting a result.

use super::input::ResultInput;
use crate::{
    config::Config,
    domain::{
        cohort::UNKNOWN,
        finding::Finding,
        quality::{coverage_of_part, noise_is_unmeasured},
        scan::{EncodedFacts, ScanId, ScanRecord},
        window::WindowIdentity,
        window_scores::SharedAnomaly,
    },
    engine::Method,
    numeric::{preprocess::CubeSettings, scoring},
};

/// With fewer patients or scans, a percentile or threshold says little; the method needs about 30.
const FEW_SCANS: usize = 30;

/// Above this [`scoring::heterogeneity`] a window mixes sources. One scanner had 1.05.
pub const MIXED: f64 = 1.15;

/// Above this [`scoring::shift`] a scan is unlike its cohort. docs/quality.md has the measurement.
pub(crate) const SHIFTED: f64 = 1.15;

/// With a larger share of the brain in cells that the scanner's field of view cuts, there is a
/// warning. Where the MNI grid cuts the brain stem, they hold at most 0.24 %.
const MAX_CUT_SHARE: f64 = 0.01;

/// The warnings that need a scored window.
pub(super) fn window_warnings(input: &ResultInput<'_>, finding: &Finding) -> Vec<String> {
    let references = input.scores.references();
    let n_others = input.scores.others(input.index).len();
    let n_patients = input.window.n_patients().min(n_others + 1);
    let mut warnings = Vec::new();

    if finding.percentile.is_none() {
        let (found, needed) = (input.window.n_patients(), input.config.window.min_scans);
        let what = if input.window.same_patient.is_empty() { "scans" } else { "patients" };
        warnings.push(format!(
            "the window holds {found} {what} to compare with, and window.min_scans asks for {needed}; it \
             was scored because of --force. So there is no percentile. Score, map and mask say little \
             here. Add scans"
        ));
    }

    if let Some(mixed) = scoring::heterogeneity(&references).filter(|&ratio| ratio > MIXED) {
        warnings.push(format!(
            "the window mixes scans that differ as a whole: the ratio of the 90th to the 10th \
             percentile of their median scores is {mixed:.2}, the limit is {MIXED}. Are there \
             several scanners or protocols? Compare within one source; percentiles say little here"
        ));
    }

    if let Some(shift) = finding.shift.filter(|&shift| shift > SHIFTED) {
        warnings.push(format!(
            "the scan looks unlike its cohort {}: its distance to the others is {shift:.2} times their \
             distance to each other (the limit is {SHIFTED}). Check sequence, scanner and \
             preprocessing, or write a [[cohort]] rule. The map shows the difference, too",
            input.record.cohort.label()
        ));
    }

    if n_patients < FEW_SCANS {
        let are_told_apart = !input.window.same_patient.is_empty();
        let what = if are_told_apart { "patients" } else { "scans" };
        warnings.push(format!(
            "the window holds {n_patients} {what}; scores become reliable from about {FEW_SCANS}"
        ));
    }

    if finding.n_unmatched_cells * 100 > finding.n_cells {
        warnings.push(format!(
            "{} of {} cells have no counterpart within reach in any other scan; is the scan aligned?",
            finding.n_unmatched_cells, finding.n_cells
        ));
    }
    warnings
}

/// Names the scans that only their tokens show to be of the same person.
pub(super) fn follow_up_warning(input: &ResultInput<'_>) -> Option<String> {
    let ResultInput { scores, index, config, .. } = input;
    let (positions, others): (Vec<usize>, Vec<ScanId>) = scores.follow_ups.of(*index).unzip();
    let has_patient = |position: usize| scores.memberships[position].patient.is_some();
    let names_differ = has_patient(*index) && positions.into_iter().any(has_patient);
    follow_up_text(&others, config.scoring.follow_up_ratio, names_differ)
}

/// `names_differ` says that the scans are of different patients by their names or headers.
fn follow_up_text(others: &[ScanId], ratio: f64, names_differ: bool) -> Option<String> {
    if others.is_empty() {
        return None;
    }
    let others: Vec<String> = others.iter().map(ScanId::short).collect();
    let cause = if names_differ {
        "Their names or headers state different patients: has a number been mixed up? "
    } else {
        ""
    };
    Some(format!(
        "the tokens of this scan and of {} are nearer to each other than {ratio} of the usual distance \
         in the window (scoring.follow_up_ratio). They are taken for scans of one person, and are not \
         compared with each other. {cause}If they are of one person, name them sub-<label> alike. If \
         they are of different people, set scoring.follow_up_ratio = 0",
        others.join(", ")
    ))
}

/// Names the scans that share an anomaly with this one, over all layers and views.
pub(super) fn shared_warning(own_id: ScanId, shared: &[SharedAnomaly]) -> Option<String> {
    let own: Vec<&SharedAnomaly> =
        shared.iter().filter(|anomaly| anomaly.members.contains(&own_id)).collect();

    let mut others: Vec<ScanId> =
        own.iter().flat_map(|anomaly| &anomaly.members).copied().collect();
    others.retain(|&member| member != own_id);
    others.sort_unstable();
    others.dedup();

    let is_filtered = own.iter().any(|anomaly| anomaly.n_excluded > 0);
    let effect = if is_filtered {
        "that part is left out of the comparison"
    } else {
        "they differ from the others as whole scans"
    };
    let others: Vec<String> = others.iter().map(ScanId::short).collect();
    (!others.is_empty())
        .then(|| format!("the scan shares something unusual with {}; {effect}", others.join(", ")))
}

/// The warnings that need no scored window.
pub(super) fn scan_warnings(
    record: &ScanRecord,
    encoded: &EncodedFacts,
    window: &WindowIdentity,
    method: &Method,
    config: &Config,
) -> Vec<String> {
    let not_good_enough =
        |fault| format!("{fault}: the scan is scored, but others are not compared with it");
    let mut warnings: Vec<String> =
        config.quality.faults(record).into_iter().map(not_good_enough).collect();

    if warnings.is_empty() && window.set_aside.contains(&record.id) {
        warnings.push(
            "a later scan of the same series has more slices: use that one. Others are not \
             compared with this scan"
                .to_owned(),
        );
    }
    if noise_is_unmeasured(record) {
        warnings.push(
            "the noise in the brain could not be measured: the brain is too small, or it has no \
             contrast. quality.max_noise says nothing about this scan; look at it"
                .to_owned(),
        );
    }
    warnings.extend(shows_part(record, config.quality.min_coverage));
    if is_cut(encoded, method) {
        warnings.push(format!(
            "the scanner's field of view cuts the brain: {} cells at its end are not scored, and map and \
             mask are empty there",
            encoded.n_cut_cells
        ));
    }

    if encoded.cut_fraction > 0.01 {
        warnings.push(format!(
            "{:.1} % of the brain lies outside the field of view (volume.field_of_view_mm)",
            100.0 * encoded.cut_fraction
        ));
    }

    warnings.extend(not_standardised(record, encoded, method));
    let n_own = window.of_same_patient(record.id).count();
    if n_own > 0 {
        let scans = if n_own == 1 { "another scan" } else { "other scans" };
        warnings.push(format!(
            "the window holds {scans} of the same patient (window.same_patient). All scans of a \
             patient count as one and are not compared with each other (window.compare_same_patient)"
        ));
    }

    if window.few_patients {
        warnings.push(
            "the window is full with scans of too few patients (by sub-<label> or PatientID). Scans of \
             one patient are compared with each other here, which may hide what they share"
                .to_owned(),
        );
    }

    warnings.extend(record.notes.iter().cloned());
    if record.cohort.name == UNKNOWN {
        warnings.push(
            "the file name ends in no known BIDS suffix and no [[cohort]] rule takes the scan; it is \
             compared with other scans of unknown kind"
                .to_owned(),
        );
    }
    warnings
}

/// Whether a reader should know that the scanner's field of view cuts the brain: by the volume of
/// the cells that are not scored because of that, as a share of the brain.
pub(super) fn is_cut(encoded: &EncodedFacts, method: &Method) -> bool {
    let CubeSettings { side, field_of_view_mm, .. } = method.cube;
    let cell_mm = field_of_view_mm / side as f64 * method.patch as f64;
    let cut_ml = encoded.n_cut_cells as f64 * cell_mm.powi(3) / 1000.0;
    cut_ml > MAX_CUT_SHARE * encoded.brain_ml
}

/// Says that a scan shows a part of a head. Below `min_coverage` another warning says so.
fn shows_part(record: &ScanRecord, min_coverage: f64) -> Option<String> {
    let coverage = coverage_of_part(record).filter(|&coverage| coverage >= min_coverage)?;
    Some(format!(
        "the scan shows a part of the head: {:.1} % of the template's brain lies within the scanner's \
         field of view. Have all slices arrived? Score and percentile hold for that part only",
        100.0 * coverage
    ))
}

/// Why a scan was not standardised although the settings ask for it.
fn not_standardised(
    record: &ScanRecord,
    encoded: &EncodedFacts,
    method: &Method,
) -> Option<String> {
    let cohort = &record.cohort.name;
    let set = method.landmarks.as_ref().filter(|_| !encoded.is_standardised)?;
    let why = match set.learnt(cohort) {
        None => format!("because the cohort {cohort} has no landmarks"),
        Some(_) => "because they have too few distinct values".to_owned(),
    };
    Some(format!(
        "intensities are not standardised {why}; they are divided by the level of white matter"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{cohort::CohortKey, scan::AlignmentFacts};

    #[test]
    fn a_hidden_follow_up_scan_is_named_with_what_to_do() {
        let others = [2, 3].map(|n| ScanId([n; 32]));
        let text = follow_up_text(&others, 0.6, false).unwrap();
        let names = others.map(|id| id.short()).join(", ");
        assert!(text.contains(&format!("of {names} are nearer to each other than 0.6")), "{text}");
        assert!(text.contains("sub-<label>") && !text.contains("mixed up"), "{text}");
        assert!(follow_up_text(&others, 0.6, true).unwrap().contains("different patients"));
        assert_eq!(follow_up_text(&[], 0.6, true), None);
    }

    #[test]
    fn everyone_who_shares_something_at_any_view_is_named_once() {
        let id = |n: u8| ScanId([n; 32]);
        let anomaly = |members: &[u8], n_excluded| SharedAnomaly {
            layer: 9,
            members: members.iter().map(|&n| id(n)).collect(),
            n_excluded,
        };
        let shared = [anomaly(&[1, 3, 4], 0), anomaly(&[2, 1, 4], 5), anomaly(&[7, 8, 9], 5)];
        let text = shared_warning(id(1), &shared).unwrap();
        let names = [2, 3, 4].map(|n| id(n).short()).join(", ");
        assert_eq!(
            text,
            format!(
                "the scan shares something unusual with {names}; that part is left out of the \
                 comparison"
            )
        );
        assert_eq!(shared_warning(id(5), &shared), None);
    }

    #[test]
    fn a_part_of_a_head_says_so_with_the_share_of_the_brain() {
        let cohort = CohortKey { name: "t1w".into(), method: "m".into() };
        let record = |coverage| ScanRecord {
            alignment: Some(AlignmentFacts {
                template_to_scan: [[0.0; 4]; 3],
                explained: 0.5,
                distinctness: Some(0.5),
                coverage,
                brain_extracted: true,
            }),
            ..ScanRecord::new(ScanId([1; 32]), cohort.clone())
        };
        let text = shows_part(&record(0.943), 0.9).unwrap();
        assert!(text.contains("94.3 % of the template's brain"), "{text}");
        assert_eq!(shows_part(&record(0.97), 0.9), None);
        assert_eq!(shows_part(&record(0.85), 0.9), None, "the limit of [quality] says it");
    }
}
