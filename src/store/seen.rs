//! Which files intake has seen, and what it decided about them.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::{db::Store, error::StoreError, record};
use crate::domain::{
    left_alone::LeftAlone,
    scan::{FileStamp, ScanId},
    series_key::SeriesKey,
};

/// The decision about a file with this size and these times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenFile {
    look: FileStamp,
    /// The decision about the file.
    pub outcome: SeenOutcome,
    /// Series that the DICOM file or zip belongs to; empty if it has no readable header. `None` for
    /// other files, and if it was decided before series were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub series: Option<Vec<SeriesKey>>,
    /// When the file was first found missing, seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    absent_since_secs: Option<u64>,
}

/// A decision about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeenOutcome {
    /// Accepted as this scan.
    Accepted(ScanId),
    /// A copy of this scan.
    Duplicate(ScanId),
    /// Refused. The file is in quarantine, unless it could not be moved. Stores of earlier versions
    /// say this for files that were left alone, too.
    Quarantined,
    /// No scan for oddscan. The file stays where it is.
    LeftAlone(LeftAlone),
    /// The file is being read. If a start finds this, the process died while it read the file.
    Reading {
        /// How often reading began.
        attempts: u32,
    },
}

impl SeenFile {
    /// A decision about a file with this size and these times.
    pub fn new(look: FileStamp, outcome: SeenOutcome) -> Self {
        Self { look, outcome, series: None, absent_since_secs: None }
    }

    /// The same decision about a DICOM file of these series.
    pub fn of_series(self, series: Option<Vec<SeriesKey>>) -> Self {
        Self { series, ..self }
    }

    /// A decision about a file that oddscan itself has moved away at this time, seconds since 1970.
    pub fn moved_away(look: FileStamp, outcome: SeenOutcome, now_secs: u64) -> Self {
        Self { look, outcome, series: None, absent_since_secs: Some(now_secs) }
    }

    /// The files that a decision about this file concerns, too.
    fn fellows(&self, path: &[u8]) -> impl Iterator<Item = Fellows> {
        let keys = self.series.clone().unwrap_or_default();
        let folder = keys.is_empty().then(|| Fellows::Folder(folder_of(path).to_vec()));
        keys.into_iter().map(|key| Fellows::Study(key.study)).chain(folder)
    }

    /// Whether the file still has the same size and times.
    pub fn is_same(&self, look: &FileStamp) -> bool {
        self.look == *look
    }
}

/// A decision that files share: of one study or of one folder, with one outcome.
pub type Decision = (Fellows, SeenOutcome);

/// What the files of a decision have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Fellows {
    /// DICOM files of this study ([`SeriesKey::study`]), wherever they lie.
    Study(u64),
    /// Files whose study is not known, of the folder with this path.
    Folder(Vec<u8>),
}

/// The decisions about the files of the incoming folder, as [`Store::forget_missing`] finds them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SeenFiles {
    /// Files that are there and were left alone, with the reason.
    pub left_alone: Vec<(Vec<u8>, LeftAlone)>,
    /// Decisions of which a file has just gone: it had been left alone, or refused where it lay.
    pub shrunk: HashSet<Decision>,
}

/// The path of a file's folder, without a slash at its end. It is empty for the incoming folder.
fn folder_of(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
    &path[..end]
}

impl Store {
    /// The decision about the file at a path, if there is one.
    pub fn seen(&self, path: &[u8]) -> Result<Option<SeenFile>, StoreError> {
        let value = self.seen.get(path)?;
        value.map(|value| record::open_json(&value, "seen file", b"")).transpose()
    }

    /// Stores the decision about the file at a path.
    pub fn put_seen(&self, path: &[u8], seen: &SeenFile) -> Result<(), StoreError> {
        self.seen.insert(path, record::seal_json(seen))?;
        Ok(())
    }

    /// Removes the decision about the file at a path.
    pub fn forget_seen(&self, path: &[u8]) -> Result<(), StoreError> {
        self.seen.remove(path)?;
        Ok(())
    }

    /// Looks at all decisions, and removes those about files that have been missing for
    /// `patience_secs`. It waits that long because an unmounted share looks empty: otherwise all
    /// its files would be read again later.
    pub fn forget_missing(
        &self,
        is_there: impl Fn(&[u8]) -> bool,
        now_secs: u64,
        patience_secs: u64,
    ) -> Result<SeenFiles, StoreError> {
        let mut found = SeenFiles::default();
        for entry in self.seen.iter() {
            let (path, value) = entry?;
            let seen: SeenFile = record::open_json(&value, "seen file", b"")?;
            let absent_since_secs = match (is_there(&path), seen.absent_since_secs) {
                (true, _) => None,
                (false, since) => Some(since.unwrap_or(now_secs)),
            };

            if let (SeenOutcome::LeftAlone(reason), None) = (seen.outcome, absent_since_secs) {
                found.left_alone.push((path.to_vec(), reason));
            }
            let was_there = seen.absent_since_secs.is_none();
            let is_open =
                matches!(seen.outcome, SeenOutcome::LeftAlone(_) | SeenOutcome::Quarantined);
            if is_open && was_there && absent_since_secs.is_some() {
                found.shrunk.extend(seen.fellows(&path).map(|fellows| (fellows, seen.outcome)));
            }

            if absent_since_secs.is_some_and(|since| now_secs >= since + patience_secs) {
                self.seen.remove(path)?;
            } else if absent_since_secs != seen.absent_since_secs {
                self.put_seen(&path, &SeenFile { absent_since_secs, ..seen })?;
            }
        }
        Ok(found)
    }

    /// Forgets decisions, so that their files are considered again. Returns how many these are.
    /// Files for whose path `is_alone` holds keep theirs: no other file has a part in it. `alive`
    /// is called for every file.
    pub fn forget_decisions(
        &self,
        decisions: &HashSet<Decision>,
        is_alone: impl Fn(&[u8]) -> bool,
        mut alive: impl FnMut(),
    ) -> Result<usize, StoreError> {
        let mut n_forgotten = 0;
        for entry in self.seen.iter() {
            alive();
            let (path, value) = entry?;
            let seen: SeenFile = record::open_json(&value, "seen file", b"")?;
            let is_forgotten = |fellows| decisions.contains(&(fellows, seen.outcome));
            let is_there = seen.absent_since_secs.is_none();
            if is_there && !is_alone(&path) && seen.fellows(&path).any(is_forgotten) {
                self.seen.remove(path)?;
                n_forgotten += 1;
            }
        }
        Ok(n_forgotten)
    }
}
