//! The daemon's current state, for the status page, the service manager and the watchdog.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::domain::{damage::Damage, left_alone::LeftAlone, not_ready::NotReady, repair::Repair};

/// The threads of the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageName {
    /// Finds files and reads them.
    Intake,
    /// Runs the encoder.
    Encode,
    /// Keeps the windows, scores them and writes results.
    Score,
}

impl StageName {
    /// All stages, in the order in which a scan passes them.
    pub const ALL: [Self; 3] = [Self::Intake, Self::Encode, Self::Score];

    /// Name of the stage's thread.
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

/// The scan that is being encoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InHand {
    /// Short id of the scan.
    pub scan: String,
    /// Slices encoded so far.
    pub slices_done: usize,
    /// All slices of the scan. 0 until the first batch is done.
    pub slices_all: usize,
}

/// One cohort's window.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CohortStatus {
    /// Number of members.
    pub n_scans: usize,
    /// Number of counted members that scoring needs.
    pub min_scans: usize,
    /// Largest number of members.
    pub max_scans: usize,
    /// How much the scans differ as a whole. Near 1 for one scanner; above 1.15 there is a warning.
    pub heterogeneity: Option<f64>,
    /// Number of members that differ much from the others as a whole: another sequence or scanner?
    #[serde(default)]
    pub n_unlike: usize,
    /// Number of members that show a part of a head: their field of view holds less than 97 % of
    /// the template's brain.
    #[serde(default)]
    pub n_parts_of_heads: usize,
    /// Number of guests: members that others are not compared with, because they miss a limit of
    /// `[quality]`.
    #[serde(default)]
    pub n_set_aside: usize,
    /// Number of members that are not the first of their patient. They do not count for
    /// `min_scans`.
    #[serde(default)]
    pub n_same_patient: usize,
    /// Whether the window is full with scans of too few patients. Scans of one patient are then
    /// compared with each other.
    #[serde(default)]
    pub few_patients: bool,
    /// Number of members that are taken for scans of one person with others because of their tokens
    /// (`scoring.follow_up_ratio`).
    #[serde(default)]
    pub n_hidden_follow_ups: usize,
    /// Number of members that are encoded again, because the store lacks their tokens. The window
    /// is scored once they are there.
    #[serde(default)]
    pub n_rebuilding: usize,
    /// Number of results that are missing, or stale and wait to be refreshed.
    pub n_outdated: usize,
    /// End of the last scoring, seconds since 1970. `None` before the first.
    pub last_scored_secs: Option<u64>,
}

impl CohortStatus {
    /// Members that count for `min_scans`.
    pub fn n_counted(&self) -> usize {
        self.n_scans.saturating_sub(self.n_set_aside + self.n_same_patient)
    }
}

/// File of the state folder with the names of what is left alone, as JSON: [`LeftAloneNames`] by
/// reason.
pub const LEFT_ALONE_FILE: &str = "left_alone.json";

/// What is left alone for one reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftAloneNames {
    /// Number of files. A folder that cannot be listed, or that has too many files, counts as one.
    pub n_files: usize,
    /// Paths below the incoming folder, sorted; at most a thousand.
    pub names: Vec<String>,
}

/// Everything that `/status.json` shows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the running daemon.
    pub version: String,
    /// Whether the daemon takes and processes scans, and no reason stands against it.
    pub ready: bool,
    /// What the start had to repair in the store, in order.
    #[serde(default)]
    pub repairs: Vec<Repair>,
    /// Reasons for not being ready, in words ([`NotReady::words`]).
    pub reasons: BTreeSet<String>,
    /// Network in use, like `dinov2_vits14`.
    pub model: String,
    /// Device in use, like `cpu` or `cuda:0`.
    pub device: String,
    /// Fingerprint of the method, 16 hex digits.
    pub method: String,
    /// Number of files that are not whole yet.
    pub n_settling: usize,
    /// Number of files that wait for their end: they lack it, or somebody has them open for
    /// writing. `n_settling` counts them, too.
    #[serde(default)]
    pub n_unfinished: usize,
    /// Number of files in the incoming folder that are left alone, by reason.
    #[serde(default)]
    pub left_alone: BTreeMap<LeftAlone, usize>,
    /// Number of scans that wait for the encoder.
    pub n_waiting: usize,
    /// Number of encoded scans that wait for their first result.
    #[serde(default)]
    pub n_unscored: usize,
    /// What intake is doing, if that can take long; several things are separated by commas.
    #[serde(default)]
    pub intake: Option<String>,
    /// The scan that is being encoded. `None` if there is none.
    pub in_hand: Option<InHand>,
    /// State of the windows by the cohort's label.
    pub cohorts: BTreeMap<String, CohortStatus>,
    /// Number of scans accepted since the start.
    pub n_accepted: u64,
    /// Number of duplicates since the start.
    pub n_duplicates: u64,
    /// Number of files refused since the start.
    pub n_quarantined: u64,
    /// Number of results written since the start.
    pub n_reported: u64,
    /// Number of things in the state folder that were found damaged since the start, by kind.
    #[serde(default)]
    pub damaged: BTreeMap<Damage, usize>,
}

