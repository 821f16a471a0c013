//! Puts refused files back into the incoming folder.
//!
//! On one file system that is one rename. Otherwise intake sees a copy only when it is whole, and
//! the entry goes after that. The plan is written into the entry first (`.returning`), so that a
//! kill leaves the file whole in one of the two places, and [`settle`] tidies up.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    entries::{folder_of, has_refused_file, refused_file, remove_entry},
    leaving::Name,
    reason::{Content, RETURNING, ReasonFile, is_hidden},
};
use crate::files::{
    MARK, copy_durably, make_folders, remove_all_if_there, remove_if_there, steps, sync_folder,
};

/// A line of `.returning`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Begun {
        hidden: Name,
        to: Name,
    },
    /// The copy is whole, and is about to get its name. Folders keep only their number.
    Copied {
        number: u64,
        content: Option<Content>,
    },
}

/// Puts a refused file back where it came from, so that it is read again, and removes the reason.
/// Returns the file's path.
///
/// # Errors
/// If there is no such entry, its file was never moved, another file is beside it, another file
/// has taken its place, it holds a link, or another process puts it back. Then nothing has changed.
/// No other error loses anything: the next try continues.
pub fn requeue(quarantine: &Path, name: &Path, incoming: &Path) -> io::Result<PathBuf> {
    let folder = folder_of(quarantine, name)?;
    let plan = Plan::open(&folder)?;
    plan.settle(&folder, incoming)?;
    let place = arrive(&folder, incoming, &plan).inspect_err(|_| {
        remove_if_there(&folder.join(RETURNING)).ok();
    })?;
    // The file is back. What is left of the entry goes now, or with `settle`.
    sync_folder(place.parent().unwrap_or(incoming))?;
    remove_entry(&folder)?;
    Ok(place)
}

/// Gives the file its place in the incoming folder. Returns the place.
fn arrive(folder: &Path, incoming: &Path, plan: &Plan) -> io::Result<PathBuf> {
    let file = refused_file(folder)?;
    let source = folder.join(&file);
    let about = fs::symlink_metadata(&source)?;
    must_be_plain(&source)?;

    let parent = ReasonFile::read(folder).map(|reason| PathBuf::from(reason.came_from));
    let parent = parent.and_then(|path| Some(path.parent()?.to_owned())).unwrap_or_default();
    // oddscan wrote the path, but somebody may have edited it.
    let is_within = parent.components().all(|part| matches!(part, Component::Normal(_)));
    let target = incoming.join(if is_within { parent } else { PathBuf::new() });
    make_folders(&target)?;

    let place = target.join(&file);
    let hidden = target.join(format!("{MARK}{}", about.ino()));
    plan.begin(&hidden, &place);
    let arrived = match steps::rename_new(&source, &place) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            copy_back(&source, &hidden, &place, plan).inspect_err(|_| {
                remove_all_if_there(&hidden).ok();
            })
        }
        renamed => renamed,
    };
    match arrived {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let text = format!("{} exists already; move it away first", place.display());
            Err(io::Error::new(io::ErrorKind::AlreadyExists, text))
        }
        arrived => arrived.map(|()| place),
    }
}

/// Copies a file or a folder of files. It has its name only when it is whole.
fn copy_back(source: &Path, hidden: &Path, place: &Path, plan: &Plan) -> io::Result<()> {
    remove_all_if_there(hidden)?;
    let before = Content::at(source);
    copy_all(source, hidden)?;
    if before.is_none() || Content::at(source) != before {
        let text = "somebody is writing to it; try again later";
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
    }

    plan.copied(hidden)?;
    steps::rename_new(hidden, place)
}

fn copy_all(source: &Path, target: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(source)?.is_dir() {
        copy_durably(source, target, u64::MAX, || {})?;
        return Ok(());
    }
    steps::make_folder(target)?;
    for entry in fs::read_dir(source)? {
        let name = entry?.file_name();
        copy_all(&source.join(&name), &target.join(&name))?;
    }
    sync_folder(target)
}

