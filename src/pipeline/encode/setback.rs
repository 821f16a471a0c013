//! What happens to a scan that could not be encoded.

use std::path::Path;

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
        // If a device fails with this scan several times, the scan may be the cause. So the ledger
        // keeps the attempt. The service manager restarts the daemon.
        ScanError::Device(DeviceError::Failed { .. }) => Err(error),
        ScanError::Device(DeviceError::OutOfMemory { .. }) | ScanError::Store(_) => {
            put_back(shared, record)?;
            Err(error)
        }
        ScanError::Ledger(_) => Err(error),
        ScanError::Lost { why } => shared.lose(record, &why),
        ScanError::Io { .. } | ScanError::Internal { .. } => {
            let scan = record.id;
            warn!(%scan, %error, "encoding failed; trying again later");
            put_back(shared, record)?;
            shared.requests.encode_again(scan, shared.config().intake.rescan);
            Ok(())
        }
    }
}

/// Undoes the count of an attempt that did not end because of the scan.
pub(super) fn put_back(shared: &Shared, mut record: ScanRecord) -> Result<(), ScanError> {
    record.attempts -= 1;
    shared.records.put(&record)
}

/// Sends the archived copy of an accepted scan to quarantine. Its file in the incoming folder
/// stays.
pub(super) fn send_to_quarantine(
    shared: &Shared,
    record: ScanRecord,
    refusal: &Refusal,
) -> Result<(), ScanError> {
    // First the record: after a kill, the next start moves the file.
    let refused = ScanState::Quarantined { refusal: refusal.clone() };
    let refused = ScanRecord { state: refused, ..record.clone() };
    {
        let _changing = shared.archive.changing();
        shared.records.put(&refused)?;
    }
    if !move_to_quarantine(shared, &refused, refusal) {
        // This was no crash. Earlier crashes stay counted.
        let is_poison = refusal.reason == QuarantineReason::Poison;
        shared.requests.encode_again(record.id, shared.config().intake.rescan);
        return if is_poison { shared.records.put(&record) } else { put_back(shared, record) };
    }

    shared.store.remove(&record.id)?;
    if record.is_member() {
        shared.requests.leaves_its_window(record.id);
    }
    shared.metrics.quarantined(refusal.reason);
    shared.board.update().n_quarantined += 1;
    Ok(())
}

/// Moves the archived source of a refused scan to quarantine. Returns whether that was possible.
pub(in crate::pipeline) fn move_to_quarantine(
    shared: &Shared,
    record: &ScanRecord,
    refusal: &Refusal,
) -> bool {
    let config = shared.config();
    let folder = &config.directories.quarantine;
    let path = shared.archive.scan(record.id);

    // A volume from DICOM files has no file in the incoming folder.
    let ScanRecord { came_from, source_name, .. } = record;
    let is_file = Path::new(came_from).ends_with(source_name);
    let name = Path::new(if is_file { came_from } else { source_name });
    let _changing = shared.archive.changing();
    let source = quarantine::Source { path: &path, look: None };
    let moved = quarantine::quarantine(folder, source, name, refusal, now_secs());
    let failed = |source| ScanError::Internal { doing: "moving a scan to quarantine", source };
    let moved = moved.map_err(failed).and_then(|_| {
        // It could not be moved. The mask is left in any case.
        shared.set_aside(&path, "refused, and not moved to quarantine")?;
        shared.archive.remove(record.id)
    });
    let mut index = quarantine::Index::default();
    if index.refresh(folder).is_ok() {
        shared.metrics.quarantine_files(index.n_entries());
    }
    match moved {
        Ok(()) => {
            warn!(scan = %record.id, %refusal, "an accepted scan went to quarantine");
            true
        }
        Err(error) => {
            warn!(scan = %record.id, %error, "quarantine is not available; trying again later");
            false
        }
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
