//! From a scored window to the result files of one scan.

use serde_json::json;
use sha2::{Digest, Sha256};

use super::{
    alignment::alignment_files,
    steps::{self, Source, WindowScores},
};
use crate::{
    config::{Config, ResultSettings},
    domain::{
        cohort::{UNKNOWN, modality_of},
        error::ScanError,
        finding::{Finding, SharedAnomaly, WindowIdentity},
        scan::{BrainSource, EncodedFacts, ScanId, ScanRecord},
    },
    engine::Method,
    nifti,
    numeric::scoring,
    report::{
        AlignmentFiles, EncoderFacts, IntensityFacts, MethodFacts, QualityFacts, RESEARCH_USE_ONLY,
        ResultSet, SCHEMA, Scores, Sidecar, Standing, ThresholdFacts, WindowFacts,
        picture::{self, PictureInput},
    },
};

/// Everything that a result of one member of a window is made from.
pub struct ReportInput<'a> {
    /// Journal entry of the scan.
    pub record: &'a ScanRecord,
    /// The scan, read again.
    pub source: &'a Source,
    /// Scores of all members, in the order of the window's members.
    pub scores: &'a WindowScores,
    /// Position of this scan among them.
    pub index: usize,
    /// The window.
    pub window: &'a WindowIdentity,
    /// What is computed.
    pub method: &'a Method,
    /// The settings.
    pub config: &'a Config,
}

/// Below this many other scans a percentile or threshold says little; the method wants about 30.
const FEW_SCANS: usize = 30;

/// Map, mask, picture and sidecar, and the finding that they show.
pub fn build_results(input: &ReportInput<'_>) -> Result<(ResultSet, Finding), ScanError> {
    let ReportInput { record, source, method, config, .. } = input;
    let WindowScores { shared, .. } = input.scores;
    let finding = steps::finding(source, input.scores, input.index, method, &config.scoring)?;
    // Packing the map takes as long as all the rest.
    let (map_nii_gz, (mask_nii_gz, picture_png)) = rayon::join(
        || nifti::encode_map(&source.grid, &finding.map),
        || {
            (
                nifti::encode_mask(&source.grid, &finding.mask, "anomaly mask"),
                picture(input, &finding),
            )
        },
    );
    let mut sidecar = Sidecar {
        standing: Standing::Scored,
        scores: Some(Scores {
            max: finding.score_max,
            top1_mean: finding.score_top1_mean,
            percentile: finding.percentile,
            shift: finding.shift,
            n_cells: finding.n_cells,
            n_unmatched_cells: finding.n_unmatched_cells,
        }),
        threshold: Some(ThresholdFacts {
            value: finding.threshold.is_finite().then_some(finding.threshold),
            false_positive_fraction: config.scoring.false_positives.get(),
            min_cluster_mm3: config.scoring.min_cluster_mm3,
            chosen_by: "median and quartiles of this map, reach of the tail in the other scans"
                .to_owned(),
        }),
        clusters: finding.clusters.clone(),
        ..sidecar(record, input.window, method, config)
    };
    sidecar.window.heterogeneity = scoring::heterogeneity(&input.scores.references());
    sidecar.window.shared_anomalies.clone_from(shared);
    sidecar.warnings.extend(window_warnings(input, &finding));
    sidecar.warnings.extend(shared_warning(record.id, shared));
    let (brain_nii_gz, alignment) = optional_files(input);
    let results =
        ResultSet { map_nii_gz, mask_nii_gz, picture_png, brain_nii_gz, alignment, sidecar };
    Ok((results, finding))
}

/// What `[results]` asks for: the brain mask, and the files of the alignment.
fn optional_files(input: &ReportInput<'_>) -> (Option<Vec<u8>>, Option<AlignmentFiles>) {
    let ReportInput { record, source, method, config, .. } = input;
    let wanted = config.results;
    let brain = || nifti::encode_mask(&source.grid, &source.brain.inside, "brain mask");
    let template = method.template.as_ref().filter(|_| wanted.alignment);
    let alignment = template.and_then(|template| alignment_files(record, source, template));
    (wanted.brain_mask.then(brain), alignment)
}

fn picture(input: &ReportInput<'_>, finding: &Finding) -> Vec<u8> {
    let ReportInput { record, source, scores, index, .. } = input;
    let others = scores.others(*index);
    let own = scores.scans[*index].top1_mean;
    picture::render(&PictureInput {
        scan: &source.raw,
        brain: &source.brain,
        map: &finding.map,
        mask: &finding.mask,
        threshold: finding.threshold,
        focus: finding.clusters.first().map(|largest| largest.peak_world_mm),
        top: others.iter().map(|other| other.top1_mean).fold(own, f32::max),
        title: &format!("{}   ({})", record.output_stem, record.cohort.label()),
        summary: &summary(finding, others.len()),
        quality: &quality(record),
    })
}

