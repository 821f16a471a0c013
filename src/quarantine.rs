//! The quarantine: it holds refused files, each with its reason, until a person takes them out.
//!
//! Only [`drop_entry`] deletes a scan here.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    domain::error::Refusal,
    files::{common_folder, move_file, remove_if_there, sync_folder, write_by_way_of},
};

const REASON: &str = "reason.json";
/// Shows where the template fits best in a scan that cannot be aligned.
const PICTURE: &str = "registration.png";

/// The content of `reason.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonFile {
    /// Name and version of this layout.
    pub schema: String,
    /// The reason, what was found, what was needed, and what to do.
    #[serde(flatten)]
    pub refusal: Refusal,
    /// The file's path within the incoming folder before it was moved.
    pub came_from: String,
    /// Time of the refusal, seconds since 1970.
    pub quarantined_at_secs: u64,
    /// Version of oddscan that refused it.
    pub oddscan_version: String,
    /// False if the file was not moved and is still in the incoming folder.
    pub moved: bool,
    /// What the file was when it was refused. `None` if nothing is known of it, as in earlier
    /// versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
}

/// The size and age of a file, or of all files of a series. It shows whether somebody has written
/// to them since. A rename changes none of this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Number of files.
    pub n_files: u64,
    /// Bytes of all files.
    pub n_bytes: u64,
    /// Latest change, nanoseconds since 1970.
    pub modified_ns: i64,
}

impl Content {
    /// The content of files, and of all files in folders. `None` if one cannot be looked at.
    fn of(paths: &[PathBuf]) -> Option<Self> {
        let mut all = Self { n_files: 0, n_bytes: 0, modified_ns: i64::MIN };
        for path in paths {
            let about = fs::symlink_metadata(path).ok()?;
            let one = if about.is_dir() {
                let inner: io::Result<Vec<PathBuf>> =
                    fs::read_dir(path).ok()?.map(|entry| Ok(entry?.path())).collect();
                let mut inner = inner.ok()?;
                inner.retain(|path| !is_left_by_viewers(path));
                Self::of(&inner)?
            } else {
                let seconds = about.mtime().wrapping_mul(1_000_000_000);
                let modified_ns = seconds.wrapping_add(about.mtime_nsec());
                Self { n_files: 1, n_bytes: about.len(), modified_ns }
            };
            all.n_files += one.n_files;
            all.n_bytes += one.n_bytes;
            all.modified_ns = all.modified_ns.max(one.modified_ns);
        }
        Some(all)
    }
}

/// Whether a desktop writes such a file into each folder that somebody looks at.
fn is_left_by_viewers(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.as_encoded_bytes().starts_with(b".") || name == "Thumbs.db" || name == "desktop.ini"
}

/// The number that a file keeps when it is renamed on its file system.
fn number_of(path: &Path) -> Option<(u64, u64)> {
    let about = fs::symlink_metadata(path).ok()?;
    Some((about.dev(), about.ino()))
}

impl ReasonFile {
    fn new(refusal: &Refusal, came_from: &Path, now_secs: u64, content: Option<Content>) -> Self {
        Self {
            schema: "oddscan/quarantine/1".to_owned(),
            refusal: refusal.clone(),
            came_from: came_from.to_string_lossy().into_owned(),
            quarantined_at_secs: now_secs,
            oddscan_version: env!("CARGO_PKG_VERSION").to_owned(),
            moved: true,
            content,
        }
    }
}

/// Moves a refused file to `<quarantine>/<reason>/<name>/<name>` with a `reason.json` beside it,
/// and a `registration.png` if the refusal has a picture. The name is that of `came_from`.
///
/// The reason is written first, so that every file there has an explanation. A file that cannot be
/// moved (read-only share) stays, and the reason says so. Returns the folder.
pub fn quarantine(
    quarantine: &Path,
    file: &Path,
    came_from: &Path,
    refusal: &Refusal,
    now_secs: u64,
) -> io::Result<PathBuf> {
    let (content, number) = (Content::of(&[file.to_owned()]), number_of(file));
    let (folder, name, mut reason) = new_entry(quarantine, came_from, refusal, now_secs, content)?;

    let target = folder.join(name);
    reason.moved = move_file(file, &target).is_ok();
    if !reason.moved {
        write_reason(&folder, &reason)?;
    } else if number != number_of(&target) {
        // It was copied to another file system, which may keep another time.
        reason.content = Content::of(&[target]);
        write_reason(&folder, &reason)?;
    }

    sync_folder(&folder)?;
    Ok(folder)
}

