//! The last stage: owns the windows, keeps the distances between their members, scores them, and
//! writes the results.
//!
//! A result that is older than its window is a debt. A new scan's result is written at once; only
//! while more scans come than a large window can be scored for, those of some seconds are scored
//! together. Of the debt to the others one result is paid after each scoring that leaves no scan
//! waiting, more while no scan is on its way, the cohorts taking turns: a stream of scans is not
//! held up, and holds nobody up unless it is more than this stage can do. A scan that leaves its
//! window has had a result, unless there were never enough good scans for one.
//! The journal knows which result belongs to which window, so that a restart takes the debt up
//! again.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs, mem,
    num::NonZeroUsize,
    ops::Bound,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{error, info, warn};

use super::{
    ARCHIVED, FULL, IDLE, Shared,
    board::{CohortStatus, Queue, Queued, StageName},
    compare::{compare_grid, compute_again},
    encode::Encoded,
    now_secs, panic_text,
    reporting::{ReportInput, SHIFTED, build_results, result_key, sidecar},
    side_by_side,
    steps::{self, Member, WindowScores},
};
use crate::{
    config::Config,
    domain::{
        PairDistances,
        cohort::CohortKey,
        error::{Disposition, ScanError},
        finding::WindowIdentity,
        scan::{Reported, ScanId, ScanRecord},
        window::Window,
    },
    metrics::{EvictionReason, OutputKind, ScoreResult, Stage, Trigger},
    numeric::scoring::{self, SearchReach},
    report,
    store::StoreError,
};

/// While more scans come, a window rests so many times as long as its last scoring took: scoring
/// all of a large window for each of them would take a third of two cores.
const REST: u32 = 4;

/// Results are written at once for scans of so many bytes together, as they are archived. In memory
/// a scan and its map take ten times as much, or more where it is packed well.
const MAX_AT_ONCE: u64 = 64 << 20;

/// It does not rest for longer: somebody waits.
const MAX_REST: Duration = Duration::from_secs(30);

/// The window of a cohort with its current scores.
struct Cohort {
    /// Members now.
    window: Window,
    /// Members when it was last scored.
    identity: WindowIdentity,
    /// The same in the order of the scores.
    scored: Vec<ScanId>,
    /// Without any scan while there are too few.
    scores: WindowScores,
    /// Members that have joined since then and wait for their first result.
    fresh: Vec<Fresh>,
    /// Until when it is not scored again for more scans, if there are more to come.
    rests_until: Instant,
    /// Members whose results are older than the window.
    debt: VecDeque<ScanId>,
    /// Since when there has been a debt, seconds since 1970.
    owed_since_secs: Option<u64>,
    last_scored_secs: Option<u64>,
}

/// A member that has not been scored yet.
struct Fresh {
    id: ScanId,
    /// What its distances to the others took.
    took: Duration,
    queued: Queued,
}

/// A member whose first result is due.
struct First {
    id: ScanId,
    /// Of one that has just joined.
    _queued: Option<Queued>,
}

pub(super) struct Score {
    shared: Arc<Shared>,
    distances: Box<dyn PairDistances>,
    from_encoder: Receiver<Encoded>,
    members: Vec<ScanRecord>,
    cohorts: BTreeMap<CohortKey, Cohort>,
    settings: Arc<Config>,
    last_paid: Option<CohortKey>,
    /// The folder is full or away until then, for all results alike.
    no_writes_before: Instant,
    /// The last result could not be written for that: said once, not at every try.
    is_away: bool,
    /// A debt could not be paid: no hurry to try the next one.
    no_payment_before: Instant,
}

/// There is no encode stage any more.
struct Gone;

/// What became of a result.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Attempt {
    Written,
    /// The folder is full or away.
    Later,
    /// Something is wrong with this scan, or with us.
    Failed,
}

impl Score {
    pub(super) fn new(
        shared: Arc<Shared>,
        distances: Box<dyn PairDistances>,
        from_encoder: Receiver<Encoded>,
        members: Vec<ScanRecord>,
    ) -> Self {
        let settings = shared.config();
        let now = Instant::now();
        Self {
            shared,
            distances,
            from_encoder,
            members,
            cohorts: BTreeMap::new(),
            settings,
            last_paid: None,
            no_writes_before: now,
            is_away: false,
            no_payment_before: now,
        }
    }

