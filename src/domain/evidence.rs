//! The evidence of intensities in a window, beside that of the tokens.
//!
//! A token is 11 mm wide and does not see what is small or merely bright. So each scan also keeps
//! its intensities on a grid of 1.6 mm ([`FineVolume`]). They are compared with the range of the
//! other scans and joined with the token scores to one map (docs/quality/evidence.md).

use std::collections::BTreeSet;

use rayon::prelude::*;

use super::{error::ScanError, scan::ScanId};
use crate::numeric::{
    fine::FineVolume,
    fusion::{FusedMap, Weights, fuse},
    geometry::Shape3,
    range::{Extremes, RangeBuilder, WindowRange},
    scoring::{Fraction, MapProfile, ScanScores},
    tail,
};

/// Where the fine volumes of the members of a window come from.
pub trait FineVolumes: Sync {
    /// The fine volume of a member.
    fn fine(&self, scan: ScanId) -> Result<FineVolume, ScanError>;
}

/// No fine volumes, for windows whose maps are of tokens alone.
pub struct NoFineVolumes;

impl FineVolumes for NoFineVolumes {
    fn fine(&self, scan: ScanId) -> Result<FineVolume, ScanError> {
        panic!("the map of {scan} is of tokens alone")
    }
}

/// A member of a window as far as its intensities matter.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct EvidenceMember {
    pub(super) id: ScanId,
    pub(super) weights: Weights,
    /// The references of the same person, with the scan itself if it is one, in the order of the
    /// window.
    pub(super) own_references: Vec<ScanId>,
}

/// The range of a window, and what regions the maps of its members have.
#[derive(Debug, Clone)]
pub struct WindowEvidence {
    members: Vec<EvidenceMember>,
    range: WindowRange,
    /// For each member the excess of the regions of its map, the largest first.
    pub excesses: Vec<Vec<f64>>,
    /// For each member the volume of its map above the reference height, ml.
    pub volumes_ml: Vec<f64>,
}

/// What is kept of the map of a member.
struct MapFacts {
    profile: MapProfile,
    excesses: Vec<f64>,
    volume_ml: f64,
}

impl WindowEvidence {
    /// Reads the fine volumes of all members, and makes the map of each from its token scores. Also
    /// returns how the values of the maps are distributed. The maps are not kept, because those of
    /// a large window do not fit into memory.
    pub(super) fn of(
        members: Vec<EvidenceMember>,
        tokens: &[ScanScores],
        false_positives: Fraction,
        fines: &dyn FineVolumes,
    ) -> Result<(Self, Vec<MapProfile>), ScanError> {
        let range = range(&members, fines)?;
        let mut evidence = Self { members, range, excesses: Vec::new(), volumes_ml: Vec::new() };
        let facts = |index: usize| evidence.facts(index, &tokens[index], false_positives, fines);
        let facts: Result<Vec<MapFacts>, _> =
            (0..tokens.len()).into_par_iter().map(facts).collect();

        let mut profiles = Vec::new();
        for MapFacts { profile, excesses, volume_ml } in facts? {
            profiles.push(profile);
            evidence.excesses.push(excesses);
            evidence.volumes_ml.push(volume_ml);
        }
        Ok((evidence, profiles))
    }

    fn facts(
        &self,
        index: usize,
        tokens: &ScanScores,
        false_positives: Fraction,
        fines: &dyn FineVolumes,
    ) -> Result<MapFacts, ScanError> {
        let own = fines.fine(self.members[index].id)?;
        let cell_mm3 = own.cell_mm.powi(3);
        let map = self.map_of(index, tokens, &own, fines)?;
        let profile = MapProfile::new(map.values.clone(), false_positives);
        let height = tail::height(&profile);
        let n_above = map.values.iter().filter(|&&value| value > height).count();
        let excesses = tail::excesses(&map, &profile, cell_mm3);
        Ok(MapFacts { profile, excesses, volume_ml: n_above as f64 * cell_mm3 / 1000.0 })
    }

    /// The map of the member at `index`, from its token scores.
    pub fn map(
        &self,
        index: usize,
        tokens: &ScanScores,
        fines: &dyn FineVolumes,
    ) -> Result<FusedMap, ScanError> {
        self.map_of(index, tokens, &fines.fine(self.members[index].id)?, fines)
    }

    /// Sum of the excesses of the regions of a member's map.
    pub fn total_excess(&self, index: usize) -> f64 {
        // Not `sum`: without regions it gives -0, and results would show the sign.
        self.excesses[index].iter().fold(0.0, |sum, excess| sum + excess)
    }

    /// Number of people among some references.
    pub(super) fn n_people(&self, references: &[usize]) -> usize {
        let first = |&index: &usize| self.members[index].own_references.first();
        references.iter().map(first).collect::<BTreeSet<_>>().len()
    }

    /// Whether brightness counts in the map of a member.
    pub fn is_bright(&self, index: usize) -> bool {
        self.members[index].weights.brightness > 0.0
    }

