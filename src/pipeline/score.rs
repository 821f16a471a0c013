//! The last stage: owns the windows, keeps the distances between their members, scores them, and
//! writes the results.
//!
//! A result that is older than its window is a debt. The newest scan's result is written at once;
//! the debt to the others is paid one scan at a time while no new scan waits, so that a stream of
//! scans is not held up. The journal knows which result belongs to which window, so that a restart
//! takes the debt up again.

use std::{
    collections::{BTreeMap, VecDeque},
    num::NonZeroUsize,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{
    IDLE, Shared,
    board::{CohortStatus, StageName},
    now_secs,
    reporting::{ReportInput, build_results, result_key, sidecar},
    steps,
};
use crate::{
    config::Config,
    domain::{
        PairDistances,
        cohort::CohortKey,
        error::ScanError,
        finding::WindowIdentity,
        scan::{Reported, ScanId, ScanRecord},
        window::{Window, pair_order},
    },
    metrics::{EvictionReason, OutputKind, ScoreResult, Stage, Trigger},
    numeric::scoring::ScanScores,
    report,
};

/// The window of a cohort with its current scores.
struct Cohort {
    window: Window,
    identity: WindowIdentity,
    /// In the order of `window.members()`; empty while there are too few.
    scores: Vec<ScanScores>,
    /// Members whose results are older than the window.
    debt: VecDeque<ScanId>,
    last_scored_secs: Option<u64>,
}

pub(super) struct Score {
    shared: Arc<Shared>,
    distances: Box<dyn PairDistances>,
    from_encoder: Receiver<ScanId>,
    members: Vec<ScanRecord>,
    cohorts: BTreeMap<CohortKey, Cohort>,
    settings: Arc<Config>,
}

impl Score {
    pub(super) fn new(
        shared: Arc<Shared>,
        distances: Box<dyn PairDistances>,
        from_encoder: Receiver<ScanId>,
        members: Vec<ScanRecord>,
    ) -> Self {
        let settings = shared.config();
        Self { shared, distances, from_encoder, members, cohorts: BTreeMap::new(), settings }
    }

    pub(super) fn run(mut self) -> Result<(), ScanError> {
        let reach = format!("{:?}", self.settings.scoring.reach);
        self.shared.store.keep_columns_made_by(&reach)?;
        let results = &self.settings.directories.results;
        report::remove_leftovers(results).map_err(writing)?;
        self.take_up()?;
        loop {
            self.shared.board.beat(StageName::Score);
            if self.shared.stopping() {
                // What the encoder still sends is a member in the journal: the next start takes it.
                return Ok(());
            }
            match self.next() {
                Ok(Some(id)) => self.admit(id)?,
                Ok(None) => {
                    self.reload()?;
                    self.pay_one_debt()?;
                }
                Err(()) => return Ok(()),
            }
        }
    }

    /// The next scan from the encoder: without waiting while there is a debt to pay.
    fn next(&self) -> Result<Option<ScanId>, ()> {
        if self.cohorts.values().any(|cohort| !cohort.debt.is_empty()) {
            return match self.from_encoder.try_recv() {
                Ok(id) => Ok(Some(id)),
                Err(TryRecvError::Empty) => Ok(None),
                Err(TryRecvError::Disconnected) => Err(()),
            };
        }
        match self.from_encoder.recv_timeout(IDLE) {
            Ok(id) => Ok(Some(id)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(()),
        }
    }

    /// Rebuilds the windows of an earlier run from the journal.
    fn take_up(&mut self) -> Result<(), ScanError> {
        for record in std::mem::take(&mut self.members) {
            self.enter(&record)?;
        }
        let keys: Vec<CohortKey> = self.cohorts.keys().cloned().collect();
        for key in keys {
            self.rescore(&key, Trigger::Reload)?;
        }
        Ok(())
    }

    /// A scan that was just encoded.
    fn admit(&mut self, id: ScanId) -> Result<(), ScanError> {
        let Some(record) = self.shared.store.record(&id)? else { return Ok(()) };
        if !record.is_member() {
            return Ok(());
        }
        let started = Instant::now();
        self.enter(&record)?;
        self.rescore(&record.cohort, Trigger::NewStudy)?;
        self.shared.metrics.stage_finished(Stage::Score, started.elapsed());
        // The newest first: somebody waits for it.
        if let Some(cohort) = self.cohorts.get_mut(&record.cohort) {
            cohort.debt.retain(|&other| other != id);
        }
        self.write(&record.cohort, id)?;
        let waited = now_secs().saturating_sub(record.first_seen_secs);
        self.shared.metrics.end_to_end(Duration::from_secs(waited));
        self.show(&record.cohort)?;
        self.show_store()
    }

    /// Makes a scan a member and computes its distances to the others.
    fn enter(&mut self, record: &ScanRecord) -> Result<(), ScanError> {
        let capacity = self.settings.window.max_scans;
        let key = &record.cohort;
        let cohort = self.cohorts.entry(key.clone()).or_insert_with(|| new_cohort(key, capacity));
        let gone = cohort.window.admit(record.id);
        let others: Vec<ScanId> = cohort.window.others(record.id).collect();
        self.evict(&gone)?;
        let n_pairs = self.compute_columns(record.id, &others)?;
        self.shared.metrics.pairs_computed(key.label(), n_pairs);
        Ok(())
    }

    /// The columns of one scan against the others that are not kept yet.
    fn compute_columns(&mut self, id: ScanId, others: &[ScanId]) -> Result<u64, ScanError> {
        let store = &self.shared.store;
        let mut n_pairs = 0;
        for layer in 0..self.shared.method.layers.len() {
            let mut own = None;
            for &other in others {
                if store.has_column(id, other, layer)? && store.has_column(other, id, layer)? {
                    continue;
                }
                if own.is_none() {
                    own = store.tokens(&id, layer)?;
                }
                let (Some(own), Some(theirs)) = (&own, store.tokens(&other, layer)?) else {
                    continue;
                };
                let reach = self.settings.scoring.reach;
                // In an order of their own, not of arrival.
                let (first, second) = pair_order(id, other);
                let (a, b) = if first == id { (own, &theirs) } else { (&theirs, own) };
                let columns = self.distances.nearest(a, b, reach)?;
                store.put_columns(first, second, layer, &columns)?;
                n_pairs += u64::from(layer == 0);
                self.shared.board.beat(StageName::Score);
            }
        }
        Ok(n_pairs)
    }

    /// Removes scans that left their window. Their results stay.
    fn evict(&self, gone: &[ScanId]) -> Result<(), ScanError> {
        for id in gone {
            if let Some(record) = self.shared.store.record(id)? {
                self.shared.store.evict(&record)?;
                self.shared.archive.remove(*id)?;
                self.shared.metrics.evicted(EvictionReason::Window);
                info!(scan = %id, "left the window");
            }
        }
        Ok(())
    }

    /// Scores all members of a window anew from the kept columns; what is then outdated is a debt.
    fn rescore(&mut self, key: &CohortKey, trigger: Trigger) -> Result<(), ScanError> {
        let Some(cohort) = self.cohorts.get_mut(key) else { return Ok(()) };
        let (shared, settings) = (&self.shared, &self.settings);
        cohort.identity = cohort.window.identity();
        cohort.scores.clear();
        cohort.debt.clear();
        let members = cohort.window.members();
        let mut records = Vec::new();
        for id in members {
            records.extend(shared.store.record(id)?);
        }
        let wanted = result_key(&cohort.identity, settings);
        let outdated = |r: &&ScanRecord| r.reported.as_ref().is_none_or(|done| done.key != wanted);
        let debt = records.iter().filter(outdated).map(|record| record.id);
        if members.len() < settings.window.min_scans {
            // Waiting is said once; it is not worth a new file for each arrival.
            cohort.debt =
                records.iter().filter(|r| r.reported.is_none()).map(|record| record.id).collect();
            shared.metrics.score_run(key.label(), ScoreResult::SkippedTooFew, trigger, now_secs());
            return Ok(());
        }
        cohort.debt = debt.collect();
        let sizes: Vec<(ScanId, usize)> = records
            .iter()
            .map(|record| (record.id, record.encoded.as_ref().map_or(0, |facts| facts.n_tokens)))
            .collect();
        let column = |of: ScanId, other: ScanId, layer: usize| {
            shared.board.beat(StageName::Score);
            let column = shared.store.column(of, other, layer)?;
            let lost = || crate::store::StoreError::Damaged { what: "distances", scan: of.short() };
            column.ok_or_else(lost)
        };
        let n_layers = shared.method.layers.len();
        cohort.scores = steps::score_members(&sizes, n_layers, &settings.scoring, column)?;
        cohort.last_scored_secs = Some(now_secs());
        shared.metrics.score_run(key.label(), ScoreResult::Ok, trigger, now_secs());
        self.show(key)
    }

    /// Writes one outdated result, if there is one.
    fn pay_one_debt(&mut self) -> Result<(), ScanError> {
        let due = self
            .cohorts
            .iter_mut()
            .find_map(|(key, cohort)| cohort.debt.pop_front().map(|id| (key.clone(), id)));
        if let Some((key, id)) = due {
            self.write(&key, id)?;
            self.show(&key)?;
        }
        Ok(())
    }

    /// Writes the result of a member, or that it waits.
    fn write(&self, key: &CohortKey, id: ScanId) -> Result<(), ScanError> {
        let (Some(cohort), Some(mut record)) =
            (self.cohorts.get(key), self.shared.store.record(&id)?)
        else {
            return Ok(());
        };
        let started = Instant::now();
        let folder = &self.settings.directories.results;
        let written = if cohort.scores.is_empty() {
            let waiting = sidecar(&record, &cohort.identity, &self.shared.method, &self.settings);
            report::write_sidecar(folder, &record.output_stem, &waiting).map_err(writing)
        } else {
            self.write_results(cohort, &record)
        };
        for kind in [OutputKind::ScoreMap, OutputKind::Mask, OutputKind::Picture] {
            if !cohort.scores.is_empty() {
                self.shared.metrics.output_written(kind, written.is_ok());
            }
        }
        self.shared.metrics.output_written(OutputKind::Sidecar, written.is_ok());
        if let Err(error) = written {
            // The debt stays in the journal: the next rescoring or start writes it.
            self.shared.metrics.stage_failed(Stage::Write, &error);
            warn!(scan = %id, %error, cause = ?std::error::Error::source(&error), "no result written");
            return Ok(());
        }
        let revision = record.reported.as_ref().map_or(0, |done| done.revision) + 1;
        let key = match cohort.scores.is_empty() {
            // Never equal to a scored one: the first scoring makes it outdated.
            true => "waiting".to_owned(),
            false => result_key(&cohort.identity, &self.settings),
        };
        record.reported = Some(Reported { revision, key });
        self.shared.store.put_record(&record)?;
        self.shared.board.update().n_reported += 1;
        self.shared.metrics.stage_finished(Stage::Write, started.elapsed());
        Ok(())
    }

    fn write_results(&self, cohort: &Cohort, record: &ScanRecord) -> Result<(), ScanError> {
        let (shared, id) = (&self.shared, record.id);
        let index = cohort.window.members().iter().position(|&member| member == id);
        let (Some(index), Some(tokens)) = (index, shared.store.tokens(&id, 0)?) else {
            return Ok(());
        };
        let mask = shared.archive.mask(id);
        let source =
            steps::read_source(&shared.archive.scan(id), mask.as_deref(), &shared.limits())?;
        let (results, finding) = build_results(&ReportInput {
            record,
            source: &source,
            cells: tokens.cells(),
            scores: &cohort.scores,
            index,
            window: &cohort.identity,
            method: &shared.method,
            config: &self.settings,
        })?;
        let folder = &self.settings.directories.results;
        report::write_results(folder, &record.output_stem, &results).map_err(writing)?;
        shared.metrics.study_percentile(record.cohort.label(), finding.percentile);
        info!(
            scan = %id,
            window = cohort.identity.id,
            scans = cohort.scores.len(),
            score = finding.score_top1_mean,
            percentile = finding.percentile,
            "result written"
        );
        Ok(())
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
            let capacity = self.settings.window.max_scans;
            let gone =
                self.cohorts.get_mut(&key).map(|cohort| cohort.window.set_capacity(capacity));
            self.evict(&gone.unwrap_or_default())?;
            self.rescore(&key, Trigger::Reload)?;
        }
        Ok(())
    }

    fn show(&self, key: &CohortKey) -> Result<(), ScanError> {
        let Some(cohort) = self.cohorts.get(key) else { return Ok(()) };
        let window = &self.settings.window;
        let members = cohort.window.members();
        let oldest = members.first().map(|id| self.shared.store.record(id)).transpose()?.flatten();
        self.shared.metrics.window(
            key.label(),
            members.len(),
            window.min_scans,
            window.max_scans.get(),
            oldest.map(|record| record.first_seen_secs),
        );
        let status = CohortStatus {
            n_scans: members.len(),
            min_scans: window.min_scans,
            max_scans: window.max_scans.get(),
            n_outdated: cohort.debt.len(),
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

fn new_cohort(key: &CohortKey, capacity: NonZeroUsize) -> Cohort {
    let window = Window::new(key.clone(), capacity);
    let identity = window.identity();
    Cohort { window, identity, scores: Vec::new(), debt: VecDeque::new(), last_scored_secs: None }
}

fn writing(source: std::io::Error) -> ScanError {
    ScanError::Io { doing: "writing results", source }
}
