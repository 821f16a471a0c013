//! Finds hidden follow-up scans: scans of one person whose names and headers do not say so.
//!
//! Such scans are each other's closest match, and each hides the lesion of the other. Their tokens
//! lie far nearer to each other than to those of any other person, and this gives them away (ours).
//! Follow-up scans of a known patient are known already (`domain/patient.rs`).
//!
//! Two scans are of one person if their distance is below a stated share of the usual distance of
//! each of them. The usual distance of a scan is the median of its distances to the references of
//! other known patients. It is not the smallest one: of three scans of one person, the third would
//! make the other two look usual. With the median, up to half of the other scans may be of the same
//! person.
//!
//! The two scans must also be well nearer to each other than to the next scan. In a window of
//! several scanners, two people of one scanner lie nearer to each other than usual, too.
//!
//! Guests change nothing for references here, as in the scores: a guest is compared with none of
//! the scans of its person, but it joins no references to one person.

use std::collections::{BTreeMap, BTreeSet};

use super::{scan::ScanId, window::Membership};

/// Fewest distances that a usual distance is taken from: that of the pair and three others.
pub(super) const MIN_OTHERS: usize = 4;

/// Fewest references that must remain for a scan to be compared with. Otherwise the scans of a
/// person are compared with each other after all.
const MIN_LEFT: usize = 3;

/// A pair must be nearer than this share of the distance of either scan to any other that is not
/// near it. In a window of several sites, two people of one site may be nearer than usual, but so
/// are others of that site: measured 0.9 for two people, 0.6 for a made-up follow-up scan.
const MAX_OF_NEXT: f64 = 0.75;

/// How far the tokens of the members of a window are from each other: one number for each pair of
/// members and each direction.
#[derive(Debug, Clone, Default)]
pub struct MemberDistances(BTreeMap<(usize, usize), f64>);

impl MemberDistances {
    /// Sets the distance from the tokens of the member at one position to those of another.
    pub fn set(&mut self, of: usize, other: usize, distance: f64) {
        self.0.insert((of, other), distance);
    }

    /// The mean of both directions. `None` if one was not set.
    fn between(&self, one: usize, other: usize) -> Option<f64> {
        let there = self.0.get(&(one, other))?;
        let back = self.0.get(&(other, one))?;
        Some(0.5 * (there + back))
    }
}

/// The two scans of a window that are nearest to each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NearestPair {
    /// Their distance as a share of the usual distance of each; the larger share.
    pub ratio: f64,
    /// The scans, sorted.
    pub scans: [ScanId; 2],
}

/// The hidden follow-up scans of a window.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FollowUps {
    /// Groups of scans that are taken for scans of one person, sorted, each sorted. A group also
    /// has the scans that are known to be of that person.
    pub groups: Vec<Vec<ScanId>>,
    /// The nearest pair, whether it counts as follow-up or not. `None` if none was looked for, or
    /// if the window has too few scans.
    pub nearest: Option<NearestPair>,
    /// The members of the window.
    members: Vec<ScanId>,
    /// Positions of two members that only their tokens show to be of one person, in both orders.
    pairs: BTreeSet<(usize, usize)>,
}

impl FollowUps {
    /// Whether the members at two positions are taken for scans of one person, although nothing
    /// else says so.
    pub fn has(&self, one: usize, other: usize) -> bool {
        self.pairs.contains(&(one, other))
    }

    /// Position and id of the scans that are taken for follow-ups of the member at a position.
    pub fn of(&self, index: usize) -> impl Iterator<Item = (usize, ScanId)> {
        let pairs = self.pairs.range((index, 0)..=(index, usize::MAX));
        pairs.map(|&(_, other)| (other, self.members[other]))
    }

    /// Number of scans that are in a group.
    pub fn n_scans(&self) -> usize {
        self.groups.iter().flatten().collect::<BTreeSet<_>>().len()
    }
}