    pub(super) fn run(mut self) -> Result<(), ScanError> {
        let reach = format!("{:?}", self.settings.scoring.reach);
        let alive = || self.shared.board.beat(StageName::Score);
        self.shared.store.keep_columns_made_by(&reach, alive)?;
        let results = &self.settings.directories.results;
        if let Err(error) = report::remove_leftovers(results) {
            warn!(error = %error.kind(), "what an earlier run left half-written in the results folder stays");
        }
        self.take_up()?;
        // What the encoder still sends is a member in the journal: the next start takes it.
        while !self.shared.stopping() {
            self.shared.board.beat(StageName::Score);
            match self.next() {
                Ok(Some(encoded)) => self.admit(encoded)?,
                Ok(None) => {}
                // The encode stage has failed, and says so; a stage that ended first would be taken
                // for the cause.
                Err(Gone) => thread::sleep(IDLE),
            }
            self.show_waiting();
            let has_scored = self.score_due()?;
            self.reload()?;
            let is_ahead = self.shared.board.queue(Queue::Score).0 == 0;
            if (has_scored && is_ahead) || !self.shared.board.is_encoding() {
                self.pay_one_debt()?;
            }
        }
        Ok(())
    }

    /// The next scan from the encoder: without waiting while there is a debt to pay and no scan on
    /// its way.
    fn next(&self) -> Result<Option<Encoded>, Gone> {
        if self.debtor().is_some() && !self.shared.board.is_encoding() {
            return match self.from_encoder.try_recv() {
                Ok(encoded) => Ok(Some(encoded)),
                Err(TryRecvError::Empty) => Ok(None),
                Err(TryRecvError::Disconnected) => Err(Gone),
            };
        }
        let waiting = self.cohorts.values().filter(|cohort| !cohort.fresh.is_empty());
        let due = waiting.map(|cohort| cohort.rests_until).min();
        let rest = due.map_or(IDLE, |due| due.saturating_duration_since(Instant::now()).min(IDLE));
        match self.from_encoder.recv_timeout(rest) {
            Ok(encoded) => Ok(Some(encoded)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Gone),
        }
    }

    /// Rebuilds the windows of an earlier run from the journal. Scans that it left without any
    /// result come first.
    fn take_up(&mut self) -> Result<(), ScanError> {
        for record in mem::take(&mut self.members) {
            let took = self.enter(&record)?;
            if self.shared.stopping() {
                return Ok(());
            }
            if record.reported.is_none() {
                let queued = self.shared.board.enqueue(Queue::Score, now_secs());
                self.add_fresh(&record, took, queued);
            }
        }
        let keys: Vec<CohortKey> = self.cohorts.keys().cloned().collect();
        for key in keys {
            self.score(&key, Trigger::Reload)?;
        }
        self.show_store()
    }

    /// A scan that was just encoded.
    fn admit(&mut self, Encoded { id, queued }: Encoded) -> Result<(), ScanError> {
        let record = self.shared.store.record(&id)?;
        let Some(record) = record.filter(ScanRecord::is_member) else { return Ok(()) };
        let took = self.enter(&record)?;
        if self.shared.stopping() {
            return Ok(());
        }
        self.add_fresh(&record, took, queued);
        self.show(&record.cohort)
    }

    /// A member whose first result is due at the next scoring.
    fn add_fresh(&mut self, record: &ScanRecord, took: Duration, queued: Queued) {
        if let Some(cohort) = self.cohorts.get_mut(&record.cohort) {
            cohort.fresh.push(Fresh { id: record.id, took, queued });
        }
    }

    /// Scores the windows that new scans have joined, unless they rest. Returns whether there were
    /// any.
    fn score_due(&mut self) -> Result<bool, ScanError> {
        let (now, board) = (Instant::now(), &self.shared.board);
        let n_fresh: usize = self.cohorts.values().map(|cohort| cohort.fresh.len()).sum();
        let more_come = board.is_encoding() || board.queue(Queue::Score).0 > n_fresh;
        let rests = |cohort: &Cohort| more_come && now < cohort.rests_until;
        let is_due = |cohort: &Cohort| !cohort.fresh.is_empty() && !rests(cohort);
        let due = self.cohorts.iter().filter(|(_, cohort)| is_due(cohort));
        let due: Vec<CohortKey> = due.map(|(key, _)| key.clone()).collect();
        due.iter().try_for_each(|key| self.score(key, Trigger::NewStudy))?;
        Ok(!due.is_empty())
    }

    /// Scores a window anew and writes the results of those that wait for their first. The next
    /// start takes up what a stop leaves.
    fn score(&mut self, key: &CohortKey, trigger: Trigger) -> Result<(), ScanError> {
        if self.shared.stopping() {
            return Ok(());
        }
        let started = Instant::now();
        let Some(cohort) = self.cohorts.get_mut(key) else { return Ok(()) };
        let fresh = mem::take(&mut cohort.fresh);
        let waiting = self.rescore(key, trigger)?;
        let took = started.elapsed();
        let due: Vec<ScanId> = fresh.iter().map(|fresh| fresh.id).collect();
        for Fresh { took: own, .. } in &fresh {
            let share = took / fresh.len() as u32;
            self.shared.metrics.stage_finished(Stage::Score, *own + share);
        }
        let others = waiting.into_iter().filter(|id| !due.contains(id));
        let others = others.map(|id| First { id, _queued: None });
        let joined = fresh.into_iter().map(|new| First { id: new.id, _queued: Some(new.queued) });
        self.write_first(key, joined.chain(others).collect())?;
        if let Some(cohort) = self.cohorts.get_mut(key) {
            cohort.rests_until = Instant::now() + (REST * took).min(MAX_REST);
        }
        self.show(key)?;
        self.show_waiting();
        self.show_store()
    }

