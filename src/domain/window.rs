//! The rolling batch of one cohort: who is a member, who goes, what a result was scored against.

use std::{collections::BTreeMap, num::NonZeroUsize};

use sha2::{Digest, Sha256};

use super::{cohort::CohortKey, finding::WindowIdentity, patient::Patient, scan::ScanId};

/// The scans of one cohort that are compared with each other, oldest first.
///
/// Where it is full, the oldest scan goes of those whose patient has a newer one there, so that the
/// others have as many patients as there can be to be compared with; else the oldest of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    cohort: CohortKey,
    capacity: NonZeroUsize,
    members: Vec<ScanId>,
    /// Whose scans they are, where that is known and matters.
    patients: BTreeMap<ScanId, Patient>,
}

impl Window {
    /// An empty window for at most `capacity` scans.
    pub fn new(cohort: CohortKey, capacity: NonZeroUsize) -> Self {
        Self { cohort, capacity, members: Vec::new(), patients: BTreeMap::new() }
    }

    /// The cohort.
    pub fn cohort(&self) -> &CohortKey {
        &self.cohort
    }

    /// Members in order of arrival.
    pub fn members(&self) -> &[ScanId] {
        &self.members
    }

    /// Whose scan a member is, where that is known and matters.
    pub fn patient(&self, member: ScanId) -> Option<&Patient> {
        self.patients.get(&member)
    }

    /// All members but `scan`. The scan itself is left out of its own scores: its own tokens lie
    /// at distance 0 and would make every lesion look common.
    pub fn others(&self, scan: ScanId) -> impl Iterator<Item = ScanId> {
        self.members.iter().copied().filter(move |&member| member != scan)
    }

    /// Takes a scan in as the newest member. Returns the members that had to go.
    /// A scan that is already a member changes nothing: it would be its own perfect match.
    pub fn admit(&mut self, scan: ScanId, patient: Option<Patient>) -> Vec<ScanId> {
        if !self.members.contains(&scan) {
            self.members.push(scan);
            self.patients.extend(patient.map(|patient| (scan, patient)));
        }
        self.set_capacity(self.capacity)
    }

    /// Whether it holds no more scans.
    pub fn is_full(&self) -> bool {
        self.members.len() >= self.capacity.get()
    }

    /// The member that the next new scan, of this patient, will push out, if the window is full.
    pub fn next_to_leave(&self, patient: Option<&Patient>) -> Option<ScanId> {
        let first = || self.members.get(self.first_to_leave(&self.members, patient)).copied();
        self.is_full().then(first).flatten()
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
        self.patients.retain(|member, _| !gone.contains(member));
        gone
    }

    /// Changes what is known of the patients (a reload).
    pub fn set_patients(&mut self, patients: BTreeMap<ScanId, Patient>) {
        self.patients = patients;
    }

    /// Position of the one among `members` that goes first when a scan of this patient joins.
    fn first_to_leave(&self, members: &[ScanId], joining: Option<&Patient>) -> usize {
        let has_newer = |position: &usize| {
            let patient = self.patient(members[*position]);
            let newer = members[position + 1..].iter().map(|&member| self.patient(member));
            patient.is_some() && newer.chain([joining]).any(|other| other == patient)
        };
        (0..members.len()).find(has_newer).unwrap_or(0)
    }

