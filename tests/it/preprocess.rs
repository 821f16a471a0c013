//! The site's own preprocessing. Small shell scripts stand in for HD-BET and N4.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use oddscan::{
    domain::scan::{BrainSource, ScanId},
    nifti::{self, Limits},
    numeric::{
        geometry::{Affine, Shape3},
        volume::RawVolume,
    },
    quarantine::ReasonFile,
    report::Standing,
};
use rustix::process::Signal;
use sha2::{Digest, Sha256};

use crate::{
    alignment::{T1, head, landmark_error_mm, placed, template_image},
    dicom::{SOON, brain_series, zip_of},
    support::{Site, brain, names, oddscan, said, scan_bytes},
};

/// A script that finds by the content of the scan what to do with it. It runs `deeds/<hash>`, else
/// `deeds/usual`, with `$scan`, `$out` and `$mask`.
const SCRIPT: &str = r#"#!/bin/sh
scan=$1 out=$2 mask=$3
site=$(dirname "$0")
hash=$(sha256sum < "$scan" | cut -c 1-64)
echo "$hash" >> "$site/runs"
deed="$site/deeds/$hash"
[ -e "$deed" ] || deed="$site/deeds/usual"
. "$deed"
"#;

/// A site whose scans go through [`SCRIPT`].
fn site(min_scans: usize, more: &[&str]) -> Site {
    let site = Site::new(min_scans, &[]);
    fs::create_dir(site.path("deeds")).unwrap();
    let script = site.path("hook");
    fs::write(&script, SCRIPT).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(site.path("version"), "\n  Hook 1.2  \nmore\n").unwrap();
    configure(&site, min_scans, more);
    site
}

fn configure(site: &Site, min_scans: usize, more: &[&str]) {
    let (script, version) = (site.path("hook"), site.path("version"));
    let command =
        format!("preprocess.command = [{script:?}, \"{{scan}}\", \"{{out}}\", \"{{mask}}\"]");
    let version = format!("preprocess.version_command = [\"/bin/cat\", {version:?}]");
    let own = [&command, &version, "preprocess.scans = \"all\"", "alignment.mode = \"never\""];
    let is_replaced = |line: &str| {
        let key = line.split(' ').next().unwrap();
        more.iter().any(|other| other.starts_with(&format!("{key} ")))
    };
    let lines: Vec<&str> =
        own.into_iter().filter(|line| !is_replaced(line)).chain(more.iter().copied()).collect();
    site.configure(min_scans, &lines);
}

/// Sets what the script does with a scan of this content.
fn deed(site: &Site, scan: &[u8], what: &str) {
    fs::write(site.path("deeds").join(hex::encode(Sha256::digest(scan))), what).unwrap();
}

fn usual(site: &Site, what: &str) {
    fs::write(site.path("deeds/usual"), what).unwrap();
}

fn n_runs(site: &Site) -> usize {
    fs::read_to_string(site.path("runs")).map_or(0, |runs| runs.lines().count())
}

/// The command `cp FROM TO` with content made here.
fn give(site: &Site, name: &str, bytes: &[u8], to: &str) -> String {
    let path = site.path(name);
    fs::write(&path, bytes).unwrap();
    format!("cp {} \"{to}\"\n", path.display())
}

fn with_voxels(like: &RawVolume, voxel: impl Fn([usize; 3], f32) -> f32) -> RawVolume {
    let of = |(offset, &value): (usize, &f32)| voxel(like.shape.voxel(offset), value);
    RawVolume { voxels: like.voxels.iter().enumerate().map(of).collect(), ..*like }
}

/// The brain without a slab on one side.
fn cut(like: &RawVolume) -> RawVolume {
    with_voxels(like, |[x, ..], value| f32::from(value > 0.0 && x > 6))
}

