//! Keeps copies of the sources of all members. So results can be written again after the incoming
//! folder was cleaned up, and the store can be built again.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tempfile::TempPath;

use crate::{
    domain::{
        error::ScanError,
        scan::{ScanId, SourceFacts},
    },
    files::{self, CopyError, copy_durably, steps},
};

const SCAN: &str = "scan";
const MASK: &str = "brain";
/// Comes before the ending of a source whose record may not be written yet.
const ARRIVING: &str = "arriving";
/// Names of copies without an id begin with this.
const DRAFT: &str = "draft-";

/// A folder of `<scan id>.scan` and, if a mask arrived with the scan or was made, `<scan
/// id>.brain`. If the site's preprocessing changed the scan, the changed one is kept: new results
/// must show what was compared.
///
/// A source arrives in three steps: the files get the id ([`Archive::offer`]), the ledger gets the
/// record, the files get their last name ([`Archive::accept`]). After a kill, the record says
/// whether the source counts.
#[derive(Debug)]
pub struct Archive {
    folder: PathBuf,
    changing: Mutex<()>,
}

/// A source that was copied in and has no id yet. Dropping it removes its files.
pub struct Draft {
    /// Copy of the scan.
    pub scan: TempPath,
    /// Copy of its mask, if it came with one or one was made.
    pub mask: Option<TempPath>,
    /// Size of the scan's file, bytes.
    pub n_bytes: u64,
}

/// What the archive has of one scan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Archived {
    /// Whether its source is there.
    pub is_there: bool,
    /// Whether its mask is there.
    pub has_mask: bool,
    /// Whether files of it arrived and were not accepted.
    pub is_arriving: bool,
}

fn failed(source: io::Error) -> ScanError {
    ScanError::Internal { doing: "archiving a scan in the state folder", source }
}

impl Archive {
    /// Opens the archive, and removes copies without an id. A missing folder is made with mode
    /// 0700, because it holds patient data.
    pub fn open(folder: &Path) -> Result<Self, ScanError> {
        steps::make_private_folder(folder).map_err(failed)?;
        let archive = Self { folder: folder.to_owned(), changing: Mutex::default() };
        for name in archive.names()? {
            if name.starts_with(DRAFT) {
                files::remove_if_there(&folder.join(name)).map_err(failed)?;
            }
        }
        Ok(archive)
    }

    /// Hold this lock from reading a record until record and archive agree again. A scan may arrive
    /// at the moment in which it leaves.
    pub fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The source of a scan, whether it is there or not.
    pub fn scan(&self, id: ScanId) -> PathBuf {
        self.path(id, SCAN)
    }

    /// The mask of a scan; `None` if it has none.
    pub fn mask(&self, id: ScanId) -> Option<PathBuf> {
        let path = self.path(id, MASK);
        path.symlink_metadata().is_ok().then_some(path)
    }

    fn path(&self, id: ScanId, ending: &str) -> PathBuf {
        self.folder.join(format!("{}.{ending}", id.to_hex()))
    }

    fn arriving(&self, id: ScanId, ending: &str) -> PathBuf {
        self.path(id, &format!("{ARRIVING}.{ending}"))
    }

    /// Copies a source in. oddscan reads and hashes the copy, so later changes of the original do
    /// not matter. `alive` is called during the copy.
    pub fn draft(
        &self,
        scan: &Path,
        mask: Option<&Path>,
        max_bytes: u64,
        alive: impl Fn(),
    ) -> Result<Draft, ScanError> {
        let copy = |from: &Path, doing| {
            let to = self.new_file()?;
            // One byte more than allowed, so that the reader notices a file that is too large.
            let copied = copy_durably(from, &to, max_bytes.saturating_add(1), &alive);
            let n_bytes = copied.map_err(|error| match error {
                CopyError::Source(source) => ScanError::Io { doing, source },
                CopyError::Target(source) => failed(source),
            })?;
            Ok::<_, ScanError>((to, n_bytes))
        };

        let (scan, n_bytes) = copy(scan, "reading a scan")?;
        let mask = mask.map(|mask| copy(mask, "reading a scan's brain mask"));
        Ok(Draft { scan, mask: mask.transpose()?.map(|(path, _)| path), n_bytes })
    }

    fn new_file(&self) -> Result<TempPath, ScanError> {
        let file = tempfile::Builder::new()
            .prefix(DRAFT)
            // The umask decides, as for any other file, because the file may move to quarantine
            // later.
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .tempfile_in(&self.folder);
        Ok(file.map_err(failed)?.into_temp_path())
    }