/// What the scan is like, in a line for the picture.
fn quality(record: &ScanRecord) -> String {
    let encoded = record.encoded.clone().unwrap_or_default();
    let mut parts = vec![
        format!("brain {:.0} ml", encoded.brain_ml),
        format!("{:.1} % outside the field of view", 100.0 * encoded.cut_fraction),
        format!("{} tokens", encoded.n_tokens),
    ];
    parts.extend(encoded.noise.map(|noise| format!("noise {noise:.3} of the contrast")));
    let fit = record.alignment.and_then(|found| found.distinctness);
    parts.extend(fit.map(|found| format!("alignment distinctness {found:.2}")));
    parts.join("   ")
}

/// The sidecar of a scan whose window is not full enough; also the frame of every other.
pub(super) fn sidecar(
    record: &ScanRecord,
    window: &WindowIdentity,
    method: &Method,
    config: &Config,
) -> Sidecar {
    let encoded = record.encoded.clone().unwrap_or_default();
    Sidecar {
        schema: SCHEMA.to_owned(),
        notice: RESEARCH_USE_ONLY.to_owned(),
        oddscan_version: env!("CARGO_PKG_VERSION").to_owned(),
        standing: Standing::WaitingForScans {
            have: window.n_patients(),
            need: config.window.min_scans,
        },
        source_name: record.source_name.clone(),
        came_from: record.came_from.clone(),
        scan_id: record.id,
        modality: modality_of(&steps::stem_of(record.source_name.as_ref())),
        cohort: record.cohort.name.clone(),
        acquisition: record.acquisition.clone(),
        revision: record.reported.as_ref().map_or(0, |reported| reported.revision) + 1,
        scores: None,
        threshold: None,
        clusters: Vec::new(),
        brain_ml: encoded.brain_ml,
        brain_mask: record.brain.clone(),
        quality: Some(QualityFacts {
            noise: encoded.noise,
            cut_fraction: encoded.cut_fraction,
            is_reference: config.quality.allow(record),
        }),
        intensity: Some(intensity_facts(record, &encoded, method)),
        alignment: record.alignment,
        preprocess: record.preprocess.clone(),
        window: WindowFacts {
            id: window.id.clone(),
            size: window.members.len(),
            heterogeneity: None,
            set_aside: window.set_aside.clone(),
            same_patient: window.same_patient.clone(),
            few_patients: window.few_patients,
            shared_anomalies: Vec::new(),
            members: window.members.clone(),
        },
        method: MethodFacts {
            fingerprint: method.fingerprint.clone(),
            template_sha256: method.template_sha256.clone(),
            brain_network_sha256: brain_network_sha256(record, method),
            settings: json!({
                "preset": config.tree.get("preset"),
                "window": { "compare_same_patient": config.window.compare_same_patient },
                "preprocess": config.tree.get("preprocess"),
                "alignment": config.tree.get("alignment"),
                "volume": config.tree.get("volume"),
                "intensity": config.tree.get("intensity"),
                "quality": config.tree.get("quality"),
                "encoder": config.tree.get("encoder"),
                "tokens": config.tree.get("tokens"),
                "scoring": config.tree.get("scoring"),
                "community": config.tree.get("community"),
            }),
        },
        encoder: EncoderFacts {
            model: method.model.clone(),
            weights_sha256: method.weights_sha256.clone(),
            layers: method.layers.clone(),
            device: method.device.clone(),
            precision: method.precision.clone(),
        },
        warnings: scan_warnings(record, &encoded, window, method, config),
        timings_secs: encoded.timings_secs,
        files: None,
    }
}

/// The weights of the networks that found the brain, if they did.
fn brain_network_sha256(record: &ScanRecord, method: &Method) -> Option<String> {
    let brain = record.brain.as_ref().filter(|brain| brain.from == BrainSource::Network);
    brain.and(method.brain_network.as_ref()).map(|network| network.sha256.clone())
}

fn intensity_facts(record: &ScanRecord, encoded: &EncodedFacts, method: &Method) -> IntensityFacts {
    let set = method.landmarks.as_ref().filter(|_| encoded.is_standardised);
    let learnt = set.and_then(|set| Some((set, set.learnt(&record.cohort.name)?)));
    learnt.map_or(IntensityFacts::Plain, |(set, learnt)| IntensityFacts::Nyul {
        landmarks_sha256: set.digest().to_owned(),
        n_scans: learnt.n_scans,
        learnt_from_this_scan: learnt.scans.contains(&record.id),
    })
}

/// Why a scan was not standardised though that was asked for.
fn not_standardised(
    record: &ScanRecord,
    encoded: &EncodedFacts,
    method: &Method,
) -> Option<String> {
    let cohort = &record.cohort.name;
    let set = method.landmarks.as_ref().filter(|_| !encoded.is_standardised)?;
    let why = match set.learnt(cohort) {
        None => format!("there are no landmarks for the cohort {cohort}"),
        Some(_) => "it has too few distinct ones".to_owned(),
    };
    Some(format!("intensities are not standardised, {why}; they are divided by their white level"))
}

