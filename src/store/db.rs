//! The database itself: opens it, and removes what a kill left half-written.

use std::{fs, os::unix::fs::DirBuilderExt, path::Path, thread, time::Duration};

use sled::Tree;

use super::{
    blob::{CHUNK, first_ids, remove_prefix},
    error::{FORMAT, OLD_FORMAT, StoreError},
    key::{Way, pair_key},
};
use crate::domain::scan::ScanId;

/// Memory that sled may use beyond the capacity of its cache, bytes. Each of its 256 shards checks
/// its use only after 64 accesses, and each access may have loaded a value.
const BEYOND_CACHE: u64 = 256 * 64 * CHUNK as u64;

/// The least memory that a store needs, bytes.
pub const MIN_MEMORY: u64 = BEYOND_CACHE + (12 << 20);

/// Number of tries to get the lock, and the pause between them. A killed process may hold the lock
/// a moment longer.
const LOCK_TRIES: u32 = 30;
const LOCK_PAUSE: Duration = Duration::from_millis(200);

/// The store of tokens and columns. Clones share the same store.
#[derive(Clone)]
pub struct Store {
    pub(super) db: sled::Db,
    pub(super) manifests: Tree,
    pub(super) chunks: Tree,
    pub(super) columns: Tree,
    pub(super) copies: Tree,
}

impl Store {
    /// Opens the store in `folder` and removes what a kill left half-written. A missing folder is
    /// made with mode 0700.
    ///
    /// `memory_bytes` is about the memory that the store may use, whatever its size on disk. A
    /// value below [`MIN_MEMORY`] counts as [`MIN_MEMORY`]. The larger chunks of older versions
    /// take memory beyond it.
    pub fn open(folder: &Path, memory_bytes: u64) -> Result<Self, StoreError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|source| StoreError::Folder { path: folder.to_owned(), source })?;

        let db = open_db(folder, memory_bytes)?;
        check_format(&db)?;
        let store = Self {
            manifests: db.open_tree("manifests")?,
            chunks: db.open_tree("chunks")?,
            columns: db.open_tree("columns")?,
            copies: db.open_tree("copies")?,
            db,
        };

        store.sweep()?;
        Ok(store)
    }

    /// Removes tokens and columns of scans without a manifest. The process was killed while it
    /// wrote or evicted them.
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

    /// Removes columns and tokens of a scan. Tokens are removed last, because `sweep` needs them to
    /// find a scan whose removal was interrupted.
    pub(super) fn remove_all_of(&self, id: &[u8]) -> Result<(), StoreError> {
        for other in self.manifests.iter().keys() {
            let other = other?;
            for way in [Way::There, Way::Back] {
                remove_prefix(&self.columns, &pair_key(&other, way, id))?;
            }
        }
        remove_prefix(&self.columns, id)?;
        remove_prefix(&self.chunks, id)
    }

    /// Whether the store has the format before the current one.
    pub(super) fn is_old(&self) -> Result<bool, StoreError> {
        Ok(self.db.get("format")?.is_some_and(|value| format_of(&value) == OLD_FORMAT))
    }

    /// Notes that the store has the current format, durably.
    pub(super) fn note_format(&self) -> Result<(), StoreError> {
        self.db.insert("format", &FORMAT.to_be_bytes())?;
        self.flush()
    }

    /// Removes the tokens of a scan and all columns from or to it. A second call changes nothing.
    pub fn remove(&self, id: &ScanId) -> Result<(), StoreError> {
        // After a kill, `sweep` finds what has no manifest any more.
        self.manifests.remove(id.0)?;
        self.flush()?;
        self.remove_all_of(&id.0)
    }

    /// Removes tokens and columns of all scans but these.
    pub fn keep_only(&self, is_kept: impl Fn(&ScanId) -> bool) -> Result<(), StoreError> {
        for key in self.manifests.iter().keys() {
            let id = <[u8; 32]>::try_from(key?.as_ref()).map(ScanId);
            if let Some(id) = id.ok().filter(|id| !is_kept(id)) {
                self.remove(&id)?;
            }
        }
        Ok(())
    }

    /// Bytes of the tokens and columns of the members of these windows. Each member has a column to
    /// each other member.
    pub fn live_bytes<'w>(
        &self,
        windows: impl IntoIterator<Item = &'w [ScanId]>,
    ) -> Result<u64, StoreError> {
        let mut n_bytes = 0;
        for window in windows {
            for id in window {
                let Ok(Some(manifest)) = self.manifest(id) else { continue };
                n_bytes += manifest.n_bytes() + manifest.column_bytes() * (window.len() as u64 - 1);
            }
        }
        Ok(n_bytes)
    }

    /// Makes everything durable that was written before.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.db.flush()?;
        Ok(())
    }

    /// Size of the store on disk, bytes.
    pub fn size_on_disk(&self) -> Result<u64, StoreError> {
        Ok(self.db.size_on_disk()?)
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
                // A process that was just killed may not have released the lock yet.
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
        Some(value) => match format_of(&value) {
            FORMAT | OLD_FORMAT => Ok(()),
            found => Err(StoreError::Format { found }),
        },
    }
}

fn format_of(value: &[u8]) -> u32 {
    <[u8; 4]>::try_from(value).map_or(u32::MAX, u32::from_be_bytes)
}
