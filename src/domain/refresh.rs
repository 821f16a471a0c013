//! When results are written again: which are stale, whose turn it is, and how long to wait.
//!
//! All of this is decided from values. The time comes in as an argument, so that tests need not
//! wait.

use std::{
    collections::VecDeque,
    mem,
    time::{Duration, Instant},
};

use super::{
    cohort::CohortKey,
    scan::{Reported, ScanId, ScanRecord},
};

/// A window cools down for so many times as long as its last scoring took. To score a large window
/// for each new scan would take a third of two cores.
const COOLDOWN_FACTOR: u32 = 4;

/// A window never cools down for longer, because somebody waits for the results.
const MAX_COOLDOWN: Duration = Duration::from_secs(30);

/// How an attempt to write a result ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// The files are there.
    Written,
    /// The results folder is full or away.
    FolderAway,
    /// Something is wrong with this scan, or with oddscan.
    Failed,
}

/// Whether the result of a member is older than its window. Results of the window as it is now have
/// the key `current`; while the window cannot be scored, it is that of a notice.
pub fn is_stale(record: &ScanRecord, current: &str) -> bool {
    let Some(done) = &record.reported else { return true };
    // The notice that a scan waits is written once. Another one for each arrival would say nothing
    // new. It does not replace the scores of an earlier window.
    let is_kept = Reported::is_waiting_key(current) && record.was_scored();
    !is_kept && done.key != current
}

/// Whether a member has no result yet. Where the window is not scored, the notice that the scan
/// waits for others counts as a result.
pub fn waits_for_first(record: &ScanRecord, is_scored: bool) -> bool {
    if is_scored { !record.was_scored() } else { record.reported.is_none() }
}

/// The members of one window whose results are stale, the next to be refreshed first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StaleResults {
    queue: VecDeque<ScanId>,
    since_secs: Option<u64>,
}

impl StaleResults {
    /// Updates which results are stale. Those that were stale before keep their places, so that
    /// each is refreshed even while scans keep arriving.
    pub fn update(&mut self, mut stale: Vec<ScanId>) {
        self.queue.retain(|id| stale.contains(id));
        stale.retain(|id| !self.queue.contains(id));
        self.queue.extend(stale);
    }

    /// Removes and returns the member to be refreshed next.
    pub fn take_next(&mut self) -> Option<ScanId> {
        self.queue.pop_front()
    }

    /// Puts these members before all others, in their order.
    pub fn put_first(&mut self, ids: Vec<ScanId>) {
        ids.into_iter().rev().for_each(|id| self.queue.push_front(id));
    }

    /// Puts these members after all others, in their order.
    pub fn put_last(&mut self, ids: impl IntoIterator<Item = ScanId>) {
        self.queue.extend(ids);
    }

    /// Removes these members, wherever they are.
    pub fn remove(&mut self, ids: &[ScanId]) {
        self.queue.retain(|id| !ids.contains(id));
    }

    /// Number of stale results.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether no result is stale.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Notes since when there are any, in seconds since 1970. Call it after each change.
    pub fn observe(&mut self, now_secs: u64) {
        let since = self.since_secs.unwrap_or(now_secs);
        self.since_secs = (!self.is_empty()).then_some(since);
    }

    /// Since when there are any, as [`StaleResults::observe`] noted it, in seconds since 1970.
    pub fn since_secs(&self) -> Option<u64> {
        self.since_secs
    }
}

/// The time until which a window is not scored again while more scans are on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cooldown {
    until: Instant,
}

impl Cooldown {
    /// A window that may be scored at once.
    pub fn over(now: Instant) -> Self {
        Self { until: now }
    }

    /// After a scoring that ended now.
    pub fn after(scoring_took: Duration, now: Instant) -> Self {
        Self { until: now + (COOLDOWN_FACTOR * scoring_took).min(MAX_COOLDOWN) }
    }

