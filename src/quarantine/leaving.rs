//! The files that leave their place for an entry: a list that is written before the first one is
//! touched, and the steps that can be done again after a kill.
//!
//! On one file system a file is renamed into the entry. Otherwise it is copied, and the source is
//! removed when all copies are durable. A source is removed only if it is still the file that was
//! read: a sender may have renamed another one over it.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, Metadata},
    io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::reason::{COPY, LEAVING, ReasonFile, look, write_whole};
use crate::{
    domain::scan::FileStamp,
    files::{
        CopyError, MARK, copy_open, hold, make_folders, open_regular, remove_if_there, steps,
        sync_folder,
    },
};

/// The content of `.leaving`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Leaving {
    /// The reason as far as it is known before the files have moved.
    pub reason: ReasonFile,
    /// Name that the entry is to have.
    pub name: Name,
    pub files: Vec<Leaver>,
}

/// A file that is to go into the entry.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Leaver {
    from: Name,
    /// Path within the entry.
    place: Name,
    number: u64,
    look: FileStamp,
}

/// A name or path, which need not be UTF-8.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Name {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<&OsStr> for Name {
    fn from(name: &OsStr) -> Self {
        match name.to_str() {
            Some(text) => Self::Text(text.to_owned()),
            None => Self::Bytes(name.as_bytes().to_vec()),
        }
    }
}

impl From<&Name> for OsString {
    fn from(name: &Name) -> Self {
        match name {
            Name::Text(text) => text.into(),
            Name::Bytes(bytes) => Self::from_vec(bytes.clone()),
        }
    }
}

/// Where a file is after an attempt to take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// In the entry, and nowhere else.
    Taken,
    /// In its old place: oddscan may not move it.
    Stays,
    /// It is no longer the file that was refused. What has its name now is untouched.
    Changed,
}

impl Leaving {
    pub fn read(entry: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(entry.join(LEAVING)).ok()?).ok()
    }

    pub fn write(&self, entry: &Path) -> io::Result<()> {
        write_whole(entry, LEAVING, &serde_json::to_vec(self).map_err(io::Error::other)?)
    }

    /// Takes all files, or those that an earlier attempt has left.
    pub fn take(&self, entry: &Path) -> io::Result<Vec<Outcome>> {
        let copied: io::Result<Vec<_>> = self.files.iter().map(|file| file.enter(entry)).collect();
        let copied = copied?;
        if copied.contains(&None) {
            // The sources go only when all copies are durable. A rename needs no such step: no file
            // system makes it durable before the folder that it leads to.
            self.sync_places(entry)?;
            sync_folder(entry.parent().unwrap_or(entry))?;
        }
        let outcomes = self.files.iter().zip(copied).map(|(file, outcome)| match outcome {
            Some(outcome) => Ok(outcome),
            None => file.leave(entry),
        });
        outcomes.collect()
    }

    /// Makes the folders durable that the files are in.
    pub fn sync_places(&self, entry: &Path) -> io::Result<()> {
        let mut folders: Vec<PathBuf> = Vec::new();
        for file in &self.files {
            let mut folder = file.place(entry);
            while folder.pop() && folder.starts_with(entry) {
                folders.push(folder.clone());
            }
        }
        folders.sort();
        folders.dedup();
        folders.iter().filter(|folder| folder.is_dir()).try_for_each(|folder| sync_folder(folder))
    }

    /// Puts everything back. Copies whose source is untouched are removed. Returns whether nothing
    /// is left in the entry.
    pub fn undo(&self, entry: &Path) -> bool {
        let n_stuck = self.files.iter().filter(|file| file.go_back(entry).is_err()).count();
        n_stuck == 0
    }

    /// Whether a file is in the entry.
    pub fn has_begun(&self, entry: &Path) -> bool {
        self.files.iter().any(|file| is_there(&file.place(entry)) || is_there(&file.aside()))
    }

    /// Size and times of the files in the entry. Those of a renamed file are from before: somebody
    /// may have written to it meanwhile.
    pub fn looks<'l>(&'l self, entry: &'l Path) -> impl Iterator<Item = FileStamp> + 'l {
        self.files.iter().map(|file| match fs::symlink_metadata(file.place(entry)) {
            Ok(about) if about.ino() != file.number => look(&about),
            _ => file.look,
        })
    }
}

impl Leaver {
    /// A file on its way to a place within an entry. `None` if it is not there any more, or is
    /// another file than `expected`.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if it is no regular file.
    pub fn new(path: &Path, expected: Option<FileStamp>, place: &Path) -> io::Result<Option<Self>> {
        let about = match fs::symlink_metadata(path) {
            Err(error) if is_gone(&error) => return Ok(None),
            about => about?,
        };
        let look = look(&about);
        if expected.is_some_and(|expected| expected != look) {
            return Ok(None);
        }
        if !about.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let from = Name::from(std::path::absolute(path)?.as_os_str());
        Ok(Some(Self { from, place: place.as_os_str().into(), number: about.ino(), look }))
    }

    pub fn from(&self) -> PathBuf {
        OsString::from(&self.from).into()
    }

    fn place(&self, entry: &Path) -> PathBuf {
        entry.join(OsString::from(&self.place))
    }

    /// The name of the source while it is removed.
    fn aside(&self) -> PathBuf {
        self.from().with_file_name(format!("{MARK}{}", self.number))
    }

