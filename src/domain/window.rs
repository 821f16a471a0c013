//! The rolling batch of one cohort: who is a member, who goes, what a result was scored against.

use std::{collections::BTreeMap, num::NonZeroUsize};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{cohort::CohortKey, patient::Patient, scan::ScanId};

/// The scans of one cohort that are compared with each other, oldest first.
///
/// Where it is full, the oldest scan goes of those whose patient has a newer one there that is as
/// good, so that the others have as many patients as there can be to be compared with; else the
/// oldest of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    cohort: CohortKey,
    capacity: NonZeroUsize,
    members: Vec<ScanId>,
    facts: BTreeMap<ScanId, MemberFacts>,
}

/// What a window has to know of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberFacts {
    /// Whose scan it is, where that is known and matters.
    pub patient: Option<Patient>,
    /// Whether it is good enough for others to be compared with it.
    pub is_reference: bool,
}

impl MemberFacts {
    /// Of a good scan whose patient is not known.
    pub const REFERENCE: Self = Self { patient: None, is_reference: true };

    /// Whether this scan, which is older, can go because there is this newer one.
    fn is_stood_in_for_by(&self, newer: &Self) -> bool {
        self.patient.is_some()
            && self.patient == newer.patient
            && (newer.is_reference || !self.is_reference)
    }
}

impl Window {
    /// An empty window for at most `capacity` scans.
    pub fn new(cohort: CohortKey, capacity: NonZeroUsize) -> Self {
        Self { cohort, capacity, members: Vec::new(), facts: BTreeMap::new() }
    }

    /// The cohort.
    pub fn cohort(&self) -> &CohortKey {
        &self.cohort
    }

    /// Members in order of arrival.
    pub fn members(&self) -> &[ScanId] {
        &self.members
    }

    /// What is known of a member.
    pub fn facts(&self, member: ScanId) -> &MemberFacts {
        &self.facts[&member]
    }

    /// Whose scan a member is, where that is known and matters.
    pub fn patient(&self, member: ScanId) -> Option<&Patient> {
        self.facts[&member].patient.as_ref()
    }

    /// Whether others are compared with a member.
    pub fn is_reference(&self, member: ScanId) -> bool {
        self.facts[&member].is_reference
    }

    /// All members but `scan`. The scan itself is left out of its own scores: its own tokens lie
    /// at distance 0 and would make every lesion look common.
    pub fn others(&self, scan: ScanId) -> impl Iterator<Item = ScanId> {
        self.members.iter().copied().filter(move |&member| member != scan)
    }

    /// Takes a scan in as the newest member. Returns the members that had to go.
    /// A scan that is already a member changes nothing: it would be its own perfect match.
    pub fn admit(&mut self, scan: ScanId, facts: MemberFacts) -> Vec<ScanId> {
        if !self.members.contains(&scan) {
            self.members.push(scan);
            self.facts.insert(scan, facts);
        }
        self.set_capacity(self.capacity)
    }

    /// The member that this scan will push out when it joins, if the window is full.
    pub fn next_to_leave(&self, joining: &MemberFacts) -> Option<ScanId> {
        let is_full = self.members.len() >= self.capacity.get();
        let first = || self.members[self.first_to_leave(&self.members, Some(joining))];
        is_full.then(first)
    }

    /// The members that would have to go for there to be no more than `capacity`.
    pub fn leaving(&self, capacity: NonZeroUsize) -> Vec<ScanId> {
        let mut members = self.members.clone();
        let mut gone = Vec::new();
        while members.len() > capacity.get() {
            gone.push(members.remove(self.first_to_leave(&members, None)));
        }
        gone
    }

    /// Changes the capacity (a reload). Returns the members that had to go.
    pub fn set_capacity(&mut self, capacity: NonZeroUsize) -> Vec<ScanId> {
        let gone = self.leaving(capacity);
        self.capacity = capacity;
        self.members.retain(|member| !gone.contains(member));
        self.facts.retain(|member, _| !gone.contains(member));
        gone
    }

    /// Changes what is known of a member (a reload).
    pub fn set_facts(&mut self, member: ScanId, facts: MemberFacts) {
        self.facts.insert(member, facts);
    }

    /// Position of the one among `members` that goes first, when this scan joins.
    fn first_to_leave(&self, members: &[ScanId], joining: Option<&MemberFacts>) -> usize {
        let can_go = |position: &usize| {
            let own = &self.facts[&members[*position]];
            let newer = members[position + 1..].iter().map(|member| &self.facts[member]);
            newer.chain(joining).any(|newer| own.is_stood_in_for_by(newer))
        };
        (0..members.len()).find(can_go).unwrap_or(0)
    }