/// Writes the reason of a refusal, and leaves the file where it is: somebody has it open for
/// writing, and would go on writing into the quarantine. Returns the folder.
///
/// # Errors
/// If the reason cannot be written.
pub fn refuse_in_place(
    quarantine: &Path,
    file: &Path,
    came_from: &Path,
    refusal: &Refusal,
    now_secs: u64,
) -> io::Result<PathBuf> {
    let content = Content::of(&[file.to_owned()]);
    let (folder, _, mut reason) = new_entry(quarantine, came_from, refusal, now_secs, content)?;
    reason.moved = false;
    write_reason(&folder, &reason)?;
    sync_folder(&folder)?;
    Ok(folder)
}

/// Moves the files of a refused series to `<quarantine>/<reason>/<name>/<name>/`, with one
/// `reason.json` beside that folder. The name is that of `came_from`, which need not exist.
///
/// Files from several folders keep the folders that they do not have in common: two of them may
/// have one name.
///
/// Without files, only the reason is written. Files that cannot be moved stay where they are, and
/// the reason says so.
pub fn quarantine_series(
    quarantine: &Path,
    files: &[PathBuf],
    came_from: &Path,
    refusal: &Refusal,
    now_secs: u64,
) -> io::Result<PathBuf> {
    let content = Content::of(files);
    let first = files.first().and_then(|file| number_of(file));
    let (folder, name, mut reason) = new_entry(quarantine, came_from, refusal, now_secs, content)?;
    let target = folder.join(name);
    fs::create_dir(&target)?;

    let common = common_folder(files.iter().map(PathBuf::as_path));
    let has_moved = |file: &&PathBuf| move_below(file, common, &target).is_ok();
    let n_moved = files.iter().filter(has_moved).count();

    let moved_first = files.first().and_then(|file| number_of(&target.join(file.file_name()?)));
    if n_moved < files.len() || files.is_empty() {
        reason.moved = false;
        write_reason(&folder, &reason)?;
    } else if first != moved_first {
        // They were copied to another file system, which may keep other times.
        reason.content = Content::of(std::slice::from_ref(&target));
        write_reason(&folder, &reason)?;
    }
    if n_moved == 0 {
        // An empty folder would look like something that can be put back.
        fs::remove_dir_all(&target)?;
    }

    sync_folder(&folder)?;
    Ok(folder)
}

/// Moves a file to the place below `target` that it has below `common`.
fn move_below(file: &Path, common: &Path, target: &Path) -> io::Result<()> {
    let place = file.strip_prefix(common).map_err(|_| io::ErrorKind::InvalidInput)?;
    let place = target.join(place);
    if place.symlink_metadata().is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    fs::create_dir_all(place.parent().unwrap_or(target))?;
    move_file(file, &place)
}

/// Makes a folder with the reason and its picture. Both must exist before the files that they
/// explain.
fn new_entry<'n>(
    quarantine: &Path,
    came_from: &'n Path,
    refusal: &Refusal,
    now_secs: u64,
    content: Option<Content>,
) -> io::Result<(PathBuf, &'n OsStr, ReasonFile)> {
    let name = came_from.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let folder = free_folder(&quarantine.join(refusal.reason.name()), name)?;
    let reason = ReasonFile::new(refusal, came_from, now_secs, content);
    write_reason(&folder, &reason)?;

    if name != PICTURE {
        add_picture(&folder, refusal);
    }
    Ok((folder, name, reason))
}

