//! Tokens, pair columns and the journal in sled: everything that knows `sled`.
//!
//! Values stay below 64 KiB, because sled puts larger ones into files that it never frees (measured:
//! four times the live data on disk after a few turns of the window, and growing). Long values are
//! cut into chunks; the manifest that makes them count is written after them, in one transaction
//! with the journal entry, and flushed before anyone acts on it.

mod record;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use bytemuck::cast_slice;
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sled::{Transactional, Tree, transaction::TransactionError};

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

/// Layout of the store; grows with every change that an older version would misread.
pub const FORMAT: u32 = 2;

/// Largest value, bytes.
const CHUNK: usize = 60 * 1024;

/// Tries and pause for the lock that a killed process may still hold for a moment.
const LOCK_TRIES: u32 = 30;
const LOCK_PAUSE: Duration = Duration::from_millis(200);

/// What the store can fail with. All of it is fatal: going on could lose or double a scan.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be made.
    #[error("cannot make the store folder {}", path.display())]
    Folder {
        /// Folder.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// sled failed.
    #[error("the store failed; check the disk and the permissions of the state folder")]
    Sled(#[from] sled::Error),
    /// Written by another version.
    #[error(
        "the store has format {found}, this version reads {FORMAT}; install the version that wrote it, or give another directories.state and let the scans be encoded again"
    )]
    Format {
        /// Format found.
        found: u32,
    },
    /// A value is damaged.
    #[error(
        "the store is damaged: {what} of scan {scan}; restore the state folder, or remove it and let the scans be encoded again"
    )]
    Damaged {
        /// Kind of value.
        what: &'static str,
        /// Short id, or the key in hex.
        scan: String,
    },
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
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|source| StoreError::Folder { path: folder.to_owned(), source })?;
        let db = open_db(folder)?;
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
        for (tree, n_ids) in [(&self.chunks, 1), (&self.columns, 2)] {
            for key in tree.iter().keys() {
                let key = key?;
                let ids: Vec<&[u8]> = key.chunks_exact(32).take(n_ids).collect();
                let mut whole = ids.len() == n_ids;
                for id in ids {
                    whole &= self.manifests.contains_key(id)?;
                }
                if !whole {
                    tree.remove(key)?;
                }
            }
        }
        Ok(())
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
            put_blob(&self.chunks, &grid_key(&[record.id], index), &bytes)?;
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
        let damaged = || StoreError::Damaged { what: "tokens", scan: id.short() };
        let Some(manifest) = self.manifest(id)? else { return Ok(None) };
        let Some(shape) = manifest.grids.get(grid) else { return Ok(None) };
        let bytes = get_blob(&self.chunks, &grid_key(&[*id], grid), "tokens")?;
        let bytes = bytes.filter(|b| b.len() as u64 == shape.n_bytes()).ok_or_else(damaged)?;
        let (cells, features) = bytes.split_at(shape.n_tokens * 4);
        let cells = cells.chunks_exact(4).map(word);
        let features = features.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]));
        TokenGrid::new(Shape3(shape.shape), shape.channels, cells.collect(), features.collect())
            .map(Some)
            .map_err(|_| damaged())
    }

    /// The cells of one grid of a scan's tokens, without reading its features; `None` if there is no
    /// such grid.
    pub fn foreground(&self, id: &ScanId, grid: usize) -> Result<Option<Foreground>, StoreError> {
        let Some(manifest) = self.manifest(id)? else { return Ok(None) };
        let Some(found) = manifest.grids.get(grid) else { return Ok(None) };
        let n_bytes = found.n_tokens * 4;
        let mut bytes = Vec::with_capacity(n_bytes);
        let prefix = grid_key(&[*id], grid);
        let mut index = 0_u32;
        while bytes.len() < n_bytes {
            let key = [prefix.as_slice(), &index.to_be_bytes()].concat();
            let lost = || StoreError::Damaged { what: "tokens", scan: id.short() };
            let value = self.chunks.get(key)?.ok_or_else(lost)?;
            bytes.extend_from_slice(open_chunk(&value, "tokens", &prefix)?.1);
            index += 1;
        }
        let cells = bytes[..n_bytes].chunks_exact(4).map(word).collect();
        Ok(Some(Foreground { shape: Shape3(found.shape), cells }))
    }

    fn manifest(&self, id: &ScanId) -> Result<Option<Manifest>, StoreError> {
        let value = self.manifests.get(id.0)?;
        value.map(|value| record::open_json(&value, "token manifest", &id.0)).transpose()
    }

    /// Keeps both columns of a pair for one grid of tokens. Not flushed: columns can be computed again.
    pub fn put_columns(
        &self,
        first: ScanId,
        second: ScanId,
        grid: usize,
        columns: &PairColumns,
    ) -> Result<(), StoreError> {
        let there = cast_slice(&columns.first_to_second);
        put_blob(&self.columns, &grid_key(&[first, second], grid), there)?;
        let back = cast_slice(&columns.second_to_first);
        put_blob(&self.columns, &grid_key(&[second, first], grid), back)
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
        let bytes = match get_blob(&self.columns, &grid_key(&[of, other], grid), "distances") {
            Err(StoreError::Damaged { .. }) => None,
            bytes => bytes?,
        };
        let whole = bytes.filter(|bytes| bytes.len() == 4 * n_tokens);
        let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        Ok(whole.map(|bytes| bytes.chunks_exact(4).map(number).collect()))
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

    /// Whether something was kept of the distances of a pair.
    pub fn has_column(&self, of: ScanId, other: ScanId, grid: usize) -> Result<bool, StoreError> {
        Ok(self.columns.scan_prefix(grid_key(&[of, other], grid)).next().is_some())
    }

    /// Drops all columns if they were computed in another way than `how`.
    pub fn keep_columns_made_by(&self, how: &str) -> Result<(), StoreError> {
        if self.db.get("columns")?.is_none_or(|stored| stored != how.as_bytes()) {
            self.columns.clear()?;
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
        remove_prefix(&self.chunks, &id)?;
        remove_prefix(&self.columns, &id)?;
        // Scans without a manifest have no columns either, or `sweep` takes them at the next start.
        for other in self.manifests.iter().keys() {
            remove_prefix(&self.columns, &[&other?, id.as_slice()].concat())?;
        }
        Ok(())
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

fn open_db(folder: &Path) -> Result<sled::Db, StoreError> {
    for _ in 1..LOCK_TRIES {
        match sled::open(folder) {
            // A process that was just killed may not have let go of the lock yet.
            Err(sled::Error::Io(error)) if error.to_string().contains("lock") => {
                thread::sleep(LOCK_PAUSE);
            }
            other => return Ok(other?),
        }
    }
    Ok(sled::open(folder)?)
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

/// `id ... | grid`, big-endian, so that everything of a scan, a pair, a grid is a prefix.
fn grid_key(ids: &[ScanId], grid: usize) -> Vec<u8> {
    let mut key: Vec<u8> = ids.iter().flat_map(|id| id.0).collect();
    key.extend((grid as u16).to_be_bytes());
    key
}

/// Writes `prefix | chunk` keys. Each value carries the length of the whole, so that a missing
/// chunk shows.
fn put_blob(tree: &Tree, prefix: &[u8], bytes: &[u8]) -> Result<(), StoreError> {
    let empty: &[u8] = &[];
    let chunks = bytes.chunks(CHUNK).chain(bytes.is_empty().then_some(empty));
    for (index, chunk) in chunks.enumerate() {
        let mut key = prefix.to_vec();
        key.extend((index as u32).to_be_bytes());
        let mut value = (bytes.len() as u64).to_be_bytes().to_vec();
        value.extend(chunk);
        tree.insert(key, record::seal(&value))?;
    }
    Ok(())
}

fn get_blob(tree: &Tree, prefix: &[u8], what: &'static str) -> Result<Option<Vec<u8>>, StoreError> {
    let mut whole: Option<(u64, Vec<u8>)> = None;
    for entry in tree.scan_prefix(prefix) {
        let (_, value) = entry?;
        let (length, chunk) = open_chunk(&value, what, prefix)?;
        whole.get_or_insert_with(|| (length, Vec::with_capacity(length as usize))).1.extend(chunk);
    }
    match whole {
        Some((length, bytes)) if bytes.len() as u64 != length => Err(record::damaged(what, prefix)),
        whole => Ok(whole.map(|(_, bytes)| bytes)),
    }
}

/// The length of the whole and one chunk of it.
fn open_chunk<'v>(
    value: &'v [u8],
    what: &'static str,
    prefix: &[u8],
) -> Result<(u64, &'v [u8]), StoreError> {
    let (length, chunk) = record::unseal(value, what, prefix)?.split_at(8);
    Ok((u64::from_be_bytes(length.try_into().expect("split at 8")), chunk))
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn remove_prefix(tree: &Tree, prefix: &[u8]) -> Result<(), StoreError> {
    for key in tree.scan_prefix(prefix).keys() {
        tree.remove(key?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
