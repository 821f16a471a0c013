//! The ways in which files arrive. Whatever senders and network shares do, intake takes each scan
//! exactly once, and only when it is whole.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use oddscan::{
    domain::{left_alone::LeftAlone, not_ready::NotReady, scan::ScanId},
    nifti::{self, Limits},
    numeric::geometry::{Affine, Shape3},
    quarantine::entries,
};
use rustix::process::Signal;

use crate::support::{Site, brain, is_missing, names, oddscan, said as said_by, scan_bytes, skip};

fn pause(milliseconds: u64) {
    thread::sleep(Duration::from_millis(milliseconds));
}

/// Numbers of accepted, copied and refused scans.
fn taken(site: &Site) -> [u64; 3] {
    let status = site.status();
    [status.n_accepted, status.n_duplicates, status.n_quarantined]
}

/// Waits for these numbers of decisions, and makes sure that none follows.
fn wait_taken(site: &Site, wanted: [u64; 3]) {
    site.wait(&format!("taken: {wanted:?}"), |site| taken(site) == wanted);
    let listings = "oddscan_watch_rescans_total{trigger=\"interval\"}";
    let before = site.metric(listings);
    site.wait("looked again", |site| site.metric(listings) >= before + 3.0);
    assert_eq!(taken(site), wanted);
    assert_eq!(site.status().n_settling, 0);
}

/// A window that never fills, because these tests only look at intake.
const NO_SCORES: usize = 100_000;

fn quiet_site(more: &[&str]) -> Site {
    let mut all = vec!["window.max_scans = 100000"];
    all.extend(more);
    Site::new(NO_SCORES, &all)
}

