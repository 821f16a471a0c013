//! Compares `oddscan eval` with scikit-learn, MedPy and SciPy.

use std::{collections::BTreeMap, fs};

use oddscan::{
    domain::{acquisition::AcquisitionFacts, scan::ScanId},
    report::{
        EncoderFacts, MethodFacts, SCHEMA, Scores, Sidecar, Standing, WindowFacts, write_sidecar,
    },
};
use serde_json::Value;

use crate::{
    shipped::run,
    support::{oddscan, python, said, unread},
};

/// A sidecar that states only the score of its scan.
fn sidecar(score: f32) -> Sidecar {
    let scores = Scores {
        max: score,
        top1_mean: score,
        percentile: Some(0.5),
        shift: None,
        n_cells: 1,
        n_unmatched_cells: 0,
        excess: None,
        tail_probability: None,
        least_tail_probability: None,
        stands_out: None,
        usual_volume_ml: None,
    };
    Sidecar {
        schema: SCHEMA.into(),
        notice: String::new(),
        oddscan_version: String::new(),
        standing: Standing::Scored,
        source_name: String::new(),
        came_from: String::new(),
        dicom: None,
        received_at: None,
        encoded_at: None,
        scored_at: None,
        scan_id: ScanId([0; 32]),
        modality: String::new(),
        cohort: String::new(),
        acquisition: AcquisitionFacts::default(),
        quality: None,
        revision: 1,
        scores: Some(scores),
        threshold: None,
        clusters: Vec::new(),
        brain_ml: 0.0,
        brain_mask: None,
        intensity: None,
        alignment: None,
        preprocess: None,
        window: WindowFacts {
            id: String::new(),
            size: 0,
            heterogeneity: None,
            set_aside: Vec::new(),
            same_patient: Vec::new(),
            hidden_follow_ups: Vec::new(),
            few_patients: false,
            shared_anomalies: Vec::new(),
            members: Vec::new(),
        },
        method: MethodFacts {
            fingerprint: String::new(),
            template_sha256: None,
            brain_network_sha256: None,
            settings: Value::Null,
        },
        encoder: EncoderFacts {
            model: String::new(),
            weights_sha256: String::new(),
            layers: Vec::new(),
            device: String::new(),
            precision: String::new(),
        },
        warnings: Vec::new(),
        timings_secs: BTreeMap::new(),
        files: None,
    }
}

fn assert_close(found: &Value, expected: &Value, what: &str) {
    let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
    // Both are sums of at most some thousand terms in double precision.
    assert!((found - expected).abs() < 1e-9, "{what}: {found} instead of {expected}");
}

