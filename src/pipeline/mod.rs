//! The stages of the daemon: intake -> encode -> score. Each is a thread that owns its state.
//! Intake reads several files in parallel. Beside a GPU, encoding runs its steps in parallel, too.
//!
//! Scan ids move between stages through short queues. What intake made of a scan for the encoder
//! goes with the id. A slow device slows reading, and the incoming folder grows visibly. What must
//! survive is in the ledger before the id moves on. After a kill at any line the same steps
//! therefore give the same results.

pub mod board;
mod encode;
pub mod identity_key;
mod intake;
mod lost;
mod records;
mod requests;
mod running;
mod score;
mod shared;
mod take_up;
mod timings;

pub(crate) use score::columns::{compare_grid, nearest_of_each};
pub(crate) use shared::log_nearest_pair;

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
};

use crate::{
    domain::error::{ScanError, panic_text},
    engine::Engine,
    watcher::Change,
};
use board::StageName;
use shared::{ARCHIVED, FULL, IDLE, MAX_CRASHES, side_by_side};
use take_up::{TakenUp, finish_refusals, take_up};

pub use shared::{Shared, now_secs};

/// Ids of scans waiting to be scored. While a window is scored the encoder goes on.
const TO_SCORE: usize = 64;

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
        finish_refusals(shared);
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
