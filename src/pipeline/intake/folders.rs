//! Whether the daemon can use its folders: whether the incoming folder is still that of the start,
//! and whether the others take files.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::Access;

use crate::{domain::not_ready::NotReady, files, pipeline::board::Board};

/// A folder that takes files is tried again after this time. Each try writes to the disk.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// With less space a folder is full: a map alone can need more.
const FULL_BYTES: u64 = 1 << 20;

/// Where a folder lies.
struct Place {
    device: u64,
    /// The outermost folder of its file system: where it is mounted.
    mount: PathBuf,
}

impl Place {
    fn of(folder: &Path) -> io::Result<Self> {
        let folder = fs::canonicalize(folder)?;
        let device = fs::metadata(&folder)?.dev();
        let is_on_it = |above: &&Path| fs::metadata(above).is_ok_and(|data| data.dev() == device);
        let mount = folder.ancestors().take_while(is_on_it).last().unwrap_or(&folder).to_owned();
        Ok(Self { device, mount })
    }
}

/// Where the incoming folder lay when its files were seen.
#[derive(Default)]
pub(super) struct IncomingPlace {
    first: Option<Place>,
    had_files: bool,
}

impl IncomingPlace {
    /// Whether the folder now lies on another file system than before: its share was unmounted, or
    /// another one covers it. Its files are then out of sight, and not gone.
    ///
    /// Two changes are usual. A share that is mounted again can have another device number, at the
    /// same mount point. A share can also be mounted after the start, over a folder without files.
    pub(super) fn is_replaced(&mut self, incoming: &Path) -> bool {
        let Ok(now) = Place::of(incoming) else { return false };
        if let Some(first) = &self.first {
            let is_same = now.device == first.device || now.mount == first.mount;
            let came_late = !self.had_files && now.mount.starts_with(&first.mount);
            if !is_same && !came_late {
                return true;
            }
        }

        self.first = Some(now);
        self.had_files |= fs::read_dir(incoming).is_ok_and(|mut entries| entries.next().is_some());
        false
    }
}

/// A folder that oddscan writes to.
pub(super) struct Target {
    full: NotReady,
    unwritable: NotReady,
    /// When a file was last written for a try, and why that failed.
    tried: Option<(Instant, Option<io::ErrorKind>)>,
}

impl Target {
    pub(super) fn new(full: NotReady, unwritable: NotReady) -> Self {
        Self { full, unwritable, tried: None }
    }

    /// Whether the folder takes files. The board shows why not. `is_full_listing` allows another
    /// try of a folder that refused files before.
    pub(super) fn takes_files(
        &mut self,
        folder: &Path,
        is_full_listing: bool,
        board: &Board,
    ) -> bool {
        let failure = match look_at(folder) {
            Ok(()) => self.try_if_due(folder, is_full_listing),
            Err(error) => Some(error.kind()),
        };
        let is_full = |kind: &io::ErrorKind| {
            matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        };
        board.set_failure(self.full, failure.filter(is_full));
        board.set_failure(self.unwritable, failure.filter(|kind| !is_full(kind)));
        failure.is_none()
    }

    /// Has the folder tried again, because something could not be written there.
    pub(super) fn suspect(&mut self) {
        self.tried = None;
    }

    fn try_if_due(&mut self, folder: &Path, is_full_listing: bool) -> Option<io::ErrorKind> {
        match self.tried {
            Some((when, None)) if when.elapsed() < TRY_AGAIN => return None,
            Some((_, Some(failure))) if !is_full_listing => return Some(failure),
            _ => {}
        }
        let failure = files::try_to_write(folder).err().map(|error| error.kind());
        self.tried = Some((Instant::now(), failure));
        failure
    }
}

