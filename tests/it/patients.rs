//! Scans of one patient do not hide from each other what both show.

use std::{fs, ops::RangeInclusive};

use oddscan::{
    numeric::volume::RawVolume,
    report::{Sidecar, Standing},
};
use rustix::process::Signal;

use crate::{
    dicom::{SOON, brain_series, brain_series_of},
    support::{Site, brain, names, oddscan, said, scan_bytes},
};

/// A session of the patient whose brain this is, with a lesion in it that others do not have.
fn session(seed: u64, number: usize) -> Vec<u8> {
    let RawVolume { shape, mut voxels, affine } = brain(seed);
    for (offset, voxel) in voxels.iter_mut().enumerate() {
        let [x, y, z] = shape.voxel(offset);
        let is_lesion = x.abs_diff(9) < 3 && y.abs_diff(14) < 3 && z.abs_diff(12) < 3;
        *voxel *= if is_lesion { 3.0 } else { 1.0 };
        // No two sessions are equal to the last bit.
        *voxel *= 1.0 + 1e-3 * number as f32;
    }
    oddscan::nifti::encode_volume(&RawVolume { shape, voxels, affine })
}

fn stem(number: usize) -> String {
    format!("sub-1_ses-{number}_T1w")
}

/// Drops sessions of one patient into the incoming folder.
fn come(site: &Site, numbers: RangeInclusive<usize>) {
    for number in numbers {
        site.drop_in(&format!("{}.nii.gz", stem(number)), &session(1, number));
    }
}

fn top(sidecar: &Sidecar) -> f32 {
    sidecar.scores.clone().unwrap().top1_mean
}

