//! The unit files: systemd accepts them and rates their exposure as low.

use std::{fs, path::Path, process::Command};

use crate::{
    shipped::{repository, run},
    support::is_missing,
};

/// The unit in a folder of its own, with or without the drop-in for CUDA.
///
/// The binary is not installed where tests run, and systemd refuses a unit without one. Another
/// binary replaces it here.
fn unit_in(folder: &Path, with_cuda: bool) {
    let shipped = repository().join("systemd");
    let unit = fs::read_to_string(shipped.join("oddscan.service")).unwrap();
    assert!(unit.contains("ExecStart=/usr/bin/oddscan run --config /etc/oddscan/config.toml\n"));
    let unit = unit.replace("/usr/bin/oddscan", "/bin/true");
    fs::write(folder.join("oddscan.service"), unit).unwrap();
    if with_cuda {
        let drop_ins = folder.join("oddscan.service.d");
        fs::create_dir(&drop_ins).unwrap();
        fs::copy(shipped.join("oddscan-cuda.conf"), drop_ins.join("oddscan-cuda.conf")).unwrap();
    }
}

#[test]
fn systemd_accepts_the_units_and_finds_them_hard_to_attack() {
    if is_missing("systemd-analyze", "systemd") {
        return;
    }
    for with_cuda in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        unit_in(folder.path(), with_cuda);
        let analyze = |arguments: &[&str]| {
            let mut command = Command::new("systemd-analyze");
            command.env("SYSTEMD_UNIT_PATH", format!("{}:", folder.path().display()));
            command.args(arguments).arg(folder.path().join("oddscan.service"));
            run(&mut command)
        };
        let said = analyze(&["verify"]);
        assert_eq!(said.trim(), "", "systemd-analyze verify warns, CUDA: {with_cuda}");
        // In tenths: an exposure above 2.0 of 10 fails.
        let review = analyze(&["--no-pager", "security", "--offline=true", "--threshold=20"]);
        let devices = review.contains("char-nvidia");
        assert_eq!(devices, with_cuda, "the drop-in is not what was reviewed:\n{review}");
    }
}

#[test]
fn the_service_is_told_apart_from_what_a_restart_cannot_mend() {
    let unit = fs::read_to_string(repository().join("systemd/oddscan.service")).unwrap();
    for line in [
        "Type=notify",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "Restart=on-failure",
        "RestartPreventExitStatus=64 78",
        "WatchdogSec=120",
        "LimitCORE=0",
    ] {
        assert!(unit.lines().any(|l| l == line), "the unit lacks {line}");
    }
}

#[test]
fn every_folder_of_the_service_is_made_with_a_mode_that_keeps_strangers_out() {
    let tmpfiles = fs::read_to_string(repository().join("systemd/oddscan.tmpfiles")).unwrap();
    for (folder, mode) in
        [("incoming", "2770"), ("results", "2750"), ("quarantine", "2750"), ("state", "0700")]
    {
        let path = format!("/var/lib/oddscan/{folder}");
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let line = tmpfiles.lines().map(words).find(|words| words.get(1) == Some(&path));
        assert_eq!(line.unwrap()[2..], [mode, "oddscan", "oddscan", "-"], "{path}");
    }
}
