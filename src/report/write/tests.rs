use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use super::*;
use crate::report::{AlignmentFiles, read_sidecar, sidecar::tests::scored};

const STEM: &str = "sub-1_T1w";

fn results(content: &str, revision: u64) -> ResultSet {
    ResultSet {
        map_nii_gz: format!("map {content}").into_bytes(),
        mask_nii_gz: format!("mask {content}").into_bytes(),
        picture_png: format!("picture {content}").into_bytes(),
        brain_nii_gz: None,
        parts_nii_gz: None,
        scan_nii_gz: None,
        alignment: None,
        sidecar: Sidecar { revision, ..scored() },
    }
}

fn with_brain(content: &str, revision: u64) -> ResultSet {
    ResultSet { brain_nii_gz: Some(content.into()), ..results(content, revision) }
}

fn with_alignment(content: &str, revision: u64) -> ResultSet {
    let alignment = AlignmentFiles { picture_png: content.into(), transform_tfm: Vec::new() };
    ResultSet { alignment: Some(alignment), ..results(content, revision) }
}

/// Names and content of a folder.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect()
}

/// Whether each file that a sidecar names has the size and the hash that it states.
fn fits(folder: &Path, sidecar: &[u8]) -> bool {
    let Present { files, .. } = serde_json::from_slice(sidecar).unwrap();
    let files = files.expect("a scored sidecar names files");
    files.as_array().into_iter().flatten().all(|file| {
        let bytes = fs::read(folder.join(&file.name)).unwrap_or_default();
        let is_whole = bytes.len() as u64 == file.n_bytes;
        is_whole && hex::encode(Sha256::digest(&bytes)) == file.sha256
    })
}

fn sidecar(folder: &Path) -> Vec<u8> {
    fs::read(Place::new(folder, STEM).sidecar()).unwrap()
}

/// What a folder has that holds only this result.
fn alone(set: &ResultSet) -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    write_results(folder.path(), STEM, set).unwrap();
    content(folder.path())
}

/// The beginning of a replacement: the new files are there, and the old sidecar counts.
fn begin(folder: &Path, set: &ResultSet) -> Sidecar {
    let place = Place::new(folder, STEM);
    let before = Present::read(&place).unwrap();
    let mut files = [const { None }; N_FILES];
    for (index, bytes) in set.contents().into_iter().enumerate() {
        let write = |bytes| write_file(&place, SUFFIXES[index], bytes, before.as_ref()).unwrap();
        files[index] = bytes.map(write);
    }
    Sidecar { files: Files::from_array(files), ..set.sidecar.clone() }
}

#[test]
fn the_sidecar_names_the_files_that_belong_to_it() {
    let folder = tempfile::tempdir().unwrap();
    for (content, revision) in [("old", 1), ("new", 2)] {
        write_results(folder.path(), STEM, &results(content, revision)).unwrap();
        let sidecar = read_sidecar(&folder.path().join("sub-1_T1w_anomaly.json")).unwrap();
        assert_eq!(sidecar.revision, revision);
        let map = sidecar.files.unwrap().map;
        assert_eq!(map.name, "sub-1_T1w_anomaly-map.nii.gz");
        let bytes = fs::read(folder.path().join(&map.name)).unwrap();
        assert_eq!(bytes, format!("map {content}").into_bytes());
        assert_eq!(map.sha256, hex::encode(Sha256::digest(&bytes)));
    }
    assert_eq!(content(folder.path()).len(), 4);
}

#[test]
fn files_that_are_no_longer_asked_for_go_and_the_sidecar_names_those_that_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("sub-1_T1w-2_anomaly-brain.nii.gz");
    fs::write(&other, "of another scan").unwrap();
    let all = ResultSet { brain_nii_gz: Some(b"brain".to_vec()), ..with_alignment("all", 1) };
    let aligned = ResultSet { brain_nii_gz: None, ..all.clone() };
    for (set, n_more) in [(all, 3), (aligned, 2), (results("few", 3), 0)] {
        write_results(folder.path(), STEM, &set).unwrap();
        assert!(fits(folder.path(), &sidecar(folder.path())));
        let files = read_sidecar(&Place::new(folder.path(), STEM).sidecar()).unwrap().files;
        assert_eq!(files.unwrap().as_array().iter().flatten().count(), 3 + n_more);
        assert_eq!(content(folder.path()).len(), 5 + n_more);
    }
    assert!(other.exists());
}

