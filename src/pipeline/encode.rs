//! The second stage: owns the encoder and turns prepared scans into stored tokens.

use std::{
    io,
    ops::ControlFlow,
    panic::AssertUnwindSafe,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    thread,
};

use tracing::{info, warn};

use super::{
    ARCHIVED, FULL, IDLE, MAX_CRASHES, Shared,
    board::{InHand, Queue, StageName},
    now_secs, panic_text,
    steps::{self, Encodable},
    timings::Timings,
};
use crate::{
    domain::{
        error::{DeviceError, QuarantineReason, Refusal, ScanError},
        scan::{EncodedFacts, ScanId, ScanRecord, ScanState},
        tokenise::{Progress, TokeniseError, Tokeniser},
    },
    metrics::{Fallback, Stage},
    numeric::token::TokenGrid,
    quarantine,
};

/// A scan whose turn it is to be encoded.
pub(super) struct Due {
    /// The scan, which the archive and the journal hold.
    pub(super) id: ScanId,
    /// What intake made of it, if that is still in memory; if not, it is made again.
    pub(super) prepared: Option<Box<Prepared>>,
}

/// A scan that was read and made ready for the encoder.
pub(super) struct Prepared {
    pub(super) scan: Encodable,
    pub(super) timings: Timings,
}

pub(super) struct Encode {
    shared: Arc<Shared>,
    tokeniser: Tokeniser,
    from_intake: Receiver<Due>,
    to_score: SyncSender<ScanId>,
}

impl Encode {
    pub(super) fn new(
        shared: Arc<Shared>,
        tokeniser: Tokeniser,
        from_intake: Receiver<Due>,
        to_score: SyncSender<ScanId>,
    ) -> Self {
        shared.metrics.encode_batch(tokeniser.device(), tokeniser.max_batch());
        shared.metrics.device_memory(tokeniser.device(), tokeniser.memory());
        Self { shared, tokeniser, from_intake, to_score }
    }

    pub(super) fn run(mut self) -> Result<(), ScanError> {
        while !self.shared.stopping() {
            self.shared.board.beat(StageName::Encode);
            match self.from_intake.recv_timeout(IDLE) {
                Ok(due) => self.take(due)?,
                Err(RecvTimeoutError::Timeout) => {}
                // The intake has failed, and says so; a stage that ended first would be taken for
                // the cause.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(IDLE),
            }
            self.show_waiting();
        }
        Ok(())
    }

    fn take(&mut self, due: Due) -> Result<(), ScanError> {
        // In this order: a scan is always on the board.
        let scan = due.id.short();
        self.shared.board.update().in_hand = Some(InHand { scan, slices_done: 0, slices_all: 0 });
        self.shared.board.left(Queue::Encode);
        let done = self.encode_and_hand_on(due);
        self.shared.board.update().in_hand = None;
        done
    }

    fn encode_and_hand_on(&mut self, Due { id, prepared }: Due) -> Result<(), ScanError> {
        let Some(mut record) = self.shared.store.record(&id)? else { return Ok(()) };
        if record.state != ScanState::Ingested {
            return Ok(());
        }
        if record.attempts >= MAX_CRASHES {
            let found = format!("{} crashes while this scan was encoded", record.attempts);
            let action = "see the log of those times; a driver or memory fault is the usual cause";
            return self
                .set_aside(record, &Refusal::new(QuarantineReason::Poison, found, "none", action));
        }
        // Journalled before the start: after a crash the count tells which scan was in hand.
        record.attempts += 1;
        self.shared.store.put_record(&record)?;
        let done = std::panic::catch_unwind(AssertUnwindSafe(|| self.encode(&record, prepared)));
        match done.unwrap_or_else(|panic| Err(crashed(&self.shared, panic.as_ref()))) {
            Ok(Some((tokens, facts))) => self.finish(record, &tokens, facts),
            Ok(None) => self.put_back(record),
            Err(error) => {
                self.shared.metrics.stage_failed(Stage::Encode, &error);
                self.fail(record, error)
            }
        }
    }

    fn fail(&self, record: ScanRecord, error: ScanError) -> Result<(), ScanError> {
        match error {
            ScanError::Refused(refusal) => self.set_aside(record, &refusal),
            // A device that fails with this scan again and again may fail because of it: the
            // journal keeps the attempt. The service manager starts us again.
            ScanError::Device(DeviceError::Failed { .. }) => Err(error),
            ScanError::Device(DeviceError::OutOfMemory { .. }) | ScanError::Store(_) => {
                self.put_back(record)?;
                Err(error)
            }
            ScanError::Io { .. } | ScanError::Own { .. } => {
                warn!(scan = %record.id, %error, "left for the next start");
                self.put_back(record)
            }
        }
    }

    /// The scan is not to blame for the end of this attempt.
    fn put_back(&self, mut record: ScanRecord) -> Result<(), ScanError> {
        record.attempts -= 1;
        Ok(self.shared.store.put_record(&record)?)
    }

