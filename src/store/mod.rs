//! Tokens, pair columns and the journal in sled: everything that knows `sled`.
//!
//! Values are small, because sled puts pages of large ones into files of their own, which its cache
//! does not count, and values of 128 KiB into files that it never frees (measured: four times the
//! live data on disk after a few turns of the window, and growing). Long values are cut into
//! chunks; the manifest that makes them count is written after them, in one transaction with the
//! journal entry, and flushed before anyone acts on it.

mod blob;
mod columns;
mod error;
mod key;
mod record;
mod seen;
mod tokens;

use std::{
    collections::BTreeMap, fs, os::unix::fs::DirBuilderExt, path::Path, thread, time::Duration,
};

use sled::{Transactional, Tree, transaction::TransactionError};

use crate::domain::{
    cohort::CohortKey,
    scan::{ScanId, ScanRecord, ScanState},
};
use blob::{CHUNK, first_ids, remove_prefix};
use key::{Way, pair_key};
use tokens::{GridShape, Manifest};

pub use error::StoreError;
pub use seen::{SeenFile, SeenOutcome};

/// Layout of the store; grows with every change that an older version would misread.
pub const FORMAT: u32 = 2;

/// What sled may hold beyond the capacity of its cache, bytes. Each of its 256 shards looks at what
/// was used only after 64 uses, and each use may have brought a value into memory.
const BEYOND_CACHE: u64 = 256 * 64 * CHUNK as u64;

/// Least memory of a store, bytes.
pub const MIN_MEMORY: u64 = BEYOND_CACHE + (12 << 20);

/// Tries and pause for the lock that a killed process may still hold for a moment.
const LOCK_TRIES: u32 = 30;
const LOCK_PAUSE: Duration = Duration::from_millis(200);

