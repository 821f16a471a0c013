//! Which files have been looked at, and what was decided on them.

use serde::{Deserialize, Serialize};

use super::{db::Store, error::StoreError, record};
use crate::domain::scan::{FileLook, ScanId};

/// What was decided on a file that looked like this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenFile {
    look: FileLook,
    /// What was decided.
    pub outcome: SeenOutcome,
    /// Since when the file has been missing, seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    absent_since_secs: Option<u64>,
}

/// What was decided on a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeenOutcome {
    /// Taken in as this scan.
    Accepted(ScanId),
    /// A copy of this scan.
    Duplicate(ScanId),
    /// Refused.
    Quarantined,
    /// It is being read; what a start finds so was in hand when the process died.
    Reading {
        /// Times that reading began.
        attempts: u32,
    },
}

impl SeenFile {
    /// Remembers a decision for a file that looks like this.
    pub fn new(look: FileLook, outcome: SeenOutcome) -> Self {
        Self { look, outcome, absent_since_secs: None }
    }

    /// Whether the file still looks the same.
    pub fn is_same(&self, look: &FileLook) -> bool {
        self.look == *look
    }
}

impl Store {
    /// What was decided on a path, if anything.
    pub fn seen(&self, path: &[u8]) -> Result<Option<SeenFile>, StoreError> {
        let value = self.seen.get(path)?;
        value.map(|value| record::open_json(&value, "seen file", b"")).transpose()
    }

    /// Remembers what was decided on a path.
    pub fn put_seen(&self, path: &[u8], seen: &SeenFile) -> Result<(), StoreError> {
        self.seen.insert(path, record::seal_json(seen))?;
        Ok(())
    }

    /// Forgets what was decided on a path.
    pub fn forget_seen(&self, path: &[u8]) -> Result<(), StoreError> {
        self.seen.remove(path)?;
        Ok(())
    }

    /// Forgets the paths that have been missing for `patience_secs`. Not sooner: a share that is
    /// unmounted for a while looks empty, and all its files would be read again afterwards.
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
