//! The stages of the daemon: intake -> encode -> score, each a thread that owns its state. Intake
//! reads several files at once, in threads, and so are the steps of encoding where there is a GPU.
//!
//! Scan ids move between stages, and with them what intake made of a scan for the encoder, through
//! a short queue: a slow device slows reading, and the incoming folder grows visibly. What must
//! survive stands in the journal before the id moves on, so that a kill at any line leaves a state
//! from which the same steps give the same results.

mod archive;
pub mod board;
mod encode;
mod intake;
mod score;
mod timings;

pub(crate) use score::columns::{compare_grid, nearest_of_each};

use std::{
    collections::HashSet,
    panic::AssertUnwindSafe,
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{
    config::Config,
    domain::{
        error::{ScanError, panic_text},
        scan::{ScanId, ScanRecord, ScanState},
    },
    engine::{Engine, Method},
    metrics::Metrics,
    nifti::Limits,
    process::hook,
    store::{Store, StoreError},
    watcher::Change,
};
use archive::Archive;
use board::{Board, StageName};

/// Ids of scans waiting to be scored. While a window is scored the encoder goes on.
const TO_SCORE: usize = 64;

/// A stage that waits for work looks up this often: it shows that it is alive and sees a stop.
const IDLE: Duration = Duration::from_secs(1);

/// How often the full queue of the next stage is tried.
const FULL: Duration = Duration::from_millis(100);

/// Crashes with one scan in hand after which it is held to be the cause: one more than a reboot
/// and a power cut in one day.
const MAX_CRASHES: u32 = 3;

/// Archived sources met the limits when they came; lower ones must not lock them out.
const ARCHIVED: Limits = Limits::NONE;

/// What all stages may use at the same time.
pub struct Shared {
    /// Tokens, columns and the journal.
    pub store: Store,
    /// Prometheus.
    pub metrics: Metrics,
    /// What the status page shows.
    pub board: Board,
    /// What is computed.
    pub method: Method,
    archive: Archive,
    config: RwLock<Arc<Config>>,
    stop: AtomicBool,
}

impl Shared {
    /// Opens the archive under the state folder.
    pub fn new(
        config: Config,
        store: Store,
        metrics: Metrics,
        method: Method,
    ) -> Result<Self, ScanError> {
        let archive = Archive::open(&config.directories.state.join("sources"))?;
        Ok(Self {
            store,
            metrics,
            board: Board::new(),
            method,
            archive,
            config: RwLock::new(Arc::new(config)),
            stop: AtomicBool::new(false),
        })
    }

    /// The settings now in force.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.read().expect("no holder of the lock can panic"))
    }

    /// Puts new settings in force; stages take them over with their next piece of work.
    pub fn set_config(&self, config: Config) {
        *self.config.write().expect("no holder of the lock can panic") = Arc::new(config);
    }

    /// Asks all stages to end after what they have in hand.
    pub fn request_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn limits(&self) -> Limits {
        self.config().intake.limits
    }
}

impl From<StoreError> for ScanError {
    fn from(error: StoreError) -> Self {
        Self::Store(Box::new(error))
    }
}

/// How a stage ended.
#[derive(Debug)]
pub enum StageEnd {
    /// It was asked to.
    Stopped,
    /// An error that no later attempt can mend.
    Failed(ScanError),
    /// A bug; the text of the panic.
    Panicked(String),
}

/// The running stages.
pub struct Pipeline {
    stages: Vec<JoinHandle<()>>,
    /// A line per stage that has ended.
    pub ended: tokio::sync::mpsc::UnboundedReceiver<(StageName, StageEnd)>,
    wake: mpsc::Sender<Change>,
}