    /// What a result of this window carries, so that it can be told from those of other windows.
    /// The order of arrival makes no difference. Others are not compared with
    /// members that are no reference, nor scans of one patient with each other.
    pub fn identity(&self, is_reference: impl Fn(ScanId) -> bool) -> WindowIdentity {
        let mut members = self.members.clone();
        members.sort();
        let mut hash = Sha256::new();
        for member in &members {
            hash.update(member.0);
        }
        let id = hex::encode(&hash.finalize()[..8]);
        let set_aside = members.iter().copied().filter(|&member| !is_reference(member)).collect();
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

/// The two scans of a pair in the order in which their distances are computed, whichever arrived
/// first: so that scores do not depend on the order of arrival, to the last bit.
pub fn pair_order(a: ScanId, b: ScanId) -> (ScanId, ScanId) {
    if a <= b { (a, b) } else { (b, a) }
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

    #[test]
    fn the_oldest_goes_first() {
        let mut window = window(2);
        assert_eq!(window.admit(scan(9), None), []);
        assert_eq!(window.next_to_leave(None), None);
        assert_eq!(window.admit(scan(1), None), []);
        assert_eq!(window.next_to_leave(None), Some(scan(9)));
        assert_eq!(window.admit(scan(5), None), [scan(9)]);
        assert_eq!(window.members(), [scan(1), scan(5)]);
        assert_eq!(window.leaving(NonZeroUsize::MIN), [scan(1)]);
        assert_eq!(window.set_capacity(NonZeroUsize::MIN), [scan(1)]);
        assert_eq!(window.members(), [scan(5)]);
    }

    #[test]
    fn of_a_patient_with_several_scans_the_older_go_before_others() {
        let patient = Patient::of_header;
        let mut window = window(4);
        for (n, id) in [(1, None), (2, patient("a")), (3, patient("b")), (4, patient("a"))] {
            assert_eq!(window.admit(scan(n), id), []);
        }
        assert_eq!(window.next_to_leave(None), Some(scan(2)));
        // Also for one that is just coming.
        assert_eq!(window.next_to_leave(patient("b").as_ref()), Some(scan(2)));
        assert_eq!(window.admit(scan(5), patient("b")), [scan(2)]);
        assert_eq!(window.next_to_leave(patient("a").as_ref()), Some(scan(3)));
        assert_eq!(window.leaving(NonZeroUsize::new(2).unwrap()), [scan(3), scan(1)]);
        assert_eq!(window.admit(scan(6), patient("c")), [scan(3)]);
        assert_eq!(window.next_to_leave(patient("b").as_ref()), Some(scan(5)));
        assert_eq!(window.admit(scan(7), None), [scan(1)], "all are of others");
        window.set_patients(BTreeMap::new());
        assert_eq!(window.next_to_leave(patient("b").as_ref()), Some(scan(4)));
    }

    #[test]
    fn a_copied_scan_is_one_member() {
        let mut window = window(3);
        for n in [1, 2, 1] {
            window.admit(scan(n), None);
        }
        assert_eq!(window.members(), [scan(1), scan(2)]);
    }

    #[test]
    fn the_identity_does_not_depend_on_the_order_of_arrival() {
        let (mut one, mut other) = (window(3), window(3));
        for n in [1, 2, 3] {
            one.admit(scan(n), Patient::of_header("4711"));
            other.admit(scan(4 - n), Patient::of_header("4711"));
        }
        let but_two = |window: &Window| window.identity(|id| id != scan(2));
        assert_eq!(but_two(&one), but_two(&other));
        assert_eq!(but_two(&one).set_aside, [scan(2)]);
        one.set_capacity(NonZeroUsize::MIN);
        assert_ne!(but_two(&one).id, but_two(&other).id);
    }

    #[test]
    fn a_patient_counts_once_however_many_scans_there_are() {
        let mut window = window(6);
        for n in 1..=6 {
            let patient = match n {
                1 | 4 | 5 => Patient::of_header("a"),
                2 | 6 => Patient::of_header("b"),
                _ => None,
            };
            window.admit(scan(n), patient);
        }
        let all = window.identity(|_| true);
        let groups = [vec![scan(1), scan(4), scan(5)], vec![scan(2), scan(6)]];
        assert_eq!((&all.same_patient[..], all.n_patients()), (&groups[..], 3));
        assert_eq!(all.of_same_patient(scan(4)).collect::<Vec<_>>(), [scan(1), scan(5)]);
        assert_eq!(all.of_same_patient(scan(3)).count(), 0);
        // Of b nobody is left to compare with, of a still one.
        let some = window.identity(|id| ![1, 2, 4, 6].contains(&id.0[0]));
        assert_eq!(some.n_patients(), 2);
        window.set_patients(BTreeMap::new());
        assert_eq!(window.identity(|_| true).n_patients(), 6);
    }

    #[test]
    fn a_scan_is_not_among_its_others() {
        let mut window = window(3);
        for n in [1, 2, 3] {
            window.admit(scan(n), None);
        }
        assert_eq!(window.others(scan(2)).collect::<Vec<_>>(), [scan(1), scan(3)]);
    }
}
