//! Opens the store whatever has happened to its files, and says what that took.
//!
//! The store is a cache, so that an empty store is better than a daemon that does not start. Damage
//! is met in steps. First what is half-written or has a wrong checksum goes, such as the snapshot,
//! which sled can do without. If sled still refuses, its log is damaged, and the store goes.
//!
//! sled would also open a damaged log without its snapshot. But it then stops reading at the
//! damage, and shows entries of long ago (measured: 3 of 300 stores).
//!
//! sled can also hang or die over damage. So each attempt is counted in a file beside the store.
//! The file goes once the store is open. After [`MAX_TRIES`] attempts that never ended, the store
//! itself is taken for the cause. A store that fails later leaves a mark, and is moved aside at the
//! next start.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::Path,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{db::Store, error::StoreError, place::Place};
use crate::{
    domain::{repair::Repair, time::utc},
    files::{remove_all_if_there, steps},
};

/// Attempts to open a store that did not end, after which it is moved aside: one more than a kill
/// and a power cut.
const MAX_TRIES: u32 = 3;

/// Number of tries to get the lock, and the pause between them. A killed process may hold the lock
/// a moment longer.
const LOCK_TRIES: u32 = 30;
const LOCK_PAUSE: Duration = Duration::from_millis(200);

/// A store that is open, and what that took.
pub struct Opened {
    /// The store.
    pub store: Store,
    /// What was repaired, in order. Empty for a store without damage.
    pub repairs: Vec<Repair>,
}

impl Store {
    /// Opens the store in `folder`, and removes what a kill left half-written. A missing folder is
    /// made with mode 0700. Damage is repaired: [`Opened`] says how.
    ///
    /// `memory_bytes` is about the memory that the store may use, whatever its size on disk. A
    /// value below [`super::MIN_MEMORY`] counts as that. The larger chunks of older versions take
    /// memory beyond it.
    ///
    /// # Errors
    /// If another process has the store open, another version wrote it, or the system refuses to
    /// read or write.
    pub fn open(folder: &Path, memory_bytes: u64) -> Result<Opened, StoreError> {
        let place = Place::new(folder);
        steps::make_private_folder(place.parent()).map_err(|source| place.failed(source))?;
        place.lock()?;
        place.tidy().map_err(|source| place.failed(source))?;

        let mut repairs = Vec::new();
        let n_tries = place.n_tries();
        place.set_tries(n_tries + 1);
        let opened = place.open(memory_bytes, n_tries, &mut repairs);
        match &opened {
            // The disk may be failing. If it still is at the third start, so is the store.
            Err(error) if error.is_bad_read() => {}
            Err(_) => place.set_tries(n_tries),
            Ok(_) => place.set_tries(0),
        }
        Ok(Opened { store: opened?, repairs })
    }
}

impl Place {
    fn open(
        &self,
        memory_bytes: u64,
        n_tries: u32,
        repairs: &mut Vec<Repair>,
    ) -> Result<Store, StoreError> {
        let failed = |source| self.failed(source);
        steps::make_private_folder(&self.folder).map_err(failed)?;
        if self.damaged().exists() || n_tries >= MAX_TRIES {
            self.move_aside(repairs).map_err(failed)?;
        }
        self.remove_half_written(repairs).map_err(failed)?;

        match Store::open_as_it_is(self, memory_bytes) {
            Err(error) if error.is_damage() => {
                self.move_aside(repairs).map_err(failed)?;
                Store::open_as_it_is(self, memory_bytes)
            }
            opened => opened,
        }
    }

    fn failed(&self, source: io::Error) -> StoreError {
        StoreError::Folder { path: self.folder.clone(), source }
    }

