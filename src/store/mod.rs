//! Tokens, pair columns and the journal in sled: everything that knows `sled`.
//!
//! Values are small, because sled puts pages of large ones into files of their own, which its cache
//! does not count, and values of 128 KiB into files that it never frees (measured: four times the
//! live data on disk after a few turns of the window, and growing). Long values are cut into
//! chunks; the manifest that makes them count is written after them, in one transaction with the
//! journal entry, and flushed before anyone acts on it.

mod error;
mod record;

use std::{
    collections::BTreeMap, fs, os::unix::fs::DirBuilderExt, path::Path, thread, time::Duration,
};

use bytemuck::{cast_slice, cast_slice_mut};
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sled::{IVec, Transactional, Tree, transaction::TransactionError};

use crate::{
    domain::{
        cohort::CohortKey,
        scan::{FileLook, ScanId, ScanRecord, ScanState},
    },
    numeric::{
        geometry::Shape3,
        scoring::PairColumns,
        token::{Foreground, TokenGrid},
    },
};
pub use error::{FORMAT, StoreError};

/// How columns are kept. They can be computed again, so that a change of this drops them and
/// nothing else.
const COLUMNS: &str = "each pair under the scan that came later";

/// Largest value, bytes. A page of sled has up to 17, and one of 128 KiB or more goes to a file of
/// its own that counts as a few bytes in the cache: with larger values the cache has no bound
/// (measured: 1.9 to 4.4 GB for 1.7 GB of data, with a capacity of 1 GiB).
const CHUNK: usize = 7424;

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

/// What was decided on a file that looked like this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenFile {
    look: FileLook,
    /// What was decided.
    pub outcome: SeenOutcome,
    /// Since when the file has been missing, seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    absent_since_secs: Option<u64>,
}

/// What was decided on a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeenOutcome {
    /// Taken in as this scan.
    Accepted(ScanId),
    /// A copy of this scan.
    Duplicate(ScanId),
    /// Refused.
    Quarantined,
    /// It is being read; what a start finds so was in hand when the process died.
    Reading {
        /// Times that reading began.
        attempts: u32,
    },
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

/// What makes the chunks of a scan's tokens count.
#[derive(Serialize, Deserialize)]
struct Manifest {
    grids: Vec<GridShape>,
}

#[derive(Serialize, Deserialize)]
struct GridShape {
    shape: [usize; 3],
    channels: usize,
    n_tokens: usize,
}

impl GridShape {
    fn n_bytes(&self) -> u64 {
        (self.n_tokens * (4 + 2 * self.channels)) as u64
    }
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

    /// Stores the grids of tokens of a scan with its journal entry; durable on return.
    /// A kill in the middle leaves the old state.
    pub fn put_encoded(&self, record: &ScanRecord, grids: &[TokenGrid]) -> Result<(), StoreError> {
        let mut shapes = Vec::new();
        for (index, grid) in grids.iter().enumerate() {
            let mut bytes = cast_slice::<u32, u8>(grid.cells()).to_vec();
            bytes.extend_from_slice(cast_slice::<f16, u8>(grid.features()));
            put_blob(&self.chunks, &grid_key(record.id, index), &bytes)?;
            shapes.push(GridShape {
                shape: grid.shape().0,
                channels: grid.channels(),
                n_tokens: grid.n_tokens(),
            });
        }
        let id = record.id.0;
        let manifest = record::seal_json(&Manifest { grids: shapes });
        let entry = record::seal_json(record);
        (&self.manifests, &self.journal)
            .transaction(|(manifests, journal)| {
                manifests.insert(&id, manifest.as_slice())?;
                journal.insert(&id, entry.as_slice())?;
                Ok(())
            })
            .map_err(storage)?;
        self.flush()
    }

