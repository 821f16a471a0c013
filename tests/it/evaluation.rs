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
    };
    Sidecar {
        schema: SCHEMA.into(),
        notice: String::new(),
        oddscan_version: String::new(),
        standing: Standing::Scored,
        source_name: String::new(),
        came_from: String::new(),
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

#[test]
fn the_figures_are_those_of_scikit_learn_medpy_and_scipy() {
    let Some(mut cases) = python("evaluation_cases.py", "medpy") else { return };
    let folder = tempfile::tempdir().unwrap();
    let [results, truth, expected] =
        ["results", "truth", "expected.json"].map(|name| folder.path().join(name));
    run(cases.args([&results, &truth, &expected]));
    for number in 0..8_u8 {
        let stem = format!("sub-{number}_T1w");
        write_sidecar(&results, &stem, &sidecar(f32::from(number) / 10.0)).unwrap();
    }
    let expected: Value = serde_json::from_slice(&fs::read(expected).unwrap()).unwrap();

    let mut eval = oddscan();
    let output = eval.arg("eval").arg("--maps").arg(&results).arg("--truth").arg(&truth);
    let (table, stderr, code) = said(&output.output().unwrap());
    assert_eq!(code, Some(0), "{stderr}");
    assert!(table.contains("95 % interval") && table.contains("false regions"), "{table}");
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
        assert_eq!(scan["n_false_regions"], expected["n_false_regions"], "{name}");
        assert_eq!(scan["voxels"].is_null(), expected["auroc"].is_null(), "{name}");
        for figure in ["auroc", "average_precision", "oracle_dice", "dice", "iou"] {
            if !scan["voxels"].is_null() {
                assert_close(&scan["voxels"][figure], &expected[figure], figure);
            }
        }
    }
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
