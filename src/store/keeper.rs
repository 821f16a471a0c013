//! The open database behind all clones of the store, and the copy that takes its place.
//!
//! sled gives little space back, so that a store that has grown is copied into a new one. The copy
//! goes on in steps while the store is in use. What is written meanwhile goes to both if the copy
//! has passed its key. A copy that a kill interrupts is thrown away and starts again, because
//! comparing the two takes as long.

use std::{
    fs::File,
    io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    error::StoreError,
    kv::{Entries, KeyValue, KvError, Name},
    place::Place,
    sled::Sled,
};
use crate::files::{remove_all_if_there, steps};

/// The bytes of a value.
pub(super) type Value = <Sled as KeyValue>::Value;

/// Entries that are copied while writers wait.
const TOGETHER: usize = 256;

/// How long a step copies. Making that durable takes about as long again.
const STEP: Duration = Duration::from_millis(100);

/// Number of tries to open a complete copy again, and the pause between them.
const REOPEN_TRIES: u32 = 100;
const REOPEN_PAUSE: Duration = Duration::from_millis(20);

/// Memory for pages of a copy, bytes. Nobody reads it yet.
const COPY_CACHE: u64 = 8 << 20;

/// The open database.
pub(super) struct Keeper {
    place: Place,
    /// Memory for pages, bytes.
    cache: u64,
    current: RwLock<Arc<Sled>>,
    /// Writers hold this, so that a copy gets what they write.
    copying: Mutex<Option<Copying>>,
    n_changes: AtomicU64,
}

/// A copy that is being made.
struct Copying {
    next: Sled,
    /// Number of the table that is being copied.
    table: usize,
    /// The smallest key of this table that is not copied.
    from: Vec<u8>,
}

impl Copying {
    fn has_passed(&self, table: Name, key: &[u8]) -> bool {
        let table = table as usize;
        table < self.table || (table == self.table && key < &self.from[..])
    }

    /// Copies a few entries. Returns whether the copy is complete.
    fn go_on(&mut self, current: &Sled) -> Result<bool, Fault> {
        let Some(&table) = Name::ALL.get(self.table) else { return Ok(true) };
        let entries = current.entries_from(table, &self.from, TOGETHER);
        let entries = entries.map_err(Fault::Current)?;
        self.next.load(table, &entries).map_err(Fault::Copy)?;
        match entries.last() {
            Some((key, _)) => self.from = [&key[..], &[0]].concat(),
            None => (self.table, self.from) = (self.table + 1, Vec::new()),
        }
        Ok(false)
    }
}

/// Which database failed while it was copied.
enum Fault {
    Current(KvError),
    Copy(KvError),
}

/// What a step of a copy came to.
#[derive(Debug)]
pub(super) enum Progress {
    /// More is left to copy.
    Goes,
    /// The copy has taken the store's place.
    Done,
    /// The copy cannot be written. The store is as it was.
    Failed(KvError),
}

impl Keeper {
    pub(super) fn open(place: &Place, cache: u64) -> Result<Self, KvError> {
        let current = RwLock::new(Arc::new(Sled::open(&place.folder, cache)?));
        let (copying, n_changes) = (Mutex::new(None), AtomicU64::new(0));
        Ok(Self { place: place.clone(), cache, current, copying, n_changes })
    }

    pub(super) fn get(&self, table: Name, key: &[u8]) -> Result<Option<Value>, StoreError> {
        let current = self.current.read().expect(NO_PANIC);
        self.noted(current.get(table, key))
    }

    pub(super) fn entries_from(
        &self,
        table: Name,
        from: &[u8],
        at_most: usize,
    ) -> Result<Entries<Value>, StoreError> {
        let current = self.current.read().expect(NO_PANIC);
        self.noted(current.entries_from(table, from, at_most))
    }

    pub(super) fn insert(&self, table: Name, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let has_passed = |copying: &Copying| copying.has_passed(table, key);
        self.change(
            |kv| kv.insert(table, key, value),
            |copying| match has_passed(copying) {
                true => copying.next.insert(table, key, value),
                false => Ok(()),
            },
        )
    }

    pub(super) fn load(
        &self,
        table: Name,
        entries: &[(Vec<u8>, Vec<u8>)],
    ) -> Result<(), StoreError> {
        self.change(
            |kv| kv.load(table, entries),
            |copying| {
                let mut passed = entries.to_vec();
                passed.retain(|(key, _)| copying.has_passed(table, key));
                copying.next.load(table, &passed)
            },
        )
    }

    pub(super) fn remove(&self, table: Name, key: &[u8]) -> Result<(), StoreError> {
        let has_passed = |copying: &Copying| copying.has_passed(table, key);
        self.change(
            |kv| kv.remove(table, key),
            |copying| match has_passed(copying) {
                true => copying.next.remove(table, key),
                false => Ok(()),
            },
        )
    }

    /// Makes a change to the store, and to the copy that is being made.
    fn change(
        &self,
        current: impl FnOnce(&Sled) -> Result<(), KvError>,
        copy: impl FnOnce(&Copying) -> Result<(), KvError>,
    ) -> Result<(), StoreError> {
        let mut copying = self.copying.lock().expect(NO_PANIC);
        self.n_changes.fetch_add(1, Ordering::Relaxed);
        self.noted(current(&self.current()))?;
        if copying.as_ref().is_some_and(|copying| copy(copying).is_err()) {
            // The store itself is whole. The next step starts again.
            *copying = None;
        }
        Ok(())
    }

