use std::{collections::BTreeSet, fs, time::Duration};

use half::f16;

use super::{
    blob::{Blob, CHUNK, chunk_key, put_blob, remove_prefix},
    error::OLD_FORMAT,
    keeper::Progress,
    key::grid_key,
    kv::{KeyValue, Name},
    record,
    sled::Sled,
    *,
};
use crate::{
    domain::{repair::Repair, scan::ScanId},
    numeric::{
        fine::FineVolume,
        geometry::Shape3,
        scoring::PairColumns,
        token::{Foreground, TokenGrid},
    },
};

fn open(folder: &tempfile::TempDir) -> Store {
    Store::open(&folder.path().join("store"), MIN_MEMORY).unwrap().store
}

fn id(n: u8) -> ScanId {
    ScanId([n; 32])
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
        let store = open(&folder);
        store.put_tokens(id(1), "m", &[tokens(1), tokens(3)], None).unwrap();
        store.put_tokens(id(2), "m", &[tokens(2), tokens(4)], None).unwrap();
        store.put_columns(id(1), id(2), 1, &columns(1)).unwrap();
        store.flush().unwrap();
    }
    let store = open(&folder);
    assert_eq!(store.tokens(&id(1), 1).unwrap(), Some(tokens(3)));
    assert_eq!(store.foreground(&id(1), 0).unwrap().as_ref(), Some(tokens(1).foreground()));
    assert_eq!(store.foreground(&id(3), 0).unwrap(), None);
    assert_eq!(store.tokens(&id(2), 0).unwrap(), Some(tokens(2)));
    assert_eq!(store.tokens(&id(3), 0).unwrap(), None);
    assert_eq!(store.column(id(1), id(2), 1, 600).unwrap(), Some(columns(1).first_to_second));
    assert_eq!(store.column(id(2), id(1), 1, 600).unwrap(), Some(columns(1).second_to_first));
    assert_eq!(store.column(id(2), id(1), 0, 600).unwrap(), None);
    let has = |n, method, n_grids| store.has_tokens(&id(n), method, n_grids).unwrap();
    assert!(has(1, "m", 2));
    assert!(!has(1, "m", 3) && !has(1, "another", 2) && !has(3, "m", 2));
}

#[test]
fn a_removed_scan_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    for n in [1, 2, 3] {
        store.put_tokens(id(n), "m", &[tokens(n)], None).unwrap();
    }
    store.put_columns(id(1), id(2), 0, &columns(1)).unwrap();
    store.put_columns(id(2), id(3), 0, &columns(2)).unwrap();
    for _ in 0..2 {
        store.remove(&id(1)).unwrap();
        assert_eq!(store.tokens(&id(1), 0).unwrap(), None);
        assert_eq!(store.column(id(2), id(1), 0, 600).unwrap(), None);
        assert!(store.has_columns(id(2), id(3), 0).unwrap());
    }
    store.remove(&id(2)).unwrap();
    store.remove(&id(3)).unwrap();
    assert!(store.chunks.is_empty() && store.columns.is_empty() && store.manifests.is_empty());
}

#[test]
fn tokens_without_a_manifest_are_swept_away() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = open(&folder);
        store.put_tokens(id(1), "m", &[tokens(1)], None).unwrap();
        // The state after a kill between the chunks and the manifest.
        put_blob(&store.chunks, &grid_key(id(9), 0), &[1; 100_000]).unwrap();
        store.put_columns(id(1), id(9), 0, &columns(1)).unwrap();
    }
    let store = open(&folder);
    assert_eq!(store.tokens(&id(1), 0).unwrap(), Some(tokens(1)));
    assert!(store.chunks.scan_prefix(id(9).0).next().is_none());
    assert!(store.columns.is_empty());
}

#[test]
fn damage_is_an_error_that_names_the_scan() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    store.put_tokens(id(1), "m", &[tokens(1)], None).unwrap();
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
    drop(open(&folder));
    for other in [OLD_FORMAT - 1, FORMAT + 1] {
        let db = Sled::open(&folder.path().join("store"), MIN_MEMORY).unwrap();
        db.insert(Name::Facts, b"format", &other.to_be_bytes()).unwrap();
        drop(db);
        let error =
            Store::open(&folder.path().join("store"), MIN_MEMORY).err().unwrap().to_string();
        assert!(error.contains(&format!("format {other}, this version reads {FORMAT}")), "{error}");
    }
}