    /// One grid of the tokens of a scan; `None` if there is no such grid.
    pub fn tokens(&self, id: &ScanId, grid: usize) -> Result<Option<TokenGrid>, StoreError> {
        let Some((found, channels, mut blob)) = self.open_tokens(id, grid)? else {
            return Ok(None);
        };
        let mut features = vec![f16::ZERO; found.cells.len() * channels];
        blob.fill(cast_slice_mut(&mut features))?;
        TokenGrid::new(found.shape, channels, found.cells, features)
            .map(Some)
            .map_err(|_| StoreError::Damaged { what: "tokens", scan: id.short() })
    }

    /// The cells of one grid of a scan's tokens, without reading its features; `None` if there is
    /// no such grid.
    pub fn foreground(&self, id: &ScanId, grid: usize) -> Result<Option<Foreground>, StoreError> {
        Ok(self.open_tokens(id, grid)?.map(|(found, ..)| found))
    }

    /// The cells and channels of one grid of tokens, read up to the features.
    fn open_tokens(
        &self,
        id: &ScanId,
        grid: usize,
    ) -> Result<Option<(Foreground, usize, Blob<'_>)>, StoreError> {
        let Some(manifest) = self.manifest(id)? else { return Ok(None) };
        let Some(found) = manifest.grids.get(grid) else { return Ok(None) };
        let lost = || StoreError::Damaged { what: "tokens", scan: id.short() };
        let blob = Blob::open(&self.chunks, grid_key(*id, grid), "tokens")?;
        let mut blob = blob.filter(|blob| blob.length == found.n_bytes()).ok_or_else(lost)?;
        let mut cells = vec![0_u32; found.n_tokens];
        blob.fill(cast_slice_mut(&mut cells))?;
        let foreground = Foreground { shape: Shape3(found.shape), cells };
        Ok(Some((foreground, found.channels, blob)))
    }

    fn manifest(&self, id: &ScanId) -> Result<Option<Manifest>, StoreError> {
        let value = self.manifests.get(id.0)?;
        value.map(|value| record::open_json(&value, "token manifest", &id.0)).transpose()
    }

    /// Keeps both columns of a pair for one grid of tokens. Not flushed: columns can be computed
    /// again.
    pub fn put_columns(
        &self,
        first: ScanId,
        second: ScanId,
        grid: usize,
        columns: &PairColumns,
    ) -> Result<(), StoreError> {
        let PairColumns { first_to_second, second_to_first } = columns;
        for (way, column) in [(Way::There, first_to_second), (Way::Back, second_to_first)] {
            put_blob(&self.columns, &column_key(first, way, second, grid), cast_slice(column))?;
        }
        Ok(())
    }

    /// The distances from the `n_tokens` tokens of one scan to another scan, if they were kept. A
    /// damaged column counts as not kept: it can be computed again.
    pub fn column(
        &self,
        of: ScanId,
        other: ScanId,
        grid: usize,
        n_tokens: usize,
    ) -> Result<Option<Vec<f32>>, StoreError> {
        // Under either of the two, as a rule the one that came later.
        let under_of = column_key(of, Way::There, other, grid);
        let under_other = column_key(other, Way::Back, of, grid);
        for key in [under_of, under_other] {
            match self.read_column(key, n_tokens) {
                Ok(None) | Err(StoreError::Damaged { .. }) => {}
                found => return found,
            }
        }
        Ok(None)
    }

    fn read_column(&self, key: Vec<u8>, n_tokens: usize) -> Result<Option<Vec<f32>>, StoreError> {
        let blob = Blob::open(&self.columns, key, "distances")?;
        let Some(mut blob) = blob.filter(|blob| blob.length == 4 * n_tokens as u64) else {
            return Ok(None);
        };
        let mut column = vec![0.0; n_tokens];
        blob.fill(cast_slice_mut(&mut column))?;
        Ok(Some(column))
    }

    /// As [`Store::column`], to several other scans at once, on all cores.
    pub fn columns(
        &self,
        of: ScanId,
        others: &[ScanId],
        grid: usize,
        n_tokens: usize,
    ) -> Result<Vec<Option<Vec<f32>>>, StoreError> {
        others.par_iter().map(|&other| self.column(of, other, grid, n_tokens)).collect()
    }

