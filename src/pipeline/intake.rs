//! The first stage: lists the incoming folder, waits until a file is whole, reads and archives it,
//! and passes it to the encoder.

mod admit;
mod aside;
mod bundles;
mod conversion;
mod folders;
mod left_alone;
mod pauses;
mod reading;
mod refuse;
mod series;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::debug;

use self::{
    conversion::Conversion,
    folders::{IncomingPlace, Target},
    left_alone::{LeftAloneFiles, Rests},
    reading::{Batch, Companions, ReadScan, Reader, Taken, Whole, poison},
};
use super::{
    FULL, IDLE, MAX_CRASHES, Shared,
    board::{Queue, StageName},
    encode::Due,
    now_secs,
    timings::Timings,
};
use crate::{
    domain::{
        error::ScanError,
        not_ready::NotReady,
        scan::{FileStamp, ScanId},
    },
    ingest::{self, Candidate, Links, Listing, Patterns, Settled, Settling},
    ledger::{SeenFiles, SeenOutcome},
    metrics::{RescanTrigger, SeenBy, Stage},
    quarantine,
    watcher::Change,
};

/// A file that the service has no permission to read goes to quarantine after this many tries.
const MAX_READS: u32 = 3;
/// A file with other faults of a share goes to quarantine after this time.
const MAX_OUTAGE: Duration = Duration::from_secs(3600);
/// A file that only lacks its end, and a series with gaps, wait this many times as long as a whole
/// one: a slow sender may go on, and slices may arrive late and in any order.
const PATIENCE: u32 = 10;
/// So many entries of the quarantine are looked at in each listing, for files that have changed.
const MAX_RECHECKED: usize = 50;
/// Longest pause between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(300);

/// A canonical volume up to this size stays in memory for the encoder. Up to as many cubes as files
/// are read in parallel wait before the encoder's queue, and as many again in the queue. The
/// default volume has 56 MB, and 67 MB where the field of view cuts the brain. For a larger one,
/// the encoder prepares the scan again later.
const MAX_IN_MEMORY_BYTES: usize = 128 << 20;

/// Events within this time cause one listing.
const BURST: Duration = Duration::from_millis(100);

/// The decision about a file is remembered for this long after the file is gone.
const MISSING_PATIENCE_SECS: u64 = 30 * 24 * 3600;

/// A file that could not be read or moved to quarantine.
struct Trouble {
    n_tries: u32,
    since: Instant,
    not_before: Instant,
}

pub(super) struct Intake {
    shared: Arc<Shared>,
    reader: Arc<Reader>,
    woken: Receiver<Change>,
    to_encoder: SyncSender<Due>,
    /// Accepted scans that wait because the encoder's queue is full. While there are any, no
    /// further file is read: the folder is the queue.
    pending: VecDeque<Due>,
    settling: Settling,
    troubles: HashMap<PathBuf, Trouble>,
    /// DICOM files that are not converted yet.
    bundles: bundles::Bundles,
    /// The conversion of DICOM files that runs, or has ended and waits to be taken.
    conversion: Option<Conversion>,
    left_alone: LeftAloneFiles,
    rests: Rests,
    /// Files that only lack their end or are being written, and their size and times at that
    /// finding. They are not refused before they have been still for [`PATIENCE`].
    unfinished: HashMap<PathBuf, FileStamp>,
    quarantined: quarantine::Index,
    incoming: IncomingPlace,
    results: Target,
    quarantine: Target,
    state: Target,
    /// Output stems in use.
    stems: HashSet<String>,
    next_listing: Instant,
    /// Files stay where they are, so frequent listings are not needed.
    is_paused: bool,
}

impl Intake {
    pub(super) fn new(
        shared: Arc<Shared>,
        woken: Receiver<Change>,
        to_encoder: SyncSender<Due>,
        pending: Vec<(ScanId, u64)>,
        stems: HashSet<String>,
    ) -> Self {
        let due = |(id, first_seen_secs)| {
            let queued = shared.board.enqueue(Queue::Encode, first_seen_secs);
            Due { id, prepared: None, queued }
        };
        let pending = pending.into_iter().map(due).collect();
        Self {
            reader: Arc::new(Reader::new(Arc::clone(&shared))),
            shared,
            woken,
            to_encoder,
            pending,
            settling: Settling::default(),
            troubles: HashMap::new(),
            bundles: bundles::Bundles::default(),
            conversion: None,
            left_alone: LeftAloneFiles::default(),
            rests: Rests::default(),
            unfinished: HashMap::new(),
            quarantined: quarantine::Index::default(),
            incoming: IncomingPlace::default(),
            results: Target::new(NotReady::ResultsFull, NotReady::ResultsUnwritable),
            quarantine: Target::new(NotReady::QuarantineFull, NotReady::QuarantineUnwritable),
            state: Target::new(NotReady::StateFull, NotReady::StateUnwritable),
            stems,
            next_listing: Instant::now(),
            is_paused: false,
        }
    }

