//! What the daemon is doing now: for the status page, the service manager and the watchdog.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

/// The threads of the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageName {
    /// Looks for files and reads them.
    Intake,
    /// Owns the encoder.
    Encode,
    /// Owns the windows.
    Score,
}

impl StageName {
    /// All stages.
    pub const ALL: [Self; 3] = [Self::Intake, Self::Encode, Self::Score];

    /// Name of the thread.
    pub fn name(self) -> &'static str {
        match self {
            Self::Intake => "intake",
            Self::Encode => "encode",
            Self::Score => "score",
        }
    }
}

/// What a scan waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Queue {
    /// The encoder.
    Encode,
    /// Its first result.
    Score,
}

/// The scan that the encoder has in hand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InHand {
    /// Short id.
    pub scan: String,
    /// Slices encoded.
    pub slices_done: usize,
    /// Slices in all; 0 until the first are done.
    pub slices_all: usize,
}

/// One cohort's window.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CohortStatus {
    /// Members now.
    pub n_scans: usize,
    /// Members needed before anything is scored.
    pub min_scans: usize,
    /// Members that it can hold.
    pub max_scans: usize,
    /// How much its scans differ as a whole; near 1 for one scanner, warned of above 1.15.
    pub heterogeneity: Option<f64>,
    /// Members that lie far from the others as a whole: another sequence or scanner?
    #[serde(default)]
    pub n_unlike: usize,
    /// Members that the others are not compared with, because they are not good enough.
    #[serde(default)]
    pub n_set_aside: usize,
    /// Members beyond the first of their patient, which do not count for `min_scans`.
    #[serde(default)]
    pub n_same_patient: usize,
    /// Whether it is full with scans of too few patients, which are compared all the same.
    #[serde(default)]
    pub few_patients: bool,
    /// Results that are missing, or older than the window, and wait to be written.
    pub n_outdated: usize,
    /// Last completed scoring, seconds since 1970.
    pub last_scored_secs: Option<u64>,
}

impl CohortStatus {
    /// Members that count for `min_scans`.
    pub fn n_counted(&self) -> usize {
        self.n_scans.saturating_sub(self.n_set_aside + self.n_same_patient)
    }
}

/// Which files of the incoming folder are passed over.
pub const PASSED_OVER: &str =
    "links, pipes, or neither named like NIfTI files (intake.accept) nor DICOM";

/// Everything that `/status.json` shows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Whether it takes and processes scans.
    pub ready: bool,
    /// Why not, in words.
    pub reasons: BTreeSet<String>,
    /// Network in use.
    pub model: String,
    /// Device in use.
    pub device: String,
    /// Fingerprint of the method.
    pub method: String,
    /// Files seen that are not whole yet.
    pub n_settling: usize,
    /// Files in the incoming folder that are no scans, and no JSON beside them.
    #[serde(default)]
    pub n_passed_over: usize,
    /// Scans read that wait for the encoder.
    pub n_waiting: usize,
    /// Scans encoded that wait for their first result.
    #[serde(default)]
    pub n_unscored: usize,
    /// What intake is at, where that can take long: no other file is read meanwhile.
    #[serde(default)]
    pub intake: Option<String>,
    /// The scan being encoded.
    pub in_hand: Option<InHand>,
    /// Windows by cohort.
    pub cohorts: BTreeMap<String, CohortStatus>,
    /// Scans accepted since the start.
    pub n_accepted: u64,
    /// Duplicates since the start.
    pub n_duplicates: u64,
    /// Files refused since the start.
    pub n_quarantined: u64,
    /// Results written since the start.
    pub n_reported: u64,
}

impl Status {
    /// Whether it takes and processes scans, with nothing in the way.
    pub fn takes_work(&self) -> bool {
        self.ready && self.reasons.is_empty()
    }

