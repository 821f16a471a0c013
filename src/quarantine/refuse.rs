//! Refuses files: moves them into quarantine, or explains why they stay.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tracing::warn;

use super::{
    draft::Draft,
    leaving::{Leaver, Leaving, Outcome},
    reason::{Content, LEAVING, PICTURE, ReasonFile, is_reserved, look},
};
use crate::{
    domain::{error::Refusal, scan::FileStamp},
    files::{common_folder, remove_if_there, sync_folder},
};

/// A file that is refused.
#[derive(Debug, Clone, Copy)]
pub struct Source<'s> {
    /// The file.
    pub path: &'s Path,
    /// Its size and times when it was read. With other ones it is another file, to which the
    /// refusal does not apply. `None` for a file that only oddscan writes.
    pub look: Option<FileStamp>,
}

/// What became of a refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// This folder in quarantine has the reason. The reason says whether the files are there, too.
    Entry(PathBuf),
    /// The files have changed or are gone, so that the refusal does not apply. Nothing has been
    /// done.
    Changed,
}

/// What a refusal is about.
#[derive(Clone, Copy)]
struct Case<'c> {
    quarantine: &'c Path,
    came_from: &'c Path,
    refusal: &'c Refusal,
    now_secs: u64,
}

impl<'c> Case<'c> {
    fn name(&self) -> io::Result<&'c OsStr> {
        self.came_from.file_name().ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

/// Held while an entry is made. Another stage must not take it for one that a kill left.
static WORKING: Mutex<()> = Mutex::new(());

/// Waits until no entry is being made.
pub fn working() -> MutexGuard<'static, ()> {
    WORKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Moves a refused file to `<quarantine>/<reason>/<name>/<name>` with a `reason.json` beside it,
/// and a `registration.png` if the refusal has a picture. The name is that of `came_from`.
///
/// A file that cannot be moved (read-only share) or must not be moved (a link, a folder) stays, and
/// the reason says so.
///
/// # Errors
/// If the quarantine is full or away. Then the file is where it was.
pub fn quarantine(
    quarantine: &Path,
    source: Source<'_>,
    came_from: &Path,
    refusal: &Refusal,
    now_secs: u64,
) -> io::Result<Refused> {
    let _working = working();
    let case = Case { quarantine, came_from, refusal, now_secs };
    let name = case.name()?;
    match Leaver::new(source.path, source.look, Path::new(name)) {
        Ok(Some(leaver)) if !is_reserved(name) || name == PICTURE => {
            refuse(case, vec![leaver], true)
        }
        Ok(None) if source.look.is_some() => Ok(Refused::Changed),
        Err(error) if !must_stay(&error) => Err(error),
        // It is gone, or may not be moved, or its name is taken in every entry.
        _ => Ok(Refused::Entry(explain(case, content_of(source))?)),
    }
}

/// Writes the reason of a refusal, and leaves the file where it is: somebody has it open for
/// writing, and would go on writing into the quarantine.
///
/// # Errors
/// If the reason cannot be written.
pub fn refuse_in_place(
    quarantine: &Path,
    source: Source<'_>,
    came_from: &Path,
    refusal: &Refusal,
    now_secs: u64,
) -> io::Result<Refused> {
    let _working = working();
    let case = Case { quarantine, came_from, refusal, now_secs };
    explain(case, content_of(source)).map(Refused::Entry)
}

/// Moves the files of a refused series to `<quarantine>/<reason>/<name>/<name>/`, with one
/// `reason.json` beside that folder. The name is that of `came_from`, which need not exist.
///
/// Files from several folders keep the folders that they do not have in common: two of them may
/// have one name.
///
/// Without files, only the reason is written. Files that cannot be moved stay where they are, and
/// the reason says so.
///
/// # Errors
/// If the quarantine is full or away. Then all files are where they were.
pub fn quarantine_series(
    quarantine: &Path,
    sources: &[Source<'_>],
    came_from: &Path,
    refusal: &Refusal,
    now_secs: u64,
) -> io::Result<Refused> {
    let _working = working();
    let case = Case { quarantine, came_from, refusal, now_secs };
    let target = Path::new(case.name()?);
    let common = common_folder(sources.iter().map(|source| source.path));

    let (mut leavers, mut some_stay) = (Vec::new(), sources.is_empty());
    for source in sources {
        let place = source.path.strip_prefix(common).map_err(|_| io::ErrorKind::InvalidInput)?;
        match Leaver::new(source.path, source.look, &target.join(place)) {
            Ok(leaver) => leavers.extend(leaver),
            Err(error) if must_stay(&error) => some_stay = true,
            Err(error) => return Err(error),
        }
    }
    match leavers.len() {
        0 if some_stay => {
            let looks = sources.iter().filter_map(|source| source.look);
            explain(case, Content::of(looks)).map(Refused::Entry)
        }
        0 => Ok(Refused::Changed),
        n_leavers => refuse(case, leavers, n_leavers == sources.len()),
    }
}

/// Whether a file must stay where it is, because of its kind or because oddscan may not move it.
fn must_stay(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::PermissionDenied)
}

/// Content of one file. A folder counts as one thing, whatever it holds.
fn content_of(source: Source<'_>) -> Option<Content> {
    let now = || fs::symlink_metadata(source.path).ok().map(|about| look(&about));
    Content::of(source.look.or_else(now))
}

/// Makes an entry without files.
fn explain(case: Case<'_>, content: Option<Content>) -> io::Result<PathBuf> {
    let draft = Draft::new(case.quarantine, case.refusal)?;
    let reason =
        ReasonFile { content, ..ReasonFile::new(case.refusal, case.came_from, case.now_secs) };
    draft.add_picture(case.refusal);
    let made = reason.write(&draft.folder).and_then(|()| sync_folder(&draft.folder));
    let made = made.and_then(|()| draft.publish(case.name()?, Some(&reason)));
    if made.is_err() {
        draft.remove().ok();
    }
    made
}

/// Makes an entry with files.
fn refuse(case: Case<'_>, files: Vec<Leaver>, are_all: bool) -> io::Result<Refused> {
    let reason = ReasonFile::new(case.refusal, case.came_from, case.now_secs);
    let reason = ReasonFile { moved: are_all, ..reason };
    let mut leaving = Leaving { reason, name: case.name()?.into(), files };

    let draft = Draft::new(case.quarantine, case.refusal)?;
    if case.name()? != PICTURE {
        draft.add_picture(case.refusal);
    }
    let begun = leaving.write(&draft.folder);
    match begun.and_then(|()| bring_in(&draft, &mut leaving)) {
        Err(error) => {
            if leaving.undo(&draft.folder) {
                draft.remove().ok();
            }
            Err(error)
        }
        Ok(Brought::Files) => Ok(Refused::Entry(end(&draft, &leaving))),
        Ok(nothing) => {
            draft.remove().ok();
            if nothing == Brought::Changed {
                return Ok(Refused::Changed);
            }
            let content = Content::of(leaving.looks(&draft.folder));
            Ok(Refused::Entry(explain(case, content)?))
        }
    }
}

/// What is in an entry after all files have been tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Brought {
    /// At least one file, and the reason.
    Files,
    /// Nothing: oddscan may not move the files.
    Stays,
    /// Nothing: the files are other files now.
    Changed,
}