    /// Whether both columns of a pair are kept under the scan that joined; nothing of the other one
    /// is read.
    pub fn has_columns(
        &self,
        joined: ScanId,
        other: ScanId,
        grid: usize,
    ) -> Result<bool, StoreError> {
        let is_kept =
            |way| self.columns.contains_key(chunk_key(&column_key(joined, way, other, grid), 0));
        Ok(is_kept(Way::There)? && is_kept(Way::Back)?)
    }

    /// Drops all columns if they were computed in another way than `how`, or kept in another order.
    /// `alive` is called while it goes on.
    pub fn keep_columns_made_by(&self, how: &str, alive: impl Fn()) -> Result<(), StoreError> {
        let how = format!("{how}, {COLUMNS}");
        if self.db.get("columns")?.is_none_or(|stored| stored != how.as_bytes()) {
            for key in self.columns.iter().keys() {
                alive();
                self.columns.remove(key?)?;
            }
            self.db.insert("columns", how.as_bytes())?;
            self.flush()?;
        }
        Ok(())
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

    /// What was decided on a path, if anything.
    pub fn seen(&self, path: &[u8]) -> Result<Option<SeenFile>, StoreError> {
        let value = self.seen.get(path)?;
        value.map(|value| record::open_json(&value, "seen file", b"")).transpose()
    }

    /// Remembers what was decided on a path.
    pub fn put_seen(&self, path: &[u8], seen: &SeenFile) -> Result<(), StoreError> {
        self.seen.insert(path, record::seal_json(seen))?;
        Ok(())
    }

    /// Forgets what was decided on a path.
    pub fn forget_seen(&self, path: &[u8]) -> Result<(), StoreError> {
        self.seen.remove(path)?;
        Ok(())
    }

    /// Forgets the paths that have been missing for `patience_secs`. Not sooner: a share that is
    /// unmounted for a while looks empty, and all its files would be read again afterwards.
    pub fn forget_missing(
        &self,
        is_there: impl Fn(&[u8]) -> bool,
        now_secs: u64,
        patience_secs: u64,
    ) -> Result<(), StoreError> {
        for entry in self.seen.iter() {
            let (path, value) = entry?;
            let seen: SeenFile = record::open_json(&value, "seen file", b"")?;
            let absent_since_secs = match (is_there(&path), seen.absent_since_secs) {
                (true, _) => None,
                (false, since) => Some(since.unwrap_or(now_secs)),
            };
            if absent_since_secs.is_some_and(|since| now_secs >= since + patience_secs) {
                self.seen.remove(path)?;
            } else if absent_since_secs != seen.absent_since_secs {
                self.put_seen(&path, &SeenFile { absent_since_secs, ..seen })?;
            }
        }
        Ok(())
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

impl SeenFile {
    /// Remembers a decision for a file that looks like this.
    pub fn new(look: FileLook, outcome: SeenOutcome) -> Self {
        Self { look, outcome, absent_since_secs: None }
    }

    /// Whether the file still looks the same.
    pub fn is_same(&self, look: &FileLook) -> bool {
        self.look == *look
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

/// `id | grid`, big-endian, so that everything of a scan is a prefix, and of a grid.
fn grid_key(id: ScanId, grid: usize) -> Vec<u8> {
    [&id.0[..], &(grid as u16).to_be_bytes()].concat()
}

/// The direction of a column, seen from the pair under which it is kept.
#[derive(Clone, Copy)]
enum Way {
    There,
    Back,
}

/// `first | way | second`.
///
/// All columns of a scan that joins lie together, since sled writes a page anew for each value that
/// is put into it later; and so do those of one direction, since it reads a page for each value.
fn pair_key(first: &[u8], way: Way, second: &[u8]) -> Vec<u8> {
    [first, &[way as u8], second].concat()
}

fn column_key(first: ScanId, way: Way, second: ScanId, grid: usize) -> Vec<u8> {
    let mut key = pair_key(&first.0, way, &second.0);
    key.extend((grid as u16).to_be_bytes());
    key
}

/// Writes `prefix | chunk` keys, the chunks of about one size. Each value carries the length of the
/// whole, so that a missing chunk shows.
fn put_blob(tree: &Tree, prefix: &[u8], bytes: &[u8]) -> Result<(), StoreError> {
    let n_chunks = bytes.len().div_ceil(CHUNK).max(1);
    let size = bytes.len().div_ceil(n_chunks).max(1);
    for index in 0..n_chunks {
        let chunk = &bytes[(index * size).min(bytes.len())..((index + 1) * size).min(bytes.len())];
        let value = [&(bytes.len() as u64).to_be_bytes(), chunk].concat();
        tree.insert(chunk_key(prefix, index), record::seal(&value))?;
    }
    Ok(())
}

/// A long value that is read from its start.
///
/// Looked up chunk by chunk: a range of keys would make sled copy each page's list of keys, and
/// tell its cache but once of sixteen values.
struct Blob<'a> {
    tree: &'a Tree,
    prefix: Vec<u8>,
    what: &'static str,
    /// Bytes in all.
    length: u64,
    next: usize,
    /// What is left of the chunk at hand.
    chunk: IVec,
}

impl<'a> Blob<'a> {
    fn open(
        tree: &'a Tree,
        prefix: Vec<u8>,
        what: &'static str,
    ) -> Result<Option<Self>, StoreError> {
        let Some(first) = tree.get(chunk_key(&prefix, 0))? else { return Ok(None) };
        let (length, chunk) = open_chunk(&first, what, &prefix)?;
        Ok(Some(Self { tree, prefix, what, length, next: 1, chunk }))
    }

    /// Reads on until `room` is full.
    fn fill(&mut self, mut room: &mut [u8]) -> Result<(), StoreError> {
        loop {
            let n_bytes = room.len().min(self.chunk.len());
            let (now, later) = room.split_at_mut(n_bytes);
            now.copy_from_slice(&self.chunk[..n_bytes]);
            self.chunk = self.chunk.subslice(n_bytes, self.chunk.len() - n_bytes);
            if later.is_empty() {
                return Ok(());
            }
            room = later;
            let value = self.tree.get(chunk_key(&self.prefix, self.next))?;
            let value = value.ok_or_else(|| record::damaged(self.what, &self.prefix))?;
            self.chunk = open_chunk(&value, self.what, &self.prefix)?.1;
            self.next += 1;
        }
    }
}

fn chunk_key(prefix: &[u8], index: usize) -> Vec<u8> {
    [prefix, &(index as u32).to_be_bytes()].concat()
}

/// The length of the whole and one chunk of it.
fn open_chunk(value: &IVec, what: &'static str, prefix: &[u8]) -> Result<(u64, IVec), StoreError> {
    let payload = record::unseal(value, what, prefix)?;
    let (length, chunk) =
        payload.split_first_chunk().ok_or_else(|| record::damaged(what, prefix))?;
    let chunk = value.subslice(value.len() - chunk.len(), chunk.len());
    Ok((u64::from_be_bytes(*length), chunk))
}

/// The ids that the keys of a tree begin with. By leaps from one to the next: a walk over all keys
/// would read everything there is.
fn first_ids(tree: &Tree) -> Result<Vec<IVec>, StoreError> {
    let mut ids: Vec<IVec> = Vec::new();
    let mut next = tree.first()?;
    while let Some((key, _)) = next {
        let id = key.subslice(0, 32);
        // No key goes on with more than a direction, an id, a grid and a chunk.
        next = tree.get_gt([&id[..], &[0xff; 48]].concat())?;
        ids.push(id);
    }
    Ok(ids)
}

fn remove_prefix(tree: &Tree, prefix: &[u8]) -> Result<(), StoreError> {
    for key in tree.scan_prefix(prefix).keys() {
        tree.remove(key?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