    /// Whether the window may be scored again.
    pub fn is_over(&self, now: Instant) -> bool {
        now >= self.until
    }

    /// For how long the window still cools down.
    pub fn remaining(&self, now: Instant) -> Duration {
        self.until.saturating_duration_since(now)
    }
}

/// Whose turn it is: the cohorts refresh one stale result each, round robin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turns {
    last: Option<CohortKey>,
    not_before: Instant,
}

impl Turns {
    /// The first cohort begins, at once.
    pub fn new(now: Instant) -> Self {
        Self { last: None, not_before: now }
    }

    /// The cohort whose turn it is now. `stale` are those with stale results, in order.
    pub fn next<'k>(
        &self,
        mut stale: impl Iterator<Item = &'k CohortKey> + Clone,
        now: Instant,
    ) -> Option<&'k CohortKey> {
        if now < self.not_before {
            return None;
        }
        let comes_after = |key: &&CohortKey| self.last.as_ref().is_none_or(|last| *key > last);
        stale.clone().find(comes_after).or_else(|| stale.next())
    }

    /// A cohort has had its turn.
    pub fn took(&mut self, key: &CohortKey) {
        self.last = Some(key.clone());
    }

    /// After a failed refresh all cohorts wait. Refreshing is not urgent.
    pub fn back_off(&mut self, now: Instant, pause: Duration) {
        self.not_before = now + pause;
    }
}

/// Whether the results folder takes files. It may be full or away, for all results alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResultsFolder {
    is_away: bool,
    not_before: Instant,
}

impl ResultsFolder {
    /// A folder that has not failed.
    pub fn new(now: Instant) -> Self {
        Self { is_away: false, not_before: now }
    }

    /// Whether to try again now.
    pub fn may_be_tried(&self, now: Instant) -> bool {
        now >= self.not_before
    }

    /// A file could not be written. Returns whether this is the first failure since it last worked.
    pub fn fails(&mut self, now: Instant, pause: Duration) -> bool {
        self.not_before = now + pause;
        !mem::replace(&mut self.is_away, true)
    }

    /// Whether the last attempt failed because of the folder.
    pub fn is_away(&self) -> bool {
        self.is_away
    }

