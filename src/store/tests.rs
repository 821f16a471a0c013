use std::collections::BTreeMap;

use half::f16;

use super::{
    blob::{Blob, CHUNK, chunk_key, put_blob, remove_prefix},
    key::grid_key,
    record, *,
};
use crate::{
    domain::{
        acquisition::AcquisitionFacts,
        cohort::CohortKey,
        left_alone::LeftAlone,
        scan::{EncodedFacts, FileStamp, ScanId, ScanRecord, ScanState},
        series_key::SeriesKey,
    },
    numeric::{
        fine::FineVolume,
        geometry::Shape3,
        scoring::PairColumns,
        token::{Foreground, TokenGrid},
    },
};

fn id(n: u8) -> ScanId {
    ScanId([n; 32])
}

fn record(n: u8, state: ScanState) -> ScanRecord {
    let cohort = CohortKey { name: "t1w".into(), method: "m".into() };
    ScanRecord {
        state,
        source_name: format!("scan-{n}.nii.gz"),
        output_stem: format!("scan-{n}"),
        acquisition: AcquisitionFacts::of("scan_T1w", [1.0, 1.0, 1.2]),
        notes: vec!["a note".to_owned()],
        sequence: u64::from(n),
        first_seen_secs: 7,
        encoded: Some(EncodedFacts {
            timings_secs: BTreeMap::from([("encode".to_owned(), 1.5)]),
            ..EncodedFacts::default()
        }),
        ..ScanRecord::new(id(n), cohort)
    }
}

/// Tokens that take several chunks.
fn tokens(n: u8) -> TokenGrid {
    let cells: Vec<u32> = (0..600).map(|c| c * 2 + u32::from(n) % 2).collect();
    let features = (0..600 * 96).map(|i| f16::from_f32((i % 251) as f32 + f32::from(n))).collect();
    TokenGrid::new(Shape3::cube(16), 96, cells, features).unwrap()
}

fn columns(n: u8) -> PairColumns {
    PairColumns {
        first_to_second: (0..600).map(|i| (i as f32).sqrt() + f32::from(n)).collect(),
        second_to_first: vec![f32::INFINITY; 600],
    }
}

#[test]
fn everything_comes_back_bit_for_bit_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
        store.put_encoded(&record(1, ScanState::Encoded), &[tokens(1), tokens(3)], None).unwrap();
        store.put_encoded(&record(2, ScanState::Encoded), &[tokens(2), tokens(4)], None).unwrap();
        store.put_columns(id(1), id(2), 1, &columns(1)).unwrap();
        store.flush().unwrap();
    }
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    assert_eq!(store.tokens(&id(1), 1).unwrap(), Some(tokens(3)));
    assert_eq!(store.foreground(&id(1), 0).unwrap().as_ref(), Some(tokens(1).foreground()));
    assert_eq!(store.foreground(&id(3), 0).unwrap(), None);
    assert_eq!(store.tokens(&id(2), 0).unwrap(), Some(tokens(2)));
    assert_eq!(store.tokens(&id(3), 0).unwrap(), None);
    assert_eq!(store.column(id(1), id(2), 1, 600).unwrap(), Some(columns(1).first_to_second));
    assert_eq!(store.column(id(2), id(1), 1, 600).unwrap(), Some(columns(1).second_to_first));
    assert_eq!(store.column(id(2), id(1), 0, 600).unwrap(), None);
    let records = store.records().unwrap();
    assert_eq!(records, [record(1, ScanState::Encoded), record(2, ScanState::Encoded)]);
}

#[test]
fn an_evicted_scan_leaves_only_its_entry() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    for n in [1, 2, 3] {
        store.put_encoded(&record(n, ScanState::Encoded), &[tokens(n)], None).unwrap();
    }
    store.put_columns(id(1), id(2), 0, &columns(1)).unwrap();
    store.put_columns(id(2), id(3), 0, &columns(2)).unwrap();
    for _ in 0..2 {
        store.evict(&record(1, ScanState::Encoded)).unwrap();
        assert_eq!(store.record(&id(1)).unwrap().unwrap().state, ScanState::Evicted);
        assert_eq!(store.tokens(&id(1), 0).unwrap(), None);
        assert_eq!(store.column(id(2), id(1), 0, 600).unwrap(), None);
        assert!(store.has_columns(id(2), id(3), 0).unwrap());
    }
    store.evict(&record(2, ScanState::Encoded)).unwrap();
    store.evict(&record(3, ScanState::Encoded)).unwrap();
    assert!(store.chunks.is_empty() && store.columns.is_empty() && store.manifests.is_empty());
}

