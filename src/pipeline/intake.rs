//! The first stage: looks at the incoming folder, waits until a file is whole, reads and archives
//! it, and hands its id to the encoder.

use std::{
    collections::HashMap,
    os::unix::ffi::OsStrExt,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use super::{IDLE, Shared, board::StageName, now_secs, panic_text, steps};
use crate::{
    domain::{
        error::{Disposition, QuarantineReason, Refusal, ScanError},
        scan::{ScanId, ScanRecord, ScanState},
    },
    ingest::{self, Candidate, Patterns, Settled, Settling},
    metrics::{DirectoryKind, IngestResult, PauseReason, RescanTrigger, SeenBy, Stage},
    store::{SeenFile, SeenOutcome},
    watcher::Change,
};

/// A file that cannot be read is tried so often before it is set aside.
const MAX_READS: u32 = 3;

/// What became of a whole file.
enum Taken {
    Accepted(Box<ScanRecord>),
    Duplicate(ScanId),
    /// It changed while it was copied: not whole after all.
    Changed,
}

pub(super) struct Intake {
    shared: Arc<Shared>,
    woken: Receiver<Change>,
    to_encoder: SyncSender<ScanId>,
    pending: Vec<ScanId>,
    settling: Settling,
    failed_reads: HashMap<PathBuf, u32>,
}

impl Intake {
    pub(super) fn new(
        shared: Arc<Shared>,
        woken: Receiver<Change>,
        to_encoder: SyncSender<ScanId>,
        pending: Vec<ScanId>,
    ) -> Self {
        let (settling, failed_reads) = (Settling::default(), HashMap::new());
        Self { shared, woken, to_encoder, pending, settling, failed_reads }
    }

    pub(super) fn run(mut self) -> Result<(), ScanError> {
        for id in std::mem::take(&mut self.pending) {
            if let Some(record) = self.shared.store.record(&id)? {
                self.hand_on(id, record.first_seen_secs);
            }
        }
        let mut trigger = Some(RescanTrigger::Start);
        let mut by = SeenBy::Scan;
        while !self.shared.stopping() {
            self.look(trigger, by)?;
            (trigger, by) = self.wait();
        }
        Ok(())
    }

    /// Sleeps until something may have changed, a file may have settled, or the interval is over.
    fn wait(&mut self) -> (Option<RescanTrigger>, SeenBy) {
        let intake = self.shared.config().intake.clone();
        let settling = self.settling.n_waiting() > 0;
        let soon = (intake.settle / 4).clamp(Duration::from_millis(50), Duration::from_secs(1));
        let until = Instant::now() + if settling { soon } else { intake.rescan };
        loop {
            self.shared.board.beat(StageName::Intake);
            let left = until.saturating_duration_since(Instant::now()).min(IDLE);
            match self.woken.recv_timeout(left) {
                Ok(change) => {
                    let overflow = change == Change::Overflow
                        || self.woken.try_iter().any(|c| c == Change::Overflow);
                    return (overflow.then_some(RescanTrigger::Overflow), SeenBy::Event);
                }
                Err(RecvTimeoutError::Disconnected) => thread::sleep(left),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if self.shared.stopping() || Instant::now() >= until {
                return ((!settling).then_some(RescanTrigger::Interval), SeenBy::Scan);
            }
        }
    }

    /// One look at the folder.
    fn look(&mut self, trigger: Option<RescanTrigger>, by: SeenBy) -> Result<(), ScanError> {
        let config = self.shared.config();
        let incoming = &config.directories.incoming;
        if self.is_disk_low() {
            return Ok(());
        }
        let patterns = Patterns::new(&config.intake.accept, &config.intake.ignore)
            .expect("the settings were checked");
        let listed = ingest::list(incoming, &patterns);
        self.shared.board.set_reason("the incoming folder cannot be read", listed.is_err());
        let listed = match listed {
            Ok(listed) => listed,
            Err(error) => {
                warn!(%error, "cannot list the incoming folder; trying again");
                return Ok(());
            }
        };
        if let Some(trigger) = trigger {
            self.shared.metrics.rescan(trigger, now_secs());
            let there: std::collections::HashSet<Vec<u8>> =
                listed.iter().map(|c| seen_key(incoming, &c.path)).collect();
            self.shared.store.retain_seen(|key| there.contains(key))?;
        }
        self.settling.keep_only(&listed);
        for candidate in listed {
            if self.shared.stopping() {
                break;
            }
            self.shared.board.beat(StageName::Intake);
            self.consider(&candidate, incoming, config.intake.settle, by)?;
        }
        self.show_waiting();
        Ok(())
    }

    fn consider(
        &mut self,
        candidate: &Candidate,
        incoming: &Path,
        settle: Duration,
        by: SeenBy,
    ) -> Result<(), ScanError> {
        let key = seen_key(incoming, &candidate.path);
        let seen = self.shared.store.seen(&key)?;
        if seen.is_some_and(|seen| seen.is_same(&candidate.look)) {
            return Ok(());
        }
        let mask =
            steps::companion_mask(&candidate.path).and_then(|path| ingest::look_at(&path).ok());
        let is_first = !self.settling.knows(&candidate.path);
        if is_first {
            self.shared.metrics.file_seen(by);
        }
        if let Settled::Whole(waited) = self.settling.look(candidate, mask, Instant::now(), settle)
        {
            self.shared.metrics.settled(waited);
            self.settle(candidate, &key, incoming, waited)?;
        }
        Ok(())
    }

    /// Deals with a whole file, whatever it contains.
    fn settle(
        &mut self,
        candidate: &Candidate,
        key: &[u8],
        incoming: &Path,
        waited: Duration,
    ) -> Result<(), ScanError> {
        let started = Instant::now();
        let taken = std::panic::catch_unwind(AssertUnwindSafe(|| self.take_in(candidate, waited)));
        let taken = taken.unwrap_or_else(|panic| {
            self.shared.metrics.stage_panicked(Stage::Decode);
            Err(Refusal::new(
                QuarantineReason::Poison,
                format!("a crash while reading ({})", panic_text(panic.as_ref())),
                "a file that the reader understands",
                "report it with the file, if it may be shared",
            )
            .into())
        });
        self.shared.metrics.stage_finished(Stage::Decode, started.elapsed());
        match taken {
            Ok(Taken::Changed) => return Ok(()),
            Ok(Taken::Accepted(record)) => self.accepted(candidate, key, &record)?,
            Ok(Taken::Duplicate(id)) => self.duplicate(candidate, key, id)?,
            Err(error) => return self.refuse(candidate, key, incoming, error),
        }
        self.settling.forget(&candidate.path);
        self.failed_reads.remove(&candidate.path);
        Ok(())
    }

    /// Copies, reads, checks, identifies; journals a scan that is new.
    fn take_in(&self, candidate: &Candidate, waited: Duration) -> Result<Taken, ScanError> {
        if candidate.path.is_dir() {
            return Err(Refusal::new(
                QuarantineReason::Unsupported,
                "a folder with the name of a scan",
                "a NIfTI file",
                "put files into the incoming folder; folders of files may have any other name",
            )
            .into());
        }
        let limits = self.shared.limits();
        let mask = steps::companion_mask(&candidate.path);
        let archive = &self.shared.archive;
        let draft = archive.draft(&candidate.path, mask.as_deref(), limits.max_file_bytes)?;
        if ingest::look_at(&candidate.path).ok() != Some(candidate.look) {
            return Ok(Taken::Changed);
        }
        let source = steps::read_source(&draft.scan, draft.mask.as_deref(), &limits)?;
        // Made and dropped: what has no canonical volume is refused while the file is at hand.
        steps::canonical(&source, &self.shared.method.cube)?;
        let id = ScanId::of(&source.raw);
        if self.shared.store.record(&id)?.is_some() {
            return Ok(Taken::Duplicate(id));
        }
        archive.keep(&draft, id)?;
        let record = self.new_record(candidate, id, waited)?;
        self.shared.store.put_record(&record)?;
        self.shared.metrics.bytes_ingested(draft.n_bytes);
        Ok(Taken::Accepted(Box::new(record)))
    }

    fn new_record(
        &self,
        candidate: &Candidate,
        id: ScanId,
        waited: Duration,
    ) -> Result<ScanRecord, ScanError> {
        let stem = steps::stem_of(&candidate.path);
        let wanted = steps::output_stem(&stem);
        let taken = self.shared.store.records()?.iter().any(|r| r.output_stem == wanted);
        // Another scan of this name keeps its results; this one's carry the id as well.
        let output_stem = if taken { format!("{wanted}-{}", id.short()) } else { wanted };
        let name = candidate.path.file_name().unwrap_or_default();
        Ok(ScanRecord {
            id,
            state: ScanState::Ingested,
            source_name: name.to_string_lossy().into_owned(),
            output_stem,
            cohort: self.shared.method.cohort_of(&stem),
            sequence: self.shared.store.next_sequence()?,
            first_seen_secs: now_secs().saturating_sub(waited.as_secs()),
            attempts: 0,
            encoded: None,
            reported: None,
        })
    }

    fn accepted(
        &self,
        candidate: &Candidate,
        key: &[u8],
        record: &ScanRecord,
    ) -> Result<(), ScanError> {
        let id = record.id;
        self.remember(candidate, key, SeenOutcome::Accepted(id))?;
        self.shared.metrics.volume_ingested(IngestResult::Accepted);
        self.shared.board.update().n_accepted += 1;
        info!(scan = %id, "accepted");
        debug!(scan = %id, path = %candidate.path.display(), "accepted from");
        self.hand_on(id, record.first_seen_secs);
        Ok(())
    }

    fn duplicate(&self, candidate: &Candidate, key: &[u8], id: ScanId) -> Result<(), ScanError> {
        self.remember(candidate, key, SeenOutcome::Duplicate(id))?;
        self.shared.metrics.volume_ingested(IngestResult::Duplicate);
        self.shared.board.update().n_duplicates += 1;
        info!(scan = %id, "a copy of a known scan was left alone");
        debug!(scan = %id, path = %candidate.path.display(), "copy at");
        Ok(())
    }

    /// Sets aside what will never work; what may work later is tried again.
    fn refuse(
        &mut self,
        candidate: &Candidate,
        key: &[u8],
        incoming: &Path,
        error: ScanError,
    ) -> Result<(), ScanError> {
        self.shared.metrics.stage_failed(Stage::Decode, &error);
        let refusal = match (error.disposition(), error) {
            (Disposition::Fatal, error) => return Err(error),
            (_, ScanError::Refused(refusal)) => refusal,
            (_, error) if is_full_disk(&error) => {
                warn!(%error, cause = cause(&error), "no room to archive a scan; it waits");
                self.settling.forget(&candidate.path);
                return Ok(());
            }
            (_, error) => {
                let reads = self.failed_reads.entry(candidate.path.clone()).or_default();
                *reads += 1;
                if *reads < MAX_READS {
                    self.shared.metrics.stage_retried(Stage::Decode);
                    warn!(%error, "a file cannot be read; trying again");
                    // It has to settle again before the next try, which spaces the tries.
                    self.settling.forget(&candidate.path);
                    return Ok(());
                }
                Refusal::new(
                    QuarantineReason::Io,
                    format!("{error} ({MAX_READS} times): {}", cause(&error)),
                    "a file that the service may read",
                    "check its owner and permissions, then export it again",
                )
            }
        };
        self.failed_reads.remove(&candidate.path);
        self.settling.forget(&candidate.path);
        self.set_aside(candidate, key, incoming, &refusal)
    }

    fn set_aside(
        &self,
        candidate: &Candidate,
        key: &[u8],
        incoming: &Path,
        refusal: &Refusal,
    ) -> Result<(), ScanError> {
        let config = self.shared.config();
        let folder = &config.directories.quarantine;
        let came_from = candidate.path.strip_prefix(incoming).unwrap_or(&candidate.path);
        warn!(%refusal, "a file goes to quarantine");
        debug!(path = %candidate.path.display(), "to quarantine");
        ingest::quarantine(folder, &candidate.path, came_from, refusal, now_secs())
            .map_err(|source| ScanError::Io { doing: "moving a file to quarantine", source })
            .or_else(|error| {
                warn!(%error, cause = cause(&error), "quarantine is not available");
                Ok::<_, ScanError>(PathBuf::new())
            })?;
        // Remembered too, for the case that it could not be moved.
        self.remember(candidate, key, SeenOutcome::Quarantined)?;
        self.shared.metrics.volume_ingested(IngestResult::Quarantined);
        self.shared.metrics.quarantined(refusal.reason);
        self.shared.metrics.quarantine_files(ingest::count_quarantined(folder));
        self.shared.board.update().n_quarantined += 1;
        Ok(())
    }

    fn remember(
        &self,
        candidate: &Candidate,
        key: &[u8],
        outcome: SeenOutcome,
    ) -> Result<(), ScanError> {
        Ok(self.shared.store.put_seen(key, &SeenFile::new(candidate.look, outcome))?)
    }

    /// Gives an id to the encoder, waiting while its queue is full: the journal holds the scan, so
    /// a stop may drop the id.
    fn hand_on(&self, id: ScanId, first_seen_secs: u64) {
        self.shared.board.joined_queue(first_seen_secs);
        let mut message = id;
        while !self.shared.stopping() {
            self.shared.board.beat(StageName::Intake);
            match self.to_encoder.try_send(message) {
                Ok(()) | Err(TrySendError::Disconnected(_)) => return,
                Err(TrySendError::Full(back)) => message = back,
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn show_waiting(&self) {
        let n_waiting = self.settling.n_waiting();
        self.shared.board.update().n_settling = n_waiting;
        let oldest = self.settling.oldest(Instant::now()).map(|age| now_secs() - age.as_secs());
        self.shared.metrics.queue(Stage::Settle, n_waiting, oldest);
    }

    /// Measures the free space of every folder; below the watermark intake pauses and files stay
    /// where they are.
    fn is_disk_low(&self) -> bool {
        let config = self.shared.config();
        let folders = &config.directories;
        let mut low = false;
        for (kind, folder) in [
            (DirectoryKind::Incoming, &folders.incoming),
            (DirectoryKind::Output, &folders.results),
            (DirectoryKind::Quarantine, &folders.quarantine),
            (DirectoryKind::State, &folders.state),
        ] {
            let Ok(space) = rustix::fs::statvfs(folder.as_path()) else { continue };
            let free = space.f_bavail * space.f_frsize;
            self.shared.metrics.filesystem_avail(kind, free);
            low |= kind != DirectoryKind::Incoming && free < config.service.min_free_bytes;
        }
        self.shared.metrics.paused(PauseReason::DiskLow, low);
        self.shared.board.set_reason("paused: disk low (service.min_free_mib)", low);
        low
    }
}

/// A path as the store remembers it: its bytes below the incoming folder.
fn seen_key(incoming: &Path, path: &Path) -> Vec<u8> {
    path.strip_prefix(incoming).unwrap_or(path).as_os_str().as_bytes().to_vec()
}

/// Whether our own disk is to blame, and not the file.
fn is_full_disk(error: &ScanError) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error, ScanError::Io { source, .. }
        if matches!(source.kind(), QuotaExceeded | ReadOnlyFilesystem | StorageFull))
}

fn cause(error: &ScanError) -> String {
    std::error::Error::source(error).map_or_else(String::new, ToString::to_string)
}