    /// What a result of this window carries, so that it can be told from those of other windows.
    /// The order of arrival makes no difference. Others are not compared with
    /// members that are no reference, nor scans of one patient with each other.
    pub fn identity(&self) -> WindowIdentity {
        let mut members = self.members.clone();
        members.sort();
        let mut hash = Sha256::new();
        for member in &members {
            hash.update(member.0);
        }
        let id = hex::encode(&hash.finalize()[..8]);
        let is_set_aside = |member: &ScanId| !self.is_reference(*member);
        let set_aside = members.iter().copied().filter(is_set_aside).collect();
        let mut by_patient: BTreeMap<&Patient, Vec<ScanId>> = BTreeMap::new();
        for &member in &members {
            if let Some(patient) = self.patient(member) {
                by_patient.entry(patient).or_default().push(member);
            }
        }
        let mut same_patient: Vec<Vec<ScanId>> =
            by_patient.into_values().filter(|scans| scans.len() > 1).collect();
        same_patient.sort();
        let cohort = self.cohort.clone();
        WindowIdentity { id, cohort, members, set_aside, same_patient, few_patients: false }
    }
}

/// The window that a finding was scored against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowIdentity {
    /// First 16 hex digits of the SHA-256 over the sorted member ids.
    pub id: String,
    /// Cohort that the window belongs to.
    pub cohort: CohortKey,
    /// Members, sorted; the scan itself is one of them.
    pub members: Vec<ScanId>,
    /// Those that the others are not compared with, sorted: not good enough.
    #[serde(default)]
    pub set_aside: Vec<ScanId>,
    /// Those of patients who have several, sorted: they are not compared with each other.
    #[serde(default)]
    pub same_patient: Vec<Vec<ScanId>>,
    /// Whether they are compared all the same, because the window is full and they are of too few
    /// patients: to wait longer would let scans go without a result.
    #[serde(default)]
    pub few_patients: bool,
}

impl WindowIdentity {
    /// Members that others are compared with.
    pub fn n_references(&self) -> usize {
        self.members.len() - self.set_aside.len()
    }

    /// Patients that others can be compared with: what a window needs enough of.
    pub fn n_patients(&self) -> usize {
        let is_reference = |scan: &&ScanId| !self.set_aside.contains(scan);
        let further = |scans: &Vec<ScanId>| scans.iter().filter(is_reference).count().max(1) - 1;
        let n_further: usize = self.same_patient.iter().map(further).sum();
        self.n_references() - n_further
    }