    /// Scan to tokens; `None` when asked to stop in the middle.
    fn encode(
        &mut self,
        record: &ScanRecord,
        prepared: Option<Box<Prepared>>,
    ) -> Result<Option<(Vec<TokenGrid>, EncodedFacts)>, ScanError> {
        let prepared = prepared.map_or_else(|| self.prepare(record), |made| Ok(*made))?;
        let Prepared { scan, mut timings } = prepared;
        timings.resume(Stage::Encode);
        let Self { shared, tokeniser, .. } = self;
        let id = record.id;
        let batch_before = tokeniser.max_batch();
        let device = tokeniser.device().to_owned();
        let tokens = tokeniser.tokens(&scan.canonical.volume, |progress| {
            show(shared, id, &device, progress);
            if shared.stopping() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        shared.metrics.device_memory(&device, tokeniser.memory());
        if tokeniser.max_batch() < batch_before {
            warn!(slices = tokeniser.max_batch(), "the device ran out of memory; smaller batches");
            shared.metrics.encode_fallback(Fallback::SmallerBatch);
            shared.metrics.encode_batch(&device, tokeniser.max_batch());
        }
        let tokens = match tokens {
            Ok(tokens) => tokens,
            Err(TokeniseError::Stopped) => return Ok(None),
            Err(TokeniseError::Device(error)) => return Err(error.into()),
            Err(TokeniseError::Features(error)) => {
                let (device, message) = (device, error.to_string());
                return Err(DeviceError::Failed { device, message }.into());
            }
        };
        timings.stop(&[Stage::Encode], &shared.metrics);
        let facts = scan.facts(&tokens, &shared.method, timings.secs());
        Ok(Some((tokens, facts)))
    }

    /// Reads a scan from the archive and makes it ready: after a start, or when several came at
    /// once.
    fn prepare(&self, record: &ScanRecord) -> Result<Prepared, ScanError> {
        let Shared { archive, metrics, method, .. } = &*self.shared;
        let mut timings = Timings::start(Stage::Decode);
        let (path, mask) = (archive.scan(record.id), archive.mask(record.id));
        let alignment = steps::alignment(record.alignment)?;
        let source = steps::read_source(&path, mask.as_deref(), alignment, &ARCHIVED)
            .map_err(missing_source)?;
        timings.switch(Stage::Preprocess);
        let scan = Encodable::new(&source, method, &record.cohort)?;
        timings.stop(&[Stage::Decode, Stage::Preprocess], metrics);
        Ok(Prepared { scan, timings })
    }

    /// Stores, then hands on.
    fn finish(
        &self,
        mut record: ScanRecord,
        tokens: &[TokenGrid],
        facts: EncodedFacts,
    ) -> Result<(), ScanError> {
        record.state = ScanState::Encoded;
        record.attempts = 0;
        info!(
            scan = %record.id,
            tokens = facts.n_tokens,
            secs = facts.timings_secs.get(Stage::Encode.name()),
            "encoded"
        );
        record.encoded = Some(facts);
        // Durable before the id moves on: from here the scan counts as a member.
        self.shared.store.put_encoded(&record, tokens)?;
        self.hand_on(record.id);
        Ok(())
    }

    /// Gives an id to the score stage, waiting while its queue is full. The score stage ends first
    /// only when the service goes down, and a stop may drop the id: the journal holds the scan.
    fn hand_on(&self, id: ScanId) {
        self.shared.board.joined(Queue::Score, now_secs());
        while !self.shared.stopping() {
            self.shared.board.beat(StageName::Encode);
            match self.to_score.try_send(id) {
                Ok(()) | Err(TrySendError::Disconnected(_)) => return,
                Err(TrySendError::Full(_)) => thread::sleep(FULL),
            }
        }
    }

    /// A scan that was accepted and turned out to be impossible. Its file in the incoming folder
    /// stays; the archived copy goes to quarantine.
    fn set_aside(&self, mut record: ScanRecord, refusal: &Refusal) -> Result<(), ScanError> {
        let config = self.shared.config();
        let folder = &config.directories.quarantine;
        let source = self.shared.archive.scan(record.id);
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
                self.put_back(record)
            };
        }
        warn!(scan = %record.id, %refusal, "an accepted scan went to quarantine");
        record.state = ScanState::Quarantined { refusal: refusal.clone() };
        self.shared.store.put_record(&record)?;
        self.shared.archive.remove(record.id)?;
        self.shared.metrics.quarantined(refusal.reason);
        self.shared.metrics.quarantine_files(quarantine::count_quarantined(folder));
        self.shared.board.update().n_quarantined += 1;
        Ok(())
    }

    fn show_waiting(&self) {
        let (n_waiting, oldest) = self.shared.board.queue(Queue::Encode);
        self.shared.metrics.queue(Stage::Encode, n_waiting, oldest);
    }
}

/// After each batch: progress on the status page, a beat for the watchdog, the device's counters.
fn show(shared: &Shared, id: ScanId, device: &str, progress: Progress) {
    let Progress { done, all, batch, took } = progress;
    shared.board.beat(StageName::Encode);
    shared.board.update().in_hand =
        Some(InHand { scan: id.short(), slices_done: done, slices_all: all });
    shared.metrics.slices_encoded(device, batch as u64);
    shared.metrics.device_busy(device, took);
}

/// The archived source may be gone after a kill between its move to quarantine and the journal
/// entry, or when somebody tidied up the state folder.
fn missing_source(error: ScanError) -> ScanError {
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

fn crashed(shared: &Shared, panic: &(dyn std::any::Any + Send)) -> ScanError {
    shared.metrics.stage_panicked(Stage::Encode);
    Refusal::new(
        QuarantineReason::Poison,
        format!("a crash while encoding ({})", panic_text(panic)),
        "none",
        "report it with the file, if it may be shared",
    )
    .into()
}
