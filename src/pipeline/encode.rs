//! The second stage: turns prepared scans into stored tokens.
//!
//! A scan takes three steps: its first slices are cut out, the device encodes all of them, and
//! their features become tokens. Where the device works apart from this processor the steps go on
//! side by side, each with a scan of its own, so that the device need not wait.

mod setback;

use std::{
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SendError, SyncSender, TrySendError},
    },
    thread::{self, Scope, ScopedJoinHandle},
};

use tracing::{info, warn};

use self::setback::{crashed, fail, missing_source, put_back, set_aside};
use super::{
    ARCHIVED, FULL, IDLE, MAX_CRASHES, Shared,
    board::{InHand, Queue, StageName},
    now_secs,
    steps::{self, Encodable},
    timings::Timings,
};
use crate::{
    domain::{
        error::{DeviceError, QuarantineReason, Refusal, ScanError},
        scan::{ScanId, ScanRecord, ScanState},
        tokenise::{Features, Plan, Progress, Started, TokeniseError, Tokeniser},
    },
    metrics::{Fallback, Stage},
    numeric::token::TokenGrid,
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

/// A scan on its way through this stage, and what the last step made of it.
struct Work<'r, M> {
    record: ScanRecord,
    scan: Encodable,
    timings: Timings,
    made: M,
    _counted: Counted<'r>,
}

/// What the steps tell each other.
#[derive(Default)]
struct Run {
    /// Scans between the first step and the end of the last.
    n_on_their_way: AtomicUsize,
    /// No further scan is taken.
    is_over: AtomicBool,
}

/// One of the scans on their way.
struct Counted<'r>(&'r AtomicUsize);

impl Run {
    fn count(&self) -> Counted<'_> {
        self.n_on_their_way.fetch_add(1, Ordering::Relaxed);
        Counted(&self.n_on_their_way)
    }

    fn is_empty(&self) -> bool {
        self.n_on_their_way.load(Ordering::Relaxed) == 0
    }

    /// When the guard is dropped, however that comes about, no further scan is taken.
    fn is_over_with_this(&self) -> OverWithThis<'_> {
        OverWithThis(&self.is_over)
    }
}

struct OverWithThis<'r>(&'r AtomicBool);

impl Drop for OverWithThis<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
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

    pub(super) fn run(self) -> Result<(), ScanError> {
        let Self { shared, tokeniser, from_intake, to_score } = self;
        let (run, plan) = (&Run::default(), &*tokeniser.plan());
        let works_apart = tokeniser.works_apart();
        let shared = &*shared;
        let start = Start { shared, run, plan, from_intake };
        let device = Device { shared, tokeniser };
        let finish = Finish { shared, to_score };
        if works_apart {
            side_by_side(run, start, device, finish)
        } else {
            in_turn(start, device, finish)
        }
    }
}

fn in_turn(start: Start<'_>, mut device: Device<'_>, finish: Finish<'_>) -> Result<(), ScanError> {
    start.all(|work| {
        device.encode(work)?.map_or(Ok(()), |work| finish.finish(work))?;
        Ok(ControlFlow::Continue(()))
    })
}

fn side_by_side<'r>(
    run: &'r Run,
    start: Start<'r>,
    mut device: Device<'_>,
    finish: Finish<'_>,
) -> Result<(), ScanError> {
    let shared = start.shared;
    let (to_device, started) = mpsc::sync_channel(0);
    let (to_finish, encoded) = mpsc::sync_channel(0);
    thread::scope(|scope| {
        let starting = spawn(scope, "encode-start", move || {
            start.all(|work| match to_device.send(work) {
                Ok(()) => Ok(ControlFlow::Continue(())),
                Err(SendError(work)) => {
                    put_back(shared, work.record)?;
                    Ok(ControlFlow::Break(()))
                }
            })
        });
        let finishing = spawn(scope, "encode-finish", move || {
            encoded.iter().try_for_each(|work| finish.finish(work))
        });
        let encoding = {
            let _over = run.is_over_with_this();
            device.encode_all(started, to_finish)
        };
        let starting = joined(starting);
        joined(finishing).and(encoding).and(starting)
    })
}

fn spawn<'scope, 'env, T: Send + 'scope>(
    scope: &'scope Scope<'scope, 'env>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> ScopedJoinHandle<'scope, T> {
    thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, work).expect("a thread fits")
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// The first step.
struct Start<'r> {
    shared: &'r Shared,
    run: &'r Run,
    plan: &'r Plan,
    from_intake: Receiver<Due>,
}

