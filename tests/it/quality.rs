//! A scan that is not good enough is reported and does not change the results of the others.

use std::fs;

use oddscan::{domain::scan::BrainSource, numeric::projection::Normal, report::Standing};
use rustix::process::Signal;

use crate::support::{Site, brain, oddscan, said, scan_bytes};

/// A scan with very much noise.
fn noisy_bytes(seed: u64) -> Vec<u8> {
    let mut volume = brain(seed);
    let mut random = Normal::new(seed);
    for voxel in volume.voxels.iter_mut().filter(|voxel| **voxel > 0.0) {
        *voxel = (f64::from(*voxel) + 40.0 * random.next()).hypot(40.0 * random.next()) as f32;
    }
    oddscan::nifti::encode_volume(&volume)
}

/// Maps and masks of the first three scans.
fn maps(read: impl Fn(&str) -> Vec<u8>) -> Vec<Vec<u8>> {
    let names = |seed| ["map", "mask"].map(|kind| format!("sub-{seed}_T1w_anomaly-{kind}.nii.gz"));
    (1..=3).flat_map(names).map(|name| read(&name)).collect()
}

#[test]
fn a_noisy_scan_is_scored_and_changes_nothing_for_the_others() {
    let mut site = Site::new(3, &["community.enabled = true"]);
    for seed in 1..=3 {
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
    }
    let mut score = oddscan();
    score.args(["score", "--config"]).arg(site.path("config.toml"));
    let output = score.arg("--out").arg(site.path("out")).arg(site.path("incoming")).output();
    let (_, stderr, code) = said(&output.unwrap());
    assert_eq!(code, Some(0), "{stderr}");
    let without = maps(|name| fs::read(site.path("out").join(name)).unwrap());

    site.start();
    site.drop_in("sub-4_T1w.nii.gz", &noisy_bytes(4));
    let all = [1, 2, 3, 4].map(|seed| format!("sub-{seed}_T1w"));
    site.wait_scored(&all.each_ref().map(String::as_str));
    let with = maps(|name| fs::read(site.path("results").join(name)).unwrap());
    assert!(without == with, "bit for bit");
    let noisy = site.sidecar("sub-4_T1w").unwrap();
    let quality = noisy.quality.clone().unwrap();
    assert!(!quality.is_reference && quality.noise.unwrap() > 0.3, "{quality:?}");
    assert!(noisy.warnings[0].contains("quality.max_noise"), "{:?}", noisy.warnings);
    assert_eq!(noisy.window.set_aside, [noisy.scan_id]);
    assert!(noisy.scores.unwrap().n_cells > 0);
    let clean = site.sidecar("sub-1_T1w").unwrap();
    let quality = clean.quality.clone().unwrap();
    assert!(quality.is_reference && quality.noise.unwrap() < 0.1, "{quality:?}");
    assert_eq!(clean.window.set_aside, [noisy.scan_id]);
    assert_eq!(clean.brain_mask.clone().unwrap().from, BrainSource::AboveZero);
    assert_eq!(site.status().cohorts["t1w"].n_set_aside, 1);

    // With a limit that admits it, the others are compared with it and their results are refreshed.
    site.configure(3, &["community.enabled = true", "quality.max_noise = 5"]);
    site.signal(Signal::HUP);
    site.wait("renewed", |site| {
        let sidecars = all.iter().map(|stem| site.sidecar(stem).unwrap());
        sidecars.filter(|sidecar| sidecar.window.set_aside.is_empty()).count() == 4
    });
    let renewed = maps(|name| fs::read(site.path("results").join(name)).unwrap());
    assert!(renewed != with);
    assert!(site.sidecar("sub-1_T1w").unwrap().revision > clean.revision);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_scan_that_is_no_reference_does_not_fill_the_window() {
    let mut site = Site::new(2, &[]);
    site.start();
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    site.drop_in("sub-2_T1w.nii.gz", &noisy_bytes(2));
    let waiting = Standing::WaitingForScans { have: 1, need: 2 };
    site.wait("waiting", |site| {
        site.sidecar("sub-2_T1w").is_some() && site.sidecar("sub-1_T1w").is_some()
    });
    site.wait("both in the window", |site| site.status().cohorts["t1w"].n_scans == 2);
    assert!([1, 2].iter().all(|seed| {
        let sidecar = site.sidecar(&format!("sub-{seed}_T1w")).unwrap();
        sidecar.standing == waiting || sidecar.window.size == 1
    }));
    site.drop_in("sub-3_T1w.nii.gz", &scan_bytes(3));
    site.wait_scored(&["sub-1_T1w", "sub-2_T1w", "sub-3_T1w"]);
    assert_eq!(site.stop(), Some(0));

    let mut score = oddscan();
    score.args(["score", "--config"]).arg(site.path("config.toml")).arg("--out");
    score
        .arg(site.path("out"))
        .args([1, 2].map(|n| site.path(&format!("incoming/sub-{n}_T1w.nii.gz"))));
    let (_, stderr, code) = said(&score.output().unwrap());
    assert_eq!(code, Some(65));
    assert!(stderr.contains("1 of 2 scans of its cohort (t1w) are references"), "{stderr}");
}

#[test]
fn who_leaves_a_window_full_of_bad_scans_is_counted_and_may_come_again() {
    let mut site = Site::new(2, &["window.max_scans = 2", "quality.max_noise = 0.0001"]);
    site.start();
    for seed in 1..=3 {
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
    }
    site.wait("one has left", |site| {
        site.metric("oddscan_store_evictions_total{reason=\"unscored\"}") == 1.0
    });
    site.configure(2, &["window.max_scans = 3"]);
    site.signal(Signal::HUP);
    site.wait("two scored", |site| {
        let sidecars = (1..=3).map(|seed| site.sidecar(&format!("sub-{seed}_T1w")).unwrap());
        sidecars.filter(|sidecar| sidecar.standing == Standing::Scored).count() == 2
    });
    let left = (1..=3).find(|seed| {
        let sidecar = site.sidecar(&format!("sub-{seed}_T1w")).unwrap();
        sidecar.standing != Standing::Scored
    });
    site.drop_in("again_T1w.nii.gz", &scan_bytes(left.unwrap()));
    site.wait("all scored", |site| {
        site.sidecar("again_T1w").is_some_and(|sidecar| sidecar.window.size == 3)
    });
    assert_eq!((site.status().n_accepted, site.status().n_duplicates), (4, 0));
    assert_eq!(site.stop(), Some(0));
}