    /// Writes the results of scans that wait for their first. If the service is to stop or the
    /// folder is away, they remain debts, the first to be paid. A scan leaves the queue when its
    /// turn is over, also without a result.
    fn write_first(&mut self, key: &CohortKey, mut due: Vec<First>) -> Result<(), ScanError> {
        let ids: Vec<ScanId> = due.iter().map(|first| first.id).collect();
        let Some(cohort) = self.cohorts.get_mut(key) else { return Ok(()) };
        cohort.debt.retain(|other| !ids.contains(other));
        let (mut later, mut failed) = (Vec::new(), Vec::new());
        let mut left = &ids[..];
        while !left.is_empty() {
            let (now, others) = left.split_at(self.n_at_once(left));
            self.shared.board.beat(StageName::Score);
            if self.shared.stopping() || Instant::now() < self.no_writes_before {
                later.extend(now);
            } else {
                for (id, attempt) in self.write_side_by_side(key, now)? {
                    match attempt {
                        Attempt::Written => {}
                        Attempt::Later => later.push(id),
                        Attempt::Failed => failed.push(id),
                    }
                }
            }
            due.drain(..now.len());
            left = others;
        }
        let Some(cohort) = self.cohorts.get_mut(key) else { return Ok(()) };
        later.into_iter().rev().for_each(|id| cohort.debt.push_front(id));
        cohort.debt.extend(failed);
        Ok(())
    }

    /// How many of some results are written at once, counted from the first: as many as there are
    /// cores for, and no more than fit into memory together.
    fn n_at_once(&self, ids: &[ScanId]) -> usize {
        let size = |id: &ScanId| fs::metadata(self.shared.archive.scan(*id)).map_or(0, |m| m.len());
        let mut n_bytes = 0;
        let fit = ids.iter().take(n_writers()).take_while(|id| {
            n_bytes += size(id);
            n_bytes <= MAX_AT_ONCE
        });
        fit.count().max(1)
    }

    fn show_waiting(&self) {
        let (n_waiting, oldest) = self.shared.board.queue(Queue::Score);
        self.shared.metrics.queue(Stage::Score, n_waiting, oldest);
    }

    /// Makes a scan a member and computes its distances to the others, which takes the time that is
    /// returned. When the service is to stop, the next start does it.
    fn enter(&mut self, record: &ScanRecord) -> Result<Duration, ScanError> {
        let capacity = self.settings.window.max_scans;
        let key = &record.cohort;
        self.write_before_it_leaves(record)?;
        let started = Instant::now();
        if self.shared.stopping() {
            return Ok(Duration::ZERO);
        }
        let cohort = self.cohorts.entry(key.clone()).or_insert_with(|| new_cohort(key, capacity));
        let gone = cohort.window.admit(record.id, self.settings.member_facts(record));
        cohort.debt.retain(|id| !gone.contains(id));
        let others: Vec<ScanId> = cohort.window.others(record.id).collect();
        self.evict(&gone)?;
        let n_pairs = self.compute_columns(record.id, &others)?;
        self.shared.metrics.pairs_computed(key.label(), n_pairs);
        Ok(started.elapsed())
    }

    /// In a flood of scans the first ones may leave before their turn: they get a result now. Where
    /// the folder is away, the stream waits for it.
    fn write_before_it_leaves(&mut self, joins: &ScanRecord) -> Result<(), ScanError> {
        let key = &joins.cohort;
        let Some(cohort) = self.cohorts.get(key) else { return Ok(()) };
        let leaving = cohort.window.next_to_leave(&self.settings.member_facts(joins));
        let Some(leaving) = leaving else { return Ok(()) };
        let is_fresh = cohort.fresh.iter().any(|fresh| fresh.id == leaving);
        // At a start no window has been scored yet, and one that was not full may be now.
        let may_be_scored = cohort.scores.scans.is_empty() || !cohort.scored.contains(&leaving);
        if is_fresh || (may_be_scored && self.waits_for_result(leaving, true)?) {
            self.score(key, Trigger::NewStudy)?;
        }
        self.write_if_owed(key, leaving)
    }

    /// Writes the first result of a member, whenever the folder is there.
    fn write_if_owed(&mut self, key: &CohortKey, id: ScanId) -> Result<(), ScanError> {
        let is_scored = self.cohorts.get(key).is_some_and(|c| !c.scores.scans.is_empty());
        while self.waits_for_result(id, is_scored)? && !self.shared.stopping() {
            self.shared.board.beat(StageName::Score);
            if Instant::now() < self.no_writes_before {
                thread::sleep(FULL);
            } else if self.write(key, id)? == Attempt::Failed {
                // Nor would it be written if it stayed.
                break;
            }
        }
        Ok(())
    }

