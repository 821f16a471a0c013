//! Files opened, copied, written, moved and removed with care, for all who do so.
//!
//! What is read may be exchanged by others at any time. What is written appears whole or not at
//! all.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use rustix::fs::OFlags;
use tempfile::NamedTempFile;

/// Which side of a copy failed: somebody else's file, or our own folder.
#[derive(Debug)]
pub enum CopyError {
    /// Reading.
    Source(io::Error),
    /// Writing.
    Target(io::Error),
}

impl From<CopyError> for io::Error {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Source(error) | CopyError::Target(error) => error,
        }
    }
}

/// Opens a file that others may exchange at any time: a link put in its place would lead the
/// service to a file that only the service may read, and a pipe would block it for ever.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        let message = "no regular file; export files, not folders, pipes or devices";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(file)
}

/// The content of a small file, at most one byte more than `max_bytes`, so that the reader sees
/// that there is too much.
pub fn read_small(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Copies a file to `target` and makes the copy durable, at most `max_bytes` of it. `alive` is
/// called after every MiB.
pub fn copy_durably(
    source: &Path,
    target: &Path,
    max_bytes: u64,
    mut alive: impl FnMut(),
) -> Result<u64, CopyError> {
    let mut from = open_regular(source).map_err(CopyError::Source)?.take(max_bytes);
    let mut to = File::create(target).map_err(CopyError::Target)?;
    let mut buffer = vec![0; 1 << 20];
    let mut n_copied = 0;
    loop {
        let n_read = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n_read) => n_read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CopyError::Source(error)),
        };
        to.write_all(&buffer[..n_read]).map_err(CopyError::Target)?;
        n_copied += n_read as u64;
        alive();
    }
    to.sync_all().map_err(CopyError::Target)?;
    Ok(n_copied)
}

/// Begins the names of files that are not whole yet.
const MARK: &str = ".oddscan-tmp-";

/// Writes `bytes` to `path`: a temporary file in the same folder, made durable, renamed over
/// `path`, the folder made durable. After an error the old file stands as it was.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut draft = tempfile::Builder::new()
        .prefix(MARK)
        // The umask of the service decides who may read results, as for any other file.
        .permissions(PermissionsExt::from_mode(0o666))
        .tempfile_in(folder)?;
    draft.write_all(bytes)?;
    draft.as_file().sync_all()?;
    draft.persist(path).map_err(|error| error.error)?;
    sync_folder(folder)
}

/// Removes temporary files that a kill left in `folder`.
pub fn remove_leftovers(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(MARK.as_bytes()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Makes what was created, renamed or removed in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Writes a file whole or not at all, by way of `partial` on the same file system. The folder is
/// not made durable.
pub(crate) fn write_by_way_of(partial: &Path, target: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::write(partial, bytes)?;
    File::open(partial)?.sync_all()?;
    fs::rename(partial, target)
}

/// A file beside `target` that becomes it with [`NamedTempFile::persist`].
pub(crate) fn partial_beside(target: &Path) -> io::Result<NamedTempFile> {
    let folder = target.parent().unwrap_or(Path::new("."));
    tempfile::Builder::new().prefix(".").suffix(".partial").tempfile_in(folder)
}

/// Writes a file whole or not at all, readable for everybody: a service of another user reads it.
pub(crate) fn write_for_everybody(target: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut partial = partial_beside(target)?;
    partial.write_all(bytes)?;
    partial.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    partial.as_file().sync_all()?;
    partial.persist(target)?;
    Ok(())
}

/// Renames, or copies and removes where source and target lie on different file systems. A folder
/// holds files only.
pub(crate) fn move_file(source: &Path, target: &Path) -> io::Result<()> {
    match fs::rename(source, target) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices && source.is_dir() => {
            // It may be there, half full, from a try that failed.
            fs::create_dir_all(target)?;
            for entry in fs::read_dir(source)? {
                let entry = entry?;
                move_file(&entry.path(), &target.join(entry.file_name()))?;
            }
            fs::remove_dir(source)
        }
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            copy_durably(source, target, u64::MAX, || {})?;
            fs::remove_file(source)
        }
        done => done,
    }
}

/// Removes a file, if it is there.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    unless_absent(fs::remove_file(path))
}

/// Makes an empty folder that nobody else may read.
pub(crate) fn fresh_folder(folder: &Path) -> io::Result<()> {
    unless_absent(fs::remove_dir_all(folder))?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

fn unless_absent(removed: io::Result<()>) -> io::Result<()> {
    removed.or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_leftover() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("result");
        write_atomic(&path, b"old").unwrap();
        // A folder in the way: the rename fails after a complete temporary file.
        let blocked = folder.path().join("blocked");
        fs::create_dir_all(blocked.join("full")).unwrap();
        write_atomic(&blocked, b"new").unwrap_err();
        write_atomic(&path.join("below-a-file"), b"new").unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn leftovers_of_a_kill_are_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        for name in [".oddscan-tmp-x1", "scan_anomaly.png", ".hidden"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        remove_leftovers(folder.path()).unwrap();
        assert!(!folder.path().join(".oddscan-tmp-x1").exists());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn links_pipes_and_folders_are_neither_copied_nor_read() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("file"), "x").unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, mode, 0)
            .unwrap();
        fs::create_dir(at("folder")).unwrap();
        for name in ["link", "pipe", "folder"] {
            let copied = copy_durably(&at(name), &at("copy"), 10, || {});
            assert!(matches!(copied, Err(CopyError::Source(_))), "{name}: {copied:?}");
            assert!(!at("copy").exists(), "{name}");
            assert!(read_small(&at(name), 10).is_err(), "{name}");
        }
        assert_eq!(read_small(&at("file"), 0).unwrap(), b"x", "one byte too many shows");
        assert_eq!(copy_durably(&at("file"), &at("copy"), 10, || {}).unwrap(), 1);
    }
}
