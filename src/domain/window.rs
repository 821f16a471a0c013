//! The window of one cohort: which scans are members and how, which one leaves, and what a result
//! was scored against.

use std::{collections::BTreeMap, num::NonZeroUsize};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{cohort::CohortKey, patient::Patient, scan::ScanId};

/// The scans of one cohort that are compared with each other, oldest first.
///
/// When it is full, a member leaves for a new scan. That is the oldest scan whose patient has a
/// newer one there that is as good. So the others have as many patients as possible to be compared
/// with. If there is no such scan, the oldest of all leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    cohort: CohortKey,
    capacity: NonZeroUsize,
    members: Vec<ScanId>,
    memberships: BTreeMap<ScanId, Membership>,
}

/// The role of a member in its window: whether it is a reference or a guest, and whose scan it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// Whether it is good enough for others to be compared with it. If not, it is a guest.
    pub is_reference: bool,
    /// The patient, if known and if patients matter.
    pub patient: Option<Patient>,
}

impl Membership {
    /// A reference of an unknown patient.
    pub const REFERENCE: Self = Self { is_reference: true, patient: None };

    /// The same without the patient, for where patients do not matter.
    pub fn of_nobody(self) -> Self {
        Self { patient: None, ..self }
    }

    /// Whether two scans are of one patient, as far as that is known.
    pub fn is_of_same_patient(&self, other: &Self) -> bool {
        self.patient.is_some() && self.patient == other.patient
    }

    /// Whether this scan is compared with another one.
    pub fn is_compared_with(&self, other: &Self) -> bool {
        other.is_reference && !self.is_of_same_patient(other)
    }

    /// Whether this older scan can leave because of a newer one.
    fn can_leave_for(&self, newer: &Self) -> bool {
        self.is_of_same_patient(newer) && (newer.is_reference || !self.is_reference)
    }
}

impl Window {
    /// An empty window for at most `capacity` scans.
    pub fn new(cohort: CohortKey, capacity: NonZeroUsize) -> Self {
        Self { cohort, capacity, members: Vec::new(), memberships: BTreeMap::new() }
    }

    /// Members in order of arrival.
    pub fn members(&self) -> &[ScanId] {
        &self.members
    }

    pub(crate) fn membership(&self, member: ScanId) -> &Membership {
        &self.memberships[&member]
    }

    /// All members but `scan`. The scan itself is left out of its own scores: its own tokens are at
    /// distance 0 and would make every lesion look common.
    pub fn others(&self, scan: ScanId) -> impl Iterator<Item = ScanId> {
        self.members.iter().copied().filter(move |&member| member != scan)
    }

    /// Adds a scan as the newest member. Returns the members that left. A scan that is already a
    /// member changes nothing: it would be its own perfect match.
    pub fn admit(&mut self, scan: ScanId, membership: Membership) -> Vec<ScanId> {
        if self.members.contains(&scan) {
            return Vec::new();
        }
        let gone = self.leaving_for(Some(&membership), self.capacity);
        self.remove(&gone);
        self.members.push(scan);
        self.memberships.insert(scan, membership);
        gone
    }

    /// The member that leaves when this scan joins, if the window is full.
    pub fn next_to_leave(&self, joining: &Membership) -> Option<ScanId> {
        self.leaving_for(Some(joining), self.capacity).first().copied()
    }

    /// The members that must leave so that at most `capacity` remain.
    pub fn leaving(&self, capacity: NonZeroUsize) -> Vec<ScanId> {
        self.leaving_for(None, capacity)
    }

    /// Changes the capacity (a reload). Returns the members that left.
    pub fn set_capacity(&mut self, capacity: NonZeroUsize) -> Vec<ScanId> {
        let gone = self.leaving(capacity);
        self.capacity = capacity;
        self.remove(&gone);
        gone
    }

    /// Changes the role of a member (a reload).
    pub fn set_membership(&mut self, member: ScanId, membership: Membership) {
        self.memberships.insert(member, membership);
    }

    /// Removes members that are lost.
    pub fn remove(&mut self, gone: &[ScanId]) {
        self.members.retain(|member| !gone.contains(member));
        self.memberships.retain(|member, _| !gone.contains(member));
    }

    /// The members that leave so that at most `capacity` remain, including one that joins.
    fn leaving_for(&self, joining: Option<&Membership>, capacity: NonZeroUsize) -> Vec<ScanId> {
        let mut stay = self.members.clone();
        let mut gone = Vec::new();
        while stay.len() + usize::from(joining.is_some()) > capacity.get() {
            gone.push(stay.remove(self.first_to_leave(&stay, joining)));
        }
        gone
    }

    /// Position of the one among `members` that leaves first, when this scan joins.
    fn first_to_leave(&self, members: &[ScanId], joining: Option<&Membership>) -> usize {
        let can_leave = |position: &usize| {
            let own = self.membership(members[*position]);
            let newer = members[position + 1..].iter().map(|&member| self.membership(member));
            newer.chain(joining).any(|newer| own.can_leave_for(newer))
        };
        (0..members.len()).find(can_leave).unwrap_or(0)
    }

    /// The identity of the window for a scoring that needs `min_scans` patients.
    ///
    /// A window of `max_scans` or more may have enough references, but of too few patients. If they
    /// were not scored, they would leave without a result. So they are compared all the same, as if
    /// each were of a patient of its own.
    pub fn identity_for_scoring(
        &self,
        min_scans: usize,
        max_scans: NonZeroUsize,
    ) -> WindowIdentity {
        let identity = self.identity();
        let few_patients = self.members.len() >= max_scans.get()
            && identity.n_references() >= min_scans
            && identity.n_patients() < min_scans;
        let same_patient = if few_patients { Vec::new() } else { identity.same_patient };
        WindowIdentity { same_patient, few_patients, ..identity }
    }