#[test]
fn sessions_of_a_patient_count_once_and_are_not_compared_with_each_other() {
    let mut site = Site::new(3, &[]);
    site.start();
    let sessions = ["sub-1_ses-1_T1w", "sub-1_ses-2_T1w", "sub-1_ses-3_T1w"];
    for (number, stem) in sessions.iter().enumerate() {
        site.drop_in(&format!("{stem}.nii.gz"), &session(1, number));
    }
    site.wait("all taken in", |site| site.status().n_reported >= 3);
    let waiting = Standing::WaitingForScans { have: 1, need: 3 };
    assert_eq!(site.sidecar(sessions[2]).unwrap().standing, waiting);
    let status = site.status();
    let cohort = &status.cohorts["t1w"];
    assert_eq!((cohort.n_scans, cohort.n_same_patient, cohort.n_counted()), (3, 2, 1));
    assert!(status.line().contains("t1w 1/3"), "{}", status.line());

    for seed in [2, 3] {
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
    }
    let all = [&sessions[..], &["sub-2_T1w", "sub-3_T1w"]].concat();
    site.wait_scored(&all);
    let apart = sessions.map(|stem| site.sidecar(stem).unwrap());
    let ids = {
        let mut ids = apart.clone().map(|sidecar| sidecar.scan_id);
        ids.sort();
        ids
    };
    assert_eq!(apart[0].window.same_patient, [ids.to_vec()]);
    let says = |sidecar: &Sidecar| sidecar.warnings.iter().any(|w| w.contains("same patient"));
    assert!(apart.iter().all(says) && !says(&site.sidecar("sub-2_T1w").unwrap()));
    let series = |state| format!("oddscan_window_studies{{cohort=\"t1w\",state=\"{state}\"}}");
    assert_eq!(["active", "same_patient"].map(|s| site.metric(&series(s))), [3.0, 2.0]);
    assert!(apart.iter().all(|sidecar| sidecar.scores.as_ref().unwrap().percentile == Some(1.0)));

    // If they are compared with each other, they look normal.
    site.configure(3, &["window.compare_same_patient = true"]);
    site.signal(Signal::HUP);
    site.wait("renewed", |site| {
        let renewed = all.iter().map(|stem| site.sidecar(stem).unwrap());
        renewed.filter(|sidecar| sidecar.window.same_patient.is_empty()).count() == all.len()
    });
    for (stem, apart) in sessions.iter().zip(&apart) {
        let together = site.sidecar(stem).unwrap();
        assert!(top(&together) < 0.7 * top(apart), "{} {}", top(&together), top(apart));
        assert!(!says(&together));
    }
    assert_eq!(site.status().cohorts["t1w"].n_same_patient, 0);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_full_window_of_one_patient_lets_nobody_go_without_a_result() {
    let mut site = Site::new(3, &["window.max_scans = 4"]);
    site.start();
    come(&site, 1..=3);
    site.wait("noticed", |site| site.status().n_reported >= 3);
    let waiting = Standing::WaitingForScans { have: 1, need: 3 };
    assert_eq!(site.sidecar(&stem(3)).unwrap().standing, waiting);
    come(&site, 4..=6);
    site.wait("all scored", |site| {
        let sidecars = (1..=6).map(|number| site.sidecar(&stem(number)));
        sidecars.flatten().filter(|sidecar| sidecar.standing == Standing::Scored).count() == 6
    });
    let sidecar = site.sidecar(&stem(6)).unwrap();
    assert!(sidecar.window.few_patients && sidecar.window.same_patient.is_empty());
    assert!(sidecar.warnings.iter().any(|warning| warning.contains("too few patients")));
    site.wait("shown", |site| site.status().cohorts["t1w"].few_patients);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_reload_that_makes_a_waiting_window_full_scores_those_who_leave_it_first() {
    let mut site = Site::new(3, &["window.max_scans = 20"]);
    site.start();
    come(&site, 1..=6);
    site.wait("noticed", |site| site.status().n_reported >= 6);
    site.configure(3, &["window.max_scans = 4"]);
    site.signal(Signal::HUP);
    let sidecars = |site: &Site| -> Vec<Sidecar> {
        (1..=6).map(|number| site.sidecar(&stem(number)).unwrap()).collect()
    };
    site.wait("all scored", |site| {
        let scored = |sidecar: &Sidecar| sidecar.standing == Standing::Scored;
        sidecars(site).iter().all(scored) && site.status().cohorts["t1w"].n_scans == 4
    });
    let unscored = "oddscan_store_evictions_total{reason=\"unscored\"}";
    assert_eq!(site.metric(unscored), 0.0);
    // Asked for, it is no longer the window's fault.
    site.configure(3, &["window.max_scans = 4", "window.compare_same_patient = true"]);
    site.signal(Signal::HUP);
    site.wait("renewed", |site| {
        sidecars(site).iter().filter(|sidecar| !sidecar.window.few_patients).count() == 4
    });
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_session_scores_as_it_would_without_the_others_of_its_patient() {
    // With the correction by place it would change a little, because these are compared with one
    // more scan.
    const NOT_CORRECTED: &str = "scoring.positional_correction = 0.0";
    let site = Site::new(2, &[NOT_CORRECTED, "community.enabled = true"]);
    let scans = site.path("scans");
    fs::create_dir(&scans).unwrap();
    let put = |name: &str, bytes: &[u8]| fs::write(scans.join(name), bytes).unwrap();
    for seed in 2..=5 {
        put(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
    }
    put("sub-1_ses-1_T1w.nii.gz", &session(1, 1));
    let score = |out: &str| {
        let mut score = oddscan();
        score.args(["score", "--config"]).arg(site.path("config.toml"));
        let output = score.arg("--out").arg(site.path(out)).arg(&scans).output().unwrap();
        let (_, stderr, code) = said(&output);
        assert_eq!(code, Some(0), "{stderr}");
        fs::read(site.path(out).join("sub-1_ses-1_T1w_anomaly-map.nii.gz")).unwrap()
    };
    let alone = score("alone");
    put("sub-1_ses-2_T1w.nii.gz", &session(1, 2));
    assert!(score("beside") == alone, "bit for bit");
    site.configure(2, &[NOT_CORRECTED, "window.compare_same_patient = true"]);
    assert!(score("together") != alone);
}

#[test]
fn a_session_under_another_name_is_found_by_its_tokens_and_not_compared() {
    const NOT_CORRECTED: &str = "scoring.positional_correction = 0.0";
    let site = Site::new(2, &[NOT_CORRECTED]);
    let scans = site.path("scans");
    fs::create_dir(&scans).unwrap();
    let put = |name: &str, bytes: &[u8]| fs::write(scans.join(name), bytes).unwrap();
    for seed in 2..=6 {
        put(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
    }
    put("sub-1_T1w.nii.gz", &session(1, 1));
    let score = |out: &str| {
        let mut score = oddscan();
        score.args(["score", "--config"]).arg(site.path("config.toml"));
        let output = score.arg("--out").arg(site.path(out)).arg(&scans).output().unwrap();
        let (_, stderr, code) = said(&output);
        assert_eq!(code, Some(0), "{stderr}");
        let map = fs::read(site.path(out).join("sub-1_T1w_anomaly-map.nii.gz")).unwrap();
        (map, stderr)
    };
    let (alone, stderr) = score("alone");
    assert!(!stderr.contains("follow_up_ratio"), "{stderr}");

    put("sub-9_T1w.nii.gz", &session(1, 2));
    let (beside, stderr) = score("results");
    assert!(beside == alone, "bit for bit");
    assert!(stderr.contains("scoring.follow_up_ratio = 0"), "{stderr}");
    let [first, second, other] =
        ["sub-1_T1w", "sub-9_T1w", "sub-2_T1w"].map(|stem| site.sidecar(stem).unwrap());
    let mut pair = vec![first.scan_id, second.scan_id];
    pair.sort();
    let says = |sidecar: &Sidecar, text: &str| sidecar.warnings.iter().any(|w| w.contains(text));
    for sidecar in [&first, &second] {
        assert_eq!(sidecar.window.hidden_follow_ups, [pair.clone()]);
        assert!(says(sidecar, "taken for scans of one person"), "{:?}", sidecar.warnings);
        // The names say that these are two people.
        assert!(says(sidecar, "different patients"), "{:?}", sidecar.warnings);
    }
    assert_eq!(other.window.hidden_follow_ups, [pair]);
    assert!(!says(&other, "one person"), "{:?}", other.warnings);

    site.configure(2, &[NOT_CORRECTED, "scoring.follow_up_ratio = 0"]);
    assert!(score("together").0 != alone);
}

#[test]
fn series_of_one_patient_are_told_by_the_header_and_the_number_goes_nowhere() {
    let site = Site::new(2, &SOON);
    let Some(_) = brain_series_of("MRN-4711", &site.path("one/first"), 1) else { return };
    brain_series_of("MRN-4711", &site.path("one/second"), 2).unwrap();
    let score = || {
        let mut score = oddscan();
        score.args(["score", "--config"]).arg(site.path("config.toml"));
        said(&score.arg("--out").arg(site.path("results")).arg(site.path("one")).output().unwrap())
    };
    let (stdout, stderr, code) = score();
    assert_eq!(code, Some(65));
    assert!(stderr.contains("the 2 scans of its cohort (t1w) are of one patient"), "{stderr}");
    brain_series(&site.path("one/third"), 3).unwrap();
    let (more, said_more, code) = score();
    assert_eq!(code, Some(0), "{said_more}");
    let groups = |seed| site.sidecar(&format!("{seed}_t1_mprage_sag_T1w")).unwrap().window;
    assert_eq!(groups(3).same_patient.iter().map(Vec::len).collect::<Vec<_>>(), [2]);

    let mut dicom = oddscan();
    let output = dicom.arg("dicom").arg(site.path("one")).arg("--out").arg(site.path("out"));
    let (events, _, code) = said(&output.output().unwrap());
    assert_eq!(code, Some(0));
    let mut texts = vec![stdout, stderr, more, said_more, events];
    for folder in ["results", "out"] {
        let files = names(&site.path(folder)).into_iter().filter(|name| name.ends_with(".json"));
        texts.extend(files.map(|name| fs::read_to_string(site.path(folder).join(name)).unwrap()));
    }
    assert!(texts.len() >= 11);
    for text in texts {
        assert!(!text.contains("4711") && !text.contains("\"patient\""), "{text}");
    }
}
