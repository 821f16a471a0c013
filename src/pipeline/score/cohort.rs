//! The window of one cohort with its current scores, and the decisions about it.
//!
//! A cohort does no I/O and gets the time as an argument.

use std::{
    collections::{BTreeSet, HashSet},
    num::NonZeroUsize,
    time::{Duration, Instant},
};

use crate::{
    config::{Config, Scoring, WindowSettings},
    domain::{
        cohort::CohortKey,
        quality::coverage_of_part,
        refresh::{Cooldown, StaleResults, is_stale, waits_for_first},
        scan::{ScanId, ScanRecord},
        window::{Membership, Window, WindowIdentity},
        window_scores::WindowScores,
    },
    numeric::scoring,
    pipeline::{
        board::{CohortStatus, Queued},
        encode::Encoded,
    },
    results::{SHIFTED, result_key, waiting_key},
};

pub(super) struct Cohort {
    /// Current members.
    pub(super) window: Window,
    /// Members at the last scoring.
    pub(super) identity: WindowIdentity,
    /// The same members in the order of the scores.
    pub(super) scored: Vec<ScanId>,
    /// Empty while the window has too few scans.
    pub(super) scores: WindowScores,
    /// Members that are encoded again, because the store lacks their tokens. Meanwhile the window
    /// is not scored, so that results do not change for want of them.
    pub(super) rebuilding: BTreeSet<ScanId>,
    /// Scans that arrived meanwhile. They join once the window is whole again.
    pub(super) held: Vec<Encoded>,
    /// Members that have joined since the last scoring and wait for their first result.
    pub(super) unscored: Vec<Unscored>,
    pub(super) cooldown: Cooldown,
    /// Members with stale results.
    pub(super) stale: StaleResults,
    pub(super) last_scored_secs: Option<u64>,
    /// Number of members that show a part of a head.
    n_parts_of_heads: usize,
}

/// A member that has not been scored yet.
pub(super) struct Unscored {
    pub(super) id: ScanId,
    /// Time that its distances to the others took.
    pub(super) took: Duration,
    pub(super) queued: Queued,
}

/// A member whose first result is to be written.
pub(super) struct FirstResult {
    pub(super) id: ScanId,
    /// Guard of a member that has just joined. `None` for others.
    _queued: Option<Queued>,
}

impl Cohort {
    pub(super) fn new(key: &CohortKey, capacity: NonZeroUsize, now: Instant) -> Self {
        let window = Window::new(key.clone(), capacity);
        let identity = window.identity();
        Self {
            window,
            identity,
            scored: Vec::new(),
            scores: WindowScores::default(),
            rebuilding: BTreeSet::new(),
            held: Vec::new(),
            unscored: Vec::new(),
            cooldown: Cooldown::over(now),
            stale: StaleResults::default(),
            last_scored_secs: None,
            n_parts_of_heads: 0,
        }
    }

    /// Admits a scan as the newest member. Returns the members that left.
    pub(super) fn admit(&mut self, scan: ScanId, membership: Membership) -> Vec<ScanId> {
        let gone = self.window.admit(scan, membership);
        self.stale.remove(&gone);
        gone
    }

    /// Removes a member that is lost.
    pub(super) fn lose(&mut self, scan: ScanId) {
        self.window.remove(&[scan]);
        self.stale.remove(&[scan]);
        self.rebuilding.remove(&scan);
        self.unscored.retain(|unscored| unscored.id != scan);
    }

    /// Whether members are encoded again.
    pub(super) fn is_rebuilding(&self) -> bool {
        !self.rebuilding.is_empty()
    }

    /// Changes how many scans the window can hold. Returns the members that left.
    pub(super) fn set_capacity(&mut self, capacity: NonZeroUsize) -> Vec<ScanId> {
        let gone = self.window.set_capacity(capacity);
        self.stale.remove(&gone);
        gone
    }

    pub(super) fn is_scored(&self) -> bool {
        !self.scores.scans.is_empty()
    }

    /// Whether the window must be scored for new members. If more scans are coming, it cools down
    /// first.
    pub(super) fn is_due(&self, now: Instant, more_come: bool) -> bool {
        !self.unscored.is_empty()
            && !self.is_rebuilding()
            && (!more_come || self.cooldown.is_over(now))
    }

