//! Refuses a file, tries it again later, or takes it back from quarantine.

use std::{
    io,
    path::{Path, PathBuf},
    time::Instant,
};

use tracing::{debug, info, warn};

use super::{
    Intake, MAX_OUTAGE, MAX_PAUSE, MAX_READS, MAX_RECHECKED, PATIENCE, Trouble, below, seen_key,
};
use crate::{
    domain::error::{QuarantineReason, Refusal, ScanError},
    files::are_open_for_writing,
    ingest::{self, Candidate, is_zip},
    ledger::{SeenFile, SeenOutcome},
    metrics::{IngestResult, Stage},
    pipeline::{now_secs, take_up::finish_refusals},
    quarantine::{self, Refused, Source},
};

impl Intake {
    /// Sends a file that can never work to quarantine. Tries others again later.
    pub(super) fn refuse(
        &mut self,
        candidate: &Candidate,
        incoming: &Path,
        error: ScanError,
    ) -> Result<(), ScanError> {
        if let ScanError::Refused(refusal) = &error
            && self.may_be_unfinished(refusal, std::slice::from_ref(&candidate.path))
        {
            debug!(%refusal, path = %candidate.path.display(), "a file may not be whole yet");
            self.unfinished.insert(candidate.path.clone(), candidate.look);
            return self.look_again(candidate, incoming);
        }

        self.shared.metrics.stage_failed(Stage::Decode, &error);
        match error {
            ScanError::Device(_)
            | ScanError::Store(_)
            | ScanError::Ledger(_)
            | ScanError::Lost { .. } => return Err(error),
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

    /// Whether files lack only their end, or have a writer, and have not been still for long enough
    /// to be refused because of it.
    pub(super) fn may_be_unfinished(&self, refusal: &Refusal, files: &[PathBuf]) -> bool {
        files.iter().all(|file| self.is_within_patience(file))
            && (refusal.reason == QuarantineReason::Truncated || are_open_for_writing(files))
    }

    /// Whether a file has changed within the time that a file without its end gets.
    pub(super) fn is_within_patience(&self, file: &Path) -> bool {
        let (now, config) = (Instant::now(), self.shared.config());
        let is_slice = self.bundles.settling.knows(file) && !is_zip(file);
        let settle = if is_slice { config.intake.series_settle } else { config.intake.settle };
        let still = self.settling.still_for(file, now);
        let still = still.or_else(|| self.bundles.settling.still_for(file, now));
        still.is_some_and(|still| still < settle * PATIENCE)
    }

    /// Whether a file has no decision yet.
    pub(super) fn is_waiting(&self, file: &Path) -> bool {
        self.settling.knows(file) || self.bundles.settling.knows(file)
    }

    /// Puts files back that somebody has written to since they were refused: their sender had
    /// stalled. A file whose place is taken stays in quarantine.
    pub(super) fn take_back_changed(&mut self, incoming: &Path) {
        let quarantine = self.shared.config().directories.quarantine.clone();
        // A quarantine that cannot be read is reported elsewhere.
        let changed =
            self.quarantined.changed(&quarantine, incoming, MAX_RECHECKED).unwrap_or_default();
        if self.quarantined.has_unfinished() {
            finish_refusals(&self.shared);
        }
        if self.is_paused {
            return self.show_quarantined();
        }

        for name in changed {
            match quarantine::requeue(&quarantine, &name, incoming) {
                Ok(_) => {
                    debug!(name = %name.display(), "taken back");
                    info!("a file in quarantine has changed; it is back and is read again");
                    self.shared.metrics.taken_back();
                }
                Err(error) => {
                    debug!(%error, name = %name.display(), "a changed file cannot be taken back");
                }
            }
        }
        self.show_quarantined();
    }

    /// Counts what is in quarantine, without listing what has not changed.
    pub(super) fn show_quarantined(&mut self) {
        let config = self.shared.config();
        if self.quarantined.refresh(&config.directories.quarantine).is_ok() {
            self.shared.metrics.quarantine_files(self.quarantined.n_entries());
        }
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
        let (path, came_from) = (&candidate.path, below(incoming, &candidate.path));
        debug!(path = %path.display(), "to quarantine");
        let source = Source { path, look: Some(candidate.look) };
        let refused = if are_open_for_writing(std::slice::from_ref(path)) {
            quarantine::refuse_in_place(folder, source, came_from, refusal, now_secs())
        } else {
            quarantine::quarantine(folder, source, came_from, refusal, now_secs())
        };
        let entry = match refused {
            Ok(Refused::Entry(entry)) => entry,
            Ok(Refused::Changed) => return self.look_again(candidate, incoming),
            Err(error) => {
                warn!(error = %error.kind(), "quarantine is not available; a refused file waits");
                self.quarantine.suspect();
                self.try_later(candidate);
                return self.look_again(candidate, incoming);
            }
        };

        warn!(%refusal, "a file went to quarantine");
        // This is remembered, too, in case the file could not be moved.
        self.remember(candidate, incoming, SeenOutcome::Quarantined)?;
        self.forget(candidate);
        self.count_quarantined(refusal, &entry);
        Ok(())
    }

    pub(super) fn count_quarantined(&mut self, refusal: &Refusal, entry: &Path) {
        let config = self.shared.config();
        self.shared.metrics.volume_ingested(IngestResult::Quarantined);
        self.shared.metrics.quarantined(refusal.reason);
        if self.quarantined.added(&config.directories.quarantine, entry).is_ok() {
            self.shared.metrics.quarantine_files(self.quarantined.n_entries());
        }
        self.shared.board.update().n_quarantined += 1;
    }

    pub(super) fn remember(
        &self,
        candidate: &Candidate,
        incoming: &Path,
        outcome: SeenOutcome,
    ) -> Result<(), ScanError> {
        let key = seen_key(incoming, &candidate.path);
        let seen = decision_about(candidate, outcome);
        self.count_file(outcome);
        Ok(self.shared.seen.put(&key, &seen)?)
    }

    /// Counts a file that had no decision before.
    pub(super) fn count_file(&self, outcome: SeenOutcome) {
        let result = match outcome {
            SeenOutcome::Accepted(_) => IngestResult::Accepted,
            SeenOutcome::Duplicate(_) => IngestResult::Duplicate,
            SeenOutcome::Quarantined => IngestResult::Quarantined,
            SeenOutcome::LeftAlone(_) => IngestResult::Ignored,
            SeenOutcome::Reading { .. } => return,
        };
        self.shared.metrics.file_decided(result);
    }
}

/// A decision about a file. A refused file that is no longer there has been moved by oddscan
/// itself, so that its going changes nothing for the files beside it.
pub(super) fn decision_about(candidate: &Candidate, outcome: SeenOutcome) -> SeenFile {
    let look = candidate.look;
    if outcome == SeenOutcome::Quarantined && ingest::look_at(&candidate.path).is_err() {
        return SeenFile::moved_away(look, outcome, now_secs());
    }
    SeenFile::new(look, outcome)
}
