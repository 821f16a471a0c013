//! What happens to a scan that could not be encoded.

use std::{io, path::Path};

use tracing::warn;

use crate::{
    domain::{
        error::{DeviceError, QuarantineReason, Refusal, ScanError, panic_text},
        scan::{ScanRecord, ScanState},
    },
    metrics::Stage,
    pipeline::{Shared, now_secs},
    quarantine,
};

/// Sends a scan that can never work to quarantine. Returns errors that end the service.
pub(super) fn fail(shared: &Shared, record: ScanRecord, error: ScanError) -> Result<(), ScanError> {
    match error {
        ScanError::Refused(refusal) => send_to_quarantine(shared, record, &refusal),
        // If a device fails with this scan several times, the scan may be the cause. So the journal
        // keeps the attempt. The service manager restarts the daemon.
        ScanError::Device(DeviceError::Failed { .. }) => Err(error),
        ScanError::Device(DeviceError::OutOfMemory { .. }) | ScanError::Store(_) => {
            put_back(shared, record)?;
            Err(error)
        }
        ScanError::Io { .. } | ScanError::Internal { .. } => {
            warn!(scan = %record.id, %error, "encoding failed; the scan waits for the next start");
            put_back(shared, record)
        }
    }
}

/// Undoes the count of an attempt that did not end because of the scan.
pub(super) fn put_back(shared: &Shared, mut record: ScanRecord) -> Result<(), ScanError> {
    record.attempts -= 1;
    Ok(shared.store.put_record(&record)?)
}

/// Sends the archived copy of an accepted scan to quarantine. Its file in the incoming folder
/// stays.
pub(super) fn send_to_quarantine(
    shared: &Shared,
    mut record: ScanRecord,
    refusal: &Refusal,
) -> Result<(), ScanError> {
    let config = shared.config();
    let folder = &config.directories.quarantine;
    let source = shared.archive.scan(record.id);

    // A volume from DICOM files has no file in the incoming folder.
    let ScanRecord { came_from, source_name, .. } = &record;
    let is_file = Path::new(came_from).ends_with(source_name);
    let name = Path::new(if is_file { came_from } else { source_name });
    if let Err(error) = quarantine::quarantine(folder, &source, name, refusal, now_secs()) {
        let (scan, error) = (record.id, error.kind());
        warn!(%scan, %error, "quarantine is not available; the scan waits for the next start");
        // This was no crash. Earlier crashes stay counted.
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

/// The archived source may be missing after a kill between its move to quarantine and the journal
/// entry, or if somebody cleaned up the state folder.
pub(super) fn missing_source(error: ScanError) -> ScanError {
    match error {
        ScanError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => Refusal::new(
            QuarantineReason::Io,
            "no archived copy of the scan in the state folder",
            "the copy that was made when the scan arrived",
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
        "a scan that the encoder processes without a crash",
        "report it with the file, if it may be shared",
    )
    .into()
}