    /// Whether a member still waits for what can be said of it now.
    fn waits_for_result(&self, id: ScanId, is_scored: bool) -> Result<bool, ScanError> {
        let record = self.shared.store.record(&id)?;
        Ok(record.is_some_and(|record| has_no_result(&record, is_scored)))
    }

    /// The columns of one scan against the others that are not kept yet. Ends early when asked to
    /// stop; the next start goes on from there.
    fn compute_columns(&mut self, id: ScanId, others: &[ScanId]) -> Result<u64, ScanError> {
        let Self { shared, distances, settings, .. } = self;
        let store = &shared.store;
        let reach = settings.scoring.reach;
        let goes_on = || {
            shared.board.beat(StageName::Score);
            !shared.stopping()
        };
        let mut n_pairs = 0;
        for grid in 0..shared.method.n_grids() {
            let mut missing = Vec::new();
            for &other in others {
                if !goes_on() {
                    return Ok(n_pairs);
                }
                if !store.has_columns(id, other, grid)? {
                    missing.push(other);
                }
            }
            let done = compare_grid(store, distances.as_mut(), reach, grid, id, &missing, goes_on)?;
            n_pairs += if grid == 0 { done } else { 0 };
        }
        Ok(n_pairs)
    }

    /// Removes scans that left their window. Their results stay.
    fn evict(&self, gone: &[ScanId]) -> Result<(), ScanError> {
        for id in gone {
            self.shared.board.beat(StageName::Score);
            let _changing = self.shared.archive.changing();
            if let Some(record) = self.shared.store.record(id)? {
                self.shared.store.evict(&record)?;
                if let Err(error) = self.shared.archive.remove(*id) {
                    // The next start removes what the journal no longer holds.
                    warn!(scan = %id, %error, "the archived source of an evicted scan stays");
                }
                if record.was_scored() {
                    self.shared.metrics.evicted(EvictionReason::Window);
                    info!(scan = %id, "left the window");
                } else {
                    self.shared.metrics.evicted(EvictionReason::Unscored);
                    warn!(scan = %id, "left a full window that could not be scored: no result");
                }
            }
        }
        Ok(())
    }

    /// Scores all members of a window anew from the kept columns; what is then outdated is a debt.
    /// Returns those that wait for their first result.
    fn rescore(&mut self, key: &CohortKey, trigger: Trigger) -> Result<Vec<ScanId>, ScanError> {
        let Self { shared, distances, settings, cohorts, .. } = self;
        let Some(cohort) = cohorts.get_mut(key) else { return Ok(Vec::new()) };
        cohort.scores = WindowScores::default();
        let mut records = Vec::new();
        for id in cohort.window.members() {
            records.extend(shared.store.record(id)?);
        }
        for record in &records {
            cohort.window.set_facts(record.id, settings.member_facts(record));
        }
        let (mut identity, window) = (cohort.window.identity(), &settings.window);
        // Whoever waits would leave without a result.
        let few_patients = records.len() >= window.max_scans.get()
            && identity.n_references() >= window.min_scans
            && identity.n_patients() < window.min_scans;
        if few_patients {
            identity.same_patient.clear();
        }
        cohort.identity = WindowIdentity { few_patients, ..identity };
        cohort.scored = records.iter().map(|record| record.id).collect();
        let wanted = result_key(&cohort.identity, settings);
        let is_scored = cohort.identity.n_patients() >= window.min_scans;
        let is_due = |record: &&ScanRecord| match &record.reported {
            // Waiting is said once; it is not worth a new file for each arrival.
            Some(done) => is_scored && done.key != wanted,
            None => true,
        };
        // Who has waited longest comes first: in a stream each gets its turn.
        let mut due: Vec<ScanId> = records.iter().filter(is_due).map(|record| record.id).collect();
        cohort.debt.retain(|id| due.contains(id));
        due.retain(|id| !cohort.debt.contains(id));
        cohort.debt.extend(due);
        let waiting = records.iter().filter(|record| has_no_result(record, is_scored));
        let waiting = waiting.map(|record| record.id).collect();
        if !is_scored {
            shared.metrics.score_run(key.label(), ScoreResult::SkippedTooFew, trigger, now_secs());
            return Ok(waiting);
        }
        let n_parts = shared.method.n_parts;
        let mut members = Vec::new();
        for ScanRecord { id, .. } in &records {
            let lost = || StoreError::Damaged { what: "tokens", scan: id.short() };
            let foreground = |part| shared.store.foreground(id, part)?.ok_or_else(lost);
            let parts = (0..n_parts).map(foreground).collect::<Result<_, _>>()?;
            let is_reference = cohort.window.is_reference(*id);
            let patient = cohort.window.patient(*id).filter(|_| !few_patients).cloned();
            members.push(Member { id: *id, parts, is_reference, patient });
        }
        let mut kept = KeptDistances {
            shared: shared.as_ref(),
            distances: distances.as_mut(),
            reach: settings.scoring.reach,
            n_tokens: members.iter().map(n_tokens).collect(),
        };
        let layers = &shared.method.layers;
        let scoring = &settings.scoring;
        cohort.scores = steps::score_members(&members, layers, scoring, &mut kept)?;
        cohort.last_scored_secs = Some(now_secs());
        shared.metrics.score_run(key.label(), ScoreResult::Ok, trigger, now_secs());
        Ok(waiting)
    }