    /// One line for the service manager.
    pub fn line(&self) -> String {
        let encoding = self.in_hand.as_ref().map(|hand| match hand.slices_all {
            0 => "preparing".to_owned(),
            all => format!("encoding {}/{all} slices", hand.slices_done),
        });
        let doing: Vec<String> = self.intake.clone().into_iter().chain(encoding).collect();
        let doing = if doing.is_empty() { "idle".to_owned() } else { doing.join(", ") };
        let cohorts: String = self
            .cohorts
            .iter()
            .map(|(name, cohort)| format!(", {name} {}/{}", cohort.n_counted(), cohort.min_scans))
            .collect();
        let reasons: String = self.reasons.iter().map(|reason| format!("; {reason}")).collect();
        let waiting = self.n_settling + self.n_waiting + self.n_unscored;
        format!("{waiting} waiting, {doing}{cohorts}, {}{reasons}", self.device)
    }
}

/// What the board shows. Guards of scans that wait hold it, too.
#[derive(Default)]
struct Shown {
    status: Mutex<Status>,
    /// Since when each scan has been on its way, seconds since 1970, in no order.
    queues: [Mutex<Vec<u64>>; 2],
}

impl Shown {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().expect("no holder of the lock can panic")
    }

    fn queue(&self, queue: Queue) -> MutexGuard<'_, Vec<u64>> {
        self.queues[queue as usize].lock().expect("no holder of the lock can panic")
    }

    /// Changes a queue, and its count in the status with it.
    fn change(&self, queue: Queue, change: impl FnOnce(&mut Vec<u64>)) {
        let mut waiting = self.queue(queue);
        change(&mut waiting);

        let mut status = self.status();
        match queue {
            Queue::Encode => status.n_waiting = waiting.len(),
            Queue::Score => status.n_unscored = waiting.len(),
        }
    }
}

/// A scan that waits in a queue. The board counts the scan for as long as this guard lives.
#[must_use = "the scan leaves the queue when this is dropped"]
pub(crate) struct Queued {
    shown: Arc<Shown>,
    queue: Queue,
    since_secs: u64,
}

impl Drop for Queued {
    fn drop(&mut self) {
        let is_own = |&since: &u64| since == self.since_secs;
        self.shown.change(self.queue, |waiting| {
            // Scans of the same second are alike: it does not matter whose entry goes.
            let own = waiting.iter().position(is_own).expect("an entry per guard");
            waiting.swap_remove(own);
        });
    }
}

/// The status, and a sign of life per stage.
pub struct Board {
    shown: Arc<Shown>,
    started: Instant,
    /// Milliseconds from the start to the last sign of life.
    heartbeats: [AtomicU64; 3],
}

impl Board {
    /// A board on which nothing has happened.
    pub fn new() -> Self {
        let status = Status { version: env!("CARGO_PKG_VERSION").into(), ..Status::default() };
        let shown = Shown { status: Mutex::new(status), ..Shown::default() };
        Self { shown: Arc::new(shown), started: Instant::now(), heartbeats: Default::default() }
    }

    /// Counts a scan in a queue until the guard is dropped. The scan has been on its way since
    /// then, in seconds since 1970.
    pub(crate) fn enqueue(&self, queue: Queue, since_secs: u64) -> Queued {
        self.shown.change(queue, |waiting| waiting.push(since_secs));
        Queued { shown: Arc::clone(&self.shown), queue, since_secs }
    }

    /// How many scans wait, and since when the first of them has been on its way.
    pub(crate) fn queue(&self, queue: Queue) -> (usize, Option<u64>) {
        let waiting = self.shown.queue(queue);
        (waiting.len(), waiting.iter().copied().min())
    }

    /// Whether a scan is being encoded or waits for it.
    pub fn is_encoding(&self) -> bool {
        let status = self.update();
        status.n_waiting > 0 || status.in_hand.is_some()
    }