/// Finds the hidden follow-up scans among the members of a window. `ratio` is the share of the
/// usual distance below which two scans are of one person.
pub fn find_follow_ups(
    members: &[(ScanId, Membership)],
    distances: &MemberDistances,
    ratio: f64,
) -> FollowUps {
    let search = Search::new(members, distances);
    let candidates = search.candidates();
    let nearest = candidates.iter().map(|candidate| search.named(candidate));
    let nearest = nearest.min_by(|a, b| a.ratio.total_cmp(&b.ratio).then(a.scans.cmp(&b.scans)));

    let near: Vec<[usize; 2]> =
        candidates.iter().filter(|found| found.ratio < ratio).map(|found| found.pair).collect();
    let all_near: BTreeSet<[usize; 2]> = near.iter().copied().collect();
    let stand_apart = |pair: &[usize; 2]| search.stand_apart(*pair, &all_near);
    let links: Vec<[usize; 2]> = near.into_iter().filter(stand_apart).collect();
    if links.is_empty() {
        return FollowUps { nearest, ..FollowUps::default() };
    }

    let persons = search.persons(&links);
    let pairs = search.pairs(&links, &persons);
    FollowUps {
        groups: search.groups(&pairs, &persons),
        nearest,
        members: members.iter().map(|(id, _)| *id).collect(),
        pairs,
    }
}

/// Two members that might be of one person.
struct Candidate {
    /// Positions, ascending.
    pair: [usize; 2],
    /// [`NearestPair::ratio`].
    ratio: f64,
}

struct Search<'a> {
    members: &'a [(ScanId, Membership)],
    distances: &'a MemberDistances,
    /// The usual distance of each member. `None` if it has too few others.
    usual: Vec<Option<f64>>,
}

impl<'a> Search<'a> {
    fn new(members: &'a [(ScanId, Membership)], distances: &'a MemberDistances) -> Self {
        let usual = (0..members.len()).map(|index| usual(members, distances, index)).collect();
        Self { members, distances, usual }
    }

    fn is_reference(&self, index: usize) -> bool {
        self.members[index].1.is_reference
    }

    fn references(&self) -> impl Iterator<Item = usize> {
        (0..self.members.len()).filter(move |&index| self.is_reference(index))
    }

    /// Whether two members are known to be of one patient.
    fn is_known(&self, one: usize, other: usize) -> bool {
        self.members[one].1.is_of_same_patient(&self.members[other].1)
    }

    /// All pairs that would be compared and have usual distances.
    fn candidates(&self) -> Vec<Candidate> {
        let n_members = self.members.len();
        let pairs =
            (0..n_members).flat_map(|one| (one + 1..n_members).map(move |other| [one, other]));
        pairs.filter_map(|pair| Some(Candidate { pair, ratio: self.ratio(pair)? })).collect()
    }

    fn ratio(&self, [one, other]: [usize; 2]) -> Option<f64> {
        let are_guests = !self.is_reference(one) && !self.is_reference(other);
        if are_guests || self.is_known(one, other) {
            return None;
        }
        let distance = self.distances.between(one, other)?;
        let usual = self.usual[one]?.min(self.usual[other]?);
        (usual > 0.0).then(|| distance / usual)
    }

    /// Whether two scans are far nearer to each other than either is to any scan that is not near
    /// it. `near` are all pairs below the ratio.
    fn stand_apart(&self, pair: [usize; 2], near: &BTreeSet<[usize; 2]>) -> bool {
        let Some(distance) = self.distances.between(pair[0], pair[1]) else { return false };
        let is_near = |one: usize, other: usize| near.contains(&[one.min(other), one.max(other)]);
        pair.into_iter().all(|own| {
            let strangers = self.references().filter(|&other| {
                other != own && !is_near(own, other) && !self.is_known(own, other)
            });
            let mut apart = strangers.filter_map(|other| self.distances.between(own, other));
            apart.all(|stranger| distance < MAX_OF_NEXT * stranger)
        })
    }

    fn named(&self, Candidate { pair, ratio }: &Candidate) -> NearestPair {
        let mut scans = pair.map(|index| self.members[index].0);
        scans.sort_unstable();
        NearestPair { ratio: *ratio, scans }
    }

