//! From a scored window to the result files of one scan, for the daemon and `oddscan score`.

mod input;
mod warnings;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{
    companions,
    config::{Config, ResultSettings},
    domain::{
        cohort::modality_of,
        error::ScanError,
        finding::{Finding, Place, finding, parts_of_map},
        identity::{IdentityChoice, Pseudonyms},
        quality::coverage_of_part,
        scan::{BrainSource, EncodedFacts, Reported, ScanRecord},
        time::utc,
        window::WindowIdentity,
        window_scores::{MAX_BRIGHT_THRESHOLD, WindowScores},
    },
    engine::Method,
    nifti,
    numeric::{
        brain,
        fusion::FusedMap,
        mask::GridPlacement,
        registration::Template,
        scoring::{self, MapProfile},
    },
    report::{
        AlignmentFiles, AlignmentPicture, EncoderFacts, IntensityFacts, MethodFacts, QualityFacts,
        RESEARCH_USE_ONLY, ResultSet, SCHEMA, Scores, Sidecar, Standing, ThresholdFacts,
        WindowFacts, alignment_picture, itk_transform,
        picture::{self, PictureInput},
    },
};
use warnings::{follow_up_warning, is_cut, scan_warnings, shared_warning, window_warnings};

pub use input::ResultInput;
pub use warnings::MIXED;
pub(crate) use warnings::SHIFTED;

/// Builds map, mask, picture and sidecar of one scan, with the finding that they show.
pub fn build_results(input: &ResultInput<'_>) -> Result<(ResultSet, Finding), ScanError> {
    let ResultInput { record, source, method, config, .. } = input;
    let WindowScores { shared, .. } = input.scores;
    let fused = fused_map(input)?;
    let place = place(input)?;
    let finding = finding_of(input, &place, fused.as_ref());
    let parts = fused.as_ref().filter(|_| config.results.parts);
    let parts = parts.map(|fused| parts_of_map(&place, fused).concat());

    // Compressing the map takes as long as everything else together.
    let (map_nii_gz, (mask_nii_gz, picture_png)) = rayon::join(
        || nifti::encode_map(&source.grid, &finding.map),
        || {
            (
                nifti::encode_mask(&source.grid, &finding.mask, "anomaly mask"),
                picture(input, &finding),
            )
        },
    );

    let is_bright = input.scores.is_bright(input.index);
    let mut sidecar = Sidecar {
        standing: Standing::Scored,
        scores: Some(Scores {
            max: finding.score_max,
            top1_mean: finding.score_top1_mean,
            percentile: finding.percentile,
            shift: finding.shift,
            n_cells: finding.n_cells,
            n_unmatched_cells: finding.n_unmatched_cells,
            excess: finding.tail.map(|tail| tail.excess),
            tail_probability: finding.tail.map(|tail| tail.probability),
            least_tail_probability: finding.tail.map(|tail| tail.least_probability),
            stands_out: finding.tail.and_then(|tail| tail.stands_out),
            usual_volume_ml: finding.tail.map(|tail| tail.usual_volume_ml),
        }),
        threshold: Some(ThresholdFacts {
            value: finding.threshold.is_finite().then_some(finding.threshold),
            false_positive_fraction: config.scoring.false_positives.get(),
            min_cluster_mm3: config.scoring.smallest_cluster_mm3(is_bright),
            chosen_by: threshold_rule(is_bright),
        }),
        clusters: finding.clusters.clone(),
        scored_at: Some(utc(input.now_secs)),
        ..sidecar(record, input.window, method, config, input.pseudonyms)
    };

    sidecar.window.heterogeneity = scoring::heterogeneity(&input.scores.references());
    sidecar.window.shared_anomalies.clone_from(shared);
    sidecar.window.hidden_follow_ups.clone_from(&input.scores.follow_ups.groups);
    sidecar.warnings.extend(window_warnings(input, &finding));
    sidecar.warnings.extend(follow_up_warning(input));
    sidecar.warnings.extend(shared_warning(record.id, shared));

    let OptionalFiles { brain_nii_gz, scan_nii_gz, alignment } = optional_files(input);
    let parts_nii_gz = parts.map(|parts| nifti::encode_parts(&source.grid, &parts));
    let results = ResultSet {
        map_nii_gz,
        mask_nii_gz,
        picture_png,
        brain_nii_gz,
        parts_nii_gz,
        scan_nii_gz,
        alignment,
        sidecar,
    };
    Ok((results, finding))
}

