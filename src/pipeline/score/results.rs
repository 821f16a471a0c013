//! Writes the results of members: first results at once, stale ones one after another.

use std::{
    fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use tracing::{error, info, warn};

use super::{
    Score,
    cohort::{Cohort, FirstResult},
    volumes::StoredVolumes,
};
use crate::{
    config::Config,
    domain::{
        cohort::CohortKey,
        error::{Disposition, ScanError, panic_text},
        identity::Pseudonyms,
        not_ready::NotReady,
        refresh::{Attempt, waits_for_first},
        scan::{Reported, ScanId, ScanRecord},
    },
    metrics::{OutputKind, Stage, Trigger, Verdict},
    pipeline::{FULL, Shared, board::StageName, lost::read_archived, now_secs, side_by_side},
    report,
    results::{ResultInput, build_results, result_key, sidecar, waiting_key},
};

/// Results are written in parallel for scans of up to this many bytes together, as archived. In
/// memory, a scan and its map take ten times as much, or more if the file is well compressed.
const MAX_AT_ONCE: u64 = 64 << 20;

/// Whether the files were written, or the panic of the attempt.
type Written = thread::Result<Result<(), ScanError>>;

impl Score {
    /// Writes the results of scans that wait for their first. If the service stops or the folder is
    /// unreachable, their results stay stale and are refreshed next. A scan leaves the queue after
    /// its attempt, also without a result.
    pub(super) fn write_first(
        &mut self,
        key: &CohortKey,
        mut due: Vec<FirstResult>,
    ) -> Result<(), ScanError> {
        let ids: Vec<ScanId> = due.iter().map(|first| first.id).collect();
        let Some(cohort) = self.cohorts.get_mut(key) else { return Ok(()) };
        cohort.stale.remove(&ids);

        let (mut later, mut failed) = (Vec::new(), Vec::new());
        let mut left = &ids[..];
        while !left.is_empty() {
            let (now, others) = left.split_at(self.n_at_once(left));
            for (id, attempt) in self.try_first(key, now)? {
                match attempt {
                    Attempt::Written => {}
                    Attempt::FolderAway => later.push(id),
                    Attempt::Failed => failed.push(id),
                }
            }
            due.drain(..now.len());
            left = others;
        }

        let Some(cohort) = self.cohorts.get_mut(key) else { return Ok(()) };
        cohort.stale.put_first(later);
        cohort.stale.put_last(failed);
        Ok(())
    }

    fn try_first(
        &mut self,
        key: &CohortKey,
        ids: &[ScanId],
    ) -> Result<Vec<(ScanId, Attempt)>, ScanError> {
        self.shared.board.heartbeat(StageName::Score);
        if self.shared.stopping() || !self.folder.may_be_tried(Instant::now()) {
            return Ok(ids.iter().map(|&id| (id, Attempt::FolderAway)).collect());
        }
        self.write_side_by_side(key, ids)
    }

    /// How many of these results are written in parallel, starting with the first. Processor cores
    /// and memory limit the number.
    fn n_at_once(&self, ids: &[ScanId]) -> usize {
        let size = |id: &ScanId| fs::metadata(self.shared.archive.scan(*id)).map_or(0, |m| m.len());
        let mut n_bytes = 0;
        let fit = ids.iter().take(n_writers()).take_while(|id| {
            n_bytes += size(id);
            n_bytes <= MAX_AT_ONCE
        });
        fit.count().max(1)
    }

    /// If many scans arrive, the first ones may leave before they have a result. They get it here.
    /// If the folder is unreachable, all scans wait for it.
    pub(super) fn write_before_it_leaves(&mut self, joins: &ScanRecord) -> Result<(), ScanError> {
        let key = &joins.cohort;
        let Some(cohort) = self.cohorts.get(key) else { return Ok(()) };
        let leaving = cohort.window.next_to_leave(&self.settings.membership(joins));
        let Some(leaving) = leaving else { return Ok(()) };

        let was_scored = !self.waits_for_first(leaving, true)?;
        if cohort.must_score_before(leaving, was_scored) {
            self.score(key, Trigger::NewScan)?;
        }
        self.write_if_it_waits(key, leaving)
    }

    /// Writes the first result of a member. Waits while the folder is unreachable.
    pub(super) fn write_if_it_waits(
        &mut self,
        key: &CohortKey,
        id: ScanId,
    ) -> Result<(), ScanError> {
        let is_scored = self.cohorts.get(key).is_some_and(Cohort::is_scored);
        while self.waits_for_first(id, is_scored)? && !self.shared.stopping() {
            self.shared.board.heartbeat(StageName::Score);
            if !self.folder.may_be_tried(Instant::now()) {
                thread::sleep(FULL);
            } else if self.write(key, id)? == Attempt::Failed {
                // Waiting longer would not help.
                break;
            }
        }
        Ok(())
    }

    /// Whether a member still waits for its first result, or for the notice that it waits.
    pub(super) fn waits_for_first(&self, id: ScanId, is_scored: bool) -> Result<bool, ScanError> {
        let record = self.shared.records.get(&id)?;
        Ok(record.is_some_and(|record| waits_for_first(&record, is_scored)))
    }

    /// The cohort whose stale result is refreshed next, if refreshing is allowed now.
    pub(super) fn next_to_refresh(&self, now: Instant) -> Option<&CohortKey> {
        let stale = self
            .cohorts
            .iter()
            .filter(|(_, cohort)| !cohort.stale.is_empty() && cohort.can_make_maps());
        let next = self.turns.next(stale.map(|(key, _)| key), now);
        next.filter(|_| self.folder.may_be_tried(now))
    }

    /// Refreshes one stale result, if there is one.
    pub(super) fn refresh_one(&mut self) -> Result<(), ScanError> {
        if self.shared.stopping() {
            return Ok(());
        }
        let Some(key) = self.next_to_refresh(Instant::now()).cloned() else { return Ok(()) };
        self.turns.took(&key);
        let next = self.cohorts.get_mut(&key).and_then(|cohort| cohort.stale.take_next());
        let Some(id) = next else { return Ok(()) };
        if self.write(&key, id)? == Attempt::Failed {
            self.turns.back_off(Instant::now(), self.settings.intake.rescan);
        }
        self.show(&key)
    }

    /// Writes the result of a member, or the notice that it waits. After a failure it stays stale.
    fn write(&mut self, key: &CohortKey, id: ScanId) -> Result<Attempt, ScanError> {
        let attempts = self.write_side_by_side(key, &[id])?;
        let Some(&(_, attempt)) = attempts.first() else { return Ok(Attempt::Failed) };
        if attempt != Attempt::Written
            && let Some(cohort) = self.cohorts.get_mut(key)
        {
            cohort.stale.put_last([id]);
        }
        Ok(attempt)
    }

    /// Does the same for several members in parallel. Members that are gone are left out. The
    /// caller handles failures.
    fn write_side_by_side(
        &mut self,
        key: &CohortKey,
        ids: &[ScanId],
    ) -> Result<Vec<(ScanId, Attempt)>, ScanError> {
        let Some(cohort) = self.cohorts.get(key) else { return Ok(Vec::new()) };
        let mut records = Vec::new();
        for id in ids {
            // A scan that has left its window keeps the result that it has.
            records.extend(self.shared.records.get(id)?.filter(ScanRecord::is_member));
        }
        let pseudonyms = self.shared.pseudonyms(&self.settings);
        let results =
            ResultsOf { shared: &self.shared, settings: &self.settings, cohort, pseudonyms };
        let attempts = write_all(&self.shared, &records, |record| results.write(record));

        // All attempts are noted, also if one of them ends the service.
        let noted: Vec<Result<(ScanId, Attempt), ScanError>> = records
            .into_iter()
            .zip(attempts)
            .map(|(record, (done, took))| Ok((record.id, self.note(key, record, done, took)?)))
            .collect();
        let noted = noted.into_iter().collect::<Result<Vec<_>, _>>()?;

        let attempts: Vec<Attempt> = noted.iter().map(|&(_, attempt)| attempt).collect();
        self.folder.note(&attempts);
        let is_away = self.folder.is_away();
        self.shared.board.set_reason(NotReady::ResultsFailed, is_away);
        Ok(noted)
    }

    /// Notes the outcome of an attempt.
    fn note(
        &mut self,
        key: &CohortKey,
        record: ScanRecord,
        done: Written,
        took: Duration,
    ) -> Result<Attempt, ScanError> {
        let attempt = self.judge(record.id, done)?;
        let Some(cohort) = self.cohorts.get(key) else { return Ok(Attempt::Failed) };
        let is_written = attempt == Attempt::Written;
        for kind in OutputKind::ALL {
            if cohort.is_scored() || *kind == OutputKind::Sidecar {
                self.shared.metrics.output_written(*kind, is_written);
            }
        }
        if is_written {
            let pseudonyms = self.shared.pseudonyms(&self.settings);
            let stem = pseudonyms.stem(&record);
            let written_stem = (stem != record.output_stem).then_some(stem);
            self.note_written(cohort, ScanRecord { written_stem, ..record })?;
            self.shared.metrics.stage_finished(Stage::Write, took);
        }
        Ok(attempt)
    }

    /// Writes into the ledger which result a scan has now.
    fn note_written(&self, cohort: &Cohort, mut record: ScanRecord) -> Result<(), ScanError> {
        let key = if cohort.is_scored() {
            result_key(&cohort.identity, &self.settings)
        } else {
            waiting_key(&self.settings)
        };
        if cohort.is_scored() && !record.was_scored() {
            let waited = now_secs().saturating_sub(record.first_seen_secs);
            self.shared.metrics.end_to_end(Duration::from_secs(waited));
        }
        let revision = record.reported.as_ref().map_or(0, |done| done.revision) + 1;
        record.reported = Some(Reported { revision, key });
        self.shared.records.put(&record)?;
        self.shared.board.update().n_reported += 1;
        Ok(())
    }

    /// How an attempt ended. Returns an error only if the daemon cannot continue.
    fn judge(&mut self, id: ScanId, done: Written) -> Result<Attempt, ScanError> {
        match done {
            Ok(Ok(())) => Ok(Attempt::Written),
            Ok(Err(error)) => self.judge_error(id, error),
            Err(panic) => {
                self.shared.metrics.stage_panicked(Stage::Write);
                let panic = panic_text(panic.as_ref());
                error!(scan = %id, panic, "writing a result crashed; please report it");
                Ok(Attempt::Failed)
            }
        }
    }

    fn judge_error(&mut self, id: ScanId, error: ScanError) -> Result<Attempt, ScanError> {
        let metrics = &self.shared.metrics;
        metrics.stage_failed(Stage::Write, &error);
        match error.disposition() {
            Disposition::Fatal => return Err(error),
            Disposition::Lose => {
                if let Some(record) = self.shared.records.get(&id)? {
                    self.shared.lose(record, &error.to_string())?;
                }
                return Ok(Attempt::Failed);
            }
            Disposition::Retry | Disposition::Quarantine => {}
        }
        metrics.stage_retried(Stage::Write);
        if !matches!(error, ScanError::Internal { .. }) {
            warn!(scan = %id, %error, "no result written; trying again");
            return Ok(Attempt::Failed);
        }
        // Logged once, also if several fail together.
        if self.folder.fails(Instant::now(), self.settings.intake.rescan) {
            warn!(scan = %id, %error, "cannot write to the results folder; trying again");
        }
        Ok(Attempt::FolderAway)
    }
}

/// Largest number of results that are written in parallel.
fn n_writers() -> usize {
    rayon::current_num_threads().div_ceil(4).min(4)
}

/// Writes several results in parallel. Returns the outcome and the time of each.
fn write_all(
    shared: &Shared,
    records: &[ScanRecord],
    write: impl Fn(&ScanRecord) -> Result<(), ScanError> + Sync,
) -> Vec<(Written, Duration)> {
    let attempt = |record: &ScanRecord| {
        let started = Instant::now();
        let done = catch_unwind(AssertUnwindSafe(|| write(record)));
        shared.board.heartbeat(StageName::Score);
        (done, started.elapsed())
    };
    let mut all = Vec::new();
    side_by_side(records, attempt, |_, written| all.push(written));
    all
}

/// The common input of results.
struct ResultsOf<'a> {
    shared: &'a Shared,
    settings: &'a Config,
    cohort: &'a Cohort,
    pseudonyms: Pseudonyms,
}