/// Results with the same key are the same: the window's members and which of them are references,
/// the method of their tokens, the settings of the scoring, and the files that are asked for.
pub(super) fn result_key(window: &WindowIdentity, config: &Config) -> String {
    let mut shaping = json!({
        "window": window.id,
        "method": window.cohort.method,
        "scoring": config.scoring_for_key(),
        "community": config.tree.get("community"),
    });
    // Only where there are any, so that results from before there were stay as they are.
    if !window.set_aside.is_empty() {
        shaping["set_aside"] = json!(window.set_aside);
    }
    if !window.same_patient.is_empty() {
        shaping["same_patient"] = json!(window.same_patient);
    }
    if window.few_patients {
        shaping["few_patients"] = json!(true);
    }
    if config.results != ResultSettings::default() {
        shaping["results"] = json!(config.tree.get("results"));
    }
    hex::encode(&Sha256::digest(shaping.to_string())[..8])
}

fn summary(finding: &Finding, n_others: usize) -> String {
    let n_lower = (finding.percentile * n_others as f64).round();
    format!(
        "score {:.3}, higher than {n_lower} of {n_others} other scans; mask {:.1} ml in {} region{}",
        finding.score_top1_mean,
        finding.mask_ml(),
        finding.clusters.len(),
        if finding.clusters.len() == 1 { "" } else { "s" },
    )
}

/// Above this [`scoring::heterogeneity`] a window mixes sources: measured 1.05 for one scanner.
pub const MIXED: f64 = 1.15;

/// Above this [`scoring::shift`] a scan is unlike its cohort: docs/quality.md has the measurement.
pub(super) const SHIFTED: f64 = 1.15;

/// What a scored window adds to the warnings of a scan.
fn window_warnings(input: &ReportInput<'_>, finding: &Finding) -> Vec<String> {
    let references = input.scores.references();
    let n_others = input.scores.others(input.index).len();
    let n_patients = input.window.n_patients().min(n_others + 1);
    let mut warnings = Vec::new();
    if let Some(mixed) = scoring::heterogeneity(&references).filter(|&ratio| ratio > MIXED) {
        warnings.push(format!(
            "the window mixes scans that differ as a whole ({mixed:.2} between the 90th and 10th \
             percentile of their median scores, {MIXED} is the limit): several scanners or \
             protocols? Compare within one source; percentiles say little here"
        ));
    }
    if let Some(shift) = finding.shift.filter(|&shift| shift > SHIFTED) {
        warnings.push(format!(
            "the scan looks unlike its cohort {}: as a whole it lies {shift:.2} times as far from the \
             others as they from each other ({SHIFTED} is the limit). Check sequence, scanner and \
             preprocessing, or write a [[cohort]] rule; its map shows the difference too",
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
            "{} of {} cells have no counterpart in reach in any other scan; is the scan aligned?",
            finding.n_unmatched_cells, finding.n_cells
        ));
    }
    warnings
}

/// Names the scans that share an anomaly with this one, at whatever layer and view.
fn shared_warning(own_id: ScanId, shared: &[SharedAnomaly]) -> Option<String> {
    let own: Vec<&SharedAnomaly> =
        shared.iter().filter(|anomaly| anomaly.members.contains(&own_id)).collect();
    let mut others: Vec<ScanId> =
        own.iter().flat_map(|anomaly| &anomaly.members).copied().collect();
    others.retain(|&member| member != own_id);
    others.sort_unstable();
    others.dedup();
    let is_filtered = own.iter().any(|anomaly| anomaly.n_excluded > 0);
    let kept = if is_filtered { "which no longer hide it" } else { "as whole scans" };
    let others: Vec<String> = others.iter().map(ScanId::short).collect();
    (!others.is_empty())
        .then(|| format!("the scan shares something unusual with {}, {kept}", others.join(", ")))
}

fn scan_warnings(
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
            "the window holds {scans} of the same patient (window.same_patient): they are not compared \
             with this one, and count once with it (window.compare_same_patient)"
        ));
    }
    if window.few_patients {
        warnings.push(
            "the window is full with scans of too few patients (by sub-<label> or PatientID), which are \
             compared with each other all the same and may hide what they share"
                .to_owned(),
        );
    }
    warnings.extend(record.notes.iter().cloned());
    if record.cohort.name == UNKNOWN {
        warnings.push(
            "the file name ends in no known BIDS suffix and no [[cohort]] rule takes the scan; it is \
             compared with others of which nothing is known either"
                .to_owned(),
        );
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

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
            format!("the scan shares something unusual with {names}, which no longer hide it")
        );
        assert_eq!(shared_warning(id(5), &shared), None);
    }
}