/// How the threshold of a map was chosen, in words.
fn threshold_rule(is_bright: bool) -> String {
    let rule = "median and quartiles of this map, reach of the tail in the other scans";
    if !is_bright {
        return rule.to_owned();
    }
    format!("{rule}, and at most {MAX_BRIGHT_THRESHOLD} quartile distances above the median")
}

/// The map of tokens and intensities; `None` if the map is that of tokens alone.
fn fused_map(input: &ResultInput<'_>) -> Result<Option<FusedMap>, ScanError> {
    let ResultInput { scores, index, fines, .. } = input;
    let evidence = scores.evidence.as_ref();
    evidence.map(|found| found.map(*index, &scores.scans[*index], *fines)).transpose()
}

fn place<'a>(input: &ResultInput<'a>) -> Result<Place<'a>, ScanError> {
    let ResultInput { source, method, .. } = input;
    let placement = GridPlacement { cube_side: method.cube.side, cube: source.cube(method)? };
    Ok(Place { scan: &source.raw, brain: &source.brain, placement })
}

fn finding_of(input: &ResultInput<'_>, place: &Place<'_>, fused: Option<&FusedMap>) -> Finding {
    let found = finding(place, input.scores, input.index, fused, &input.config.scoring);
    let percentile = found.percentile.filter(|_| !is_forced(input));
    Finding { percentile, ..found }
}

/// Whether the window is scored although it has fewer patients than the settings ask for.
fn is_forced(input: &ResultInput<'_>) -> bool {
    input.window.n_patients() < input.config.window.min_scans
}

/// Files that only some sites want.
struct OptionalFiles {
    brain_nii_gz: Option<Vec<u8>>,
    scan_nii_gz: Option<Vec<u8>>,
    alignment: Option<AlignmentFiles>,
}

/// The files that `[results]` asks for: brain mask, converted volume and alignment.
fn optional_files(input: &ResultInput<'_>) -> OptionalFiles {
    let ResultInput { record, source, method, config, .. } = input;
    let wanted = config.results;
    let brain = || nifti::encode_mask(&source.grid, &source.brain.inside, "brain mask");
    let scan = || nifti::encode_scan(&source.grid, &source.raw.voxels);
    let template = method.template.as_ref().filter(|_| wanted.alignment);
    OptionalFiles {
        brain_nii_gz: wanted.brain_mask.then(brain),
        // A scan that came as NIfTI has a file already.
        scan_nii_gz: (wanted.keep_nifti && record.dicom.is_some()).then(scan),
        alignment: template.and_then(|template| alignment_files(input, template)),
    }
}

/// Picture and transform of an aligned scan.
fn alignment_files(input: &ResultInput<'_>, template: &Template) -> Option<AlignmentFiles> {
    let ResultInput { record, source, pseudonyms, .. } = input;
    let found = source.alignment.as_ref()?;
    let facts = record.alignment?;
    let within =
        format!("{:.0} % of the template's brain lie within the scan", 100.0 * facts.coverage);
    let line = match facts.distinctness {
        Some(distinctness) => format!("distinctness of the alignment {distinctness:.2}; {within}"),
        None => within,
    };

    let carried =
        brain::carried(template.brain(), &found.to_scan, source.raw.shape, &source.raw.affine);
    let picture_png = alignment_picture(&AlignmentPicture {
        scan: &source.raw,
        brain: Some(&source.brain.inside),
        template: Some(&carried),
        title: &title(record, pseudonyms),
        line: &line,
    });
    Some(AlignmentFiles { picture_png, transform_tfm: itk_transform(&found.to_scan).into_bytes() })
}

fn picture(input: &ResultInput<'_>, finding: &Finding) -> Vec<u8> {
    let ResultInput { record, source, scores, index, .. } = input;
    let n_others = scores.others(*index).len();
    picture::render(&PictureInput {
        scan: &source.raw,
        brain: &source.brain,
        map: &finding.map,
        mask: &finding.mask,
        threshold: finding.threshold,
        focus: finding.clusters.first().map(|largest| largest.peak_world_mm),
        top: top_of_colours(scores, *index),
        scale: match scores.evidence {
            Some(_) => "anomaly score (tokens, brightness and range)",
            None => "anomaly score (distance to the closest matches)",
        },
        title: &title(record, input.pseudonyms),
        summary: &summary(finding, n_others),
        quality: &quality(record, input.method),
    })
}

