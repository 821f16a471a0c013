//! What results say of patients: nothing that a folder, a file or a header calls them, unless the
//! site wants it.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use oddscan::{
    nifti::{self, Limits},
    report::{Sidecar, Standing, read_sidecar},
};
use rustix::process::Signal;

use crate::{
    dicom::{SOON, brain_series_of},
    support::{Site, names, oddscan, said, scan_bytes},
};

const HASH: &str = "results.identity = \"hash\"";

/// Parts of names and numbers that no result may have.
const NAMED: [&str; 8] = ["ROE", "Roe", "RITA", "MRN9001", "19700101", "DOE", "JANE", "MRN-4711"];

/// Folder as archives name it.
const FOLDER: &str = "ROE^RITA MRN9001 19700101/20240102 MR HEAD";

fn sidecars(folder: &Path) -> Vec<Sidecar> {
    let names = names(folder).into_iter().filter(|name| name.ends_with(".json"));
    names.filter_map(|name| read_sidecar(&folder.join(name)).ok()).collect()
}

/// Names of the result files, and the text of the sidecars.
fn said_by_results(folder: &Path) -> String {
    let names = names(folder);
    let texts = names.iter().filter(|name| name.ends_with(".json"));
    let texts: Vec<String> =
        texts.map(|name| fs::read_to_string(folder.join(name)).unwrap_or_default()).collect();
    names.join("\n") + &texts.join("\n")
}

fn names_a_patient(folder: &Path) -> bool {
    let said = said_by_results(folder);
    NAMED.iter().any(|name| said.contains(name))
}

/// Puts three scans into the incoming folder: one below a folder that names a patient, one whose
/// own name does, and one with a BIDS name.
fn fill(site: &Site) {
    let folder = site.path("incoming").join(FOLDER);
    fs::create_dir_all(&folder).unwrap();
    let json = br#"{"SeriesDescription": "T1 MPRAGE Roe", "ProtocolName": "head routine"}"#;
    fs::write(folder.join("DOE_JANE_T1w.json"), json).unwrap();
    fs::write(folder.join("DOE_JANE_T1w.nii.gz"), scan_bytes(1)).unwrap();
    fs::write(folder.join("t1_T1w.nii.gz"), scan_bytes(2)).unwrap();
    site.drop_in("sub-3_T1w.nii.gz", &scan_bytes(3));
}

/// Whether the folder has the complete results of `n` scans and nothing else.
fn is_complete(folder: &Path, n: usize, stem: &str) -> bool {
    let all = names(folder);
    let n_named = all.iter().filter(|name| name.starts_with(stem)).count();
    let is_scored = |sidecar: &Sidecar| {
        sidecar.standing == Standing::Scored && sidecar.window.size == n && {
            let files = sidecar.files.as_ref().unwrap();
            [&files.map, &files.mask, &files.picture].iter().all(|f| folder.join(&f.name).exists())
        }
    };
    let sidecars = sidecars(folder);
    all.len() == 4 * n && n_named > 0 && sidecars.len() == n && sidecars.iter().all(is_scored)
}

