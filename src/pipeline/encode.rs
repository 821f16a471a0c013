//! The second stage: turns prepared scans into stored tokens.
//!
//! A scan passes three steps. The first cuts its first slices, the second encodes all slices on the
//! device, the third makes tokens from the features. Beside a GPU the steps run in parallel, each
//! with another scan, so that the device need not wait.

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

use rayon::{ThreadPool, ThreadPoolBuilder};
use tracing::{info, warn};

pub(super) use self::setback::move_to_quarantine;
use self::setback::{crashed, fail, put_back, send_to_quarantine};
use super::{
    FULL, IDLE, MAX_CRASHES, Shared,
    board::{InHand, Queue, Queued, StageName},
    lost::read_archived,
    now_secs,
    timings::Timings,
};
use crate::{
    compute::tokenise::{
        EncodedVolume, Plan, Progress, StartedVolume, TokeniseError, Tokeniser, tokens_per_layer,
    },
    domain::{
        error::{DeviceError, QuarantineReason, Refusal, ScanError},
        scan::{EncodedFacts, ScanId, ScanRecord, ScanState},
    },
    metrics::{Fallback, Stage},
    numeric::{fine::FineVolume, preprocess::Canonical, token::TokenGrid, volume::Volume},
    prepare::Encodable,
};

/// A scan to be encoded next.
pub(super) struct Due {
    /// The scan. Archive and ledger have it.
    pub(super) id: ScanId,
    /// What intake prepared, if it is still in memory. Otherwise this stage prepares the scan
    /// again.
    pub(super) prepared: Option<Box<InMemory>>,
    pub(super) queued: Queued,
}

/// A scan whose tokens are stored.
pub(super) struct Encoded {
    pub(super) id: ScanId,
    pub(super) queued: Queued,
}

/// A scan that was read and prepared for the encoder.
pub(super) struct InMemory {
    pub(super) scan: Encodable,
    pub(super) timings: Timings,
}

/// A scan in this stage, with the product of its last step.
struct Work<'r, M> {
    record: ScanRecord,
    /// Token counts and times are still missing.
    facts: EncodedFacts,
    fine: FineVolume,
    timings: Timings,
    made: M,
    _counted: Counted<'r>,
}

/// A canonical volume with its first slices cut.
struct Cut<'r> {
    volume: Volume,
    started: StartedVolume<'r>,
    /// Keeps the scan in the queue until the device takes it.
    queued: Queued,
}

/// The state that the steps share.
struct EncodeContext<'s> {
    shared: &'s Shared,
    /// Own threads for this stage, as many as all other stages share. On a CPU, the encoder keeps
    /// its threads busy for a whole batch. The other stages run thousands of tasks of a millisecond
    /// in parallel. With common threads, each of these would wait until a batch ends.
    pool: ThreadPool,
    /// Number of scans between the start of the first step and the end of the last.
    n_in_steps: AtomicUsize,
    /// A step has ended, so no further scan is taken.
    has_ended: AtomicBool,
}

/// Counts one scan in the steps until it is dropped.
struct Counted<'r>(&'r AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Ends all steps when one step ends, also after an error or a panic.
struct EndsAll<'r>(&'r AtomicBool);

impl Drop for EndsAll<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl<'s> EncodeContext<'s> {
    fn new(shared: &'s Shared) -> Self {
        let pool = ThreadPoolBuilder::new().thread_name(|index| format!("encode-{index}")).build();
        let pool = pool.expect("threads for each core");
        Self { shared, pool, n_in_steps: 0.into(), has_ended: false.into() }
    }