#[test]
fn tokens_without_a_manifest_are_swept_away() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
        store.put_encoded(&record(1, ScanState::Encoded), &[tokens(1)], None).unwrap();
        // The state after a kill between the chunks and the manifest.
        put_blob(&store.chunks, &grid_key(id(9), 0), &[1; 100_000]).unwrap();
        store.put_columns(id(1), id(9), 0, &columns(1)).unwrap();
    }
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    assert_eq!(store.tokens(&id(1), 0).unwrap(), Some(tokens(1)));
    assert!(store.chunks.scan_prefix(id(9).0).next().is_none());
    assert!(store.columns.is_empty());
}

#[test]
fn damage_is_an_error_that_names_the_scan() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    store.put_encoded(&record(1, ScanState::Encoded), &[tokens(1)], None).unwrap();
    let (key, value) = store.chunks.iter().next().unwrap().unwrap();
    let mut bad = value.to_vec();
    bad[1000] ^= 1;
    store.chunks.insert(&key, bad).unwrap();
    let error = store.tokens(&id(1), 0).unwrap_err().to_string();
    assert!(error.contains("tokens of scan 010101010101"), "{error}");
    store.chunks.remove(&key).unwrap();
    assert!(matches!(store.tokens(&id(1), 0), Err(StoreError::Damaged { .. })));
    assert!(matches!(store.foreground(&id(1), 0), Err(StoreError::Damaged { .. })));
}

#[test]
fn another_format_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    drop(Store::open(folder.path(), MIN_MEMORY).unwrap());
    for other in [FORMAT - 1, FORMAT + 1] {
        let db = sled::open(folder.path()).unwrap();
        db.insert("format", &other.to_be_bytes()).unwrap();
        drop(db);
        let error = Store::open(folder.path(), MIN_MEMORY).err().unwrap().to_string();
        assert!(error.contains(&format!("format {other}, this version reads {FORMAT}")), "{error}");
    }
}

#[test]
fn columns_made_in_another_way_are_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    store.keep_columns_made_by("reach 1", || ()).unwrap();
    store.put_columns(id(1), id(2), 0, &columns(1)).unwrap();
    store.keep_columns_made_by("reach 1", || ()).unwrap();
    assert!(store.has_columns(id(1), id(2), 0).unwrap());
    store.keep_columns_made_by("reach 2", || ()).unwrap();
    assert!(!store.has_columns(id(1), id(2), 0).unwrap());
    // The state after a version that stored columns in another order.
    store.put_columns(id(1), id(2), 0, &columns(1)).unwrap();
    store.db.insert("columns", "reach 2").unwrap();
    store.keep_columns_made_by("reach 2", || ()).unwrap();
    assert!(store.columns.is_empty());
}

#[test]
fn seen_files_are_known_until_they_change_or_go() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    let look = FileStamp { size: 5, modified_ns: 1, changed_ns: 2 };
    let seen = SeenFile::new(look, SeenOutcome::Accepted(id(1)));
    store.put_seen(b"a.nii", &seen).unwrap();
    assert!(store.seen(b"a.nii").unwrap().unwrap().is_same(&look));
    assert!(!seen.is_same(&FileStamp { size: 6, ..look }));

    let key = SeriesKey { study: 7, series: 8 };
    let seen = seen.of_series(Some(vec![key]));
    store.put_seen(b"a.nii", &seen).unwrap();
    assert_eq!(store.seen(b"a.nii").unwrap().unwrap().series, Some(vec![key]));
    let old =
        "{\"look\":{\"size\":5,\"modified_ns\":1,\"changed_ns\":2},\"outcome\":\"quarantined\"}";
    assert_eq!(serde_json::from_str::<SeenFile>(old).unwrap().series, None, "of an old store");
}

