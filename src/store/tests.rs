use half::f16;

use super::{
    blob::{Blob, CHUNK, chunk_key, put_blob, remove_prefix},
    error::OLD_FORMAT,
    key::grid_key,
    record, *,
};
use crate::{
    domain::scan::ScanId,
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
        store.put_tokens(id(1), &[tokens(1), tokens(3)], None).unwrap();
        store.put_tokens(id(2), &[tokens(2), tokens(4)], None).unwrap();
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
    assert!(store.has_tokens(&id(1), 2).unwrap() && !store.has_tokens(&id(1), 3).unwrap());
    assert!(!store.has_tokens(&id(3), 2).unwrap());
}

#[test]
fn a_removed_scan_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    for n in [1, 2, 3] {
        store.put_tokens(id(n), &[tokens(n)], None).unwrap();
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
        let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
        store.put_tokens(id(1), &[tokens(1)], None).unwrap();
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
    store.put_tokens(id(1), &[tokens(1)], None).unwrap();
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
    for other in [OLD_FORMAT - 1, FORMAT + 1] {
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
fn turning_the_window_twenty_times_keeps_the_disk_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    let window = 4_u8;
    for turn in 0..window * 20 {
        store.put_tokens(id(turn), &[tokens(turn)], None).unwrap();
        if turn >= window {
            store.remove(&id(turn - window)).unwrap();
        }
    }
    let members: Vec<ScanId> = (window * 19..window * 20).map(id).collect();
    let live = store.live_bytes([&members[..]]).unwrap();
    let disk = store.size_on_disk().unwrap();
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
    store.put_tokens(id(1), &[tokens(1), tokens(2)], None).unwrap();
    let files = std::fs::read_dir(folder.path().join("blobs")).unwrap().count();
    assert_eq!(files, 0, "pages in files of their own");
}

#[test]
fn tokens_that_an_older_version_put_in_larger_chunks_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    store.put_tokens(id(1), &[tokens(1)], None).unwrap();
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
    store.put_tokens(id(1), &[tokens(1)], Some(&fine)).unwrap();
    store.put_tokens(id(2), &[tokens(2)], None).unwrap();
    assert_eq!(store.fine(&id(1)).unwrap(), Some(fine));
    assert_eq!(store.fine(&id(2)).unwrap(), None);
    store.remove(&id(1)).unwrap();
    assert_eq!(store.fine(&id(1)).unwrap(), None);
}

#[test]
fn records_of_the_format_before_are_handed_over_and_the_tokens_stay() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
        assert!(store.old_records().unwrap().is_none());
        store.put_tokens(id(1), &[tokens(1)], None).unwrap();
        store.db.insert("format", &OLD_FORMAT.to_be_bytes()).unwrap();
        let put = |tree: &str, key: &[u8], value: &[u8]| {
            store.db.open_tree(tree).unwrap().insert(key, record::seal(value)).unwrap();
        };
        put("journal", &id(1).0, b"a record");
        put("seen", b"a.nii", b"a decision");
    }
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
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
    let store = Store::open(folder.path(), MIN_MEMORY).unwrap();
    store.put_copy(&id(1), b"an entry").unwrap();
    store.put_copy(&id(2), b"another").unwrap();
    assert_eq!(store.copy(&id(1)).unwrap().unwrap(), b"an entry");
    assert_eq!(store.copies().unwrap().len(), 2);
    store.copies.insert(id(1).0, b"damage").unwrap();
    assert_eq!(store.copy(&id(1)).unwrap(), None);
    assert_eq!(store.copies().unwrap(), [b"another"]);
}