    /// The other scans of a scan's patient.
    pub fn of_same_patient(&self, scan: ScanId) -> impl Iterator<Item = ScanId> {
        let own = self.same_patient.iter().find(|scans| scans.contains(&scan));
        own.into_iter().flatten().copied().filter(move |&other| other != scan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(n: u8) -> ScanId {
        ScanId([n; 32])
    }

    fn window(capacity: usize) -> Window {
        let cohort = CohortKey { name: "t1w".into(), method: "m".into() };
        Window::new(cohort, NonZeroUsize::new(capacity).unwrap())
    }

    fn of(patient: &str) -> MemberFacts {
        MemberFacts { patient: Patient::of_header(patient), is_reference: true }
    }

    const NOBODY: MemberFacts = MemberFacts::REFERENCE;

    #[test]
    fn the_oldest_goes_first() {
        let mut window = window(2);
        assert_eq!(window.admit(scan(9), NOBODY), []);
        assert_eq!(window.next_to_leave(&NOBODY), None);
        assert_eq!(window.admit(scan(1), NOBODY), []);
        assert_eq!(window.next_to_leave(&NOBODY), Some(scan(9)));
        assert_eq!(window.admit(scan(5), NOBODY), [scan(9)]);
        assert_eq!(window.members(), [scan(1), scan(5)]);
        assert_eq!(window.leaving(NonZeroUsize::MIN), [scan(1)]);
        assert_eq!(window.set_capacity(NonZeroUsize::MIN), [scan(1)]);
        assert_eq!(window.members(), [scan(5)]);
    }

    #[test]
    fn of_a_patient_with_several_scans_the_older_go_before_others() {
        let mut window = window(4);
        for (n, facts) in [(1, NOBODY), (2, of("a")), (3, of("b")), (4, of("a"))] {
            assert_eq!(window.admit(scan(n), facts), []);
        }
        assert_eq!(window.next_to_leave(&NOBODY), Some(scan(2)));
        // Also for one that is just coming.
        assert_eq!(window.next_to_leave(&of("b")), Some(scan(2)));
        assert_eq!(window.admit(scan(5), of("b")), [scan(2)]);
        assert_eq!(window.next_to_leave(&of("a")), Some(scan(3)));
        assert_eq!(window.leaving(NonZeroUsize::new(2).unwrap()), [scan(3), scan(1)]);
        assert_eq!(window.admit(scan(6), of("c")), [scan(3)]);
        assert_eq!(window.next_to_leave(&of("b")), Some(scan(5)));
        assert_eq!(window.admit(scan(7), NOBODY), [scan(1)], "all are of others");
        (4..=7).for_each(|n| window.set_facts(scan(n), NOBODY));
        assert_eq!(window.next_to_leave(&of("b")), Some(scan(4)));
    }

    #[test]
    fn a_bad_scan_does_not_push_out_a_good_one_of_its_patient() {
        let bad = |patient| MemberFacts { is_reference: false, ..of(patient) };
        let mut window = window(3);
        for (n, facts) in [(1, NOBODY), (2, of("a")), (3, bad("b"))] {
            window.admit(scan(n), facts);
        }
        assert_eq!(window.next_to_leave(&bad("a")), Some(scan(1)));
        assert_eq!(window.next_to_leave(&of("a")), Some(scan(2)));
        assert_eq!(window.next_to_leave(&bad("b")), Some(scan(3)));
    }

    #[test]
    fn a_copied_scan_is_one_member() {
        let mut window = window(3);
        for n in [1, 2, 1] {
            window.admit(scan(n), NOBODY);
        }
        assert_eq!(window.members(), [scan(1), scan(2)]);
    }

    #[test]
    fn the_identity_does_not_depend_on_the_order_of_arrival() {
        let (mut one, mut other) = (window(3), window(3));
        let facts = |n: u8| MemberFacts { is_reference: n != 2, ..of("4711") };
        for n in [1, 2, 3] {
            one.admit(scan(n), facts(n));
            other.admit(scan(4 - n), facts(4 - n));
        }
        assert_eq!(one.identity(), other.identity());
        assert_eq!(one.identity().set_aside, [scan(2)]);
        one.set_capacity(NonZeroUsize::MIN);
        assert_ne!(one.identity().id, other.identity().id);
    }

    #[test]
    fn a_patient_counts_once_however_many_scans_there_are() {
        let mut window = window(6);
        let facts = |n| match n {
            1 | 4 | 5 => of("a"),
            2 | 6 => of("b"),
            _ => NOBODY,
        };
        (1..=6).for_each(|n| drop(window.admit(scan(n), facts(n))));
        let all = window.identity();
        let groups = [vec![scan(1), scan(4), scan(5)], vec![scan(2), scan(6)]];
        assert_eq!((&all.same_patient[..], all.n_patients()), (&groups[..], 3));
        assert_eq!(all.of_same_patient(scan(4)).collect::<Vec<_>>(), [scan(1), scan(5)]);
        assert_eq!(all.of_same_patient(scan(3)).count(), 0);
        // Of b nobody is left to compare with, of a still one.
        for n in [1, 2, 4, 6] {
            window.set_facts(scan(n), MemberFacts { is_reference: false, ..facts(n) });
        }
        assert_eq!(window.identity().n_patients(), 2);
        (1..=6).for_each(|n| window.set_facts(scan(n), NOBODY));
        assert_eq!(window.identity().n_patients(), 6);
    }

    #[test]
    fn patients_are_counted_once_and_unknown_ones_each() {
        let mut several = window(9);
        assert_eq!(several.identity().n_patients(), 0);
        for (n, facts) in (1..).zip([of("1"), of("2"), of("1"), NOBODY, NOBODY]) {
            several.admit(scan(n), facts);
        }
        assert_eq!(several.identity().n_patients(), 4);
    }

    #[test]
    fn a_scan_is_not_among_its_others() {
        let mut window = window(3);
        for n in [1, 2, 3] {
            window.admit(scan(n), NOBODY);
        }
        assert_eq!(window.others(scan(2)).collect::<Vec<_>>(), [scan(1), scan(3)]);
    }
}