impl Status {
    /// Whether the daemon is not ready for this reason.
    pub fn has(&self, reason: NotReady) -> bool {
        self.reasons.contains(reason.words())
    }

    /// Notes whether a reason holds. Returns whether that is new.
    fn note(&mut self, reason: NotReady, holds: bool) -> bool {
        let words = reason.words();
        let is_new =
            if holds { self.reasons.insert(words.into()) } else { self.reasons.remove(words) };
        self.ready = self.reasons.is_empty();
        is_new
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
            .map(|(name, cohort)| {
                let rebuilding = match cohort.n_rebuilding {
                    0 => String::new(),
                    n_scans => format!(" ({n_scans} encoded again)"),
                };
                format!(", {name} {}/{}{rebuilding}", cohort.n_counted(), cohort.min_scans)
            })
            .collect();
        let reasons: String = self.reasons.iter().map(|reason| format!("; {reason}")).collect();
        let waiting = self.n_settling + self.n_waiting + self.n_unscored;
        format!("{waiting} waiting, {doing}{cohorts}, {}{reasons}", self.device)
    }
}

/// The content of the board. Guards of waiting scans share it.
#[derive(Default)]
struct Shown {
    status: Mutex<Status>,
    /// When each scan was first seen, seconds since 1970, in no order.
    queues: [Mutex<Vec<u64>>; 2],
    /// What intake is doing that can take long.
    doing: Mutex<Vec<String>>,
}

impl Shown {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().expect("no holder of the lock can panic")
    }

    fn queue(&self, queue: Queue) -> MutexGuard<'_, Vec<u64>> {
        self.queues[queue as usize].lock().expect("no holder of the lock can panic")
    }

    /// Changes what intake is doing.
    fn change_doing(&self, change: impl FnOnce(&mut Vec<String>)) {
        let mut doing = self.doing.lock().expect("no holder of the lock can panic");
        change(&mut doing);
        self.status().intake = (!doing.is_empty()).then(|| doing.join(", "));
    }

    /// Changes a queue and its count in the status.
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
            // Entries of the same second are equal, so any of them may be removed.
            let own = waiting.iter().position(is_own).expect("an entry per guard");
            waiting.swap_remove(own);
        });
    }
}

/// The status, and the last heartbeat of each stage.
pub struct Board {
    shown: Arc<Shown>,
    started: Instant,
    /// Milliseconds from the start to the last heartbeat.
    heartbeats: [AtomicU64; 3],
}

impl Board {
    /// A board for a daemon that has just started.
    pub fn new() -> Self {
        let mut status = Status { version: env!("CARGO_PKG_VERSION").into(), ..Status::default() };
        status.note(NotReady::StartingOrStopping, true);
        let shown = Shown { status: Mutex::new(status), ..Shown::default() };
        Self { shown: Arc::new(shown), started: Instant::now(), heartbeats: Default::default() }
    }

    /// Counts a scan in a queue until the guard is dropped. `since_secs` says when the scan was
    /// first seen, in seconds since 1970.
    pub(crate) fn enqueue(&self, queue: Queue, since_secs: u64) -> Queued {
        self.shown.change(queue, |waiting| waiting.push(since_secs));
        Queued { shown: Arc::clone(&self.shown), queue, since_secs }
    }

    /// The number of waiting scans, and when the oldest of them was first seen.
    pub(crate) fn queue(&self, queue: Queue) -> (usize, Option<u64>) {
        let waiting = self.shown.queue(queue);
        (waiting.len(), waiting.iter().copied().min())
    }

    /// Whether a scan is being encoded or waits for the encoder.
    pub fn is_encoding(&self) -> bool {
        let status = self.update();
        status.n_waiting > 0 || status.in_hand.is_some()
    }

