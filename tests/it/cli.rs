//! The commands, used as by a person or a script.

use std::fs;

use crate::support::{Site, closed_pipe, names, oddscan, said, scan_bytes, unread};

#[test]
fn help_names_every_command_and_no_arguments_are_an_error() {
    let (help, _, code) = said(&oddscan().arg("--help").output().unwrap());
    assert_eq!(code, Some(0));
    for command in
        ["run", "score", "dicom", "check-config", "status", "model", "demo", "Research use only"]
    {
        assert!(help.contains(command), "{command}\n{help}");
    }
    let (_, _, code) = said(&oddscan().arg("frobnicate").output().unwrap());
    assert_eq!(code, Some(64));
}

#[test]
fn a_settings_file_is_checked_with_all_its_faults_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("site.toml");
    fs::write(&path, "window.min_scans = 12\n").unwrap();
    let check = || said(&oddscan().arg("check-config").arg(&path).output().unwrap());
    let mut alone = oddscan();
    let alone = alone.args(["check-config", "--settings-only"]).arg(&path).output().unwrap();
    assert_eq!(alone.status.code(), Some(0));
    let faults = "window.min_scan = 12\nintake.settle_secs = -1\nservice.listen = \"0.0.0.0:1\"\n";
    fs::write(&path, faults).unwrap();
    let (_, stderr, code) = check();
    assert_eq!(code, Some(78));
    for key in ["window.min_scan", "intake.settle_secs", "service.listen"] {
        assert!(stderr.contains(key), "{key}\n{stderr}");
    }
}

#[test]
fn what_settings_name_is_looked_for_and_must_fit() {
    let check = |site: &Site| {
        let mut check = oddscan();
        said(&check.arg("check-config").arg(site.path("config.toml")).output().unwrap())
    };
    let site = Site::new(2, &[]);
    let (stdout, stderr, code) = check(&site);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("network") && stdout.contains("without a template"), "{stdout}");
    for (setting, says) in [
        ("volume.side = 60", "volume.side"),
        ("alignment.template = \"/nonexistent\"", "template"),
        ("preprocess.command = [\"/nonexistent\", \"{scan}\", \"{mask}\"]", "/nonexistent"),
    ] {
        site.configure(2, &[setting]);
        let (_, stderr, code) = check(&site);
        assert_eq!(code, Some(78), "{setting}: {stderr}");
        assert!(stderr.contains(says), "{setting}: {stderr}");
    }
    if !cfg!(feature = "cuda") {
        site.configure(2, &["encoder.device = \"cuda\""]);
        assert_eq!(check(&site).2, Some(78));
    }
    site.configure(2, &["alignment.template = \"/nonexistent\""]);
    fs::remove_file(site.path("weights")).unwrap();
    let (_, stderr, code) = check(&site);
    assert_eq!(code, Some(78));
    assert!(stderr.contains("weights") && stderr.contains("/nonexistent"), "{stderr}");
    fs::remove_dir(site.path("incoming")).unwrap();
    assert!(check(&site).0.contains("incoming does not exist"));
}

#[test]
fn a_command_whose_reader_goes_away_ends_quietly() {
    let site = Site::new(2, &[]);
    for seed in 1..=2 {
        fs::write(site.path(&format!("incoming/sub-{seed}_T1w.nii.gz")), scan_bytes(seed)).unwrap();
    }
    fs::write(site.path("no.dcm"), b"no DICOM").unwrap();
    let [config, weights, incoming, out, dicom] =
        ["config.toml", "weights", "incoming", "out", "no.dcm"]
            .map(|name| site.path(name).display().to_string());
    let bench = ["--tokens", "50", "--channels", "8", "--device", "cpu"];

    for arguments in [
        &["check-config", "--settings-only", &config][..],
        &["quarantine", "list", "--config", &config],
        &["model", "info", "--json", &weights],
        &["dicom", "--out", &out, &dicom],
        &["score", "--config", &config, "--out", &out, &incoming],
        &["score", "--json", "--config", &config, "--out", &out, &incoming],
        &[&["bench", "score", "--window", "2"], &bench[..]].concat(),
        &[&["bench", "window", "--scans", "2", "--json"], &bench[..]].concat(),
    ] {
        // The log is separate. It warns that the template is missing.
        let end = unread(oddscan().env("RUST_LOG", "off").args(arguments));
        assert_eq!(end, (String::new(), Some(141)), "{arguments:?}");
    }
    assert!(site.path("out/sub-1_T1w_anomaly.json").is_file());
    let (_, code) = unread(oddscan().arg("--help"));
    assert_eq!(code, Some(0));
}

