//! Landmarks: a command learns them, and `oddscan score` and the daemon use them.

use std::{fs, path::Path};

use oddscan::{
    domain::{landmarks::LandmarkSet, scan::ScanId},
    nifti,
    report::{IntensityFacts, Sidecar, read_sidecar},
};

use crate::support::{Site, brain, oddscan, said, scan_bytes};

/// A scan as from another scanner: dark tissue is brighter.
fn bent_bytes(seed: u64) -> Vec<u8> {
    let mut volume = brain(seed);
    volume.voxels.iter_mut().for_each(|voxel| *voxel = 9.0 * voxel.powf(0.5));
    nifti::encode_volume(&volume)
}

fn learn(site: &Site, names: &[&str]) -> (String, String, Option<i32>) {
    let mut command = oddscan();
    command.args(["intensity", "learn", "--config"]).arg(site.path("config.toml")).arg("--out");
    command.arg(site.path("landmarks.json"));
    command.args(names.iter().map(|name| site.path("incoming").join(name)));
    said(&command.output().unwrap())
}

fn score(site: &Site, out: &str) -> (String, String, Option<i32>) {
    let mut command = oddscan();
    command.args(["score", "--config"]).arg(site.path("config.toml")).arg("--out");
    said(&command.arg(site.path(out)).arg(site.path("incoming")).output().unwrap())
}

fn sidecar(folder: &Path, stem: &str) -> Sidecar {
    read_sidecar(&folder.join(format!("{stem}_anomaly.json"))).unwrap()
}

const ASKED_FOR: &str = "intensity.standardise = \"nyul\"";

fn ask_for_landmarks(site: &Site) {
    let file = format!("intensity.landmarks = \"{}\"", site.path("landmarks.json").display());
    site.configure(2, &[ASKED_FOR, &file]);
}

#[test]
fn landmarks_are_learnt_once_and_obeyed_by_the_command_and_the_daemon() {
    let mut site = Site::new(2, &[]);
    for seed in 1..=4 {
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
    }
    site.drop_in("sub-5_T1w.nii.gz", &bent_bytes(5));
    for seed in 6..=7 {
        site.drop_in(&format!("sub-{seed}_FLAIR.nii.gz"), &scan_bytes(seed));
    }
    let three = ["sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz", "sub-3_T1w.nii.gz"];
    let (stdout, stderr, code) = learn(&site, &three);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.starts_with("t1w: 3 scans, values [0."), "{stdout}");
    let text = fs::read(site.path("landmarks.json")).unwrap();
    let set = LandmarkSet::parse(&text).unwrap();
    assert!(stdout.contains(set.digest()), "{stdout}");
    let learnt = set.learnt("t1w").unwrap();
    let second = site.path("incoming/sub-2_T1w.nii.gz");
    let second = ScanId::of(&nifti::read_scan(&second, &nifti::Limits::NONE).unwrap().volume);
    assert!(learnt.scans.contains(&second) && learnt.n_scans == 3);
    learn(&site, &three);
    assert_eq!(fs::read(site.path("landmarks.json")).unwrap(), text, "the same to the last byte");

    let (_, stderr, code) = score(&site, "plain");
    assert_eq!(code, Some(0), "{stderr}");
    ask_for_landmarks(&site);
    let (_, stderr, code) = score(&site, "standardised");
    assert_eq!(code, Some(0), "{stderr}");
    let [plain, standardised] = ["plain", "standardised"].map(|out| site.path(out));
    let map = "sub-5_T1w_anomaly-map.nii.gz";
    assert!(fs::read(plain.join(map)).unwrap() != fs::read(standardised.join(map)).unwrap());

    assert_eq!(sidecar(&plain, "sub-1_T1w").intensity, Some(IntensityFacts::Plain));
    let one = sidecar(&standardised, "sub-1_T1w");
    let of_landmarks = |learnt_from_this_scan| IntensityFacts::Nyul {
        landmarks_sha256: set.digest().to_owned(),
        n_scans: 3,
        learnt_from_this_scan,
    };
    assert_eq!(one.intensity, Some(of_landmarks(true)));
    let bent = sidecar(&standardised, "sub-5_T1w");
    assert_eq!(bent.intensity, Some(of_landmarks(false)));
    assert_ne!(one.method.fingerprint, sidecar(&plain, "sub-1_T1w").method.fingerprint);
    let without = sidecar(&standardised, "sub-6_FLAIR");
    assert_eq!(without.intensity, Some(IntensityFacts::Plain));
    let warning = "intensities are not standardised because the cohort flair has no landmarks";
    assert!(without.warnings.iter().any(|w| w.starts_with(warning)), "{:?}", without.warnings);

    // The daemon gives the same results as the command, bit for bit.
    site.start();
    site.wait_scored(
        &[1, 2, 3, 4, 5].map(|seed| format!("sub-{seed}_T1w")).each_ref().map(|s| &**s),
    );
    let [one, other] = [site.path("results"), standardised].map(|f| fs::read(f.join(map)).unwrap());
    assert!(one == other);
    assert_eq!(site.sidecar("sub-5_T1w").unwrap().intensity, bent.intensity);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn landmarks_that_are_missing_or_were_changed_stop_the_start_with_the_reason() {
    let site = Site::new(2, &[]);
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    site.drop_in("sub-2_T1w.nii.gz", b"no scan");
    ask_for_landmarks(&site);
    let (_, stderr, code) = score(&site, "out");
    assert_eq!(code, Some(78), "{stderr}");
    assert!(stderr.contains("landmarks.json (intensity.landmarks) cannot be used"), "{stderr}");
    // Learning works before the file exists that the settings name.
    let (_, stderr, code) = learn(&site, &["sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("not used:") && stderr.contains("sub-2_T1w.nii.gz"), "{stderr}");
    let text = fs::read_to_string(site.path("landmarks.json")).unwrap();
    fs::write(site.path("landmarks.json"), text.replace("\"n_scans\": 1", "\"n_scans\": 30"))
        .unwrap();
    let (_, stderr, code) = score(&site, "out");
    assert_eq!(code, Some(78));
    assert!(stderr.contains("it was changed; learn it again"), "{stderr}");

    let (_, stderr, code) = learn(&site, &["sub-2_T1w.nii.gz"]);
    assert_eq!(code, Some(65), "{stderr}");
    assert!(stderr.contains("no cohort"), "{stderr}");
    let mut command = oddscan();
    command.args(["intensity", "learn", "--percentiles", "50,20", "--out"]);
    command.arg(site.path("other.json")).arg(site.path("incoming"));
    let (_, stderr, code) = said(&command.output().unwrap());
    assert_eq!(code, Some(64));
    assert!(stderr.contains("rising, between 0 and 100, are needed"), "{stderr}");
}
