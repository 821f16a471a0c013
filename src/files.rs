//! Opens, copies, writes and removes files with care, for all modules that need it.
//!
//! Others may exchange a file that is read at any time. A file that is written appears whole or not
//! at all. All calls that change the disk are [`steps`].

#[cfg(feature = "faults")]
mod faults;
pub mod steps;

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;
use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempPath};

pub(crate) use steps::sync_folder;

/// Which side of a copy failed: the sender's file, or oddscan's own folder.
#[derive(Debug)]
pub enum CopyError {
    /// The source cannot be read.
    Source(io::Error),
    /// The target cannot be written.
    Target(io::Error),
}

impl From<CopyError> for io::Error {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Source(error) | CopyError::Target(error) => error,
        }
    }
}

/// The deepest folder that holds all files. Empty if they have none in common.
pub(crate) fn common_folder<'p>(files: impl IntoIterator<Item = &'p Path>) -> &'p Path {
    let mut folders = files.into_iter().filter_map(Path::parent);
    let first = folders.next().unwrap_or(Path::new(""));
    folders.fold(first, |common, folder| {
        let holds = |above: &&Path| folder.starts_with(above);
        common.ancestors().find(holds).unwrap_or(Path::new(""))
    })
}

/// Opens a file that others may exchange at any time. A link in its place would lead the service to
/// a file that only the service may read. A pipe would block the service for ever.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        let message = "this is no regular file; export files, not folders, pipes or devices";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(file)
}

/// The content of a small file: at most one byte more than `max_bytes`, so that the caller notices
/// a larger file.
pub fn read_small(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens a file without reading it, so that no permission to read is needed. A link in its place is
/// held itself. While a file is held, no other file gets its number.
pub(crate) fn hold(path: &Path) -> io::Result<File> {
    let flags = (OFlags::PATH | OFlags::NOFOLLOW).bits().cast_signed();
    fs::OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Copies at most `max_bytes` of a file to `target`, makes the copy durable and returns its size.
/// `alive` is called after every MiB.
pub fn copy_durably(
    source: &Path,
    target: &Path,
    max_bytes: u64,
    alive: impl FnMut(),
) -> Result<u64, CopyError> {
    let from = open_regular(source).map_err(CopyError::Source)?;
    copy_open(&from, target, max_bytes, alive)
}

/// As [`copy_durably`], for a file that is open already.
pub(crate) fn copy_open(
    source: &File,
    target: &Path,
    max_bytes: u64,
    mut alive: impl FnMut(),
) -> Result<u64, CopyError> {
    let mut from = source.take(max_bytes);
    let mut to = steps::create(target).map_err(CopyError::Target)?;

    let mut buffer = vec![0; 1 << 20];
    let mut n_copied = 0;
    loop {
        let n_read = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n_read) => n_read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CopyError::Source(error)),
        };
        steps::write(&mut to, target, &buffer[..n_read]).map_err(CopyError::Target)?;
        n_copied += n_read as u64;
        alive();
    }

    steps::sync(&to, target).map_err(CopyError::Target)?;
    Ok(n_copied)
}

/// Finds out whether a folder takes files: writes one and removes it. The file has no name where
/// the file system allows that, so that a kill leaves nothing.
pub(crate) fn try_to_write(folder: &Path) -> io::Result<()> {
    let mut file = tempfile::tempfile_in(folder)?;
    io::Write::write_all(&mut file, &[0; 4096])?;
    // Network file systems report a spent quota only here.
    file.sync_all()
}

/// The names of files that are not whole yet begin with this.
pub(crate) const MARK: &str = ".oddscan-tmp-";

/// Writes `bytes` to `path` by way of a temporary file in the same folder. The file is made
/// durable, renamed to `path`, and the folder is made durable. After an error the old file is
/// unchanged.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace(path, bytes)?;
    sync_folder(folder_of(path))
}

/// As [`write_atomic`], except that the caller makes the folder durable, once for several files.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut draft = draft_beside(path)?;
    steps::fill(&mut draft, bytes)?;
    steps::persist(draft.into_temp_path(), path)
}

/// Gives a file a second name, which another file may have so far. Where the file system has no
/// hard links, a durable copy gets that name. The caller makes the folder durable.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] if there is no such file.
pub fn give_second_name(file: &Path, name: &Path) -> io::Result<()> {
    give_second_name_by(steps::link, file, name)
}