impl Pipeline {
    /// Starts the stages on an engine, taking up what an earlier run left unfinished.
    pub fn start(shared: &Arc<Shared>, engine: Engine) -> Result<Self, ScanError> {
        let TakenUp { pending, members, stems } = take_up(shared)?;
        let (wake, woken) = mpsc::channel();
        let (to_encoder, from_intake) = mpsc::sync_channel(intake::n_at_once(shared));
        let (to_score, from_encoder) = mpsc::sync_channel(TO_SCORE);
        let (report_end, ended) = tokio::sync::mpsc::unbounded_channel();
        let Engine { tokeniser, distances, .. } = engine;
        let own = || Arc::clone(shared);
        let spawn = |name, stage: Box<dyn FnOnce() -> Result<(), ScanError> + Send>| {
            spawn_stage(name, stage, report_end.clone())
        };
        let intake = intake::Intake::new(own(), woken, to_encoder, pending, stems);
        let encode = encode::Encode::new(own(), tokeniser, from_intake, to_score);
        let score = score::Score::new(own(), distances, from_encoder, members);
        let stages = vec![
            spawn(StageName::Intake, Box::new(move || intake.run())),
            spawn(StageName::Encode, Box::new(move || encode.run())),
            spawn(StageName::Score, Box::new(move || score.run())),
        ];
        Ok(Self { stages, ended, wake })
    }

    /// A handle that makes the intake look again.
    pub fn waker(&self) -> mpsc::Sender<Change> {
        self.wake.clone()
    }

    /// Waits until every stage has ended; ask for it first with [`Shared::request_stop`].
    pub fn join(self) {
        for stage in self.stages {
            stage.join().expect("a stage catches its own panic");
        }
    }
}

fn spawn_stage(
    name: StageName,
    stage: Box<dyn FnOnce() -> Result<(), ScanError> + Send>,
    ended: tokio::sync::mpsc::UnboundedSender<(StageName, StageEnd)>,
) -> JoinHandle<()> {
    let run = move || {
        let end = match std::panic::catch_unwind(AssertUnwindSafe(stage)) {
            Ok(Ok(())) => StageEnd::Stopped,
            Ok(Err(error)) => StageEnd::Failed(error),
            Err(panic) => StageEnd::Panicked(panic_text(panic.as_ref())),
        };
        // Nobody listens any more when the service is already going down.
        ended.send((name, end)).ok();
    };
    thread::Builder::new().name(name.name().to_owned()).spawn(run).expect("three threads fit")
}

/// Does something with each of some things at once, and takes what comes of it in their order. In
/// threads: waiting for a disk is nothing for the pool that computes. `work` must not panic.
fn side_by_side<T: Sync, R: Send>(
    things: &[T],
    work: impl Fn(&T) -> R + Sync,
    mut take: impl FnMut(&T, R),
) {
    if let [one] = things {
        return take(one, work(one));
    }
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> =
            things.iter().map(|thing| (thing, scope.spawn(move || work(thing)))).collect();
        for (thing, thread) in threads {
            take(thing, thread.join().expect("it does not panic"));
        }
    });
}

/// What an earlier run left in the journal, in order of arrival.
#[derive(Default)]
struct TakenUp {
    /// Scans that wait for the encoder, and when each was first seen.
    pending: Vec<(ScanId, u64)>,
    /// Members of windows.
    members: Vec<ScanRecord>,
    /// Output stems of all scans ever.
    stems: HashSet<String>,
}

/// Sorts the journal into scans that wait for the encoder and members of windows. Members whose
/// tokens were made by another method are encoded again from their archived source: tokens of two
/// methods cannot be compared.
fn take_up(shared: &Shared) -> Result<TakenUp, ScanError> {
    let mut up = TakenUp::default();
    let records = shared.store.records()?;
    shared.archive.keep_only(|id| {
        let holds = |r: &ScanRecord| matches!(r.state, ScanState::Ingested | ScanState::Encoded);
        records.iter().any(|record| record.id == id && holds(record))
    })?;
    for mut record in records {
        up.stems.insert(record.output_stem.clone());
        // Its archived source is what another program, or none, made of it. It stays as it is, with
        // its results, and is a member again when the settings are as they were.
        if !hook::is_prepared_alike(&record, shared.method.hook.as_deref()) {
            continue;
        }
        let outdated = record.cohort.method != shared.method.fingerprint;
        match record.state {
            ScanState::Encoded if !outdated => up.members.push(record),
            ScanState::Encoded | ScanState::Ingested => {
                up.pending.push((record.id, record.first_seen_secs));
                if outdated {
                    record.cohort.method.clone_from(&shared.method.fingerprint);
                    shared.store.forget_tokens(&record)?;
                }
            }
            ScanState::Evicted | ScanState::Quarantined { .. } => {}
        }
    }
    Ok(up)
}

/// Seconds since 1970.
pub fn now_secs() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