/// Looks at a folder without writing to it.
fn look_at(folder: &Path) -> io::Result<()> {
    // A file in the place of the folder has no such entry.
    let folder = folder.join(".");
    rustix::fs::access(&folder, Access::WRITE_OK | Access::EXEC_OK)?;

    let space = rustix::fs::statvfs(&folder)?;
    // Some file systems do not know their size and say 0.
    let is_full = space.f_blocks > 0 && space.f_bavail * space.f_frsize < FULL_BYTES;
    if is_full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_takes_files_has_no_fault_and_keeps_no_file_of_the_try() {
        let folder = tempfile::tempdir().unwrap();
        let board = Board::new();
        let mut target = Target::new(NotReady::ResultsFull, NotReady::ResultsUnwritable);
        assert!(target.takes_files(folder.path(), true, &board));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_in_the_place_of_a_folder_is_seen_at_once_and_its_end_too() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("results");
        let board = Board::new();
        let mut target = Target::new(NotReady::ResultsFull, NotReady::ResultsUnwritable);
        fs::create_dir(&folder).unwrap();
        assert!(target.takes_files(&folder, true, &board));

        fs::remove_dir(&folder).unwrap();
        fs::write(&folder, "x").unwrap();
        assert!(!target.takes_files(&folder, false, &board));
        assert!(board.status().has(NotReady::ResultsUnwritable));

        fs::remove_file(&folder).unwrap();
        fs::create_dir(&folder).unwrap();
        assert!(target.takes_files(&folder, false, &board));
        assert!(!board.status().has(NotReady::ResultsUnwritable));
    }

    #[test]
    fn a_folder_that_refused_a_file_is_tried_again_at_the_next_full_listing() {
        let folder = tempfile::tempdir().unwrap();
        let board = Board::new();
        let mut target = Target::new(NotReady::StateFull, NotReady::StateUnwritable);
        for (code, reason) in [
            (libc::ENOSPC, NotReady::StateFull),
            (libc::EDQUOT, NotReady::StateFull),
            (libc::EROFS, NotReady::StateUnwritable),
            (libc::EACCES, NotReady::StateUnwritable),
            (libc::EIO, NotReady::StateUnwritable),
        ] {
            let failure = io::Error::from_raw_os_error(code).kind();
            target.tried = Some((Instant::now(), Some(failure)));
            assert!(!target.takes_files(folder.path(), false, &board));
            assert!(board.status().has(reason), "{failure}");
            assert!(target.takes_files(folder.path(), true, &board));
            assert!(!board.status().has(reason), "{failure}");
        }
    }

    fn at(device: u64, mount: &Path) -> Place {
        Place { device, mount: mount.to_owned() }
    }

    #[test]
    fn an_incoming_folder_with_files_is_replaced_by_another_file_system() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("scan"), "x").unwrap();
        let mut place = IncomingPlace::default();
        assert!(!place.is_replaced(folder.path()));
        // `/proc` is always a file system of its own.
        assert!(place.is_replaced(Path::new("/proc")));
        assert!(!place.is_replaced(&folder.path().join("absent")), "it cannot be read");
        assert!(!place.is_replaced(folder.path()), "back again");
    }

    #[test]
    fn a_share_that_is_unmounted_is_missed_and_one_that_comes_late_or_again_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let now = Place::of(folder.path()).unwrap();
        let is_replaced = |device: u64, mount: &Path, had_files: bool| {
            let first = Some(at(device, mount));
            IncomingPlace { first, had_files }.is_replaced(folder.path())
        };
        let other = now.device + 1;
        assert!(is_replaced(other, folder.path(), true), "unmounted");
        assert!(is_replaced(other, folder.path(), false), "unmounted before its first file");
        assert!(!is_replaced(other, &now.mount, true), "mounted again, with another number");

        let mut place = IncomingPlace { first: Some(at(0, Path::new("/"))), had_files: false };
        assert!(!place.is_replaced(Path::new("/proc")), "the share came late");
        assert!(place.is_replaced(folder.path()), "and was unmounted");
        let mut place = IncomingPlace { first: Some(at(0, Path::new("/"))), had_files: true };
        assert!(place.is_replaced(Path::new("/proc")), "covered");
    }
}
