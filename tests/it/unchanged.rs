//! Results stay as they are, byte for byte, from commit to commit.
//!
//! The daemon and `oddscan score` work on the same made-up scans: strangers, a patient with two
//! sessions, a guest, a brain mask, a cohort rule, heads that are aligned, DICOM series, and files
//! that are refused. `tests/fixtures/results.json` holds a hash of every file that they write,
//! without times, version, device and paths. `ODDSCAN_BLESS=1` writes the hashes anew; a commit
//! that does so says in its last line which results change, and why.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use oddscan::{
    compute::cpu::Instructions,
    numeric::projection::Normal,
    quarantine::{Entry, entries},
};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    alignment::{T1, head, template_image},
    dicom::{SOON, brain_series},
    optional_results::poses,
    shipped::repository,
    support::{Site, brain, names, oddscan, said, scan_bytes, skip},
};

/// Name of a file -> the first 16 hex digits of the SHA-256 of its content.
type Hashes = BTreeMap<String, String>;

/// Members of each cohort after all scans have arrived.
const COHORTS: [(&str, usize); 3] = [("t1w", 5), ("dicom", 2), ("flair", 2)];

/// With these instructions, and in f32, all processors compute the same bits.
const AVX2: (&str, &str) = ("ODDSCAN_INSTRUCTIONS", "avx2");

const SETTINGS: [&str; 6] = [
    SOON[0],
    SOON[1],
    "encoder.precision = \"f32\"",
    "results.brain_mask = true",
    "results.alignment = true",
    "cohort = [{ name = \"dicom\", match = { suffix = \"T1w\", manufacturer = \"siemens*\" } }]",
];

fn hash(bytes: &[u8]) -> String {
    hex::encode(&Sha256::digest(bytes)[..8])
}

/// A scan with so much noise that others are not compared with it.
fn guest(seed: u64) -> Vec<u8> {
    let mut volume = brain(seed);
    let mut random = Normal::new(seed);

    for voxel in volume.voxels.iter_mut().filter(|voxel| **voxel > 0.0) {
        *voxel += (40.0 * random.next()) as f32;
    }

    oddscan::nifti::encode_volume(&volume)
}

/// The brain of a scan as a mask, a little smaller than the region above zero.
fn mask(seed: u64) -> Vec<u8> {
    let mut volume = brain(seed);
    let bright = |voxel: f32| if voxel > 60.0 { 1.0 } else { 0.0 };
    volume.voxels.iter_mut().for_each(|voxel| *voxel = bright(*voxel));
    oddscan::nifti::encode_volume(&volume)
}