    fn count(&self) -> Counted<'_> {
        self.n_in_steps.fetch_add(1, Ordering::Relaxed);
        Counted(&self.n_in_steps)
    }

    fn is_empty(&self) -> bool {
        self.n_in_steps.load(Ordering::Relaxed) == 0
    }

    fn is_over(&self) -> bool {
        self.shared.stopping() || self.has_ended.load(Ordering::Relaxed)
    }

    fn ends_with_this(&self) -> EndsAll<'_> {
        EndsAll(&self.has_ended)
    }

    /// Runs one step for a scan. Returns `None` if the step was asked to stop or failed; the
    /// ledger then has an entry about it.
    fn attempt<T: Send>(
        &self,
        record: ScanRecord,
        work: impl FnOnce(&ScanRecord) -> Result<Option<T>, ScanError> + Send,
    ) -> Result<Option<(ScanRecord, T)>, ScanError> {
        let done = catch_unwind(AssertUnwindSafe(|| self.pool.install(|| work(&record))));
        match done.unwrap_or_else(|panic| Err(crashed(self.shared, panic.as_ref()))) {
            Ok(Some(made)) => return Ok(Some((record, made))),
            Ok(None) => put_back(self.shared, record)?,
            Err(error) => {
                self.shared.metrics.stage_failed(Stage::Encode, &error);
                fail(self.shared, record, error)?;
            }
        }
        Ok(None)
    }

    /// Shows a scan as being encoded, unless another one is shown.
    fn show_preparing(&self, id: ScanId) {
        let hand = InHand { scan: id.short(), slices_done: 0, slices_all: 0 };
        self.shared.board.update().in_hand.get_or_insert(hand);
    }

    /// Stops showing the scan. The device may already encode the next one, which stays.
    fn stop_showing(&self, id: ScanId) {
        let mut status = self.shared.board.update();
        if status.in_hand.as_ref().is_some_and(|hand| hand.scan == id.short()) {
            status.in_hand = None;
        }
    }
}

pub(super) struct Encode {
    shared: Arc<Shared>,
    tokeniser: Tokeniser,
    from_intake: Receiver<Due>,
    to_score: SyncSender<Encoded>,
}

impl Encode {
    pub(super) fn new(
        shared: Arc<Shared>,
        tokeniser: Tokeniser,
        from_intake: Receiver<Due>,
        to_score: SyncSender<Encoded>,
    ) -> Self {
        shared.metrics.encode_batch(tokeniser.device(), tokeniser.max_batch());
        shared.metrics.device_memory(tokeniser.device(), tokeniser.memory());
        Self { shared, tokeniser, from_intake, to_score }
    }

    pub(super) fn run(self) -> Result<(), ScanError> {
        let Self { shared, tokeniser, from_intake, to_score } = self;
        let (context, plan) = (&EncodeContext::new(&shared), &*tokeniser.plan());
        let is_async = tokeniser.is_async();
        let start = Start { context, plan };

        let device = Device { context, tokeniser };
        let finish = Finish { context, to_score };
        if is_async {
            side_by_side(context, from_intake, start, device, finish)
        } else {
            in_turn(&from_intake, start, device, finish)
        }
    }
}

fn in_turn<'r>(
    from_intake: &Receiver<Due>,
    start: Start<'r>,
    mut device: Device<'r>,
    finish: Finish<'r>,
) -> Result<(), ScanError> {
    start.all(from_intake, |work| device.encode(work)?.map_or(Ok(()), |work| finish.finish(work)))
}