fn reason(site: &Site, name: &str) -> ReasonFile {
    let path = site.path("quarantine/preprocess_failed").join(name).join("reason.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The files that must not depend on how they were made.
fn maps(folder: &Path, stems: &[&str]) -> BTreeMap<String, Vec<u8>> {
    let file = |stem: &&str| {
        ["-map.nii.gz", "-mask.nii.gz"].map(|ending| {
            let name = format!("{stem}_anomaly{ending}");
            (name.clone(), fs::read(folder.join(name)).unwrap())
        })
    };
    stems.iter().flat_map(file).collect()
}

#[test]
fn the_brain_and_the_intensities_of_a_program_are_used_and_asked_for_once_per_scan() {
    let mut site = site(3, &[]);
    let stems = ["sub-1_T1w", "sub-2_T1w", "sub-3_T1w"];
    for seed in 1..=3 {
        let raw = brain(seed);
        let inverted = with_voxels(&raw, |_, value| if value > 0.0 { 300.0 - value } else { 0.0 });
        let out = give(&site, &format!("out-{seed}"), &nifti::encode_volume(&inverted), "$out");
        let mask = give(&site, &format!("mask-{seed}"), &nifti::encode_volume(&cut(&raw)), "$mask");
        deed(&site, &scan_bytes(seed), &format!("echo nothing to see; {out}{mask}"));
    }
    site.start();
    for seed in 1..=3 {
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
    }
    site.wait_scored(&stems);
    site.drop_in("copy_T1w.nii.gz", &scan_bytes(1));
    site.wait("the copy recognised", |site| site.status().n_duplicates == 1);
    for (seed, stem) in (1..).zip(stems) {
        let sidecar = site.sidecar(stem).unwrap();
        let raw = brain(seed);
        let inside: Vec<u8> = cut(&raw).voxels.iter().map(|&value| (value > 0.0).into()).collect();
        let mask = sidecar.brain_mask.unwrap();
        assert_eq!(mask.from, BrainSource::Program);
        assert_eq!(mask.sha256, hex::encode(Sha256::digest(&inside)));
        let n_inside = inside.iter().filter(|&&inside| inside == 1).count();
        let brain_ml = n_inside as f64 * raw.affine.voxel_volume_mm3() / 1000.0;
        assert!((sidecar.brain_ml - brain_ml).abs() < 0.1, "{} {brain_ml}", sidecar.brain_ml);
        let done = sidecar.preprocess.unwrap();
        assert_eq!((&*done.name, &*done.version), ("hook", "Hook 1.2"));
        assert!(done.scan_replaced && done.mask_made && done.secs > 0.0);
        let map = site.path("results").join(format!("{stem}_anomaly-map.nii.gz"));
        let map = nifti::read_map(&map, &Limits::NONE).unwrap();
        let mut came = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut came, &scan_bytes(seed)).unwrap();
        let came = nifti::read_map(came.path(), &Limits::NONE).unwrap();
        assert_eq!((map.shape, map.affine), (came.shape, came.affine));
        assert_eq!(sidecar.scan_id, ScanId::of(&came), "of the scan as it came");
        assert!(map.voxels.iter().zip(&cut(&raw).voxels).all(|(m, v)| *m == 0.0 || *v > 0.0));
    }
    let fingerprint = site.status().method;
    assert_eq!(n_runs(&site), 3, "not for results, not for the copy");
    assert!(!site.path("state/preprocess").exists(), "no scan is left there");
    assert_eq!(site.stop(), Some(0));
    site.encode_again();

    // `oddscan score` does the same.
    let out = site.path("from-scratch");
    let mut score = oddscan();
    score.args(["score", "--config"]).arg(site.path("config.toml")).arg("--out").arg(&out);
    score.args(stems.map(|stem| site.path("incoming").join(format!("{stem}.nii.gz"))));
    let output = score.output().unwrap();
    assert!(output.status.success(), "{}", said(&output).1);
    assert_eq!(n_runs(&site), 6);
    assert!(maps(&out, &stems) == maps(&site.path("results"), &stems), "bit for bit");

    // Another version is another method. The scans of the first one wait until it is back.
    let n_scans = |site: &Site| site.status().cohorts.get("t1w").map_or(0, |cohort| cohort.n_scans);
    fs::write(site.path("version"), "Hook 1.3\n").unwrap();
    site.start();
    assert_ne!(site.status().method, fingerprint);
    site.drop_in("sub-4_T1w.nii.gz", &scan_bytes(4));
    usual(&site, &give(&site, "mask", &nifti::encode_volume(&cut(&brain(4))), "$mask"));
    site.wait("told", |site| site.sidecar("sub-4_T1w").is_some());
    assert_eq!(n_scans(&site), 1);
    assert_eq!(site.sidecar("sub-4_T1w").unwrap().preprocess.unwrap().version, "Hook 1.3");
    assert_eq!(site.stop(), Some(0));
    fs::write(site.path("version"), "Hook 1.2\n").unwrap();
    site.start();
    assert_eq!(site.status().method, fingerprint);
    site.wait("taken up", |site| n_scans(site) == 3);
    assert_eq!(n_runs(&site), 7);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn what_a_program_fails_with_goes_to_quarantine_and_the_others_are_scored() {
    let limits = [
        "preprocess.timeout_secs = 4.0",
        "preprocess.max_output_mib = 8",
        "preprocess.memory_mib = 300",
        "preprocess.name = \"Stripper\"",
    ];
    let mut site = site(2, &limits);
    let raw = brain(1);
    let encoded = |volume: &RawVolume| nifti::encode_volume(volume);
    let mut rows = raw.affine.rows();
    rows[0][3] += 3.0;
    let moved = RawVolume { affine: Affine::new(rows).unwrap(), ..raw.clone() };
    let [nx, ny, nz] = raw.shape.0;
    let turned = RawVolume { shape: Shape3([ny, nx, nz]), ..raw.clone() };
    let mut refused = vec![
        ("fails", "echo 'cannot do it' >&2; exit 3".to_owned(), "ended with exit code 3"),
        ("nothing", ":".to_owned(), "wrote neither {out} nor {mask}"),
        ("sleeps", "sleep 300".to_owned(), "took more than 4 s"),
        ("garbage", "echo garbage > \"$out\"".to_owned(), "an {out} that is no scan"),
        ("link", format!("ln -s {} \"$mask\"", site.path("mask").display()), "no regular file"),
        ("floods", "exec head -c 1G /dev/zero > \"$out\"".to_owned(), "wrote more than 8 MiB"),
        (
            "litters",
            "for i in 1 2 3 4; do head -c 5M /dev/zero > $i; done; sleep 300".to_owned(),
            "wrote more than 8 MiB",
        ),
        (
            "hungry",
            "exec dd if=/dev/zero of=/dev/null bs=900M count=1".to_owned(),
            "ended with exit code 1",
        ),
        ("killed", "kill -9 $$".to_owned(), "was killed twice"),
        ("crashes", "kill -SEGV $$".to_owned(), "died of signal 11"),
    ];
    refused.push(("moved", give(&site, "moved", &encoded(&moved), "$out"), "up to 3.00 mm off"));
    refused.push(("turned", give(&site, "turned", &encoded(&turned), "$mask"), "[30, 26, 24]"));
    refused[3].2 = "a {out} that is no scan";
    for (seed, (name, what, _)) in (10..).zip(&refused) {
        deed(&site, &scan_bytes(seed), what);
        site.drop_in(&format!("{name}_T1w.nii.gz"), &scan_bytes(seed));
    }
    // A child in the background delays nothing and does not survive.
    let child = site.path("child");
    let background = format!("sleep 300 & echo $! > {}\n", child.display());
    let mask = give(&site, "mask", &encoded(&cut(&raw)), "$mask");
    usual(&site, &(background + &mask));
    for seed in 1..=2 {
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
    }
    site.start();
    let n_refused = refused.len() as u64;
    site.wait("all refused", |site| site.status().n_quarantined == n_refused);
    site.wait_scored(&["sub-1_T1w", "sub-2_T1w"]);
    for (name, _, found) in &refused {
        let reason = reason(&site, &format!("{name}_T1w.nii.gz"));
        assert!(reason.refusal.found.contains(found), "{name}: {:?}", reason.refusal);
        assert!(reason.refusal.found.contains("Stripper"), "{name}");
    }
    let sidecar = site.sidecar("sub-1_T1w").unwrap();
    assert!(!sidecar.preprocess.unwrap().scan_replaced);
    let log = site.log();
    assert!(log.contains("cannot do it"), "its last words are in the log:\n{log}");
    assert!(!log.contains("T1w"), "and no name of a file:\n{log}");
    let child = fs::read_to_string(child).unwrap();
    assert!(!is_alive(child.trim()), "the child in the background lives on");
    let series = "oddscan_quarantined_total{reason=\"preprocess_failed\"}";
    assert_eq!(site.metric(series), n_refused as f64);
    assert_eq!(site.stop(), Some(0));
}

/// Whether a process runs. A dead one that is not yet reaped does not.
fn is_alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).is_some_and(|state| state != 'Z')
}

