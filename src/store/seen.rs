//! Which files intake has seen, and what it decided about them.

use serde::{Deserialize, Serialize};

use super::{db::Store, error::StoreError, record};
use crate::domain::scan::{FileStamp, ScanId};

/// The decision about a file with this size and these times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenFile {
    look: FileStamp,
    /// The decision about the file.
    pub outcome: SeenOutcome,
    /// When the file was first found missing, seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    absent_since_secs: Option<u64>,
}

/// A decision about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeenOutcome {
    /// Accepted as this scan.
    Accepted(ScanId),
    /// A copy of this scan.
    Duplicate(ScanId),
    /// Refused. The file is in quarantine, unless it could not be moved.
    Quarantined,
    /// The file is being read. If a start finds this, the process died while it read the file.
    Reading {
        /// How often reading began.
        attempts: u32,
    },
}

impl SeenFile {
    /// A decision about a file with this size and these times.
    pub fn new(look: FileStamp, outcome: SeenOutcome) -> Self {
        Self { look, outcome, absent_since_secs: None }
    }

    /// Whether the file still has the same size and times.
    pub fn is_same(&self, look: &FileStamp) -> bool {
        self.look == *look
    }
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

    /// Removes the decisions about files that have been missing for `patience_secs`. It waits that
    /// long because an unmounted share looks empty: otherwise all its files would be read again
    /// later.
    pub fn forget_missing(
        &self,
        is_there: impl Fn(&[u8]) -> bool,
        now_secs: u64,
        patience_secs: u64,
    ) -> Result<(), StoreError> {
        for entry in self.seen.iter() {
            let (path, value) = entry?;
            let seen: SeenFile = record::open_json(&value, "seen file", b"")?;
            let absent_since_secs = match (is_there(&path), seen.absent_since_secs) {
                (true, _) => None,
                (false, since) => Some(since.unwrap_or(now_secs)),
            };

            if absent_since_secs.is_some_and(|since| now_secs >= since + patience_secs) {
                self.seen.remove(path)?;
            } else if absent_since_secs != seen.absent_since_secs {
                self.put_seen(&path, &SeenFile { absent_since_secs, ..seen })?;
            }
        }
        Ok(())
    }
}