    /// Puts a brain mask beside a draft that came without one, durably.
    pub fn add_mask(&self, draft: &mut Draft, nii_gz: &[u8]) -> Result<(), ScanError> {
        let path = self.new_file()?;
        files::write_durably(&path, nii_gz).map_err(failed)?;
        draft.mask = Some(path);
        Ok(())
    }

    /// Replaces the draft's scan, durably.
    pub fn replace_scan(&self, draft: &Draft, nii_gz: &[u8]) -> Result<(), ScanError> {
        files::write_durably(&draft.scan, nii_gz).map_err(failed)
    }

    /// Gives a draft its id, durably. It counts once the ledger has a record of the scan. Returns
    /// the hashes of the files.
    pub fn offer(&self, draft: Draft, id: ScanId) -> Result<SourceFacts, ScanError> {
        let sha256 = |path: &Path| files::sha256_of(path).map(hex::encode).map_err(failed);
        let mask_sha256 = draft.mask.as_deref().map(sha256).transpose()?;
        let facts = SourceFacts { scan_sha256: sha256(&draft.scan)?, mask_sha256 };

        // Of an arrival that did not end, or of a scan that has left.
        for path in [self.arriving(id, MASK), self.path(id, MASK)] {
            files::remove_if_there(&path).map_err(failed)?;
        }
        if let Some(mask) = draft.mask {
            steps::persist(mask, &self.arriving(id, MASK)).map_err(failed)?;
        }
        steps::persist(draft.scan, &self.arriving(id, SCAN)).map_err(failed)?;
        steps::sync_folder(&self.folder).map_err(failed)?;
        Ok(facts)
    }

    /// Makes an offered source that of its scan, durably. A second call changes nothing.
    pub fn accept(&self, id: ScanId) -> Result<(), ScanError> {
        // The scan comes last: once it is there, all of it is.
        for ending in [MASK, SCAN] {
            let from = self.arriving(id, ending);
            if from.symlink_metadata().is_ok() {
                steps::rename(&from, &self.path(id, ending)).map_err(failed)?;
            }
        }
        steps::sync_folder(&self.folder).map_err(failed)
    }

    /// Removes the source of a scan. A missing source is no error.
    pub fn remove(&self, id: ScanId) -> Result<(), ScanError> {
        self.remove_files([self.path(id, SCAN), self.path(id, MASK)])
    }

    /// Removes what was offered of a scan and not accepted.
    pub fn take_back(&self, id: ScanId) -> Result<(), ScanError> {
        self.remove_files([self.arriving(id, SCAN), self.arriving(id, MASK)])
    }

    fn remove_files(&self, paths: [PathBuf; 2]) -> Result<(), ScanError> {
        paths.iter().try_for_each(|path| files::remove_if_there(path).map_err(failed))
    }

    /// Compares the source of a scan with the hashes that it had when it came. Returns what
    /// differs.
    pub fn check(&self, id: ScanId, facts: &SourceFacts) -> io::Result<Option<&'static str>> {
        let differs = |path: &Path, expected: &str| match files::sha256_of(path) {
            Ok(found) => Ok(hex::encode(found) != *expected),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(error),
        };
        if differs(&self.scan(id), &facts.scan_sha256)? {
            return Ok(Some("its archived source is missing or has changed"));
        }
        match (&facts.mask_sha256, self.mask(id)) {
            (None, None) => Ok(None),
            (Some(expected), _) if !differs(&self.path(id, MASK), expected)? => Ok(None),
            _ => Ok(Some("the archived brain mask is missing or has changed")),
        }
    }

    /// The scans of which the archive has files.
    pub fn scans(&self) -> Result<BTreeMap<ScanId, Archived>, ScanError> {
        let mut scans = BTreeMap::<ScanId, Archived>::new();
        for name in self.names()? {
            let Some((stem, ending)) = name.split_once('.') else { continue };
            let Some(id) = ScanId::from_hex(stem) else { continue };
            let archived = scans.entry(id).or_default();
            archived.is_arriving |= ending.starts_with(ARRIVING);
            archived.is_there |= ending == SCAN;
            archived.has_mask |= ending == MASK;
        }
        Ok(scans)
    }

    /// All files of a scan, and how they are called.
    pub fn files(&self, id: ScanId) -> Vec<PathBuf> {
        let all = [SCAN, MASK].map(|ending| [self.path(id, ending), self.arriving(id, ending)]);
        all.into_iter().flatten().filter(|path| path.symlink_metadata().is_ok()).collect()
    }

    fn names(&self) -> Result<Vec<String>, ScanError> {
        let entries = fs::read_dir(&self.folder).map_err(failed)?;
        let names: io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.file_name())).collect();
        let names = names.map_err(failed)?.into_iter();
        Ok(names.filter_map(|name| name.into_string().ok()).collect())
    }
}