#[test]
fn a_share_that_was_away_for_a_while_is_not_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    let look = FileStamp { size: 5, modified_ns: 1, changed_ns: 2 };
    store.put_seen(b"a.nii", &SeenFile::new(look, SeenOutcome::Quarantined)).unwrap();
    let is_known = || store.seen(b"a.nii").unwrap().is_some_and(|seen| seen.is_same(&look));
    for (is_there, now, known) in
        [(false, 100, true), (false, 199, true), (true, 250, true), (false, 300, true)]
    {
        store.forget_missing(|_| is_there, now, 100).unwrap();
        assert_eq!(is_known(), known, "at {now}");
    }
    store.forget_missing(|_| false, 400, 100).unwrap();
    assert!(!is_known());
}

#[test]
fn a_decision_of_which_a_file_goes_is_found_once_and_only_its_own_files_are_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    let look = FileStamp { size: 5, modified_ns: 1, changed_ns: 2 };
    let localiser = SeenOutcome::LeftAlone(LeftAlone::Localiser);
    for (path, outcome) in [
        ("a/1", localiser),
        ("a/2", localiser),
        ("a/2.zip", localiser),
        ("a/3", SeenOutcome::LeftAlone(LeftAlone::Derived)),
        ("a/b/4", localiser),
        ("ab/5", localiser),
        ("6", SeenOutcome::Accepted(id(1))),
    ] {
        store.put_seen(path.as_bytes(), &SeenFile::new(look, outcome)).unwrap();
    }
    // oddscan has moved this one itself, so that no series has changed.
    let moved = SeenFile::moved_away(look, SeenOutcome::Quarantined, 10);
    store.put_seen(b"a/7", &moved).unwrap();
    let is_there = |path: &[u8]| ![&b"a/1"[..], b"a/7", b"6"].contains(&path);

    let found = store.forget_missing(is_there, 20, 100).unwrap();
    assert_eq!(found.left_alone.len(), 5);
    assert_eq!(found.shrunk, [(Fellows::Folder(b"a".to_vec()), localiser)].into());
    let n = store.forget_decisions(&found.shrunk, |path| path == b"a/2.zip", || {}).unwrap();
    assert_eq!(n, 1);
    let is_known = |path: &str| store.seen(path.as_bytes()).unwrap().is_some();
    let known = ["a/1", "a/2", "a/2.zip", "a/3", "a/b/4", "ab/5", "a/7"].map(is_known);
    assert_eq!(known, [true, false, true, true, true, true, true]);
    assert!(store.forget_missing(is_there, 30, 100).unwrap().shrunk.is_empty(), "said once");
}

#[test]
fn a_decision_about_a_study_is_forgotten_wherever_its_files_lie() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    let look = FileStamp { size: 5, modified_ns: 1, changed_ns: 2 };
    let stray = SeenOutcome::LeftAlone(LeftAlone::Stray);
    for (path, study) in [("a/1", 1), ("b/2", 1), ("a/3", 2)] {
        let key = SeriesKey { study, series: 7 };
        let seen = SeenFile::new(look, stray).of_series(Some(vec![key]));
        store.put_seen(path.as_bytes(), &seen).unwrap();
    }
    let found = store.forget_missing(|path| path != b"a/1", 20, 100).unwrap();
    assert_eq!(found.shrunk, [(Fellows::Study(1), stray)].into());
    assert_eq!(store.forget_decisions(&found.shrunk, |_| false, || {}).unwrap(), 1);
    let is_known = |path: &str| store.seen(path.as_bytes()).unwrap().is_some();
    assert_eq!(["a/1", "b/2", "a/3"].map(is_known), [true, false, true]);
}

#[test]
fn a_file_of_an_earlier_version_that_was_left_alone_is_still_read() {
    let old = r#"{"look":{"size":5,"modified_ns":1,"changed_ns":2},"outcome":"quarantined"}"#;
    let seen: SeenFile = serde_json::from_str(old).unwrap();
    assert_eq!(seen.outcome, SeenOutcome::Quarantined);
}

