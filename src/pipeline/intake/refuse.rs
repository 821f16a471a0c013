//! Refuses a file, or tries it again later.

use std::{io, path::Path, time::Instant};

use tracing::{debug, warn};

use super::{Intake, MAX_OUTAGE, MAX_PAUSE, MAX_READS, Trouble, seen_key};
use crate::{
    domain::error::{QuarantineReason, Refusal, ScanError},
    ingest::{self, Candidate},
    metrics::{IngestResult, Stage},
    pipeline::now_secs,
    quarantine,
    store::{SeenFile, SeenOutcome},
};

impl Intake {
    /// Sends a file that can never work to quarantine. Tries others again later.
    pub(super) fn refuse(
        &mut self,
        candidate: &Candidate,
        incoming: &Path,
        error: ScanError,
    ) -> Result<(), ScanError> {
        self.shared.metrics.stage_failed(Stage::Decode, &error);
        match error {
            ScanError::Device(_) | ScanError::Store(_) => return Err(error),
            ScanError::Refused(refusal) => {
                return self.send_to_quarantine(candidate, incoming, &refusal);
            }
            ScanError::Io { .. } | ScanError::Internal { .. } => {}
        }

        self.look_again(candidate, incoming)?;
        if let ScanError::Io { source, .. } = &error {
            if source.kind() == io::ErrorKind::NotFound {
                // The file is gone; the next listing forgets it.
                return Ok(());
            }
            let hopeless = source.kind() == io::ErrorKind::PermissionDenied;
            let trouble = self.try_later(candidate);
            let (n_tries, lasted) = (trouble.n_tries, trouble.since.elapsed());
            if (hopeless && n_tries >= MAX_READS) || lasted >= MAX_OUTAGE {
                let refusal = Refusal::new(
                    QuarantineReason::Io,
                    format!("{error} ({n_tries} tries in {} s)", lasted.as_secs()),
                    "a file that the service may read",
                    "check its owner and permissions, and the share, then export it again",
                );
                return self.send_to_quarantine(candidate, incoming, &refusal);
            }
        } else {
            self.try_later(candidate);
        }
        self.shared.metrics.stage_retried(Stage::Decode);
        warn!(%error, "a file could not be read or prepared; trying again later");
        Ok(())
    }

    /// Tries a file again after a pause that doubles each time.
    pub(super) fn try_later(&mut self, candidate: &Candidate) -> &Trouble {
        let now = Instant::now();
        let settle = self.shared.config().intake.settle;
        let trouble = self.troubles.entry(candidate.path.clone());
        let trouble = trouble.or_insert(Trouble { n_tries: 0, since: now, not_before: now });
        let pause = settle.saturating_mul(1 << trouble.n_tries.min(16)).min(MAX_PAUSE);
        trouble.n_tries += 1;
        trouble.not_before = now + pause;
        trouble
    }

    pub(super) fn send_to_quarantine(
        &mut self,
        candidate: &Candidate,
        incoming: &Path,
        refusal: &Refusal,
    ) -> Result<(), ScanError> {
        if ingest::look_at(&candidate.path).ok() != Some(candidate.look) {
            // Another file has this name now. The refusal does not apply to it.
            return self.look_again(candidate, incoming);
        }
        let config = self.shared.config();
        let folder = &config.directories.quarantine;
        let came_from = candidate.path.strip_prefix(incoming).unwrap_or(&candidate.path);
        debug!(path = %candidate.path.display(), "to quarantine");
        let moved = quarantine::quarantine(folder, &candidate.path, came_from, refusal, now_secs());
        if let Err(error) = moved {
            warn!(error = %error.kind(), "quarantine is not available; a refused file waits");
            self.try_later(candidate);
            return self.look_again(candidate, incoming);
        }

        warn!(%refusal, "a file went to quarantine");
        // This is remembered, too, in case the file could not be moved.
        self.remember(candidate, incoming, SeenOutcome::Quarantined)?;
        self.forget(candidate);
        self.count_quarantined(refusal);
        Ok(())
    }

    pub(super) fn count_quarantined(&self, refusal: &Refusal) {
        let config = self.shared.config();
        self.shared.metrics.volume_ingested(IngestResult::Quarantined);
        self.shared.metrics.quarantined(refusal.reason);
        let n_files = quarantine::count_quarantined(&config.directories.quarantine);
        self.shared.metrics.quarantine_files(n_files);
        self.shared.board.update().n_quarantined += 1;
    }

    pub(super) fn remember(
        &self,
        candidate: &Candidate,
        incoming: &Path,
        outcome: SeenOutcome,
    ) -> Result<(), ScanError> {
        let key = seen_key(incoming, &candidate.path);
        Ok(self.shared.store.put_seen(&key, &SeenFile::new(candidate.look, outcome))?)
    }
}