#[test]
fn half_a_file_that_never_becomes_whole_is_refused_once_and_the_whole_one_is_taken_after_it() {
    let mut site = quiet_site(&[]);
    site.start();
    let bytes = scan_bytes(1);
    fs::write(site.path("incoming/sub-1_T1w.nii.gz"), &bytes[..bytes.len() / 2]).unwrap();
    wait_taken(&site, [0, 0, 1]);
    assert_eq!(names(&site.path("quarantine")), ["truncated"]);
    site.drop_in("sub-1_T1w.nii.gz", &bytes);
    wait_taken(&site, [1, 0, 1]);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn files_that_grow_slowly_or_jump_to_their_full_size_first_are_taken_when_they_are_whole() {
    let mut site = quiet_site(&["intake.settle_secs = 0.8"]);
    site.start();
    let (growing, mapped) = (scan_bytes(1), scan_bytes(2));
    let mut grows = File::create(site.path("incoming/grows_T1w.nii.gz")).unwrap();
    // Some programs allocate the whole file first and fill it afterwards, from the end or in any
    // order.
    let mut fills = File::create(site.path("incoming/fills_T1w.nii.gz")).unwrap();
    fills.set_len(mapped.len() as u64).unwrap();
    let n_parts = 8;
    for part in 0..n_parts {
        let range = |len: usize, part: usize| len * part / n_parts..len * (part + 1) / n_parts;
        grows.write_all(&growing[range(growing.len(), part)]).unwrap();
        let range = range(mapped.len(), n_parts - 1 - part);
        fills.seek(SeekFrom::Start(range.start as u64)).unwrap();
        fills.write_all(&mapped[range]).unwrap();
        pause(250);
        assert_eq!(taken(&site), [0; 3], "after part {part} of {n_parts}");
    }
    wait_taken(&site, [2, 0, 0]);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_file_that_is_renamed_in_or_about_is_taken_once() {
    let mut site = quiet_site(&["intake.rescan_secs = 0.5"]);
    site.start();
    let outside = site.path("outside.nii.gz");
    fs::write(&outside, scan_bytes(1)).unwrap();
    fs::rename(&outside, site.path("incoming/sub-1_T1w.nii.gz")).unwrap();
    wait_taken(&site, [1, 0, 0]);
    // Intake ignores this name until the file is renamed.
    fs::write(site.path("incoming/sub-2_T1w.nii.gz.partial"), scan_bytes(2)).unwrap();
    wait_taken(&site, [1, 0, 0]);
    fs::rename(
        site.path("incoming/sub-2_T1w.nii.gz.partial"),
        site.path("incoming/sub-2_T1w.nii.gz"),
    )
    .unwrap();
    wait_taken(&site, [2, 0, 0]);
    // A whole folder, and a scan under another name: its content is known.
    fs::create_dir(site.path("study")).unwrap();
    fs::write(site.path("study/sub-3_T1w.nii.gz"), scan_bytes(3)).unwrap();
    fs::rename(site.path("study"), site.path("incoming/study")).unwrap();
    wait_taken(&site, [3, 0, 0]);
    fs::rename(
        site.path("incoming/sub-1_T1w.nii.gz"),
        site.path("incoming/study/again_T1w.nii.gz"),
    )
    .unwrap();
    wait_taken(&site, [3, 1, 0]);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_file_that_is_rewritten_in_place_is_another_scan_taken_once_when_it_is_whole() {
    let mut site = quiet_site(&["intake.settle_secs = 0.8"]);
    let path = site.path("incoming/sub-1_T1w.nii");
    let plain = |seed| {
        let mut bytes = Vec::new();
        let scan = scan_bytes(seed);
        std::io::copy(&mut flate2::bufread::GzDecoder::new(&*scan), &mut bytes).unwrap();
        bytes
    };
    site.start();
    fs::write(&path, plain(1)).unwrap();
    site.wait("taken", |site| taken(site) == [1, 0, 0]);
    // Of the same size, in pieces, with the time set back each time: only the inode shows the
    // change.
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let second = plain(2);
    let mut file = File::options().write(true).open(&path).unwrap();
    for part in second.chunks(second.len().div_ceil(6)) {
        file.write_all(part).unwrap();
        file.set_modified(modified).unwrap();
        pause(250);
        assert_eq!(taken(&site), [1, 0, 0]);
    }
    wait_taken(&site, [2, 0, 0]);
    // The same content written again is a copy of a known scan, nothing more.
    fs::write(&path, second).unwrap();
    wait_taken(&site, [2, 1, 0]);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn files_that_are_deleted_at_any_moment_are_no_trouble() {
    let mut site = quiet_site(&["intake.settle_secs = 0.2", "intake.max_file_mib = 1024"]);
    site.start();
    // Large enough that reading takes a while: half a gibibyte of zeros after a header.
    let big = |name: &str| {
        let path = site.path("incoming").join(name);
        let mut header = Vec::new();
        let scan = scan_bytes(1);
        std::io::copy(&mut flate2::bufread::GzDecoder::new(&*scan), &mut header).unwrap();
        header.truncate(352);
        let mut file = File::create(&path).unwrap();
        file.write_all(&header).unwrap();
        file.set_len(512 << 20).unwrap();
        path
    };
    for (index, milliseconds) in [0, 150, 250, 300, 350, 400, 500, 600].into_iter().enumerate() {
        let path = big(&format!("big-{index}_T1w.nii"));
        pause(milliseconds);
        // A file that was refused before is already gone.
        fs::remove_file(&path).ok();
    }
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    site.wait("taken", |site| site.status().n_accepted == 1);
    site.wait("settled", |site| site.status().n_settling == 0);
    let refused: Vec<String> =
        names(&site.path("quarantine")).into_iter().filter(|name| !name.starts_with('.')).collect();
    // A file that was deleted too late has been read to its end. It is then corrupt or a bomb.
    assert!(refused.iter().all(|reason| ["bomb", "corrupt"].contains(&&**reason)), "{refused:?}");
    assert!(site.is_running());
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn an_upload_that_stalls_is_waited_for_and_taken_whole_when_it_goes_on() {
    let mut site = quiet_site(&["intake.settle_secs = 0.6"]);
    site.start();
    let bytes = scan_bytes(1);
    let mut file = File::create(site.path("incoming/sub-1_T1w.nii.gz")).unwrap();
    file.write_all(&bytes[..bytes.len() / 2]).unwrap();
    site.wait("waiting for its end", |site| site.status().n_unfinished == 1);
    // The sender pauses for longer than a whole file waits.
    pause(1500);
    assert_eq!((taken(&site), site.status().n_unfinished), ([0; 3], 1));
    file.write_all(&bytes[bytes.len() / 2..]).unwrap();
    drop(file);
    wait_taken(&site, [1, 0, 0]);
    assert_eq!(site.status().n_unfinished, 0);
    assert_eq!(names(&site.path("quarantine")), Vec::<String>::new());
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_refused_file_that_grows_in_quarantine_is_taken_back_and_read_whole() {
    let mut site = quiet_site(&[]);
    site.start();
    let bytes = scan_bytes(1);
    fs::write(site.path("incoming/sub-1_T1w.nii.gz"), &bytes[..bytes.len() / 2]).unwrap();
    wait_taken(&site, [0, 0, 1]);
    // A sender that oddscan could not see goes on through its open file.
    let refused = site.path("quarantine/truncated/sub-1_T1w.nii.gz/sub-1_T1w.nii.gz");
    let mut file = File::options().append(true).open(refused).unwrap();
    file.write_all(&bytes[bytes.len() / 2..]).unwrap();
    drop(file);
    wait_taken(&site, [1, 0, 1]);
    assert_eq!(names(&site.path("quarantine/truncated")), Vec::<String>::new());
    assert_eq!(fs::read(site.path("incoming/sub-1_T1w.nii.gz")).unwrap(), bytes);
    assert_eq!(site.metric("oddscan_quarantine_taken_back_total"), 1.0);
    assert_eq!(site.metric("oddscan_quarantine_files"), 0.0);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_file_that_its_sender_has_open_is_refused_where_it_lies_and_taken_when_it_is_whole() {
    let mut site = quiet_site(&["intake.settle_secs = 0.2"]);
    site.start();
    let bytes = scan_bytes(1);
    let path = site.path("incoming/sub-1_T1w.nii.gz");
    let mut file = File::create(&path).unwrap();
    file.write_all(&bytes[..bytes.len() / 2]).unwrap();
    wait_taken(&site, [0, 0, 1]);
    let refused = entries(&site.path("quarantine")).unwrap();
    assert!(path.is_file() && !refused[0].reason.as_ref().unwrap().moved, "{refused:?}");
    file.write_all(&bytes[bytes.len() / 2..]).unwrap();
    drop(file);
    wait_taken(&site, [1, 0, 1]);
    assert_eq!(entries(&site.path("quarantine")).unwrap(), [], "the reason no longer applies");
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_scan_whose_ending_is_in_upper_case_is_taken_like_any_other() {
    let mut site = quiet_site(&[]);
    site.start();
    site.drop_in("sub-1_T1w.NII.GZ", &scan_bytes(1));
    wait_taken(&site, [1, 0, 0]);
    site.wait("told", |site| site.sidecar("sub-1_T1w").is_some());
    assert!(site.status().left_alone.is_empty());
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn what_is_left_alone_is_said_once_without_names_counted_by_reason_and_named_on_request() {
    let mut site = quiet_site(&[]);
    site.start();
    let incoming = site.path("incoming");
    let put = |name: &str, bytes: &[u8]| fs::write(incoming.join(name), bytes).unwrap();
    fs::create_dir(incoming.join(".mount")).unwrap();
    put(".mount/sub-3_T1w.nii.gz", &scan_bytes(3));
    put("DOE^CANARY.mgz", b"FreeSurfer's format");
    put("notes.txt", b"to whom it may concern");
    // These belong to scans or to the system, or are on their way.
    for name in ["sub-1_T1w.json", "sub-1_dwi.bval", "Thumbs.db", "sub-2_T1w.nii.gz.partial"] {
        put(name, b"{}");
    }
    std::os::unix::fs::symlink("/etc/hostname", incoming.join("link_T1w.nii.gz")).unwrap();

    let one_each = |reasons: &[LeftAlone]| -> BTreeMap<LeftAlone, usize> {
        reasons.iter().map(|&reason| (reason, 1)).collect()
    };
    let usual = [LeftAlone::NotAScan, LeftAlone::NotAFile];
    let four = one_each(&[&usual[..], &[LeftAlone::ForeignFormat, LeftAlone::Hidden]].concat());
    site.wait("left alone", |site| site.status().left_alone == four);
    wait_taken(&site, [0, 0, 0]);
    assert_eq!(site.metric("oddscan_left_alone_files{reason=\"hidden\"}"), 1.0);
    assert_eq!(site.metric("oddscan_left_alone_files{reason=\"too_deep\"}"), 0.0);
    let log = site.log();
    let said: Vec<&str> = log.lines().filter(|line| line.contains("left alone")).collect();
    // All in one listing, or in several.
    assert!((1..=4).contains(&said.len()), "{said:?}");
    assert!(said.iter().all(|line| line.contains("files=")), "{said:?}");
    assert!(!log.contains("CANARY"), "{log}");
    assert!(!site.get("/status.json").unwrap().contains("CANARY"));

    let status = |more: &[&str]| {
        let config = site.path("config.toml");
        let output = oddscan().arg("status").args(more).arg("--config").arg(config).output();
        let (text, error, code) = said_by(&output.unwrap());
        assert_eq!(code, Some(0), "{error}");
        text
    };
    assert!(!status(&[]).contains("CANARY"));
    let text = status(&["--names"]);
    assert!(
        text.contains("  1 hidden: in a hidden folder\n    .mount/sub-3_T1w.nii.gz\n"),
        "{text}"
    );
    let json: serde_json::Value = serde_json::from_str(&status(&["--json", "--names"])).unwrap();
    assert_eq!(json["left_alone_names"]["foreign_format"], serde_json::json!(["DOE^CANARY.mgz"]));

    // Each counts until somebody has dealt with it.
    fs::remove_file(incoming.join("DOE^CANARY.mgz")).unwrap();
    fs::rename(incoming.join(".mount"), incoming.join("mount")).unwrap();
    site.wait("two left", |site| site.status().left_alone == one_each(&usual));
    wait_taken(&site, [1, 0, 0]);
    assert_eq!(site.stop(), Some(0));
}

/// A folder seen through another file system. Changes in the folder cause no events there.
struct Mount {
    seen: PathBuf,
    server: Child,
}

impl Mount {
    /// Mounts `real` at `seen`; prints the reason if that is not possible.
    fn new(real: &Path, seen: &Path, options: &[&str]) -> Option<Self> {
        if is_missing("bindfs", "bindfs") {
            return None;
        }
        let mut server = Command::new("bindfs");
        server.arg("-f").args(options).arg(real).arg(seen).stderr(Stdio::piped());
        let mut mount = Self { seen: seen.to_owned(), server: server.spawn().unwrap() };
        let is_there =
            || fs::read_to_string("/proc/mounts").unwrap().contains(seen.to_str().unwrap());
        while !is_there() {
            if mount.server.try_wait().unwrap().is_some() {
                let mut why = String::new();
                mount.server.stderr.take().unwrap().read_to_string(&mut why).unwrap();
                skip(format_args!("no FUSE mounts here ({})", why.trim()));
                return None;
            }
            pause(20);
        }
        Some(mount)
    }

    /// The server stops like that of a network share. Every access then fails.
    fn die(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // A lazy unmount, because the daemon may still use the folder.
        Command::new("fusermount").args(["-u", "-z"]).arg(&self.seen).status().ok();
        self.server.kill().ok();
        self.server.wait().ok();
    }
}

#[test]
fn on_a_file_system_without_events_files_are_found_by_listing_and_taken_when_they_are_whole() {
    let mut site = quiet_site(&["intake.settle_secs = 1.5"]);
    let real = tempfile::tempdir().unwrap();
    let Some(_mount) = Mount::new(real.path(), &site.path("incoming"), &[]) else { return };
    site.start();
    let bytes = scan_bytes(1);
    let mut file = File::create(real.path().join("grows_T1w.nii.gz")).unwrap();
    for part in bytes.chunks(bytes.len().div_ceil(6)) {
        file.write_all(part).unwrap();
        pause(500);
        assert_eq!(taken(&site), [0; 3]);
    }
    fs::create_dir(real.path().join("study")).unwrap();
    fs::write(real.path().join("study/sub-2_T1w.nii.gz"), scan_bytes(2)).unwrap();
    fs::write(real.path().join("study/half_T1w.nii.gz"), &bytes[..5000]).unwrap();
    wait_taken(&site, [2, 0, 1]);
    assert_eq!(names(&site.path("quarantine")), ["truncated"]);
    assert!(!real.path().join("study/half_T1w.nii.gz").exists(), "moved through the mount");
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_mount_that_goes_away_and_comes_back_costs_nothing() {
    let mut site = quiet_site(&[]);
    let real = tempfile::tempdir().unwrap();
    let Some(mut mount) = Mount::new(real.path(), &site.path("incoming"), &[]) else { return };
    fs::write(real.path().join("sub-1_T1w.nii.gz"), scan_bytes(1)).unwrap();
    site.start();
    wait_taken(&site, [1, 0, 0]);
    mount.die();
    site.wait("said", |site| site.status().has(NotReady::IncomingUnreadable));
    drop(mount);
    // Without the mount the folder exists and is empty. The scan is not new after that.
    site.wait("said", |site| site.status().has(NotReady::IncomingReplaced));
    fs::write(real.path().join("sub-2_T1w.nii.gz"), scan_bytes(2)).unwrap();
    let _mount = Mount::new(real.path(), &site.path("incoming"), &[]).unwrap();
    wait_taken(&site, [2, 0, 0]);
    assert!(site.status().ready);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_file_that_is_deleted_or_rewritten_while_it_is_read_is_not_taken_for_what_it_was() {
    let mut site = quiet_site(&[]);
    let real = tempfile::tempdir().unwrap();
    // The 48 kB of a scan take two and a half seconds.
    let slow = ["--read-rate=20000"];
    let Some(_mount) = Mount::new(real.path(), &site.path("incoming"), &slow) else { return };
    site.start();
    let has_draft = |site: &Site| {
        names(&site.path("state/sources")).iter().any(|name| name.starts_with("draft-"))
    };
    let in_hand = |name: &str, bytes: &[u8]| {
        site.wait("nothing in hand", |site| !has_draft(site));
        let path = real.path().join(name);
        fs::write(&path, bytes).unwrap();
        site.wait("in hand", has_draft);
        path
    };
    let deleted = in_hand("deleted_T1w.nii.gz", &scan_bytes(1));
    fs::remove_file(deleted).unwrap();
    // It changes at once, so that the mount's caches no longer hold the old state at the end.
    let rewritten = in_hand("rewritten_T1w.nii.gz", &scan_bytes(2));
    fs::write(&rewritten, scan_bytes(3)).unwrap();
    wait_taken(&site, [1, 0, 0]);
    site.wait("told", |site| site.sidecar("rewritten_T1w").is_some());
    let scan = nifti::read_map(&rewritten, &Limits::NONE).unwrap();
    assert_eq!(site.sidecar("rewritten_T1w").unwrap().scan_id, ScanId::of(&scan));
    assert_eq!(names(&site.path("quarantine")), Vec::<String>::new());
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn files_that_are_read_at_once_are_taken_as_if_one_after_the_other() {
    let names_of = |site: &Site| -> Vec<(String, String, ScanId)> {
        let names = names(&site.path("results"));
        let sidecars = names.iter().filter_map(|name| name.strip_suffix("_anomaly.json"));
        let facts = |stem: &str| {
            let sidecar = site.sidecar(stem).unwrap();
            (stem.to_owned(), sidecar.came_from, sidecar.scan_id)
        };
        sidecars.map(facts).collect()
    };
    let taken = ["1", "4", "9"].map(|at_once| {
        let mut site = quiet_site(&[&format!("intake.read_at_once = {at_once}")]);
        let put = |name: &str, bytes: &[u8]| {
            let path = site.path("incoming").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        // Two with one name, copies, and refused files, all present from the start.
        for seed in 1..=4 {
            put(&format!("a/sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
        }
        put("b/sub-1_T1w.nii.gz", &scan_bytes(5));
        put("b/sub-2_T1w.nii.gz", &scan_bytes(2));
        put("b/sub-6_T1w.nii.gz", &scan_bytes(6));
        put("b/sub-7_T1w.nii.gz", &scan_bytes(6));
        put("c/broken_T1w.nii.gz", b"nothing");
        put("c/cut_T1w.nii.gz", &scan_bytes(7)[..1000]);
        site.start();
        wait_taken(&site, [6, 2, 2]);
        site.wait("told", |site| names_of(site).len() == 6);
        let archived = names(&site.path("state/sources"));
        assert!(archived.len() == 6 && archived.iter().all(|name| name.ends_with(".scan")));
        assert_eq!(site.stop(), Some(0));
        names_of(&site)
    });
    assert!(taken[0] == taken[1] && taken[0] == taken[2], "{taken:?}");
}

/// A small scan: 13 x 15 x 12 voxels of 12 mm.
fn small_scan(seed: u64) -> Vec<u8> {
    let mut volume = brain(seed);
    let fine = volume.clone();
    volume.shape = Shape3([13, 15, 12]);
    let voxel = |offset| {
        let voxel = volume.shape.voxel(offset).map(|index| 2 * index);
        fine.voxels[fine.shape.offset(voxel)]
    };
    let voxels = (0..volume.shape.n_voxels()).map(voxel).collect();
    let rows = volume.affine.rows().map(|[a, b, c, d]| [2.0 * a, 2.0 * b, 2.0 * c, d]);
    volume.affine = Affine::new(rows).unwrap();
    volume.voxels = voxels;
    nifti::encode_volume(&volume)
}

#[test]
fn two_thousand_files_at_once_are_each_taken_once() {
    let mut site = quiet_site(&["volume.side = 28"]);
    let scans: Vec<Vec<u8>> = (0..20).map(small_scan).collect();
    let write = |site: &Site, numbers: std::ops::Range<usize>| {
        for number in numbers {
            let folder = site.path("incoming").join(format!("study-{}", number % 40));
            fs::create_dir_all(&folder).unwrap();
            let name = format!("sub-{number}_T1w.nii.gz");
            match number % 100 {
                99 => fs::write(folder.join(name), &scans[0][..1000]).unwrap(),
                kind => fs::write(folder.join(name), &scans[kind % 20]).unwrap(),
            }
        }
    };
    // Half of them before the start, half of them during it.
    write(&site, 0..1000);
    site.start();
    site.wait("some taken", |site| taken(site)[1] > 100);
    write(&site, 1000..2000);
    wait_taken(&site, [20, 1960, 20]);
    assert_eq!(names(&site.path("quarantine/truncated")).len(), 20);
    site.wait("encoded", |site| {
        site.status().cohorts.get("t1w").is_some_and(|cohort| cohort.n_scans == 20)
    });
    // Another start takes nothing again, either.
    assert_eq!(site.stop(), Some(0));
    site.start();
    wait_taken(&site, [0, 0, 0]);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn events_that_the_kernel_drops_bring_a_listing_of_everything() {
    let most = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let most: usize = most.trim().parse().unwrap();
    if most > 100_000 {
        skip(format_args!("this kernel queues {most} events"));
        return;
    }
    // The interval is too long to find anything.
    let mut site = quiet_site(&["intake.rescan_secs = 3600.0"]);
    site.start();
    let overflows = "oddscan_watch_rescans_total{trigger=\"overflow\"}";
    assert_eq!(site.metric(overflows), 0.0);
    site.signal(Signal::STOP);
    // They alternate, because equal events in a row count as one. They are twice as many as fit,
    // because some are read before the signal arrives.
    let [a, b] = ["a", "b"].map(|name| File::create(site.path("incoming").join(name)).unwrap());
    for _ in 0..most {
        (&a).write_all(b"x").unwrap();
        (&b).write_all(b"x").unwrap();
    }
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    fs::create_dir(site.path("incoming/study")).unwrap();
    fs::write(site.path("incoming/study/sub-2_T1w.nii.gz"), scan_bytes(2)).unwrap();
    site.signal(Signal::CONT);
    site.wait("told", |site| site.metric(overflows) >= 1.0);
    site.wait("taken", |site| taken(site) == [2, 0, 0]);
    pause(1000);
    assert_eq!(taken(&site), [2, 0, 0]);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_scan_or_a_mask_above_the_limits_is_refused_before_it_is_copied() {
    let mut site = quiet_site(&["intake.max_file_mib = 1"]);
    site.start();
    // Without this folder nothing can be copied.
    fs::remove_dir_all(site.path("state/sources")).unwrap();
    let put_large = |name: &str| {
        let file = File::create(site.path("incoming").join(name)).unwrap();
        file.set_len((1 << 20) + 1).unwrap();
    };
    put_large("sub-1_T1w.nii");
    put_large("sub-2_T1w_brain.nii.gz");
    site.drop_in("sub-2_T1w.nii.gz", &scan_bytes(2));
    site.wait("both refused", |site| site.status().n_quarantined == 2);
    let mut found: Vec<String> = entries(&site.path("quarantine"))
        .unwrap()
        .into_iter()
        .map(|entry| entry.reason.unwrap().refusal)
        .map(|refusal| format!("{}: {}", refusal.reason.name(), refusal.found))
        .collect();
    found.sort();
    let wanted = ["1048577 bytes", "an unusable brain mask: 1048577 bytes"];
    assert_eq!(found, wanted.map(|text| format!("too_large: {text}")));
    assert_eq!(site.stop(), Some(0));
}
