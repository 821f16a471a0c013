//! The last stage: keeps the windows and the distances between their members, scores them, and
//! writes the results.
//!
//! A new scan gets its result at once. If many scans arrive, a large window cools down between two
//! scorings, and scans that arrive meanwhile are scored together. A result that is older than its
//! window is stale. After a scoring that leaves no new scan waiting, the stage refreshes one stale
//! result. While no scan is being encoded, it continues refreshing. The cohorts take turns. A scan
//! that leaves its window has had a result, unless there were never enough good scans for one. The
//! ledger knows which result belongs to which window, so a restart continues with the stale ones.
//!
//! Members whose tokens are damaged or gone stay members and are encoded again. Until they are
//! there, their window is not scored, and its results stay as they are.
//!
//! This file has the loop. [`cohort`] and `domain/refresh.rs` decide without I/O, [`columns`] has
//! the distances, and [`results`] the files.

mod cohort;
pub(super) mod columns;
mod results;
mod volumes;

use std::{
    collections::BTreeMap,
    error::Error as _,
    mem,
    num::NonZeroUsize,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use self::{
    cohort::{Cohort, Unscored, first_results},
    columns::{StoredColumns, compute_missing},
    volumes::StoredVolumes,
};
use super::{
    IDLE, Shared,
    board::{Queue, Queued, StageName},
    encode::Encoded,
    log_nearest_pair, now_secs,
};
use crate::{
    config::Config,
    domain::{
        PairDistances,
        cohort::CohortKey,
        damage::Damage,
        error::ScanError,
        not_ready::NotReady,
        refresh::{Cooldown, ResultsFolder, Turns},
        scan::{ScanId, ScanRecord, ScanState},
        window_scores::{ScoredMember, score_members},
    },
    metrics::{EvictionReason, ScoreResult, Stage, Trigger},
    report,
    store::{Compaction, StoreError},
};

pub(super) struct Score {
    shared: Arc<Shared>,
    distances: Box<dyn PairDistances>,
    from_encoder: Receiver<Encoded>,
    /// Members from an earlier run, and whether the store has their tokens.
    members: Vec<(ScanRecord, bool)>,
    cohorts: BTreeMap<CohortKey, Cohort>,
    settings: Arc<Config>,
    turns: Turns,
    folder: ResultsFolder,
}

/// The encode stage has ended.
struct Gone;

impl Score {
    pub(super) fn new(
        shared: Arc<Shared>,
        distances: Box<dyn PairDistances>,
        from_encoder: Receiver<Encoded>,
        members: Vec<(ScanRecord, bool)>,
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
            turns: Turns::new(now),
            folder: ResultsFolder::new(now),
        }
    }

    pub(super) fn run(mut self) -> Result<(), ScanError> {
        self.tidy_up()?;
        self.take_up()?;
        // Scans that the encoder still sends are members in the ledger. The next start scores them.
        while !self.shared.stopping() {
            self.shared.board.heartbeat(StageName::Score);
            let turn = self.turn();
            self.mend(turn)?;
        }
        Ok(())
    }

    /// Does what is due now.
    fn turn(&mut self) -> Result<(), ScanError> {
        for id in self.shared.requests.gone() {
            self.drop_member(id)?;
        }
        match self.next() {
            Ok(Some(encoded)) => self.admit(encoded)?,
            Ok(None) => {}
            // The encode stage has failed and reports that itself. If this stage ended first, it
            // would look like the cause.
            Err(Gone) => thread::sleep(IDLE),
        }
        self.show_waiting();
        let has_scored = self.score_due()?;
        self.reload()?;
        if self.may_refresh(has_scored) {
            self.refresh_one()?;
            self.compact_store()?;
        }
        Ok(())
    }

    /// Removes columns and files of an earlier run that this run cannot use, and finishes the
    /// results that it was replacing.
    fn tidy_up(&self) -> Result<(), ScanError> {
        let reach = format!("{:?}", self.settings.scoring.reach);
        let alive = || self.shared.board.heartbeat(StageName::Score);
        self.shared.store.keep_columns_made_by(&reach, alive)?;
        if let Err(error) = report::tidy_results(&self.settings.directories.results) {
            let error = error.kind();
            warn!(%error, "cannot finish or remove half-written files in the results folder");
        }
        Ok(())
    }

    /// The next scan from the encoder. The stage does not wait for it if it can refresh a stale
    /// result and no scan is being encoded.
    fn next(&self) -> Result<Option<Encoded>, Gone> {
        let now = Instant::now();
        let refreshes = self.next_to_refresh(now).is_some() && !self.shared.board.is_encoding();
        let goes_on = refreshes || self.shared.store.is_compacting();
        let patience = if goes_on { Duration::ZERO } else { self.due_in(now).min(IDLE) };
        match self.from_encoder.recv_timeout(patience) {
            Ok(encoded) => Ok(Some(encoded)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Gone),
        }
    }

    /// The time until a window with new members may be scored.
    fn due_in(&self, now: Instant) -> Duration {
        let due = self.cohorts.values().filter_map(|cohort| cohort.due_in(now));
        due.min().unwrap_or(Duration::MAX)
    }

    /// Whether a stale result may be refreshed without delaying new scans.
    fn may_refresh(&self, has_scored: bool) -> bool {
        let board = &self.shared.board;
        let nobody_waits = board.queue(Queue::Score).0 == 0;
        (has_scored && nobody_waits) || !board.is_encoding()
    }

    /// Rebuilds the windows of an earlier run. Scans without any result get theirs first. A window
    /// that has become smaller since shrinks once it is whole.
    fn take_up(&mut self) -> Result<(), ScanError> {
        let members = mem::take(&mut self.members);
        for (record, has_tokens) in &members {
            let new = || {
                let is_own = |(other, _): &&(ScanRecord, bool)| other.cohort == record.cohort;
                let n_scans = NonZeroUsize::new(members.iter().filter(is_own).count());
                let max_scans = self.settings.window.max_scans;
                let capacity = n_scans.map_or(max_scans, |n_scans| max_scans.max(n_scans));
                Cohort::new(&record.cohort, capacity, Instant::now())
            };
            let cohort = self.cohorts.entry(record.cohort.clone()).or_insert_with(new);
            cohort.admit(record.id, self.settings.membership(record));
            if !has_tokens {
                cohort.rebuilding.insert(record.id);
            }
        }
        for (record, _) in members.iter().filter(|(_, has_tokens)| *has_tokens) {
            let took = self.compare(record);
            let took = self.mend(took)?.unwrap_or_default();
            if self.shared.stopping() {
                return Ok(());
            }
            if record.reported.is_none() {
                let queued = self.shared.board.enqueue(Queue::Score, now_secs());
                self.add_unscored(record, took, queued);
            }
        }
        for key in self.keys() {
            let begun = self.begin(&key);
            self.mend(begun)?;
        }
        self.show_store()
    }

    /// Brings a window that is whole up to date, or shows that it is being rebuilt.
    fn begin(&mut self, key: &CohortKey) -> Result<(), ScanError> {
        if self.cohorts.get(key).is_none_or(Cohort::is_rebuilding) {
            return self.show(key);
        }
        self.resize(key)?;
        let held = self.cohorts.get_mut(key).map(|cohort| mem::take(&mut cohort.held));
        for encoded in held.unwrap_or_default() {
            self.admit(encoded)?;
        }
        self.score(key, Trigger::Reload)
    }

    /// Admits a scan that was just encoded.
    fn admit(&mut self, Encoded { id, queued }: Encoded) -> Result<(), ScanError> {
        let record = self.shared.records.get(&id)?;
        let Some(record) = record.filter(ScanRecord::is_member) else { return Ok(()) };
        let key = &record.cohort;
        let cohort = self.cohorts.get_mut(key);
        if cohort.as_ref().is_some_and(|cohort| cohort.rebuilding.contains(&id)) {
            return self.admit_again(&record, queued);
        }
        if let Some(cohort) = cohort.filter(|cohort| cohort.is_rebuilding()) {
            cohort.held.push(Encoded { id, queued });
            return Ok(());
        }

        let took = self.enter(&record)?;
        if self.shared.stopping() {
            return Ok(());
        }
        self.add_unscored(&record, took, queued);
        self.show(key)
    }

    /// Takes in the new tokens of a member. After the last of them the window is scored again.
    fn admit_again(&mut self, record: &ScanRecord, queued: Queued) -> Result<(), ScanError> {
        let key = &record.cohort;
        if let Some(cohort) = self.cohorts.get_mut(key) {
            cohort.rebuilding.remove(&record.id);
        }
        let took = self.compare(record)?;
        if record.reported.is_none() {
            self.add_unscored(record, took, queued);
        }
        let is_whole = self.cohorts.get(key).is_some_and(|cohort| !cohort.is_rebuilding());
        if is_whole {
            info!(cohort = key.label(), "all members are encoded again; the window is scored");
        }
        self.begin(key)
    }

    /// Removes a scan that is no member any more. Its record says why.
    fn drop_member(&mut self, id: ScanId) -> Result<(), ScanError> {
        let of_scan = |cohort: &&mut Cohort| cohort.window.members().contains(&id);
        let Some(cohort) = self.cohorts.values_mut().find(of_scan) else { return Ok(()) };
        cohort.lose(id);
        let key = cohort.window.identity().cohort;
        self.begin(&key)
    }

    /// Makes good what a damaged value of the store has stopped: the scan is encoded again. Returns
    /// other errors.
    fn mend<T>(&mut self, done: Result<T, ScanError>) -> Result<Option<T>, ScanError> {
        let error = match done {
            Ok(done) => return Ok(Some(done)),
            Err(ScanError::Store(error)) => error,
            Err(error) => return Err(error),
        };
        let damaged = error.downcast_ref().and_then(|error| match error {
            StoreError::Damaged { scan, .. } => *scan,
            _ => None,
        });
        let of_scan = |cohort: &&mut Cohort| {
            damaged.is_some_and(|scan| cohort.window.members().contains(&scan))
        };
        let cohort = self.cohorts.values_mut().find(of_scan);
        let (Some(scan), Some(cohort)) = (damaged, cohort) else {
            return Err(ScanError::Store(error));
        };

        warn!(%scan, %error, "the scan is encoded again from its archived source");
        self.shared.found_damaged(Damage::Tokens, 1);
        self.shared.store.remove(&scan)?;
        if cohort.rebuilding.insert(scan) {
            self.shared.requests.encode_again(scan, Duration::ZERO);
        }
        let key = cohort.window.identity().cohort;
        self.show(&key)?;
        Ok(None)
    }

    /// Adds a member that gets its first result at the next scoring.
    fn add_unscored(&mut self, record: &ScanRecord, took: Duration, queued: Queued) {
        if let Some(cohort) = self.cohorts.get_mut(&record.cohort) {
            cohort.unscored.push(Unscored { id: record.id, took, queued });
        }
    }

    /// Makes a scan a member and computes its distances to the others. Returns how long that took.
    /// If the service stops, the next start does this.
    fn enter(&mut self, record: &ScanRecord) -> Result<Duration, ScanError> {
        self.write_before_it_leaves(record)?;
        let started = Instant::now();
        if self.shared.stopping() {
            return Ok(Duration::ZERO);
        }

        let (id, key) = (record.id, &record.cohort);
        let new = || Cohort::new(key, self.settings.window.max_scans, started);
        let cohort = self.cohorts.entry(key.clone()).or_insert_with(new);
        let gone = cohort.admit(id, self.settings.membership(record));
        self.evict(&gone)?;
        self.compare(record)
    }

    /// Computes the distances of a member to the others. Returns how long that took.
    fn compare(&mut self, record: &ScanRecord) -> Result<Duration, ScanError> {
        let (started, id, key) = (Instant::now(), record.id, &record.cohort);
        let Some(cohort) = self.cohorts.get(key) else { return Ok(Duration::ZERO) };
        let has_tokens = |other: &ScanId| !cohort.rebuilding.contains(other);
        let others: Vec<ScanId> = cohort.window.others(id).filter(has_tokens).collect();

        let reach = self.settings.scoring.reach;
        let n_pairs = compute_missing(&self.shared, self.distances.as_mut(), reach, id, &others)?;
        self.shared.metrics.pairs_computed(key.label(), n_pairs);
        Ok(started.elapsed())
    }

    /// Scores the windows with new members, unless they cool down. Returns whether there were any.
    fn score_due(&mut self) -> Result<bool, ScanError> {
        let (now, board) = (Instant::now(), &self.shared.board);
        let n_unscored: usize = self.cohorts.values().map(|cohort| cohort.unscored.len()).sum();
        let more_come = board.is_encoding() || board.queue(Queue::Score).0 > n_unscored;
        let due = self.cohorts.iter().filter(|(_, cohort)| cohort.is_due(now, more_come));
        let due: Vec<CohortKey> = due.map(|(key, _)| key.clone()).collect();
        due.iter().try_for_each(|key| self.score(key, Trigger::NewScan))?;
        Ok(!due.is_empty())
    }

    /// Scores a window anew and writes the results of members that wait for their first. After a
    /// stop, the next start continues.
    fn score(&mut self, key: &CohortKey, trigger: Trigger) -> Result<(), ScanError> {
        if self.shared.stopping() {
            return Ok(());
        }
        let started = Instant::now();
        let cohort = self.cohorts.get_mut(key).filter(|cohort| !cohort.is_rebuilding());
        let Some(cohort) = cohort else { return Ok(()) };
        let joined = mem::take(&mut cohort.unscored);
        let records = self.records_of(key)?;
        let is_scored = self.rescore(key, &records, trigger)?;

        let took = started.elapsed();
        for Unscored { took: own, .. } in &joined {
            let share = took / joined.len() as u32;
            self.shared.metrics.stage_finished(Stage::Score, *own + share);
        }

        self.write_first(key, first_results(joined, &records, is_scored))?;
        if let Some(cohort) = self.cohorts.get_mut(key) {
            cohort.cooldown = Cooldown::after(took, Instant::now());
        }
        self.show(key)?;
        self.show_waiting();
        self.show_store()
    }

    /// Scores all members of a window anew from the stored columns, if there are enough members.
    /// Returns whether there are. Earlier results then become stale.
    fn rescore(
        &mut self,
        key: &CohortKey,
        records: &[ScanRecord],
        trigger: Trigger,
    ) -> Result<bool, ScanError> {
        let Self { shared, distances, settings, cohorts, .. } = self;
        let Some(cohort) = cohorts.get_mut(key) else { return Ok(false) };
        if !cohort.prepare_scoring(records, settings) {
            shared.metrics.score_run(key.label(), ScoreResult::SkippedTooFew, trigger, now_secs());
            return Ok(false);
        }

        let members = members_to_score(shared, cohort, records, settings)?;
        let mut stored = StoredColumns {
            shared: shared.as_ref(),
            distances: distances.as_mut(),
            reach: settings.scoring.reach,
            n_tokens: members.iter().map(n_tokens).collect(),
        };
        let fines = StoredVolumes { shared: shared.as_ref() };
        let layers = &shared.method.layers;
        let scoring = cohort.scoring(settings);
        cohort.scores = score_members(&members, layers, &scoring, &mut stored, &fines)?;
        log_nearest_pair(&cohort.scores.follow_ups);
        cohort.last_scored_secs = Some(now_secs());
        shared.metrics.score_run(key.label(), ScoreResult::Ok, trigger, now_secs());
        Ok(true)
    }

    /// The records of the members of a window.
    fn records_of(&self, key: &CohortKey) -> Result<Vec<ScanRecord>, ScanError> {
        let mut records = Vec::new();
        for id in self.cohorts.get(key).map_or(&[][..], |cohort| cohort.window.members()) {
            records.extend(self.shared.records.get(id)?);
        }
        Ok(records)
    }

    /// Removes scans that left their window. Their results stay.
    fn evict(&self, gone: &[ScanId]) -> Result<(), ScanError> {
        for id in gone {
            self.shared.board.heartbeat(StageName::Score);
            let _changing = self.shared.archive.changing();
            let Some(record) = self.shared.records.get(id)? else { continue };
            let evicted = ScanRecord { state: ScanState::Evicted, ..record.clone() };
            self.shared.records.put(&evicted)?;
            self.shared.store.remove(id)?;
            if let Err(error) = self.shared.archive.remove(*id) {
                // The next start removes sources without a member.
                warn!(scan = %id, %error, "cannot remove the archived source of an evicted scan");
            }
            if record.was_scored() {
                self.shared.metrics.evicted(EvictionReason::Window);
                info!(scan = %id, "left the window");
            } else {
                self.shared.metrics.evicted(EvictionReason::Unscored);
                warn!(scan = %id, "left a full window that could not be scored: no result");
            }
        }
        Ok(())
    }

    /// Applies new settings. From a smaller window scans leave. With other thresholds results
    /// become stale.
    fn reload(&mut self) -> Result<(), ScanError> {
        let settings = self.shared.config();
        if Arc::ptr_eq(&settings, &self.settings) {
            return Ok(());
        }
        self.settings = settings;
        for key in self.keys() {
            self.begin(&key)?;
            if self.shared.stopping() {
                break;
            }
        }
        Ok(())
    }

    /// Applies the new size of a window. Members that must leave get their first result before
    /// that, scored in their old window.
    fn resize(&mut self, key: &CohortKey) -> Result<(), ScanError> {
        let capacity = self.settings.window.max_scans;
        let records = self.records_of(key)?;
        let Some(cohort) = self.cohorts.get_mut(key) else { return Ok(()) };
        cohort.renew_memberships(&records, &self.settings);

        let leaving = cohort.window.leaving(capacity);
        let mut waits = leaving.iter().any(|&id| cohort.is_unscored(id));
        for &id in &leaving {
            waits |= self.waits_for_first(id, true)?;
        }
        if waits {
            self.score(key, Trigger::Reload)?;
            for id in leaving {
                self.write_if_it_waits(key, id)?;
            }
        }
        if self.shared.stopping() {
            return Ok(());
        }

        let Some(cohort) = self.cohorts.get_mut(key) else { return Ok(()) };
        let gone = cohort.set_capacity(capacity);
        self.evict(&gone)
    }

    fn keys(&self) -> Vec<CohortKey> {
        self.cohorts.keys().cloned().collect()
    }

    fn show(&mut self, key: &CohortKey) -> Result<(), ScanError> {
        let Some(cohort) = self.cohorts.get_mut(key) else { return Ok(()) };
        cohort.stale.observe(now_secs());
        self.show_stale();
        let Some(cohort) = self.cohorts.get(key) else { return Ok(()) };

        let oldest = cohort.window.members().first();
        let oldest = oldest.map(|id| self.shared.records.get(id)).transpose()?.flatten();
        let status = cohort.status(&self.settings.window);

        let metrics = &self.shared.metrics;
        metrics.window(
            key.label(),
            [cohort.identity.n_patients(), status.n_set_aside, status.n_same_patient],
            status.min_scans,
            status.max_scans,
            oldest.map(|record| record.first_seen_secs),
        );
        metrics.window_likeness(key.label(), status.heterogeneity, cohort.newest_shift());
        metrics.window_contamination(key.label(), cohort.contamination());
        metrics.window_hidden_follow_ups(key.label(), status.n_hidden_follow_ups);
        metrics.window_rebuilding(key.label(), status.n_rebuilding);
        self.shared.board.update().cohorts.insert(key.label().to_owned(), status);
        Ok(())
    }

    fn show_stale(&self) {
        let stale = || self.cohorts.values().map(|cohort| &cohort.stale);
        let n_stale = stale().map(|stale| stale.len()).sum();
        if n_stale == 0 {
            // Nothing is tried again that could show that the folder is back.
            self.shared.board.set_reason(NotReady::ResultsFailed, false);
        }
        let since = stale().filter_map(|stale| stale.since_secs()).min();
        self.shared.metrics.queue(Stage::Write, n_stale, since);
    }

    fn show_waiting(&self) {
        let (n_waiting, oldest) = self.shared.board.queue(Queue::Score);
        self.shared.metrics.queue(Stage::Score, n_waiting, oldest);
    }

    /// Does a part of what makes the store smaller, if it has grown.
    fn compact_store(&self) -> Result<(), ScanError> {
        let windows: Vec<&[ScanId]> =
            self.cohorts.values().map(|cohort| cohort.window.members()).collect();
        let above = self.settings.window.compact_above;
        match self.shared.store.compact_step(above, &windows)? {
            Compaction::Idle | Compaction::Goes => Ok(()),
            Compaction::Done { from, to } => {
                info!(from_bytes = from, to_bytes = to, "the store was copied into a smaller one");
                self.shared.metrics.store_compacted();
                self.show_store()
            }
            Compaction::Failed(error) => {
                let cause = error.source().map(ToString::to_string);
                warn!(%error, cause, "cannot copy the store into a smaller one; next try later");
                Ok(())
            }
        }
    }

    fn show_store(&self) -> Result<(), ScanError> {
        let store = &self.shared.store;
        let windows = self.cohorts.values().map(|cohort| cohort.window.members());
        self.shared.metrics.store_size(store.size_on_disk()?, store.live_bytes(windows)?);
        Ok(())
    }
}

