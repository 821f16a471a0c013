//! Which scans are compared with each other. The JSON beside a scan and the rules of the settings
//! decide, in the daemon and in `oddscan score`.

use std::{fs, os::unix::fs::symlink};

use oddscan::report::{Sidecar, Standing, read_sidecar};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Site, brain, oddscan, said, scan_bytes};

const BY_FIELD_STRENGTH: &str = "\
    [[cohort]]\nname = \"t1-1-5t\"\nmatch = { suffix = \"T1w\", field_strength_t = [1.2, 1.8] }\n\
    [[cohort]]\nname = \"t1-3t\"\nmatch = { suffix = \"T1w\", field_strength_t = [2.5, 3.5] }";

/// What dcm2niix writes, with more about the patient than it should.
fn tesla(strength: f64) -> String {
    let json = json!({
        "Modality": "MR", "MagneticFieldStrength": strength, "Manufacturer": "Siemens",
        "SeriesDescription": "t1_mprage_sag", "EchoTime": 0.00298,
        "PatientName": "Doe^Jane", "PatientID": "4711", "StationName": "MRC2",
    });
    json.to_string()
}

/// The JSON first, then the scan.
fn drop_pair(site: &Site, seed: u64, json: &str) {
    fs::write(site.path(&format!("incoming/sub-{seed}_T1w.json")), json).unwrap();
    site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
}

fn sidecar(site: &Site, seed: u64) -> Sidecar {
    site.sidecar(&format!("sub-{seed}_T1w")).unwrap()
}

fn warns(sidecar: &Sidecar, text: &str) -> bool {
    sidecar.warnings.iter().any(|warning| warning.contains(text))
}

