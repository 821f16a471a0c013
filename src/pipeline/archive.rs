//! Keeps copies of the sources of all members. So results can be written again after the incoming
//! folder was cleaned up.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tempfile::TempPath;
use tracing::warn;

use crate::{
    domain::{error::ScanError, scan::ScanId},
    files::{CopyError, copy_durably},
};

/// A folder of `<scan id>.scan` and, if a mask arrived with the scan or was made, `<scan
/// id>.brain`. If the site's preprocessing changed the scan, the changed one is kept: new results
/// must show what was compared.
#[derive(Debug)]
pub(super) struct Archive {
    folder: PathBuf,
    changing: Mutex<()>,
}

/// A source that was copied in and has no id yet. Dropping it removes its files.
pub(super) struct Draft {
    pub(super) scan: TempPath,
    pub(super) mask: Option<TempPath>,
    pub(super) n_bytes: u64,
}

fn failed(source: io::Error) -> ScanError {
    ScanError::Internal { doing: "archiving a scan in the state folder", source }
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), ScanError> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(failed)
}

impl Archive {
    pub(super) fn open(folder: &Path) -> Result<Self, ScanError> {
        // Patient data: nobody else may read it.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        Ok(Self { folder: folder.to_owned(), changing: Mutex::default() })
    }

    /// Hold this lock from reading the journal until journal and archive agree again. A scan may
    /// arrive at the moment in which it leaves.
    pub(super) fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn scan(&self, id: ScanId) -> PathBuf {
        self.folder.join(format!("{}.scan", id.to_hex()))
    }

    pub(super) fn mask(&self, id: ScanId) -> Option<PathBuf> {
        let path = self.mask_path(id);
        path.is_file().then_some(path)
    }

    fn mask_path(&self, id: ScanId) -> PathBuf {
        self.folder.join(format!("{}.brain", id.to_hex()))
    }

    /// Copies a source in. oddscan reads and hashes the copy, so later changes of the original do
    /// not matter. `alive` is called during the copy.
    pub(super) fn draft(
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
            .prefix("draft-")
            // The umask decides, as for any other file, because the file may move to quarantine
            // later.
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .tempfile_in(&self.folder);
        Ok(file.map_err(failed)?.into_temp_path())
    }

    /// Puts a brain mask beside a draft that came without one, durably.
    pub(super) fn add_mask(&self, draft: &mut Draft, nii_gz: &[u8]) -> Result<(), ScanError> {
        let path = self.new_file()?;
        write_durably(&path, nii_gz)?;
        draft.mask = Some(path);
        Ok(())
    }

    /// Replaces the draft's scan, durably.
    pub(super) fn replace_scan(&self, draft: &Draft, nii_gz: &[u8]) -> Result<(), ScanError> {
        write_durably(&draft.scan, nii_gz)
    }

    /// Gives a draft its id, durably.
    pub(super) fn keep(&self, draft: Draft, id: ScanId) -> Result<(), ScanError> {
        if let Some(mask) = draft.mask {
            mask.persist(self.mask_path(id)).map_err(|refused| failed(refused.error))?;
        }
        draft.scan.persist(self.scan(id)).map_err(|refused| failed(refused.error))?;
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(failed)
    }

    /// Removes a source. A missing source is no error.
    pub(super) fn remove(&self, id: ScanId) -> Result<(), ScanError> {
        for path in [self.scan(id), self.mask_path(id)] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes what a kill left behind: drafts, and sources without a member.
    pub(super) fn keep_only(&self, is_held: impl Fn(ScanId) -> bool) -> Result<(), ScanError> {
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            if !ScanId::from_hex(stem).is_some_and(&is_held)
                && let Err(error) = fs::remove_file(&path)
            {
                let error = error.kind();
                warn!(%error, "cannot remove a file without a scan from the state folder");
            }
        }
        Ok(())
    }
}
