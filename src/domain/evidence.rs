//! The evidence of intensities in a window, beside that of the tokens.
//!
//! A token is 11 mm wide and does not see what is small or merely bright. So each scan also keeps
//! its intensities on a grid of 1.6 mm ([`FineVolume`]). They are compared with the range of the
//! other scans and joined with the token scores to one map (docs/quality/evidence.md).

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
    pub(super) is_reference: bool,
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
    /// returns how the values of the maps are distributed. The maps are not kept, because those of a
    /// large window do not fit into memory.
    pub(super) fn of(
        members: Vec<EvidenceMember>,
        tokens: &[ScanScores],
        false_positives: Fraction,
        fines: &dyn FineVolumes,
    ) -> Result<(Self, Vec<MapProfile>), ScanError> {
        let range = range(&members, fines)?;
        let none = Self { members, range, excesses: Vec::new(), volumes_ml: Vec::new() };
        let facts = |index: usize| none.facts(index, &tokens[index], false_positives, fines);
        let facts: Result<Vec<MapFacts>, _> =
            (0..none.members.len()).into_par_iter().map(facts).collect();

        let mut evidence = none;
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
        Ok(fuse(tokens, own, &beyond, weights))
    }
}

/// The range of all references, person by person.
fn range(members: &[EvidenceMember], fines: &dyn FineVolumes) -> Result<WindowRange, ScanError> {
    let is_first = |member: &&EvidenceMember| {
        member.is_reference && member.own_references.first() == Some(&member.id)
    };
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
