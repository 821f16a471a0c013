//! The database in use: sled 0.34.

use std::{
    fs::File,
    io,
    mem::ManuallyDrop,
    ops::Deref,
    os::fd::AsRawFd,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use sled::{IVec, Tree};

use super::kv::{Entries, KeyValue, KvError, Name};

/// sled's tables. Its default table has no name and holds the facts.
const NAMES: [Option<&str>; Name::ALL.len()] = [
    None,
    Some("copies"),
    Some("manifests"),
    Some("chunks"),
    Some("columns"),
    Some("journal"),
    Some("seen"),
];

/// An open database.
pub struct Sled {
    db: ManuallyDrop<sled::Db>,
    trees: ManuallyDrop<Vec<Tree>>,
    /// Whether sled has met damage. It can then wait for ever when it closes.
    is_broken: AtomicBool,
    /// sled finds its files through this handle, so that the folder may be renamed.
    _folder: File,
}

impl Sled {
    /// Opens the database in a folder, which must be there.
    ///
    /// `cache` is about the memory for pages, bytes.
    pub fn open(folder: &Path, cache: u64) -> Result<Self, KvError> {
        let handle = File::open(folder).map_err(KvError::Io)?;
        let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
        guarded(|| {
            // A flusher that panics over damage would let sled wait for ever when it closes. The
            // store flushes what must be durable itself.
            let settings = sled::Config::new().flush_every_ms(None);
            let db = settings.path(path).cache_capacity(cache).open()?;
            let open = |name: &Option<&str>| match name {
                None => Ok(Tree::clone(&db)),
                Some(name) => db.open_tree(name),
            };
            let trees = NAMES.iter().map(open).collect::<Result<Vec<_>, _>>()?;
            let (db, trees) = (ManuallyDrop::new(db), ManuallyDrop::new(trees));
            Ok(Self { db, trees, is_broken: AtomicBool::new(false), _folder: handle })
        })
    }

    fn tree(&self, table: Name) -> &Tree {
        &self.trees[table as usize]
    }

    fn guarded<T>(&self, call: impl FnOnce() -> sled::Result<T>) -> Result<T, KvError> {
        let done = guarded(call);
        if let Err(KvError::Damaged(_)) = &done {
            self.is_broken.store(true, Ordering::Relaxed);
        }
        done
    }
}

impl Drop for Sled {
    fn drop(&mut self) {
        if self.is_broken.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: both are dropped once, here, and not used afterwards.
        unsafe {
            ManuallyDrop::drop(&mut self.trees);
            ManuallyDrop::drop(&mut self.db);
        }
    }
}

impl KeyValue for Sled {
    type Value = IVec;

    fn get(&self, table: Name, key: &[u8]) -> Result<Option<IVec>, KvError> {
        self.guarded(|| self.tree(table).get(key))
    }

    fn entries_from(
        &self,
        table: Name,
        from: &[u8],
        at_most: usize,
    ) -> Result<Entries<IVec>, KvError> {
        let plain =
            |entry: sled::Result<(IVec, IVec)>| entry.map(|(key, value)| (key.to_vec(), value));
        self.guarded(|| self.tree(table).range(from..).take(at_most).map(plain).collect())
    }

    fn insert(&self, table: Name, key: &[u8], value: &[u8]) -> Result<(), KvError> {
        self.guarded(|| self.tree(table).insert(key, value).map(drop))
    }

    fn load<V: Deref<Target = [u8]>>(
        &self,
        table: Name,
        entries: &[(Vec<u8>, V)],
    ) -> Result<(), KvError> {
        let tree = self.tree(table);
        self.guarded(|| {
            // sled splits a page at 17 entries, and then writes all its values again. With empty
            // values that costs nothing. Afterwards a page gets its 8 or 9 values, each of which
            // is written once: from 10 on, sled would write the page anew.
            for (key, _) in entries {
                tree.insert(key, &[])?;
            }
            entries.iter().try_for_each(|(key, value)| tree.insert(key, &value[..]).map(drop))
        })
    }

    fn remove(&self, table: Name, key: &[u8]) -> Result<(), KvError> {
        self.guarded(|| self.tree(table).remove(key).map(drop))
    }

    fn flush(&self) -> Result<(), KvError> {
        self.guarded(|| self.db.flush().map(drop))
    }

    fn size_on_disk(&self) -> Result<u64, KvError> {
        self.guarded(|| self.db.size_on_disk())
    }
}

/// Calls sled. It panics over some damage, such as a page that is lost.
fn guarded<T>(call: impl FnOnce() -> sled::Result<T>) -> Result<T, KvError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(done) => done.map_err(classed),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            Err(KvError::Damaged(text.unwrap_or_else(|| "sled panicked".to_owned()).into()))
        }
    }
}

fn classed(error: sled::Error) -> KvError {
    match error {
        // sled names the lock only in the text.
        sled::Error::Io(source) if source.to_string().contains("could not acquire lock") => {
            KvError::InUse(source)
        }
        // A file that is cut, missing or of another kind.
        sled::Error::Io(source) if is_damage(source.kind()) => KvError::Damaged(source.into()),
        sled::Error::Io(source) => KvError::Io(source),
        sled::Error::Unsupported(_) => KvError::Version(error.into()),
        error => KvError::Damaged(error.into()),
    }
}

fn is_damage(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::*;
    matches!(kind, UnexpectedEof | InvalidData | NotFound | IsADirectory | NotADirectory)
}