fn assert_baselines_and_sources(found: &Value, expected: &Value) {
    let baselines = found["baselines"].as_array().unwrap();
    let names: Vec<&str> = baselines.iter().map(|of| of["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["brightness", "darkness", "deviation"]);
    for baseline in &baselines[..2] {
        let name = baseline["name"].as_str().unwrap();
        assert_means(baseline, &expected["baselines"][name], name);
        assert_close(
            &baseline["map_average_precision"],
            &found["mean"]["average_precision"]["value"],
            name,
        );
    }

    let sources = found["sources"].as_array().unwrap();
    let expected = expected["sources"].as_array().unwrap();
    assert_eq!(sources.len(), expected.len());
    for (source, expected) in sources.iter().zip(expected) {
        for count in ["source", "n_lesions", "n_found"] {
            assert_eq!(source[count], expected[count]);
        }
        assert_means(source, expected, "source");
    }
}

/// As the threshold falls, a lesion that was found stays found.
fn assert_curve(found: &Value) {
    let points = found["froc"]["points"].as_array().unwrap();
    let n_found = |point: &Value| -> u64 {
        point["n_found"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum()
    };
    let threshold = |point: &Value| point["threshold"].as_f64().unwrap();
    assert!(points.len() > 2, "{points:?}");
    for pair in points.windows(2) {
        assert!(threshold(&pair[0]) > threshold(&pair[1]), "{pair:?}");
        assert!(n_found(&pair[0]) <= n_found(&pair[1]), "{pair:?}");
    }
    assert!(n_found(points.last().unwrap()) > 0, "{points:?}");
}

fn assert_means(found: &Value, expected: &Value, what: &str) {
    assert_eq!(found["n_scans"], expected["n_scans"], "{what}");
    for figure in ["auroc", "average_precision", "oracle_dice"] {
        assert_close(&found[figure], &expected[figure], what);
    }
}

#[test]
fn the_figures_are_those_of_scikit_learn_medpy_and_scipy() {
    let Some(mut cases) = python("evaluation_cases.py", "medpy") else { return };
    let folder = tempfile::tempdir().unwrap();
    let [results, truth, expected] =
        ["results", "truth", "expected.json"].map(|name| folder.path().join(name));
    run(cases.args([&results, &truth, &expected]));
    for number in 0..8_u8 {
        let source = if number < 4 { 'a' } else { 'b' };
        let stem = format!("sub-{source}-{number}_T1w");
        write_sidecar(&results, &stem, &sidecar(f32::from(number) / 10.0)).unwrap();
    }
    let expected: Value = serde_json::from_slice(&fs::read(expected).unwrap()).unwrap();

    let mut eval = oddscan();
    let output = eval.arg("eval").arg("--maps").arg(&results).arg("--truth").arg(&truth);
    let (table, stderr, code) = said(&output.output().unwrap());
    assert_eq!((stderr.as_str(), code), ("", Some(0)));
    let parts =
        ["95 % interval", "share of lesions", "brightness", "by source", "regions on normal"];
    for part in parts {
        assert!(table.contains(part), "no {part}: {table}");
    }
    let (json, _, _) = said(&output.arg("--json").output().unwrap());
    let found: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(unread(output), (String::new(), Some(141)));

    for (scan, expected) in
        found["scans"].as_array().unwrap().iter().zip(expected["scans"].as_array().unwrap())
    {
        let name = scan["stem"].as_str().unwrap();
        let lesions = scan["lesions"].as_array().unwrap();
        let n_found = lesions.iter().filter(|lesion| lesion["found"] == true).count();
        assert_eq!(Value::from(lesions.len()), expected["n_lesions"], "{name}");
        assert_eq!(Value::from(n_found), expected["n_found"], "{name}");
        for count in ["n_false_regions", "n_regions_on_normal", "n_normal", "n_normal_met"] {
            assert_eq!(scan[count], expected[count], "{count} of {name}");
        }
        assert_eq!(scan["voxels"].is_null(), expected["auroc"].is_null(), "{name}");
        for figure in ["auroc", "average_precision", "oracle_dice", "dice", "iou"] {
            if !scan["voxels"].is_null() {
                assert_close(&scan["voxels"][figure], &expected[figure], figure);
            }
        }
    }
    assert_baselines_and_sources(&found, &expected);
    assert_curve(&found);
    for figure in ["auroc", "average_precision", "oracle_dice", "dice"] {
        assert_close(&found["pooled"][figure], &expected["pooled"][figure], figure);
    }
    assert_close(&found["global_oracle_dice"], &expected["global_oracle_dice"], "global oracle");
    for figure in ["auroc", "average_precision"] {
        let (found, expected) = (&found["patients"][figure], &expected["patients"][figure]);
        assert_close(&found["value"], expected, figure);
    }
}

#[test]
fn a_truth_on_another_grid_is_refused_with_both_grids() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let scan = crate::support::brain(1);
    let map = oddscan::nifti::encode_volume(&scan);
    fs::write(path("a_T1w_anomaly-map.nii.gz"), &map).unwrap();
    fs::write(path("a_T1w_anomaly-mask.nii.gz"), &map).unwrap();
    let mut other = scan.clone();
    other.shape.0.swap(0, 1);
    fs::write(path("a_lesion.nii.gz"), oddscan::nifti::encode_volume(&other)).unwrap();
    let mut eval = oddscan();
    let output =
        eval.arg("eval").arg("--maps").arg(folder.path()).arg("--truth").arg(folder.path());
    let (_, stderr, code) = said(&output.output().unwrap());
    assert_eq!(code, Some(65));
    assert!(stderr.contains("a_lesion.nii.gz: found a grid of"), "{stderr}");
}

#[test]
fn without_the_scans_one_line_says_what_baselines_need() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let map = oddscan::nifti::encode_volume(&crate::support::brain(1));
    fs::write(path("a_T1w_anomaly-map.nii.gz"), &map).unwrap();
    fs::write(path("a_T1w_anomaly-mask.nii.gz"), &map).unwrap();
    let mut eval = oddscan();
    let output =
        eval.arg("eval").arg("--maps").arg(folder.path()).arg("--truth").arg(folder.path());
    let (_, stderr, code) = said(&output.output().unwrap());
    assert_eq!(code, Some(0));
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("no baselines") && stderr.contains("--scans"), "{stderr}");
}