#[test]
fn a_program_that_is_gone_is_no_fault_of_the_scans() {
    let mut site = site(2, &[]);
    usual(&site, &give(&site, "mask", &nifti::encode_volume(&cut(&brain(1))), "$mask"));
    site.start();
    fs::rename(site.path("hook"), site.path("away")).unwrap();
    let paused = "oddscan_not_ready{reason=\"preprocess_gone\"}";
    site.wait("paused", |site| site.metric(paused) == 1.0);
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    site.wait("whole", |site| site.metric("oddscan_queue_studies{stage=\"decode\"}") == 1.0);
    assert!(site.get("/readyz").unwrap().contains("preprocess.command"));
    fs::rename(site.path("away"), site.path("hook")).unwrap();
    site.wait("taken", |site| site.status().n_accepted == 1);
    assert_eq!(site.metric(paused), 0.0);
    // A script that exists and calls a program that does not.
    deed(&site, &scan_bytes(2), "/nowhere/hd-bet\n");
    site.drop_in("sub-2_T1w.nii.gz", &scan_bytes(2));
    site.wait("said", |site| {
        site.status().reasons.iter().any(|reason| reason.contains("cannot be started"))
    });
    assert_eq!((site.status().n_quarantined, site.status().n_accepted), (0, 1));
    fs::remove_dir_all(site.path("deeds")).unwrap();
    fs::create_dir(site.path("deeds")).unwrap();
    usual(&site, &format!("cp {} \"$mask\"", site.path("mask").display()));
    site.wait_scored(&["sub-1_T1w", "sub-2_T1w"]);
    site.wait("unsaid", |site| site.status().reasons.is_empty());
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_stop_or_a_kill_ends_the_program_and_the_scan_is_taken_at_the_next_start() {
    let mut site = site(2, &[]);
    let pid = site.path("pid");
    let mask = give(&site, "mask", &nifti::encode_volume(&cut(&brain(1))), "$mask");
    usual(&site, &mask);
    deed(&site, &scan_bytes(1), &format!("echo $$ > {}\nexec sleep 300", pid.display()));
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    let asleep = |site: &Site| -> String {
        site.wait("asleep", |_| fs::read_to_string(&pid).is_ok_and(|pid| pid.ends_with('\n')));
        let text = fs::read_to_string(&pid).unwrap();
        fs::remove_file(&pid).unwrap();
        text.trim().to_owned()
    };
    site.start();
    let process = asleep(&site);
    assert!(site.status().line().contains("preprocessing by "), "{}", site.status().line());
    let started = Instant::now();
    assert_eq!(site.stop(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(10) && !is_alive(&process));
    assert!(!site.path("state/preprocess").exists());

    site.start();
    let process = asleep(&site);
    site.kill();
    site.wait("dead", |_| !is_alive(&process));
    assert!(site.path("state/preprocess/scan.nii.gz").exists(), "a kill leaves it");
    let (file, away) = (site.path("incoming/sub-1_T1w.nii.gz"), site.path("away"));
    fs::rename(&file, &away).unwrap();
    site.start();
    site.wait("cleared", |site| !site.path("state/preprocess").exists());
    assert_eq!(site.stop(), Some(0));
    fs::rename(&away, &file).unwrap();
    fs::remove_dir_all(site.path("deeds")).unwrap();
    fs::create_dir(site.path("deeds")).unwrap();
    usual(&site, &mask);
    site.drop_in("sub-2_T1w.nii.gz", &scan_bytes(2));
    site.start();
    site.wait_scored(&["sub-1_T1w", "sub-2_T1w"]);
    assert!(!site.path("state/preprocess").exists());
    assert_eq!(site.status().n_quarantined, 0);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_program_that_a_service_manager_ends_with_the_daemon_costs_nothing() {
    let mut site = site(2, &[]);
    let pid = site.path("pid");
    usual(&site, &format!("echo $$ > {}\nexec sleep 300", pid.display()));
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    site.start();
    site.wait("asleep", |_| fs::read_to_string(&pid).is_ok_and(|pid| pid.ends_with('\n')));
    let process: i32 = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
    let process = rustix::process::Pid::from_raw(process).unwrap();
    rustix::process::kill_process(process, Signal::TERM).unwrap();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(site.stop(), Some(0));
    assert_eq!(names(&site.path("quarantine")), Vec::<String>::new());
}

#[test]
fn heads_are_aligned_by_the_brain_that_a_program_has_found() {
    let site = site(2, &[]);
    let template = site.path("template.nii.gz");
    fs::write(&template, nifti::encode_volume(template_image())).unwrap();
    configure(
        &site,
        2,
        &[
            "preprocess.scans = \"heads\"",
            "alignment.mode = \"heads\"",
            &format!("alignment.template = {template:?}"),
        ],
    );
    let poses = [
        placed(9.0, [0.93, 0.96, 0.9], [8.0, -10.0, 4.0]),
        placed(-8.0, [1.0, 0.98, 0.95], [-5.0, 9.0, -8.0]),
    ];
    for (seed, pose) in (1..).zip(&poses) {
        let bytes = nifti::encode_volume(&head(seed, pose, T1, false));
        fs::write(site.path(&format!("incoming/sub-{seed}_T1w.nii.gz")), &bytes).unwrap();
        let truly = nifti::encode_volume(&head(seed, pose, T1, true));
        deed(&site, &bytes, &give(&site, &format!("brain-{seed}"), &truly, "$mask"));
    }
    // A scan that arrives stripped is not changed.
    let stripped = nifti::encode_volume(&head(3, &poses[0], T1, true));
    fs::write(site.path("incoming/sub-3_T1w.nii.gz"), stripped).unwrap();
    let mut score = oddscan();
    score.args(["score", "--config"]).arg(site.path("config.toml"));
    let output = score.arg("--out").arg(site.path("results")).arg(site.path("incoming")).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", said(&output).1);
    assert_eq!(n_runs(&site), 2);
    for (stem, pose) in ["sub-1_T1w", "sub-2_T1w"].into_iter().zip(poses) {
        let sidecar = site.sidecar(stem).unwrap();
        assert_eq!(sidecar.standing, Standing::Scored);
        assert!(sidecar.preprocess.unwrap().mask_made);
        let found = sidecar.alignment.unwrap();
        assert!(!found.brain_extracted);
        let error = landmark_error_mm(&Affine::new(found.template_to_scan).unwrap(), &pose);
        assert!(error < 3.0, "{stem}: {error} mm");
    }
    let stripped = site.sidecar("sub-3_T1w").unwrap();
    assert!(stripped.preprocess.is_none() && stripped.alignment.is_none());
}

#[test]
fn a_program_that_is_not_there_or_says_no_version_is_said_at_the_start() {
    let site = site(2, &[]);
    let run = || {
        let mut run = oddscan();
        run.arg("run").arg("--config").arg(site.path("config.toml"));
        let (_, stderr, code) = said(&run.output().unwrap());
        assert_eq!(code, Some(78), "{stderr}");
        stderr
    };
    fs::remove_file(site.path("version")).unwrap();
    assert!(run().contains("preprocess.version_command failed"));
    fs::rename(site.path("hook"), site.path("away")).unwrap();
    assert!(run().contains("no file that may be executed"));
    // Heads that are stripped elsewhere are still in the scanner's position.
    fs::rename(site.path("away"), site.path("hook")).unwrap();
    fs::write(site.path("version"), "1").unwrap();
    configure(&site, 2, &["alignment.mode = \"heads\""]);
    assert!(run().contains("there is no template"));
}

#[test]
fn a_mask_beside_a_scan_stays_whatever_a_program_says() {
    let site = site(2, &[]);
    let mask = nifti::encode_volume(&cut(&brain(1)));
    let all = with_voxels(&brain(1), |_, _| 1.0);
    usual(&site, &give(&site, "mask", &nifti::encode_volume(&all), "$mask"));
    for seed in 1..=2 {
        fs::write(site.path(&format!("incoming/sub-{seed}_T1w.nii.gz")), scan_bytes(seed)).unwrap();
        fs::write(site.path(&format!("incoming/sub-{seed}_brain.nii.gz")), &mask).unwrap();
    }
    let mut score = oddscan();
    score.args(["score", "--config"]).arg(site.path("config.toml"));
    let files: Vec<PathBuf> =
        (1..=2).map(|seed| site.path(&format!("incoming/sub-{seed}_T1w.nii.gz"))).collect();
    let output = score.arg("--out").arg(site.path("results")).args(files).output().unwrap();
    assert!(output.status.success(), "{}", said(&output).1);
    let sidecar = site.sidecar("sub-1_T1w").unwrap();
    assert!(!sidecar.preprocess.unwrap().mask_made);
    assert_eq!(sidecar.brain_mask.unwrap().from, BrainSource::MaskFile);
    let n_inside = cut(&brain(1)).voxels.iter().filter(|&&value| value > 0.0).count();
    let brain_ml = n_inside as f64 * brain(1).affine.voxel_volume_mm3() / 1000.0;
    assert!((sidecar.brain_ml - brain_ml).abs() < 0.1);
}

#[test]
fn a_stop_does_not_wait_for_a_reload_that_asks_a_slow_program() {
    let mut site = Site::new(2, &[]);
    site.start();
    site.configure(
        2,
        &[
            "preprocess.command = [\"/bin/true\", \"{scan}\", \"{mask}\"]",
            "preprocess.version_command = [\"/bin/sleep\", \"60\"]",
        ],
    );
    site.signal(Signal::HUP);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(site.metric("oddscan_config_last_reload_successful"), 1.0, "not decided");
    let asked = Instant::now();
    assert_eq!(site.stop(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(30));
}

#[test]
fn stops_while_a_series_of_a_zip_is_in_hand_are_no_crashes_and_lose_none() {
    let mut site = site(2, &SOON);
    let Some(mut files) = brain_series(&site.path("made/first"), 1) else { return };
    files.extend(brain_series(&site.path("made/second"), 2).unwrap());
    let hold = site.path("hold");
    fs::write(&hold, "").unwrap();
    usual(&site, &format!("while [ -e {hold:?} ]; do sleep 0.05; done; cp \"$scan\" \"$out\""));
    zip_of(&files, &site.path("incoming/both.zip"));
    // One more than the crashes that make a file poison.
    for n in 1..=4 {
        site.start();
        site.wait("in hand", |site| n_runs(site) == n);
        assert_eq!(site.stop(), Some(0));
    }
    fs::remove_file(&hold).unwrap();
    site.start();
    site.wait_scored(&["1_t1_mprage_sag_T1w", "2_t1_mprage_sag_T1w"]);
    assert_eq!(names(&site.path("quarantine")), Vec::<String>::new());
    assert_eq!(site.stop(), Some(0));
}