impl ResultsOf<'_> {
    /// Writes the result of a member, or the notice that it waits.
    fn write(&self, record: &ScanRecord) -> Result<(), ScanError> {
        if self.cohort.is_scored() { self.write_scored(record) } else { self.write_waiting(record) }
    }

    fn write_waiting(&self, record: &ScanRecord) -> Result<(), ScanError> {
        let identity = &self.cohort.identity;
        let (method, settings) = (&self.shared.method, self.settings);
        let waiting = sidecar(record, identity, method, settings, &self.pseudonyms);
        self.put(record, |folder, stem| report::write_sidecar(folder, stem, &waiting))?;
        let (have, need) = (identity.n_patients(), self.settings.window.min_scans);
        info!(scan = %record.id, have, need, "waits for scans of more patients");
        Ok(())
    }

    /// Writes files under the scan's stem. If `results.identity` has changed, those under the old
    /// stem go afterwards, because that stem may name a patient.
    fn put(
        &self,
        record: &ScanRecord,
        write: impl FnOnce(&Path, &str) -> io::Result<()>,
    ) -> Result<(), ScanError> {
        let folder = &self.settings.directories.results;
        let stem = self.pseudonyms.stem(record);
        write(folder, &stem).map_err(writing)?;

        let before = record.written_stem.as_ref().unwrap_or(&record.output_stem);
        if record.reported.is_some() && *before != stem {
            report::remove_results(folder, before, record.id).map_err(writing)?;
        }
        Ok(())
    }

    fn write_scored(&self, record: &ScanRecord) -> Result<(), ScanError> {
        let Self { shared, settings, cohort, pseudonyms } = self;
        let id = record.id;
        let index = cohort.scored.iter().position(|&member| member == id);
        let Some(index) = index else { return Ok(()) };

        let source = read_archived(shared, record)?;
        let (results, finding) = build_results(&ResultInput {
            record,
            source: &source,
            scores: &cohort.scores,
            index,
            window: &cohort.identity,
            method: &shared.method,
            config: settings,
            fines: &StoredVolumes { shared },
            pseudonyms,
            now_secs: now_secs(),
        })?;
        self.put(record, |folder, stem| report::write_results(folder, stem, &results))?;

        if let Some(percentile) = finding.percentile {
            shared.metrics.scan_percentile(record.cohort.label(), percentile);
        }
        let verdict = match finding.tail.and_then(|tail| tail.stands_out) {
            Some(true) => Verdict::StandsOut,
            Some(false) => Verdict::NothingStandsOut,
            None => Verdict::NotJudged,
        };
        shared.metrics.verdict(record.cohort.label(), verdict);
        info!(
            scan = %id,
            verdict = verdict.name(),
            window = cohort.identity.id,
            scans = cohort.scores.scans.len(),
            score = format!("{:.3}", finding.score_top1_mean),
            percentile = finding.percentile.map(|percentile| format!("{percentile:.2}")),
            "result written"
        );
        Ok(())
    }
}