/// The members of a window as input of the scoring.
fn members_to_score(
    shared: &Shared,
    cohort: &Cohort,
    records: &[ScanRecord],
    settings: &Config,
) -> Result<Vec<ScoredMember>, ScanError> {
    let mut members = Vec::new();
    for ((id, membership), record) in cohort.memberships().into_iter().zip(records) {
        let lost = || StoreError::Damaged { what: "tokens", scan: Some(id) };
        let foreground = |part| shared.store.foreground(&id, part)?.ok_or_else(lost);
        let parts = (0..shared.method.n_parts).map(foreground).collect::<Result<_, _>>()?;
        let weights = settings.evidence.weights(&record.acquisition);
        members.push(ScoredMember { id, parts, membership, weights });
    }
    Ok(members)
}

/// Number of tokens in each part of a layer.
fn n_tokens(member: &ScoredMember) -> (ScanId, Vec<usize>) {
    (member.id, member.parts.iter().map(|part| part.cells.len()).collect())
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::mpsc};

    use half::f16;

    use super::{cohort::tests::key, *};
    use crate::{
        compute::cpu::CpuDistances,
        domain::scan::Reported,
        metrics::Metrics,
        numeric::{geometry::Shape3, token::TokenGrid},
        store::{MIN_MEMORY, Store},
    };

    /// A score stage whose windows wait for more scans. Its results only say so.
    pub(super) fn stage(folder: &Path) -> Score {
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
        let store = Store::open(&folder.join("state/store"), MIN_MEMORY).unwrap().store;
        let method = crate::engine::tests::method();
        let shared = Shared::new(config, store, Metrics::new(), method).unwrap();
        let (_, from_encoder) = mpsc::channel();
        Score::new(Arc::new(shared), Box::new(CpuDistances::new()), from_encoder, Vec::new())
    }

    /// A scan arrives from the encoder.
    pub(super) fn arrive(score: &mut Score, n: u8) {
        let features = vec![f16::from_f32(f32::from(n)); 8];
        let tokens = TokenGrid::new(Shape3::cube(2), 8, vec![u32::from(n)], features).unwrap();
        let record = ScanRecord {
            state: ScanState::Encoded,
            output_stem: format!("scan-{n}"),
            sequence: u64::from(n),
            ..ScanRecord::new(ScanId([n; 32]), key())
        };
        score.shared.store.put_tokens(record.id, "m", &[tokens], None).unwrap();
        score.shared.records.put(&record).unwrap();
        let queued = score.shared.board.enqueue(Queue::Score, 0);
        score.admit(Encoded { id: record.id, queued }).unwrap();
        score.score_due().unwrap();
    }

    /// The window of a stage cools down for longer than any test takes.
    fn cool_down(score: &mut Score) {
        let hour = Duration::from_secs(3600);
        let cohort = score.cohorts.get_mut(&key()).unwrap();
        cohort.cooldown = Cooldown::after(hour, Instant::now() + hour);
    }

    #[test]
    fn a_member_that_leaves_a_smaller_window_before_its_turn_gets_its_result_first() {
        let folder = tempfile::tempdir().unwrap();
        let mut score = stage(folder.path());
        let _encoding = score.shared.board.enqueue(Queue::Encode, 0);
        arrive(&mut score, 1);
        cool_down(&mut score);
        arrive(&mut score, 2);
        arrive(&mut score, 3);

        // Scans that another method has scored, and that were encoded again.
        for n in [1, 2] {
            let record = score.shared.records.get(&ScanId([n; 32])).unwrap().unwrap();
            let reported = Some(Reported { revision: 1, key: "old".to_owned() });
            score.shared.records.put(&ScanRecord { reported, ..record }).unwrap();
        }
        let mut smaller = (*score.settings).clone();
        smaller.window.max_scans = NonZeroUsize::MIN;
        score.shared.set_config(smaller);
        score.reload().unwrap();

        assert!(folder.path().join("results/scan-2_anomaly.json").exists());
        let cohort = &score.cohorts[&key()];
        assert_eq!(cohort.window.members(), [ScanId([3; 32])]);
        assert!(cohort.unscored.is_empty());
    }

    #[test]
    fn scans_that_come_while_a_window_cools_down_get_their_results_together() {
        let folder = tempfile::tempdir().unwrap();
        let mut score = stage(folder.path());
        let has_result =
            |n: u8| folder.path().join(format!("results/scan-{n}_anomaly.json")).exists();
        let waiting = |score: &Score| {
            let status = score.shared.board.status();
            (status.n_unscored, status.cohorts["t1w"].n_outdated)
        };
        let encoding = score.shared.board.enqueue(Queue::Encode, 0);
        arrive(&mut score, 1);
        assert!(has_result(1), "at once: the window does not cool down");
        cool_down(&mut score);
        arrive(&mut score, 2);
        arrive(&mut score, 3);
        assert!(![2, 3].map(has_result).contains(&true));
        assert_eq!(waiting(&score), (2, 2));
        drop(encoding);
        assert!(score.score_due().unwrap(), "no more are to come");
        assert!([2, 3].iter().all(|&n| has_result(n)));
        assert_eq!(waiting(&score), (0, 0));
        cool_down(&mut score);
        arrive(&mut score, 4);
        assert!(has_result(4), "at once: none is on its way");
    }
}