    /// A number for the person of each reference: the position of that person's first reference.
    fn persons(&self, links: &[[usize; 2]]) -> Vec<usize> {
        let known = self.known_persons();
        let mut joined = known.clone();
        for &[one, other] in links {
            if self.is_reference(one) && self.is_reference(other) {
                let (first, second) = (joined[one], joined[other]);
                let (number, old) = (first.min(second), first.max(second));
                joined.iter_mut().filter(|person| **person == old).for_each(|own| *own = number);
            }
        }

        let leaves_enough = |person: usize| {
            self.references().filter(|&index| joined[index] != person).count() >= MIN_LEFT
        };
        let number = |(&joined, &known)| if leaves_enough(joined) { joined } else { known };
        joined.iter().zip(&known).map(number).collect()
    }

    /// The same numbers by the known patients alone.
    fn known_persons(&self) -> Vec<usize> {
        let first = |index: usize| {
            let mut references = self.references();
            let is_theirs = |&other: &usize| other == index || self.is_known(index, other);
            // A guest has the number of its own position, which no reference has.
            if self.is_reference(index) { references.find(is_theirs) } else { None }
        };
        (0..self.members.len()).map(|index| first(index).unwrap_or(index)).collect()
    }

    /// All pairs of one person that are not known to be of one patient.
    fn pairs(&self, links: &[[usize; 2]], persons: &[usize]) -> BTreeSet<(usize, usize)> {
        let links: BTreeSet<[usize; 2]> = links.iter().copied().collect();
        let mut pairs = BTreeSet::new();
        for index in 0..self.members.len() {
            let theirs: Vec<usize> = if self.is_reference(index) {
                let is_theirs = |&other: &usize| persons[other] == persons[index];
                self.references().filter(is_theirs).collect()
            } else {
                self.references_of_guest(index, &links, persons)
            };
            for other in theirs {
                if other != index && !self.is_known(index, other) {
                    pairs.extend([(index, other), (other, index)]);
                }
            }
        }
        pairs
    }

    /// The references of the same person as a guest. None if too few others would remain.
    fn references_of_guest(
        &self,
        guest: usize,
        links: &BTreeSet<[usize; 2]>,
        persons: &[usize],
    ) -> Vec<usize> {
        let is_theirs = |&other: &usize| {
            self.is_known(guest, other) || links.contains(&[guest.min(other), guest.max(other)])
        };
        let own: BTreeSet<usize> =
            self.references().filter(is_theirs).map(|other| persons[other]).collect();
        let (theirs, others): (Vec<usize>, Vec<usize>) =
            self.references().partition(|&other| own.contains(&persons[other]));
        if others.len() < MIN_LEFT { Vec::new() } else { theirs }
    }

    fn groups(&self, pairs: &BTreeSet<(usize, usize)>, persons: &[usize]) -> Vec<Vec<ScanId>> {
        let mut by_person: BTreeMap<usize, BTreeSet<ScanId>> = BTreeMap::new();
        for &(index, other) in pairs {
            // A guest has no number of its own. The same pair in the other order has one.
            if self.is_reference(other) {
                let ids = [index, other].map(|position| self.members[position].0);
                by_person.entry(persons[other]).or_default().extend(ids);
            }
        }
        let mut groups: Vec<Vec<ScanId>> =
            by_person.into_values().map(|scans| scans.into_iter().collect()).collect();
        groups.sort();
        groups
    }
}