    /// The cohort whose turn it is to get an outdated result written, if one may be.
    fn debtor(&self) -> Option<&CohortKey> {
        let after = self.last_paid.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        let in_turn = self.cohorts.range((after, Bound::Unbounded)).chain(self.cohorts.iter());
        let mut owing = in_turn.filter(|(_, cohort)| !cohort.debt.is_empty());
        let (key, _) = owing.next()?;
        let not_before = self.no_payment_before.max(self.no_writes_before);
        (Instant::now() >= not_before).then_some(key)
    }

    /// Writes one outdated result, if there is one.
    fn pay_one_debt(&mut self) -> Result<(), ScanError> {
        if self.shared.stopping() {
            return Ok(());
        }
        let Some(key) = self.debtor().cloned() else { return Ok(()) };
        self.last_paid = Some(key.clone());
        let due = self.cohorts.get_mut(&key).and_then(|cohort| cohort.debt.pop_front());
        if let Some(id) = due {
            if self.write(&key, id)? == Attempt::Failed {
                self.no_payment_before = Instant::now() + self.settings.intake.rescan;
            }
            self.show(&key)?;
        }
        Ok(())
    }

    /// Writes the result of a member, or that it waits. What cannot be written remains a debt.
    fn write(&mut self, key: &CohortKey, id: ScanId) -> Result<Attempt, ScanError> {
        let attempts = self.write_side_by_side(key, &[id])?;
        let Some(&(_, attempt)) = attempts.first() else { return Ok(Attempt::Failed) };
        if attempt != Attempt::Written
            && let Some(cohort) = self.cohorts.get_mut(key)
        {
            cohort.debt.push_back(id);
        }
        Ok(attempt)
    }

    /// The same for some members at once; those that are gone are left out. What cannot be written
    /// is up to the caller.
    fn write_side_by_side(
        &mut self,
        key: &CohortKey,
        ids: &[ScanId],
    ) -> Result<Vec<(ScanId, Attempt)>, ScanError> {
        let Self { shared, settings, cohorts, .. } = self;
        let Some(cohort) = cohorts.get(key) else { return Ok(Vec::new()) };
        let mut records = Vec::new();
        for id in ids {
            records.extend(shared.store.record(id)?);
        }
        let results = ResultsOf { shared, settings, cohort };
        let attempts = results.write_all(&records);
        // All of them are noted, also beside one that ends the service.
        let noted: Vec<Result<(ScanId, Attempt), ScanError>> = records
            .into_iter()
            .zip(attempts)
            .map(|(record, (done, took))| {
                let id = record.id;
                Ok((id, self.note(key, record, done, took)?))
            })
            .collect();
        let noted = noted.into_iter().collect::<Result<Vec<_>, _>>()?;
        let any = |wanted| noted.iter().any(|(_, attempt)| *attempt == wanted);
        if self.is_away && any(Attempt::Written) && !any(Attempt::Later) {
            info!("results are written again");
        }
        self.is_away &= noted.is_empty() || any(Attempt::Later);
        Ok(noted)
    }

    /// Notes what became of a result.
    fn note(
        &mut self,
        key: &CohortKey,
        mut record: ScanRecord,
        done: Written,
        took: Duration,
    ) -> Result<Attempt, ScanError> {
        let attempt = self.judge(record.id, done)?;
        let Some(cohort) = self.cohorts.get(key) else { return Ok(Attempt::Failed) };
        let is_scored = !cohort.scores.scans.is_empty();
        for kind in OutputKind::ALL {
            if is_scored || *kind == OutputKind::Sidecar {
                self.shared.metrics.output_written(*kind, attempt == Attempt::Written);
            }
        }
        if attempt != Attempt::Written {
            if attempt == Attempt::Later {
                // Said once, also where several fail at once.
                self.is_away = true;
                self.no_writes_before = Instant::now() + self.settings.intake.rescan;
            }
            return Ok(attempt);
        }
        if is_scored && !record.was_scored() {
            let waited = now_secs().saturating_sub(record.first_seen_secs);
            self.shared.metrics.end_to_end(Duration::from_secs(waited));
        }
        let revision = record.reported.as_ref().map_or(0, |done| done.revision) + 1;
        let waiting = || Reported::WAITING.to_owned();
        let key = is_scored.then(|| result_key(&cohort.identity, &self.settings));
        record.reported = Some(Reported { revision, key: key.unwrap_or_else(waiting) });
        self.shared.store.put_record(&record)?;
        self.shared.board.update().n_reported += 1;
        self.shared.metrics.stage_finished(Stage::Write, took);
        Ok(Attempt::Written)
    }