fn writing(source: std::io::Error) -> ScanError {
    ScanError::Internal { doing: "writing results", source }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::{
        domain::{
            error::{DeviceError, QuarantineReason, Refusal},
            refresh::{ResultsFolder, Turns},
            scan::SourceFacts,
            window::Membership,
        },
        nifti,
        numeric::{
            geometry::{Affine, Shape3, WorldPoint},
            volume::RawVolume,
        },
        pipeline::{
            board::Queue,
            score::{
                cohort::tests::{key, no_scores},
                tests::{arrive, stage},
            },
        },
    };

    fn scan(n: u8) -> ScanId {
        ScanId([n; 32])
    }

    fn refused() -> ScanError {
        Refusal::new(QuarantineReason::NoBrain, "nothing", "a brain", "check the export").into()
    }

    /// A scan of 4 mm voxels with a box of 1118 ml in it.
    fn box_of_brain() -> Vec<u8> {
        let shape = Shape3([40, 42, 44]);
        let is_inside = |at: [usize; 3]| at.iter().zip([24, 26, 28]).all(|(&i, n)| i < n);
        let voxel = |o: usize| if is_inside(shape.voxel(o)) { 1.0 + (o % 7) as f32 } else { 0.0 };
        let voxels = (0..shape.n_voxels()).map(voxel).collect();
        let affine = Affine::scaling(4.0, WorldPoint([0.0; 3])).unwrap();
        nifti::encode_volume(&RawVolume { shape, voxels, affine })
    }

    #[test]
    fn an_attempt_is_judged_by_what_failed() {
        let folder = tempfile::tempdir().unwrap();
        let mut score = stage(folder.path());
        let mut judge = |done: Written| score.judge(scan(1), done);
        assert_eq!(judge(Ok(Ok(()))).unwrap(), Attempt::Written);
        assert_eq!(judge(Ok(Err(refused()))).unwrap(), Attempt::Failed);
        assert_eq!(judge(Err(Box::new("a bug"))).unwrap(), Attempt::Failed);
        let broken = DeviceError::Failed { device: "gpu".into(), message: "gone".into() };
        assert!(judge(Ok(Err(broken.into()))).is_err(), "the daemon cannot go on");
        assert!(score.folder.may_be_tried(Instant::now()));

        let away = writing(io::ErrorKind::NotFound.into());
        assert_eq!(score.judge(scan(1), Ok(Err(away))).unwrap(), Attempt::FolderAway);
        assert!(!score.folder.may_be_tried(Instant::now()));
    }

    #[test]
    fn a_crash_while_one_result_is_written_leaves_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let score = stage(folder.path());
        let records = [1, 2, 3].map(|n| ScanRecord::new(scan(n), key()));
        let written = write_all(&score.shared, &records, |record| {
            assert_ne!(record.id, scan(2), "a bug");
            if record.id == scan(3) { Err(refused()) } else { Ok(()) }
        });
        let ends: Vec<_> =
            written.iter().map(|(done, _)| done.as_ref().map(Result::is_ok)).collect();
        assert!(matches!(ends[..], [Ok(true), Err(_), Ok(false)]), "{ends:?}");
    }

    #[test]
    fn a_refresh_that_fails_or_crashes_is_tried_again_after_a_pause() {
        let folder = tempfile::tempdir().unwrap();
        let mut score = stage(folder.path());
        arrive(&mut score, 1);
        let revision = |score: &Score| {
            let record = score.shared.records.get(&scan(1)).unwrap().unwrap();
            record.reported.unwrap().revision
        };
        assert_eq!(revision(&score), 1, "the notice that it waits");

        // A window that seems to be scored, but lacks the scores of this member.
        let cohort = score.cohorts.get_mut(&key()).unwrap();
        cohort.scores.scans = vec![no_scores()];
        cohort.scores.memberships =
            vec![Membership { is_reference: false, ..Membership::REFERENCE }];
        cohort.scored = vec![scan(9), scan(1)];
        let archived = score.shared.archive.scan(scan(1));
        for (source, fault) in [(b"no scan".to_vec(), "no scan"), (box_of_brain(), "a crash")] {
            fs::write(&archived, source).unwrap();
            let scan_sha256 = hex::encode(crate::files::sha256_of(&archived).unwrap());
            let source = Some(SourceFacts { scan_sha256, mask_sha256: None });
            let record = score.shared.records.get(&scan(1)).unwrap().unwrap();
            score.shared.records.put(&ScanRecord { source, ..record }).unwrap();
            let now = Instant::now();
            score.turns = Turns::new(now);
            score.cohorts.get_mut(&key()).unwrap().stale.update(vec![scan(1)]);
            assert_eq!(score.next_to_refresh(now), Some(&key()), "{fault}");

            score.refresh_one().unwrap();
            assert_eq!(score.cohorts[&key()].stale.len(), 1, "{fault}: it stays stale");
            assert_eq!(score.next_to_refresh(now), None, "{fault}: not at once");
            let later = Instant::now() + score.settings.intake.rescan;
            assert_eq!(score.next_to_refresh(later), Some(&key()), "{fault}");
            assert_eq!(revision(&score), 1, "{fault}");
        }
    }

    #[test]
    fn first_results_wait_for_a_folder_that_is_away_and_are_refreshed_first() {
        let folder = tempfile::tempdir().unwrap();
        let mut score = stage(folder.path());
        let results = folder.path().join("results");
        fs::remove_dir(&results).unwrap();
        for n in [1, 2] {
            arrive(&mut score, n);
        }
        assert_eq!(score.shared.board.queue(Queue::Score).0, 0, "their turn is over");
        assert_eq!(score.cohorts[&key()].stale.len(), 2);
        assert_eq!(score.next_to_refresh(Instant::now()), None, "the folder is away");

        fs::create_dir(&results).unwrap();
        score.folder = ResultsFolder::new(Instant::now());
        score.refresh_one().unwrap();
        score.refresh_one().unwrap();
        assert!(score.cohorts[&key()].stale.is_empty());
        assert_eq!(fs::read_dir(&results).unwrap().count(), 2);
    }
}