impl<'r> Start<'r> {
    /// Starts scans as they come, and hands them on, until asked to stop.
    fn all(
        self,
        mut hand_on: impl FnMut(Work<'r, Started<'r>>) -> Result<ControlFlow<()>, ScanError>,
    ) -> Result<(), ScanError> {
        while !self.is_over() {
            // Else those that have scans in hand must show that they are alive.
            if self.run.is_empty() {
                self.shared.board.beat(StageName::Encode);
            }
            match self.from_intake.recv_timeout(IDLE) {
                Ok(due) => {
                    if self.start_and_hand_on(due, &mut hand_on)?.is_break() {
                        break;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                // The intake has failed, and says so; a stage that ended first would be taken for
                // the cause.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(IDLE),
            }
            let (n_waiting, oldest) = self.shared.board.queue(Queue::Encode);
            self.shared.metrics.queue(Stage::Encode, n_waiting, oldest);
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.shared.stopping() || self.run.is_over.load(Ordering::Relaxed)
    }

    fn start_and_hand_on(
        &self,
        Due { id, prepared }: Due,
        hand_on: &mut impl FnMut(Work<'r, Started<'r>>) -> Result<ControlFlow<()>, ScanError>,
    ) -> Result<ControlFlow<()>, ScanError> {
        let record = self.shared.store.record(&id)?;
        let Some(record) = record.filter(|record| record.state == ScanState::Ingested) else {
            self.shared.board.left(Queue::Encode);
            return Ok(ControlFlow::Continue(()));
        };
        // A scan that was in hand at a crash goes alone: others would be blamed for the next one,
        // too.
        let is_suspect = record.attempts > 0;
        if is_suspect {
            self.wait_for_the_others();
        }
        let Some(work) = self.start(record, prepared)? else {
            self.shared.board.left(Queue::Encode);
            return Ok(ControlFlow::Continue(()));
        };
        let handed = hand_on(work)?;
        if is_suspect {
            self.wait_for_the_others();
        }
        Ok(handed)
    }

    fn wait_for_the_others(&self) {
        while !self.run.is_empty() && !self.is_over() {
            thread::sleep(FULL);
        }
    }

    fn start(
        &self,
        mut record: ScanRecord,
        prepared: Option<Box<Prepared>>,
    ) -> Result<Option<Work<'r, Started<'r>>>, ScanError> {
        if record.attempts >= MAX_CRASHES {
            let found = format!("{} crashes while this scan was encoded", record.attempts);
            let action = "see the log of those times; a driver or memory fault is the usual cause";
            let refusal = Refusal::new(QuarantineReason::Poison, found, "none", action);
            set_aside(self.shared, record, &refusal)?;
            return Ok(None);
        }
        // Journalled before the start: after a crash the count tells which scans were in hand.
        record.attempts += 1;
        self.shared.store.put_record(&record)?;
        let counted = self.run.count();
        let work = attempt(self.shared, record, |record| {
            let prepared = prepared.map_or_else(|| self.prepare(record), |made| Ok(*made))?;
            let Prepared { scan, mut timings } = prepared;
            timings.resume(Stage::Encode);
            let made = self.plan.start(&scan.canonical.volume);
            timings.pause();
            Ok(Some((scan, timings, made)))
        })?;
        Ok(work.map(|(record, (scan, timings, made))| Work {
            record,
            scan,
            timings,
            made,
            _counted: counted,
        }))
    }

    /// Reads a scan from the archive and makes it ready: after a start, or when several came at
    /// once.
    fn prepare(&self, record: &ScanRecord) -> Result<Prepared, ScanError> {
        let Shared { archive, metrics, method, .. } = self.shared;
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
}

/// The second step.
struct Device<'s> {
    shared: &'s Shared,
    tokeniser: Tokeniser,
}

impl Device<'_> {
    /// Encodes what the first step hands over until that ends.
    fn encode_all<'r>(
        &mut self,
        started: Receiver<Work<'r, Started<'r>>>,
        to_finish: SyncSender<Work<'r, Features<'r>>>,
    ) -> Result<(), ScanError> {
        for work in started {
            let Some(work) = self.encode(work)? else { continue };
            if let Err(SendError(work)) = to_finish.send(work) {
                // The last step has failed, and says so.
                return put_back(self.shared, work.record);
            }
        }
        Ok(())
    }

    fn encode<'r>(
        &mut self,
        work: Work<'r, Started<'r>>,
    ) -> Result<Option<Work<'r, Features<'r>>>, ScanError> {
        let Work { record, scan, mut timings, made, _counted } = work;
        let (shared, id) = (self.shared, record.id);
        // In this order: a scan is always on the board.
        let hand = InHand { scan: id.short(), slices_done: 0, slices_all: 0 };
        shared.board.update().in_hand = Some(hand);
        shared.board.left(Queue::Encode);
        let encoded = attempt(shared, record, |_| {
            timings.resume(Stage::Encode);
            let features = self.features(id, &scan, made);
            timings.pause();
            features
        })?;
        if encoded.is_none() {
            out_of_hand(shared, id);
        }
        Ok(encoded.map(|(record, made)| Work { record, scan, timings, made, _counted }))
    }