    /// Locks the status for a change.
    pub fn update(&self) -> MutexGuard<'_, Status> {
        self.shown.status()
    }

    /// A copy of the current status.
    pub fn status(&self) -> Status {
        self.update().clone()
    }

    /// Sets or clears a reason for not being ready. The log says once that it came, and once that
    /// it went.
    pub fn set_reason(&self, reason: NotReady, holds: bool) {
        self.change(reason, holds, None);
    }

    /// As [`Board::set_reason`]. The reason holds if there is a failure, and the log says which.
    pub fn set_failure(&self, reason: NotReady, failure: Option<io::ErrorKind>) {
        self.change(reason, failure.is_some(), failure);
    }

    fn change(&self, reason: NotReady, holds: bool, failure: Option<io::ErrorKind>) {
        let is_new = self.update().note(reason, holds);
        match is_new.then_some(holds) {
            Some(true) => warn!(%reason, cause = failure.map(tracing::field::display), "not ready"),
            Some(false) => info!(%reason, "no longer holds"),
            None => {}
        }
    }

    /// Notes that the daemon has started, or that it stops. Both have their own lines in the log.
    pub fn set_running(&self, is_running: bool) {
        self.update().note(NotReady::StartingOrStopping, !is_running);
    }

    /// Shows what intake is doing until the guard is dropped.
    pub(crate) fn takes_long(&self, what: String) -> TakesLong {
        self.shown.change_doing(|doing| doing.push(what.clone()));
        TakesLong { shown: Arc::clone(&self.shown), what }
    }

    /// Records that a stage did a piece of work, or found none.
    pub fn heartbeat(&self, stage: StageName) {
        let millis = self.started.elapsed().as_millis() as u64;
        self.heartbeats[stage as usize].store(millis, Ordering::Relaxed);
    }

    /// A stage without a heartbeat within `limit`. While there is none, the watchdog is notified.
    pub fn silent_stage(&self, limit: Duration) -> Option<StageName> {
        let now = self.started.elapsed().as_millis() as u64;
        let silence = |stage: StageName| {
            now.saturating_sub(self.heartbeats[stage as usize].load(Ordering::Relaxed))
        };
        StageName::ALL.into_iter().find(|&stage| silence(stage) > limit.as_millis() as u64)
    }
}

/// Guard of a step of intake that can take long. Dropping it removes the step from the status, also
/// after an error.
#[must_use = "the step leaves the status when this is dropped"]
pub(crate) struct TakesLong {
    shown: Arc<Shown>,
    what: String,
}

impl Drop for TakesLong {
    fn drop(&mut self) {
        self.shown.change_doing(|doing| {
            let own = doing.iter().position(|what| *what == self.what);
            doing.remove(own.expect("an entry per guard"));
        });
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
    fn the_daemon_is_ready_while_no_reason_holds() {
        let board = Board::new();
        assert!(!board.status().ready && board.status().has(NotReady::StartingOrStopping));
        board.set_running(true);
        assert!(board.status().ready);
        for reason in [NotReady::DiskLow, NotReady::ResultsFull, NotReady::DiskLow] {
            board.set_reason(reason, true);
        }
        board.set_reason(NotReady::DiskLow, false);
        let status = board.status();
        assert!(!status.ready && !status.has(NotReady::DiskLow));
        assert!(status.has(NotReady::ResultsFull), "the other one still holds");
        board.set_reason(NotReady::ResultsFull, false);
        assert!(board.status().ready);
        board.set_running(false);
        assert!(!board.status().ready);
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
        board.set_running(true);
        board.set_reason(NotReady::ResultsFull, true);
        let full = "2 waiting, encoding 56/500 slices, t1w 3/8, cpu; the results folder is full";
        assert_eq!(board.status().line(), full);
        board.set_reason(NotReady::ResultsFull, false);
        let preprocessing = board.takes_long("preprocessing by hd-bet".into());
        let both = "2 waiting, preprocessing by hd-bet, encoding 56/500 slices, t1w 3/8, cpu";
        assert_eq!(board.status().line(), both);
        board.update().in_hand = None;
        let converting = board.takes_long("converting".into());
        let two = "2 waiting, preprocessing by hd-bet, converting, t1w";
        assert!(board.status().line().starts_with(two));
        drop(preprocessing);
        assert!(board.status().line().starts_with("2 waiting, converting, t1w"));
        drop(converting);
        assert!(board.status().line().starts_with("2 waiting, idle, t1w"));
    }
}
