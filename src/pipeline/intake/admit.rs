//! Takes in a scan that was read: archived, recorded, in line for the encoder.

use tracing::info;

use super::{
    Intake, MAX_IN_MEMORY_BYTES, n_at_once,
    reading::{ReadScan, Taken, Whole, refused_if_it_panics},
};
use crate::{
    companions::output_stem_among,
    domain::{error::ScanError, scan::ScanRecord},
    ledger::SeenOutcome,
    metrics::{IngestResult, Stage},
    pipeline::{
        Shared,
        board::Queue,
        encode::{Due, InMemory},
        now_secs,
        timings::Timings,
    },
    prepare::{Encodable, Prepared},
};

impl Intake {
    /// Accepts what was read. Returns `None` if the file must be considered again.
    pub(super) fn admit(
        &mut self,
        whole: &Whole,
        read: Result<Taken<ReadScan>, ScanError>,
        mut timings: Timings,
    ) -> Result<Option<SeenOutcome>, ScanError> {
        timings.resume(Stage::Decode);
        let keep = |read| refused_if_it_panics(&self.shared, || self.keep(whole, read));
        let kept = read.and_then(keep);
        timings.stop(&[Stage::Decode, Stage::Preprocess], &self.shared.metrics);
        Ok(match kept? {
            Taken::Later => None,
            Taken::Duplicate(id) => {
                self.shared.metrics.volume_ingested(IngestResult::Duplicate);
                self.shared.board.update().n_duplicates += 1;
                info!(scan = %id, "a copy of a known scan; nothing to do");
                Some(SeenOutcome::Duplicate(id))
            }
            Taken::Scan((record, scan)) => {
                self.queue(&record, InMemory { scan, timings });
                Some(SeenOutcome::Accepted(record.id))
            }
        })
    }

    /// Writes a new scan into the archive and the ledger.
    pub(super) fn keep(
        &self,
        whole: &Whole,
        read: Taken<ReadScan>,
    ) -> Result<Taken<(ScanRecord, Encodable)>, ScanError> {
        let ReadScan { draft, prepared } = match read {
            Taken::Scan(read) => read,
            Taken::Duplicate(id) => return Ok(Taken::Duplicate(id)),
            Taken::Later => return Ok(Taken::Later),
        };
        let id = prepared.id;

        let Shared { records, archive, metrics, .. } = &*self.shared;
        let _changing = archive.changing();
        // A file that was read in parallel may have the same content.
        let known = records.get(&id)?;
        if known.as_ref().is_some_and(|known| !known.may_come_again()) {
            return Ok(Taken::Duplicate(id));
        }

        let (mut record, encodable) = self.new_record(whole, known, prepared)?;
        let n_bytes = draft.n_bytes;
        record.source = Some(archive.offer(draft, id)?);
        records.put(&record)?;
        // Not tried again: the record is there, so that the file would be a copy. The next start
        // does it.
        archive.accept(id).map_err(|error| ScanError::Ledger(Box::new(error)))?;
        metrics.bytes_ingested(n_bytes);
        Ok(Taken::Scan((record, encodable)))
    }

    pub(super) fn new_record(
        &self,
        whole: &Whole,
        known: Option<ScanRecord>,
        prepared: Prepared,
    ) -> Result<(ScanRecord, Encodable), ScanError> {
        let path = &whole.candidate.path;
        let known = known.as_ref();
        let is_own = |stem: &str| known.is_some_and(|known| known.output_stem == stem);
        let is_taken = |stem: &str| self.stems.contains(stem) && !is_own(stem);
        let output_stem = output_stem_among(path, prepared.id, is_taken);
        // A volume of a DICOM series returns from quarantine as a file.
        let known_patient = || known?.header_patient.clone();
        let known_dicom = || known?.dicom.clone();

        let id = prepared.id;
        let (mut record, encodable) = prepared.into_record(path);
        record.replaces = whole.earlier.iter().copied().filter(|earlier| *earlier != id).collect();
        if !record.replaces.is_empty() {
            record.notes.push(
                "an earlier scan of this series had fewer slices: the others came after it was \
                 read. Use this result instead of the earlier one"
                    .to_owned(),
            );
        }
        let record = ScanRecord {
            came_from: whole.came_from.to_string_lossy().into_owned(),
            header_patient: whole.patient.clone().or_else(known_patient),
            dicom: whole.dicom.clone().or_else(known_dicom),
            output_stem,
            written_stem: known.and_then(|known| {
                let plain = || known.reported.as_ref().map(|_| known.output_stem.clone());
                known.written_stem.clone().or_else(plain)
            }),
            sequence: self.shared.records.next_sequence(),
            first_seen_secs: now_secs().saturating_sub(whole.waited.as_secs()),
            // Revisions continue to count.
            reported: known.and_then(|known| known.reported.clone()),
            ..record
        };
        Ok((record, encodable))
    }

    /// Queues a scan of the ledger for the encoder. Its prepared cube stays in memory, unless it
    /// is large or too many scans wait before it, for example from one zip.
    pub(super) fn queue(&mut self, record: &ScanRecord, prepared: InMemory) {
        let id = record.id;
        self.stems.insert(record.output_stem.clone());
        self.shared.metrics.volume_ingested(IngestResult::Accepted);
        self.shared.board.update().n_accepted += 1;
        info!(scan = %id, "accepted");

        let queued = self.shared.board.enqueue(Queue::Encode, record.first_seen_secs);
        let goes_along = self.pending.len() < n_at_once(&self.shared)
            && prepared.scan.canonical.volume.n_bytes() <= MAX_IN_MEMORY_BYTES;
        let prepared = goes_along.then(|| Box::new(prepared));
        self.pending.push_back(Due { id, prepared, queued });
        self.pass_on();
    }
}