    /// The features of all slices; `None` when asked to stop in the middle.
    fn features<'r>(
        &mut self,
        id: ScanId,
        scan: &Encodable,
        started: Started<'r>,
    ) -> Result<Option<Features<'r>>, ScanError> {
        let Self { shared, tokeniser } = self;
        if shared.stopping() {
            return Ok(None);
        }
        let batch_before = tokeniser.max_batch();
        let device = tokeniser.device().to_owned();
        let features = tokeniser.encode(&scan.canonical.volume, started, |progress| {
            show(shared, id, &device, progress);
            if shared.stopping() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        shared.metrics.device_memory(&device, tokeniser.memory());
        if tokeniser.max_batch() < batch_before {
            warn!(slices = tokeniser.max_batch(), "the device ran out of memory; smaller batches");
            shared.metrics.encode_fallback(Fallback::SmallerBatch);
            shared.metrics.encode_batch(&device, tokeniser.max_batch());
        }
        match features {
            Ok(features) => Ok(Some(features)),
            Err(TokeniseError::Stopped) => Ok(None),
            Err(error) => Err(of_device(error, &device)),
        }
    }
}

/// The third step.
struct Finish<'s> {
    shared: &'s Shared,
    to_score: SyncSender<ScanId>,
}

impl Finish<'_> {
    /// Makes tokens, stores them, then hands on.
    fn finish(&self, work: Work<'_, Features<'_>>) -> Result<(), ScanError> {
        let Work { record, scan, mut timings, made, .. } = work;
        let (shared, id) = (self.shared, record.id);
        let device = &shared.method.device;
        timings.resume(Stage::Encode);
        let made = attempt(shared, record, |_| {
            Ok(Some(made.into_tokens().map_err(|error| of_device(error, device))?))
        })?;
        timings.stop(&[Stage::Encode], &shared.metrics);
        let stored =
            made.map_or(Ok(()), |(record, tokens)| self.store(record, &tokens, &scan, &timings));
        out_of_hand(shared, id);
        stored
    }

    fn store(
        &self,
        mut record: ScanRecord,
        tokens: &[TokenGrid],
        scan: &Encodable,
        timings: &Timings,
    ) -> Result<(), ScanError> {
        let facts = scan.facts(tokens, &self.shared.method, timings.secs());
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
}

/// Does something with a scan. When there is nothing after it, it was asked to stop; then, and when
/// it fails, the journal learns so.
fn attempt<T>(
    shared: &Shared,
    record: ScanRecord,
    work: impl FnOnce(&ScanRecord) -> Result<Option<T>, ScanError>,
) -> Result<Option<(ScanRecord, T)>, ScanError> {
    let done = catch_unwind(AssertUnwindSafe(|| work(&record)));
    match done.unwrap_or_else(|panic| Err(crashed(shared, panic.as_ref()))) {
        Ok(Some(made)) => return Ok(Some((record, made))),
        Ok(None) => put_back(shared, record)?,
        Err(error) => {
            shared.metrics.stage_failed(Stage::Encode, &error);
            fail(shared, record, error)?;
        }
    }
    Ok(None)
}

fn of_device(error: TokeniseError, device: &str) -> ScanError {
    match error {
        TokeniseError::Device(error) => error.into(),
        TokeniseError::Stopped | TokeniseError::Features(_) => {
            DeviceError::Failed { device: device.to_owned(), message: error.to_string() }.into()
        }
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

/// The device may have the next scan in hand already.
fn out_of_hand(shared: &Shared, id: ScanId) {
    let mut status = shared.board.update();
    if status.in_hand.as_ref().is_some_and(|hand| hand.scan == id.short()) {
        status.in_hand = None;
    }
}