    fn map_of(
        &self,
        index: usize,
        tokens: &ScanScores,
        own: &FineVolume,
        fines: &dyn FineVolumes,
    ) -> Result<FusedMap, ScanError> {
        let EvidenceMember { id, weights, own_references, .. } = &self.members[index];
        let extremes = if own_references[..] == [*id] {
            Some(Extremes::of(own))
        } else {
            extremes(own_references, fines)?
        };
        let beyond = self.range.beyond(own, extremes.as_ref());
        let few_have = self.range.few_have(own, extremes.as_ref());
        Ok(fuse(tokens, own, &beyond, few_have, weights))
    }
}

/// The range of all references, person by person.
fn range(members: &[EvidenceMember], fines: &dyn FineVolumes) -> Result<WindowRange, ScanError> {
    let is_first = |member: &&EvidenceMember| member.own_references.first() == Some(&member.id);
    let people: Vec<&EvidenceMember> = members.iter().filter(is_first).collect();
    let shape = match members.first() {
        Some(member) => fines.fine(member.id)?.foreground.shape,
        None => Shape3::cube(0),
    };

    let mut builder = RangeBuilder::new(shape, people.len());
    for person in people {
        if let Some(extremes) = extremes(&person.own_references, fines)? {
            builder.add(&extremes);
        }
    }
    Ok(builder.finish())
}

/// The extremes over several scans; `None` without any.
fn extremes(scans: &[ScanId], fines: &dyn FineVolumes) -> Result<Option<Extremes>, ScanError> {
    let mut all: Option<Extremes> = None;
    for &scan in scans {
        let own = Extremes::of(&fines.fine(scan)?);
        all = Some(all.map_or_else(|| own.clone(), |all| all.joined(&own)));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use half::f16;

    use super::*;
    use crate::numeric::{mask::ScoreGrid, token::Foreground};

    /// Scans of one row of cells, by the first byte of their ids.
    struct Rows(BTreeMap<ScanId, Vec<f32>>);

    impl FineVolumes for Rows {
        fn fine(&self, scan: ScanId) -> Result<FineVolume, ScanError> {
            let values = &self.0[&scan];
            Ok(FineVolume {
                foreground: row(values.len()),
                values: values.iter().map(|&value| f16::from_f32(value)).collect(),
                depths: vec![255; values.len()],
                cell_mm: 10.0,
            })
        }
    }

    fn row(n: usize) -> Foreground {
        Foreground { shape: Shape3([n, 1, 1]), cells: (0..n as u32).collect() }
    }

    fn id(n: u8) -> ScanId {
        ScanId([n; 32])
    }

    const WEIGHTS: Weights = Weights { tokens: 0.0, brightness: 0.0, range: 1.0, rim_mm: 0.0 };

    fn member(n: u8, own: &[u8]) -> EvidenceMember {
        let own_references = own.iter().map(|&n| id(n)).collect();
        EvidenceMember { id: id(n), weights: WEIGHTS, own_references }
    }

    /// The map of each member; a scan `n` has `values[n]` in its middle cell, and 0 elsewhere.
    fn maps(members: &[EvidenceMember], values: &[f32]) -> Vec<f32> {
        let rows =
            Rows((0..).map(id).zip(values.iter().map(|&v| vec![0.0, 0.0, v, 0.0, 0.0])).collect());
        let scores = ScoreGrid { foreground: row(5), scores: vec![Some(1.0); 5] };
        let tokens = vec![ScanScores::new(scores); members.len()];
        let top = Fraction::new(0.01).unwrap();
        let (evidence, profiles) =
            WindowEvidence::of(members.to_vec(), &tokens, top, &rows).unwrap();
        assert_eq!(profiles.len(), members.len());
        let map = |index: usize| evidence.map(index, &tokens[index], &rows).unwrap().values[2];
        (0..members.len()).map(map).collect()
    }

    #[test]
    fn a_scan_is_compared_with_the_references_of_other_people() {
        let all: Vec<EvidenceMember> = (0..4).map(|n| member(n, &[n])).collect();
        assert_eq!(maps(&all, &[9.0, 1.0, 2.0, 0.0]), [7.0, 0.0, 0.0, 0.0]);

        // Scans 0 and 1 are of one person, so that neither hides the other.
        let mut pair = all.clone();
        pair[0] = member(0, &[0, 1]);
        pair[1] = member(1, &[0, 1]);
        assert_eq!(maps(&pair, &[9.0, 8.0, 2.0, 0.0]), [7.0, 6.0, 0.0, 0.0]);
        assert_eq!(maps(&all, &[9.0, 8.0, 2.0, 0.0]), [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_guest_changes_nothing_for_the_others() {
        let references: Vec<EvidenceMember> = (0..3).map(|n| member(n, &[n])).collect();
        let with_guest = [&references[..], &[member(3, &[])]].concat();
        let values = [5.0, 1.0, 2.0, 9.0];
        assert_eq!(maps(&references, &values), [3.0, 0.0, 0.0]);
        assert_eq!(maps(&with_guest, &values), [3.0, 0.0, 0.0, 4.0]);
    }
}