#[test]
fn columns_made_in_another_way_are_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    store.keep_columns_made_by("reach 1", || ()).unwrap();
    store.put_columns(id(1), id(2), 0, &columns(1)).unwrap();
    store.keep_columns_made_by("reach 1", || ()).unwrap();
    assert!(store.has_columns(id(1), id(2), 0).unwrap());
    store.keep_columns_made_by("reach 2", || ()).unwrap();
    assert!(!store.has_columns(id(1), id(2), 0).unwrap());
    // The state after a version that stored columns in another order.
    store.put_columns(id(1), id(2), 0, &columns(1)).unwrap();
    store.facts.insert("columns", "reach 2").unwrap();
    store.keep_columns_made_by("reach 2", || ()).unwrap();
    assert!(store.columns.is_empty());
}

/// Turns a window with distances and returns the largest ratio of the disk to live data.
fn worst_ratio(store: &Store, n_turns: u32) -> f64 {
    let window = 6;
    let id = |n: u32| ScanId(std::array::from_fn(|at| n.to_be_bytes()[at % 4]));
    let mut worst: f64 = 0.0;
    for n in 0..window * n_turns {
        let tokens = tokens((n % 200) as u8);
        store.put_tokens(id(n), "m", &[tokens.clone(), tokens], None).unwrap();
        for other in n.saturating_sub(window)..n {
            store.put_columns(id(n), id(other), 0, &columns(1)).unwrap();
            store.put_columns(id(n), id(other), 1, &columns(2)).unwrap();
        }
        if n >= window {
            store.remove(&id(n - window)).unwrap();
        }

        let members: Vec<ScanId> = ((n + 1).saturating_sub(window)..=n).map(id).collect();
        let windows = [&members[..]];
        while !matches!(store.compact_step(1.6, &windows).unwrap(), Compaction::Idle) {}
        if n >= 2 * window {
            let (disk, live) = (store.size_on_disk().unwrap(), store.live_bytes(windows).unwrap());
            worst = worst.max(disk as f64 / live as f64);
        }
    }
    worst
}

#[test]
fn turning_the_window_keeps_the_disk_below_twice_the_live_data() {
    let folder = tempfile::tempdir().unwrap();
    let worst = worst_ratio(&open(&folder), 60);
    assert!(worst < 2.0, "{worst} times the live data");
}

#[test]
fn a_copy_into_a_smaller_store_has_what_was_written_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let twin = store.clone();
    for n in 1..60 {
        store.put_tokens(id(n), "m", &[tokens(n)], None).unwrap();
    }
    for n in 1..30 {
        store.remove(&id(n)).unwrap();
    }
    // Twice for each of three tables, and then a part of the chunks. So the copy has passed some of
    // these keys and not others.
    for _ in 0..7 {
        assert!(matches!(store.keeper.copy_for(Duration::ZERO).unwrap(), Progress::Goes));
    }
    for n in [30, 59] {
        store.remove(&id(n)).unwrap();
    }
    for n in [1, 70] {
        twin.put_tokens(id(n), "m", &[tokens(n)], None).unwrap();
    }
    while !matches!(store.keeper.copy_step().unwrap(), Progress::Done) {}

    let holds = |store: &Store| -> Vec<u8> {
        (1..=70_u8).filter(|&n| store.tokens(&id(n), 0).unwrap() == Some(tokens(n))).collect()
    };
    let all: Vec<u8> = [1].into_iter().chain(31..59).chain([70]).collect();
    assert_eq!(holds(&twin), all, "clones see the new store");
    twin.put_tokens(id(71), "m", &[tokens(71)], None).unwrap();
    drop((store, twin));
    let store = open(&folder);
    assert_eq!(holds(&store), all);
    assert_eq!(store.tokens(&id(71), 0).unwrap(), Some(tokens(71)));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "only the store is left");
}

#[test]
fn a_kill_at_any_step_of_the_swap_leaves_one_whole_store() {
    for (has_store, has_next, has_old) in
        [(true, true, false), (false, true, true), (true, false, true), (false, false, true)]
    {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let store = open(&folder);
        store.put_tokens(id(1), "m", &[tokens(1)], None).unwrap();
        drop(store);
        let beside = |ending: &str| folder.path().join(format!("store.{ending}"));
        if has_old && !has_store {
            fs::rename(&path, beside("old")).unwrap();
        } else if has_old {
            fs::create_dir(beside("old")).unwrap();
        }
        if has_next {
            fs::create_dir(beside("next")).unwrap();
            fs::write(beside("next").join("db"), "half a copy").unwrap();
        }
        let opened = Store::open(&path, MIN_MEMORY).unwrap();
        assert_eq!(opened.repairs, []);
        assert_eq!(opened.store.tokens(&id(1), 0).unwrap(), Some(tokens(1)));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "only the store is left");
    }
}