    /// Longest wait of the new members. `None` if there are none.
    pub(super) fn due_in(&self, now: Instant) -> Option<Duration> {
        let waits = !self.unscored.is_empty() && !self.is_rebuilding();
        waits.then(|| self.cooldown.remaining(now))
    }

    /// Whether the window must be scored before this member leaves it, so that the member has a
    /// result. `was_scored` says whether it ever had one.
    pub(super) fn must_score_before(&self, leaving: ScanId, was_scored: bool) -> bool {
        // After a start, no window has been scored yet, and one that was not full may be full now.
        let has_scores = self.is_scored() && self.scored.contains(&leaving) && self.can_make_maps();
        self.is_unscored(leaving) || (!has_scores && !was_scored)
    }

    /// Whether the maps of the last scoring can still be made. The map of a scan needs the
    /// intensities of the other scans of its person, which are gone once such a scan has left.
    pub(super) fn can_make_maps(&self) -> bool {
        let is_there = |id: &ScanId| self.window.members().contains(id);
        !self.is_rebuilding()
            && (self.scores.evidence.is_none() || self.scored.iter().all(is_there))
    }

    /// Whether a member waits for the next scoring.
    pub(super) fn is_unscored(&self, member: ScanId) -> bool {
        self.unscored.iter().any(|unscored| unscored.id == member)
    }

    /// Updates the memberships from the records and the settings.
    pub(super) fn renew_memberships(&mut self, records: &[ScanRecord], settings: &Config) {
        let replaced: HashSet<ScanId> =
            records.iter().flat_map(|record| &record.replaces).copied().collect();
        for record in records {
            let mut membership = settings.membership(record);
            // A later scan of the same series has more slices.
            membership.is_reference &= !replaced.contains(&record.id);
            self.window.set_membership(record.id, membership);
        }
        let is_part = |record: &&ScanRecord| coverage_of_part(record).is_some();
        self.n_parts_of_heads = records.iter().filter(is_part).count();
    }

    /// Updates the members from the records and finds stale results. Drops the old scores. Returns
    /// whether the window can be scored now.
    pub(super) fn prepare_scoring(&mut self, records: &[ScanRecord], settings: &Config) -> bool {
        self.renew_memberships(records, settings);
        let limits = &settings.window;
        self.identity = self.window.identity_for_scoring(limits.min_scans, limits.max_scans);
        self.scored = records.iter().map(|record| record.id).collect();
        self.scores = WindowScores::default();

        let can_be_scored = self.identity.n_patients() >= limits.min_scans;
        let current = if can_be_scored {
            result_key(&self.identity, settings)
        } else {
            waiting_key(settings)
        };
        let stale = records.iter().filter(|record| is_stale(record, &current));
        self.stale.update(stale.map(|record| record.id).collect());
        can_be_scored
    }

    /// How the members stand to each other in this scoring, in the order of the scores.
    pub(super) fn memberships(&self) -> Vec<(ScanId, Membership)> {
        let few_patients = self.identity.few_patients;
        let membership = |id: &ScanId| {
            let own = self.window.membership(*id).clone();
            (*id, if few_patients { own.of_nobody() } else { own })
        };
        self.scored.iter().map(membership).collect()
    }

    /// How the window is scored now. Where scans of one patient are compared because there are too
    /// few patients, hidden follow-up scans are compared, too.
    pub(super) fn scoring(&self, settings: &Config) -> Scoring {
        let scoring = settings.scoring;
        let ratio = if self.identity.few_patients { 0.0 } else { scoring.follow_up_ratio };
        Scoring { follow_up_ratio: ratio, ..scoring }
    }

    /// What the status page shows.
    pub(super) fn status(&self, limits: &WindowSettings) -> CohortStatus {
        let n_patients = self.identity.n_patients();
        CohortStatus {
            n_scans: self.window.members().len(),
            min_scans: limits.min_scans,
            max_scans: limits.max_scans.get(),
            heterogeneity: scoring::heterogeneity(&self.scores.references()),
            n_unlike: self.n_unlike(),
            n_parts_of_heads: self.n_parts_of_heads,
            n_set_aside: self.identity.set_aside.len(),
            n_same_patient: self.identity.n_references() - n_patients,
            few_patients: self.identity.few_patients,
            n_hidden_follow_ups: self.scores.follow_ups.n_scans(),
            n_rebuilding: self.rebuilding.len(),
            n_outdated: self.stale.len() + self.unscored.len(),
            last_scored_secs: self.last_scored_secs,
        }
    }