#[test]
fn a_reader_who_follows_the_sidecar_sees_only_files_that_fit() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_results(folder, STEM, &results("0", 1)).unwrap();
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut n_seen = 0;
            while !is_done.load(Ordering::SeqCst) {
                let before = sidecar(folder);
                // The files of a sidecar may go once there is another one.
                assert!(fits(folder, &before) || sidecar(folder) != before, "look {n_seen}");
                n_seen += 1;
            }
            n_seen
        });
        for revision in 2..302 {
            let content = revision.to_string();
            let set = [results, with_brain, with_alignment][revision % 3];
            write_results(folder, STEM, &set(&content, revision as u64)).unwrap();
        }
        is_done.store(true, Ordering::SeqCst);
        assert!(reader.join().unwrap() > 0);
    });
    assert_eq!(content(folder), alone(&with_brain("301", 301)));
}

#[test]
fn a_replacement_that_was_interrupted_fits_and_is_finished_at_the_start() {
    let new = with_alignment("new", 2);
    let step = |n_steps: usize, folder: &Path| {
        let place = Place::new(folder, STEM);
        let next = begin(folder, &new);
        if n_steps == 0 {
            return;
        }
        put_sidecar(&place, None, &next).unwrap();
        for suffix in &SUFFIXES[..n_steps - 1] {
            give_second_name(&place.hidden_path(suffix), &place.path(suffix)).unwrap();
        }
    };
    for n_steps in 0..=4 {
        let folder = tempfile::tempdir().unwrap();
        write_results(folder.path(), STEM, &with_brain("old", 1)).unwrap();
        write_results(folder.path(), "other", &with_brain("other", 1)).unwrap();
        step(n_steps, folder.path());
        fs::write(folder.path().join(".oddscan-tmp-1"), "half").unwrap();
        fs::write(Place::new(folder.path(), "gone").hidden_path(".png"), "unnamed").unwrap();
        assert!(fits(folder.path(), &sidecar(folder.path())), "{n_steps}");

        tidy_results(folder.path()).unwrap();
        assert!(fits(folder.path(), &sidecar(folder.path())), "{n_steps}");
        let mut found = content(folder.path());
        found.retain(|name, _| !name.starts_with("other_anomaly"));
        let left = if n_steps == 0 { with_brain("old", 1) } else { new.clone() };
        assert_eq!(found, alone(&left), "{n_steps}");
        assert_eq!(content(folder.path()).len(), found.len() + 5, "{n_steps}");
    }
}

#[test]
fn a_replacement_after_an_interrupted_one_finishes_that_first() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new(folder.path(), STEM);
    write_results(folder.path(), STEM, &with_brain("old", 1)).unwrap();
    let next = begin(folder.path(), &with_alignment("next", 2));
    put_sidecar(&place, None, &next).unwrap();
    // The same revision, as after a failure that the ledger knows nothing of.
    write_results(folder.path(), STEM, &results("last", 2)).unwrap();
    assert_eq!(content(folder.path()), alone(&results("last", 3)));

    // A notice that the scan waits has no files.
    put_sidecar(&place, None, &begin(folder.path(), &results("more", 4))).unwrap();
    write_sidecar(folder.path(), STEM, &scored()).unwrap();
    assert!(content(folder.path()).keys().all(|name| !name.starts_with('.')));
}

#[test]
fn a_result_whose_hidden_file_somebody_removed_is_written_anew() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new(folder.path(), STEM);
    write_results(folder.path(), STEM, &results("old", 1)).unwrap();
    put_sidecar(&place, None, &begin(folder.path(), &results("next", 2))).unwrap();
    fs::remove_file(place.hidden_path(SUFFIXES[1])).unwrap();
    assert_eq!(tidy_results(folder.path()).unwrap_err().kind(), io::ErrorKind::NotFound);
    write_results(folder.path(), STEM, &results("last", 2)).unwrap();
    assert_eq!(content(folder.path()), alone(&results("last", 3)));
}