/// A closed store with one scan, and its folder.
fn closed() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    store.put_tokens(id(1), "m", &[tokens(1), tokens(2)], None).unwrap();
    drop(store);
    // sled writes a snapshot when it opens.
    drop(open(&folder));
    let path = folder.path().join("store");
    (folder, path)
}

fn snapshot(path: &std::path::Path) -> std::path::PathBuf {
    let paths = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let mut snapshots = paths.filter(|path| path.to_string_lossy().contains("/snap."));
    snapshots.next().expect("a snapshot")
}

#[test]
fn a_damaged_snapshot_or_conf_costs_nothing() {
    type Harm = fn(&std::path::Path);
    let flip: Harm = |path| {
        let mut bytes = fs::read(path).unwrap();
        bytes[9] ^= 4;
        fs::write(path, bytes).unwrap();
    };
    let cut: Harm = |path| fs::File::options().write(true).open(path).unwrap().set_len(7).unwrap();
    for harm in [flip, cut] {
        let (_folder, path) = closed();
        harm(&path.join("conf"));
        harm(&snapshot(&path));
        fs::write(path.join("snap.FFFF.generating"), "half").unwrap();
        let Opened { store, repairs } = Store::open(&path, MIN_MEMORY).unwrap();
        let all = [Repair::ConfAside, Repair::SnapshotAside, Repair::SnapshotRemoved];
        assert_eq!(repairs.iter().copied().collect::<BTreeSet<_>>(), all.into());
        assert_eq!(store.tokens(&id(1), 0).unwrap(), Some(tokens(1)));
        drop(store);
        assert_eq!(Store::open(&path, MIN_MEMORY).unwrap().repairs, []);
    }
}

#[test]
fn a_damaged_log_goes_to_lost_and_found_and_an_empty_store_opens() {
    for turn in 0..2 {
        let (folder, path) = closed();
        if turn == 1 {
            fs::create_dir_all(folder.path().join("lost+found/store-earlier")).unwrap();
        }
        fs::File::options().write(true).open(path.join("db")).unwrap().set_len(0).unwrap();
        let Opened { store, repairs } = Store::open(&path, MIN_MEMORY).unwrap();
        assert_eq!(repairs, [Repair::StoreAside]);
        assert_eq!(store.tokens(&id(1), 0).unwrap(), None);
        store.put_tokens(id(1), "m", &[tokens(1)], None).unwrap();
        let kept = fs::read_dir(folder.path().join("lost+found")).unwrap();
        let kept: Vec<_> = kept.map(|entry| entry.unwrap().path()).collect();
        assert_eq!(kept.len(), 1, "only the newest is kept: {kept:?}");
        assert!(kept[0].join("conf").exists());
    }
}

#[test]
fn a_store_that_fails_while_it_is_in_use_is_moved_aside_at_the_next_start() {
    let (folder, path) = closed();
    {
        let store = open(&folder);
        // The cache of a store just opened has no more than the first page of the tokens.
        let mut bytes = fs::read(path.join("db")).unwrap();
        let tokens = tokens(2);
        let last = tokens.features().last_chunk::<32>().unwrap();
        let last: &[u8] = bytemuck::cast_slice(last);
        let starts = 0..bytes.len() - last.len();
        for at in starts.filter(|&at| bytes[at..].starts_with(last)).collect::<Vec<_>>() {
            bytes[at] ^= 1;
        }
        fs::write(path.join("db"), bytes).unwrap();
        let error = store.tokens(&id(1), 1).map(drop).unwrap_err();
        assert!(error.is_damage(), "no missing value: {error:?}");
    }
    assert!(folder.path().join("store.damaged").exists());

    // sled keeps its lock in this process, because it may hang when it closes a damaged store.
    let (folder, path) = closed();
    fs::write(folder.path().join("store.damaged"), "").unwrap();
    let Opened { store, repairs } = Store::open(&path, MIN_MEMORY).unwrap();
    assert_eq!(repairs, [Repair::StoreAside]);
    assert_eq!(store.tokens(&id(1), 0).unwrap(), None);
    assert!(!folder.path().join("store.damaged").exists());
}

