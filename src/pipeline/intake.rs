//! The first stage: looks at the incoming folder, waits until a file is whole, reads and archives
//! it, and hands it to the encoder.

mod passed_over;
mod series;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs, io,
    os::unix::ffi::OsStrExt,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use self::passed_over::PassedOver;
use super::{
    FULL, IDLE, MAX_CRASHES, Shared,
    acquisition::{Acquisition, acquisition, read_json},
    board::{Queue, StageName},
    encode::{Due, Prepared},
    hook::{self, Handed, Hook},
    now_secs, panic_text,
    steps::{self, Encodable, Incoming},
    timings::Timings,
};
use crate::{
    domain::{
        error::{QuarantineReason, Refusal, ScanError},
        patient::Patient,
        scan::{FileLook, ScanId, ScanRecord, ScanState},
    },
    ingest::{self, Bundle, Candidate, Links, Listing, Patterns, Settled, Settling},
    metrics::{DirectoryKind, IngestResult, PauseReason, RescanTrigger, SeenBy, Stage},
    nifti, quarantine,
    store::{SeenFile, SeenOutcome},
    watcher::Change,
};

/// A file that the service may not read is tried so often before it is set aside.
const MAX_READS: u32 = 3;
/// Other faults of a share are waited out for so long.
const MAX_OUTAGE: Duration = Duration::from_secs(3600);
/// Longest pause between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(300);

/// A canonical volume up to this size goes to the encoder in memory: one waits before its queue and
/// one in it. The default has 56 MB; of a larger one the encoder makes its own when its turn comes.
const MAX_HANDED_BYTES: usize = 128 << 20;

/// Events within so much time are one reason to look.
const BURST: Duration = Duration::from_millis(100);

/// What was decided on a file is remembered for so long after the file is gone.
const MISSING_PATIENCE_SECS: u64 = 30 * 24 * 3600;

/// What became of a whole file.
enum Taken {
    Accepted(Box<ScanRecord>, Box<Encodable>),
    Duplicate(ScanId),
    /// It changed while it was copied: not whole after all.
    Changed,
    /// The service was asked to stop meanwhile.
    GivenUp,
}

/// A file that has been still for long enough.
struct Whole {
    companions: Companions,
    /// Where it lies below the incoming folder, or what it was made of.
    came_from: PathBuf,
    /// By its DICOM header.
    patient: Option<Patient>,
    /// Since it was first seen.
    waited: Duration,
    /// Times that the process died while it read this file.
    n_crashes: u32,
}

/// A scan that crashes the reader.
fn poison(found: String) -> Refusal {
    let needed = "a scan that the reader understands";
    let action = "see the log of that time; report it with its files, if they may be shared";
    Refusal::new(QuarantineReason::Poison, found, needed, action)
}

/// A file that could not be read or set aside.
struct Trouble {
    n_tries: u32,
    since: Instant,
    not_before: Instant,
}