    /// Whether this is the file that was refused, unchanged. A restart may change the number of the
    /// device.
    fn is(&self, about: &Metadata) -> bool {
        about.is_file() && about.ino() == self.number && look(about) == self.look
    }

    /// Renames or copies the file into the entry. `None` if it was copied, so that the source has
    /// to be removed.
    fn enter(&self, entry: &Path) -> io::Result<Option<Outcome>> {
        let (from, place) = (self.from(), self.place(entry));
        if is_there(&place) {
            // An earlier attempt has come so far. Whether it was a copy shows in `leave`.
            return Ok(None);
        }

        let held = match hold(&from) {
            Err(error) if is_gone(&error) => return Ok(Some(Outcome::Changed)),
            Err(error) if is_forbidden(&error) => return Ok(Some(Outcome::Stays)),
            held => held?,
        };
        let about = held.metadata()?;
        if !self.is(&about) {
            return Ok(Some(Outcome::Changed));
        }

        make_folders(place.parent().unwrap_or(entry))?;
        match steps::rename(&from, &place) {
            Ok(()) => {
                if is_same(&fs::symlink_metadata(&place)?, &about) {
                    return Ok(Some(Outcome::Taken));
                }
                // Another file had got the name in this moment.
                steps::rename_new(&place, &from)?;
                Ok(Some(Outcome::Changed))
            }
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => self.copy(entry, &about),
            Err(error) if is_gone(&error) => Ok(Some(Outcome::Changed)),
            Err(error) if is_forbidden(&error) => Ok(Some(Outcome::Stays)),
            Err(error) => Err(error),
        }
    }

    fn copy(&self, entry: &Path, about: &Metadata) -> io::Result<Option<Outcome>> {
        let (hidden, place) = (entry.join(COPY), self.place(entry));
        let source = match open_regular(&self.from()) {
            Err(error) if is_forbidden(&error) => return Ok(Some(Outcome::Stays)),
            Err(_) => return Ok(Some(Outcome::Changed)),
            Ok(source) => source,
        };
        if !is_same(&source.metadata()?, about) {
            return Ok(Some(Outcome::Changed));
        }

        match copy_open(&source, &hidden, u64::MAX, || {}) {
            Ok(_) if self.is(&source.metadata()?) => {
                steps::rename(&hidden, &place)?;
                Ok(None)
            }
            Ok(_) => {
                steps::remove(&hidden)?;
                Ok(Some(Outcome::Changed))
            }
            // What cannot be read cannot be copied.
            Err(CopyError::Source(_)) => {
                steps::remove(&hidden)?;
                Ok(Some(Outcome::Stays))
            }
            Err(CopyError::Target(error)) => Err(error),
        }
    }

    /// Removes the source of a copy.
    fn leave(&self, entry: &Path) -> io::Result<Outcome> {
        let (from, aside) = (self.from(), self.aside());
        if is_there(&aside) {
            // A kill came between the two steps below.
            return self.leave_from_aside();
        }
        let about = match fs::symlink_metadata(&from) {
            Err(error) if is_gone(&error) => return Ok(Outcome::Taken),
            about => about?,
        };
        if about.ino() != self.number {
            // Another file has the name now. The copy is the only one of the refused file.
            return Ok(Outcome::Taken);
        }
        if !self.is(&about) {
            steps::remove(&self.place(entry))?;
            return Ok(Outcome::Changed);
        }

        // Between the look and a removal by name, another file could get the name. So the file is
        // renamed first, and looked at again.
        match steps::rename_new(&from, &aside) {
            Ok(()) => self.leave_from_aside(),
            Err(error) if is_gone(&error) => Ok(Outcome::Taken),
            Err(error) if is_forbidden(&error) => {
                steps::remove(&self.place(entry))?;
                Ok(Outcome::Stays)
            }
            Err(error) => Err(error),
        }
    }

    fn leave_from_aside(&self) -> io::Result<Outcome> {
        let (from, aside) = (self.from(), self.aside());
        let about = fs::symlink_metadata(&aside)?;
        let is_it = about.is_file()
            && (about.ino(), about.len()) == (self.number, self.look.size)
            && look(&about).modified_ns == self.look.modified_ns;
        if is_it {
            steps::remove(&aside)?;
            // Otherwise it could come back after a power cut, and be refused twice.
            sync_folder(from.parent().unwrap_or(Path::new("."))).ok();
        } else {
            steps::rename_new(&aside, &from)?;
        }
        Ok(Outcome::Taken)
    }

    /// Undoes [`Leaver::enter`].
    fn go_back(&self, entry: &Path) -> io::Result<()> {
        let (from, place) = (self.from(), self.place(entry));
        if is_there(&self.aside()) {
            steps::rename_new(&self.aside(), &from)?;
        }
        remove_if_there(&entry.join(COPY))?;
        match (fs::symlink_metadata(&from), fs::symlink_metadata(&place)) {
            (_, Err(error)) if is_gone(&error) => Ok(()),
            (Ok(about), Ok(_)) if self.is(&about) => steps::remove(&place),
            (Err(error), Ok(_)) if is_gone(&error) => steps::rename_new(&place, &from),
            _ => Err(io::ErrorKind::AlreadyExists.into()),
        }
    }
}

fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Whether both are one file, whatever has been written to it.
fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Whether an error says that nothing has this name.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Whether an error says that this service may not move or read the file, now or later.
fn is_forbidden(error: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem, ResourceBusy};
    matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem | ResourceBusy)
}