#[test]
fn a_replacement_that_fails_leaves_the_older_result_and_no_hidden_files() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new(folder.path(), STEM);
    write_results(folder.path(), STEM, &results("old", 1)).unwrap();
    // A folder has the name of the last of the new files.
    fs::create_dir(place.hidden_path(".png")).unwrap();
    write_results(folder.path(), STEM, &results("new", 2)).unwrap_err();
    fs::remove_dir(place.hidden_path(".png")).unwrap();
    assert_eq!(content(folder.path()), alone(&results("old", 1)));
}

#[test]
fn a_file_that_stays_equal_is_not_written_again_unless_it_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let mask = Place::new(folder.path(), STEM).path("-mask.nii.gz");
    let old = results("old", 1);
    write_results(folder.path(), STEM, &old).unwrap();
    let same_file = fs::File::open(&mask).unwrap();
    let is_same = || {
        use std::os::unix::fs::MetadataExt;
        same_file.metadata().unwrap().ino() == fs::metadata(&mask).unwrap().ino()
    };
    let new = ResultSet { mask_nii_gz: old.mask_nii_gz, ..results("new", 2) };
    write_results(folder.path(), STEM, &new).unwrap();
    assert!(is_same());
    assert_eq!(content(folder.path()), alone(&new));

    fs::write(&mask, "mask xyz").unwrap();
    write_results(folder.path(), STEM, &ResultSet { sidecar: scored(), ..new.clone() }).unwrap();
    assert_eq!(fs::read(&mask).unwrap(), new.mask_nii_gz);
}

#[test]
fn the_revision_goes_on_from_the_sidecar_of_the_same_scan() {
    let folder = tempfile::tempdir().unwrap();
    let revision = || {
        let place = Place::new(folder.path(), STEM);
        read_sidecar(&place.sidecar()).unwrap().revision
    };
    write_results(folder.path(), STEM, &results("old", 7)).unwrap();
    write_results(folder.path(), STEM, &results("new", 1)).unwrap();
    assert_eq!(revision(), 8);
    write_sidecar(folder.path(), STEM, &Sidecar { revision: 1, ..scored() }).unwrap();
    assert_eq!(revision(), 9);
    let other = Sidecar { scan_id: ScanId([8; 32]), revision: 1, ..scored() };
    write_sidecar(folder.path(), STEM, &other).unwrap();
    assert_eq!(revision(), 1);
}

#[test]
fn results_under_an_old_stem_go_with_all_their_files_and_those_of_another_scan_stay() {
    let folder = tempfile::tempdir().unwrap();
    let left = || content(folder.path()).len();
    let all = ResultSet {
        brain_nii_gz: Some(b"brain".to_vec()),
        parts_nii_gz: Some(b"parts".to_vec()),
        scan_nii_gz: Some(b"scan".to_vec()),
        ..with_alignment("all", 1)
    };
    write_results(folder.path(), "ROE_T1w", &all).unwrap();
    assert_eq!(left(), 1 + SUFFIXES.len());
    remove_results(folder.path(), "ROE_T1w", ScanId([8; 32])).unwrap();
    assert_eq!(left(), 1 + SUFFIXES.len(), "of another scan");
    remove_results(folder.path(), "ROE_T1w", all.sidecar.scan_id).unwrap();
    assert_eq!(left(), 0);
    remove_results(folder.path(), "ROE_T1w", all.sidecar.scan_id).unwrap();
}

#[test]
fn a_removal_that_was_interrupted_is_finished_unless_another_result_has_the_stem() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new(folder.path(), STEM);
    let interrupted = || {
        write_results(folder.path(), STEM, &with_brain("old", 1)).unwrap();
        fs::rename(place.sidecar(), place.removed_sidecar()).unwrap();
        fs::remove_file(place.path("-map.nii.gz")).unwrap();
    };
    interrupted();
    remove_results(folder.path(), STEM, scored().scan_id).unwrap();
    assert_eq!(content(folder.path()).len(), 0);
    interrupted();
    tidy_results(folder.path()).unwrap();
    assert_eq!(content(folder.path()).len(), 0);

    interrupted();
    write_results(folder.path(), STEM, &results("of another", 1)).unwrap();
    tidy_results(folder.path()).unwrap();
    assert_eq!(content(folder.path()), alone(&results("of another", 1)));
}