    pub(super) fn flush(&self) -> Result<(), StoreError> {
        self.noted(self.current().flush())
    }

    pub(super) fn size_on_disk(&self) -> Result<u64, StoreError> {
        self.noted(self.current().size_on_disk())
    }

    /// Number of changes since the store was opened.
    pub(super) fn n_changes(&self) -> u64 {
        self.n_changes.load(Ordering::Relaxed)
    }

    /// Whether a copy is being made.
    pub(super) fn is_copying(&self) -> bool {
        self.copying.lock().expect(NO_PANIC).is_some()
    }

    fn current(&self) -> Arc<Sled> {
        Arc::clone(&self.current.read().expect(NO_PANIC))
    }

    /// Goes on with the copy for about 0.2 s, or begins one. The last step takes about a second for
    /// a GB more, because it opens the copy.
    pub(super) fn copy_step(&self) -> Result<Progress, StoreError> {
        self.copy_for(STEP)
    }

    /// As [`Keeper::copy_step`], for this time or a few entries.
    pub(super) fn copy_for(&self, time: Duration) -> Result<Progress, StoreError> {
        let started = Instant::now();
        loop {
            let mut copying = self.copying.lock().expect(NO_PANIC);
            let done = self.begun(&mut copying).and_then(|copy| copy.go_on(&self.current()));
            match done {
                Ok(false) if started.elapsed() < time => {}
                Ok(false) => {
                    let next = copying.as_ref().map(|copy| copy.next.flush());
                    return Ok(self.progress(copying, next.unwrap_or(Ok(()))));
                }
                Ok(true) => return self.swap(copying),
                Err(Fault::Copy(error)) => return Ok(self.progress(copying, Err(error))),
                Err(Fault::Current(error)) => return self.noted(Err(error)),
            }
        }
    }

    fn begun<'c>(&self, copying: &'c mut Option<Copying>) -> Result<&'c mut Copying, Fault> {
        if copying.is_none() {
            let next = self.empty_copy().map_err(Fault::Copy)?;
            *copying = Some(Copying { next, table: 0, from: Vec::new() });
        }
        Ok(copying.as_mut().expect("one was just begun"))
    }

    fn empty_copy(&self) -> Result<Sled, KvError> {
        let folder = self.place.next();
        remove_all_if_there(&folder).map_err(KvError::Io)?;
        steps::make_private_folder(&folder).map_err(KvError::Io)?;
        Sled::open(&folder, COPY_CACHE)
    }

    /// Throws a copy away that failed.
    fn progress(
        &self,
        mut copying: MutexGuard<'_, Option<Copying>>,
        done: Result<(), KvError>,
    ) -> Progress {
        let Err(error) = done else { return Progress::Goes };
        *copying = None;
        remove_all_if_there(&self.place.next()).ok();
        Progress::Failed(error)
    }

    /// Lets the complete copy take the store's place. Writers wait meanwhile.
    fn swap(&self, mut copying: MutexGuard<'_, Option<Copying>>) -> Result<Progress, StoreError> {
        let next = self.reopened(&mut copying);
        let next = match next {
            Ok(next) => next,
            Err(error) => return Ok(self.progress(copying, Err(error))),
        };

        let (folder, old) = (&self.place.folder, &self.place.old());
        let failed = |source| StoreError::Folder { path: folder.clone(), source };
        let mut current = self.current.write().expect(NO_PANIC);
        remove_all_if_there(old).map_err(failed)?;
        steps::rename(folder, old).map_err(failed)?;
        if let Err(source) = steps::rename(&self.place.next(), folder) {
            steps::rename(old, folder).map_err(failed)?;
            return Err(failed(source));
        }
        let replaced = std::mem::replace(&mut *current, Arc::new(next));
        drop(current);
        drop(copying);
        steps::sync_folder(self.place.parent()).map_err(failed)?;

        drop(replaced);
        // If this fails, the next start removes it.
        remove_all_if_there(old).ok();
        Ok(Progress::Done)
    }

    /// The complete copy, durable, and opened again with the memory of the store.
    fn reopened(&self, copying: &mut Option<Copying>) -> Result<Sled, KvError> {
        if let Some(Copying { next, .. }) = copying.take() {
            next.flush()?;
        }
        let folder = self.place.next();
        sync_all(&folder).map_err(KvError::Io)?;
        let mut n_tries = 1;
        loop {
            match Sled::open(&folder, self.cache) {
                // sled's threads may need a moment to close the file.
                Err(KvError::InUse(_)) if n_tries < REOPEN_TRIES => thread::sleep(REOPEN_PAUSE),
                opened => return opened,
            }
            n_tries += 1;
        }
    }

    /// Leaves a mark beside a store that turns out to be damaged, so that the next start moves it
    /// aside: the same damage would end every later run.
    fn noted<T>(&self, done: Result<T, KvError>) -> Result<T, StoreError> {
        if let Err(KvError::Damaged(_)) = &done {
            // If even that cannot be written, the next start meets the same damage.
            steps::create(&self.place.damaged()).ok();
        }
        Ok(done?)
    }
}

const NO_PANIC: &str = "no holder of the lock can panic";

/// Makes the files of a folder durable. sled's own flush leaves the size of a file to the kernel.
fn sync_all(folder: &Path) -> io::Result<()> {
    for entry in folder.read_dir()? {
        let path = entry?.path();
        if path.is_file() {
            steps::sync(&File::open(&path)?, &path)?;
        }
    }
    steps::sync_folder(folder)
}