    /// The shift of the newest member.
    pub(super) fn newest_shift(&self) -> Option<f64> {
        self.scores.shift(self.scores.scans.len().checked_sub(1)?)
    }

    /// Fraction of the scored members that have an anomaly in common with others.
    pub(super) fn contamination(&self) -> f64 {
        let shared = self.scores.shared.iter().flat_map(|anomaly| &anomaly.members);
        shared.collect::<BTreeSet<_>>().len() as f64 / self.scored.len().max(1) as f64
    }

    /// Number of members whose shift is above the limit.
    fn n_unlike(&self) -> usize {
        let is_unlike = |&index: &usize| self.scores.shift(index).is_some_and(|s| s > SHIFTED);
        (0..self.scores.scans.len()).filter(is_unlike).count()
    }
}

/// The first results to write after a scoring: first for the scans that have just joined, then for
/// other members that still wait.
pub(super) fn first_results(
    joined: Vec<Unscored>,
    records: &[ScanRecord],
    is_scored: bool,
) -> Vec<FirstResult> {
    let has_joined: BTreeSet<ScanId> = joined.iter().map(|unscored| unscored.id).collect();
    let others = records
        .iter()
        .filter(|record| waits_for_first(record, is_scored) && !has_joined.contains(&record.id))
        .map(|record| FirstResult { id: record.id, _queued: None });
    let joined = joined.into_iter();
    joined
        .map(|Unscored { id, queued, .. }| FirstResult { id, _queued: Some(queued) })
        .chain(others)
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        domain::{
            patient::Patient,
            scan::{Reported, ScanState},
        },
        numeric::{geometry::Shape3, mask::ScoreGrid, scoring::ScanScores, token::Foreground},
        pipeline::board::{Board, Queue},
    };

    const MINUTE: Duration = Duration::from_secs(60);

    pub(in crate::pipeline::score) fn key() -> CohortKey {
        CohortKey { name: "t1w".into(), method: "m".into() }
    }

    pub(in crate::pipeline::score) fn no_scores() -> ScanScores {
        let foreground = Foreground { shape: Shape3::cube(1), cells: Vec::new() };
        ScanScores::new(ScoreGrid { foreground, scores: Vec::new() })
    }

    fn scan(n: u8) -> ScanId {
        ScanId([n; 32])
    }

    fn cohort(capacity: usize, now: Instant) -> Cohort {
        Cohort::new(&key(), NonZeroUsize::new(capacity).unwrap(), now)
    }

    fn record(n: u8, result: Option<&str>) -> ScanRecord {
        let reported = result.map(|key| Reported { revision: 1, key: key.into() });
        ScanRecord { state: ScanState::Encoded, reported, ..ScanRecord::new(scan(n), key()) }
    }

    fn reference(patient: &str) -> Membership {
        Membership { is_reference: true, patient: Patient::of_header(patient) }
    }

    fn unscored(board: &Board, n: u8) -> Unscored {
        let queued = board.enqueue(Queue::Score, 0);
        Unscored { id: scan(n), took: Duration::ZERO, queued }
    }

    fn settings(min_scans: usize, max_scans: usize) -> Config {
        let text = format!("window.min_scans = {min_scans}\nwindow.max_scans = {max_scans}");
        Config::parse(&text).unwrap()
    }

    #[test]
    fn a_window_cools_down_only_while_more_scans_come() {
        let (board, now) = (Board::new(), Instant::now());
        let mut cohort = cohort(9, now);
        assert!(!cohort.is_due(now, false) && cohort.due_in(now).is_none(), "nobody waits");

        cohort.unscored.push(unscored(&board, 1));
        assert!(cohort.is_due(now, true), "it was not scored yet");
        cohort.cooldown = Cooldown::after(Duration::from_secs(5), now);
        assert!(!cohort.is_due(now, true));
        assert!(cohort.is_due(now, false), "no more are to come");
        assert_eq!(cohort.due_in(now), Some(Duration::from_secs(20)));
        assert!(cohort.is_due(now + MINUTE, true));
        assert_eq!(cohort.due_in(now + MINUTE), Some(Duration::ZERO));
    }

    #[test]
    fn a_window_is_scored_before_a_member_leaves_without_a_result() {
        let (board, now) = (Board::new(), Instant::now());
        let mut cohort = cohort(9, now);
        assert!(cohort.must_score_before(scan(1), false), "after a start");
        assert!(!cohort.must_score_before(scan(1), true));

        cohort.scored = vec![scan(1)];
        cohort.scores.scans = vec![no_scores()];
        assert!(!cohort.must_score_before(scan(1), false), "it has scores, and no file yet");
        assert!(cohort.must_score_before(scan(2), false), "it joined after the scoring");
        cohort.unscored.push(unscored(&board, 1));
        assert!(cohort.must_score_before(scan(1), true), "it waits for its turn");
    }

    #[test]
    fn a_member_that_leaves_has_no_stale_result_any_more() {
        let mut cohort = cohort(2, Instant::now());
        for n in [1, 2] {
            assert_eq!(cohort.admit(scan(n), reference("")), []);
        }
        cohort.stale.update(vec![scan(1), scan(2)]);
        assert_eq!(cohort.admit(scan(3), reference("")), [scan(1)]);
        assert_eq!(cohort.stale.len(), 1);
        assert_eq!(cohort.set_capacity(NonZeroUsize::MIN), [scan(2)]);
        assert!(cohort.stale.is_empty());
    }

    #[test]
    fn a_window_with_enough_patients_is_scored_and_other_results_are_stale() {
        let settings = settings(2, 9);
        let mut cohort = cohort(9, Instant::now());
        let mut records = vec![record(1, Some(&waiting_key(&settings)))];
        cohort.admit(scan(1), reference(""));
        assert!(!cohort.prepare_scoring(&records, &settings), "too few");
        assert!(cohort.stale.is_empty(), "that it waits has been said");

        records.extend([record(2, None), record(3, Some("old"))]);
        for n in [2, 3] {
            cohort.admit(scan(n), reference(""));
        }
        assert!(cohort.prepare_scoring(&records, &settings));
        assert_eq!(cohort.scored, [1, 2, 3].map(scan));
        assert_eq!(cohort.stale.len(), 3);

        let current = result_key(&cohort.identity, &settings);
        records[2] = record(3, Some(&current));
        assert!(cohort.prepare_scoring(&records, &settings));
        assert_eq!(cohort.stale.len(), 2);
    }

    #[test]
    fn scans_of_too_few_patients_are_compared_with_each_other_when_the_window_is_full() {
        let mut cohort = cohort(3, Instant::now());
        let of_one = |n| {
            let mut record = record(n, None);
            record.source_name = format!("sub-1_run-{n}_T1w.nii.gz");
            record
        };
        let records = [1, 2, 3].map(of_one);
        records.iter().for_each(|record| drop(cohort.admit(record.id, reference(""))));
        assert!(!cohort.prepare_scoring(&records, &settings(2, 4)), "it may still get others");
        assert!(cohort.memberships().iter().all(|(_, own)| own.patient.is_some()));
        assert_eq!(cohort.scoring(&settings(2, 4)), settings(2, 4).scoring);

        assert!(cohort.prepare_scoring(&records, &settings(2, 3)));
        assert!(cohort.identity.few_patients);
        assert_eq!(cohort.scoring(&settings(2, 3)).follow_up_ratio, 0.0);
        assert!(cohort.memberships().iter().all(|(_, own)| own.patient.is_none()));
    }

    #[test]
    fn scans_that_have_just_joined_get_the_first_results() {
        let board = Board::new();
        let records = [record(1, None), record(2, Some("old")), record(3, None)];
        let joined = vec![unscored(&board, 3), unscored(&board, 9)];
        let first = first_results(joined, &records, true);
        let ids: Vec<ScanId> = first.iter().map(|first| first.id).collect();
        assert_eq!(ids, [3, 9, 1].map(scan));
        assert_eq!(board.queue(Queue::Score).0, 2, "they wait until these are written");
        drop(first);
        assert_eq!(board.queue(Queue::Score).0, 0);
    }
}
