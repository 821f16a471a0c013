//! DICOM series, read by the real binary. An independent program (pydicom) writes them, and the
//! results are compared with those of another one (dcm2niix).

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use oddscan::{
    domain::left_alone::LeftAlone,
    quarantine::{ReasonFile, entries, requeue},
};
use rustix::process::Signal;

use crate::{
    goldens::shared,
    shipped::run,
    support::{self, Site, is_missing, names, oddscan, said, scan_bytes},
};

fn python() -> Option<Command> {
    support::python("dicom_series.py", "pydicom")
}

/// The lines that `oddscan dicom` prints about some files, and whether it succeeded.
fn convert(input: &Path, out: &Path) -> (Vec<serde_json::Value>, Option<i32>) {
    let output = oddscan().arg("dicom").arg(input).arg("--out").arg(out).output().unwrap();
    let (stdout, _, code) = said(&output);
    (stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), code)
}

#[test]
fn series_of_every_kind_become_the_volumes_that_dcm2niix_makes_or_are_refused_with_a_reason() {
    let (Some(mut make), Some(mut check)) = (python(), python()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let (cases, out) = (folder.path().join("cases"), folder.path().join("out"));
    print!("{}", run(make.arg("make").arg(&cases)));
    let all = names(&cases);
    assert!(all.len() > 55, "{all:?}");
    for case in all.iter().filter(|case| !case.starts_with('_')) {
        let (events, code) = convert(&cases.join(case), &out.join(case));
        let kinds: Vec<&str> =
            events.iter().map(|event| event["event"].as_str().unwrap()).collect();
        let kind = case.split('-').next().unwrap();
        if kind == "skipped3" {
            assert_eq!(kinds, ["skipped"; 3], "{case}: one line per direction: {events:?}");
        } else if kind == "refused" || kind == "skipped" {
            // One line for all its files, for any number of files.
            assert_eq!((&kinds[..], code), (&[kind][..], Some(65)), "{case}: {events:?}");
            let n_files = names(&cases.join(case)).len();
            assert_eq!(events[0]["files"].as_array().unwrap().len(), n_files, "{case}");
            assert!(!out.join(case).join("1_t1_mprage_sag_T1w.nii.gz").exists(), "{case}");
        } else {
            assert!(kinds.iter().all(|kind| *kind == "converted"), "{case}: {events:?}");
            assert_eq!(code, Some(0), "{case}");
        }
        if case == "stray" {
            let left_out = events[0]["left_out"].as_array().unwrap();
            assert_eq!((left_out.len(), events[0]["files"].as_array().unwrap().len()), (2, 20));
            let facts = out.join(case).join("1_t1_mprage_sag_T1w.json");
            let facts: serde_json::Value =
                serde_json::from_slice(&fs::read(facts).unwrap()).unwrap();
            assert_eq!(facts["OddscanNotes"].as_array().unwrap().len(), 2, "{facts}");
        }
        if kind == "refused" {
            let refusal = &events[0]["refusal"];
            let wanted = match case.as_str() {
                "refused-bomb" => "bomb",
                "refused-short" | "refused-empty" | "refused-cut" | "refused-zip"
                | "refused-zipcut" => "truncated",
                "refused-mosaic" | "refused-jpegls" => "unsupported",
                "refused-doubled" | "refused-missing" | "refused-unit" => "bad_header",
                _ => "corrupt",
            };
            let found = match case.as_str() {
                "refused-unit" => "11 of 11 files: PixelSpacing \"1.1\\0.9 mm\"",
                "refused-cut" => "11 files, the first: a file that ends within the",
                "refused-zipcut" => "3 of 11 DICOM files in a zip cannot be read: 3 x a file",
                _ => "",
            };
            assert!(refusal["found"].as_str().unwrap().contains(found), "{case}: {refusal}");
            assert_eq!(refusal["reason"], wanted, "{case}: {refusal}");
            assert!(!refusal["action"].as_str().unwrap().is_empty(), "{case}");
        }
        let left = names(&out.join(case));
        assert!(left.iter().all(|name| !name.starts_with('.')), "{case}: {left:?}");
    }
    print!("{}", run(check.arg("check").arg(&cases).arg(&out)));
}

#[test]
fn the_real_series_equals_that_of_dcm2niix() {
    let Some(zip) = shared("data/dicom_sag-anon.zip") else { return };
    let Some(mut equal) = python() else { return };
    if is_missing("dcm2niix", "dcm2niix") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    run(Command::new(env::var_os("ODDSCAN_PYTHON").unwrap())
        .args(["-m", "zipfile", "-e"])
        .arg(&zip)
        .arg(at("files")));
    fs::create_dir(at("peer")).unwrap();
    run(Command::new("dcm2niix")
        .args(["-z", "y", "-b", "n", "-f", "peer", "-o"])
        .arg(at("peer"))
        .arg(at("files")));
    let peer = at("peer").join("peer.nii.gz");
    for (input, out) in [(zip, at("of-zip")), (at("files"), at("of-folder"))] {
        let (events, code) = convert(&input, &out);
        assert_eq!((events.len(), code), (1, Some(0)), "{events:?}");
        // The sequence says T1, and the description agrees.
        let volume = out.join("5_SAG_MPRAGE_220_FOV_T1w.nii.gz");
        run(equal.arg("equal").arg(&volume).arg(&peer));
        equal = python().unwrap();
        let facts = fs::read_to_string(out.join("5_SAG_MPRAGE_220_FOV_T1w.json")).unwrap();
        let facts: serde_json::Value = serde_json::from_str(&facts).unwrap();
        assert_eq!(facts["MagneticFieldStrength"], 3.0);
        assert_eq!(facts["Manufacturer"], "Siemens");
        assert_eq!(facts["InversionTime"], 0.9);
    }
}

#[test]
fn a_scan_survives_the_way_through_dicom_along_each_axis_and_equals_that_of_dcm2niix() {
    let name = "data/wholehead_t1_2mm/IXI013-HH-1212-T1_ds.nii.gz";
    let (Some(scan), Some(mut make)) = (shared(name), python()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    run(make.arg("from").arg(scan).arg(at("files")));
    let (events, code) = convert(&at("files"), &at("out"));
    assert_eq!((events.len(), code), (3, Some(0)), "{events:?}");
    fs::create_dir(at("peer")).unwrap();
    let mut folders = vec![at("out")];
    if !is_missing("dcm2niix", "dcm2niix") {
        let mut peer = Command::new("dcm2niix");
        run(peer.args(["-z", "y", "-b", "n", "-o"]).arg(at("peer")).arg(at("files")));
        folders.push(at("peer"));
    }
    for folder in folders {
        let volumes: Vec<String> =
            names(&folder).into_iter().filter(|name| name.ends_with(".nii.gz")).collect();
        assert_eq!(volumes.len(), 3);
        for volume in volumes {
            let mut equal = python().unwrap();
            run(equal.arg("equal").arg(folder.join(volume)).arg(at("files.nii.gz")));
        }
    }
}

/// Writes a made-up brain of a new patient as a DICOM series into a folder of this name. Returns
/// its files.
pub fn brain_series(folder: &Path, seed: u64) -> Option<Vec<PathBuf>> {
    brain_series_of(&format!("MRN-{seed}"), folder, seed)
}

/// Like [`brain_series`], of the patient with this number.
pub fn brain_series_of(patient_id: &str, folder: &Path, seed: u64) -> Option<Vec<PathBuf>> {
    run(python()?.arg("brain").arg(folder).arg(seed.to_string()).arg(patient_id));
    Some(names(folder).into_iter().map(|name| folder.join(name)).collect())
}

pub fn zip_of(files: &[PathBuf], target: &Path) {
    let mut zip = zip::ZipWriter::new(fs::File::create(target).unwrap());
    for (number, file) in files.iter().enumerate() {
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file(format!("../../{number}"), options).unwrap();
        zip.write_all(&fs::read(file).unwrap()).unwrap();
    }
    zip.finish().unwrap();
}

pub const SOON: [&str; 2] = ["intake.series_settle_secs = 0.6", "volume.min_brain_ml = 10.0"];

#[test]
fn a_series_that_comes_slice_by_slice_is_taken_once_and_later_ones_beside_it_too() {
    // The scanner's facts in the headers decide the cohort.
    let rule = "cohort = [{ name = \"siemens-3t\", match = { suffix = \"T1w\", \
                field_strength_t = [2.5, 3.5], manufacturer = \"siemens*\" } }]";
    let mut site = Site::new(3, &[SOON[0], SOON[1], rule]);
    let Some(first) = brain_series(&site.path("made/first"), 1) else { return };
    let second = brain_series(&site.path("made/second"), 2).unwrap();
    let third = brain_series(&site.path("made/third"), 3).unwrap();
    let incoming = site.path("incoming/study");
    fs::create_dir_all(&incoming).unwrap();
    let put = |files: &[PathBuf], milliseconds| {
        for file in files {
            fs::copy(file, incoming.join(file.file_name().unwrap())).unwrap();
            thread::sleep(Duration::from_millis(milliseconds));
        }
    };
    site.start();
    put(&first, 50);
    site.wait("the first accepted", |site| site.status().n_accepted == 1);
    // Another series arrives in a flat folder.
    put(&second, 0);
    site.wait("the second accepted", |site| site.status().n_accepted == 2);
    zip_of(&third, &site.path("incoming/third.zip"));
    let stems = ["1_t1_mprage_sag_T1w", "2_t1_mprage_sag_T1w", "3_t1_mprage_sag_T1w"];
    site.wait_scored(&stems);
    assert_eq!((site.status().n_duplicates, site.status().n_quarantined), (0, 0));
    assert_eq!(site.status().n_accepted, 3);
    assert_eq!(site.status().cohorts["siemens-3t"].n_scans, 3);
    assert_eq!(names(&incoming).len(), first.len() + second.len(), "files stay where they are");
    let came_from = stems.map(|stem| site.sidecar(stem).unwrap().came_from);
    assert_eq!(came_from, ["study", "study", "third.zip"]);
    assert_eq!(site.stop(), Some(0));
    // Known files are not read again.
    site.start();
    thread::sleep(Duration::from_secs(2));
    let status = site.status();
    assert_eq!((status.n_accepted, status.n_duplicates, status.n_quarantined), (0, 0, 0));
    // The same scan in another container is recognised by its content.
    zip_of(&first, &site.path("incoming/again.zip"));
    site.wait("the copy known", |site| site.status().n_duplicates == 1);
    let log = site.log();
    assert!(!log.contains("mprage") && !log.contains("study"), "no names in the log: {log}");
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_kill_at_any_moment_of_a_conversion_loses_no_series_and_takes_none_twice() {
    let mut site = Site::new(3, &SOON);
    let folders = [1, 2, 3].map(|seed| (seed, site.path(&format!("incoming/study-{seed}"))));
    for (seed, folder) in &folders {
        if brain_series(folder, *seed).is_none() {
            return;
        }
    }
    for milliseconds in [700, 1500, 900, 2000, 1100] {
        site.start();
        thread::sleep(Duration::from_millis(milliseconds));
        site.kill();
    }
    site.start();
    site.wait_scored(&["1_t1_mprage_sag_T1w", "2_t1_mprage_sag_T1w", "3_t1_mprage_sag_T1w"]);
    // Results from before the last kill may exist before the window is restored.
    site.wait("idle", |site| {
        let status = site.status();
        status.cohorts.get("t1w").is_some_and(|cohort| cohort.n_scans == 3) && status.n_waiting == 0
    });
    let stems: Vec<String> = names(&site.path("results"));
    assert_eq!(stems.iter().filter(|name| name.ends_with(".json")).count(), 3, "{stems:?}");
    assert_eq!(names(&site.path("quarantine")), Vec::<String>::new());
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_series_with_a_gap_is_waited_for_and_goes_to_quarantine_as_one_entry() {
    let mut site = Site::new(2, &["intake.series_settle_secs = 0.3", SOON[1]]);
    let Some(files) = brain_series(&site.path("made/late"), 1) else { return };
    let broken = brain_series(&site.path("made/broken"), 2).unwrap();
    let incoming = site.path("incoming");
    let put = |folder: &str, file: &PathBuf| {
        let folder = incoming.join(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::copy(file, folder.join(file.file_name().unwrap())).unwrap();
    };
    files.iter().enumerate().filter(|(k, _)| *k != 7).for_each(|(_, file)| put("late", file));
    broken.iter().enumerate().filter(|(k, _)| *k != 9).for_each(|(_, file)| put("broken", file));
    site.start();
    // Longer than a complete series waits before it is read.
    thread::sleep(Duration::from_secs(1));
    put("late", &files[7]);
    site.wait("the late one accepted", |site| site.status().n_accepted == 1);
    site.wait("the other refused", |site| site.status().n_quarantined == 1);
    let found = entries(&site.path("quarantine")).unwrap();
    let [entry] = &found[..] else { panic!("{found:?}") };
    assert_eq!(entry.name, Path::new("bad_header/2_t1_mprage_sag_T1w"));
    let folder = site.path("quarantine").join(&entry.name);
    assert_eq!(names(&folder), ["2_t1_mprage_sag_T1w", "reason.json"]);
    assert_eq!(names(&folder.join("2_t1_mprage_sag_T1w")).len(), broken.len() - 1);
    assert!(entry.reason.as_ref().unwrap().refusal.found.contains("gaps of 4.000 to 8.000 mm"));
    // After it is put back and completed, it is taken.
    let back = requeue(&site.path("quarantine"), &entry.name, &site.path("incoming")).unwrap();
    fs::copy(&broken[9], back.join("missing.dcm")).unwrap();
    site.wait("accepted", |site| site.status().n_accepted == 2);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_zip_that_stalls_is_waited_for_and_taken_whole_when_it_goes_on() {
    let mut site = Site::new(2, &[&SOON[..], &["intake.settle_secs = 1.0"]].concat());
    let Some(files) = brain_series(&site.path("made"), 1) else { return };
    zip_of(&files, &site.path("whole.zip"));
    let bytes = fs::read(site.path("whole.zip")).unwrap();
    site.start();
    let mut zip = fs::File::create(site.path("incoming/stall.zip")).unwrap();
    zip.write_all(&bytes[..bytes.len() / 2]).unwrap();
    site.wait("waiting for its end", |site| site.status().n_unfinished == 1);
    // The sender pauses for longer than a whole file waits.
    thread::sleep(Duration::from_secs(2));
    assert_eq!((site.status().n_accepted, site.status().n_quarantined), (0, 0));
    zip.write_all(&bytes[bytes.len() / 2..]).unwrap();
    drop(zip);
    site.wait("accepted", |site| {
        let status = site.status();
        (status.n_accepted, status.n_unfinished) == (1, 0)
    });
    assert_eq!(site.status().n_quarantined, 0);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn files_that_are_left_alone_are_known_after_a_restart_and_read_again_when_one_of_them_goes() {
    let mut site = Site::new(2, &SOON);
    let Some(files) = brain_series(&site.path("made"), 1) else { return };
    let folder = site.path("incoming/scout");
    fs::create_dir_all(&folder).unwrap();
    for file in &files[..2] {
        fs::copy(file, folder.join(file.file_name().unwrap())).unwrap();
    }
    let left_alone = |n_files: usize| BTreeMap::from([(LeftAlone::TooFewSlices, n_files)]);
    let ignored = "oddscan_ingest_volumes_total{result=\"ignored\"}";
    let few = "oddscan_left_alone_files{reason=\"too_few_slices\"}";
    site.start();
    site.wait("left alone", |site| site.status().left_alone == left_alone(2));
    assert_eq!((site.metric(ignored), site.metric(few)), (1.0, 2.0));
    assert_eq!(site.stop(), Some(0));
    site.start();
    site.wait("known", |site| site.status().left_alone == left_alone(2));
    thread::sleep(Duration::from_secs(2));
    assert_eq!(site.metric(ignored), 0.0, "not read again");
    fs::remove_file(folder.join(files[0].file_name().unwrap())).unwrap();
    site.wait("read again", |site| site.metric(ignored) == 1.0);
    site.wait("one left", |site| site.status().left_alone == left_alone(1));
    assert_eq!(site.stop(), Some(0));
}

/// Copies files to these places, which may lie in new folders.
fn put_all(files: &[PathBuf], place: impl Fn(usize) -> PathBuf) {
    for (k, file) in files.iter().enumerate() {
        let place = place(k);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::copy(file, place).unwrap();
    }
}

#[test]
fn a_series_is_one_scan_wherever_its_files_lie() {
    let mut site = Site::new(3, &SOON);
    let Some(first) = brain_series(&site.path("made/first"), 1) else { return };
    let incoming = site.path("incoming");
    // The next folder of a medium goes on with the series.
    put_all(&first, |k| incoming.join(format!("cd/DIR{}/IM{k:03}", k / 25)));
    // Hashed storage: a folder for each file.
    let second = brain_series(&site.path("made/second"), 2).unwrap();
    put_all(&second, |k| incoming.join(format!("store/{}/{:x}/{k:08x}", k % 7, k * 37 % 16)));
    let third = brain_series(&site.path("made/third"), 3).unwrap();
    fs::create_dir(incoming.join("zips")).unwrap();
    let halves: Vec<PathBuf> = third.iter().step_by(2).cloned().collect();
    zip_of(&halves, &incoming.join("zips/a.zip"));
    let halves: Vec<PathBuf> = third.iter().skip(1).step_by(2).cloned().collect();
    zip_of(&halves, &incoming.join("zips/b.zip"));

    site.start();
    let stems = ["1_t1_mprage_sag_T1w", "2_t1_mprage_sag_T1w", "3_t1_mprage_sag_T1w"];
    site.wait_scored(&stems);
    let status = site.status();
    assert_eq!((status.n_accepted, status.n_duplicates, status.n_quarantined), (3, 0, 0));
    let came_from = stems.map(|stem| site.sidecar(stem).unwrap().came_from);
    assert_eq!(came_from, ["cd", "store", "zips"]);
    assert_eq!(site.stop(), Some(0));

    // The store knows the series of all files.
    site.start();
    thread::sleep(Duration::from_secs(2));
    let status = site.status();
    assert_eq!((status.n_accepted, status.n_duplicates, status.n_quarantined), (0, 0, 0));
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_slice_that_comes_late_to_another_folder_reopens_its_series() {
    let mut site = Site::new(2, &SOON);
    let Some(files) = brain_series(&site.path("made/late"), 1) else { return };
    brain_series(&site.path("incoming/other"), 2).unwrap();
    let (last, part) = files.split_last().unwrap();
    let incoming = site.path("incoming");
    put_all(part, |k| incoming.join(format!("a/IM{k:03}")));
    site.start();
    site.wait("both accepted", |site| site.status().n_accepted == 2);

    put_all(std::slice::from_ref(last), |_| incoming.join("b/IM000"));
    site.wait("the whole series accepted", |site| site.status().n_accepted == 3);
    let warns = |site: &Site| {
        let names = names(&site.path("results"));
        let stems = names.iter().filter_map(|name| name.strip_suffix("_anomaly.json"));
        let warnings: Vec<String> =
            stems.filter_map(|stem| site.sidecar(stem)).flat_map(|found| found.warnings).collect();
        warnings.iter().filter(|text| text.contains("series had fewer slices")).count() == 1
    };
    site.wait("one result says so", warns);
    let is_replaced = |site: &Site| {
        let names = names(&site.path("results"));
        let stems = names.iter().filter_map(|name| name.strip_suffix("_anomaly.json"));
        let found: Vec<_> = stems.filter_map(|stem| site.sidecar(stem)).collect();
        let says = |text: &str| text.starts_with("a later scan of the same series");
        found.iter().any(|found| {
            found.warnings.iter().any(|warning| says(warning))
                && found.quality.as_ref().is_some_and(|quality| !quality.is_reference)
        })
    };
    site.wait("the earlier scan is no reference", is_replaced);
    assert_eq!((site.status().n_duplicates, site.status().n_quarantined), (0, 0));
    assert!(incoming.join("a/IM000").is_file(), "files of scans stay where they are");
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_file_that_grows_holds_back_its_own_series_alone() {
    let mut site = Site::new(2, &["intake.series_settle_secs = 1.5", SOON[1]]);
    let Some(whole) = brain_series(&site.path("made/whole"), 1) else { return };
    let growing = brain_series(&site.path("made/growing"), 2).unwrap();
    let flat = site.path("incoming/flat");
    let place = |series: usize| {
        let flat = flat.clone();
        move |k: usize| flat.join(format!("{series}-{k:03}"))
    };
    put_all(&whole, place(1));
    put_all(&growing, place(2));
    site.start();

    let end = place(2)(growing.len() - 1);
    let grow = || {
        let mut file = fs::OpenOptions::new().append(true).open(&end).unwrap();
        file.write_all(b" ").unwrap();
    };
    site.wait("the whole series accepted", |site| {
        grow();
        site.status().n_accepted == 1
    });
    for _ in 0..30 {
        grow();
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(site.status().n_accepted, 1, "no part of the other is taken");
    assert!(site.status().n_settling > 0);
    fs::copy(growing.last().unwrap(), &end).unwrap();
    site.wait("the other accepted", |site| site.status().n_accepted == 2);
    assert_eq!((site.status().n_duplicates, site.status().n_quarantined), (0, 0));
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_refused_series_of_several_folders_is_one_entry_and_loses_no_file_of_the_same_name() {
    let mut site = Site::new(2, &["intake.series_settle_secs = 0.2", SOON[1]]);
    let Some(mut files) = brain_series(&site.path("made/split"), 1) else { return };
    let missing = files.remove(9);
    let incoming = site.path("incoming");
    // Both folders count from 0.
    put_all(&files, |k| incoming.join(format!("cd/{}/IM{:03}", k % 2, k / 2)));
    site.start();
    site.wait("refused", |site| site.status().n_quarantined == 1);
    let found = entries(&site.path("quarantine")).unwrap();
    let [entry] = &found[..] else { panic!("{found:?}") };
    assert_eq!(entry.name, Path::new("bad_header/1_t1_mprage_sag_T1w"));
    let reason = entry.reason.as_ref().unwrap();
    assert!(reason.moved && reason.came_from == "cd/1_t1_mprage_sag_T1w", "{reason:?}");

    let back = requeue(&site.path("quarantine"), &entry.name, &incoming).unwrap();
    assert_eq!(names(&back), ["0", "1"]);
    let n_files = names(&back.join("0")).len() + names(&back.join("1")).len();
    assert_eq!(n_files, files.len());
    fs::copy(&missing, incoming.join("cd/missing")).unwrap();
    site.wait("accepted", |site| site.status().n_accepted == 1);
    assert_eq!(site.stop(), Some(0));
}

/// The events of `oddscan dicom` for a list in the daemon's form.
fn convert_listed(list: &[u8], out: &Path, options: &[&str]) -> Vec<serde_json::Value> {
    let at = out.with_extension("list");
    fs::write(&at, list).unwrap();
    let mut command = oddscan();
    command.args(["dicom", "--listed", "--out"]).arg(out).args(options);
    let output = command.stdin(fs::File::open(at).unwrap()).output().unwrap();
    let (stdout, stderr, code) = said(&output);
    assert_eq!(code, Some(0), "{stderr}");
    let events = stdout.lines().map(|line| serde_json::from_str(line).unwrap());
    events.filter(|event: &serde_json::Value| event["event"] != "in_hand").collect()
}

/// The files of an event of this kind.
fn inputs_of(events: &[serde_json::Value], kind: &str) -> Vec<u64> {
    let of_kind = events.iter().filter(|event| event["event"] == kind);
    let inputs = of_kind.flat_map(|event| event["inputs"].as_array().unwrap());
    inputs.map(|input| input.as_u64().unwrap()).collect()
}

#[test]
fn a_run_ends_at_its_bounds_and_reads_only_the_series_of_new_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let Some(first) = brain_series(&at("first"), 1) else { return };
    let second = brain_series(&at("second"), 2).unwrap();
    let files: Vec<&PathBuf> = first.iter().chain(&second).collect();
    let n_first = first.len() as u64;
    let list = |entry: &dyn Fn(usize) -> String| -> Vec<u8> {
        let entry = |(k, file): (usize, &&PathBuf)| format!("{} {}\0", entry(k), file.display());
        files.iter().enumerate().map(entry).collect::<String>().into_bytes()
    };

    // Nothing is converted while the series of new files are not all known.
    let events = convert_listed(&list(&|_| "n?".into()), &at("a"), &["--max-unknown", "50"]);
    assert_eq!(inputs_of(&events, "belongs"), (0..50).collect::<Vec<_>>());
    assert_eq!(inputs_of(&events, "postponed").len(), files.len());
    assert_eq!(inputs_of(&events, "converted").len(), 0);

    let events = convert_listed(&list(&|_| "n?".into()), &at("b"), &["--max-volumes", "1"]);
    assert_eq!(inputs_of(&events, "converted"), (0..n_first).collect::<Vec<_>>());
    assert_eq!(inputs_of(&events, "postponed"), (n_first..80).collect::<Vec<_>>());
    let mut keys = vec![String::new(); files.len()];
    for event in events.iter().filter(|event| event["event"] == "belongs") {
        let input = usize::try_from(event["inputs"][0].as_u64().unwrap()).unwrap();
        keys[input] = event["series"][0].as_str().unwrap().to_owned();
    }

    // The last slice of the second series is new. The first series is not even opened.
    first.iter().for_each(|file| fs::write(file, "damaged").unwrap());
    let entry = |k: usize| format!("{}{}", if k == 79 { 'n' } else { 'k' }, keys[k]);
    let events = convert_listed(&list(&entry), &at("c"), &[]);
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(inputs_of(&events, "converted"), (n_first..80).collect::<Vec<_>>());

    // A paused series waits, also with a new file.
    let paused = |k: usize| format!("{}{}", if k == 79 { 'n' } else { 'p' }, keys[k]);
    let events = convert_listed(&list(&paused), &at("d"), &[]);
    assert_eq!(inputs_of(&events, "waiting"), [79]);
    assert_eq!(events.len(), 1, "{events:?}");
}

#[test]
fn a_zip_that_a_run_has_begun_is_finished_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let Some(mut files) = brain_series(&at("first"), 1) else { return };
    files.extend(brain_series(&at("second"), 2).unwrap());
    zip_of(&files, &at("both.zip"));
    let list = format!("n? {}\0", at("both.zip").display());
    let events = convert_listed(list.as_bytes(), &at("out"), &["--max-volumes", "1"]);
    assert_eq!(inputs_of(&events, "converted"), [0, 0], "{events:?}");
    assert_eq!(inputs_of(&events, "postponed").len(), 0);
}

#[test]
fn bare_data_sets_without_an_ending_are_taken_and_unreadable_files_are_one_entry() {
    let mut site = Site::new(2, &SOON);
    let Some(files) = brain_series(&site.path("made"), 1) else { return };
    let put = |folder: &str, name: &str, bytes: &[u8]| {
        let folder = site.path("incoming").join(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name), bytes).unwrap();
    };
    for (number, file) in files.iter().enumerate() {
        let bytes = fs::read(file).unwrap();
        let n_bytes = u32::from_le_bytes(bytes[140..144].try_into().unwrap()) as usize;
        put("bare", &format!("IM{number}"), &bytes[144 + n_bytes..]);
        put("damaged", &format!("{number}.dcm"), &[0xee; 600]);
    }
    put("bare", "letter", b"to a friend");
    site.start();
    site.wait("the bare series accepted", |site| site.status().n_accepted == 1);
    site.wait("the damaged files refused", |site| site.status().n_quarantined == 1);
    let found = entries(&site.path("quarantine")).unwrap();
    let [entry] = &found[..] else { panic!("{found:?}") };
    assert_eq!(entry.name, Path::new("corrupt/unreadable"));
    let folder = site.path("quarantine").join(&entry.name).join("unreadable");
    assert_eq!(names(&folder).len(), files.len());
    let text = &entry.reason.as_ref().unwrap().refusal.found;
    assert!(text.starts_with(&format!("{} files, the first: ", files.len())), "{text}");
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn stray_slices_cost_no_scan_and_the_sidecar_names_them() {
    let mut site = Site::new(2, &SOON);
    let incoming = site.path("incoming/study");
    let Some(files) = brain_series(&incoming, 1) else { return };
    // A reference slice in another direction, at the end of the series.
    run(python().unwrap().arg("turn").arg(&files[7]).arg(incoming.join("reference.dcm")));
    // The slices of the second series came twice, under other instance UIDs.
    let second = site.path("incoming/twice");
    for file in brain_series(&second, 2).unwrap() {
        let name = format!("again-{}", file.file_name().unwrap().to_string_lossy());
        run(python().unwrap().arg("rename").arg(&file).arg(second.join(name)));
    }
    site.start();
    site.wait_scored(&["1_t1_mprage_sag_T1w", "2_t1_mprage_sag_T1w"]);
    assert_eq!(names(&site.path("quarantine")), Vec::<String>::new());
    assert_eq!(names(&incoming).len(), files.len() + 1, "files stay where they are");
    let warnings = |stem| site.sidecar(stem).unwrap().warnings;
    let is_named = |warning: &String| warning.starts_with("1 slice of another direction was left");
    assert!(warnings("1_t1_mprage_sag_T1w").iter().any(is_named));
    assert!(!warnings("2_t1_mprage_sag_T1w").iter().any(|warning| warning.contains("left out")));
    assert_eq!(site.stop(), Some(0));
}

/// A DICOM file with these elements (explicit, little endian) and this transfer syntax.
fn dicom_file(syntax: &str, elements: &[(u16, u16, &[u8; 2], Vec<u8>)], tail: &[u8]) -> Vec<u8> {
    let element = |(group, number, kind, value): &(u16, u16, &[u8; 2], Vec<u8>)| {
        let mut value = value.clone();
        if value.len() % 2 == 1 {
            value.push(if *kind == b"UI" { 0 } else { b' ' });
        }
        let length = u16::try_from(value.len()).unwrap();
        let head = [group.to_le_bytes(), number.to_le_bytes(), **kind, length.to_le_bytes()];
        [head.concat(), value].concat()
    };
    let meta: Vec<u8> = [
        (2, 2, b"UI", b"1.2.840.10008.5.1.4.1.1.4".to_vec()),
        (2, 3, b"UI", b"1.2.3.4".to_vec()),
        (2, 16, b"UI", syntax.as_bytes().to_vec()),
    ]
    .iter()
    .flat_map(element)
    .collect();
    let length = element(&(2, 0, b"UL", u32::try_from(meta.len()).unwrap().to_le_bytes().to_vec()));
    let body: Vec<u8> = elements.iter().flat_map(element).collect();
    [&[0; 128][..], b"DICM", &length, &meta, &body, tail].concat()
}

/// The header of a slice of 64 x 64 pixels.
fn slice_header(slice: usize) -> Vec<(u16, u16, &'static [u8; 2], Vec<u8>)> {
    let short = |value: u16| value.to_le_bytes().to_vec();
    let text = |text: &str| text.as_bytes().to_vec();
    vec![
        (8, 8, b"CS", text("ORIGINAL\\PRIMARY\\M")),
        (8, 0x16, b"UI", text("1.2.840.10008.5.1.4.1.1.4")),
        (8, 0x18, b"UI", text(&format!("1.2.3.{slice}"))),
        (8, 0x60, b"CS", text("MR")),
        (0x20, 0xd, b"UI", text("1.2.8")),
        (0x20, 0xe, b"UI", text("1.2.9")),
        (0x20, 0x32, b"DS", text(&format!("0\\0\\{slice}"))),
        (0x20, 0x37, b"DS", text("1\\0\\0\\0\\1\\0")),
        (0x28, 2, b"US", short(1)),
        (0x28, 4, b"CS", text("MONOCHROME2")),
        (0x28, 0x10, b"US", short(64)),
        (0x28, 0x11, b"US", short(64)),
        (0x28, 0x30, b"DS", text("1\\1")),
        (0x28, 0x100, b"US", short(16)),
        (0x28, 0x101, b"US", short(16)),
        (0x28, 0x102, b"US", short(15)),
        (0x28, 0x103, b"US", short(0)),
    ]
}

/// The header of an element with a length of four bytes (explicit, little endian).
fn long_head(group: u16, number: u16, kind: &[u8; 2], length: u32) -> Vec<u8> {
    let tag = [group.to_le_bytes(), number.to_le_bytes()].concat();
    [&tag[..], kind, &[0; 2], &length.to_le_bytes()].concat()
}

/// A slice of 64 x 64 pixels that is compressed so.
fn compressed(syntax: &str, slice: usize, stream: &[u8]) -> Vec<u8> {
    let item = |bytes: &[u8]| {
        let length = u32::try_from(bytes.len()).unwrap().to_le_bytes();
        [&[0xfe, 0xff, 0, 0xe0][..], &length, bytes].concat()
    };
    let end = [0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0];
    let head = long_head(0x7fe0, 0x10, b"OB", u32::MAX);
    let tail = [&head[..], &item(&[]), &item(stream), &end].concat();
    dicom_file(syntax, &slice_header(slice), &tail)
}

const JPEG_LOSSLESS: &str = "1.2.840.10008.1.2.4.70";

/// A JPEG whose header claims 65,000 x 65,000 pixels: a table of one code, a lossless frame, the
/// start of a scan, and hardly any data.
fn jpeg_of_four_gigabytes() -> Vec<u8> {
    [
        &b"\xff\xd8"[..],
        b"\xff\xc4\x00\x14\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        b"\xff\xc3\x00\x0b\x10\xfd\xe8\xfd\xe8\x01\x01\x11\x00",
        b"\xff\xda\x00\x08\x01\x01\x00\x01\x00\x00",
        &[0; 64],
        b"\xff\xd9",
    ]
    .concat()
}

/// A JPEG 2000 codestream for this many pixels and components, in tiles of this size, with hardly
/// any data.
fn jpeg_2000(extent: u32, n_components: u16, tile: u32) -> Vec<u8> {
    let extents = [extent, extent, 0, 0, tile, tile, 0, 0];
    let extents: Vec<u8> = extents.into_iter().flat_map(u32::to_be_bytes).collect();
    let components = [15, 1, 1].repeat(n_components.into());
    let n_bytes = 38 + 3 * n_components;
    [
        &b"\xff\x4f\xff\x51"[..],
        &n_bytes.to_be_bytes(),
        b"\0\0",
        &extents,
        &n_components.to_be_bytes(),
        &components,
        b"\xff\x52\0\x0c\0\0\0\x01\0\x05\x04\x04\0\x01",
        b"\xff\x5c\0\x13\x40\x40\x48\x48\x50\x48\x48\x50\x48\x48\x50\x48\x48\x50\x48\x48\x50",
        b"\xff\x90\0\x0a\0\0\0\0\0\x36\0\x01\xff\x93",
        &[0; 40],
        b"\xff\xd9",
    ]
    .concat()
}

/// Sequences within sequences, as deep as the file is long.
fn nested(depth: usize) -> Vec<u8> {
    let level = [
        &[0x08, 0, 0x40, 0x11, b'S', b'Q', 0, 0, 0xff, 0xff, 0xff, 0xff][..],
        &[0xfe, 0xff, 0, 0xe0, 0xff, 0xff, 0xff, 0xff],
    ];
    dicom_file("1.2.840.10008.1.2.1", &[], &level.concat().repeat(depth))
}

#[test]
fn a_hostile_folder_does_no_harm_and_the_good_series_within_is_taken() {
    let small = ["intake.max_megavoxels = 1", "intake.max_file_mib = 128"];
    let mut site = Site::new(2, &[&SOON[..], &small[..]].concat());
    let incoming = site.path("incoming/study");
    if brain_series(&incoming, 1).is_none() {
        return;
    }
    let secret = site.path("secret.dcm");
    fs::write(&secret, dicom_file("1.2.840.10008.1.2.1", &[], &[])).unwrap();
    let put = |name: &str, bytes: &[u8]| fs::write(incoming.join(name), bytes).unwrap();
    let noise: Vec<u8> =
        (0..100_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    put("noise.dcm", &noise);
    put("line\nbreak.dcm", b"garbage");
    put("nested.dcm", &nested(200_000));
    let bomb = |slice| compressed(JPEG_LOSSLESS, slice, &jpeg_of_four_gigabytes());
    (0..4).for_each(|slice| put(&format!("bomb-{slice}"), &bomb(slice)));
    std::os::unix::fs::symlink(&secret, incoming.join("link.dcm")).unwrap();
    std::os::unix::fs::symlink(site.path("state"), incoming.join("out")).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let fifo = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, incoming.join("pipe.dcm"), fifo, mode, 0).unwrap();
    let mut zip = zip::ZipWriter::new(fs::File::create(incoming.join("bomb.zip")).unwrap());
    zip.start_file("x", zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(&[&[0; 128][..], b"DICM"].concat()).unwrap();
    (0..300).for_each(|_| zip.write_all(&vec![0; 1 << 20]).unwrap());
    zip.finish().unwrap();
    fs::write(site.path("incoming/sub-2_T1w.nii.gz"), scan_bytes(2)).unwrap();
    site.start();
    site.wait("the good ones accepted", |site| site.status().n_accepted == 2);
    site.wait("the others refused", |site| site.status().n_quarantined == 5);
    let mut reasons = BTreeSet::new();
    for entry in entries(&site.path("quarantine")).unwrap() {
        let ReasonFile { refusal, moved, .. } = entry.reason.unwrap();
        assert!(moved, "{refusal}");
        reasons.insert((refusal.reason.name(), entry.name.file_name().unwrap().to_owned()));
    }
    let wanted = [
        ("bomb", "bomb.zip"),
        ("bomb", "0_series_unknown"),
        ("corrupt", "nested.dcm"),
        ("corrupt", "noise.dcm"),
        ("truncated", "line\nbreak.dcm"),
    ];
    assert_eq!(reasons, wanted.map(|(reason, name)| (reason, name.into())).into());
    assert!(secret.is_file() && incoming.join("link.dcm").is_symlink());
    assert!(incoming.join("out").is_symlink() && incoming.join("pipe.dcm").exists());
    site.wait_scored(&["1_t1_mprage_sag_T1w", "sub-2_T1w"]);
    site.wait("no conversion", |site| names(&site.path("state/dicom")).is_empty());
    assert!(site.is_running());
    assert_eq!(site.stop(), Some(0));
}

/// Name, words of the refusal, and the codestream for so many bytes of pixels.
type Announced<'a> = (&'a str, &'a str, &'a dyn Fn(usize) -> Vec<u8>);

#[test]
fn small_files_that_announce_gigabytes_are_refused_within_the_memory_of_small_files() {
    let folder = tempfile::tempdir().unwrap();
    let (jpeg_2000_lossless, rle) = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5");
    // The parser must not trust a length, and the codecs must not trust their codestreams.
    let long = |kind| {
        move |slice: usize| {
            let tail = [long_head(0x29, 0x1010, kind, 0xffff_fff0), vec![0; 30]].concat();
            dicom_file("1.2.840.10008.1.2.1", &slice_header(slice), &tail)
        }
    };
    let packed = |syntax, stream: Vec<u8>| move |slice: usize| compressed(syntax, slice, &stream);
    let runs = [&0x3fff_fff0_u32.to_le_bytes()[..], &[64; 100]].concat();
    let cases: [Announced<'_>; 8] = [
        ("OB", "truncated", &long(b"OB")),
        ("UN", "truncated", &long(b"UN")),
        ("SQ", "corrupt", &long(b"SQ")),
        ("JPEG", "bomb", &packed(JPEG_LOSSLESS, jpeg_of_four_gigabytes())),
        ("JPEG 2000", "bomb", &packed(jpeg_2000_lossless, jpeg_2000(30_000, 1, 30_000))),
        ("components", "corrupt", &packed(jpeg_2000_lossless, jpeg_2000(64, 16_384, 64))),
        ("tiles", "bomb", &packed(jpeg_2000_lossless, jpeg_2000(64, 1, 1))),
        ("runs", "corrupt", &packed(rle, runs)),
    ];
    for (what, reason, file) in cases {
        let mut list = Vec::new();
        for slice in 0..3 {
            let path = folder.path().join(format!("{what}-{slice}"));
            fs::write(&path, file(slice)).unwrap();
            list.extend(format!("n? {}\0", path.display()).bytes());
        }
        // The daemon gives less to files of so few bytes.
        let memory = ["--memory-bytes", "150000000", "--max-voxels", "200000000"];
        let events = convert_listed(&list, &folder.path().join("out"), &memory);
        let refused: Vec<_> = events.iter().filter(|event| event["event"] == "refused").collect();
        assert_eq!(refused.len(), 1, "{what}: {events:?}");
        assert_eq!(refused[0]["refusal"]["reason"], reason, "{what}: {events:?}");
        assert_eq!(inputs_of(&events, "refused"), [0, 1, 2], "{what}");
    }
}

#[test]
fn nifti_files_are_taken_while_a_conversion_hangs_and_a_stop_ends_it() {
    let mut site = Site::new(2, &SOON);
    let Some(files) = brain_series(&site.path("made"), 1) else { return };
    let incoming = site.path("incoming/study");
    put_all(&files, |k| incoming.join(format!("{k}.dcm")));
    let zeros = long_head(0x29, 0x1010, b"OB", 400 << 20);
    let start = dicom_file("1.2.840.10008.1.2.1", &slice_header(0), &zeros);
    let put_large = |name: &str| {
        let mut large = fs::File::create(incoming.join(name)).unwrap();
        large.write_all(&start).unwrap();
        large.set_len((400 << 20) + start.len() as u64).unwrap();
    };

    // Stops the process of a conversion. One that ends before it is found is followed by another.
    let hang = |site: &Site, name: &str| {
        for number in 0..100 {
            put_large(&format!("{name}-{number}.dcm"));
            let started = Instant::now();
            while started.elapsed() < Duration::from_secs(2) {
                if let Some(child) = site.child() {
                    rustix::process::kill_process(child, Signal::STOP).unwrap();
                    return child;
                }
            }
        }
        panic!("no conversion was found in time:\n{}", site.log());
    };
    site.start();
    let converter = hang(&site, "first");
    let n_before = site.status().n_accepted;
    fs::write(site.path("incoming/sub-2_T1w.nii.gz"), scan_bytes(2)).unwrap();
    site.wait("the scan accepted", |site| site.status().n_accepted == n_before + 1);
    assert_eq!(site.status().intake.as_deref(), Some("converting DICOM files"));
    rustix::process::kill_process(converter, Signal::CONT).unwrap();
    site.wait("the series accepted", |site| site.status().n_accepted == 2);
    site.wait("no conversion", |site| {
        site.status().intake.is_none() && names(&site.path("state/dicom")).is_empty()
    });

    // The next conversion hangs for ever.
    hang(&site, "next");
    assert_eq!(site.stop(), Some(0));
    assert_eq!(names(&site.path("state/dicom")), Vec::<String>::new());
}

#[test]
fn score_takes_folders_and_zips_of_dicom_files() {
    let site = Site::new(2, &SOON);
    let Some(first) = brain_series(&site.path("scans/first"), 1) else { return };
    brain_series(&site.path("scans/second"), 2).unwrap();
    zip_of(&first, &site.path("first.zip"));
    fs::remove_dir_all(site.path("scans/first")).unwrap();
    let mut score = oddscan();
    score.args(["score", "--json", "--config"]).arg(site.path("config.toml"));
    score.arg("--out").arg(site.path("results"));
    let output = score.arg(site.path("first.zip")).arg(site.path("scans")).output().unwrap();
    let (stdout, stderr, code) = said(&output);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let stems: BTreeSet<&str> = report["scored"]
        .as_array()
        .unwrap()
        .iter()
        .map(|scan| scan["stem"].as_str().unwrap())
        .collect();
    assert_eq!(stems, ["1_t1_mprage_sag_T1w", "2_t1_mprage_sag_T1w"].into());
}