#[test]
fn a_message_that_nobody_reads_changes_no_exit_code() {
    let mut check = oddscan();
    check.args(["check-config", "/nonexistent"]).stderr(closed_pipe());
    assert_eq!(check.status().unwrap().code(), Some(78));
}

#[test]
fn the_daemon_goes_on_when_nobody_reads_its_log() {
    let mut site = Site::new(2, &["service.log = \"debug\""]);
    site.start_into(closed_pipe());
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    site.drop_in("sub-2_T1w.nii.gz", &scan_bytes(2));
    site.wait_scored(&["sub-1_T1w", "sub-2_T1w"]);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn status_without_a_daemon_says_so() {
    let output = oddscan().args(["status", "--address", "127.0.0.1:1"]).output().unwrap();
    let (_, stderr, code) = said(&output);
    assert_eq!(code, Some(69));
    assert!(stderr.contains("no daemon answers on 127.0.0.1:1"), "{stderr}");
}

#[test]
fn a_folder_of_links_is_scored_and_a_link_that_leads_nowhere_is_named() {
    use std::os::unix::fs::symlink;
    let site = Site::new(2, &[]);
    for name in ["objects", "scans"] {
        fs::create_dir(site.path(name)).unwrap();
    }
    for seed in 1..=2 {
        fs::write(site.path(&format!("objects/{seed}")), scan_bytes(seed)).unwrap();
    }
    for seed in 1..=3 {
        let link = site.path(&format!("scans/sub-{seed}_T1w.nii.gz"));
        symlink(format!("../objects/{seed}"), link).unwrap();
    }
    let mut score = oddscan();
    score.args(["score", "--config"]).arg(site.path("config.toml"));
    let output = score.arg("--out").arg(site.path("out")).arg(site.path("scans")).output();
    let (stdout, stderr, code) = said(&output.unwrap());
    assert_eq!(code, Some(65), "{stderr}");
    assert!(stdout.contains("sub-1_T1w") && stdout.contains("sub-2_T1w"), "{stdout}");
    assert!(stderr.contains("sub-3_T1w.nii.gz") && stderr.contains("1 of 3 files"), "{stderr}");
}

#[test]
fn a_refused_file_is_reported_and_the_others_are_scored() {
    let site = Site::new(2, &[]);
    let scans = site.path("scans");
    fs::create_dir(&scans).unwrap();
    for seed in 1..=3 {
        fs::write(scans.join(format!("sub-{seed}_T1w.nii.gz")), scan_bytes(seed)).unwrap();
    }
    fs::write(scans.join("sub-4_T1w.nii.gz"), &scan_bytes(4)[..500]).unwrap();
    fs::write(scans.join("sub-5_T1w.nii.gz"), scan_bytes(1)).unwrap();
    fs::write(scans.join("sub-6_T2w.nii.gz"), scan_bytes(6)).unwrap();
    let mut score = oddscan();
    score.args(["score", "--json", "--config"]).arg(site.path("config.toml"));
    // A file that is named twice is one.
    let twice = [scans.clone(), scans.join("../scans/sub-1_T1w.nii.gz")];
    let output = score.arg("--out").arg(site.path("out")).args(twice).output().unwrap();
    let (stdout, stderr, code) = said(&output);
    assert_eq!(code, Some(65), "{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let field = |list: &str, key: &str| -> Vec<String> {
        let entries = report[list].as_array().unwrap().iter();
        entries.map(|entry| entry[key].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(field("scored", "stem"), ["sub-1_T1w", "sub-2_T1w", "sub-3_T1w"]);
    let reasons = field("refused", "reason");
    for (reason, word) in reasons.iter().zip(["truncated", "copy of", "alone in its cohort"]) {
        assert!(reason.contains(word), "{reasons:?}");
    }
    assert_eq!(names(&site.path("out")).len(), 3 * 4);
}

#[test]
fn a_cohort_of_too_few_patients_is_scored_only_by_force_and_without_percentiles() {
    let site = Site::new(8, &[]);
    let scans = site.path("scans");
    fs::create_dir(&scans).unwrap();
    for seed in 1..=3 {
        fs::write(scans.join(format!("sub-{seed}_T1w.nii.gz")), scan_bytes(seed)).unwrap();
    }
    let score = |more: &[&str]| {
        let mut score = oddscan();
        score.arg("score").args(more).arg("--config").arg(site.path("config.toml"));
        said(&score.arg("--out").arg(site.path("results")).arg(&scans).output().unwrap())
    };
    let (_, stderr, code) = score(&[]);
    assert_eq!(code, Some(65), "{stderr}");
    assert!(stderr.contains("its cohort (t1w) has 3 reference scans; 8 are needed"), "{stderr}");
    assert!(stderr.contains("window.min_scans") && stderr.contains("--force"), "{stderr}");
    assert_eq!(names(&site.path("results")), Vec::<String>::new());

    let (stdout, stderr, code) = score(&["--force"]);
    assert_eq!(code, Some(0), "{stderr}");
    let row = stdout.lines().find(|line| line.starts_with("sub-1_T1w")).unwrap();
    assert!(row.split_whitespace().any(|cell| cell == "-") && !row.contains('%'), "{stdout}");
    assert!(stderr.contains("there is no percentile"), "{stderr}");
    let sidecar = site.sidecar("sub-1_T1w").unwrap();
    let scores = sidecar.scores.clone().unwrap();
    assert!(scores.percentile.is_none() && scores.max > 0.0, "{scores:?}");
    let says = |text: &str| sidecar.warnings.iter().any(|warning| warning.contains(text));
    assert!(says("window.min_scans asks for 8"), "{:?}", sidecar.warnings);

    let (stdout, _, _) = score(&["--force", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["scored"][0].get("percentile"), Some(&serde_json::Value::Null));
}

#[test]
fn a_brain_mask_beside_a_scan_is_used() {
    let site = Site::new(2, &[]);
    let scans = site.path("scans");
    fs::create_dir(&scans).unwrap();
    for seed in 1..=2 {
        fs::write(scans.join(format!("sub-{seed}_FLAIR.nii.gz")), scan_bytes(seed)).unwrap();
    }
    // Half of the brain only.
    let mut mask = crate::support::brain(1);
    let half = mask.voxels.len() / 2;
    mask.voxels[..half].fill(0.0);
    fs::write(scans.join("sub-1_brain.nii.gz"), oddscan::nifti::encode_volume(&mask)).unwrap();
    let mut score = oddscan();
    score.arg("score").arg("--config").arg(site.path("config.toml"));
    let output = score.arg("--out").arg(site.path("results")).arg(&scans).output().unwrap();
    assert!(output.status.success(), "{}", said(&output).1);
    let brain_ml = |stem: &str| site.sidecar(stem).unwrap().brain_ml;
    let ratio = brain_ml("sub-1_FLAIR") / brain_ml("sub-2_FLAIR");
    assert!((0.45..0.55).contains(&ratio), "{ratio}");
}

#[test]
fn without_weights_the_error_says_how_to_get_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut score = oddscan();
    score.env("ODDSCAN_MODELS", folder.path()).arg("score").arg("--out").arg(folder.path());
    let scan = folder.path().join("a_T1w.nii.gz");
    fs::write(&scan, scan_bytes(1)).unwrap();
    let (_, stderr, code) = said(&score.arg(scan).output().unwrap());
    assert_eq!(code, Some(78));
    assert!(stderr.contains("oddscan model fetch"), "{stderr}");
}

#[test]
fn the_demo_feeds_the_real_daemon_and_says_whether_known_lesions_were_hit() {
    let site = Site::new(2, &[]);
    let scans = site.path("scans");
    fs::create_dir(&scans).unwrap();
    for seed in 1..=2 {
        fs::write(scans.join(format!("sub-{seed}_FLAIR.nii.gz")), scan_bytes(seed)).unwrap();
    }
    // All of the brain, so that everything marked hits it.
    fs::write(scans.join("sub-1_lesion.nii.gz"), scan_bytes(1)).unwrap();
    fs::write(scans.join("sub-3_FLAIR.nii.gz"), "broken").unwrap();
    let mut demo = oddscan();
    demo.env("ODDSCAN_WEIGHTS", site.path("weights")).args(["demo", "--slice-stride", "7"]);
    demo.arg("--scans").arg(&scans).arg("--dir").arg(site.path("demo"));
    let (stdout, stderr, code) = said(&demo.output().unwrap());
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    let line = |stem: &str| stdout.lines().find(|line| line.starts_with(stem)).unwrap();
    assert!(line("sub-1_FLAIR").contains("Dice"), "{stdout}");
    assert!(line("sub-2_FLAIR").ends_with('-'), "{stdout}");
    assert!(line("sub-3_FLAIR").contains("refused"), "{stdout}");
    assert!(
        fs::read_to_string(site.path("demo/metrics.prom")).unwrap().contains("oddscan_ready 1")
    );
    assert_eq!(names(&site.path("demo/results")).len(), 2 * 4);
}

#[test]
fn refused_files_are_listed_put_back_and_dropped() {
    let site = Site::new(3, &[]);
    let refuse = |name: &str| {
        let folder = site.path("quarantine/truncated").join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name), "x").unwrap();
        let reason = serde_json::json!({
            "schema": "oddscan/quarantine/1", "reason": "truncated", "found": "9 bytes",
            "needed": "352", "action": "export again", "came_from": format!("day-1/{name}"),
            "quarantined_at_secs": 7, "oddscan_version": "0", "moved": true,
        });
        fs::write(folder.join("reason.json"), reason.to_string()).unwrap();
    };
    ["a.nii", "b.nii", "c.nii"].into_iter().for_each(refuse);
    let quarantine = |arguments: &[&str]| {
        let mut command = oddscan();
        command.args(["quarantine", arguments[0], "--config"]).arg(site.path("config.toml"));
        let output = command.args(&arguments[1..]).output().unwrap();
        let (out, err, code) = said(&output);
        (code.unwrap(), format!("{out}{err}"))
    };
    let (code, text) = quarantine(&["list"]);
    assert_eq!(code, 0);
    assert!(
        text.contains("truncated/b.nii\n  found 9 bytes\n  needed 352\n  export again"),
        "{text}"
    );
    let (code, text) = quarantine(&["requeue", "truncated/a.nii", "truncated/none.nii"]);
    assert_eq!(code, 74);
    assert!(text.contains("truncated/none.nii: no such entry"), "{text}");
    assert!(site.path("incoming/day-1/a.nii").is_file(), "one that fails does not keep the others");
    assert_eq!(quarantine(&["drop", "truncated/b.nii"]).0, 0);
    assert_eq!(quarantine(&["requeue"]).0, 64, "nothing is meant by nothing");
    assert_eq!(quarantine(&["requeue", "--reason", "truncate"]).0, 64, "no such reason");
    assert_eq!(quarantine(&["requeue", "--reason", "truncated"]).0, 0);
    assert!(site.path("incoming/day-1/c.nii").is_file());
    let (_, text) = quarantine(&["list", "--json"]);
    assert_eq!(text.trim(), "[]");
}