/// Makes all threads share one heap; to be called before there are any.
///
/// glibc gives threads heaps of their own, and sled's cache wanders from one to the next: whatever
/// thread reads fills its heap, and what is let go stays in another. Measured with 120 scans and a
/// budget of 256 MiB on two cores: 489 MiB with heaps per thread, 251 with one, in about the same
/// processor time.
pub fn share_one_heap() {
    // SAFETY: one number is set; nothing is read or freed.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// The token store and journal. Clones are handles on the same store.
#[derive(Clone)]
pub struct Store {
    db: sled::Db,
    journal: Tree,
    manifests: Tree,
    chunks: Tree,
    columns: Tree,
    seen: Tree,
}

impl Store {
    /// Opens the store in `folder`, made with mode 0700 if need be, and clears away what a kill
    /// left half-written.
    ///
    /// `memory_bytes` is about what it may hold in memory, whatever it holds on disk: at least
    /// [`MIN_MEMORY`], or that counts. What was put by versions before chunks were small is held
    /// beyond it.
    pub fn open(folder: &Path, memory_bytes: u64) -> Result<Self, StoreError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|source| StoreError::Folder { path: folder.to_owned(), source })?;
        let db = open_db(folder, memory_bytes)?;
        check_format(&db)?;
        let store = Self {
            journal: db.open_tree("journal")?,
            manifests: db.open_tree("manifests")?,
            chunks: db.open_tree("chunks")?,
            columns: db.open_tree("columns")?,
            seen: db.open_tree("seen")?,
            db,
        };
        store.sweep()?;
        Ok(store)
    }

    /// Removes tokens and columns of scans without a manifest: they were being written or evicted
    /// when the process was killed.
    fn sweep(&self) -> Result<(), StoreError> {
        for tree in [&self.chunks, &self.columns] {
            for id in first_ids(tree)? {
                if !self.manifests.contains_key(&id)? {
                    self.remove_all_of(&id)?;
                }
            }
        }
        Ok(())
    }

    /// Removes columns and tokens of a scan. Its tokens go last: by them `sweep` finds a scan whose
    /// removal was cut off.
    fn remove_all_of(&self, id: &[u8]) -> Result<(), StoreError> {
        for other in self.manifests.iter().keys() {
            let other = other?;
            for way in [Way::There, Way::Back] {
                remove_prefix(&self.columns, &pair_key(&other, way, id))?;
            }
        }
        remove_prefix(&self.columns, id)?;
        remove_prefix(&self.chunks, id)
    }

    /// Writes a journal entry; durable on return.
    pub fn put_record(&self, record: &ScanRecord) -> Result<(), StoreError> {
        self.journal.insert(record.id.0, record::seal_json(record))?;
        self.flush()
    }

    /// The journal entry of a scan.
    pub fn record(&self, id: &ScanId) -> Result<Option<ScanRecord>, StoreError> {
        let value = self.journal.get(id.0)?;
        value.map(|value| record::open_json(&value, "journal", &id.0)).transpose()
    }

    /// All journal entries in order of arrival.
    pub fn records(&self) -> Result<Vec<ScanRecord>, StoreError> {
        let mut records = Vec::new();
        for entry in self.journal.iter() {
            let (key, value) = entry?;
            records.push(record::open_json::<ScanRecord>(&value, "journal", &key)?);
        }
        records.sort_by_key(|record| record.sequence);
        Ok(records)
    }

    /// A number larger than all before, also after a restart.
    pub fn next_sequence(&self) -> Result<u64, StoreError> {
        Ok(self.db.generate_id()?)
    }

    /// Takes a scan out of its window: its entry is rewritten as evicted, its tokens and all
    /// columns that touch it are removed. Doing it twice changes nothing.
    pub fn evict(&self, record: &ScanRecord) -> Result<(), StoreError> {
        let evicted = ScanRecord { state: ScanState::Evicted, ..record.clone() };
        self.drop_tokens(&evicted)
    }

    /// Removes the tokens of a scan, which goes back to waiting for the encoder.
    pub fn forget_tokens(&self, record: &ScanRecord) -> Result<(), StoreError> {
        let waiting = ScanRecord { state: ScanState::Ingested, ..record.clone() };
        self.drop_tokens(&waiting)
    }

    fn drop_tokens(&self, record: &ScanRecord) -> Result<(), StoreError> {
        let id = record.id.0;
        let entry = record::seal_json(record);
        (&self.manifests, &self.journal)
            .transaction(|(manifests, journal)| {
                manifests.remove(&id)?;
                journal.insert(&id, entry.as_slice())?;
                Ok(())
            })
            .map_err(storage)?;
        self.flush()?;
        self.remove_all_of(&id)
    }

    /// Makes everything durable that was written so far.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.db.flush()?;
        Ok(())
    }

    /// Bytes that the store takes on disk.
    pub fn size_on_disk(&self) -> Result<u64, StoreError> {
        Ok(self.db.size_on_disk()?)
    }

    /// Bytes of tokens and columns that belong to members of windows.
    pub fn live_bytes(&self) -> Result<u64, StoreError> {
        let mut tokens = 0;
        // Members and bytes of one column of each, by cohort: every member keeps a column towards
        // each other one.
        let mut cohorts: BTreeMap<CohortKey, (u64, u64)> = BTreeMap::new();
        for entry in self.manifests.iter() {
            let (key, value) = entry?;
            let manifest: Manifest = record::open_json(&value, "token manifest", &key)?;
            tokens += manifest.grids.iter().map(GridShape::n_bytes).sum::<u64>();
            let Some(entry) = self.journal.get(&key)? else { continue };
            let record: ScanRecord = record::open_json(&entry, "journal", &key)?;
            let (n_members, column) = cohorts.entry(record.cohort).or_default();
            *n_members += 1;
            *column += manifest.grids.iter().map(|l| 4 * l.n_tokens as u64).sum::<u64>();
        }
        let columns = cohorts.values().map(|(n_members, column)| column * (n_members - 1));
        Ok(tokens + columns.sum::<u64>())
    }
}

fn open_db(folder: &Path, memory_bytes: u64) -> Result<sled::Db, StoreError> {
    let cache = memory_bytes.max(MIN_MEMORY) - BEYOND_CACHE;
    let open = || sled::Config::new().path(folder).cache_capacity(cache).open();
    let mut n_tries = 0;
    loop {
        n_tries += 1;
        match open() {
            Err(sled::Error::Io(source)) if source.to_string().contains("lock") => {
                if n_tries == LOCK_TRIES {
                    return Err(StoreError::InUse { folder: folder.to_owned(), source });
                }
                // A process that was just killed may not have let go of the lock yet.
                thread::sleep(LOCK_PAUSE);
            }
            other => return Ok(other?),
        }
    }
}

fn check_format(db: &sled::Db) -> Result<(), StoreError> {
    match db.get("format")? {
        None => {
            db.insert("format", &FORMAT.to_be_bytes())?;
            db.flush()?;
            Ok(())
        }
        Some(value) => {
            let bytes = <[u8; 4]>::try_from(value.as_ref());
            let found = bytes.map_or(u32::MAX, u32::from_be_bytes);
            if found == FORMAT { Ok(()) } else { Err(StoreError::Format { found }) }
        }
    }
}

fn storage(error: TransactionError<()>) -> StoreError {
    match error {
        TransactionError::Storage(error) => error.into(),
        TransactionError::Abort(()) => unreachable!("the transactions here never abort"),
    }
}

#[cfg(test)]
mod tests;