    /// What a result states about its window. It distinguishes the window from others and does not
    /// depend on the order of arrival.
    pub fn identity(&self) -> WindowIdentity {
        let mut members = self.members.clone();
        members.sort();

        let mut hash = Sha256::new();
        for member in &members {
            hash.update(member.0);
        }
        let id = hex::encode(&hash.finalize()[..8]);

        let is_guest = |member: &ScanId| !self.membership(*member).is_reference;
        let set_aside = members.iter().copied().filter(is_guest).collect();

        let mut by_patient: BTreeMap<&Patient, Vec<ScanId>> = BTreeMap::new();
        for &member in &members {
            if let Some(patient) = &self.membership(member).patient {
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
    /// Guests, sorted. They are not good enough for others to be compared with them.
    #[serde(default)]
    pub set_aside: Vec<ScanId>,
    /// Groups of scans of one patient, sorted. Scans of a group are not compared with each other.
    #[serde(default)]
    pub same_patient: Vec<Vec<ScanId>>,
    /// Whether they are compared nevertheless, because the window is full and has too few patients.
    /// If it waited longer, scans would leave without a result.
    #[serde(default)]
    pub few_patients: bool,
}

impl WindowIdentity {
    /// Members that others are compared with.
    pub fn n_references(&self) -> usize {
        self.members.len() - self.set_aside.len()
    }

    /// Number of patients that others can be compared with. A window needs enough of them.
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

    fn of(patient: &str) -> Membership {
        Membership { patient: Patient::of_header(patient), is_reference: true }
    }

    const NOBODY: Membership = Membership::REFERENCE;

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
        for (n, membership) in [(1, NOBODY), (2, of("a")), (3, of("b")), (4, of("a"))] {
            assert_eq!(window.admit(scan(n), membership), []);
        }
        assert_eq!(window.next_to_leave(&NOBODY), Some(scan(2)));
        // Also if the newer scan is the one that joins.
        assert_eq!(window.next_to_leave(&of("b")), Some(scan(2)));
        assert_eq!(window.admit(scan(5), of("b")), [scan(2)]);
        assert_eq!(window.next_to_leave(&of("a")), Some(scan(3)));
        assert_eq!(window.leaving(NonZeroUsize::new(2).unwrap()), [scan(3), scan(1)]);
        assert_eq!(window.admit(scan(6), of("c")), [scan(3)]);
        assert_eq!(window.next_to_leave(&of("b")), Some(scan(5)));
        assert_eq!(window.admit(scan(7), NOBODY), [scan(1)], "all are of others");
        (4..=7).for_each(|n| window.set_membership(scan(n), NOBODY));
        assert_eq!(window.next_to_leave(&of("b")), Some(scan(4)));
    }

    #[test]
    fn a_bad_scan_does_not_push_out_a_good_one_of_its_patient() {
        let bad = |patient| Membership { is_reference: false, ..of(patient) };
        let mut window = window(3);
        for (n, membership) in [(1, NOBODY), (2, of("a")), (3, bad("b"))] {
            window.admit(scan(n), membership);
        }
        assert_eq!(window.next_to_leave(&bad("a")), Some(scan(1)));
        assert_eq!(window.next_to_leave(&of("a")), Some(scan(2)));
        assert_eq!(window.next_to_leave(&bad("b")), Some(scan(3)));
    }

    #[test]
    fn a_scan_is_compared_with_references_of_other_patients() {
        let guest = |patient| Membership { is_reference: false, ..of(patient) };
        assert!(of("a").is_compared_with(&of("b")) && NOBODY.is_compared_with(&NOBODY));
        assert!(guest("a").is_compared_with(&of("b")));
        assert!(!of("a").is_compared_with(&guest("b")));
        assert!(!of("a").is_compared_with(&of("a")));
        assert!(of("a").of_nobody().is_compared_with(&of("a")));
    }

    #[test]
    fn a_full_window_of_too_few_patients_is_scored_all_the_same() {
        let mut window = window(3);
        for n in [1, 2, 3] {
            window.admit(scan(n), of("a"));
        }
        let identity = |window: &Window, min_scans, max_scans| {
            window.identity_for_scoring(min_scans, NonZeroUsize::new(max_scans).unwrap())
        };
        assert_eq!(identity(&window, 2, 4), window.identity(), "others may still come");
        assert_eq!(identity(&window, 1, 3), window.identity(), "one patient is enough");
        assert_eq!(identity(&window, 4, 3), window.identity(), "too few scans, too");
        let scored = identity(&window, 2, 3);
        assert!(scored.few_patients && scored.same_patient.is_empty());
        assert_eq!(scored.n_patients(), 3);
        window.set_membership(scan(1), Membership { is_reference: false, ..of("a") });
        assert!(!identity(&window, 3, 3).few_patients, "too few references");
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
        let facts = |n: u8| Membership { is_reference: n != 2, ..of("4711") };
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
            window.set_membership(scan(n), Membership { is_reference: false, ..facts(n) });
        }
        assert_eq!(window.identity().n_patients(), 2);
        (1..=6).for_each(|n| window.set_membership(scan(n), NOBODY));
        assert_eq!(window.identity().n_patients(), 6);
    }

    #[test]
    fn patients_are_counted_once_and_unknown_ones_each() {
        let mut several = window(9);
        assert_eq!(several.identity().n_patients(), 0);
        for (n, membership) in (1..).zip([of("1"), of("2"), of("1"), NOBODY, NOBODY]) {
            several.admit(scan(n), membership);
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
