//! The state folder: what is lost of it is made again, or said.

use std::{collections::BTreeMap, fs, path::PathBuf};

use oddscan::{
    domain::scan::{ScanId, ScanRecord},
    ledger::Entry,
    pipeline::board::CohortStatus,
};

use crate::support::{Site, records, scan_bytes};

const STEMS: [&str; 4] = ["sub-1_T1w", "sub-2_T1w", "sub-3_T1w", "sub-4_T1w"];

/// A stopped site with four scans and their results.
fn stopped() -> Site {
    let mut site = Site::new(3, &[]);
    site.start();
    for seed in 1..=4 {
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
        site.wait("taken in", |site| site.status().n_accepted == seed);
    }
    site.wait_scored(&STEMS);
    wait_idle(&site);
    assert_eq!(site.stop(), Some(0));
    site
}

fn wait_idle(site: &Site) {
    site.wait("idle", |site| {
        let status = site.status();
        let is_done = |cohort: &CohortStatus| {
            cohort.n_outdated == 0 && cohort.n_rebuilding == 0 && cohort.last_scored_secs.is_some()
        };
        status.n_waiting + status.n_unscored + status.n_settling == 0
            && status.in_hand.is_none()
            && !status.cohorts.is_empty()
            && status.cohorts.values().all(is_done)
    });
}

/// The maps and masks of all scans, and the revisions of their results.
fn results(site: &Site) -> BTreeMap<&'static str, (Vec<u8>, Vec<u8>, u64)> {
    let of = |stem: &'static str| {
        let (map, mask) = (site.result(stem, "-map.nii.gz"), site.result(stem, "-mask.nii.gz"));
        (stem, (map, mask, site.sidecar(stem).unwrap().revision))
    };
    STEMS.into_iter().map(of).collect()
}

fn source_of(site: &Site, record: &ScanRecord) -> PathBuf {
    site.path("state/sources").join(format!("{}.scan", record.id.to_hex()))
}

fn empty_incoming(site: &Site) {
    fs::remove_dir_all(site.path("incoming")).unwrap();
    fs::create_dir(site.path("incoming")).unwrap();
}