    /// What became of a result; an error only if the daemon cannot go on.
    fn judge(&self, id: ScanId, attempt: Written) -> Result<Attempt, ScanError> {
        match attempt {
            Ok(Ok(())) => Ok(Attempt::Written),
            Ok(Err(error)) => {
                self.shared.metrics.stage_failed(Stage::Write, &error);
                if error.disposition() == Disposition::Fatal {
                    return Err(error);
                }
                self.shared.metrics.stage_retried(Stage::Write);
                if !matches!(error, ScanError::Own { .. }) {
                    warn!(scan = %id, %error, "no result written; trying again");
                    return Ok(Attempt::Failed);
                }
                if !self.is_away {
                    warn!(scan = %id, %error, "no results can be written; trying until they can");
                }
                Ok(Attempt::Later)
            }
            Err(panic) => {
                self.shared.metrics.stage_panicked(Stage::Write);
                let panic = panic_text(panic.as_ref());
                error!(scan = %id, panic, "a crash while a result was written; please report it");
                Ok(Attempt::Failed)
            }
        }
    }

    /// Takes over new settings: a smaller window lets scans go, other thresholds make debts.
    fn reload(&mut self) -> Result<(), ScanError> {
        let settings = self.shared.config();
        if Arc::ptr_eq(&settings, &self.settings) {
            return Ok(());
        }
        self.settings = settings;
        let keys: Vec<CohortKey> = self.cohorts.keys().cloned().collect();
        for key in keys {
            self.score(&key, Trigger::Reload)?;
            let capacity = self.settings.window.max_scans;
            let Some(cohort) = self.cohorts.get(&key) else { continue };
            // Some may have to leave: who waits for a result gets it first.
            for id in cohort.window.leaving(capacity) {
                self.write_if_owed(&key, id)?;
            }
            if self.shared.stopping() {
                return Ok(());
            }
            let Some(cohort) = self.cohorts.get_mut(&key) else { continue };
            let gone = cohort.window.set_capacity(capacity);
            cohort.debt.retain(|id| !gone.contains(id));
            if !gone.is_empty() {
                self.evict(&gone)?;
                self.score(&key, Trigger::Reload)?;
            }
        }
        Ok(())
    }

    fn show(&mut self, key: &CohortKey) -> Result<(), ScanError> {
        let Some(cohort) = self.cohorts.get_mut(key) else { return Ok(()) };
        let now = now_secs();
        let since = cohort.owed_since_secs.unwrap_or(now);
        cohort.owed_since_secs = (!cohort.debt.is_empty()).then_some(since);
        let n_owed = self.cohorts.values().map(|cohort| cohort.debt.len()).sum();
        let owed_since = self.cohorts.values().filter_map(|cohort| cohort.owed_since_secs).min();
        self.shared.metrics.queue(Stage::Write, n_owed, owed_since);
        let Some(cohort) = self.cohorts.get(key) else { return Ok(()) };
        let window = &self.settings.window;
        let members = cohort.window.members();
        let n_set_aside = cohort.identity.set_aside.len();
        let n_patients = cohort.identity.n_patients();
        let n_same_patient = cohort.identity.n_references() - n_patients;
        let oldest = members.first().map(|id| self.shared.store.record(id)).transpose()?.flatten();
        self.shared.metrics.window(
            key.label(),
            [n_patients, n_set_aside, n_same_patient],
            window.min_scans,
            window.max_scans.get(),
            oldest.map(|record| record.first_seen_secs),
        );
        let heterogeneity = scoring::heterogeneity(&cohort.scores.references());
        let metrics = &self.shared.metrics;
        metrics.window_likeness(key.label(), heterogeneity, newest_shift(cohort));
        metrics.window_contamination(key.label(), contamination(cohort));
        let status = CohortStatus {
            n_scans: members.len(),
            min_scans: window.min_scans,
            max_scans: window.max_scans.get(),
            heterogeneity,
            n_unlike: n_unlike(&cohort.scores),
            n_set_aside,
            n_same_patient,
            few_patients: cohort.identity.few_patients,
            n_outdated: cohort.debt.len() + cohort.fresh.len(),
            last_scored_secs: cohort.last_scored_secs,
        };
        self.shared.board.update().cohorts.insert(key.label().to_owned(), status);
        Ok(())
    }

    fn show_store(&self) -> Result<(), ScanError> {
        let store = &self.shared.store;
        self.shared.metrics.store_size(store.size_on_disk()?, store.live_bytes()?);
        Ok(())
    }
}

/// Most results that are written at once.
fn n_writers() -> usize {
    rayon::current_num_threads().div_ceil(4).min(4)
}

/// Whether files were written, or what panicked.
type Written = thread::Result<Result<(), ScanError>>;

