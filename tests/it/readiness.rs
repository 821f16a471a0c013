//! The daemon says whether it is ready, and why not, while something is wrong with its folders.

use std::{
    fs,
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use oddscan::domain::not_ready::NotReady;

use crate::support::{Site, scan_bytes, skip};

fn gauge(site: &Site, reason: NotReady) -> f64 {
    site.metric(&format!("oddscan_not_ready{{reason=\"{}\"}}", reason.name()))
}

/// How often the log says that the reason came, and that it went.
fn logged(site: &Site, reason: NotReady) -> [usize; 2] {
    let lines = |what: &str| {
        let log = site.log();
        log.lines().filter(|line| line.contains(what) && line.contains(reason.words())).count()
    };
    ["not ready", "no longer holds"].map(lines)
}

/// Waits until every page says that this reason holds.
fn wait_for(site: &Site, reason: NotReady) {
    site.wait(reason.name(), |site| gauge(site, reason) == 1.0);
    assert!(site.get("/readyz").unwrap().contains(reason.words()));
    assert!(site.status().reasons.contains(reason.words()));
    assert!(!site.status().ready);
    assert_eq!(site.metric("oddscan_ready"), 0.0);
}

/// Waits until the reason has gone. The log then has one line for its coming and one for its going.
fn wait_for_the_end(site: &Site, reason: NotReady) {
    site.wait("ready again", |site| site.get("/readyz").unwrap() == "ready\n");
    assert_eq!(gauge(site, reason), 0.0);
    assert_eq!(site.metric("oddscan_ready"), 1.0);
    assert_eq!(logged(site, reason), [1, 1], "{}", site.log());
}

/// Waits until so many more listings have ended.
fn wait_listings(site: &Site, n: f64) {
    let listings = "oddscan_watch_rescans_total{trigger=\"interval\"}";
    let before = site.metric(listings);
    site.wait("looked again", |site| site.metric(listings) >= before + n);
}

/// A file system in memory, for as long as this lives.
struct Memory(PathBuf);

impl Memory {
    /// Mounts one of this size; prints the reason if that is not possible.
    fn mount(at: &Path, size: &str) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size},mode=777"), "none"]).arg(at);
        match mount.output() {
            Ok(output) if output.status.success() => Some(Self(at.to_owned())),
            _ => {
                skip("no file system can be mounted here");
                None
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

#[test]
fn a_folder_replaced_by_a_file_is_a_reason_until_it_is_back() {
    let mut site = Site::new(2, &[]);
    site.start();
    for (folder, reason) in [
        ("results", NotReady::ResultsUnwritable),
        ("quarantine", NotReady::QuarantineUnwritable),
        ("state", NotReady::StateUnwritable),
    ] {
        fs::rename(site.path(folder), site.path("away")).unwrap();
        fs::write(site.path(folder), "no folder").unwrap();
        wait_for(&site, reason);
        wait_listings(&site, 3.0);
        fs::remove_file(site.path(folder)).unwrap();
        fs::rename(site.path("away"), site.path(folder)).unwrap();
        wait_for_the_end(&site, reason);
    }
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_full_folder_is_a_reason_until_there_is_room_and_a_full_state_folder_pauses_intake() {
    for (folder, reason, n_taken) in [
        ("results", NotReady::ResultsFull, 1),
        ("quarantine", NotReady::QuarantineFull, 1),
        ("state", NotReady::StateFull, 0),
    ] {
        let mut site = Site::new(2, &[]);
        let Some(_memory) = Memory::mount(&site.path(folder), "16m") else { return };
        site.start();
        let stuff = site.path(folder).join("stuff");
        let mut filled = fs::File::create(&stuff).unwrap();
        while filled.write_all(&[0; 4096]).is_ok() {}
        wait_for(&site, reason);
        site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
        let whole = "oddscan_queue_studies{stage=\"decode\"}";
        site.wait("looked at", |site| site.status().n_accepted == 1 || site.metric(whole) == 1.0);
        wait_listings(&site, 3.0);
        assert_eq!(site.status().n_accepted, n_taken, "{folder}");

        fs::remove_file(&stuff).unwrap();
        drop(filled);
        wait_for_the_end(&site, reason);
        site.wait("taken", |site| site.status().n_accepted == 1);
        assert_eq!(site.stop(), Some(0));
    }
}

#[test]
fn a_result_that_could_not_be_written_is_a_reason_until_it_is_written() {
    let mut site = Site::new(2, &[]);
    site.start();
    fs::rename(site.path("results"), site.path("away")).unwrap();
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    wait_for(&site, NotReady::ResultsFailed);
    fs::rename(site.path("away"), site.path("results")).unwrap();
    wait_for_the_end(&site, NotReady::ResultsFailed);
    assert!(site.sidecar("sub-1_T1w").is_some());
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn an_incoming_folder_of_another_file_system_is_not_listed_until_the_first_one_is_back() {
    let mut site = Site::new(2, &[]);
    let Ok(other) = tempfile::tempdir_in("/dev/shm") else {
        return skip("no other file system is here");
    };
    let (seen, real) = (site.path("incoming"), site.path("real"));
    fs::rename(&seen, &real).unwrap();
    symlink(&real, &seen).unwrap();
    site.start();
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    site.wait("accepted", |site| site.status().n_accepted == 1);

    fs::remove_file(&seen).unwrap();
    symlink(other.path(), &seen).unwrap();
    fs::write(other.path().join("sub-2_T1w.nii.gz"), scan_bytes(2)).unwrap();
    wait_for(&site, NotReady::IncomingReplaced);
    assert_eq!(site.status().n_settling, 0, "the scan of the other folder is not looked at");

    fs::remove_file(&seen).unwrap();
    symlink(&real, &seen).unwrap();
    wait_for_the_end(&site, NotReady::IncomingReplaced);
    site.drop_in("sub-3_T1w.nii.gz", &scan_bytes(3));
    site.wait("accepted", |site| site.status().n_accepted == 2);
    assert_eq!(site.status().n_duplicates, 0, "the first scan is not new");
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn an_unmounted_incoming_folder_is_not_listed_until_it_is_mounted_again() {
    let mut site = Site::new(2, &[]);
    let Some(memory) = Memory::mount(&site.path("incoming"), "16m") else { return };
    site.start();
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    site.wait("accepted", |site| site.status().n_accepted == 1);
    drop(memory);
    site.drop_in("sub-2_T1w.nii.gz", &scan_bytes(2));
    wait_for(&site, NotReady::IncomingReplaced);
    assert_eq!(site.status().n_settling, 0);

    let _memory = Memory::mount(&site.path("incoming"), "16m").unwrap();
    wait_for_the_end(&site, NotReady::IncomingReplaced);
    assert_eq!(site.status().n_accepted, 1, "the scan below the mount is not read");
    assert_eq!(site.stop(), Some(0));
}
