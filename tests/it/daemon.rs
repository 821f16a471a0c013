//! The daemon from start to stop: the real binary in a folder of its own, with a tiny network.

use std::{fs, io::Write, thread, time::Duration};

use oddscan::{
    domain::scan::ScanRecord,
    ingest::look_at,
    ledger::{SeenFile, SeenList, SeenOutcome},
    numeric::geometry::{Affine, WorldPoint},
    quarantine::ReasonFile,
    report::{Standing, read_sidecar},
    store::{MIN_MEMORY, Store},
};
use rustix::process::Signal;

use crate::{
    hostile::{at, hostile_files, patched},
    support::{Site, names, oddscan, put_record, records, said, scan_bytes},
};

const ENDINGS: [&str; 4] = ["-map.nii.gz", "-mask.nii.gz", ".png", ".json"];

fn stems(n: u64) -> Vec<String> {
    (1..=n).map(|seed| format!("sub-{seed}_T1w")).collect()
}

fn drop_scans(site: &Site, seeds: impl IntoIterator<Item = u64>) {
    for seed in seeds {
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
    }
}

fn wait_scored(site: &Site, n: u64) {
    let stems = stems(n);
    site.wait_scored(&stems.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Waits until each has a result, of any window.
fn wait_each_scored(site: &Site, n: u64) {
    let is_scored = |stem: &String| {
        site.sidecar(stem).is_some_and(|sidecar| sidecar.standing == Standing::Scored)
    };
    site.wait("each scored", |_| stems(n).iter().all(is_scored));
}

/// Maps and masks of the scans. They must not depend on how they were made.
fn maps(site: &Site, n: u64) -> Vec<Vec<u8>> {
    let both = |stem: &String| [&ENDINGS[0], &ENDINGS[1]].map(|ending| site.result(stem, ending));
    stems(n).iter().flat_map(both).collect()
}

/// The same files scored once, without daemon and store.
fn from_scratch(site: &Site, n: u64) -> Vec<Vec<u8>> {
    let out = site.path("from-scratch");
    let mut score = oddscan();
    score.args(["score", "--config"]).arg(site.path("config.toml")).arg("--out").arg(&out);
    score.args(stems(n).iter().map(|stem| site.path("incoming").join(format!("{stem}.nii.gz"))));
    let output = score.output().unwrap();
    assert!(output.status.success(), "{}", said(&output).1);
    let file = |stem: &String| {
        [&ENDINGS[0], &ENDINGS[1]]
            .map(|ending| fs::read(out.join(format!("{stem}_anomaly{ending}"))).unwrap())
    };
    stems(n).iter().flat_map(file).collect()
}

#[test]
fn scans_that_arrive_one_by_one_get_the_results_of_a_scoring_from_scratch() {
    let mut site = Site::new(3, &["community.enabled = true", "encoder.layers = [1, 2]"]);
    site.start();
    drop_scans(&site, [1, 2]);
    site.wait("waiting", |site| {
        site.sidecar("sub-1_T1w").is_some_and(|sidecar| {
            matches!(sidecar.standing, Standing::WaitingForScans { need: 3, .. })
        })
    });
    assert_eq!(names(&site.path("results")).iter().filter(|n| n.ends_with(".png")).count(), 0);
    drop_scans(&site, [3]);
    wait_scored(&site, 3);
    let first = site.sidecar("sub-1_T1w").unwrap();
    drop_scans(&site, [4, 5]);
    wait_scored(&site, 5);
    let last = site.sidecar("sub-1_T1w").unwrap();
    assert!(last.revision > first.revision);
    assert_ne!(last.window.id, first.window.id);
    for stem in stems(5) {
        for ending in ENDINGS {
            assert!(!site.result(&stem, ending).is_empty());
        }
    }
    assert_eq!(names(&site.path("results")).len(), 5 * ENDINGS.len(), "and nothing else");
    assert_eq!(maps(&site, 5), from_scratch(&site, 5), "bit for bit");
    assert_eq!(site.metric("oddscan_ready"), 1.0);
    assert_eq!(site.status().n_accepted, 5);
    assert_eq!(site.stop(), Some(0));
}

/// A scan with signal outside of a brain.
fn no_brain(spacing_mm: f64, inside: impl Fn([usize; 3]) -> bool) -> Vec<u8> {
    let mut volume = crate::support::brain(1);
    volume.affine = Affine::scaling(spacing_mm, WorldPoint([0.0; 3])).unwrap();
    for (offset, voxel) in volume.voxels.iter_mut().enumerate() {
        let is_inside = inside(volume.shape.voxel(offset));
        *voxel = if is_inside { 1.0 + (offset % 7) as f32 } else { 0.0 };
    }
    oddscan::nifti::encode_volume(&volume)
}

#[test]
fn what_is_wrong_goes_to_quarantine_with_its_reason_and_the_others_are_scored() {
    let mut site = Site::new(3, &["intake.max_megavoxels = 1", "intake.max_file_mib = 16"]);
    site.start();
    let mut expected = Vec::new();
    for (name, bytes, reason) in hostile_files() {
        let name = format!("{name}_T1w.nii.gz");
        site.drop_in(&name, &bytes);
        expected.push((name, reason.name()));
    }
    let constant = {
        let mut volume = crate::support::brain(1);
        volume.voxels.fill(7.0);
        oddscan::nifti::encode_volume(&volume)
    };
    let nothing = {
        let mut volume = crate::support::brain(1);
        volume.voxels.fill(0.0);
        oddscan::nifti::encode_volume(&volume)
    };
    let no_brains = [
        ("constant_T1w.nii.gz", constant),
        ("nothing_T1w.nii.gz", nothing),
        ("speckle_T1w.nii.gz", no_brain(6.0, |[x, y, z]| (3 * x + 5 * y + 6 * z) % 8 == 0)),
        ("bottles_T1w.nii.gz", no_brain(12.0, |[x, y, z]| !(5..21).contains(&x) && y.max(z) < 6)),
        ("metres_T1w.nii.gz", patched(&[(at::XYZT_UNITS, &[1])])),
    ];
    for (name, bytes) in no_brains {
        site.drop_in(name, &bytes);
        expected.push((name.to_owned(), "no_brain"));
    }
    fs::create_dir(site.path("incoming").join("x.nii")).unwrap();
    expected.push(("x.nii".to_owned(), "unsupported"));
    drop_scans(&site, 1..=3);
    wait_scored(&site, 3);
    site.drop_in("copy_T1w.nii.gz", &scan_bytes(1));
    let n_refused = expected.len() as u64;
    site.wait("all refused", |site| site.status().n_quarantined == n_refused);
    for (name, reason) in &expected {
        let folder = site.path("quarantine").join(reason).join(name);
        // A folder is not moved: a link in it could lead to anything.
        let is_moved = name != "x.nii";
        let n_files = if is_moved { 2 } else { 1 };
        assert_eq!(names(&folder).len(), n_files, "{name}: its reason, and the file");
        let text = fs::read_to_string(folder.join("reason.json")).unwrap();
        let file: ReasonFile = serde_json::from_str(&text).unwrap();
        assert_eq!(file.refusal.reason.name(), *reason);
        assert!(file.moved == is_moved && !file.refusal.action.is_empty(), "{text}");
        assert_eq!(site.path("incoming").join(name).exists(), !is_moved);
    }
    site.wait("the copy recognised", |site| site.status().n_duplicates == 1);
    assert!(site.sidecar("copy_T1w").is_none());
    assert!(site.path("incoming/copy_T1w.nii.gz").exists(), "a copy is left alone");
    let refused = "oddscan_ingest_volumes_total{result=\"quarantined\"}";
    assert_eq!(site.metric(refused), expected.len() as f64);
    // Logs and metrics show no file name, because it can contain a patient's name.
    for text in [site.log(), site.get("/metrics").unwrap(), site.get("/status.json").unwrap()] {
        assert!(!text.contains("T1w.nii") && !text.contains("sub-1"), "{text}");
    }
    assert!(site.is_running());
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_kill_at_any_moment_loses_nothing_and_does_nothing_twice() {
    let mut site = Site::new(3, &[]);
    drop_scans(&site, 1..=6);
    // From before the first scan settles until after the last result. Never three short ones in a
    // row: a scan that is read at three crashes counts as their cause.
    for milliseconds in [50, 350, 1000, 400, 1500, 300, 1200, 600] {
        site.start();
        thread::sleep(Duration::from_millis(milliseconds));
        site.kill();
        for name in names(&site.path("results")).iter().filter(|name| name.ends_with(".json")) {
            read_sidecar(&site.path("results").join(name)).unwrap();
        }
    }
    site.start();
    wait_scored(&site, 6);
    let before = stems(6).iter().map(|stem| site.sidecar(stem).unwrap().revision).max();
    // Results from before the last kill may exist before the window is restored.
    site.wait("idle", |site| {
        site.status().cohorts.get("t1w").is_some_and(|cohort| cohort.n_outdated == 0)
    });
    assert_eq!(site.status().cohorts["t1w"].n_scans, 6);
    assert_eq!(site.stop(), Some(0));
    assert_eq!(maps(&site, 6), from_scratch(&site, 6), "bit for bit");
    assert_eq!(names(&site.path("results")).len(), 6 * ENDINGS.len(), "no half-written files");
    assert_eq!(names(&site.path("quarantine")), Vec::<String>::new());
    // Nothing is left to do, so that nothing is written.
    site.start();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(site.status().n_reported, 0);
    let after = stems(6).iter().map(|stem| site.sidecar(stem).unwrap().revision).max();
    assert_eq!(before, after);
}

#[test]
fn results_that_are_written_side_by_side_are_those_of_a_single_writer() {
    let stems = ["a_T1w", "b_T1w", "c_T1w", "d_T1w", "e_T1w", "f_T1w"];
    let mut found = Vec::new();
    // One writer, and four.
    for threads in ["1", "16"] {
        let mut site = Site::new(stems.len(), &[]);
        site.start_with(&[("RAYON_NUM_THREADS", threads)]);
        for (seed, stem) in (0..).zip(stems) {
            site.drop_in(&format!("{stem}.nii.gz"), &scan_bytes(seed));
        }
        site.wait_scored(&stems);
        let results = stems
            .map(|stem| ["-map.nii.gz", "-mask.nii.gz", ".png"].map(|end| site.result(stem, end)));
        found.push(results);
        assert_eq!(site.status().n_unscored, 0);
        assert_eq!(site.stop(), Some(0));
    }
    assert_eq!(found[0], found[1]);
}

#[test]
fn a_flood_passes_through_a_window_that_stays_small() {
    let mut site = Site::new(3, &["window.max_scans = 4"]);
    site.start();
    drop_scans(&site, 1..=40);
    site.wait("all accepted", |site| site.status().n_accepted == 40);
    site.wait("the last scored", |site| {
        site.sidecar("sub-40_T1w").is_some_and(|sidecar| sidecar.standing == Standing::Scored)
            || site.status().cohorts["t1w"].n_outdated == 0
    });
    site.wait("idle", |site| {
        let status = site.status();
        let n_waiting = status.n_waiting + status.n_unscored;
        n_waiting == 0 && status.in_hand.is_none() && status.cohorts["t1w"].n_outdated == 0
    });
    assert_eq!(site.status().cohorts["t1w"].n_scans, 4);
    assert_eq!(site.metric("oddscan_store_evictions_total{reason=\"window\"}"), 36.0);
    for stem in stems(40) {
        let sidecar = site.sidecar(&stem).unwrap();
        assert_eq!(sidecar.standing, Standing::Scored, "{stem} left the window with a result");
    }
    let n_archived = names(&site.path("state/sources")).len();
    assert!(n_archived <= 4, "sources of evicted scans are gone: {n_archived}");
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_flood_that_a_stop_and_a_kill_cut_off_leaves_no_scan_without_a_result() {
    let mut site = Site::new(3, &["window.max_scans = 4"]);
    drop_scans(&site, 1..=30);
    site.start();
    site.wait("some accepted", |site| site.status().n_accepted >= 9);
    assert_eq!(site.stop(), Some(0));
    site.start();
    site.wait("more accepted", |site| site.status().n_accepted >= 4);
    site.kill();
    site.start();
    wait_each_scored(&site, 30);
}

#[test]
fn results_that_cannot_be_written_are_written_when_the_folder_is_back() {
    let mut site = Site::new(2, &[]);
    site.start();
    fs::rename(site.path("results"), site.path("away")).unwrap();
    drop_scans(&site, [1, 2]);
    let failed = "oddscan_outputs_total{kind=\"score_map\",result=\"failed\"}";
    site.wait("failed", |site| site.metric(failed) > 0.0);
    assert!(site.status().cohorts["t1w"].n_outdated > 0, "the stale results show");
    site.wait("said", |site| site.get("/readyz").unwrap().contains("the results folder cannot"));
    let page = site.get("/metrics").unwrap();
    let free = |kind| format!("oddscan_filesystem_avail_bytes{{directory=\"{kind}\"}}");
    assert!(page.contains(&free("state")) && !page.contains(&free("output")), "{page}");
    fs::rename(site.path("away"), site.path("results")).unwrap();
    wait_scored(&site, 2);
    site.wait("ready again", |site| site.metric("oddscan_ready") == 1.0);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn no_scan_leaves_its_window_without_a_result_while_the_folder_is_away() {
    let mut site = Site::new(2, &["window.max_scans = 3"]);
    site.start();
    drop_scans(&site, 1..=2);
    wait_scored(&site, 2);
    let (folder, away) = (site.path("results"), site.path("away"));
    fs::rename(&folder, &away).unwrap();
    drop_scans(&site, 3..=9);
    site.wait("more than the window holds", |site| site.status().n_accepted >= 7);
    fs::rename(&away, &folder).unwrap();
    wait_each_scored(&site, 9);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_smaller_window_waits_for_the_results_of_those_that_have_to_leave() {
    let mut site = Site::new(2, &["window.max_scans = 9"]);
    site.start();
    drop_scans(&site, 1..=2);
    wait_scored(&site, 2);
    let (folder, away) = (site.path("results"), site.path("away"));
    fs::rename(&folder, &away).unwrap();
    drop_scans(&site, 3..=6);
    site.wait("all are members", |site| site.status().cohorts["t1w"].n_scans == 6);
    site.configure(2, &["window.max_scans = 2"]);
    site.signal(Signal::HUP);
    thread::sleep(Duration::from_secs(1));
    fs::rename(&away, &folder).unwrap();
    wait_each_scored(&site, 6);
    site.wait("the smaller window", |site| site.status().cohorts["t1w"].n_scans == 2);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_smaller_window_of_scored_scans_is_scored_once() {
    let mut site = Site::new(2, &[]);
    site.start();
    drop_scans(&site, 1..=4);
    wait_scored(&site, 4);
    site.configure(2, &["window.max_scans = 2"]);
    site.signal(Signal::HUP);
    site.wait("the smaller window", |site| {
        let cohort = &site.status().cohorts["t1w"];
        (cohort.n_scans, cohort.n_outdated) == (2, 0)
    });
    let runs = "oddscan_score_runs_total{cohort=\"t1w\",result=\"ok\",trigger=\"reload\"}";
    assert_eq!(site.metric(runs), 1.0);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_file_that_was_in_hand_at_three_crashes_is_set_aside_and_may_come_back() {
    let mut site = Site::new(2, &[]);
    drop_scans(&site, 1..=2);
    {
        let (seen, _) = SeenList::open(&site.path("state/seen")).unwrap();
        let look = look_at(&site.path("incoming/sub-1_T1w.nii.gz")).unwrap();
        let reading = SeenOutcome::Reading { attempts: 3 };
        fs::write(site.path("state/running"), "").unwrap();
        seen.put(b"sub-1_T1w.nii.gz", &SeenFile::new(look, reading)).unwrap();
    }
    site.start();
    site.wait("set aside", |site| site.status().n_quarantined == 1);
    let folder = site.path("quarantine/poison/sub-1_T1w.nii.gz");
    assert_eq!(names(&folder), ["reason.json", "sub-1_T1w.nii.gz"]);
    fs::rename(folder.join("sub-1_T1w.nii.gz"), site.path("incoming/sub-1_T1w.nii.gz")).unwrap();
    wait_scored(&site, 2);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_file_that_was_in_hand_when_errors_ended_the_daemon_is_not_to_blame() {
    let mut site = Site::new(2, &[]);
    drop_scans(&site, 1..=2);
    {
        let (seen, _) = SeenList::open(&site.path("state/seen")).unwrap();
        let look = look_at(&site.path("incoming/sub-1_T1w.nii.gz")).unwrap();
        let reading = SeenOutcome::Reading { attempts: 3 };
        seen.put(b"sub-1_T1w.nii.gz", &SeenFile::new(look, reading)).unwrap();
    }
    site.start();
    wait_scored(&site, 2);
    assert!(site.path("state/running").exists());
    assert_eq!(site.stop(), Some(0));
    assert!(!site.path("state/running").exists());

    let record = records(&site.path("state")).swap_remove(0);
    put_record(&site.path("state"), &ScanRecord { attempts: 3, ..record.clone() });
    let store = Store::open(&site.path("state/store"), MIN_MEMORY).unwrap().store;
    store.remove(&record.id).unwrap();
    drop(store);
    site.start();
    site.wait("encoded again", |site| {
        let cohort = &site.status().cohorts["t1w"];
        (cohort.n_scans, cohort.n_rebuilding, cohort.n_outdated) == (2, 0, 0)
    });
    assert_eq!(site.status().n_quarantined, 0);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn files_that_were_in_hand_together_at_two_crashes_are_not_all_to_blame() {
    let mut site = Site::new(3, &[]);
    drop_scans(&site, 1..=3);
    let list = || SeenList::open(&site.path("state/seen")).unwrap().0;
    let outcome = |list: &SeenList, seed: u64| {
        list.get(format!("sub-{seed}_T1w.nii.gz").as_bytes()).map(|seen| seen.outcome)
    };
    fs::write(site.path("state/running"), "").unwrap();
    {
        let list = list();
        for seed in 1..=3 {
            let name = format!("sub-{seed}_T1w.nii.gz");
            let look = look_at(&site.path("incoming").join(&name)).unwrap();
            let reading = SeenOutcome::Reading { attempts: 2 };
            list.put(name.as_bytes(), &SeenFile::new(look, reading)).unwrap();
        }
    }
    site.start();
    wait_scored(&site, 3);
    assert_eq!(site.status().n_quarantined, 0);
    assert_eq!(site.stop(), Some(0));
    let list = SeenList::open(&site.path("state/seen")).unwrap().0;
    assert!((1..=3).all(|seed| matches!(outcome(&list, seed), Some(SeenOutcome::Accepted(_)))));
}

#[test]
fn a_scan_that_was_in_hand_at_three_crashes_of_the_encoder_may_come_back() {
    let mut site = Site::new(2, &[]);
    site.start();
    drop_scans(&site, 1..=2);
    wait_scored(&site, 2);
    assert_eq!(site.stop(), Some(0));
    {
        let store = Store::open(&site.path("state/store"), MIN_MEMORY).unwrap().store;
        let record = records(&site.path("state")).swap_remove(0);
        store.remove(&record.id).unwrap();
        fs::write(site.path("state/running"), "").unwrap();
        put_record(&site.path("state"), &ScanRecord { attempts: 3, ..record });
    }
    site.start();
    site.wait("set aside", |site| site.status().n_quarantined == 1);
    let name = names(&site.path("quarantine/poison")).swap_remove(0);
    let folder = site.path("quarantine/poison").join(&name);
    // Under its own name, not under the archive's name.
    assert_eq!(names(&folder), ["reason.json", &name]);
    fs::rename(folder.join(&name), site.path("incoming").join(format!("again_{name}"))).unwrap();
    site.wait("taken again", |site| {
        site.status().cohorts.get("t1w").is_some_and(|cohort| cohort.n_scans == 2)
    });
    assert_eq!(site.status().n_duplicates, 0);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_full_disk_pauses_intake_and_every_page_says_so() {
    let mut site = Site::new(2, &[]);
    site.start();
    site.configure(2, &["service.min_free_mib = 1000000000"]);
    site.signal(Signal::HUP);
    let paused = "oddscan_not_ready{reason=\"disk_low\"}";
    site.wait("paused", |site| site.metric(paused) == 1.0);
    drop_scans(&site, 1..=2);
    site.wait("whole", |site| site.metric("oddscan_queue_studies{stage=\"decode\"}") == 2.0);
    assert_eq!(site.metric("oddscan_ready"), 0.0);
    assert!(site.get("/readyz").unwrap().contains("disk low"));
    assert_eq!(site.status().n_accepted, 0);
    site.configure(2, &[]);
    site.signal(Signal::HUP);
    wait_scored(&site, 2);
    assert_eq!(site.metric("oddscan_ready"), 1.0);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_slow_copy_is_read_when_it_is_whole() {
    let mut site = Site::new(2, &["intake.settle_secs = 0.6"]);
    site.start();
    let bytes = scan_bytes(1);
    let mut file = fs::File::create(site.path("incoming/sub-1_T1w.nii.gz")).unwrap();
    for part in bytes.chunks(bytes.len() / 6) {
        file.write_all(part).unwrap();
        file.sync_all().unwrap();
        thread::sleep(Duration::from_millis(250));
    }
    site.wait("accepted", |site| site.status().n_accepted == 1);
    assert_eq!(site.status().n_quarantined, 0);
}

#[test]
fn settings_are_reloaded_on_a_signal_and_wrong_ones_change_nothing() {
    let mut site = Site::new(5, &[]);
    site.start();
    drop_scans(&site, 1..=3);
    site.wait("encoded", |site| site.status().cohorts.get("t1w").is_some_and(|c| c.n_scans == 3));
    // A valid setting beside a faulty one is not taken over either.
    site.configure(3, &["window.max_scans = \"many\""]);
    site.signal(Signal::HUP);
    let reload = "oddscan_config_last_reload_successful";
    site.wait("refused", |site| site.metric(reload) == 0.0);
    assert_eq!(site.status().cohorts["t1w"].min_scans, 5);
    // `oddscan status` works with wrong settings.
    site.configure(5, &["window.min_scan = 3"]);
    let mut status = oddscan();
    let output = status.arg("status").arg("--config").arg(site.path("config.toml")).output();
    let (stdout, stderr, code) = said(&output.unwrap());
    assert!(code == Some(0) && stderr.contains("window.min_scan"), "{stderr}");
    assert!(stdout.contains("t1w: 3 scans"), "{stdout}");
    site.configure(3, &["volume.side = 70"]);
    site.signal(Signal::HUP);
    site.wait("reloaded", |site| site.status().cohorts["t1w"].min_scans == 3);
    // The daemon would not start with these.
    site.configure(4, &["volume.side = 60"]);
    site.signal(Signal::HUP);
    site.wait("refused", |site| site.metric(reload) == 0.0);
    assert_eq!(site.status().cohorts["t1w"].min_scans, 3);
    site.configure(3, &["volume.side = 70"]);
    site.signal(Signal::HUP);
    site.wait("reloaded", |site| site.metric(reload) == 1.0);
    assert!(site.log().contains("volume.side"), "a key that needs a restart is named");
    wait_scored(&site, 3);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_second_daemon_on_the_same_address_is_refused() {
    let mut site = Site::new(3, &[]);
    site.start();
    let mut run = oddscan();
    let second = run.arg("run").arg("--config").arg(site.path("config.toml")).output().unwrap();
    assert_eq!(second.status.code(), Some(74), "{}", said(&second).1);
    let elsewhere = "service.listen = \"127.0.0.1:0\"";
    let config = fs::read_to_string(site.path("config.toml")).unwrap();
    let with_listen = |line: &str| !line.starts_with("service.listen");
    let others: Vec<&str> = config.lines().filter(|line| with_listen(line)).collect();
    fs::write(site.path("other.toml"), format!("{}\n{elsewhere}", others.join("\n"))).unwrap();
    let third = oddscan().arg("run").arg("--config").arg(site.path("other.toml")).output().unwrap();
    assert!(said(&third).1.contains("does another oddscan work with this state folder"));
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn the_status_command_shows_what_the_daemon_does() {
    let mut site = Site::new(3, &[]);
    site.start();
    drop_scans(&site, [1]);
    site.wait("encoded", |site| site.status().cohorts.get("t1w").is_some_and(|c| c.n_scans == 1));
    let mut status = oddscan();
    let output = status.arg("status").arg("--config").arg(site.path("config.toml")).output();
    let (stdout, stderr, code) = said(&output.unwrap());
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("is ready") && stdout.contains("cohort t1w: 1 scans"), "{stdout}");
}