/// The median of a member's distances to the references of other known patients. `None` if these
/// are too few.
fn usual(
    members: &[(ScanId, Membership)],
    distances: &MemberDistances,
    index: usize,
) -> Option<f64> {
    let own = &members[index].1;
    let is_compared = |&other: &usize| other != index && own.is_compared_with(&members[other].1);
    let others = (0..members.len()).filter(is_compared);
    let mut all: Vec<f64> = others.filter_map(|other| distances.between(index, other)).collect();
    if all.len() < MIN_OTHERS {
        return None;
    }
    // Of an even number the upper of the two in the middle, so that a full half may be near.
    all.sort_unstable_by(f64::total_cmp);
    Some(all[all.len() / 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::patient::Patient;

    const RATIO: f64 = 0.6;

    fn scan(n: usize) -> ScanId {
        ScanId([n as u8; 32])
    }

    fn reference(n: usize) -> (ScanId, Membership) {
        (scan(n), Membership::REFERENCE)
    }

    fn of(n: usize, patient: &str) -> (ScanId, Membership) {
        (scan(n), Membership { is_reference: true, patient: Patient::of_header(patient) })
    }

    fn guest(n: usize) -> (ScanId, Membership) {
        (scan(n), Membership { is_reference: false, patient: None })
    }

    fn references(n_scans: usize) -> Vec<(ScanId, Membership)> {
        (0..n_scans).map(reference).collect()
    }

    /// Distances between 1.0 and 1.2, and `near` for pairs of which `is_near` says so.
    fn distances(
        members: &[(ScanId, Membership)],
        near: f64,
        is_near: impl Fn(u8, u8) -> bool,
    ) -> MemberDistances {
        let mut distances = MemberDistances::default();
        for (of, (one, _)) in members.iter().enumerate() {
            for (to, (other, _)) in members.iter().enumerate() {
                let (one, other) = (one.0[0], other.0[0]);
                let usual = 1.0 + 0.01 * f64::from((7 * one + 3 * other) % 20);
                distances.set(of, to, if is_near(one, other) { near } else { usual });
            }
        }
        distances
    }

    /// The groups, if those of `same` are near each other.
    fn found(members: &[(ScanId, Membership)], near: f64, same: &[u8]) -> FollowUps {
        let is_near = |one, other| same.contains(&one) && same.contains(&other);
        find_follow_ups(members, &distances(members, near, is_near), RATIO)
    }

    #[test]
    fn a_pair_far_nearer_than_usual_is_of_one_person() {
        let follow_ups = found(&references(8), 0.3, &[2, 5]);
        assert_eq!(follow_ups.groups, [[scan(2), scan(5)]]);
        assert_eq!(follow_ups.of(2).collect::<Vec<_>>(), [(5, scan(5))]);
        assert_eq!(follow_ups.of(5).collect::<Vec<_>>(), [(2, scan(2))]);
        assert_eq!(follow_ups.of(3).count(), 0);
        assert!(follow_ups.has(2, 5) && follow_ups.has(5, 2) && !follow_ups.has(2, 3));
        assert_eq!(follow_ups.n_scans(), 2);
        let nearest = follow_ups.nearest.unwrap();
        assert_eq!(nearest.scans, [scan(2), scan(5)]);
        assert!((0.25..0.3).contains(&nearest.ratio), "{}", nearest.ratio);
    }

    #[test]
    fn several_scans_of_one_person_do_not_make_each_other_look_usual() {
        for same in [&[1_u8, 3, 6][..], &[0, 2, 4, 7]] {
            let all: Vec<ScanId> = same.iter().map(|&n| scan(usize::from(n))).collect();
            assert_eq!(found(&references(8), 0.3, same).groups, [all]);
        }
    }

    #[test]
    fn a_best_match_that_is_hardly_nearer_is_no_follow_up_but_is_named() {
        let follow_ups = found(&references(8), 0.8, &[2, 5]);
        assert!(follow_ups.groups.is_empty() && !follow_ups.has(2, 5));
        assert_eq!(follow_ups.nearest.unwrap().scans, [scan(2), scan(5)]);
    }

    #[test]
    fn two_people_of_a_rare_scanner_are_no_follow_ups() {
        // Scans 0 to 2 come from one scanner, the others from others.
        let members = references(9);
        let mut distances = distances(&members, 0.0, |_, _| false);
        for (one, other, distance) in [(0, 1, 0.58), (0, 2, 0.7), (1, 2, 0.7)] {
            distances.set(one, other, distance);
            distances.set(other, one, distance);
        }
        assert!(find_follow_ups(&members, &distances, RATIO).groups.is_empty());
        // A follow-up scan on that scanner is nearer than the next person there.
        distances.set(0, 1, 0.4);
        distances.set(1, 0, 0.4);
        let follow_ups = find_follow_ups(&members, &distances, RATIO);
        assert_eq!(follow_ups.groups, [[scan(0), scan(1)]]);
    }

    #[test]
    fn a_pair_must_be_near_for_both() {
        // Scan 1 is far from everyone but 0, which has other scans as near.
        let members = references(8);
        let mut distances = distances(&members, 0.0, |_, _| false);
        for other in 2..8 {
            distances.set(1, other, 3.0);
            distances.set(other, 1, 3.0);
        }
        let follow_ups = find_follow_ups(&members, &distances, RATIO);
        assert!(follow_ups.groups.is_empty());
    }

    #[test]
    fn fewer_than_three_others_give_no_follow_up() {
        for n_scans in 0..5 {
            let follow_ups = found(&references(n_scans), 0.1, &[0, 1]);
            assert_eq!(follow_ups, FollowUps::default(), "{n_scans}");
        }
        assert_eq!(found(&references(5), 0.1, &[0, 1]).groups.len(), 1);
    }

    #[test]
    fn three_scans_remain_to_be_compared_with() {
        // Pairs that form a chain through nearly the whole window.
        let members = references(6);
        let distances = distances(&members, 0.1, |one, other| one.abs_diff(other) == 1);
        let follow_ups = find_follow_ups(&members, &distances, RATIO);
        assert!(follow_ups.groups.is_empty() && follow_ups.nearest.is_some());
    }

    #[test]
    fn scans_of_known_patients_are_no_news_and_belong_to_the_group() {
        let members: Vec<_> =
            (0..9).map(|n| if n < 2 { of(n, "a") } else { reference(n) }).collect();
        let known = found(&members, 0.3, &[0, 1]);
        assert!(known.groups.is_empty());
        assert_ne!(known.nearest.unwrap().scans, [scan(0), scan(1)]);

        // The third is near to one of them only.
        let distances =
            distances(&members, 0.3, |one, other| [one.min(other), one.max(other)] == [1, 5]);
        let follow_ups = find_follow_ups(&members, &distances, RATIO);
        assert_eq!(follow_ups.groups, [[scan(0), scan(1), scan(5)]]);
        assert!(follow_ups.has(0, 5) && follow_ups.has(1, 5) && !follow_ups.has(0, 1));
    }

    #[test]
    fn different_names_do_not_make_one_person_two() {
        let mut members = references(8);
        members[2] = of(2, "a");
        members[5] = of(5, "b");
        assert_eq!(found(&members, 0.3, &[2, 5]).groups, [[scan(2), scan(5)]]);
    }

    #[test]
    fn a_guest_may_be_a_follow_up_and_changes_nothing_for_the_references() {
        let mut members = references(7);
        members.push(guest(7));
        let follow_ups = found(&members, 0.3, &[2, 7]);
        assert_eq!(follow_ups.groups, [[scan(2), scan(7)]]);
        assert!(follow_ups.has(7, 2));

        // It is near to two references that are not near to each other.
        let is_near =
            |one: u8, other: u8| one != other && one.max(other) == 7 && one.min(other) < 2;
        let follow_ups = find_follow_ups(&members, &distances(&members, 0.3, is_near), RATIO);
        assert!(follow_ups.has(7, 0) && follow_ups.has(7, 1) && !follow_ups.has(0, 1));
        assert_eq!(follow_ups.groups, [[scan(0), scan(7)], [scan(1), scan(7)]]);
        assert_eq!(follow_ups.n_scans(), 3);
    }

    #[test]
    fn two_guests_say_nothing_of_each_other() {
        let mut members = references(6);
        members.extend([guest(6), guest(7)]);
        let follow_ups = found(&members, 0.1, &[6, 7]);
        assert!(follow_ups.groups.is_empty() && !follow_ups.has(6, 7));
    }

    #[test]
    fn the_order_of_the_members_does_not_matter() {
        let members = references(9);
        let reversed: Vec<_> = members.iter().rev().cloned().collect();
        let [one, other] = [&members, &reversed].map(|members| found(members, 0.3, &[1, 4, 8]));
        assert_eq!((one.groups, one.nearest), (other.groups, other.nearest));
    }
}