#[test]
fn a_store_that_is_gone_is_built_again_from_the_archive_with_the_same_results() {
    let mut site = stopped();
    let before = results(&site);
    fs::remove_dir_all(site.path("state/store")).unwrap();
    empty_incoming(&site);

    site.start();
    wait_idle(&site);
    assert_eq!(results(&site), before, "the window is the same, so that no result is stale");
    assert_eq!(site.metric("oddscan_damage_found_total{kind=\"tokens\"}"), 4.0);
    assert_eq!(site.metric("oddscan_window_rebuilding_studies{cohort=\"t1w\"}"), 0.0);
    assert!(site.log().contains("they are encoded again"));

    site.drop_in("sub-5_T1w.nii.gz", &scan_bytes(5));
    site.wait_scored(&["sub-1_T1w", "sub-2_T1w", "sub-3_T1w", "sub-4_T1w", "sub-5_T1w"]);
    let revision = |stem: &str| site.sidecar(stem).unwrap().revision;
    assert!(STEMS.iter().all(|stem| revision(stem) > before[stem].2), "revisions go on");
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn scans_that_arrive_while_the_store_is_built_again_wait_for_it() {
    let mut site = stopped();
    fs::remove_dir_all(site.path("state/store")).unwrap();
    site.drop_in("sub-5_T1w.nii.gz", &scan_bytes(5));
    site.start();
    site.wait_scored(&["sub-1_T1w", "sub-2_T1w", "sub-3_T1w", "sub-4_T1w", "sub-5_T1w"]);
    assert_eq!(site.stop(), Some(0));
    // No result of a part of the window was written in between.
    assert_eq!(site.log().matches("waits for scans of more patients").count(), 2);
}

#[test]
fn a_changed_source_is_found_when_it_is_read_and_its_original_is_taken_again() {
    let mut site = stopped();
    let record = records(&site.path("state")).swap_remove(1);
    let source = source_of(&site, &record);
    let mut bytes = fs::read(&source).unwrap();
    let last = bytes.len() - 20;
    bytes[last] ^= 1;
    fs::write(&source, bytes).unwrap();

    site.start();
    // The window changes, so that all results are written again from the archive.
    site.drop_in("sub-5_T1w.nii.gz", &scan_bytes(5));
    site.wait_scored(&["sub-1_T1w", "sub-2_T1w", "sub-3_T1w", "sub-4_T1w", "sub-5_T1w"]);
    site.wait("found", |site| site.metric("oddscan_damage_found_total{kind=\"source\"}") == 1.0);
    wait_idle(&site);
    assert!(site.log().contains("its archived source is missing or has changed"));
    assert!(source.is_file(), "from the original");
    let why = fs::read_to_string(site.path("state/lost+found/why.txt")).unwrap();
    assert!(why.contains("its archived source is missing or has changed"), "{why}");
    assert_eq!(site.status().cohorts["t1w"].n_scans, 5);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_member_whose_source_is_gone_leaves_its_window_and_its_result_stays() {
    let mut site = stopped();
    let record = records(&site.path("state")).swap_remove(0);
    fs::remove_file(source_of(&site, &record)).unwrap();
    empty_incoming(&site);
    site.start();
    wait_idle(&site);
    assert_eq!(site.status().cohorts["t1w"].n_scans, 3);
    assert!(site.log().contains("a scan was lost from the archive"));
    assert_eq!(site.result("sub-1_T1w", "-map.nii.gz"), results(&site)["sub-1_T1w"].0);

    // It comes again, with the number of its next revision.
    let revision = site.sidecar("sub-1_T1w").unwrap().revision;
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    site.wait_scored(&STEMS);
    assert!(site.sidecar("sub-1_T1w").unwrap().revision > revision);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_source_without_a_record_goes_to_lost_and_found() {
    let mut site = stopped();
    let stranger = ScanId([9; 32]).to_hex();
    fs::write(site.path("state/sources").join(format!("{stranger}.scan")), "content").unwrap();
    fs::write(site.path("state/sources").join(format!("{stranger}.arriving.brain")), "x").unwrap();
    site.start();
    wait_idle(&site);
    let kept = site.path("state/lost+found").join(format!("{stranger}.scan"));
    assert_eq!(fs::read_to_string(kept).unwrap(), "content");
    assert_eq!(fs::read_dir(site.path("state/sources")).unwrap().count(), 4);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn records_are_restored_from_their_copies() {
    let mut site = stopped();
    let before = results(&site);
    let ledger = site.path("state/ledger");
    let all = records(&site.path("state"));
    let [one, two, three, _] = [0, 1, 2, 3].map(|n: usize| ledger.join(all[n].id.to_hex()));
    fs::write(&one, "damage").unwrap();
    fs::remove_file(&two).unwrap();
    let old = Entry { number: 0, record: ScanRecord { attempts: 2, ..all[2].clone() } };
    fs::write(&three, old.to_bytes()).unwrap();
    empty_incoming(&site);

    site.start();
    wait_idle(&site);
    assert_eq!(site.metric("oddscan_damage_found_total{kind=\"record\"}"), 3.0);
    assert_eq!(site.stop(), Some(0));
    assert_eq!(results(&site), before);
    assert_eq!(records(&site.path("state")), all);
}

#[test]
fn members_whose_tokens_are_damaged_are_encoded_again_while_the_daemon_runs() {
    let mut site = stopped();
    let before = results(&site);
    {
        let id = records(&site.path("state"))[1].id;
        let chunks = sled::open(site.path("state/store")).unwrap().open_tree("chunks").unwrap();
        // The last chunk of a scan has its intensities, which every scoring reads.
        let (key, value) = chunks.scan_prefix(id.0).next_back().unwrap().unwrap();
        let mut value = value.to_vec();
        value[100] ^= 1;
        chunks.insert(key, value).unwrap();
        chunks.flush().unwrap();
    }
    empty_incoming(&site);
    site.start();
    site.wait("found", |site| site.metric("oddscan_damage_found_total{kind=\"tokens\"}") == 1.0);
    wait_idle(&site);
    assert_eq!(results(&site), before);
    assert_eq!(site.stop(), Some(0));
}
