//! The store: its tables, and what a kill left half-written.

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use super::{
    blob::{CHUNK, first_ids, remove_prefix},
    error::{FORMAT, OLD_FORMAT, StoreError},
    keeper::Keeper,
    key::{Way, pair_key},
    kv::Name,
    place::Place,
    table::Table,
};
use crate::domain::scan::ScanId;

/// Memory that sled may use beyond the capacity of its cache, bytes. Each of its 256 shards checks
/// its use only after 64 accesses, and each access may have loaded a value.
const BEYOND_CACHE: u64 = 256 * 64 * CHUNK as u64;

/// The least memory that a store needs, bytes.
pub const MIN_MEMORY: u64 = BEYOND_CACHE + (12 << 20);

/// What earlier steps found about the size of the store.
#[derive(Default)]
pub(super) struct Size {
    /// Number of changes of the store when it was found to be small enough.
    pub(super) small_at: Option<u64>,
    /// When a copy into a smaller store failed.
    pub(super) failed_at: Option<Instant>,
}

/// The store of tokens and columns. Clones share the same store.
#[derive(Clone)]
pub struct Store {
    pub(super) keeper: Arc<Keeper>,
    pub(super) size: Arc<Mutex<Size>>,
    pub(super) facts: Table,
    pub(super) copies: Table,
    pub(super) manifests: Table,
    pub(super) chunks: Table,
    pub(super) columns: Table,
    pub(super) old_journal: Table,
    pub(super) old_seen: Table,
}

impl Store {
    /// Opens the store as its files are, and removes what a kill left half-written.
    pub(super) fn open_as_it_is(place: &Place, memory_bytes: u64) -> Result<Self, StoreError> {
        let cache = memory_bytes.max(MIN_MEMORY) - BEYOND_CACHE;
        let keeper = Arc::new(Keeper::open(place, cache)?);
        let table = |name| Table::new(name, &keeper);
        let store = Self {
            facts: table(Name::Facts),
            copies: table(Name::Copies),
            manifests: table(Name::Manifests),
            chunks: table(Name::Chunks),
            columns: table(Name::Columns),
            old_journal: table(Name::Journal),
            old_seen: table(Name::Seen),
            size: Arc::default(),
            keeper,
        };

        store.check_format()?;
        store.sweep()?;
        Ok(store)
    }

    fn check_format(&self) -> Result<(), StoreError> {
        let Some(value) = self.facts.get("format")? else {
            self.facts.insert("format", FORMAT.to_be_bytes())?;
            return self.flush();
        };
        match format_of(&value) {
            FORMAT | OLD_FORMAT => Ok(()),
            found => Err(StoreError::Format { found }),
        }
    }

    /// Whether the store has the format before the current one.
    pub(super) fn is_old(&self) -> Result<bool, StoreError> {
        let format = self.facts.get("format")?;
        Ok(format.is_some_and(|value| format_of(&value) == OLD_FORMAT))
    }

    /// Notes that the store has the current format, durably.
    pub(super) fn note_format(&self) -> Result<(), StoreError> {
        self.facts.insert("format", FORMAT.to_be_bytes())?;
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
        for entry in self.manifests.iter() {
            let id = <[u8; 32]>::try_from(&entry?.0[..]).map(ScanId);
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
        for entry in self.manifests.iter() {
            let (other, _) = entry?;
            for way in [Way::There, Way::Back] {
                remove_prefix(&self.columns, &pair_key(&other, way, id))?;
            }
        }
        remove_prefix(&self.columns, id)?;
        remove_prefix(&self.chunks, id)
    }

    /// Makes everything durable that was written before.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.keeper.flush()
    }

    /// Size of the store on disk, bytes.
    pub fn size_on_disk(&self) -> Result<u64, StoreError> {
        self.keeper.size_on_disk()
    }
}

fn format_of(value: &[u8]) -> u32 {
    <[u8; 4]>::try_from(value).map_or(u32::MAX, u32::from_be_bytes)
}