/// A site whose incoming folder holds one scan of each kind; `None` without Python and pydicom.
fn site(preset: &str) -> Option<Site> {
    let mut settings = SETTINGS.to_vec();
    let preset = format!("preset = \"{preset}\"");
    settings.insert(0, &preset);
    let site = Site::new(2, &settings);

    let template = site.path("template.nii.gz");
    fs::write(&template, oddscan::nifti::encode_volume(template_image())).unwrap();
    let template = format!("alignment.template = \"{}\"", template.display());
    settings.insert(1, &template);
    site.configure(2, &settings);

    let incoming = site.path("incoming");
    let write = |name: &str, bytes: &[u8]| fs::write(incoming.join(name), bytes).unwrap();
    for (name, seed) in [("sub-1", 1), ("sub-2_ses-1", 2), ("sub-2_ses-2", 3), ("sub-3", 4)] {
        write(&format!("{name}_T1w.nii.gz"), &scan_bytes(seed));
    }
    write("sub-1_T1w.json", br#"{"MagneticFieldStrength": 3.0, "Manufacturer": "GE"}"#);
    write("sub-3_brain.nii.gz", &mask(4));
    write("sub-4_T1w.nii.gz", &guest(5));

    for (number, pose) in (5..).zip(poses()) {
        let head = head(number, &pose, T1, false);
        write(&format!("sub-{number}_FLAIR.nii.gz"), &oddscan::nifti::encode_volume(&head));
    }

    let mut blank = brain(6);
    blank.voxels.fill(0.0);
    write("sub-8_T1w.nii.gz", &oddscan::nifti::encode_volume(&blank));
    write("sub-9_T1w.nii.gz", &scan_bytes(9)[..2000]);

    for seed in [1, 2] {
        brain_series(&incoming.join(format!("series-{seed}")), seed)?;
    }
    Some(site)
}

/// Hash of a sidecar, and the number of its warnings, whose texts may become clearer.
fn of_sidecar(site: &Site, bytes: &[u8]) -> (String, usize) {
    let folder = site.path("").display().to_string();
    let text = String::from_utf8_lossy(bytes).replace(&folder, "/");
    let mut sidecar: Value = serde_json::from_str(&text).unwrap();
    let keys = sidecar.as_object_mut().unwrap();

    // The revision depends on how many scans arrive between two scorings.
    let times = ["received_at", "encoded_at", "scored_at"];
    for volatile in ["timings_secs", "oddscan_version", "revision"].into_iter().chain(times) {
        assert!(keys.remove(volatile).is_some(), "{volatile}");
    }
    keys["encoder"].as_object_mut().unwrap().remove("device");
    let warnings = keys.remove("warnings").unwrap();

    (hash(sidecar.to_string().as_bytes()), warnings.as_array().unwrap().len())
}

/// Hashes of the results in a folder.
fn of_results(site: &Site, folder: &Path, prefix: &str) -> Hashes {
    let mut hashes = Hashes::new();

    for name in names(folder).iter().filter(|name| !folder.join(name).is_dir()) {
        let bytes = fs::read(folder.join(name)).unwrap();
        let key = format!("{prefix}/{name}");
        if name.ends_with(".json") {
            let (content, n_warnings) = of_sidecar(site, &bytes);
            hashes.insert(format!("{key} warnings"), n_warnings.to_string());
            hashes.insert(key, content);
        } else {
            hashes.insert(key, hash(&bytes));
        }
    }

    hashes
}

/// Refused files by reason. Their texts may change.
fn of_quarantine(quarantine: &Path) -> Hashes {
    let mut hashes = Hashes::new();

    for Entry { name, .. } in entries(quarantine).unwrap() {
        let folder = quarantine.join(&name);
        for file in names(&folder).into_iter().filter(|file| file != "reason.json") {
            let key = format!("quarantine/{}/{file}", name.display());
            hashes.insert(key, hash(&fs::read(folder.join(file)).unwrap()));
        }
    }

    hashes
}

fn is_complete(site: &Site) -> bool {
    let status = site.status();
    let is_full = |(cohort, n): (&str, usize)| {
        status.cohorts.get(cohort).is_some_and(|cohort| cohort.n_scans == n)
    };
    COHORTS.into_iter().all(is_full) && status.n_quarantined == 2
}

/// Whether each result is of the complete window.
fn all_scored(site: &Site) -> bool {
    let folder = site.path("results");
    let sidecars = names(&folder).into_iter().filter(|name| name.ends_with(".json"));
    let sidecars: Vec<Value> = sidecars
        .filter_map(|name| serde_json::from_slice(&fs::read(folder.join(name)).ok()?).ok())
        .collect();
    let size = |sidecar: &Value| COHORTS.iter().find(|(name, _)| sidecar["cohort"] == *name);
    let is_done = |sidecar: &Value| {
        sidecar["status"] == "scored" && sidecar["window"]["size"] == size(sidecar).unwrap().1
    };
    sidecars.len() == 9 && sidecars.iter().all(is_done) && site.results_are_in_place()
}

fn by_the_daemon(site: &mut Site) -> Hashes {
    site.start_with(&[AVX2]);
    site.wait("complete", is_complete);
    site.wait("all scored", all_scored);
    assert_eq!(site.stop(), Some(0));

    let mut hashes = of_results(site, &site.path("results"), "daemon");
    hashes.extend(of_quarantine(&site.path("quarantine")));
    hashes
}

fn by_score(site: &Site) -> Hashes {
    let out = site.path("out");
    let mut score = oddscan();
    score.env(AVX2.0, AVX2.1);
    score.args(["score", "--json", "--config"]).arg(site.path("config.toml"));
    let output = score.arg("--out").arg(&out).arg(site.path("incoming")).output().unwrap();
    let (stdout, stderr, code) = said(&output);
    // Not all could be scored.
    assert_eq!(code, Some(65), "{stderr}");

    let mut report: Value = serde_json::from_str(&stdout).unwrap();
    for scan in report["scored"].as_array_mut().unwrap() {
        scan["file"].take();
    }
    let scored = hash(report["scored"].to_string().as_bytes());
    let mut hashes = of_results(site, &out, "score");
    hashes.insert("score's table".to_owned(), scored);
    hashes
}

fn fixture() -> PathBuf {
    repository().join("tests/fixtures/results.json")
}

fn holds(preset: &str) {
    if Instructions::in_use() < Instructions::Avx2 {
        skip("results are recorded with AVX2, which this processor does not have");
        return;
    }
    let Some(mut site) = site(preset) else { return };

    // First `score`: the daemon moves the files that it refuses.
    let mut found = by_score(&site);
    found.extend(by_the_daemon(&mut site));

    let text = fs::read_to_string(fixture()).unwrap_or("{}".to_owned());
    let mut recorded: BTreeMap<String, Hashes> = serde_json::from_str(&text).unwrap();
    if env::var_os("ODDSCAN_BLESS").is_some() {
        recorded.insert(preset.to_owned(), found);
        let text = serde_json::to_string_pretty(&recorded).unwrap();
        fs::write(fixture(), text + "\n").unwrap();
        return;
    }

    let recorded = &recorded[preset];
    let differs = |key: &&String| found.get(*key) != recorded.get(*key);
    let all: Hashes = recorded.clone().into_iter().chain(found.clone()).collect();
    let changed: Vec<&String> = all.keys().filter(differs).collect();
    assert!(changed.is_empty(), "not as recorded ({preset}): {changed:#?}");
}

#[test]
fn results_with_the_preset_fast_stay_as_they_are() {
    holds("fast");
}

#[test]
fn results_with_the_preset_balanced_stay_as_they_are() {
    holds("balanced");
}

#[test]
fn results_with_the_preset_paper_stay_as_they_are() {
    holds("paper");
}