    pub(super) fn run(mut self) -> Result<(), ScanError> {
        self.show_quarantined();
        let (mut trigger, mut by) = (Some(RescanTrigger::Start), SeenBy::Scan);
        while !self.shared.stopping() {
            self.look(trigger, by)?;
            (trigger, by) = self.wait();
        }
        self.give_up_conversion();
        Ok(())
    }

    /// Sleeps until something may have changed, a file may have settled, a conversion has ended,
    /// the encoder's queue has space for a waiting scan, or the interval is over.
    fn wait(&mut self) -> (Option<RescanTrigger>, SeenBy) {
        let settle = self.shared.config().intake.settle;
        let soon = (settle / 4).clamp(Duration::from_millis(50), Duration::from_secs(1));
        let soon = Instant::now() + soon;
        loop {
            self.shared.board.heartbeat(StageName::Intake);
            let was_full = !self.pending.is_empty();
            self.queue_again();
            self.pass_on();

            let is_full = !self.pending.is_empty();
            let n_soon = self.settling.n_waiting() + self.bundles.n_soon();
            let waiting = n_soon > 0 && !is_full && !self.is_paused;
            let until = if waiting { soon.min(self.next_listing) } else { self.next_listing };
            let now = Instant::now();
            let is_woken = self.has_converted() || (was_full && waiting);
            if self.shared.stopping() || now >= until || is_woken {
                let is_due = now >= self.next_listing;
                return (is_due.then_some(RescanTrigger::Interval), SeenBy::Scan);
            }

            // The end of a conversion sends no message, either.
            let is_short = is_full || self.conversion.is_some();
            let left = (until - now).min(if is_short { FULL } else { IDLE });
            match self.woken.recv_timeout(left) {
                Ok(change) => {
                    thread::sleep(BURST);
                    let changes: Vec<_> = self.woken.try_iter().chain([change]).collect();
                    let trigger = if changes.contains(&Change::Overflow) {
                        Some(RescanTrigger::Overflow)
                    } else {
                        changes.contains(&Change::Reload).then_some(RescanTrigger::Reload)
                    };
                    return (trigger, SeenBy::Event);
                }
                Err(RecvTimeoutError::Disconnected) => thread::sleep(left),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Lists the folder once and deals with what is there.
    fn look(&mut self, trigger: Option<RescanTrigger>, by: SeenBy) -> Result<(), ScanError> {
        self.take_converted()?;
        let config = self.shared.config();
        let incoming = &config.directories.incoming;
        self.is_paused = self.must_pause(trigger.is_some());
        let heartbeat = || self.shared.board.heartbeat(StageName::Intake);
        let patterns = Patterns::new(&config.intake.accept, &config.intake.ignore)
            .expect("the settings were checked");

        let listed = ingest::list(incoming, &patterns, Links::PassedOver, heartbeat);
        if trigger.is_some() {
            self.next_listing = Instant::now() + config.intake.rescan;
        }

        // Asked after the listing: a share that was unmounted during the listing shows, too.
        let is_replaced = self.incoming.is_replaced(incoming);
        let board = &self.shared.board;
        board.set_failure(NotReady::IncomingUnreadable, listed.as_ref().err().map(io::Error::kind));
        board.set_reason(NotReady::IncomingReplaced, is_replaced);
        let Listing { scans: listed, left_alone } = match listed {
            // The files of another file system are not those that scanners send, and the first
            // ones are not gone.
            Ok(_) if is_replaced => return Ok(()),
            Ok(listing) => listing,
            Err(error) => {
                // The error names folders, and folders can name patients.
                debug!(%error, "cannot list the incoming folder; trying again");
                return Ok(());
            }
        };

        self.shared.metrics.listed(now_secs());
        if let Some(trigger) = trigger {
            self.shared.metrics.rescan(trigger);
        }

        let dicom = self.list_dicom(incoming, &patterns);
        if trigger.is_some() {
            let seen = self.forget_missing(&listed, &dicom, incoming)?;
            self.look_again_at_rest(&seen, &patterns)?;
            self.show_left_alone(left_alone, &seen, incoming);
            self.take_back_changed(incoming);
        }

        if self.troubles.is_empty() && !self.bundles.has_failed() {
            self.shared.board.set_reason(NotReady::PreprocessUnstarted, false);
        }

        self.consider_files(&listed, incoming, by)?;
        self.consider_dicom(&dicom, incoming, by)?;
        self.show_waiting();
        Ok(())
    }

    /// Forgets files that are gone: their settling at once, the decisions about them later. Returns
    /// what the other decisions say.
    fn forget_missing(
        &mut self,
        listed: &[Candidate],
        dicom: &[Candidate],
        incoming: &Path,
    ) -> Result<SeenFiles, ScanError> {
        let there: HashSet<&Path> = listed.iter().chain(dicom).map(|c| c.path.as_path()).collect();

        self.settling.keep_only(|path| there.contains(path));
        self.troubles.retain(|path, _| there.contains(path.as_path()));
        self.unfinished.retain(|path, _| there.contains(path.as_path()));
        let there: HashSet<Vec<u8>> = there.iter().map(|path| seen_key(incoming, path)).collect();
        let is_there = |key: &[u8]| there.contains(key);
        Ok(self.shared.seen.forget_missing(is_there, now_secs(), MISSING_PATIENCE_SECS)?)
    }

    /// Considers each file, and deals with whole files, several in parallel.
    fn consider_files(
        &mut self,
        listed: &[Candidate],
        incoming: &Path,
        by: SeenBy,
    ) -> Result<(), ScanError> {
        let limits = self.shared.limits();
        let mut batch = Batch::new(n_at_once(&self.shared), limits.max_file_bytes);
        for candidate in listed {
            if self.shared.stopping() {
                return Ok(());
            }
            self.shared.board.heartbeat(StageName::Intake);
            let Some(whole) = self.consider(candidate, incoming, by)? else { continue };
            for files in batch.add(whole) {
                self.deal_with(&files, incoming)?;
            }
        }
        batch.take().map_or(Ok(()), |files| self.deal_with(&files, incoming))
    }

    /// Returns the file if it is to be read now.
    fn consider(
        &mut self,
        candidate: &Candidate,
        incoming: &Path,
        by: SeenBy,
    ) -> Result<Option<Whole>, ScanError> {
        let key = seen_key(incoming, &candidate.path);
        let seen = self.shared.seen.get(&key).filter(|seen| seen.is_same(&candidate.look));
        let n_crashes = match seen.map(|seen| seen.outcome) {
            None => 0,
            Some(SeenOutcome::Reading { attempts }) if self.shared.after_crash => attempts,
            Some(SeenOutcome::Reading { .. }) => 0,
            Some(_) => return Ok(None),
        };

        let companions = Companions::of(&candidate.path);
        if !self.settling.knows(&candidate.path) {
            self.shared.metrics.file_seen(by);
        }

        let (now, settle) = (Instant::now(), self.shared.config().intake.settle);
        let settled = self.settling.look(candidate, companions.looks(), now, settle);
        let Settled::Whole(waited) = settled else { return Ok(None) };

        if self.unfinished.get(&candidate.path) == Some(&candidate.look)
            && self.is_within_patience(&candidate.path)
        {
            return Ok(None);
        }

        let may_try = self.troubles.get(&candidate.path).is_none_or(|t| t.not_before <= now);
        if self.is_paused || !self.pending.is_empty() || !may_try {
            return Ok(None);
        }

        let came_from = below(incoming, &candidate.path).to_owned();
        let (candidate, earlier) = (candidate.clone(), Vec::new());
        let (patient, dicom) = (None, None);
        Ok(Some(Whole {
            candidate,
            companions,
            came_from,
            patient,
            dicom,
            earlier,
            waited,
            n_crashes,
        }))
    }

    /// Deals with whole files. While scans wait for the encoder, a later listing deals with them.
    fn deal_with(&mut self, files: &[Whole], incoming: &Path) -> Result<(), ScanError> {
        if !self.pending.is_empty() || self.shared.stopping() {
            return Ok(());
        }

        if let [Whole { candidate, n_crashes, .. }] = files
            && *n_crashes >= MAX_CRASHES
        {
            let found = format!("{n_crashes} crashes during the reading of this file");
            return self.send_to_quarantine(candidate, incoming, &poison(found));
        }
        // Written durably before the files are read: after a crash it shows which ones were being
        // read.
        for Whole { candidate, n_crashes, .. } in files {
            self.remember(candidate, incoming, SeenOutcome::Reading { attempts: n_crashes + 1 })?;
        }
        self.shared.seen.flush()?;

        let mut decided = Ok(());
        Arc::clone(&self.reader).read_all(files, |whole, read, timings| {
            if decided.is_ok() {
                decided = self.decide(whole, read, timings, incoming);
            }
        });
        decided
    }

    fn decide(
        &mut self,
        whole: &Whole,
        read: Result<Taken<ReadScan>, ScanError>,
        timings: Timings,
        incoming: &Path,
    ) -> Result<(), ScanError> {
        let candidate = &whole.candidate;
        match self.admit(whole, read, timings) {
            Err(error) => self.refuse(candidate, incoming, error),
            Ok(None) => self.look_again(candidate, incoming),
            Ok(Some(outcome)) => {
                self.remember(candidate, incoming, outcome)?;
                debug!(?outcome, path = %candidate.path.display(), "read");
                self.shared.metrics.settled(whole.waited);
                self.forget(candidate);
                Ok(())
            }
        }
    }

    fn look_again(&self, candidate: &Candidate, incoming: &Path) -> Result<(), ScanError> {
        Ok(self.shared.seen.forget(&seen_key(incoming, &candidate.path))?)
    }

    fn forget(&mut self, candidate: &Candidate) {
        self.settling.forget(&candidate.path);
        self.troubles.remove(&candidate.path);
        self.unfinished.remove(&candidate.path);
    }

    /// Queues scans that other stages want encoded from the archive.
    fn queue_again(&mut self) {
        for id in self.shared.requests.to_encode(Instant::now()) {
            let queued = self.shared.board.enqueue(Queue::Encode, now_secs());
            self.pending.push_back(Due { id, prepared: None, queued });
        }
    }

    /// Passes scans to the encoder until its queue is full. The ledger has the scans, so a stop
    /// may drop the rest.
    fn pass_on(&mut self) {
        while let Some(due) = self.pending.pop_front() {
            match self.to_encoder.try_send(due) {
                Ok(()) => {}
                Err(TrySendError::Full(due)) => return self.pending.push_front(due),
                Err(TrySendError::Disconnected(_)) => self.pending.clear(),
            }
        }
    }

    fn show_waiting(&self) {
        let (now, metrics) = (Instant::now(), &self.shared.metrics);
        let n_unfinished = self.unfinished.keys().filter(|path| self.is_waiting(path)).count();
        let mut status = self.shared.board.update();
        status.n_settling = self.settling.n_waiting() + self.bundles.n_waiting();
        status.n_unfinished = n_unfinished;
        drop(status);
        for (stage, are_whole) in [(Stage::Settle, false), (Stage::Decode, true)] {
            let (n_files, age) = self.settling.waiting(are_whole, now);
            let (n_dicom, other) = self.bundles.waiting(are_whole);
            let (n_files, age) = (n_files + n_dicom, age.max(other));
            let oldest = age.map(|age| now_secs().saturating_sub(age.as_secs()));
            metrics.queue(stage, n_files, oldest);
        }
    }
}

/// How many files are read in parallel. Each needs a processor core and memory. If the CPU encodes,
/// one is enough, because reading is much faster. A site's own preprocessing uses all cores or a
/// GPU, so other files would only wait for it.
pub(super) fn n_at_once(shared: &Shared) -> usize {
    match shared.config().intake.read_at_once {
        _ if shared.method.hook.is_some() => 1,
        0 if shared.method.device == "cpu" => 1,
        0 => (rayon::current_num_threads() / 2).clamp(1, 8),
        wanted => wanted,
    }
}

/// The store's key for a path: its bytes relative to the incoming folder.
fn seen_key(incoming: &Path, path: &Path) -> Vec<u8> {
    below(incoming, path).as_os_str().as_bytes().to_vec()
}

fn below<'p>(incoming: &Path, path: &'p Path) -> &'p Path {
    path.strip_prefix(incoming).unwrap_or(path)
}