    /// Notes how attempts made at the same time ended.
    pub fn note(&mut self, attempts: &[Attempt]) {
        self.is_away &= attempts.is_empty() || attempts.contains(&Attempt::FolderAway);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn scan(n: u8) -> ScanId {
        ScanId([n; 32])
    }

    fn key(name: &str) -> CohortKey {
        CohortKey { name: name.into(), method: "m".into() }
    }

    fn record(result: Option<&str>) -> ScanRecord {
        let reported = result.map(|key| Reported { revision: 1, key: key.into() });
        ScanRecord { reported, ..ScanRecord::new(scan(1), key("t1w")) }
    }

    #[test]
    fn a_result_is_stale_when_its_window_has_another_key() {
        let [none, waiting, old, new] =
            [None, Some(Reported::WAITING), Some("old"), Some("new")].map(record);
        let stale = [&none, &waiting, &old, &new].map(|record| is_stale(record, "new"));
        assert_eq!(stale, [true, true, true, false]);
        let unscored = [&none, &waiting, &old].map(|r| is_stale(r, Reported::WAITING));
        assert_eq!(unscored, [true, false, false], "a notice is written once");
        let other = format!("{}, hash", Reported::WAITING);
        let renamed = [&none, &waiting, &old].map(|record| is_stale(record, &other));
        assert_eq!(renamed, [true, true, false], "a notice names the scan in another form");

        let first = |is_scored| [&none, &waiting, &old].map(|r| waits_for_first(r, is_scored));
        assert_eq!(first(true), [true, true, false]);
        assert_eq!(first(false), [true, false, false]);
    }

    #[test]
    fn who_has_waited_longest_is_refreshed_first() {
        let mut stale = StaleResults::default();
        stale.update(vec![scan(1), scan(2), scan(3)]);
        assert_eq!(stale.take_next(), Some(scan(1)));
        stale.put_last([scan(1)]);
        stale.update(vec![scan(4), scan(1), scan(3), scan(2)]);
        stale.put_first(vec![scan(5), scan(6)]);
        stale.remove(&[scan(3)]);
        let order: Vec<ScanId> = std::iter::from_fn(|| stale.take_next()).collect();
        assert_eq!(order, [5, 6, 2, 1, 4].map(scan));
    }

    #[test]
    fn the_time_since_when_results_are_stale_begins_again_when_all_are_written() {
        let mut stale = StaleResults::default();
        stale.observe(10);
        assert_eq!(stale.since_secs(), None);
        for now_secs in [20, 30] {
            stale.update(vec![scan(1)]);
            stale.observe(now_secs);
            assert_eq!(stale.since_secs(), Some(20));
        }
        stale.remove(&[scan(1)]);
        stale.observe(40);
        assert_eq!(stale.since_secs(), None);
    }

    #[test]
    fn a_window_cools_down_for_longer_after_a_longer_scoring_up_to_a_limit() {
        let now = Instant::now();
        assert!(Cooldown::over(now).is_over(now));
        let short = Cooldown::after(Duration::from_secs(2), now);
        assert_eq!(short.remaining(now), Duration::from_secs(8));
        assert!(!short.is_over(now + Duration::from_secs(7)));
        assert!(short.is_over(now + Duration::from_secs(8)));
        assert_eq!(short.remaining(now + MINUTE), Duration::ZERO);
        assert_eq!(Cooldown::after(MINUTE, now).remaining(now), MAX_COOLDOWN);
    }

    #[test]
    fn cohorts_with_stale_results_take_turns() {
        let now = Instant::now();
        let mut turns = Turns::new(now);
        let [a, b, c] = ["a", "b", "c"].map(key);
        let mut take = |stale: &[&CohortKey]| {
            let next = turns.next(stale.iter().copied(), now).cloned();
            next.inspect(|key| turns.took(key))
        };
        let rounds: Vec<_> = (0..5).map(|_| take(&[&a, &b, &c]).unwrap().name).collect();
        assert_eq!(rounds, ["a", "b", "c", "a", "b"]);
        assert_eq!(take(&[&a, &b]), Some(a.clone()), "c has none any more");
        assert_eq!(take(&[&c]), Some(c.clone()));
        assert_eq!(take(&[&c]), Some(c), "alone, it has every turn");
        assert_eq!(take(&[]), None);
    }

    #[test]
    fn after_a_failed_refresh_all_cohorts_wait() {
        let now = Instant::now();
        let mut turns = Turns::new(now);
        let [a, b] = ["a", "b"].map(key);
        turns.took(&a);
        turns.back_off(now, MINUTE);
        assert_eq!(turns.next([&a, &b].into_iter(), now + MINUTE / 2), None);
        assert_eq!(turns.next([&a, &b].into_iter(), now + MINUTE), Some(&b), "the turn stays");
    }

    #[test]
    fn a_folder_that_is_away_is_news_once_and_again_when_it_is_back() {
        let now = Instant::now();
        let mut folder = ResultsFolder::new(now);
        assert!(folder.may_be_tried(now));
        assert!(folder.fails(now, MINUTE) && folder.is_away());
        assert!(!folder.fails(now, MINUTE), "several fail at once");
        assert!(!folder.may_be_tried(now) && folder.may_be_tried(now + MINUTE));
        folder.note(&[Attempt::FolderAway, Attempt::Written]);
        assert!(folder.is_away());
        folder.note(&[]);
        assert!(folder.is_away(), "nothing was tried");
        assert!(!folder.fails(now, MINUTE));

        folder.note(&[Attempt::Failed, Attempt::Written]);
        assert!(!folder.is_away());
        assert!(folder.fails(now, MINUTE), "away once more");
    }
}
