//! What happens when the state folder is found damaged: it is said, counted, and made good from
//! what is left.

use std::{io, path::Path};

use tracing::warn;

use super::{ARCHIVED, Shared, now_secs};
use crate::{
    domain::{
        damage::Damage,
        error::ScanError,
        scan::{ScanRecord, ScanState},
        time::utc,
    },
    prepare::{Source, id_of, read_again},
};

/// Reads the archived source of a scan, after comparing it with what was archived.
///
/// # Errors
/// [`ScanError::Lost`] if it is damaged or gone.
pub(super) fn read_archived(shared: &Shared, record: &ScanRecord) -> Result<Source, ScanError> {
    let archive = &shared.archive;
    let (scan, mask) = (archive.scan(record.id), archive.mask(record.id));
    let io = |source| ScanError::Io { doing: "reading an archived scan", source };
    let lost = |why: &str| ScanError::Lost { why: why.to_owned() };

    if let Some(facts) = &record.source {
        if let Some(why) = archive.check(record.id, facts).map_err(io)? {
            return Err(lost(why));
        }
    } else if !record.preprocess.as_ref().is_some_and(|done| done.scan_replaced)
        && id_of(&scan, &ARCHIVED).ok() != Some(record.id)
    {
        return Err(lost("its archived source is missing or has changed"));
    }

    read_again(record, &scan, mask.as_deref(), &ARCHIVED).map_err(|error| match error {
        ScanError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            lost("its archived source is missing")
        }
        ScanError::Refused(refusal) if record.source.is_none() => lost(&refusal.found),
        other => other,
    })
}

impl Shared {
    /// Moves a file to `lost+found`.
    pub(super) fn set_aside(&self, file: &Path, why: &str) -> Result<(), ScanError> {
        let moved = self.lost_and_found.put(file, &utc(now_secs()), why);
        match moved {
            Ok(_) => {
                warn!(why, "a file of the state folder was moved to lost+found");
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => {
                Err(ScanError::Internal { doing: "moving a file to lost+found", source })
            }
        }
    }

    /// Gives up what oddscan kept of a scan. Its file is read again if it is still there.
    pub(super) fn lose(&self, record: ScanRecord, why: &str) -> Result<(), ScanError> {
        let _changing = self.archive.changing();
        let (id, was_member) = (record.id, record.is_member());
        for file in self.archive.files(id) {
            self.set_aside(&file, why)?;
        }
        self.records.put(&ScanRecord {
            state: ScanState::Lost { why: why.to_owned() },
            attempts: 0,
            ..record
        })?;
        self.store.remove(&id)?;
        let n_files = self.seen.forget_scan(id)?;

        self.found_damaged(Damage::Source, 1);
        if was_member {
            self.requests.leaves_its_window(id);
        }
        warn!(
            scan = %id, why, n_files,
            "a scan was lost from the archive; its file is read again if it is still there"
        );
        Ok(())
    }
}