fn give_second_name_by(
    link: impl Fn(&Path, &Path) -> io::Result<()>,
    file: &Path,
    name: &Path,
) -> io::Result<()> {
    // A rename of one name of a file over another one of it would leave both. Without links, some
    // network file systems give several files one number.
    let identity = |path| {
        let found = fs::symlink_metadata(path)?;
        Ok::<_, io::Error>((found.dev(), found.ino(), found.nlink() > 1))
    };
    let own = identity(file)?;
    if own.2 && identity(name).ok() == Some(own) {
        return Ok(());
    }
    let mut names = tempfile::Builder::new();
    let draft = match names.prefix(MARK).make_in(folder_of(name), |path| link(file, path)) {
        Ok(draft) => draft.into_temp_path(),
        Err(_) => copied_beside(name, file)?,
    };
    steps::persist(draft, name)
}

/// A durable copy of `file` with a temporary name beside `target`.
fn copied_beside(target: &Path, file: &Path) -> io::Result<TempPath> {
    let draft = draft_beside(target)?.into_temp_path();
    copy_durably(file, &draft, u64::MAX, || {})?;
    Ok(draft)
}

fn draft_beside(target: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(MARK)
        // As for any other file, the umask of the service decides who may read results.
        .permissions(PermissionsExt::from_mode(0o666))
        .tempfile_in(folder_of(target))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes a file whose name does not count yet, durably. It does not make the folder durable.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = steps::create(path)?;
    steps::write(&mut file, path, bytes)?;
    steps::sync(&file, path)
}

/// As [`replace`]. Only the owner may read the file.
pub fn replace_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut draft = private_draft_beside(path)?;
    steps::fill(&mut draft, bytes)?;
    steps::persist(draft.into_temp_path(), path)
}

/// Writes a secret, durably: only its owner may read it, and it never replaces a file that is
/// there.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut draft = private_draft_beside(path)?;
    steps::fill(&mut draft, bytes)?;
    steps::persist_new(draft.into_temp_path(), path)?;
    sync_folder(folder_of(path))
}

/// A temporary file that only its owner may read: that is the default of `tempfile`.
fn private_draft_beside(path: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new().prefix(MARK).tempfile_in(folder_of(path))
}

/// Removes temporary files that a kill left in `folder`, and calls `others` with the names of all
/// other entries.
pub fn remove_leftovers(folder: &Path, mut others: impl FnMut(&OsStr)) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(MARK.as_bytes()) {
            steps::remove(&entry.path())?;
        } else {
            others(&name);
        }
    }
    Ok(())
}

/// Writes a file whole or not at all, by way of `partial` on the same file system. It does not make
/// the folder durable.
pub(crate) fn write_by_way_of(partial: &Path, target: &Path, bytes: &[u8]) -> io::Result<()> {
    write_durably(partial, bytes)?;
    steps::rename(partial, target)
}

/// A temporary file beside `target`. [`NamedTempFile::persist`] renames it to `target`.
pub(crate) fn partial_beside(target: &Path) -> io::Result<NamedTempFile> {
    let folder = target.parent().unwrap_or(Path::new("."));
    tempfile::Builder::new().prefix(".").suffix(".partial").tempfile_in(folder)
}

/// Writes a file whole or not at all. Everybody may read it, because the service runs as another
/// user.
pub(crate) fn write_for_everybody(target: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut partial = partial_beside(target)?;
    partial.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    steps::fill(&mut partial, bytes)?;
    steps::persist(partial.into_temp_path(), target)
}

/// Whether a process has one of these files open for writing, as far as `/proc` shows it: without
/// privileges, that is for processes of the same user on this machine.
///
/// A lease (`F_SETLEASE`) would ask the kernel instead. It also needs the owner of the file, and on
/// NFS and SMB it fails for files that nobody has open. Links are compared by their text: to look
/// at the file behind one could wait for a dead share.
pub(crate) fn are_open_for_writing(paths: &[PathBuf]) -> bool {
    let wanted: HashSet<PathBuf> =
        paths.iter().filter_map(|path| fs::canonicalize(path).ok()).collect();
    let children = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let is_number = |name: &OsStr| name.as_encoded_bytes().iter().all(u8::is_ascii_digit);

    let is_writer = |process: &Path| {
        children(&process.join("fd")).any(|entry| {
            fs::read_link(entry.path()).is_ok_and(|target| wanted.contains(&target))
                && is_for_writing(&process.join("fdinfo").join(entry.file_name()))
        })
    };
    let processes = || children(Path::new("/proc")).filter(|entry| is_number(&entry.file_name()));
    !wanted.is_empty() && processes().any(|process| is_writer(&process.path()))
}