/// What results are made from.
struct ResultsOf<'a> {
    shared: &'a Shared,
    settings: &'a Config,
    cohort: &'a Cohort,
}

impl ResultsOf<'_> {
    /// All at once, each with the time that it took.
    fn write_all(&self, records: &[ScanRecord]) -> Vec<(Written, Duration)> {
        let write = |record: &ScanRecord| {
            let started = Instant::now();
            let done = catch_unwind(AssertUnwindSafe(|| self.write(record)));
            self.shared.board.beat(StageName::Score);
            (done, started.elapsed())
        };
        let mut all = Vec::new();
        side_by_side(records, write, |_, written| all.push(written));
        all
    }

    /// The result of a member, or that it waits.
    fn write(&self, record: &ScanRecord) -> Result<(), ScanError> {
        let cohort = self.cohort;
        if !cohort.scores.scans.is_empty() {
            return self.write_scored(record);
        }
        let folder = &self.settings.directories.results;
        let waiting = sidecar(record, &cohort.identity, &self.shared.method, self.settings);
        report::write_sidecar(folder, &record.output_stem, &waiting).map_err(writing)?;
        let (have, need) = (cohort.identity.n_patients(), self.settings.window.min_scans);
        info!(scan = %record.id, have, need, "waits for scans of more patients");
        Ok(())
    }

    fn write_scored(&self, record: &ScanRecord) -> Result<(), ScanError> {
        let Self { shared, settings, cohort } = self;
        let id = record.id;
        let index = cohort.scored.iter().position(|&member| member == id);
        let Some(index) = index else { return Ok(()) };
        let mask = shared.archive.mask(id);
        let alignment = steps::alignment(record.alignment)?;
        let scan = shared.archive.scan(id);
        let source = steps::read_source(&scan, mask.as_deref(), alignment, &ARCHIVED)?;
        let (results, finding) = build_results(&ReportInput {
            record,
            source: &source,
            scores: &cohort.scores,
            index,
            window: &cohort.identity,
            method: &shared.method,
            config: settings,
        })?;
        let folder = &settings.directories.results;
        report::write_results(folder, &record.output_stem, &results).map_err(writing)?;
        shared.metrics.study_percentile(record.cohort.label(), finding.percentile);
        info!(
            scan = %id,
            window = cohort.identity.id,
            scans = cohort.scores.scans.len(),
            score = format!("{:.3}", finding.score_top1_mean),
            percentile = format!("{:.2}", finding.percentile),
            "result written"
        );
        Ok(())
    }
}

fn new_cohort(key: &CohortKey, capacity: NonZeroUsize) -> Cohort {
    let window = Window::new(key.clone(), capacity);
    let identity = window.identity();
    Cohort {
        window,
        identity,
        scored: Vec::new(),
        scores: WindowScores::default(),
        fresh: Vec::new(),
        rests_until: Instant::now(),
        debt: VecDeque::new(),
        owed_since_secs: None,
        last_scored_secs: None,
    }
}

/// How far the newest member as a whole lies from the others.
fn newest_shift(cohort: &Cohort) -> Option<f64> {
    cohort.scores.shift(cohort.scores.scans.len().checked_sub(1)?)
}

/// Members that lie far from their window as a whole.
fn n_unlike(scores: &WindowScores) -> usize {
    let is_unlike = |&index: &usize| scores.shift(index).is_some_and(|shift| shift > SHIFTED);
    (0..scores.scans.len()).filter(is_unlike).count()
}

/// Share of the scored members that share an anomaly with others.
fn contamination(cohort: &Cohort) -> f64 {
    let shared = cohort.scores.shared.iter().flat_map(|anomaly| &anomaly.members);
    shared.collect::<BTreeSet<_>>().len() as f64 / cohort.scored.len().max(1) as f64
}

/// The columns that the store keeps; what is lost, and what was never kept, is computed.
struct KeptDistances<'a> {
    shared: &'a Shared,
    distances: &'a mut dyn PairDistances,
    reach: SearchReach,
    /// Of each part of a layer.
    n_tokens: BTreeMap<ScanId, Vec<usize>>,
}

