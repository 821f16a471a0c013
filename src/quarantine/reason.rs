//! `reason.json`: why a file was refused, and what it was then.

use std::{
    ffi::OsStr,
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    domain::{error::Refusal, scan::FileStamp},
    files::{MARK, write_by_way_of},
};

pub const REASON: &str = "reason.json";
/// Shows where the template fits best in a scan that cannot be aligned.
pub const PICTURE: &str = "registration.png";
/// The list of files that are to go into an entry (`leaving.rs`).
pub const LEAVING: &str = ".leaving";
/// A copy that is not whole yet.
pub const COPY: &str = ".copy";
/// Where a file goes that is put back (`requeue.rs`).
pub const RETURNING: &str = ".returning";

/// The names of entries that are being deleted begin with this.
pub const DROPPED: &str = ".oddscan-drop-";

/// The files that oddscan itself writes beside a refused file.
pub const OWN_FILES: [&str; 5] = [REASON, PICTURE, LEAVING, COPY, RETURNING];

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

impl ReasonFile {
    pub(super) fn new(refusal: &Refusal, came_from: &Path, now_secs: u64) -> Self {
        Self {
            schema: "oddscan/quarantine/1".to_owned(),
            refusal: refusal.clone(),
            came_from: came_from.to_string_lossy().into_owned(),
            quarantined_at_secs: now_secs,
            oddscan_version: env!("CARGO_PKG_VERSION").to_owned(),
            moved: false,
            content: None,
        }
    }

    pub(super) fn read(entry: &Path) -> Option<Self> {
        serde_json::from_str(&fs::read_to_string(entry.join(REASON)).ok()?).ok()
    }

    pub(super) fn write(&self, entry: &Path) -> io::Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(io::Error::other)? + "\n";
        write_whole(entry, REASON, text.as_bytes())
    }

    /// Whether both say that a file was refused where it lies, and nothing has changed since.
    pub(super) fn repeats(&self, other: &Self) -> bool {
        let what = |reason: &Self| (reason.refusal.reason, reason.moved, reason.content);
        !self.moved && what(self) == what(other) && self.came_from == other.came_from
    }
}

/// Writes one of oddscan's own files of an entry.
pub fn write_whole(entry: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    write_by_way_of(&entry.join(partial(name)), &entry.join(name), bytes)
}

pub fn partial(name: &str) -> String {
    format!(".{name}.tmp")
}

/// Whether oddscan itself may give this name to a file in an entry.
pub fn is_reserved(name: &OsStr) -> bool {
    OWN_FILES.iter().any(|own| name == *own || name == partial(own).as_str()) || is_hidden(name)
}

/// Whether this is the name of an entry that is not whole yet, or is being deleted.
pub fn is_hidden(name: &OsStr) -> bool {
    [MARK, DROPPED].iter().any(|mark| name.as_encoded_bytes().starts_with(mark.as_bytes()))
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
    /// The content of several files together. `None` if there are none.
    pub(super) fn of(looks: impl IntoIterator<Item = FileStamp>) -> Option<Self> {
        looks.into_iter().map(Self::of_one).reduce(Self::and)
    }

    fn of_one(look: FileStamp) -> Self {
        Self { n_files: 1, n_bytes: look.size, modified_ns: look.modified_ns }
    }

    fn and(self, other: Self) -> Self {
        Self {
            n_files: self.n_files + other.n_files,
            n_bytes: self.n_bytes + other.n_bytes,
            modified_ns: self.modified_ns.max(other.modified_ns),
        }
    }

    /// The content of a file, or of all files in a folder. `None` if one cannot be looked at.
    pub(super) fn at(path: &Path) -> Option<Self> {
        let about = fs::symlink_metadata(path).ok()?;
        if !about.is_dir() {
            return Some(Self::of_one(look(&about)));
        }
        let inner: io::Result<Vec<PathBuf>> =
            fs::read_dir(path).ok()?.map(|entry| Ok(entry?.path())).collect();
        let mut all = Self { n_files: 0, n_bytes: 0, modified_ns: i64::MIN };
        for path in inner.ok()?.iter().filter(|path| !is_left_by_viewers(path)) {
            all = all.and(Self::at(path)?);
        }
        Some(all)
    }
}

/// Whether a desktop writes such a file into each folder that somebody looks at.
fn is_left_by_viewers(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.as_encoded_bytes().starts_with(b".") || name == "Thumbs.db" || name == "desktop.ini"
}

/// Size and times of a file, in the same form as intake has them.
pub fn look(about: &Metadata) -> FileStamp {
    let nanoseconds = |secs: i64, more: i64| secs.wrapping_mul(1_000_000_000).wrapping_add(more);
    FileStamp {
        size: about.len(),
        modified_ns: nanoseconds(about.mtime(), about.mtime_nsec()),
        changed_ns: nanoseconds(about.ctime(), about.ctime_nsec()),
    }
}