/// Links in an entry could lead anywhere, and a pipe has no end.
fn must_be_plain(path: &Path) -> io::Result<()> {
    let about = fs::symlink_metadata(path)?;
    if about.is_dir() {
        return fs::read_dir(path)?.try_for_each(|entry| must_be_plain(&entry?.path()));
    }
    if about.is_file() {
        return Ok(());
    }
    let text = format!("{} is no regular file; remove it first", path.display());
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

/// Tidies up after a return that was killed. An entry whose file has arrived goes; otherwise the
/// file stays in the entry, and its unfinished copy goes.
///
/// # Errors
/// If another process is putting the file back, or the disk fails.
pub fn settle(folder: &Path, incoming: &Path) -> io::Result<()> {
    if folder.join(RETURNING).symlink_metadata().is_err() {
        return Ok(());
    }
    let plan = Plan::open(folder)?;
    if plan.settle(folder, incoming).is_ok() {
        remove_if_there(&folder.join(RETURNING))?;
    }
    Ok(())
}

/// The open file `.returning`. It is locked, so that two processes do not put one file back.
struct Plan {
    file: File,
    path: PathBuf,
}

impl Plan {
    fn open(folder: &Path) -> io::Result<Self> {
        let path = folder.join(RETURNING);
        let file = fs::symlink_metadata(&path).map_or(Ok(()), |about| {
            about.is_file().then_some(()).ok_or(io::ErrorKind::InvalidInput.into())
        });
        let file = file.and_then(|()| steps::append(&path))?;
        match file.try_lock() {
            Err(fs::TryLockError::WouldBlock) => {
                let text = "another process is putting it back";
                Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
            }
            // Some network file systems have no locks.
            _ => Ok(Self { file, path }),
        }
    }

    /// Notes where the file is to go. On a full disk a rename is possible without the note.
    fn begin(&self, hidden: &Path, to: &Path) {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let (hidden, to) = (absolute(hidden), absolute(to));
        let line = Line::Begun { hidden: hidden.as_os_str().into(), to: to.as_os_str().into() };
        self.add(&line).ok();
    }

    fn copied(&self, hidden: &Path) -> io::Result<()> {
        let about = fs::symlink_metadata(hidden)?;
        let content = if about.is_dir() { None } else { Content::at(hidden) };
        self.add(&Line::Copied { number: about.ino(), content })
    }

    fn add(&self, line: &Line) -> io::Result<()> {
        let line = serde_json::to_string(line).map_err(io::Error::other)? + "\n";
        steps::write(&mut &self.file, &self.path, line.as_bytes())?;
        steps::sync(&self.file, &self.path)
    }

    /// What [`settle`] does.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] if the entry is gone now, because its file had arrived.
    fn settle(&self, folder: &Path, incoming: &Path) -> io::Result<()> {
        let text = fs::read_to_string(&self.path)?;
        let lines: Vec<Line> =
            text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let [Line::Begun { hidden, to }, copied @ ..] = &lines[..] else { return Ok(()) };
        let [hidden, to] = [hidden, to].map(|name| PathBuf::from(std::ffi::OsString::from(name)));

        if has_arrived(folder, &to, copied.first()) {
            remove_entry(folder)?;
            let text = format!("it is back at {} already", to.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        let incoming = std::path::absolute(incoming)?;
        if hidden.starts_with(incoming) && hidden.file_name().is_some_and(is_hidden) {
            remove_all_if_there(&hidden)?;
        }
        steps::resize(&self.file, &self.path, 0)
    }
}

/// Whether the file of an entry has got to its place. A rename takes it out of the entry.
fn has_arrived(folder: &Path, to: &Path, copied: Option<&Line>) -> bool {
    if !has_refused_file(folder) {
        return true;
    }
    let Some(Line::Copied { number, content }) = copied else { return false };
    fs::symlink_metadata(to).is_ok_and(|about| {
        about.ino() == *number && (about.is_dir() || Content::at(to) == *content)
    })
}