/// Takes the files in, and writes the reason with the outcome. It may run again after a kill.
pub fn bring_in(draft: &Draft, leaving: &mut Leaving) -> io::Result<Brought> {
    let folder = &draft.folder;
    let outcomes = leaving.take(folder)?;
    if !outcomes.contains(&Outcome::Taken) {
        let stays = outcomes.contains(&Outcome::Stays);
        return Ok(if stays { Brought::Stays } else { Brought::Changed });
    }
    leaving.reason.moved &= outcomes.iter().all(|outcome| *outcome == Outcome::Taken);
    leaving.reason.content = Content::of(leaving.looks(folder));
    leaving.reason.write(folder)?;
    leaving.sync_places(folder)?;
    Ok(Brought::Files)
}

/// Makes a whole entry visible. Returns its folder, which keeps its hidden name if that fails: the
/// files are safe in it, and [`finish`](super::finish) tries again.
pub fn end(draft: &Draft, leaving: &Leaving) -> PathBuf {
    let name = std::ffi::OsString::from(&leaving.name);
    let ended = remove_if_there(&draft.folder.join(LEAVING))
        .and_then(|()| draft.publish(&name, Some(&leaving.reason)));
    ended.unwrap_or_else(|error| {
        warn!(error = %error.kind(), "an entry of the quarantine is not visible yet");
        draft.folder.clone()
    })
}