fn side_by_side<'r>(
    context: &'r EncodeContext<'r>,
    from_intake: Receiver<Due>,
    start: Start<'r>,
    mut device: Device<'r>,
    finish: Finish<'r>,
) -> Result<(), ScanError> {
    let (to_device, started) = mpsc::sync_channel(0);
    let (to_finish, encoded) = mpsc::sync_channel(0);
    // A step that closes its channel has failed and reports that itself.
    let put_back = |record| put_back(context.shared, record);

    thread::scope(|scope| {
        // The steps must also end if a thread cannot be started.
        let ends = context.ends_with_this();

        let starting = spawn(scope, "encode-start", move || {
            start.all(&from_intake, |work| {
                to_device.send(work).or_else(|SendError(work)| put_back(work.record))
            })
        });

        let finishing = spawn(scope, "encode-finish", move || {
            let _ends = context.ends_with_this();
            encoded.iter().try_for_each(|work| finish.finish(work))
        });

        let encoding = spawn(scope, "encode-device", move || {
            let _ends = context.ends_with_this();
            started.iter().try_for_each(|work| {
                let Some(work) = device.encode(work)? else { return Ok(()) };
                to_finish.send(work).or_else(|SendError(work)| put_back(work.record))
            })
        });

        let starting = joined(starting);
        drop(ends);
        joined(finishing).and(joined(encoding)).and(starting)
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

/// The first step: prepares scans and cuts their first slices.
struct Start<'r> {
    context: &'r EncodeContext<'r>,
    plan: &'r Plan,
}

impl<'r> Start<'r> {
    /// Starts arriving scans and passes them to the next step, until asked to stop.
    fn all(
        self,
        from_intake: &Receiver<Due>,
        mut pass_on: impl FnMut(Work<'r, Cut<'r>>) -> Result<(), ScanError>,
    ) -> Result<(), ScanError> {
        let Shared { board, metrics, .. } = self.context.shared;
        while !self.context.is_over() {
            // While scans are being encoded, only they give heartbeats: one here would hide that a
            // scan hangs.
            if self.context.is_empty() {
                board.heartbeat(StageName::Encode);
            }

            match from_intake.recv_timeout(IDLE) {
                Ok(due) => self.start_and_pass_on(due, &mut pass_on)?,
                Err(RecvTimeoutError::Timeout) => {}
                // Intake has failed and reports that itself. If this stage ended first, it would
                // look like the cause.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(IDLE),
            }

            let (n_waiting, oldest) = board.queue(Queue::Encode);
            metrics.queue(Stage::Encode, n_waiting, oldest);
        }
        Ok(())
    }

    fn start_and_pass_on(
        &self,
        due: Due,
        pass_on: &mut impl FnMut(Work<'r, Cut<'r>>) -> Result<(), ScanError>,
    ) -> Result<(), ScanError> {
        let id = due.id;
        let record = self.to_be_encoded(&id)?;
        // A scan that was being encoded at a crash is encoded alone. Otherwise other scans would be
        // blamed for the next crash, too.
        let is_suspect = record.as_ref().is_some_and(|record| record.attempts > 0);
        if is_suspect {
            self.wait_for_the_others();
        }
        if self.context.is_over() {
            return Ok(());
        }

        self.context.show_preparing(id);
        let work = record.map_or(Ok(None), |record| self.start(record, due))?;
        let Some(work) = work else {
            self.context.stop_showing(id);
            return Ok(());
        };
        pass_on(work)?;
        if is_suspect {
            self.wait_for_the_others();
        }
        Ok(())
    }

    /// The record of a scan that needs the encoder: a new one, or a member without tokens.
    fn to_be_encoded(&self, id: &ScanId) -> Result<Option<ScanRecord>, ScanError> {
        let Shared { records, store, method, .. } = self.context.shared;
        let Some(record) = records.get(id)? else { return Ok(None) };
        let needs_it = match record.state {
            ScanState::Ingested => true,
            ScanState::Encoded => !store.has_tokens(id, &method.fingerprint, method.n_grids())?,
            _ => false,
        };
        Ok(needs_it.then_some(record))
    }

    fn wait_for_the_others(&self) {
        while !self.context.is_empty() && !self.context.is_over() {
            thread::sleep(FULL);
        }
    }

    fn start(
        &self,
        mut record: ScanRecord,
        Due { prepared, queued, .. }: Due,
    ) -> Result<Option<Work<'r, Cut<'r>>>, ScanError> {
        let EncodeContext { shared, .. } = self.context;
        if record.attempts >= MAX_CRASHES {
            let found = format!("{} crashes during the encoding of this scan", record.attempts);
            let action =
                "see the log of these crashes; the usual cause is a fault of driver or memory";
            let needed = "a scan that the encoder processes without a crash";
            let refusal = Refusal::new(QuarantineReason::Poison, found, needed, action);
            send_to_quarantine(shared, record, &refusal)?;
            return Ok(None);
        }

        // Written before the start: after a crash the count shows which scans were being encoded.
        record.attempts += 1;
        shared.records.put(&record)?;
        let counted = self.context.count();

        let work = self.context.attempt(record, |record| {
            let prepared = prepared.map_or_else(|| self.prepare(record), |made| Ok(*made))?;
            let InMemory { scan, mut timings } = prepared;
            timings.resume(Stage::Encode);
            let facts = scan.facts();
            let Canonical { volume, fine, .. } = scan.canonical;
            let started = self.plan.start(&volume);
            timings.pause();
            Ok(Some((facts, fine, timings, volume, started)))
        })?;

        // The guard stays out of the attempt: a scan that fails is on the board until the ledger
        // says what became of it.
        Ok(work.map(|(record, (facts, fine, timings, volume, started))| Work {
            record,
            facts,
            fine,
            timings,
            made: Cut { volume, started, queued },
            _counted: counted,
        }))
    }

    /// Reads a scan from the archive and prepares it. This happens after a start, or if several
    /// scans arrived together.
    fn prepare(&self, record: &ScanRecord) -> Result<InMemory, ScanError> {
        let Shared { metrics, method, .. } = self.context.shared;
        let mut timings = Timings::start(Stage::Decode);
        let source = read_archived(self.context.shared, record)?;

        timings.switch(Stage::Preprocess);
        let scan = Encodable::new(&source, method, &record.cohort)?;
        timings.stop(&[Stage::Decode, Stage::Preprocess], metrics);
        Ok(InMemory { scan, timings })
    }
}

/// The second step: encodes the slices.
struct Device<'r> {
    context: &'r EncodeContext<'r>,
    tokeniser: Tokeniser,
}

impl<'r> Device<'r> {
    fn encode(
        &mut self,
        work: Work<'r, Cut<'r>>,
    ) -> Result<Option<Work<'r, EncodedVolume<'r>>>, ScanError> {
        let Work { record, facts, fine, mut timings, made, _counted } = work;
        let Cut { volume, started, queued } = made;
        let (context, id) = (self.context, record.id);
        // In this order the scan is on the board all the time.
        let hand = InHand { scan: id.short(), slices_done: 0, slices_all: 0 };
        context.shared.board.update().in_hand = Some(hand);
        drop(queued);

        let encoded = context.attempt(record, |_| {
            timings.resume(Stage::Encode);
            let encoded = self.slices(id, &volume, started);
            timings.pause();
            encoded
        })?;
        if encoded.is_none() {
            context.stop_showing(id);
        }
        Ok(encoded.map(|(record, made)| Work { record, facts, fine, timings, made, _counted }))
    }

    /// Encodes all slices. Returns `None` if asked to stop before the end.
    fn slices(
        &mut self,
        id: ScanId,
        volume: &Volume,
        started: StartedVolume<'r>,
    ) -> Result<Option<EncodedVolume<'r>>, ScanError> {
        let Self { context, tokeniser } = self;
        if context.is_over() {
            return Ok(None);
        }

        let shared = context.shared;
        let batch_before = tokeniser.max_batch();
        let device = tokeniser.device().to_owned();
        let encoded = tokeniser.encode(volume, started, |progress| {
            show(shared, id, &device, progress);
            if context.is_over() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });

        shared.metrics.device_memory(&device, tokeniser.memory());
        if tokeniser.max_batch() < batch_before {
            warn!(
                slices = tokeniser.max_batch(),
                "the device ran out of memory; continuing with smaller batches"
            );
            shared.metrics.encode_fallback(Fallback::SmallerBatch);
            shared.metrics.encode_batch(&device, tokeniser.max_batch());
        }

        match encoded {
            Ok(encoded) => Ok(Some(encoded)),
            Err(TokeniseError::Stopped) => Ok(None),
            Err(error) => Err(of_device(error, &device)),
        }
    }
}