fn title(record: &ScanRecord, pseudonyms: &Pseudonyms) -> String {
    format!("{}   ({})", pseudonyms.stem(record), record.cohort.label())
}

/// The map value at the upper end of the colours. In maps with intensities it lies as many spreads
/// above the median in all scans, and in maps of tokens alone it is the highest of the window.
fn top_of_colours(scores: &WindowScores, index: usize) -> f32 {
    const SPREADS: f64 = 5.0;
    if scores.evidence.is_some() {
        let MapProfile { median, spread, .. } = scores.profiles[index];
        return (median + SPREADS * spread) as f32;
    }
    let others = scores.others(index);
    others.iter().map(|other| other.top1_mean).fold(scores.scans[index].top1_mean, f32::max)
}

/// The quality of the scan as a line for the picture.
fn quality(record: &ScanRecord, method: &Method) -> String {
    let encoded = record.encoded.clone().unwrap_or_default();
    // What a reader must not miss comes first: a long line ends at the edge of the picture.
    let mut parts: Vec<String> =
        cut_by_scanner(record, is_cut(&encoded, method)).into_iter().collect();
    parts.extend([
        format!("brain {:.0} ml", encoded.brain_ml),
        format!("{:.1} % outside the field of view", 100.0 * encoded.cut_fraction),
        format!("{} tokens", encoded.n_tokens),
    ]);
    parts.extend(encoded.noise.map(|noise| format!("noise {noise:.3} of the contrast")));
    let fit = record.alignment.and_then(|found| found.distinctness);
    parts.extend(fit.map(|found| format!("alignment distinctness {found:.2}")));
    parts.join("   ")
}

/// What the picture says of a head that does not lie within the scanner's field of view.
fn cut_by_scanner(record: &ScanRecord, is_cut: bool) -> Option<String> {
    let part = coverage_of_part(record);
    let shown = part.map(|coverage| format!(" ({:.0} % of the brain shown)", 100.0 * coverage));
    (is_cut || shown.is_some())
        .then(|| format!("cut by the scanner's field of view{}", shown.unwrap_or_default()))
}