/// The folder of what oddscan does not know any more: `state/lost+found`. Nothing there is deleted.
#[derive(Debug)]
pub struct LostAndFound {
    folder: PathBuf,
}

impl LostAndFound {
    /// File with a line for each thing: when it was put there, its name, why.
    pub const WHY: &str = "why.txt";

    /// The folder in a state folder. It is made when it is needed.
    pub fn of(state: &Path) -> Self {
        Self { folder: state.join("lost+found") }
    }

    /// Moves a file here, with a line that says why. `now` is the time in words without spaces.
    /// Returns its new path.
    pub fn put(&self, file: &Path, now: &str, why: &str) -> io::Result<PathBuf> {
        steps::make_private_folder(&self.folder)?;
        files::sync_folder(self.folder.parent().unwrap_or(Path::new(".")))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let free = (1..).map(|count| match count {
            1 => self.folder.join(&*name),
            _ => self.folder.join(format!("{name}.{count}")),
        });
        let free = free.into_iter().find(|path| path.symlink_metadata().is_err());
        let target = free.expect("there is no end of names");

        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let path = self.folder.join(Self::WHY);
        let mut log = steps::append(&path)?;
        steps::write(&mut log, &path, format!("{now} {name}: {why}\n").as_bytes())?;
        steps::sync(&log, &path)?;

        steps::rename(file, &target)?;
        steps::sync_folder(&self.folder)?;
        Ok(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(archive: &Archive, folder: &Path, mask: bool) -> Draft {
        let at = folder.join("source");
        fs::write(&at, "voxels").unwrap();
        archive.draft(&at, mask.then_some(&*at), 100, || ()).unwrap()
    }

    #[test]
    fn a_source_counts_only_once_it_is_accepted() {
        let folder = tempfile::tempdir().unwrap();
        let archive = Archive::open(&folder.path().join("sources")).unwrap();
        let id = ScanId([7; 32]);
        let facts = archive.offer(draft(&archive, folder.path(), true), id).unwrap();
        let offered = Archived { is_arriving: true, ..Archived::default() };
        assert_eq!(archive.scans().unwrap(), [(id, offered)].into());
        assert!(!archive.scan(id).exists());
        for _ in 0..2 {
            archive.accept(id).unwrap();
            assert_eq!(archive.check(id, &facts).unwrap(), None);
            let there = Archived { is_there: true, has_mask: true, is_arriving: false };
            assert_eq!(archive.scans().unwrap(), [(id, there)].into());
        }
        archive.remove(id).unwrap();
        assert!(archive.scans().unwrap().is_empty());

        archive.offer(draft(&archive, folder.path(), false), id).unwrap();
        archive.take_back(id).unwrap();
        assert!(archive.scans().unwrap().is_empty());
    }

    #[test]
    fn a_changed_or_missing_source_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let archive = Archive::open(&folder.path().join("sources")).unwrap();
        let id = ScanId([7; 32]);
        let facts = archive.offer(draft(&archive, folder.path(), true), id).unwrap();
        archive.accept(id).unwrap();
        let without = SourceFacts { mask_sha256: None, ..facts.clone() };
        assert!(archive.check(id, &without).unwrap().is_some(), "a mask from elsewhere");

        let mask = archive.mask(id).unwrap();
        for file in [mask, archive.scan(id)] {
            fs::write(&file, "voxelz").unwrap();
            assert!(archive.check(id, &facts).unwrap().is_some());
            fs::remove_file(&file).unwrap();
            assert!(archive.check(id, &facts).unwrap().is_some());
            fs::write(&file, "voxels").unwrap();
            assert_eq!(archive.check(id, &facts).unwrap(), None);
        }
    }

    #[test]
    fn what_is_lost_and_found_keeps_its_content_and_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let lost = LostAndFound::of(folder.path());
        for content in ["one", "two"] {
            let file = folder.path().join("a.scan");
            fs::write(&file, content).unwrap();
            let there = lost.put(&file, "now", "no record").unwrap();
            assert_eq!(fs::read_to_string(there).unwrap(), content);
        }
        let why = fs::read_to_string(folder.path().join("lost+found/why.txt")).unwrap();
        assert_eq!(why, "now a.scan: no record\nnow a.scan.2: no record\n");
    }
}
