//! What becomes of a scan that could not be encoded.

use std::{io, path::Path};

use tracing::warn;

use crate::{
    domain::{
        error::{DeviceError, QuarantineReason, Refusal, ScanError},
        scan::{ScanRecord, ScanState},
    },
    metrics::Stage,
    pipeline::{Shared, now_secs, panic_text},
    quarantine,
};

/// Sets aside what will never work; what ends the service is handed back.
pub(super) fn fail(shared: &Shared, record: ScanRecord, error: ScanError) -> Result<(), ScanError> {
    match error {
        ScanError::Refused(refusal) => set_aside(shared, record, &refusal),
        // A device that fails with this scan again and again may fail because of it: the
        // journal keeps the attempt. The service manager starts us again.
        ScanError::Device(DeviceError::Failed { .. }) => Err(error),
        ScanError::Device(DeviceError::OutOfMemory { .. }) | ScanError::Store(_) => {
            put_back(shared, record)?;
            Err(error)
        }
        ScanError::Io { .. } | ScanError::Internal { .. } => {
            warn!(scan = %record.id, %error, "left for the next start");
            put_back(shared, record)
        }
    }
}

/// The scan is not to blame for the end of this attempt.
pub(super) fn put_back(shared: &Shared, mut record: ScanRecord) -> Result<(), ScanError> {
    record.attempts -= 1;
    Ok(shared.store.put_record(&record)?)
}

/// A scan that was accepted and turned out to be impossible. Its file in the incoming folder
/// stays; the archived copy goes to quarantine.
pub(super) fn set_aside(
    shared: &Shared,
    mut record: ScanRecord,
    refusal: &Refusal,
) -> Result<(), ScanError> {
    let config = shared.config();
    let folder = &config.directories.quarantine;
    let source = shared.archive.scan(record.id);
    // A volume made of DICOM files has no place of its own.
    let ScanRecord { came_from, source_name, .. } = &record;
    let is_file = Path::new(came_from).ends_with(source_name);
    let name = Path::new(if is_file { came_from } else { source_name });
    if let Err(error) = quarantine::quarantine(folder, &source, name, refusal, now_secs()) {
        let (scan, error) = (record.id, error.kind());
        warn!(%scan, %error, "quarantine is not available; the scan is left for the next start");
        // No crash; those that were stay counted.
        return if refusal.reason == QuarantineReason::Poison {
            Ok(())
        } else {
            put_back(shared, record)
        };
    }
    warn!(scan = %record.id, %refusal, "an accepted scan went to quarantine");
    let _changing = shared.archive.changing();
    record.state = ScanState::Quarantined { refusal: refusal.clone() };
    shared.store.put_record(&record)?;
    shared.archive.remove(record.id)?;
    shared.metrics.quarantined(refusal.reason);
    shared.metrics.quarantine_files(quarantine::count_quarantined(folder));
    shared.board.update().n_quarantined += 1;
    Ok(())
}

/// The archived source may be gone after a kill between its move to quarantine and the journal
/// entry, or when somebody tidied up the state folder.
pub(super) fn missing_source(error: ScanError) -> ScanError {
    match error {
        ScanError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => Refusal::new(
            QuarantineReason::Io,
            "no archived copy of the scan in the state folder",
            "the copy that was made when the scan came in",
            "put the scan into the incoming folder again",
        )
        .into(),
        other => other,
    }
}

pub(super) fn crashed(shared: &Shared, panic: &(dyn std::any::Any + Send)) -> ScanError {
    shared.metrics.stage_panicked(Stage::Encode);
    Refusal::new(
        QuarantineReason::Poison,
        format!("a crash while encoding ({})", panic_text(panic)),
        "none",
        "report it with the file, if it may be shared",
    )
    .into()
}