#[test]
fn a_store_that_three_starts_did_not_survive_is_moved_aside() {
    let (folder, path) = closed();
    for (n_deaths, repairs) in [("2", &[][..]), ("3", &[Repair::StoreAside])] {
        fs::write(folder.path().join("store.tries"), n_deaths).unwrap();
        assert_eq!(Store::open(&path, MIN_MEMORY).unwrap().repairs, repairs);
        assert!(!folder.path().join("store.tries").exists());
    }
}

#[test]
fn a_store_that_another_process_has_open_is_left_as_it_is() {
    let (folder, path) = closed();
    let _held = open(&folder);
    fs::write(path.join("snap.FFFF.generating"), "the other one writes this").unwrap();
    let error = Store::open(&path, MIN_MEMORY).err().unwrap();
    assert!(matches!(error, StoreError::InUse { .. }), "{error:?}");
    assert!(path.join("snap.FFFF.generating").exists());
}

#[test]
fn no_page_is_so_large_that_the_cache_does_not_count_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    // Values of the largest size, in an order that fills pages and in one that splits them.
    let column = vec![1.0; CHUNK / 4];
    let columns = PairColumns { first_to_second: column.clone(), second_to_first: column };
    for (one, other) in (0..40).flat_map(|one| (0..one).map(move |other| (one, other))) {
        store.put_columns(id(one), id(other), 0, &columns).unwrap();
    }
    store.put_tokens(id(1), "m", &[tokens(1), tokens(2)], None).unwrap();
    let files = std::fs::read_dir(folder.path().join("store/blobs")).unwrap().count();
    assert_eq!(files, 0, "pages in files of their own");
}

#[test]
fn tokens_that_an_older_version_put_in_larger_chunks_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    store.put_tokens(id(1), "m", &[tokens(1)], None).unwrap();
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
    let store = open(&folder);
    store.put_columns(id(1), id(2), 0, &columns(1)).unwrap();
    assert!(store.column(id(1), id(2), 0, 600).unwrap().is_some());
    assert_eq!(store.column(id(1), id(2), 0, 599).unwrap(), None, "of other tokens");
    let (key, _) = store.columns.iter().next().unwrap().unwrap();
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
    let store = open(&folder);
    let fine = FineVolume {
        foreground: Foreground { shape: Shape3([5, 3, 2]), cells: vec![0, 7, 8, 29] },
        values: [0.5, -3.0, 0.0, 7.25].map(f16::from_f32).to_vec(),
        depths: vec![16, 255, 0, 40],
        cell_mm: 1.5,
    };
    store.put_tokens(id(1), "m", &[tokens(1)], Some(&fine)).unwrap();
    store.put_tokens(id(2), "m", &[tokens(2)], None).unwrap();
    assert_eq!(store.fine(&id(1)).unwrap(), Some(fine));
    assert_eq!(store.fine(&id(2)).unwrap(), None);
    store.remove(&id(1)).unwrap();
    assert_eq!(store.fine(&id(1)).unwrap(), None);
}

#[test]
fn records_of_the_format_before_are_handed_over_and_the_tokens_stay() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = open(&folder);
        assert!(store.old_records().unwrap().is_none());
        store.put_tokens(id(1), "m", &[tokens(1)], None).unwrap();
        store.facts.insert("format", OLD_FORMAT.to_be_bytes()).unwrap();
        store.old_journal.insert(id(1).0, record::seal(b"a record")).unwrap();
        store.old_seen.insert(b"a.nii", record::seal(b"a decision")).unwrap();
        store.flush().unwrap();
    }
    let store = open(&folder);
    let old = store.old_records().unwrap().unwrap();
    assert_eq!(old.records, [b"a record"]);
    assert_eq!(old.seen, [(b"a.nii".to_vec(), b"a decision".to_vec())]);
    store.drop_old_records().unwrap();
    assert!(store.old_records().unwrap().is_none());
    assert_eq!(store.tokens(&id(1), 0).unwrap(), Some(tokens(1)));
}

#[test]
fn a_copy_comes_back_and_a_damaged_one_counts_as_missing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    store.put_copy(&id(1), b"an entry").unwrap();
    store.put_copy(&id(2), b"another").unwrap();
    assert_eq!(store.copy(&id(1)).unwrap().unwrap(), b"an entry");
    assert_eq!(store.copies().unwrap().len(), 2);
    store.copies.insert(id(1).0, b"damage").unwrap();
    assert_eq!(store.copy(&id(1)).unwrap(), None);
    assert_eq!(store.copies().unwrap(), [b"another"]);
}