/// The sidecar of a scan that is not scored yet. Sidecars of scored scans start from it.
pub(crate) fn sidecar(
    record: &ScanRecord,
    window: &WindowIdentity,
    method: &Method,
    config: &Config,
    pseudonyms: &Pseudonyms,
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
        source_name: pseudonyms.source_name(record),
        came_from: pseudonyms.text(&record.came_from).unwrap_or_default(),
        dicom: record.dicom.as_ref().and_then(|facts| pseudonyms.dicom(facts)),
        received_at: time(record.first_seen_secs),
        encoded_at: time(encoded.encoded_secs),
        scored_at: None,
        scan_id: record.id,
        modality: modality_of(&companions::stem_of(record.source_name.as_ref())),
        cohort: record.cohort.name.clone(),
        acquisition: pseudonyms.acquisition(&record.acquisition),
        revision: record.reported.as_ref().map_or(0, |reported| reported.revision) + 1,
        scores: None,
        threshold: None,
        clusters: Vec::new(),
        brain_ml: encoded.brain_ml,
        brain_mask: record.brain.clone(),
        quality: Some(QualityFacts {
            noise: encoded.noise,
            cut_fraction: encoded.cut_fraction,
            is_reference: config.quality.allow(record) && !window.set_aside.contains(&record.id),
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
            hidden_follow_ups: Vec::new(),
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
                "evidence": config.tree.get("evidence"),
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
        warnings: scan_warnings(record, &encoded, window, method, config)
            .iter()
            .map(|warning| pseudonyms.note(warning, record))
            .collect(),
        timings_secs: encoded.timings_secs,
        files: None,
    }
}

/// A time of the ledger, where 0 stands for a time that was not kept.
fn time(secs: u64) -> Option<String> {
    (secs > 0).then(|| utc(secs))
}

/// The weights of the networks, if they found the brain.
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

/// Results with the same key are equal. It covers the window's members and which of them are
/// references, the method of their tokens, the settings of the scoring, and the wanted files.
pub(crate) fn result_key(window: &WindowIdentity, config: &Config) -> String {
    let mut shaping = json!({
        "window": window.id,
        "method": window.cohort.method,
        "scoring": config.tree.get("scoring"),
        // The ratio in force, which another setting may switch off.
        "follow_up_ratio": config.scoring.follow_up_ratio,
        "community": config.tree.get("community"),
        "evidence": config.tree.get("evidence"),
    });
    // Each part is added only if it is not empty or default. So results from before the part
    // existed keep their key.
    if !window.set_aside.is_empty() {
        shaping["set_aside"] = json!(window.set_aside);
    }
    if !window.same_patient.is_empty() {
        shaping["same_patient"] = json!(window.same_patient);
    }
    if window.few_patients {
        shaping["few_patients"] = json!(true);
    }
    let files = ResultSettings { identity: IdentityChoice::default(), ..config.results };
    if files != ResultSettings::default() {
        let table = config.tree.get("results").and_then(|section| section.as_table());
        let mut wanted = table.cloned().unwrap_or_default();
        wanted.remove("identity");
        if !config.results.keep_nifti {
            wanted.remove("keep_nifti");
        }
        shaping["results"] = json!(wanted);
    }
    if let Some(identity) = form_of_names(config) {
        shaping["identity"] = json!(identity);
    }
    hex::encode(&Sha256::digest(shaping.to_string())[..8])
}

/// The key of a notice that a scan waits. It covers how the notice names the scan.
pub(crate) fn waiting_key(config: &Config) -> String {
    let waiting = Reported::WAITING;
    form_of_names(config).map_or(waiting.to_owned(), |form| format!("{waiting}, {form}"))
}

/// `results.identity`; `None` for names in clear, which all results had before the setting existed.
fn form_of_names(config: &Config) -> Option<&'static str> {
    match config.results.identity {
        IdentityChoice::Clear => None,
        IdentityChoice::Hashed => Some("hash"),
        IdentityChoice::Absent => Some("none"),
    }
}

fn summary(finding: &Finding, n_others: usize) -> String {
    let rank = finding.percentile.map_or(String::new(), |percentile| {
        let n_lower = (percentile * n_others as f64).round();
        format!(", higher than {n_lower} of {n_others} other scans")
    });
    let verdict = finding.tail.map_or(String::new(), |tail| {
        let probability = tail.probability;
        match tail.stands_out {
            Some(true) => format!("STANDS OUT (tail probability {probability:.2}); "),
            Some(false) => format!("Nothing stands out (tail probability {probability:.2}); "),
            None => "Too few scans to say whether it stands out; ".to_owned(),
        }
    });
    format!(
        "{verdict}score {:.3}{rank}; mask {:.1} ml in {} region{}",
        finding.score_top1_mean,
        finding.mask_ml(),
        finding.clusters.len(),
        if finding.clusters.len() == 1 { "" } else { "s" },
    )
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, num::NonZeroUsize};

    use super::*;
    use crate::domain::{cohort::CohortKey, window::Window};

    #[test]
    fn results_that_name_scans_in_another_form_or_have_another_file_have_another_key() {
        let key = CohortKey { name: "t1w".to_owned(), method: "m".to_owned() };
        let window = Window::new(key, NonZeroUsize::MIN).identity();
        let keys = |settings: &str| {
            let config = Config::parse(settings).unwrap();
            (result_key(&window, &config), waiting_key(&config))
        };
        let forms =
            ["path", "hash", "none"].map(|form| keys(&format!("results.identity = {form:?}")));
        let results: BTreeSet<&String> = forms.iter().map(|(result, _)| result).collect();
        let notices: BTreeSet<&String> = forms.iter().map(|(_, notice)| notice).collect();
        assert_eq!((results.len(), notices.len()), (3, 3));
        assert!(notices.iter().all(|notice| Reported::is_waiting_key(notice)), "{notices:?}");
        assert_eq!(forms[0].1, Reported::WAITING, "that of earlier versions");
        assert_eq!(keys(""), forms[1]);
        assert_ne!(keys("results.keep_nifti = true").0, forms[1].0);
    }
}