    /// Makes sure that no other process works with the store or a copy of it.
    fn lock(&self) -> Result<(), StoreError> {
        let folders = [self.folder.clone(), self.next(), self.old()];
        let files = folders.iter().flat_map(|folder| [folder.clone(), folder.join("db")]);
        for file in files.filter_map(|path| File::open(path).ok()) {
            let mut n_tries = 1;
            // Other errors: a file system without locks.
            while let Err(TryLockError::WouldBlock) = file.try_lock() {
                if n_tries == LOCK_TRIES {
                    let source = io::ErrorKind::WouldBlock.into();
                    return Err(StoreError::InUse { folder: self.folder.clone(), source });
                }
                n_tries += 1;
                thread::sleep(LOCK_PAUSE);
            }
        }
        Ok(())
    }

    /// Finishes or undoes what a kill interrupted while a copy took the store's place.
    fn tidy(&self) -> io::Result<()> {
        if !self.folder.exists() && self.old().exists() {
            // Nothing was written since. The copy may be whole or not.
            steps::rename(&self.old(), &self.folder)?;
        }
        for left in [self.next(), self.old()] {
            remove_all_if_there(&left)?;
        }
        Ok(())
    }

    fn n_tries(&self) -> u32 {
        let text = fs::read_to_string(self.tries()).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// The number only helps against damage: a disk that cannot take it must not stop the start.
    fn set_tries(&self, n_tries: u32) {
        let path = self.tries();
        if n_tries == 0 {
            steps::remove(&path).ok();
        } else if let Ok(mut file) = steps::create(&path) {
            steps::write(&mut file, &path, n_tries.to_string().as_bytes()).ok();
        }
    }

    /// Removes or moves away what sled would trip over.
    fn remove_half_written(&self, repairs: &mut Vec<Repair>) -> io::Result<()> {
        for name in self.names()? {
            if name.starts_with("snap.") && name.ends_with(".generating") {
                steps::remove(&self.folder.join(&name))?;
                repairs.push(Repair::SnapshotRemoved);
            } else if name.starts_with("snap.") && !is_snapshot(&self.read(&name)?) {
                self.set_aside(&name)?;
                repairs.push(Repair::SnapshotAside);
            } else if name == "conf" && !is_conf(&self.read(&name)?) {
                self.set_aside(&name)?;
                repairs.push(Repair::ConfAside);
            }
        }
        Ok(())
    }

    /// The content of a file of the store; empty if it is no file.
    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let path = self.folder.join(name);
        if path.is_file() { fs::read(path) } else { Ok(Vec::new()) }
    }

    /// Gives a file of the store a name that sled does not know. An older one is replaced.
    fn set_aside(&self, name: &str) -> io::Result<()> {
        let to = self.folder.join(format!("aside.{name}"));
        remove_all_if_there(&to)?;
        steps::rename(&self.folder.join(name), &to)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            names.extend(entry?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }

    /// Moves the store to `lost+found` beside it, and makes an empty folder in its place. Only the
    /// newest such store is kept.
    fn move_aside(&self, repairs: &mut Vec<Repair>) -> io::Result<()> {
        let found = self.parent().join("lost+found");
        steps::make_private_folder(&found)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let to = found.join(format!("store-{}", utc(now)));
        remove_all_if_there(&to)?;
        steps::rename(&self.folder, &to)?;
        steps::sync_folder(&found)?;
        steps::sync_folder(self.parent())?;
        steps::make_private_folder(&self.folder)?;
        remove_all_if_there(&self.damaged())?;
        repairs.push(Repair::StoreAside);

        for entry in fs::read_dir(&found)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("store-") && path != to {
                remove_all_if_there(&path)?;
            }
        }
        Ok(())
    }
}

/// A snapshot is its content, a length of eight bytes, and the checksum of the content.
fn is_snapshot(bytes: &[u8]) -> bool {
    bytes.split_last_chunk::<12>().is_some_and(|(content, [.., a, b, c, d])| {
        !content.is_empty() && crc32fast::hash(content) == u32::from_le_bytes([*a, *b, *c, *d])
    })
}

/// sled's settings: lines of text, then their checksum. sled only warns of a wrong one.
fn is_conf(bytes: &[u8]) -> bool {
    bytes.split_last_chunk().is_some_and(|(text, sum)| {
        bytes.len() > 8 && crc32fast::hash(text) == u32::from_le_bytes(*sum)
    })
}