/// Whether the flags in a file of `/proc/<id>/fdinfo` allow writing. They are octal.
fn is_for_writing(fdinfo: &Path) -> bool {
    let text = fs::read_to_string(fdinfo).unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u64::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & u64::from(OFlags::ACCMODE.bits()) != 0)
}

/// Removes a file; a missing file is no error.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    unless_absent(steps::remove(path))
}

/// Removes a file, or a folder with its content, if it is there. A link itself is removed, not what
/// it leads to.
pub(crate) fn remove_all_if_there(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(about) if about.is_dir() => steps::remove_tree(path),
        Ok(_) => steps::remove(path),
    }
}

/// SHA-256 of a file's bytes.
pub fn sha256_of(path: &Path) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    io::copy(&mut open_regular(path)?, &mut hash)?;
    Ok(hash.finalize().into())
}

/// Makes a folder, and the folders above it, unless they are there, durably.
pub(crate) fn make_folders(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(above) = folder.parent().filter(|above| !above.as_os_str().is_empty()) {
        make_folders(above)?;
    }
    match steps::make_folder(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => sync_folder(folder_of(folder)),
    }
}

/// Makes an empty folder that no other user may read; an older one is removed with its content.
pub(crate) fn fresh_folder(folder: &Path) -> io::Result<()> {
    unless_absent(steps::remove_tree(folder))?;
    steps::make_private_folder(folder)
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
    fn the_common_folder_is_the_deepest_that_holds_all() {
        for (files, common) in [
            (&["/in/a/1", "/in/a/2"][..], "/in/a"),
            (&["/in/a/b/1", "/in/a/c/1", "/in/a/2"], "/in/a"),
            (&["/in/ab/1", "/in/a/1"], "/in"),
            (&["a/1", "b/1"], ""),
            (&[], ""),
        ] {
            assert_eq!(common_folder(files.iter().map(Path::new)), Path::new(common), "{files:?}");
        }
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_leftover() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("result");
        write_atomic(&path, b"old").unwrap();
        // A folder has the name already, so the rename fails after the temporary file is complete.
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
        let mut others = Vec::new();
        remove_leftovers(folder.path(), |name| others.push(name.to_owned())).unwrap();
        others.sort();
        assert_eq!(others, [".hidden", "scan_anomaly.png"]);
        assert!(!folder.path().join(".oddscan-tmp-x1").exists());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_second_name_is_a_link_or_where_there_are_none_a_copy() {
        let no_links = |_: &Path, _: &Path| Err(io::Error::from(io::ErrorKind::Unsupported));
        for has_links in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let [file, name] = ["file", "name"].map(|name| folder.path().join(name));
            let give = || match has_links {
                true => give_second_name(&file, &name),
                false => give_second_name_by(no_links, &file, &name),
            };
            assert_eq!(give().unwrap_err().kind(), io::ErrorKind::NotFound);
            fs::write(&file, "new").unwrap();
            fs::write(&name, "old").unwrap();
            for _ in 0..2 {
                give().unwrap();
                assert_eq!(fs::read(&name).unwrap(), b"new");
                let inode = |path| fs::metadata(path).unwrap().ino();
                assert_eq!(inode(&file) == inode(&name), has_links);
                assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
            }
        }
    }

    #[test]
    fn a_file_that_this_process_writes_is_seen_and_one_that_it_reads_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let [written, read] = ["a\nb", "c"].map(|name| folder.path().join(name));
        let writer = File::create(&written).unwrap();
        fs::write(&read, "x").unwrap();
        let _reader = File::open(&read).unwrap();
        assert!(are_open_for_writing(&[read.clone(), written.clone()]));
        assert!(!are_open_for_writing(&[read, folder.path().join("none")]));
        drop(writer);
        assert!(!are_open_for_writing(&[written]));
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