pub(super) struct Intake {
    shared: Arc<Shared>,
    woken: Receiver<Change>,
    to_encoder: SyncSender<Due>,
    /// Accepted scans for which the encoder's queue has no room yet. While there are any, no
    /// further file is read: the folder is the queue.
    pending: VecDeque<Due>,
    settling: Settling,
    troubles: HashMap<PathBuf, Trouble>,
    /// DICOM files on their way.
    bundles: series::Bundles,
    passed_over: PassedOver,
    /// Output stems in use.
    stems: HashSet<String>,
    next_listing: Instant,
    /// Files are left where they are: no need to look often.
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
        for &(_, first_seen_secs) in &pending {
            shared.board.joined(Queue::Encode, first_seen_secs);
        }
        Self {
            shared,
            woken,
            to_encoder,
            pending: pending.into_iter().map(|(id, _)| Due { id, prepared: None }).collect(),
            settling: Settling::default(),
            troubles: HashMap::new(),
            bundles: series::Bundles::default(),
            passed_over: PassedOver::default(),
            stems,
            next_listing: Instant::now(),
            is_paused: false,
        }
    }

    pub(super) fn run(mut self) -> Result<(), ScanError> {
        let quarantine = self.shared.config().directories.quarantine.clone();
        self.shared.metrics.quarantine_files(quarantine::count_quarantined(&quarantine));
        // A kill may have left a scan there.
        clear(&self.hook_folder());
        let (mut trigger, mut by) = (Some(RescanTrigger::Start), SeenBy::Scan);
        while !self.shared.stopping() {
            self.look(trigger, by)?;
            (trigger, by) = self.wait();
        }
        Ok(())
    }

    /// Sleeps until something may have changed, a file may have settled, the encoder has room for
    /// a file that waits, or the interval is over.
    fn wait(&mut self) -> (Option<RescanTrigger>, SeenBy) {
        let settle = self.shared.config().intake.settle;
        let soon = (settle / 4).clamp(Duration::from_millis(50), Duration::from_secs(1));
        let soon = Instant::now() + soon;
        loop {
            self.shared.board.beat(StageName::Intake);
            let was_full = !self.pending.is_empty();
            self.hand_on();
            let is_full = !self.pending.is_empty();
            let n_waiting = self.settling.n_waiting() + self.bundles.n_waiting();
            let waiting = n_waiting > 0 && !is_full && !self.is_paused;
            let until = if waiting { soon.min(self.next_listing) } else { self.next_listing };
            let now = Instant::now();
            if self.shared.stopping() || now >= until || (was_full && waiting) {
                let is_due = now >= self.next_listing;
                return (is_due.then_some(RescanTrigger::Interval), SeenBy::Scan);
            }
            let left = (until - now).min(if is_full { FULL } else { IDLE });
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

    /// One look at the folder.
    fn look(&mut self, trigger: Option<RescanTrigger>, by: SeenBy) -> Result<(), ScanError> {
        let config = self.shared.config();
        let incoming = &config.directories.incoming;
        let beat = || self.shared.board.beat(StageName::Intake);
        let patterns = Patterns::new(&config.intake.accept, &config.intake.ignore)
            .expect("the settings were checked");
        self.is_paused = self.is_disk_low() | self.is_hook_gone();
        let listed = ingest::list(incoming, &patterns, Links::PassedOver, beat);
        if trigger.is_some() {
            self.next_listing = Instant::now() + config.intake.rescan;
        }
        self.shared.board.set_reason("the incoming folder cannot be read", listed.is_err());
        let Listing { scans: listed, passed_over } = match listed {
            Ok(listing) => listing,
            Err(error) => {
                warn!(error = %error.kind(), "cannot list the incoming folder; trying again");
                return Ok(());
            }
        };
        self.shared.metrics.listed(now_secs());
        if let Some(trigger) = trigger {
            self.shared.metrics.rescan(trigger);
        }
        let bundles = self.list_bundles(incoming, &patterns);
        if trigger.is_some() {
            self.forget_missing(&listed, &bundles, incoming)?;
            let others = passed_over.into_iter().chain(self.bundles.others());
            self.shared.board.update().n_passed_over = self.passed_over.look(others);
        }
        if self.troubles.is_empty() && !self.bundles.has_failed() {
            self.shared.board.set_reason(hook::UNSTARTED, false);
        }
        for candidate in &listed {
            if self.shared.stopping() {
                break;
            }
            self.shared.board.beat(StageName::Intake);
            self.consider(candidate, incoming, by)?;
        }
        self.consider_bundles(&bundles, incoming, by)?;
        self.show_waiting();
        Ok(())
    }

    /// Files that are no longer there need not settle; what was decided on them is forgotten after
    /// a while.
    fn forget_missing(
        &mut self,
        listed: &[Candidate],
        bundles: &[Bundle],
        incoming: &Path,
    ) -> Result<(), ScanError> {
        let in_bundles = bundles.iter().flat_map(|bundle| &bundle.files);
        let there: HashSet<&Path> =
            listed.iter().chain(in_bundles).map(|c| c.path.as_path()).collect();
        self.settling.keep_only(|path| there.contains(path));
        self.troubles.retain(|path, _| there.contains(path.as_path()));
        let there: HashSet<Vec<u8>> = there.iter().map(|path| seen_key(incoming, path)).collect();
        let is_there = |key: &[u8]| there.contains(key);
        Ok(self.shared.store.forget_missing(is_there, now_secs(), MISSING_PATIENCE_SECS)?)
    }

    fn consider(
        &mut self,
        candidate: &Candidate,
        incoming: &Path,
        by: SeenBy,
    ) -> Result<(), ScanError> {
        let key = seen_key(incoming, &candidate.path);
        let seen = self.shared.store.seen(&key)?.filter(|seen| seen.is_same(&candidate.look));
        let n_crashes = match seen.map(|seen| seen.outcome) {
            None => 0,
            Some(SeenOutcome::Reading { attempts }) => attempts,
            Some(_) => return Ok(()),
        };
        let companions = Companions::of(&candidate.path);
        if !self.settling.knows(&candidate.path) {
            self.shared.metrics.file_seen(by);
        }
        let (now, settle) = (Instant::now(), self.shared.config().intake.settle);
        let settled = self.settling.look(candidate, companions.looks(), now, settle);
        let Settled::Whole(waited) = settled else { return Ok(()) };
        let may_try = self.troubles.get(&candidate.path).is_none_or(|t| t.not_before <= now);
        if self.is_paused || !self.pending.is_empty() || !may_try {
            return Ok(());
        }
        let came_from = below(incoming, &candidate.path).to_owned();
        let whole = Whole { companions, came_from, patient: None, waited, n_crashes };
        self.deal_with(candidate, &key, incoming, whole)
    }

    /// Deals with a whole file, whatever it contains.
    fn deal_with(
        &mut self,
        candidate: &Candidate,
        key: &[u8],
        incoming: &Path,
        whole: Whole,
    ) -> Result<(), ScanError> {
        if whole.n_crashes >= MAX_CRASHES {
            let found = format!("{} crashes while this file was read", whole.n_crashes);
            return self.set_aside(candidate, key, incoming, &poison(found));
        }
        // Before the file is touched, durably: after a crash this tells which one was in hand.
        let reading = SeenOutcome::Reading { attempts: whole.n_crashes + 1 };
        self.remember(candidate, key, reading)?;
        self.shared.store.flush()?;
        let (taken, timings) = self.take_in_whatever_happens(candidate, &whole);
        match taken {
            Ok(Taken::Changed | Taken::GivenUp) => {
                return Ok(self.shared.store.forget_seen(key)?);
            }
            Ok(Taken::Accepted(record, scan)) => {
                self.accepted(candidate, key, &record, Prepared { scan: *scan, timings })?;
            }
            Ok(Taken::Duplicate(id)) => self.duplicate(candidate, key, id)?,
            Err(error) => return self.refuse(candidate, key, incoming, error),
        }
        self.shared.metrics.settled(whole.waited);
        self.forget(candidate);
        Ok(())
    }

    fn forget(&mut self, candidate: &Candidate) {
        self.settling.forget(&candidate.path);
        self.troubles.remove(&candidate.path);
    }

    /// As [`Intake::take_in`], with the times; a crash is a refusal.
    fn take_in_whatever_happens(
        &self,
        candidate: &Candidate,
        whole: &Whole,
    ) -> (Result<Taken, ScanError>, Timings) {
        let mut timings = Timings::start(Stage::Decode);
        let work = AssertUnwindSafe(|| self.take_in(candidate, whole, &mut timings));
        let taken = std::panic::catch_unwind(work).unwrap_or_else(|panic| {
            self.shared.metrics.stage_panicked(Stage::Decode);
            let text = panic_text(panic.as_ref());
            Err(poison(format!("a crash while reading ({text})")).into())
        });
        timings.stop(&[Stage::Decode, Stage::Preprocess], &self.shared.metrics);
        (taken, timings)
    }

    /// Copies, reads, checks, identifies; journals a scan that is new.
    fn take_in(
        &self,
        candidate: &Candidate,
        whole: &Whole,
        timings: &mut Timings,
    ) -> Result<Taken, ScanError> {
        if candidate.path.is_dir() {
            return Err(Refusal::new(
                QuarantineReason::Unsupported,
                "a folder with the name of a scan",
                "a NIfTI file",
                "put files into the incoming folder; folders of files may have any other name",
            )
            .into());
        }
        let limits = self.shared.limits();
        let Companions { mask, json } = &whole.companions;
        let mask = mask.as_ref().map(|(path, _)| path.as_path());
        let archive = &self.shared.archive;
        let beat = || self.shared.board.beat(StageName::Intake);
        let mut draft = archive.draft(&candidate.path, mask, limits.max_file_bytes, beat)?;
        let json = json.as_ref().map(|(path, _)| read_json(&candidate.path, path));
        if ingest::look_at(&candidate.path).ok() != Some(candidate.look)
            || Companions::of(&candidate.path) != whole.companions
        {
            return Ok(Taken::Changed);
        }
        let scan = Incoming::read(&draft.scan, draft.mask.as_deref(), &limits)?;
        beat();
        let id = scan.id;
        let known = self.shared.store.record(&id)?;
        // One that was refused has been put back by a person: what was wrong may be mended. One
        // that left without a result gets another turn.
        let may_come_again = |known: &ScanRecord| match known.state {
            ScanState::Quarantined { .. } => true,
            ScanState::Evicted => !known.was_scored(),
            ScanState::Ingested | ScanState::Encoded => false,
        };
        if known.as_ref().is_some_and(|known| !may_come_again(known)) {
            return Ok(Taken::Duplicate(id));
        }
        timings.switch(Stage::Preprocess);
        let method = &self.shared.method;
        let hook = method.hook.as_ref().filter(|hook| hook.takes(scan.is_head()));
        let handed = match hook {
            None => None,
            Some(hook) => match self.preprocess(hook, &draft.scan, &scan)? {
                None => return Ok(Taken::GivenUp),
                handed => handed,
            },
        };
        let source = steps::prepare(scan, handed, method)?;
        beat();
        let rules = &self.shared.config().cohorts;
        let spacing_mm = source.raw.affine.spacing_mm();
        let placed = acquisition(&candidate.path, json, spacing_mm, rules, method);
        // What cannot be encoded is refused while the file is at hand.
        let encodable = Encodable::new(&source, method, &placed.cohort)?;
        timings.switch(Stage::Decode);
        beat();
        let mut record = self.new_record(candidate, id, whole, known.as_ref(), placed)?;
        record.brain = Some(steps::brain_facts(&source));
        record.alignment = steps::alignment_facts(&source);
        record.preprocess.clone_from(&source.preprocess);
        let preprocess = source.preprocess.as_ref();
        if preprocess.is_some_and(|done| done.scan_replaced) {
            archive.replace_scan(&draft, &nifti::encode_scan(&source.grid, &source.raw.voxels))?;
        }
        if source.brain_from.is_found() {
            // Found once: results are written again and again.
            archive
                .add_mask(&mut draft, &nifti::encode_mask(&source.grid, &source.brain.inside))?;
        }
        archive.keep(&draft, id)?;
        self.shared.store.put_record(&record)?;
        self.shared.metrics.bytes_ingested(draft.n_bytes);
        Ok(Taken::Accepted(Box::new(record), Box::new(encodable)))
    }

    /// Lets the site's own preprocessing work on a scan; nothing when asked to stop meanwhile.
    fn preprocess(
        &self,
        hook: &Hook,
        file: &Path,
        scan: &Incoming,
    ) -> Result<Option<Handed>, ScanError> {
        let shared = &self.shared;
        let work = self.hook_folder();
        let _at_work = shared.board.takes_long(format!("preprocessing by {}", hook.name()));
        let handed = hook.run(file, &scan.raw, &work, &shared.limits(), || {
            shared.board.beat(StageName::Intake);
            !shared.stopping()
        });
        let is_unstarted = matches!(handed, Err(ScanError::Own { doing: hook::STARTING, .. }));
        shared.board.set_reason(hook::UNSTARTED, is_unstarted);
        // It holds a patient's scan.
        clear(&work);
        handed
    }

    fn hook_folder(&self) -> PathBuf {
        self.shared.config().directories.state.join("preprocess")
    }

    fn new_record(
        &self,
        candidate: &Candidate,
        id: ScanId,
        whole: &Whole,
        known: Option<&ScanRecord>,
        placed: Acquisition,
    ) -> Result<ScanRecord, ScanError> {
        let stem = steps::stem_of(&candidate.path);
        let wanted = steps::output_stem(&stem);
        // Another scan of this name keeps its results; this one's carry the id as well.
        let is_own = known.is_some_and(|known| known.output_stem == wanted);
        let is_taken = self.stems.contains(&wanted) && !is_own;
        let output_stem = if is_taken { format!("{wanted}-{}", id.short()) } else { wanted };
        let name = candidate.path.file_name().unwrap_or_default();
        // A volume of a DICOM series comes back from quarantine as a file.
        let known_patient = || known?.header_patient.clone();
        Ok(ScanRecord {
            source_name: name.to_string_lossy().into_owned(),
            came_from: whole.came_from.to_string_lossy().into_owned(),
            header_patient: whole.patient.clone().or_else(known_patient),
            output_stem,
            acquisition: placed.facts,
            notes: placed.notes,
            sequence: self.shared.store.next_sequence()?,
            first_seen_secs: now_secs().saturating_sub(whole.waited.as_secs()),
            // Revisions go on.
            reported: known.and_then(|known| known.reported.clone()),
            ..ScanRecord::new(id, placed.cohort)
        })
    }

    fn accepted(
        &mut self,
        candidate: &Candidate,
        key: &[u8],
        record: &ScanRecord,
        prepared: Prepared,
    ) -> Result<(), ScanError> {
        let id = record.id;
        self.remember(candidate, key, SeenOutcome::Accepted(id))?;
        debug!(scan = %id, path = %candidate.path.display(), "accepted from");
        self.queue(record, prepared);
        Ok(())
    }

    /// Puts a scan that the journal holds in line for the encoder. What was made of it goes along,
    /// unless others are before it, as where many came in one archive, or it is large.
    fn queue(&mut self, record: &ScanRecord, prepared: Prepared) {
        let id = record.id;
        self.stems.insert(record.output_stem.clone());
        self.shared.metrics.volume_ingested(IngestResult::Accepted);
        self.shared.board.update().n_accepted += 1;
        info!(scan = %id, "accepted");
        self.shared.board.joined(Queue::Encode, record.first_seen_secs);
        let goes_along =
            self.pending.is_empty() && prepared.scan.canonical.volume.n_bytes() <= MAX_HANDED_BYTES;
        let prepared = goes_along.then(|| Box::new(prepared));
        self.pending.push_back(Due { id, prepared });
        self.hand_on();
    }

    fn duplicate(&self, candidate: &Candidate, key: &[u8], id: ScanId) -> Result<(), ScanError> {
        self.remember(candidate, key, SeenOutcome::Duplicate(id))?;
        self.count_duplicate(id);
        debug!(scan = %id, path = %candidate.path.display(), "copy at");
        Ok(())
    }

    fn count_duplicate(&self, id: ScanId) {
        self.shared.metrics.volume_ingested(IngestResult::Duplicate);
        self.shared.board.update().n_duplicates += 1;
        info!(scan = %id, "a copy of a known scan was left alone");
    }

    /// Sets aside what will never work; what may work later is tried again.
    fn refuse(
        &mut self,
        candidate: &Candidate,
        key: &[u8],
        incoming: &Path,
        error: ScanError,
    ) -> Result<(), ScanError> {
        self.shared.metrics.stage_failed(Stage::Decode, &error);
        match error {
            ScanError::Device(_) | ScanError::Store(_) => return Err(error),
            ScanError::Refused(refusal) => {
                return self.set_aside(candidate, key, incoming, &refusal);
            }
            ScanError::Io { .. } | ScanError::Own { .. } => {}
        }
        self.shared.store.forget_seen(key)?;
        if let ScanError::Io { source, .. } = &error {
            if source.kind() == io::ErrorKind::NotFound {
                // It was taken away again; the next listing forgets it.
                return Ok(());
            }
            let hopeless = source.kind() == io::ErrorKind::PermissionDenied;
            let trouble = self.try_later(candidate);
            let (n_tries, lasted) = (trouble.n_tries, trouble.since.elapsed());
            if (hopeless && n_tries >= MAX_READS) || lasted >= MAX_OUTAGE {
                let refusal = Refusal::new(
                    QuarantineReason::Io,
                    format!("{error} ({n_tries} times in {} s)", lasted.as_secs()),
                    "a file that the service may read",
                    "check its owner and permissions, and the share, then export it again",
                );
                return self.set_aside(candidate, key, incoming, &refusal);
            }
        } else {
            self.try_later(candidate);
        }
        self.shared.metrics.stage_retried(Stage::Decode);
        warn!(%error, "a file has to wait; trying again");
        Ok(())
    }

    /// Tries a file again after a pause that doubles each time.
    fn try_later(&mut self, candidate: &Candidate) -> &Trouble {
        let now = Instant::now();
        let settle = self.shared.config().intake.settle;
        let trouble = self.troubles.entry(candidate.path.clone());
        let trouble = trouble.or_insert(Trouble { n_tries: 0, since: now, not_before: now });
        let pause = settle.saturating_mul(1 << trouble.n_tries.min(16)).min(MAX_PAUSE);
        trouble.n_tries += 1;
        trouble.not_before = now + pause;
        trouble
    }

    fn set_aside(
        &mut self,
        candidate: &Candidate,
        key: &[u8],
        incoming: &Path,
        refusal: &Refusal,
    ) -> Result<(), ScanError> {
        if ingest::look_at(&candidate.path).ok() != Some(candidate.look) {
            // Another file has that name now: it is not to be judged by this one.
            return Ok(self.shared.store.forget_seen(key)?);
        }
        let config = self.shared.config();
        let folder = &config.directories.quarantine;
        let came_from = candidate.path.strip_prefix(incoming).unwrap_or(&candidate.path);
        debug!(path = %candidate.path.display(), "to quarantine");
        let moved = quarantine::quarantine(folder, &candidate.path, came_from, refusal, now_secs());
        if let Err(error) = moved {
            warn!(error = %error.kind(), "quarantine is not available; a refused file waits");
            self.try_later(candidate);
            return Ok(self.shared.store.forget_seen(key)?);
        }
        warn!(%refusal, "a file went to quarantine");
        // Remembered too, for the case that it could not be moved.
        self.remember(candidate, key, SeenOutcome::Quarantined)?;
        self.forget(candidate);
        self.count_quarantined(refusal);
        Ok(())
    }

    fn count_quarantined(&self, refusal: &Refusal) {
        let config = self.shared.config();
        self.shared.metrics.volume_ingested(IngestResult::Quarantined);
        self.shared.metrics.quarantined(refusal.reason);
        let n_files = quarantine::count_quarantined(&config.directories.quarantine);
        self.shared.metrics.quarantine_files(n_files);
        self.shared.board.update().n_quarantined += 1;
    }

    fn remember(
        &self,
        candidate: &Candidate,
        key: &[u8],
        outcome: SeenOutcome,
    ) -> Result<(), ScanError> {
        Ok(self.shared.store.put_seen(key, &SeenFile::new(candidate.look, outcome))?)
    }

    /// Gives scans to the encoder while its queue has room. The journal holds the scans, so a stop
    /// may drop the rest.
    fn hand_on(&mut self) {
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
        self.shared.board.update().n_settling =
            self.settling.n_waiting() + self.bundles.n_waiting();
        for (stage, are_whole) in [(Stage::Settle, false), (Stage::Decode, true)] {
            let (n_files, age) = self.settling.waiting(are_whole, now);
            let (n_bundles, other) = self.bundles.waiting(are_whole);
            let (n_files, age) = (n_files + n_bundles, age.max(other));
            let oldest = age.map(|age| now_secs().saturating_sub(age.as_secs()));
            metrics.queue(stage, n_files, oldest);
        }
    }

    /// Without the program that all scans are to go through, files stay where they are.
    fn is_hook_gone(&self) -> bool {
        let gone = self.shared.method.hook.as_ref().is_some_and(|hook| !hook.is_there());
        self.shared.metrics.paused(PauseReason::PreprocessGone, gone);
        self.shared.board.set_reason(hook::GONE, gone);
        gone
    }

    /// Measures the free space of every folder; below the watermark intake pauses and files stay
    /// where they are.
    fn is_disk_low(&self) -> bool {
        let config = self.shared.config();
        let Shared { board, metrics, .. } = &*self.shared;
        let folders = &config.directories;
        let mut low = false;
        for (kind, key, folder) in [
            (DirectoryKind::Incoming, "incoming", &folders.incoming),
            (DirectoryKind::Output, "results", &folders.results),
            (DirectoryKind::Quarantine, "quarantine", &folders.quarantine),
            (DirectoryKind::State, "state", &folders.state),
        ] {
            let space = rustix::fs::statvfs(folder.as_path());
            let free = space.ok().map(|space| space.f_bavail * space.f_frsize);
            metrics.filesystem_avail(kind, free);
            if kind != DirectoryKind::Incoming {
                board.set_reason(&format!("the {key} folder cannot be reached"), free.is_none());
                low |= free.is_some_and(|free| free < config.service.min_free_bytes);
            }
        }
        self.shared.metrics.paused(PauseReason::DiskLow, low);
        self.shared.board.set_reason("paused: disk low (service.min_free_mib)", low);
        low
    }
}

/// Removes a folder, if it is there.
fn clear(folder: &Path) {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(error = %error.kind(), "a work folder stays until the next time");
        }
        _ => {}
    }
}

/// A path as the store remembers it: its bytes below the incoming folder.
fn seen_key(incoming: &Path, path: &Path) -> Vec<u8> {
    below(incoming, path).as_os_str().as_bytes().to_vec()
}

fn below<'p>(incoming: &Path, path: &'p Path) -> &'p Path {
    path.strip_prefix(incoming).unwrap_or(path)
}

/// A file beside a scan and what it looked like.
type Companion = Option<(PathBuf, FileLook)>;

/// What lies beside a scan and is read with it.
#[derive(PartialEq, Eq)]
struct Companions {
    mask: Companion,
    json: Companion,
}

impl Companions {
    /// As they look now.
    fn of(scan: &Path) -> Self {
        let look = |path: Option<PathBuf>| {
            let path = path?;
            let look = ingest::look_at(&path).ok()?;
            Some((path, look))
        };
        Self { mask: look(steps::companion_mask(scan)), json: look(steps::companion_json(scan)) }
    }

    fn looks(&self) -> ingest::Beside {
        [&self.mask, &self.json].map(|companion| companion.as_ref().map(|(_, look)| *look))
    }
}