#[test]
fn turning_the_window_twenty_times_keeps_the_disk_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    let window = 4_u8;
    for turn in 0..window * 20 {
        store.put_encoded(&record(turn, ScanState::Encoded), &[tokens(turn)], None).unwrap();
        if turn >= window {
            store.evict(&record(turn - window, ScanState::Encoded)).unwrap();
        }
    }
    let (disk, live) = (store.size_on_disk().unwrap(), store.live_bytes().unwrap());
    // Measured: about 20 MB for 0.5 MB live, for any number of turns. Without chunks, every turn
    // would add its own bytes, here 9 MB in all.
    assert!(disk < 40_000_000, "{disk} bytes on disk for {live} live");
}

#[test]
fn no_page_is_so_large_that_the_cache_does_not_count_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    // Values of the largest size, in an order that fills pages and in one that splits them.
    let column = vec![1.0; CHUNK / 4];
    let columns = PairColumns { first_to_second: column.clone(), second_to_first: column };
    for (one, other) in (0..40).flat_map(|one| (0..one).map(move |other| (one, other))) {
        store.put_columns(id(one), id(other), 0, &columns).unwrap();
    }
    store.put_encoded(&record(1, ScanState::Encoded), &[tokens(1), tokens(2)], None).unwrap();
    let files = std::fs::read_dir(folder.path().join("blobs")).unwrap().count();
    assert_eq!(files, 0, "pages in files of their own");
}

#[test]
fn tokens_that_an_older_version_put_in_larger_chunks_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    store.put_encoded(&record(1, ScanState::Encoded), &[tokens(1)], None).unwrap();
    let prefix = grid_key(id(1), 0);
    let mut blob = Blob::open(&store.chunks, prefix.clone(), "tokens").unwrap().unwrap();
    let mut bytes = vec![0; blob.length as usize];
    blob.fill(&mut bytes).unwrap();
    remove_prefix(&store.chunks, &prefix).unwrap();
    for (index, chunk) in bytes.chunks(60 * 1024).enumerate() {
        let value = [&(bytes.len() as u64).to_be_bytes(), chunk].concat();
        store.chunks.insert(chunk_key(&prefix, index), record::seal(&value)).unwrap();
    }
    assert_eq!(store.tokens(&id(1), 0).unwrap(), Some(tokens(1)));
    assert_eq!(store.foreground(&id(1), 0).unwrap().as_ref(), Some(tokens(1).foreground()));
}

#[test]
fn a_damaged_column_counts_as_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    store.put_columns(id(1), id(2), 0, &columns(1)).unwrap();
    assert!(store.column(id(1), id(2), 0, 600).unwrap().is_some());
    assert_eq!(store.column(id(1), id(2), 0, 599).unwrap(), None, "of other tokens");
    let key = store.columns.iter().keys().next().unwrap().unwrap();
    store.columns.insert(key, b"damage").unwrap();
    assert_eq!(store.column(id(1), id(2), 0, 600).unwrap(), None);
    let PairColumns { first_to_second, second_to_first } = columns(1);
    assert_eq!(store.column(id(2), id(1), 0, 600).unwrap().as_ref(), Some(&second_to_first));
    // Computed again, with either of the two named first.
    store.put_columns(id(2), id(1), 0, &columns(1).mirrored()).unwrap();
    assert_eq!(store.column(id(1), id(2), 0, 600).unwrap(), Some(first_to_second));
}

#[test]
fn intensities_are_read_as_written_and_go_with_their_scan() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    let fine = FineVolume {
        foreground: Foreground { shape: Shape3([5, 3, 2]), cells: vec![0, 7, 8, 29] },
        values: [0.5, -3.0, 0.0, 7.25].map(f16::from_f32).to_vec(),
        depths: vec![16, 255, 0, 40],
        cell_mm: 1.5,
    };
    let one = record(1, ScanState::Encoded);
    store.put_encoded(&one, &[tokens(1)], Some(&fine)).unwrap();
    store.put_encoded(&record(2, ScanState::Encoded), &[tokens(2)], None).unwrap();
    assert_eq!(store.fine(&one.id).unwrap(), Some(fine));
    assert_eq!(store.fine(&record(2, ScanState::Encoded).id).unwrap(), None);
    store.evict(&one).unwrap();
    assert_eq!(store.fine(&one.id).unwrap(), None);
}