#[test]
fn two_field_strengths_are_two_cohorts_and_what_is_not_known_is_mixed_with_neither() {
    let mut site = Site::new(2, &[BY_FIELD_STRENGTH]);
    site.start();
    for (seed, strength) in [(1, 1.5), (2, 1.494), (3, 3.0), (4, 2.89)] {
        drop_pair(&site, seed, &tesla(strength));
    }
    drop_pair(&site, 5, "{\"MagneticFieldStrength\": 3.0");
    fs::write(site.path("elsewhere"), tesla(3.0)).unwrap();
    symlink(site.path("elsewhere"), site.path("incoming/sub-6_T1w.json")).unwrap();
    site.drop_in("sub-6_T1w.nii.gz", &scan_bytes(6));
    for pair in [["sub-1_T1w", "sub-2_T1w"], ["sub-3_T1w", "sub-4_T1w"], ["sub-5_T1w", "sub-6_T1w"]]
    {
        site.wait_scored(&pair);
    }
    let cohort = |seed| sidecar(&site, seed).cohort;
    assert_eq!(
        [1, 2, 3, 4, 5, 6].map(cohort),
        ["t1-1-5t", "t1-1-5t", "t1-3t", "t1-3t", "t1w", "t1w"]
    );
    let known = sidecar(&site, 2);
    assert_eq!((known.modality.as_str(), known.acquisition.field_strength_t), ("t1w", Some(1.494)));
    assert_eq!(known.acquisition.echo_time_ms, Some(2.98));
    assert!(!warns(&known, "cohort rule"), "{:?}", known.warnings);
    let broken = sidecar(&site, 5);
    assert!(warns(&broken, "no valid JSON (line 1"), "{:?}", broken.warnings);
    assert!(warns(&broken, "t1-1-5t does not take the scan: its field_strength_t is not known"));
    let linked = sidecar(&site, 6);
    assert!(!linked.acquisition.has_json, "a link leads anywhere");
    assert!(warns(&linked, "(no JSON was read)"), "{:?}", linked.warnings);
    let texts = ["-map.nii.gz", ".json"].map(|ending| site.result("sub-1_T1w", ending));
    for text in texts.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()) {
        assert!(!["Doe", "4711", "MRC2"].iter().any(|word| text.contains(word)), "{text}");
    }
    let n_active = "oddscan_window_studies{cohort=\"t1-3t\",state=\"active\"}";
    assert_eq!(site.metric(n_active), 2.0);

    // Other rules apply to later scans. The ledger keeps its records.
    site.configure(2, &["[[cohort]]\nname = \"new\"\nmatch = { file = \"sub-*\" }"]);
    site.signal(Signal::HUP);
    site.wait("reloaded", |site| site.log().contains("reloaded"));
    drop_pair(&site, 7, &tesla(3.0));
    site.wait("taken", |site| site.status().cohorts.contains_key("new"));
    assert_eq!(site.stop(), Some(0));
    site.start();
    site.wait("taken up", |site| site.status().cohorts.len() == 4);
    let sizes: Vec<(String, usize)> =
        site.status().cohorts.into_iter().map(|(name, cohort)| (name, cohort.n_scans)).collect();
    let expected = [("new", 1), ("t1-1-5t", 2), ("t1-3t", 2), ("t1w", 2)];
    assert_eq!(sizes, expected.map(|(name, n)| (name.to_owned(), n)));
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_json_that_comes_while_the_scan_settles_is_read_with_it() {
    let mut site = Site::new(2, &["intake.settle_secs = 2.0", BY_FIELD_STRENGTH]);
    site.start();
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    site.wait("seen", |site| site.status().n_settling == 1);
    let path = site.path("incoming/sub-1_T1w.json");
    fs::write(&path, "{\"MagneticField").unwrap();
    site.wait("looked at", |site| site.status().n_settling == 1);
    fs::write(&path, tesla(3.0)).unwrap();
    site.wait("taken", |site| site.sidecar("sub-1_T1w").is_some());
    let waiting = sidecar(&site, 1);
    assert!(matches!(waiting.standing, Standing::WaitingForScans { .. }));
    assert_eq!((waiting.cohort.as_str(), waiting.acquisition.has_json), ("t1-3t", true));
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn the_one_shot_command_makes_the_same_cohorts() {
    let site = Site::new(
        2,
        &[
            "[[cohort]]\nname = \"fine\"\nmatch = { series = \"*MPRAGE*\", max_spacing_mm = 2 }",
            "[[cohort]]\nname = \"mprage\"\nmatch = { series = \"*MPRAGE*\" }",
            "[[cohort]]\nname = \"any-mprage\"\nmatch = { series = \"*mprage*\" }",
        ],
    );
    let scans = site.path("scans");
    fs::create_dir(&scans).unwrap();
    for seed in 1..=5 {
        fs::write(scans.join(format!("sub-{seed}_T1w.nii.gz")), scan_bytes(seed)).unwrap();
    }
    for seed in 1..=2 {
        fs::write(scans.join(format!("sub-{seed}_T1w.json")), tesla(3.0)).unwrap();
    }
    // Hostile: of any length, and nested until a parser's stack overflows.
    fs::write(scans.join("sub-3_T1w.json"), vec![b' '; 3 << 20]).unwrap();
    fs::write(scans.join("sub-4_T1w.json"), "[".repeat(1 << 19)).unwrap();
    fs::write(scans.join("sub-5_T1w.json"), "{\"SeriesDescription\": 7}").unwrap();
    let mut score = oddscan();
    score.args(["score", "--json", "--config"]).arg(site.path("config.toml"));
    let output = score.arg("--out").arg(site.path("out")).arg(&scans).output().unwrap();
    let (stdout, stderr, code) = said(&output);
    assert_eq!(code, Some(0), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let mut cohorts: Vec<(String, String)> = report["scored"]
        .as_array()
        .unwrap()
        .iter()
        .map(|scan| ["stem", "cohort"].map(|key| scan[key].as_str().unwrap().to_owned()).into())
        .collect();
    cohorts.sort();
    let expected = [(1, "mprage"), (2, "mprage"), (3, "t1w"), (4, "t1w"), (5, "t1w")];
    let expected = expected.map(|(seed, cohort)| (format!("sub-{seed}_T1w"), cohort.to_owned()));
    assert_eq!(cohorts, expected);
    let result =
        |seed| read_sidecar(&site.path(&format!("out/sub-{seed}_T1w_anomaly.json"))).unwrap();
    assert!(warns(&result(3), "larger than 1048576 bytes"), "{:?}", result(3).warnings);
    assert!(warns(&result(4), "no valid JSON"), "{:?}", result(4).warnings);
    assert!(warns(&result(5), "no usable value for SeriesDescription"), "{:?}", result(5).warnings);

    let mut check = oddscan();
    let output = check.arg("check-config").arg(site.path("config.toml")).output().unwrap();
    let (stdout, _, code) = said(&output);
    assert_eq!(code, Some(0));
    let rule = "cohort rule 1, fine: max_spacing_mm 2, series like \"*MPRAGE*\"";
    assert!(stdout.contains(rule), "{stdout}");
    assert!(stdout.contains("scans that no rule takes: by the suffix"), "{stdout}");
}

#[test]
fn names_with_entities_find_their_cohort_and_phase_images_are_refused() {
    let site = Site::new(2, &[]);
    let scans = site.path("scans");
    fs::create_dir(&scans).unwrap();
    let names = [
        "sub-1_ce-gd_T1w",
        "sub-2_ce-dotarem_T1w",
        "sub-3_T1w_reg",
        "sub-4_desc-preproc_T1w",
        "sub-5_inv-1_T1w",
        "sub-6",
        "sub-7_part-phase_T1w",
        "sub-8_T1w",
    ];
    for (seed, name) in (1..).zip(names) {
        fs::write(scans.join(format!("{name}.nii.gz")), scan_bytes(seed)).unwrap();
    }
    fs::write(scans.join("sub-6.json"), tesla(3.0)).unwrap();
    fs::write(scans.join("sub-8_T1w.json"), r#"{"ImageType": ["ORIGINAL", "PRIMARY", "PHASE"]}"#)
        .unwrap();

    let mut score = oddscan();
    score.args(["score", "--json", "--config"]).arg(site.path("config.toml"));
    let output = score.arg("--out").arg(site.path("out")).arg(&scans).output().unwrap();
    let (stdout, stderr, code) = said(&output);
    assert_eq!(code, Some(65), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();

    let result =
        |name: &str| read_sidecar(&site.path(&format!("out/{name}_anomaly.json"))).unwrap();
    let cohorts = names[..6].iter().map(|name| result(name).cohort);
    let expected = ["t1ce", "t1ce", "t1w", "t1w", "unknown", "unknown"];
    assert_eq!(cohorts.collect::<Vec<_>>(), expected);
    let [inversion, plain] = ["sub-5_inv-1_T1w", "sub-6"].map(result);
    assert!(warns(&inversion, "one of several inversions"), "{:?}", inversion.warnings);
    assert!(warns(&plain, "the JSON beside the scan says T1w"), "{:?}", plain.warnings);

    let refused = report["refused"].as_array().unwrap();
    assert_eq!(refused.len(), 2, "{refused:?}");
    for scan in refused {
        let error = scan["reason"].as_str().unwrap();
        assert!(error.contains("needed a magnitude image"), "{error}");
    }
}

#[test]
fn a_scan_that_does_not_fit_its_cohort_has_a_warning_and_the_others_have_none() {
    let mut site = Site::new(6, &[]);
    site.start();
    for seed in 1..=5 {
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
    }
    // Not a head: blocks of black and white.
    let mut other = brain(6);
    let shape = other.shape;
    for (offset, voxel) in other.voxels.iter_mut().enumerate().filter(|(_, voxel)| **voxel > 0.0) {
        let [x, y, z] = shape.voxel(offset);
        let level = if (x / 4 + y / 4 + z / 4) % 2 == 0 { 5.0 } else { 250.0 };
        *voxel = level + 0.05 * *voxel;
    }
    site.drop_in("sub-6_T1w.nii.gz", &oddscan::nifti::encode_volume(&other));
    site.wait_scored(
        &[1, 2, 3, 4, 5, 6].map(|seed| format!("sub-{seed}_T1w")).each_ref().map(|s| &**s),
    );
    let unlike =
        [1, 2, 3, 4, 5, 6].map(|seed| warns(&sidecar(&site, seed), "unlike its cohort t1w"));
    let shift = [1, 6].map(|seed| sidecar(&site, seed).scores.unwrap().shift);
    assert_eq!(unlike, [false, false, false, false, false, true], "{shift:?}");
    assert_eq!(site.status().cohorts["t1w"].n_unlike, 1);
    assert_eq!(site.stop(), Some(0));
}
