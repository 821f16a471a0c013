//! The database itself: opens it, and removes what a kill left half-written.

use std::{fs, os::unix::fs::DirBuilderExt, path::Path, thread, time::Duration};

use sled::{Tree, transaction::TransactionError};

use super::{
    blob::{CHUNK, first_ids, remove_prefix},
    error::{FORMAT, StoreError},
    key::{Way, pair_key},
};

/// Memory that sled may use beyond the capacity of its cache, bytes. Each of its 256 shards checks
/// its use only after 64 accesses, and each access may have loaded a value.
const BEYOND_CACHE: u64 = 256 * 64 * CHUNK as u64;

/// The least memory that a store needs, bytes.
pub const MIN_MEMORY: u64 = BEYOND_CACHE + (12 << 20);

/// Number of tries to get the lock, and the pause between them. A killed process may hold the lock
/// a moment longer.
const LOCK_TRIES: u32 = 30;
const LOCK_PAUSE: Duration = Duration::from_millis(200);

/// The token store and journal. Clones share the same store.
#[derive(Clone)]
pub struct Store {
    pub(super) db: sled::Db,
    pub(super) journal: Tree,
    pub(super) manifests: Tree,
    pub(super) chunks: Tree,
    pub(super) columns: Tree,
    pub(super) seen: Tree,
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
        Some(value) => {
            let bytes = <[u8; 4]>::try_from(value.as_ref());
            let found = bytes.map_or(u32::MAX, u32::from_be_bytes);
            if found == FORMAT { Ok(()) } else { Err(StoreError::Format { found }) }
        }
    }
}

pub(super) fn storage(error: TransactionError<()>) -> StoreError {
    match error {
        TransactionError::Storage(error) => error.into(),
        TransactionError::Abort(()) => unreachable!("the transactions here never abort"),
    }
}
