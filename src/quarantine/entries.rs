//! The entries as they lie in the quarantine: listed, named, deleted.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    path::{Component, Path, PathBuf},
};

use serde::Serialize;

use super::reason::{DROPPED, OWN_FILES, PICTURE, ReasonFile, is_hidden, partial};
use crate::files::steps;

/// A refused file, as `oddscan quarantine list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Name of the entry in quarantine: `<reason>/<name>`.
    pub name: PathBuf,
    /// Why it was refused; `None` if the reason cannot be read.
    #[serde(flatten)]
    pub reason: Option<ReasonFile>,
    /// `<reason>/<name>/registration.png`, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub picture: Option<PathBuf>,
}

/// All entries of the quarantine, sorted by reason and name.
///
/// # Errors
/// If the quarantine cannot be read.
pub fn entries(quarantine: &Path) -> io::Result<Vec<Entry>> {
    let with_reason = |name: PathBuf| {
        let reason = ReasonFile::read(&quarantine.join(&name));
        let is_own = is_own(PICTURE.as_ref(), reason.as_ref());
        let picture = name.join(PICTURE);
        let picture = (is_own && quarantine.join(&picture).is_file()).then_some(picture);
        Entry { name, reason, picture }
    };
    Ok(names(quarantine)?.into_iter().map(with_reason).collect())
}

/// The names of all entries, sorted.
fn names(quarantine: &Path) -> io::Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for reason in folders_in(quarantine)? {
        let entries = folders_in(&quarantine.join(&reason))?.into_iter();
        let visible = entries.filter(|name| !is_hidden(name));
        names.extend(visible.map(|name| Path::new(&reason).join(name)));
    }
    names.sort();
    Ok(names)
}

/// The folders of entries that are not whole yet, or are being deleted.
pub fn hidden_entries(quarantine: &Path) -> io::Result<Vec<PathBuf>> {
    let mut hidden = Vec::new();
    for reason in folders_in(quarantine)? {
        let folder = quarantine.join(reason);
        let names = folders_in(&folder)?.into_iter().filter(|name| is_hidden(name));
        hidden.extend(names.map(|name| folder.join(name)));
    }
    Ok(hidden)
}

/// The names of the folders in a folder. Links are left out: they may lead anywhere.
pub fn folders_in(folder: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name());
        }
    }
    Ok(names)
}

/// The folder of an entry. Its name must be `<reason>/<name>` and nothing else.
pub fn folder_of(quarantine: &Path, name: &Path) -> io::Result<PathBuf> {
    let parts: Vec<Component<'_>> = name.components().collect();
    // A link could lead out of the quarantine.
    let is_folder = |path: &Path| path.symlink_metadata().is_ok_and(|about| about.is_dir());
    if let [Component::Normal(reason), Component::Normal(entry)] = parts[..]
        && !is_hidden(entry)
    {
        let reason = quarantine.join(reason);
        let folder = reason.join(entry);
        if is_folder(&reason) && is_folder(&folder) {
            return Ok(folder);
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "no such entry; `oddscan quarantine list` names them",
    ))
}

/// Whether oddscan wrote this file of an entry. A DICOM file may have any name, even one of these.
fn is_own(name: &OsStr, reason: Option<&ReasonFile>) -> bool {
    let is_refused =
        reason.is_some_and(|reason| reason.moved && Path::new(&reason.came_from).ends_with(name));
    !is_refused && OWN_FILES.iter().any(|own| name == *own || name == partial(own).as_str())
}

/// The names of what oddscan did not write itself in an entry.
fn refused_files(folder: &Path) -> io::Result<Vec<OsString>> {
    let names: io::Result<Vec<OsString>> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect();
    let mut names = names?;
    let reason = ReasonFile::read(folder);
    names.retain(|name| !is_own(name, reason.as_ref()));
    Ok(names)
}

/// Whether there is something in an entry that oddscan did not write itself.
pub fn has_refused_file(folder: &Path) -> bool {
    // What cannot be read may be a scan.
    refused_files(folder).map_or(true, |names| !names.is_empty())
}

/// Name of the one file, or of the folder of a series, beside the reason.
pub fn refused_file(folder: &Path) -> io::Result<OsString> {
    let text = match &refused_files(folder)?[..] {
        [file] => return Ok(file.clone()),
        [] => {
            "its file was not moved here and is still in the incoming folder; change or replace it \
             there, and it is read again"
                .to_owned()
        }
        more => format!(
            "there are {} files, and only one is the scan; move the others out of {}",
            more.len(),
            folder.display()
        ),
    };
    Err(io::Error::new(io::ErrorKind::NotFound, text))
}

/// Removes an entry without a file: its reason and its picture.
///
/// # Errors
/// [`io::ErrorKind::DirectoryNotEmpty`] if there is a file.
pub fn remove_reason(folder: &Path) -> io::Result<()> {
    if has_refused_file(folder) {
        return Err(io::ErrorKind::DirectoryNotEmpty.into());
    }
    remove_entry(folder)
}

/// Deletes a refused file, its reason and its picture for good.
///
/// # Errors
/// If there is no such entry, or it cannot be deleted.
pub fn drop_entry(quarantine: &Path, name: &Path) -> io::Result<()> {
    remove_entry(&folder_of(quarantine, name)?)
}

/// Removes an entry with all that is in it. After a kill nothing of it is visible: somebody could
/// put back a part of a series.
pub fn remove_entry(folder: &Path) -> io::Result<()> {
    for count in 0_u64.. {
        let hidden = folder.with_file_name(format!("{DROPPED}{count}"));
        match steps::rename_new(folder, &hidden) {
            Ok(()) => return steps::remove_tree(&hidden),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}