/// The third step: makes tokens and stores them.
struct Finish<'r> {
    context: &'r EncodeContext<'r>,
    to_score: SyncSender<Encoded>,
}

impl Finish<'_> {
    /// Makes tokens, stores them, and passes the scan to the score stage.
    fn finish(&self, work: Work<'_, EncodedVolume<'_>>) -> Result<(), ScanError> {
        let Work { record, facts, fine, mut timings, made, .. } = work;
        let EncodeContext { shared, .. } = self.context;
        let (id, device) = (record.id, &shared.method.device);
        timings.resume(Stage::Encode);

        let made = self.context.attempt(record, |_| {
            Ok(Some(made.into_tokens().map_err(|error| of_device(error, device))?))
        })?;
        if let Some((record, tokens)) = made {
            timings.stop(&[Stage::Encode], &shared.metrics);
            let n_tokens = tokens_per_layer(&tokens, shared.method.n_parts);
            let timings_secs = timings.secs();
            let facts = EncodedFacts { n_tokens, encoded_secs: now_secs(), timings_secs, ..facts };
            self.store(record, &tokens, &fine, facts)?;
            self.pass_on(id);
        }
        self.context.stop_showing(id);
        Ok(())
    }

    /// Stores the tokens and then the record, durably, before the id moves to the next stage. From
    /// here the scan is a member.
    fn store(
        &self,
        record: ScanRecord,
        tokens: &[TokenGrid],
        fine: &FineVolume,
        facts: EncodedFacts,
    ) -> Result<(), ScanError> {
        let shared = self.context.shared;
        let secs = facts.timings_secs.get(Stage::Encode.name());
        info!(scan = %record.id, tokens = facts.n_tokens, secs, "encoded");

        let (state, encoded) = (ScanState::Encoded, Some(facts));
        let done = ScanRecord { state, attempts: 0, encoded, ..record.clone() };
        let stored = shared.store.put_tokens(record.id, &done.cohort.method, tokens, Some(fine));
        if stored.is_err() {
            // The scan did not cause the full disk. Writing this may fail, too.
            put_back(shared, record).ok();
        }
        stored?;
        shared.records.put(&done)
    }

    /// Passes an id to the score stage and waits while its queue is full. The score stage ends
    /// first only when the service stops. A stop may drop the id, because the ledger has the scan.
    fn pass_on(&self, id: ScanId) {
        let board = &self.context.shared.board;
        let mut encoded = Encoded { id, queued: board.enqueue(Queue::Score, now_secs()) };
        while !self.context.is_over() {
            board.heartbeat(StageName::Encode);
            match self.to_score.try_send(encoded) {
                Ok(()) | Err(TrySendError::Disconnected(_)) => return,
                Err(TrySendError::Full(back)) => encoded = back,
            }
            thread::sleep(FULL);
        }
    }
}

fn of_device(error: TokeniseError, device: &str) -> ScanError {
    match error {
        TokeniseError::Device(error) => error.into(),
        TokeniseError::Stopped | TokeniseError::Features(_) => {
            DeviceError::Failed { device: device.to_owned(), message: error.to_string() }.into()
        }
    }
}

/// After each batch: progress on the status page, a heartbeat for the watchdog, and the device's
/// counters.
fn show(shared: &Shared, id: ScanId, device: &str, progress: Progress) {
    let Progress { done, all, batch, took } = progress;
    shared.board.heartbeat(StageName::Encode);
    shared.board.update().in_hand =
        Some(InHand { scan: id.short(), slices_done: done, slices_all: all });
    shared.metrics.slices_encoded(device, batch as u64);
    shared.metrics.device_busy(device, took);
}
