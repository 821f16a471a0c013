//! What all stages share: the store, the archive, the metrics, the status, the settings.

use std::{
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tracing::{debug, warn};

use super::{board::Board, identity_key, records::Records, requests::Requests, running};
use crate::{
    archive::{Archive, LostAndFound},
    config::Config,
    domain::{
        damage::Damage,
        error::ScanError,
        follow_up::{FollowUps, NearestPair},
        identity::{IdentityKey, Pseudonyms},
    },
    engine::Method,
    files,
    ledger::{Ledger, SeenList},
    metrics::Metrics,
    nifti::Limits,
    store::{Store, StoreError},
};

/// A stage that waits for work looks up this often: it shows that it is alive and sees a stop.
pub(super) const IDLE: Duration = Duration::from_secs(1);

/// How often the full queue of the next stage is tried.
pub(super) const FULL: Duration = Duration::from_millis(100);

/// Crashes with one scan in hand after which it is held to be the cause: one more than a reboot
/// and a power cut in one day.
pub(super) const MAX_CRASHES: u32 = 3;

/// Archived sources met the limits when they came; lower ones must not lock them out.
pub(super) const ARCHIVED: Limits = Limits::NONE;

/// What all stages may use at the same time.
pub struct Shared {
    /// Tokens and columns.
    pub store: Store,
    /// Prometheus.
    pub metrics: Metrics,
    /// What the status page shows.
    pub board: Board,
    /// What is computed.
    pub method: Method,
    pub(super) archive: Archive,
    pub(super) records: Records,
    pub(super) seen: SeenList,
    pub(super) lost_and_found: LostAndFound,
    pub(super) requests: Requests,
    /// Whether the last run crashed, so that scans in hand may be the cause.
    pub(super) after_crash: bool,
    identity_key: IdentityKey,
    config: RwLock<Arc<Config>>,
    stop: AtomicBool,
}

impl Shared {
    /// Opens the archive, the ledger and the key of the hashes in the state folder.
    pub fn new(
        config: Config,
        store: Store,
        metrics: Metrics,
        method: Method,
    ) -> Result<Self, ScanError> {
        let state = &config.directories.state;
        files::remove_leftovers(state, |_| ()).map_err(|source| ScanError::Internal {
            doing: "tidying up the state folder",
            source,
        })?;
        let archive = Archive::open(&state.join("sources"))?;
        let identity_key = identity_key::open(state)?;
        let ledger = Ledger::open(&state.join("ledger"))?;
        let (seen, n_damaged) = SeenList::open(&state.join("seen"))?;
        // What is synced below these names is lost with them.
        files::sync_folder(state)
            .map_err(|source| ScanError::Internal { doing: "syncing the state folder", source })?;
        let lost_and_found = LostAndFound::of(state);
        let shared = Self {
            records: Records::new(ledger, store.clone()),
            seen,
            lost_and_found,
            requests: Requests::default(),
            after_crash: running::begin(state),
            store,
            metrics,
            board: Board::new(),
            method,
            archive,
            identity_key,
            config: RwLock::new(Arc::new(config)),
            stop: AtomicBool::new(false),
        };
        shared.found_damaged(Damage::SeenFile, n_damaged);
        if n_damaged > 0 {
            warn!(n_damaged, "decisions about files were damaged; these files are read again");
        }
        Ok(shared)
    }

    /// Counts things that were found damaged.
    pub(super) fn found_damaged(&self, damage: Damage, n_things: usize) {
        if n_things > 0 {
            self.metrics.found_damaged(damage, n_things);
            *self.board.update().damaged.entry(damage).or_default() += n_things;
        }
    }

    /// Notes that the daemon ends in order, also if an error ends it. Not after a crash of a stage
    /// or a failure of the device: a scan may be the cause.
    pub fn end_orderly(&self) {
        running::end(&self.config().directories.state);
    }

    /// The settings now in force.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.read().expect("no holder of the lock can panic"))
    }

    /// What results say instead of names, with these settings.
    pub(super) fn pseudonyms(&self, settings: &Config) -> Pseudonyms {
        Pseudonyms::new(settings.results.identity, self.identity_key)
    }

    /// Puts new settings in force; stages take them over with their next piece of work.
    pub fn set_config(&self, config: Config) {
        *self.config.write().expect("no holder of the lock can panic") = Arc::new(config);
    }

    /// Asks all stages to end after what they have in hand.
    pub fn request_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(super) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(super) fn limits(&self) -> Limits {
        self.config().intake.limits
    }
}

impl From<StoreError> for ScanError {
    fn from(error: StoreError) -> Self {
        Self::Store(Box::new(error))
    }
}

/// Maps the things in parallel and takes the results in their order. It uses threads of its own,
/// because work that waits for a disk would block the pool that computes. `work` must not panic.
pub(super) fn side_by_side<T: Sync, R: Send>(
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

/// Logs the pair of scans of a window that are nearest to each other, for sites that choose
/// `scoring.follow_up_ratio`.
pub(crate) fn log_nearest_pair(follow_ups: &FollowUps) {
    if let Some(NearestPair { ratio, scans: [one, other] }) = follow_ups.nearest {
        debug!(scan = %one, %other, ratio, "nearest pair of the window");
    }
}

/// Seconds since 1970.
pub fn now_secs() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