/// Writes the picture of a refusal. If the disk is full, the refusal is kept without it.
fn add_picture(folder: &Path, refusal: &Refusal) {
    let Some(picture) = &refusal.picture else { return };
    if let Err(error) = write_whole(folder, PICTURE, &picture.0) {
        warn!(error = %error.kind(), "the picture of a refusal cannot be written");
        let _ = fs::remove_file(folder.join(partial(PICTURE)));
    }
}

/// Makes `<parent>/<name>`, or `<name>.2`, `.3`, ... if that exists already.
fn free_folder(parent: &Path, name: &OsStr) -> io::Result<PathBuf> {
    fs::create_dir_all(parent)?;
    for count in 1_u32.. {
        let mut unique = name.to_owned();
        if count > 1 {
            unique.push(format!(".{count}"));
        }
        match fs::create_dir(parent.join(&unique)) {
            Ok(()) => return Ok(parent.join(unique)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn write_reason(folder: &Path, reason: &ReasonFile) -> io::Result<()> {
    let text = serde_json::to_string_pretty(reason).map_err(io::Error::other)? + "\n";
    write_whole(folder, REASON, text.as_bytes())
}

fn write_whole(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    write_by_way_of(&folder.join(partial(name)), &folder.join(name), bytes)
}

fn partial(name: &str) -> String {
    format!(".{name}.tmp")
}

/// Number of refused files in quarantine; their reasons do not count.
pub fn count_quarantined(quarantine: &Path) -> usize {
    let children = |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten();
    children(quarantine.to_owned()).map(|reason| children(reason.path()).count()).sum()
}

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
        let reason = read_reason(&quarantine.join(&name));
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
    for reason in fs::read_dir(quarantine)? {
        let reason = reason?;
        if !reason.file_type()?.is_dir() {
            continue;
        }
        for entry in fs::read_dir(reason.path())? {
            names.push(Path::new(&reason.file_name()).join(entry?.file_name()));
        }
    }
    names.sort();
    Ok(names)
}

/// Looks for refused files that somebody has written to since: a sender may still have its file
/// open, and go on writing after a pause.
#[derive(Debug, Default)]
pub struct Recheck {
    /// The entry that was looked at last.
    last: PathBuf,
}

impl Recheck {
    /// The names of entries whose files have changed since they were refused. Each call looks at
    /// the next `max` entries, because a quarantine may have many.
    ///
    /// A file that was refused in the incoming folder is read again there when it changes. Its old
    /// reason is removed.
    ///
    /// # Errors
    /// If the quarantine cannot be read.
    pub fn changed(
        &mut self,
        quarantine: &Path,
        incoming: &Path,
        max: usize,
    ) -> io::Result<Vec<PathBuf>> {
        let mut names = names(quarantine)?;
        let start = names.partition_point(|name| *name <= self.last);
        names.rotate_left(start);
        names.truncate(max);
        if let Some(last) = names.last() {
            self.last.clone_from(last);
        }
        for folder in names.iter().map(|name| quarantine.join(name)) {
            if is_outdated(&folder, incoming) {
                // The next round tries again.
                remove_reason(&folder).ok();
            }
        }
        names.retain(|name| has_changed(&quarantine.join(name)));
        Ok(names)
    }
}

/// Whether an entry is about a file of the incoming folder that has changed. A file that is gone
/// may be on a share that is away.
fn is_outdated(folder: &Path, incoming: &Path) -> bool {
    let Some(ReasonFile { moved: false, content: Some(content), came_from, .. }) =
        read_reason(folder)
    else {
        return false;
    };
    // The names of a series are not known.
    let now = Content::of(&[incoming.join(came_from)]);
    content.n_files == 1 && now.is_some_and(|now| now != content)
}

/// Whether the file of an entry has changed. What somebody put beside it makes this unknown.
fn has_changed(folder: &Path) -> bool {
    let Some(ReasonFile { moved: true, content: Some(content), .. }) = read_reason(folder) else {
        return false;
    };
    let Ok(file) = refused_file(folder) else { return false };
    Content::of(&[folder.join(file)]).is_some_and(|now| now != content)
}

fn read_reason(folder: &Path) -> Option<ReasonFile> {
    serde_json::from_str(&fs::read_to_string(folder.join(REASON)).ok()?).ok()
}

/// The folder of an entry. Its name must be `<reason>/<name>` and nothing else.
fn folder_of(quarantine: &Path, name: &Path) -> io::Result<PathBuf> {
    let parts: Vec<Component<'_>> = name.components().collect();
    let is_plain = matches!(parts[..], [Component::Normal(_), Component::Normal(_)]);
    let folder = quarantine.join(name);
    // A link could lead out of the quarantine.
    if is_plain && folder.symlink_metadata().is_ok_and(|about| about.is_dir()) {
        return Ok(folder);
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "no such entry; `oddscan quarantine list` names them",
    ))
}

/// Puts a refused file back where it came from, so that it is read again, and removes the reason.
/// Returns the file's path.
///
/// # Errors
/// If there is no such entry, its file was never moved, another file is beside it, or another file
/// has taken its place. Then nothing has changed. No other error loses anything: the next try
/// continues.
pub fn requeue(quarantine: &Path, name: &Path, incoming: &Path) -> io::Result<PathBuf> {
    let folder = folder_of(quarantine, name)?;
    let file = refused_file(&folder)?;
    let parent = read_reason(&folder).map(|reason| PathBuf::from(reason.came_from));
    let parent = parent.and_then(|path| Some(path.parent()?.to_owned())).unwrap_or_default();

    // oddscan wrote the path, but somebody may have edited it.
    let is_within = parent.components().all(|part| matches!(part, Component::Normal(_)));
    let target = incoming.join(if is_within { parent } else { PathBuf::new() });
    fs::create_dir_all(&target)?;

    let place = target.join(&file);
    if place.symlink_metadata().is_ok() {
        let text = format!("{} exists already; move it away first", place.display());
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }

    // Intake ignores hidden names. So it sees a copy across file systems only when the copy is
    // whole.
    let mut hidden = OsString::from(".");
    hidden.push(&file);
    hidden.push(".partial");
    let hidden = target.join(hidden);
    move_file(&folder.join(&file), &hidden)?;
    fs::rename(hidden, &place)?;

    remove_reason(&folder)?;
    Ok(place)
}

/// Removes an entry without a file: its reason and its picture.
fn remove_reason(folder: &Path) -> io::Result<()> {
    for name in OWN_FILES.into_iter().flat_map(|name| [name.to_owned(), partial(name)]) {
        remove_if_there(&folder.join(name))?;
    }
    fs::remove_dir(folder)
}

/// The files that oddscan itself writes beside a refused file.
const OWN_FILES: [&str; 2] = [REASON, PICTURE];

/// Whether oddscan wrote this file of an entry. A DICOM file may have any name, even one of these.
fn is_own(name: &OsStr, reason: Option<&ReasonFile>) -> bool {
    let is_refused = reason.is_some_and(|reason| Path::new(&reason.came_from).ends_with(name));
    !is_refused && OWN_FILES.iter().any(|own| name == *own || name == partial(own).as_str())
}

/// Name of the one file, or of the folder of a series, beside the reason.
fn refused_file(folder: &Path) -> io::Result<OsString> {
    let names: io::Result<Vec<OsString>> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect();
    let mut names = names?;
    let reason = read_reason(folder);
    names.retain(|name| !is_own(name, reason.as_ref()));

    let text = match &names[..] {
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

/// Deletes a refused file, its reason and its picture for good.
///
/// # Errors
/// If there is no such entry, or it cannot be deleted.
pub fn drop_entry(quarantine: &Path, name: &Path) -> io::Result<()> {
    fs::remove_dir_all(folder_of(quarantine, name)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::error::QuarantineReason;

    #[test]
    fn quarantine_keeps_every_file_apart_and_explains_each() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = Refusal::new(QuarantineReason::Truncated, "9 bytes", "352", "export again");
        let mut places = Vec::new();
        for _ in 0..2 {
            let file = folder.path().join("a.nii");
            fs::write(&file, "x").unwrap();
            let into = folder.path().join("q");
            places.push(quarantine(&into, &file, Path::new("sub/a.nii"), &refusal, 7).unwrap());
            assert!(!file.exists());
        }
        assert_ne!(places[0], places[1]);
        assert!(places[1].join("a.nii").is_file());
        let text = fs::read_to_string(places[1].join("reason.json")).unwrap();
        let reason: ReasonFile = serde_json::from_str(&text).unwrap();
        assert_eq!((reason.refusal, reason.moved), (refusal, true));
        assert_eq!(count_quarantined(&folder.path().join("q")), 2);
    }

    fn refused(folder: &Path, came_from: &str) -> PathBuf {
        let file = folder.join("some file");
        fs::write(&file, "content").unwrap();
        let refusal = Refusal::new(QuarantineReason::Truncated, "9 bytes", "352", "export again");
        let into = folder.join("q");
        quarantine(&into, &file, Path::new(came_from), &refusal, 7).unwrap();
        into
    }

    #[test]
    fn an_entry_goes_back_to_where_it_came_from() {
        let folder = tempfile::tempdir().unwrap();
        let (q, incoming) = (refused(folder.path(), "sub-1/a.nii"), folder.path().join("in"));
        let listed = entries(&q).unwrap();
        assert_eq!(listed[0].name, Path::new("truncated/a.nii"));
        assert_eq!(listed[0].reason.as_ref().unwrap().refusal.found, "9 bytes");
        let place = requeue(&q, &listed[0].name, &incoming).unwrap();
        assert_eq!(place, incoming.join("sub-1/a.nii"));
        assert_eq!(fs::read_to_string(&place).unwrap(), "content");
        assert_eq!(entries(&q).unwrap(), []);
        // Another file of the same name is not put back while the first one is in the folder.
        refused(folder.path(), "sub-1/a.nii");
        let error = requeue(&q, &listed[0].name, &incoming).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(entries(&q).unwrap().len(), 1);
        drop_entry(&q, &listed[0].name).unwrap();
        assert_eq!((entries(&q).unwrap().len(), place.is_file()), (0, true));
    }

    #[test]
    fn the_picture_of_a_refusal_lies_beside_its_reason_and_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let (q, incoming) = (folder.path().join("q"), folder.path().join("in"));
        let refusal = Refusal::new(QuarantineReason::RegistrationFailed, "20 %", "31 %", "look")
            .with_picture(b"png".to_vec());
        // A DICOM file may have any name.
        for name in ["a.nii", "registration.png"] {
            let file = folder.path().join("some file");
            fs::write(&file, "content").unwrap();
            let place = quarantine(&q, &file, Path::new(name), &refusal, 7).unwrap();
            let entry = entries(&q).unwrap().remove(0);
            let picture = Path::new("registration_failed/a.nii/registration.png");
            let expected = (name == "a.nii").then(|| picture.to_owned());
            assert_eq!(entry.picture, expected);
            assert!(!fs::read_to_string(place.join("reason.json")).unwrap().contains("picture"));
            assert_eq!(fs::read(place.join(name)).unwrap(), b"content");
            if let Some(picture) = expected {
                assert_eq!(fs::read(q.join(picture)).unwrap(), b"png");
            }
            let back = requeue(&q, &entry.name, &incoming).unwrap();
            assert_eq!(fs::read(back).unwrap(), b"content");
            assert_eq!(entries(&q).unwrap(), []);
        }
        let file = folder.path().join("some file");
        fs::write(&file, "content").unwrap();
        let place = quarantine(&q, &file, Path::new("b.nii"), &refusal, 7).unwrap();
        drop_entry(&q, Path::new("registration_failed/b.nii")).unwrap();
        assert!(!place.exists());
    }

    #[test]
    fn a_refusal_stands_where_its_picture_cannot_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("entry");
        fs::create_dir_all(place.join("registration.png/in the way")).unwrap();
        let refusal = Refusal::new(QuarantineReason::RegistrationFailed, "20 %", "31 %", "look");
        add_picture(&place, &refusal.with_picture(b"png".to_vec()));
        assert_eq!(fs::read_dir(place).unwrap().count(), 1, "nothing half-written is left");
    }

    #[test]
    fn a_series_is_one_entry_and_goes_back_as_one_folder() {
        let folder = tempfile::tempdir().unwrap();
        let (q, incoming) = (folder.path().join("q"), folder.path().join("in"));
        fs::create_dir_all(incoming.join("study")).unwrap();
        let files = ["reason.json", "b.dcm"].map(|name| incoming.join("study").join(name));
        files.iter().for_each(|file| fs::write(file, "x").unwrap());
        let refusal = Refusal::new(QuarantineReason::BadHeader, "a gap", "none", "export again");
        let gone = [&files[..], &[incoming.join("study/gone.dcm")]].concat();
        let place = quarantine_series(&q, &gone, Path::new("study/5_T1"), &refusal, 7).unwrap();
        assert_eq!((count_quarantined(&q), entries(&q).unwrap().len()), (1, 1));
        assert!(!read_reason(&place).unwrap().moved, "one was gone");
        let back = requeue(&q, Path::new("bad_header/5_T1"), &incoming).unwrap();
        assert_eq!(back, incoming.join("study/5_T1"));
        assert!(back.join("reason.json").is_file() && back.join("b.dcm").is_file());
        assert_eq!(count_quarantined(&q), 0);
        // If no file could be moved, there is nothing to put back.
        let gone = [incoming.join("gone.dcm")];
        quarantine_series(&q, &gone, Path::new("6_T2"), &refusal, 7).unwrap();
        assert!(requeue(&q, Path::new("bad_header/6_T2"), &incoming).is_err());
    }

    #[test]
    fn files_of_one_name_from_several_folders_are_kept_apart() {
        let folder = tempfile::tempdir().unwrap();
        let (q, incoming) = (folder.path().join("q"), folder.path().join("in"));
        let files = ["cd/a/IM1", "cd/b/IM1", "cd/b/c/IM2"].map(|name| incoming.join(name));
        for file in &files {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, file.as_os_str().as_encoded_bytes()).unwrap();
        }
        let refusal = Refusal::new(QuarantineReason::BadHeader, "a gap", "none", "export again");
        let place = quarantine_series(&q, &files, Path::new("cd/5_T1"), &refusal, 7).unwrap();
        assert!(read_reason(&place).unwrap().moved);
        assert!(files.iter().all(|file| !file.exists()));

        let back = requeue(&q, Path::new("bad_header/5_T1"), &incoming).unwrap();
        assert_eq!(back, incoming.join("cd/5_T1"));
        for (file, name) in files.iter().zip(["a/IM1", "b/IM1", "b/c/IM2"]) {
            let content = fs::read(back.join(name)).unwrap();
            assert_eq!(content, file.as_os_str().as_encoded_bytes());
        }
    }

    #[test]
    fn no_name_and_no_reason_leads_out_of_the_folders() {
        let folder = tempfile::tempdir().unwrap();
        let (q, incoming) = (refused(folder.path(), "a.nii"), folder.path().join("in"));
        fs::create_dir_all(folder.path().join("other/thing")).unwrap();
        std::os::unix::fs::symlink(folder.path().join("other/thing"), q.join("truncated/link"))
            .unwrap();
        let outside = folder.path().join("other/thing");
        for name in
            ["../other/thing", "truncated", "truncated/link", "truncated/..", "", "/etc/ssl"]
                .map(PathBuf::from)
                .into_iter()
                .chain([outside.clone()])
        {
            assert!(drop_entry(&q, &name).is_err(), "{}", name.display());
            assert!(requeue(&q, &name, &incoming).is_err(), "{}", name.display());
        }
        assert!(outside.is_dir());
        let reason = q.join("truncated/a.nii/reason.json");
        let text = fs::read_to_string(&reason).unwrap().replace("\"a.nii\"", "\"../../x/a.nii\"");
        fs::write(&reason, text).unwrap();
        let place = requeue(&q, Path::new("truncated/a.nii"), &incoming).unwrap();
        assert_eq!(place, incoming.join("a.nii"));
    }

    #[test]
    fn what_somebody_put_beside_a_refused_file_is_neither_taken_for_it_nor_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let (q, name) = (refused(folder.path(), "a.nii"), Path::new("truncated/a.nii"));
        let note = q.join("truncated/a.nii/.DS_Store");
        fs::write(&note, "").unwrap();
        let error = requeue(&q, name, folder.path()).unwrap_err();
        assert!(error.to_string().contains("move the others out of"), "{error}");
        assert!(note.is_file() && q.join("truncated/a.nii/a.nii").is_file());
        fs::remove_file(note).unwrap();
        requeue(&q, name, folder.path()).unwrap();
        assert_eq!(entries(&q).unwrap(), []);
    }

    #[test]
    fn a_refused_file_that_grows_is_found_and_one_that_does_not_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let q = refused(folder.path(), "a.nii");
        refused(folder.path(), "b.nii");
        let series = ["1.dcm", "2.dcm"].map(|name| folder.path().join(name));
        series.iter().for_each(|file| fs::write(file, "x").unwrap());
        let refusal = Refusal::new(QuarantineReason::Corrupt, "x", "y", "z");
        quarantine_series(&q, &series, Path::new("5_T1"), &refusal, 7).unwrap();
        let mut recheck = Recheck::default();
        assert!(recheck.changed(&q, folder.path(), 9).unwrap().is_empty(), "a move is no change");

        fs::write(q.join("truncated/b.nii/b.nii"), "content and more").unwrap();
        fs::write(q.join("corrupt/5_T1/5_T1/2.dcm"), "xy").unwrap();
        let grown = ["corrupt/5_T1", "truncated/b.nii"].map(PathBuf::from);
        assert_eq!(recheck.changed(&q, folder.path(), 9).unwrap(), grown);
        // One after the other, and then from the start.
        let mut recheck = Recheck::default();
        let by_one = [(); 4].map(|()| recheck.changed(&q, folder.path(), 1).unwrap());
        let wanted =
            [vec![grown[0].clone()], vec![], vec![grown[1].clone()], vec![grown[0].clone()]];
        assert_eq!(by_one, wanted);
        // What somebody has put there is nothing that a sender goes on with.
        fs::write(q.join("truncated/b.nii/note"), "").unwrap();
        fs::remove_dir_all(q.join("corrupt")).unwrap();
        assert!(recheck.changed(&q, folder.path(), 9).unwrap().is_empty());
    }

    #[test]
    fn a_file_that_was_refused_in_place_has_a_reason_and_no_copy() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = Refusal::new(QuarantineReason::Truncated, "9 bytes", "352", "export again");
        let (q, file) = (folder.path().join("q"), folder.path().join("a.nii"));
        fs::write(&file, "half").unwrap();
        refuse_in_place(&q, &file, Path::new("a.nii"), &refusal, 7).unwrap();
        let listed = entries(&q).unwrap();
        assert!(file.is_file() && !listed[0].reason.as_ref().unwrap().moved);
        let error = requeue(&q, &listed[0].name, folder.path()).unwrap_err();
        assert!(error.to_string().contains("is still in the incoming folder"), "{error}");

        let mut recheck = Recheck::default();
        let mut left = || {
            assert!(recheck.changed(&q, folder.path(), 9).unwrap().is_empty());
            entries(&q).unwrap().len()
        };
        assert_eq!(left(), 1);
        fs::write(&file, "half, and the rest").unwrap();
        assert_eq!(left(), 0, "the reason no longer applies");
    }

    #[test]
    fn a_file_that_was_never_moved_is_said_to_lie_where_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let q = refused(folder.path(), "a.nii");
        fs::remove_file(q.join("truncated/a.nii/a.nii")).unwrap();
        let error = requeue(&q, Path::new("truncated/a.nii"), folder.path()).unwrap_err();
        assert!(error.to_string().contains("is still in the incoming folder"), "{error}");
    }
}
