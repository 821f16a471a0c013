//! The second stage: owns the encoder and turns archived sources into stored tokens.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender},
    },
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{IDLE, Shared, board::InHand, board::StageName, now_secs, panic_text, steps};
use crate::{
    domain::{
        error::{DeviceError, Disposition, QuarantineReason, Refusal, ScanError},
        scan::{EncodedFacts, ScanId, ScanRecord, ScanState},
        tokenise::{Progress, TokeniseError, Tokeniser},
    },
    ingest,
    metrics::{Fallback, Stage},
    numeric::token::TokenGrid,
};

/// Crashes in one scan after which it is held to be the cause: one more than a reboot and a power
/// cut in one day.
const MAX_ATTEMPTS: u32 = 3;

pub(super) struct Encode {
    shared: Arc<Shared>,
    tokeniser: Tokeniser,
    from_intake: Receiver<ScanId>,
    to_score: SyncSender<ScanId>,
}

impl Encode {
    pub(super) fn new(
        shared: Arc<Shared>,
        tokeniser: Tokeniser,
        from_intake: Receiver<ScanId>,
        to_score: SyncSender<ScanId>,
    ) -> Self {
        shared.metrics.encode_batch(tokeniser.device(), tokeniser.max_batch());
        Self { shared, tokeniser, from_intake, to_score }
    }

    pub(super) fn run(mut self) -> Result<(), ScanError> {
        while !self.shared.stopping() {
            self.shared.board.beat(StageName::Encode);
            match self.from_intake.recv_timeout(IDLE) {
                Ok(id) => self.take(id)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.show_waiting();
        }
        Ok(())
    }

    fn take(&mut self, id: ScanId) -> Result<(), ScanError> {
        self.shared.board.left_queue();
        let Some(mut record) = self.shared.store.record(&id)? else { return Ok(()) };
        if record.state != ScanState::Ingested {
            return Ok(());
        }
        if record.attempts >= MAX_ATTEMPTS {
            let found = format!("{} crashes while this scan was encoded", record.attempts);
            let action = "see the log of those times; a driver or memory fault is the usual cause";
            return self
                .set_aside(record, &Refusal::new(QuarantineReason::Poison, found, "none", action));
        }
        // Journalled before the start: after a crash the count tells which scan was in hand.
        record.attempts += 1;
        self.shared.store.put_record(&record)?;
        let done = std::panic::catch_unwind(AssertUnwindSafe(|| self.encode(id)));
        self.shared.board.update().in_hand = None;
        match done.unwrap_or_else(|panic| Err(crashed(&self.shared, panic.as_ref()))) {
            Ok(Some((tokens, facts))) => self.finish(record, &tokens, facts),
            Ok(None) => {
                record.attempts -= 1;
                Ok(self.shared.store.put_record(&record)?)
            }
            Err(error) => {
                self.shared.metrics.stage_failed(Stage::Encode, &error);
                match error {
                    ScanError::Refused(refusal) => self.set_aside(record, &refusal),
                    // The journal keeps the attempt; the service manager starts us again.
                    error if error.disposition() == Disposition::Fatal => Err(error),
                    error => {
                        warn!(scan = %id, %error, "left for the next start");
                        Ok(())
                    }
                }
            }
        }
    }

    /// Source to tokens; `None` when asked to stop in the middle.
    fn encode(&mut self, id: ScanId) -> Result<Option<(Vec<TokenGrid>, EncodedFacts)>, ScanError> {
        let Self { shared, tokeniser, .. } = self;
        let mut timings = Timings::default();
        let mask = shared.archive.mask(id);
        let source =
            steps::read_source(&shared.archive.scan(id), mask.as_deref(), &shared.limits())?;
        timings.lap("read");
        let canonical = steps::canonical(&source, &shared.method.cube)?;
        drop(source);
        shared.metrics.stage_finished(Stage::Preprocess, timings.lap("preprocess"));
        let batch_before = tokeniser.max_batch();
        let device = tokeniser.device().to_owned();
        let mut batch_started = Instant::now();
        let tokens = tokeniser.tokens(&canonical.volume, |progress| {
            show(shared, id, &device, progress, batch_started.elapsed());
            batch_started = Instant::now();
            if shared.stopping() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
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
        shared.metrics.stage_finished(Stage::Encode, timings.lap("encode"));
        let facts = EncodedFacts {
            brain_ml: canonical.brain_ml,
            cut_fraction: canonical.cut_fraction,
            n_tokens: tokens.first().map_or(0, TokenGrid::n_tokens),
            has_mask: mask.is_some(),
            timings_secs: timings.laps,
        };
        Ok(Some((tokens, facts)))
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
            secs = facts.timings_secs.get("encode"),
            "encoded"
        );
        record.encoded = Some(facts);
        // Durable before the id moves on: from here the scan counts as a member.
        self.shared.store.put_encoded(&record, tokens)?;
        // The score stage ends first only when the service goes down; then the journal knows.
        self.to_score.send(record.id).ok();
        Ok(())
    }

    /// A scan that was accepted and turned out to be impossible. Its file in the incoming folder
    /// stays; the archived copy goes to quarantine.
    fn set_aside(&self, mut record: ScanRecord, refusal: &Refusal) -> Result<(), ScanError> {
        warn!(scan = %record.id, %refusal, "an accepted scan goes to quarantine");
        let config = self.shared.config();
        let folder = &config.directories.quarantine;
        let source = self.shared.archive.scan(record.id);
        ingest::quarantine(folder, &source, record.source_name.as_ref(), refusal, now_secs())
            .map_err(|source| ScanError::Io { doing: "moving a scan to quarantine", source })?;
        record.state = ScanState::Quarantined { refusal: refusal.clone() };
        self.shared.store.put_record(&record)?;
        self.shared.archive.remove(record.id)?;
        self.shared.metrics.quarantined(refusal.reason);
        self.shared.metrics.quarantine_files(ingest::count_quarantined(folder));
        self.shared.board.update().n_quarantined += 1;
        Ok(())
    }

    fn show_waiting(&self) {
        let (n_waiting, oldest) = self.shared.board.queue();
        self.shared.metrics.queue(Stage::Encode, n_waiting, oldest);
    }
}

/// After each batch: progress on the status page, a beat for the watchdog, the device's counters.
fn show(shared: &Shared, id: ScanId, device: &str, progress: Progress, took: Duration) {
    let Progress { done, all, batch } = progress;
    shared.board.beat(StageName::Encode);
    shared.board.update().in_hand =
        Some(InHand { scan: id.short(), slices_done: done, slices_all: all });
    shared.metrics.slices_encoded(device, batch as u64);
    shared.metrics.device_busy(device, took);
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

/// Wall time step by step.
struct Timings {
    since: Instant,
    laps: BTreeMap<String, f64>,
}

impl Default for Timings {
    fn default() -> Self {
        Self { since: Instant::now(), laps: BTreeMap::new() }
    }
}

impl Timings {
    fn lap(&mut self, name: &str) -> Duration {
        let took = self.since.elapsed();
        self.since = Instant::now();
        self.laps.insert(name.to_owned(), took.as_secs_f64());
        took
    }
}