impl steps::Distances for KeptDistances<'_> {
    fn column(&mut self, of: ScanId, other: ScanId, grid: usize) -> Result<Vec<f32>, ScanError> {
        let Self { shared, distances, reach, n_tokens } = self;
        shared.board.beat(StageName::Score);
        let parts = &n_tokens[&of];
        let kept = || shared.store.column(of, other, grid, parts[grid % parts.len()]);
        if let Some(column) = kept()? {
            return Ok(column);
        }
        warn!(scan = %of, %other, grid, "distances are lost or damaged; computing them again");
        compute_again(&shared.store, *distances, *reach, grid, of, other)?;
        let lost = || StoreError::Damaged { what: "distances", scan: of.short() };
        kept()?.ok_or_else(|| ScanError::from(lost()))
    }

    fn columns(
        &mut self,
        of: ScanId,
        others: &[ScanId],
        grid: usize,
    ) -> Result<Vec<Vec<f32>>, ScanError> {
        self.shared.board.beat(StageName::Score);
        let parts = &self.n_tokens[&of];
        let kept = self.shared.store.columns(of, others, grid, parts[grid % parts.len()])?;
        let found = kept.into_iter().zip(others);
        found
            .map(|(column, &other)| column.map_or_else(|| self.column(of, other, grid), Ok))
            .collect()
    }

    fn column_without(
        &mut self,
        of: ScanId,
        other: ScanId,
        grid: usize,
        excluded: &[usize],
    ) -> Result<Vec<f32>, ScanError> {
        self.shared.board.beat(StageName::Score);
        let tokens = |id: ScanId| {
            let lost = || StoreError::Damaged { what: "tokens", scan: id.short() };
            self.shared.store.tokens(&id, grid)?.ok_or_else(lost)
        };
        let (own, theirs) = (tokens(of)?, tokens(other)?.without(excluded));
        Ok(self.distances.nearest(&own, &theirs, self.reach)?.first_to_second)
    }
}

/// Tokens of each part of a layer.
fn n_tokens(member: &Member) -> (ScanId, Vec<usize>) {
    (member.id, member.parts.iter().map(|part| part.cells.len()).collect())
}

/// Whether a scan waits for its first result, or for the notice that it has to wait for more scans.
fn has_no_result(record: &ScanRecord, is_scored: bool) -> bool {
    if is_scored { !record.was_scored() } else { record.reported.is_none() }
}

fn writing(source: std::io::Error) -> ScanError {
    ScanError::Own { doing: "writing results", source }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::mpsc};

    use half::f16;

    use super::*;
    use crate::{
        compute::cpu::CpuDistances,
        domain::scan::ScanState,
        metrics::Metrics,
        numeric::{geometry::Shape3, token::TokenGrid},
        store::{MIN_MEMORY, Store},
    };

    /// A score stage whose windows wait for more scans: its results are notices.
    fn stage(folder: &Path) -> Score {
        for name in ["results", "state"] {
            std::fs::create_dir(folder.join(name)).unwrap();
        }
        let at = folder.display();
        let config = format!(
            "window.min_scans = 9\n\
             directories.results = \"{at}/results\"\n\
             directories.state = \"{at}/state\""
        );
        let config = Config::parse(&config).unwrap();
        let store = Store::open(&folder.join("state/store"), MIN_MEMORY).unwrap();
        let method = steps::tests::method();
        let shared = Shared::new(config, store, Metrics::new(), method).unwrap();
        let (_, from_encoder) = mpsc::channel();
        Score::new(Arc::new(shared), Box::new(CpuDistances::new()), from_encoder, Vec::new())
    }

    /// A scan comes from the encoder.
    fn come(score: &mut Score, n: u8) {
        let features = vec![f16::from_f32(f32::from(n)); 8];
        let tokens = TokenGrid::new(Shape3::cube(2), 8, vec![u32::from(n)], features).unwrap();
        let record = ScanRecord {
            state: ScanState::Encoded,
            output_stem: format!("scan-{n}"),
            sequence: u64::from(n),
            ..ScanRecord::new(ScanId([n; 32]), cohort())
        };
        score.shared.store.put_encoded(&record, &[tokens]).unwrap();
        let queued = score.shared.board.enqueue(Queue::Score, 0);
        score.admit(Encoded { id: record.id, queued }).unwrap();
        score.score_due().unwrap();
    }

    fn cohort() -> CohortKey {
        CohortKey { name: "t1w".into(), method: "m".into() }
    }

    #[test]
    fn scans_that_come_while_a_window_rests_get_their_results_together() {
        let folder = tempfile::tempdir().unwrap();
        let mut score = stage(folder.path());
        let has_result =
            |n: u8| folder.path().join(format!("results/scan-{n}_anomaly.json")).exists();
        let waiting = |score: &Score| {
            let status = score.shared.board.status();
            (status.n_unscored, status.cohorts["t1w"].n_outdated)
        };
        let encoding = score.shared.board.enqueue(Queue::Encode, 0);
        come(&mut score, 1);
        assert!(has_result(1), "at once: the window does not rest");
        score.cohorts.get_mut(&cohort()).unwrap().rests_until += Duration::from_secs(3600);
        come(&mut score, 2);
        come(&mut score, 3);
        assert!(![2, 3].map(has_result).contains(&true));
        assert_eq!(waiting(&score), (2, 2));
        drop(encoding);
        assert!(score.score_due().unwrap(), "no more are to come");
        assert!([2, 3].iter().all(|&n| has_result(n)));
        assert_eq!(waiting(&score), (0, 0));
        score.cohorts.get_mut(&cohort()).unwrap().rests_until += Duration::from_secs(3600);
        come(&mut score, 4);
        assert!(has_result(4), "at once: none is on its way");
    }
}