#[test]
fn results_name_no_patient_and_a_reload_changes_what_they_say() {
    let mut site = Site::new(2, &[HASH]);
    fill(&site);
    site.start();
    let results = site.path("results");
    site.wait("scored", |site| is_complete(&site.path("results"), 3, "sub-3_T1w"));
    assert!(!names_a_patient(&results), "{}", said_by_results(&results));

    // The description keeps its words of the trade.
    let key = site.path("state/identity.key");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let all = sidecars(&results);
    let of = |end: &str| all.iter().find(|s| s.source_name.ends_with(end)).unwrap().clone();
    let hashed = all.iter().find(|s| s.acquisition.has_json).unwrap().clone();
    assert_eq!(hashed.source_name.len(), 16 + "_T1w.nii.gz".len());
    assert!(hashed.acquisition.series.as_ref().unwrap().starts_with("T1 MPRAGE "));
    assert_eq!(hashed.acquisition.protocol.as_deref(), Some("head routine"));
    assert_eq!(of("t1_T1w.nii.gz").came_from.len(), 16);
    assert_eq!(of("sub-3_T1w.nii.gz").source_name, "sub-3_T1w.nii.gz");
    for sidecar in &all {
        let times = [&sidecar.received_at, &sidecar.encoded_at, &sidecar.scored_at];
        let times = times.map(|time| time.clone().unwrap());
        assert!(times.is_sorted() && times[0].ends_with('Z') && times[0].len() == 20, "{times:?}");
    }

    // The key outlasts a restart.
    assert_eq!(site.stop(), Some(0));
    let secret = fs::read(&key).unwrap();
    site.start();
    assert_eq!(fs::read(&key).unwrap(), secret);
    let log = site.log();
    assert!(!NAMED.iter().any(|name| log.contains(name)), "{log}");

    site.configure(2, &["results.identity = \"path\""]);
    site.signal(Signal::HUP);
    site.wait("in clear", |site| is_complete(&site.path("results"), 3, "DOE_JANE_T1w"));
    let named = site.sidecar("DOE_JANE_T1w").unwrap();
    assert_eq!(named.scan_id, hashed.scan_id);
    assert_eq!(named.came_from, format!("{FOLDER}/DOE_JANE_T1w.nii.gz"));
    assert_eq!(named.acquisition.series.as_deref(), Some("T1 MPRAGE Roe"));

    site.configure(2, &["results.identity = \"none\""]);
    site.signal(Signal::HUP);
    let is_nameless = |site: &Site| {
        let folder = site.path("results");
        is_complete(&folder, 3, "scan-") && names(&folder).iter().all(|n| n.starts_with("scan-"))
    };
    site.wait("without names", is_nameless);
    assert!(!names_a_patient(&results) && !said_by_results(&results).contains("sub-3"));
    assert!(sidecars(&results).iter().all(|s| s.came_from.is_empty() && s.source_name.is_empty()));
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_notice_that_a_scan_waits_follows_the_setting_too() {
    let mut site = Site::new(9, &[]);
    fill(&site);
    site.start();
    let has = |site: &Site, n: usize, start: &str| {
        let all = names(&site.path("results"));
        all.len() == 3 && all.iter().filter(|name| name.starts_with(start)).count() == n
    };
    site.wait("in clear", |site| has(site, 1, "DOE_JANE"));
    site.configure(9, &[HASH]);
    site.signal(Signal::HUP);
    site.wait("hashed", |site| has(site, 0, "DOE_JANE") && !names_a_patient(&site.path("results")));
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn two_patients_in_one_flat_folder_can_be_told_apart_and_their_volumes_lie_beside_the_maps() {
    let mut site = Site::new(2, &[SOON[0], SOON[1], HASH, "results.keep_nifti = true"]);
    let flat = site.path("incoming").join("ROE^RITA DOE^JANE");
    for (seed, patient) in [(1, "MRN9001"), (2, "MRN-4711")] {
        // The folder's name is in the UIDs of study and series.
        let made = site.path(&format!("made/{patient}"));
        let Some(files) = brain_series_of(patient, &made, seed) else { return };
        fs::create_dir_all(&flat).unwrap();
        for (number, file) in files.iter().enumerate() {
            fs::copy(file, flat.join(format!("{patient}-{number}.dcm"))).unwrap();
        }
    }
    // A scan that came as NIfTI has its file already.
    site.drop_in("sub-3_T1w.nii.gz", &scan_bytes(3));
    site.start();
    let stems = ["1_t1_mprage_sag_T1w", "2_t1_mprage_sag_T1w", "sub-3_T1w"];
    site.wait_scored(&stems);
    assert_eq!(site.stop(), Some(0));

    let results = site.path("results");
    assert!(!names_a_patient(&results), "{}", said_by_results(&results));
    let [one, other, nifti] = stems.map(|stem| site.sidecar(stem).unwrap());
    assert_eq!(one.came_from, other.came_from, "one folder");
    let uids = [&one, &other].map(|sidecar| sidecar.dicom.clone().unwrap());
    let [of_one, of_other] = uids
        .clone()
        .map(|facts| [facts.study_instance_uid.unwrap(), facts.series_instance_uid.unwrap()]);
    assert!(of_one[0] != of_other[0] && of_one[1] != of_other[1], "{uids:?}");
    assert!(of_one.iter().all(|uid| uid.len() == 16), "{of_one:?}");
    assert!(uids.iter().all(|facts| facts.acquisition_datetime.is_none()));

    assert!(nifti.dicom.is_none() && nifti.files.unwrap().scan.is_none());
    for sidecar in [one, other] {
        let files = sidecar.files.unwrap();
        let read = |name: &str| nifti::read_scan(&results.join(name), &Limits::NONE).unwrap();
        let scan = read(&files.scan.unwrap().name).volume;
        assert_eq!(oddscan::domain::scan::ScanId::of(&scan), sidecar.scan_id);
        let map = nifti::read_map(&results.join(&files.map.name), &Limits::NONE).unwrap();
        assert_eq!(scan.affine, map.affine);
    }
}

#[test]
fn score_writes_names_in_clear_for_a_person_and_as_the_settings_say_for_a_site() {
    let site = Site::new(2, &[HASH]);
    fill(&site);
    let score = |out: &str| {
        let mut score = oddscan();
        score.args(["score", "--config"]).arg(site.path("config.toml"));
        score.arg("--out").arg(site.path(out)).arg(site.path("incoming"));
        said(&score.output().unwrap())
    };
    let (_, stderr, code) = score("first");
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("no key of hashes"), "{stderr}");
    assert!(!names_a_patient(&site.path("first")), "{}", said_by_results(&site.path("first")));

    // With the key of the daemon, two runs give one name.
    fs::write(site.path("state/identity.key"), "07".repeat(32)).unwrap();
    for out in ["second", "third"] {
        let (_, stderr, code) = score(out);
        assert!(code == Some(0) && !stderr.contains("no key"), "{stderr}");
    }
    assert_eq!(names(&site.path("second")), names(&site.path("third")));
    assert_ne!(names(&site.path("first")), names(&site.path("second")));

    site.configure(2, &[]);
    score("clear");
    assert!(site.path("clear/DOE_JANE_T1w_anomaly.json").exists());
}

#[test]
fn a_damaged_key_stops_the_start_and_says_what_to_do() {
    let site = Site::new(2, &[]);
    fs::write(site.path("state/identity.key"), "not a key").unwrap();
    let mut run = oddscan();
    run.arg("run").arg("--config").arg(site.path("config.toml"));
    let (stdout, stderr, code) = said(&run.output().unwrap());
    assert_ne!(code, Some(0));
    let said = stdout + &stderr;
    assert!(said.contains("identity.key") && said.contains("Restore the file"), "{said}");
}
