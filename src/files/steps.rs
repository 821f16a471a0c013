//! The steps that change a disk: one function per system call, so that a test can stop the process
//! before, within or after any of them, or let it fail.
//!
//! Everything that oddscan must not lose goes through here. Without the feature `faults`, which no
//! release has, a step is only its call.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use tempfile::{NamedTempFile, TempPath};

/// Does one step.
#[cfg(not(feature = "faults"))]
fn step<T>(_: &str, _: &Path, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    call()
}

#[cfg(feature = "faults")]
use super::faults::step;

/// Opens a file for writing. An older one loses its content.
pub fn create(path: &Path) -> io::Result<File> {
    step("create", path, || File::create(path))
}

/// Opens a file for writing at its end, and makes it with mode 0600 if there is none.
pub fn append(path: &Path) -> io::Result<File> {
    step("append", path, || fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path))
}

/// Writes all bytes to the file with this path.
pub fn write(file: &mut impl Write, path: &Path, bytes: &[u8]) -> io::Result<()> {
    #[cfg(feature = "faults")]
    super::faults::write_half(file, path, bytes)?;
    step("write", path, || file.write_all(bytes))
}

/// Makes the content of a file durable.
pub fn sync(file: &File, path: &Path) -> io::Result<()> {
    step("sync", path, || file.sync_all())
}

/// Makes all names that were created, changed or removed in a folder durable.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    step("sync", folder, || File::open(folder)?.sync_all())
}

/// Renames a file or a folder. A file that has the new name is replaced.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    step("rename", to, || fs::rename(from, to))
}

/// Renames a file or a folder, unless the new name is taken.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] if the name is taken. Some network file systems cannot rename
/// in this way: there, the check and the renaming are two calls.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    step("rename", to, || match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP) => {
            if to.symlink_metadata().is_ok() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            fs::rename(from, to)
        }
        done => Ok(done?),
    })
}

/// Gives a temporary file its name, and replaces the file that has it.
pub fn persist(draft: TempPath, to: &Path) -> io::Result<()> {
    rename(&draft, to)?;
    // Nothing has its temporary name any more.
    Ok(draft.keep().map(drop)?)
}

/// As [`persist`], unless the name is taken.
pub fn persist_new(draft: TempPath, to: &Path) -> io::Result<()> {
    rename_new(&draft, to)?;
    Ok(draft.keep().map(drop)?)
}

/// Writes and makes durable the whole content of a temporary file.
pub fn fill(draft: &mut NamedTempFile, bytes: &[u8]) -> io::Result<()> {
    let path = draft.path().to_owned();
    write(draft.as_file_mut(), &path, bytes)?;
    sync(draft.as_file(), &path)
}

/// Gives a file a second name.
///
/// # Errors
/// If the name is taken, or the file system has no such links.
pub fn link(from: &Path, to: &Path) -> io::Result<()> {
    step("link", to, || fs::hard_link(from, to))
}

/// Cuts or extends a file to a size, bytes.
pub fn resize(file: &File, path: &Path, n_bytes: u64) -> io::Result<()> {
    step("resize", path, || file.set_len(n_bytes))
}

/// Removes a file.
pub fn remove(path: &Path) -> io::Result<()> {
    step("remove", path, || fs::remove_file(path))
}

/// Removes an empty folder.
pub fn remove_folder(folder: &Path) -> io::Result<()> {
    step("remove", folder, || fs::remove_dir(folder))
}

/// Removes a folder with its content, which the caller need not keep.
pub fn remove_tree(folder: &Path) -> io::Result<()> {
    step("remove", folder, || fs::remove_dir_all(folder))
}

/// Makes a folder.
///
/// # Errors
/// If there is one.
pub fn make_folder(folder: &Path) -> io::Result<()> {
    step("folder", folder, || fs::create_dir(folder))
}

/// Makes a folder that no other user may read, and the folders above it, unless it is there.
pub fn make_private_folder(folder: &Path) -> io::Result<()> {
    step("folder", folder, || fs::DirBuilder::new().recursive(true).mode(0o700).create(folder))
}