/// Kills a child process at each of its steps.
#[cfg(feature = "faults")]
mod kills {
    use std::{env, process::Command};

    use super::*;

    const THIS: &str = "report::write::tests::kills::";

    fn old() -> ResultSet {
        with_brain("old", 1)
    }

    fn new() -> ResultSet {
        with_alignment("new", 2)
    }

    /// Does one of three jobs in the folder that the parent names.
    #[test]
    fn the_child_does_its_job() {
        let Some(folder) = env::var_os("ODDSCAN_TEST_FOLDER") else { return };
        let folder = Path::new(&folder);
        match env::var("ODDSCAN_TEST_JOB").unwrap().as_str() {
            "replace" => write_results(folder, STEM, &new()).unwrap(),
            "remove" => remove_results(folder, STEM, scored().scan_id).unwrap(),
            "tidy" => tidy_results(folder).unwrap(),
            other => panic!("no such job: {other}"),
        }
    }

    /// What is in a folder after a child was killed at a step of its job. `None` if it has fewer
    /// steps.
    fn killed(
        before: &BTreeMap<String, Vec<u8>>,
        job: &str,
        fault: &str,
    ) -> Option<BTreeMap<String, Vec<u8>>> {
        let folder = tempfile::Builder::new().prefix("here-").tempdir().unwrap();
        put_all(folder.path(), before);
        let child = Command::new(env::current_exe().unwrap())
            .args([&format!("{THIS}the_child_does_its_job"), "--exact"])
            .env("ODDSCAN_TEST_FOLDER", folder.path())
            .env("ODDSCAN_TEST_JOB", job)
            .env("ODDSCAN_FAULT", format!("{fault} here-"))
            .output()
            .unwrap();
        if child.status.success() {
            return None;
        }
        assert_eq!(child.status.code(), None, "killed, not failed: {child:?}");
        Some(content(folder.path()))
    }

    /// The outcomes of kills before or after each step of a job.
    fn all_killed<'a>(
        before: &'a BTreeMap<String, Vec<u8>>,
        job: &'a str,
        fault: &'a str,
    ) -> impl Iterator<Item = BTreeMap<String, Vec<u8>>> {
        (1..).map_while(move |n| killed(before, job, &format!("{fault} {n}")))
    }

    fn put_all(folder: &Path, content: &BTreeMap<String, Vec<u8>>) {
        for (name, bytes) in content {
            fs::write(folder.join(name), bytes).unwrap();
        }
    }

    fn put(found: &BTreeMap<String, Vec<u8>>) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        put_all(folder.path(), found);
        folder
    }

    #[test]
    fn after_a_kill_at_any_step_of_a_replacement_the_sidecar_fits_and_the_start_finishes_it() {
        let before = alone(&old());
        let ends = [alone(&old()), alone(&new())];
        let mut outcomes: BTreeSet<_> = all_killed(&before, "replace", "kill_before").collect();
        // Only writes have a half.
        let halves = (1..40).filter_map(|n| killed(&before, "replace", &format!("kill_half {n}")));
        outcomes.extend(halves);
        assert!(outcomes.len() > 20, "{}", outcomes.len());
        for found in outcomes.clone() {
            outcomes.extend(all_killed(&found, "tidy", "kill_after"));
        }
        let mut n_new = 0;
        for found in outcomes {
            let folder = put(&found);
            assert!(fits(folder.path(), &sidecar(folder.path())), "{:?}", found.keys());
            tidy_results(folder.path()).unwrap();
            let left = content(folder.path());
            assert!(ends.contains(&left), "{:?}", left.keys());
            n_new += usize::from(left == ends[1]);
        }
        assert!(n_new > 10, "{n_new}");
    }

    #[test]
    fn after_a_kill_at_any_step_of_a_removal_the_sidecar_fits_and_the_start_finishes_it() {
        let before = alone(&old());
        for found in all_killed(&before, "remove", "kill_before") {
            let folder = put(&found);
            let place = Place::new(folder.path(), STEM);
            let is_there = place.sidecar().exists();
            assert!(!is_there || fits(folder.path(), &sidecar(folder.path())));
            tidy_results(folder.path()).unwrap();
            let left = content(folder.path());
            assert!(left.is_empty() != is_there, "{:?}", left.keys());
        }
    }
}