    /// The status, to be changed.
    pub fn update(&self) -> MutexGuard<'_, Status> {
        self.shown.status()
    }

    /// The status as it is now.
    pub fn status(&self) -> Status {
        self.update().clone()
    }

    /// Sets or clears a reason for not being ready.
    pub fn set_reason(&self, reason: &str, holds: bool) {
        let mut status = self.update();
        if holds && status.reasons.insert(reason.to_owned()) {
            warn!(reason, "not ready");
        } else if !holds && status.reasons.remove(reason) {
            info!(reason, "no longer holds");
        }
    }

    /// Says what intake is at, until the guard is dropped.
    pub fn takes_long(&self, what: String) -> TakesLong<'_> {
        self.update().intake = Some(what);
        TakesLong(self)
    }

    /// A stage did a piece of work, or looked and found none.
    pub fn heartbeat(&self, stage: StageName) {
        let millis = self.started.elapsed().as_millis() as u64;
        self.heartbeats[stage as usize].store(millis, Ordering::Relaxed);
    }

    /// A stage that has shown no life within `limit`: the watchdog is fed while there is none.
    pub fn silent_stage(&self, limit: Duration) -> Option<StageName> {
        let now = self.started.elapsed().as_millis() as u64;
        let silence = |stage: StageName| {
            now.saturating_sub(self.heartbeats[stage as usize].load(Ordering::Relaxed))
        };
        StageName::ALL.into_iter().find(|&stage| silence(stage) > limit.as_millis() as u64)
    }
}

/// Intake is at something that can take long. It ends with this, however it ends.
pub struct TakesLong<'b>(&'b Board);

impl Drop for TakesLong<'_> {
    fn drop(&mut self) {
        self.0.update().intake = None;
    }
}

impl Default for Board {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_silent_stage_starves_the_watchdog() {
        let board = Board::new();
        std::thread::sleep(Duration::from_millis(30));
        board.heartbeat(StageName::Intake);
        board.heartbeat(StageName::Encode);
        assert_eq!(board.silent_stage(Duration::from_millis(20)), Some(StageName::Score));
        board.heartbeat(StageName::Score);
        assert_eq!(board.silent_stage(Duration::from_millis(20)), None);
    }

    #[test]
    fn a_scan_is_counted_for_as_long_as_its_guard_lives() {
        let board = Board::new();
        let newer = board.enqueue(Queue::Score, 20);
        let older = board.enqueue(Queue::Score, 10);
        let twin = board.enqueue(Queue::Score, 10);
        assert_eq!(board.queue(Queue::Score), (3, Some(10)));
        assert_eq!((board.status().n_unscored, board.status().n_waiting), (3, 0));

        drop(older);
        assert_eq!(board.queue(Queue::Score), (2, Some(10)));
        drop(twin);
        assert_eq!(board.queue(Queue::Score), (1, Some(20)), "the newer one joined first");
        drop(newer);
        assert_eq!(board.queue(Queue::Score), (0, None));
        assert_eq!(board.status().n_unscored, 0);
    }

    #[test]
    fn a_scan_counts_as_being_encoded_while_it_waits_for_the_encoder() {
        let board = Board::new();
        let queued = board.enqueue(Queue::Encode, 10);
        assert!(board.is_encoding());
        board.update().in_hand = Some(InHand { scan: "ab".into(), slices_done: 0, slices_all: 0 });
        drop(queued);
        assert!(board.is_encoding(), "the encoder has it");
        board.update().in_hand = None;
        assert!(!board.is_encoding());
    }

    #[test]
    fn the_status_line_tells_an_operator_what_goes_on() {
        let board = Board::new();
        let cohort = CohortStatus { n_scans: 3, min_scans: 8, ..CohortStatus::default() };
        {
            let mut status = board.update();
            status.device = "cpu".into();
            status.n_waiting = 2;
            status.cohorts.insert("t1w".into(), cohort);
            status.in_hand = Some(InHand { scan: "ab".into(), slices_done: 56, slices_all: 500 });
        }
        board.set_reason("disk low", true);
        assert_eq!(
            board.status().line(),
            "2 waiting, encoding 56/500 slices, t1w 3/8, cpu; disk low"
        );
        board.set_reason("disk low", false);
        assert!(board.status().reasons.is_empty());
        let preprocessing = board.takes_long("preprocessing by hd-bet".into());
        let both = "2 waiting, preprocessing by hd-bet, encoding 56/500 slices, t1w 3/8, cpu";
        assert_eq!(board.status().line(), both);
        board.update().in_hand = None;
        assert!(board.status().line().starts_with("2 waiting, preprocessing by hd-bet, t1w"));
        drop(preprocessing);
        assert!(board.status().line().starts_with("2 waiting, idle, t1w"));
    }
}
