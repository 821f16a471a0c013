//! The scores of all members of a window: the core of the method.
//!
//! Each token is compared with the tokens near its place in the other members (Le-Gia and Ahn 2026,
//! § 3). The caller provides the distances ([`WindowDistances`]), so that the same code scores a
//! window in memory and one whose distances are in the store.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    error::ScanError,
    evidence::{EvidenceMember, FineVolumes, WindowEvidence},
    follow_up::{self, FollowUps, MemberDistances, find_follow_ups},
    scan::ScanId,
    window::Membership,
};
use crate::numeric::{
    community::{self, CommunitySettings},
    fusion::Weights,
    mask::{ScoreGrid, joined_scores},
    scoring::{self, Fraction, MapProfile, NearestDistances, ScanScores, SearchReach},
    tail::UsualRegions,
    token::{Foreground, TokenGrid},
};

/// Which scans have a mask that is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskPolicy {
    /// All with regions above the threshold.
    Always,
    /// Those that stand out, and those whose window is too small to say whether they do.
    StandingOut,
}

/// How a window is scored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    /// How far from its own cell a token looks for matches.
    pub reach: SearchReach,
    /// Share of the other scans that a token's score averages over: the nearest ones.
    pub keep: Fraction,
    /// Share of the other scans' score at the same place that is subtracted from a score, in [0,
    /// 1].
    pub positional_correction: f64,
    /// Share of healthy voxels above the threshold, at most a quarter.
    pub false_positives: Fraction,
    /// Share of the scans whose lesions are assumed to be smaller than `false_positives`.
    pub clean_scans: Fraction,
    /// Smallest region of the mask, mm^3.
    pub min_cluster_mm3: f64,
    /// The same where brightness counts in the map, mm^3.
    pub min_bright_cluster_mm3: f64,
    /// A scan stands out if its largest region is at most this likely in a usual scan.
    pub alarm_probability: f64,
    /// Which scans have a mask.
    pub mask: MaskPolicy,
    /// Two scans whose tokens are nearer to each other than this share of the usual distance are
    /// taken for scans of one person. 0 turns the search off.
    pub follow_up_ratio: f64,
    /// Whether to look for anomalies that several scans share.
    pub filter_shared: bool,
    /// How to look for them.
    pub community: CommunitySettings,
}

impl Scoring {
    /// Smallest region of a mask, mm^3. `is_bright` says whether brightness counts in the map.
    pub fn smallest_cluster_mm3(&self, is_bright: bool) -> f64 {
        if is_bright { self.min_bright_cluster_mm3 } else { self.min_cluster_mm3 }
    }
}

/// Where the distances between the members of a window come from.
pub trait WindowDistances {
    /// The distances from one grid of tokens of a scan to that of another scan.
    fn column(&mut self, of: ScanId, other: ScanId, grid: usize) -> Result<Vec<f32>, ScanError>;

    /// The distances to several other scans, in their order.
    fn columns(
        &mut self,
        of: ScanId,
        others: &[ScanId],
        grid: usize,
    ) -> Result<Vec<Vec<f32>>, ScanError> {
        others.iter().map(|&other| self.column(of, other, grid)).collect()
    }

    /// Like [`WindowDistances::column`], as if the other scan did not have the tokens `excluded`.
    fn column_without(
        &mut self,
        of: ScanId,
        other: ScanId,
        grid: usize,
        excluded: &[usize],
    ) -> Result<Vec<f32>, ScanError>;
}

/// A member of a window with the places of its tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredMember {
    /// Content hash of the scan.
    pub id: ScanId,
    /// The cells of its tokens for each part: one part per view, or one for all views joined.
    pub parts: Vec<Foreground>,
    /// Whether it is a reference or a guest, and its patient.
    pub membership: Membership,
    /// How much each kind of evidence weighs in its map.
    pub weights: Weights,
}

impl ScoredMember {
    fn is_reference(&self) -> bool {
        self.membership.is_reference
    }

    fn is_of_same_patient(&self, other: &Self) -> bool {
        self.membership.is_of_same_patient(&other.membership)
    }
}

/// An anomaly that several scans of a window share. There they are each other's closest matches,
/// which would hide it from the score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedAnomaly {
    /// Encoder block at which it was found, counted from 1.
    pub layer: usize,
    /// The scans, in the order of the window.
    pub members: Vec<ScanId>,
    /// Number of their tokens that no longer count as matches; 0 if they differ as whole scans.
    pub n_excluded: usize,
}

/// The cells of a scan's tokens, for each part of a layer.
pub fn parts_of(grids: &[TokenGrid], n_parts: usize) -> Vec<Foreground> {
    grids[..n_parts].iter().map(|grid| grid.foreground().clone()).collect()
}

/// The highest threshold of a map in which brightness counts, spreads above its median.
pub const MAX_BRIGHT_THRESHOLD: f64 = 1.6;

/// The scores of a window.
#[derive(Debug, Clone, Default)]
pub struct WindowScores {
    /// In the order of the members; empty before the window was scored.
    pub scans: Vec<ScanScores>,
    /// How the values of their maps are distributed, in the same order.
    pub profiles: Vec<MapProfile>,
    /// Which of them are references, and whose scans they are, in the same order.
    pub memberships: Vec<Membership>,
    /// Anomalies that several members share.
    pub shared: Vec<SharedAnomaly>,
    /// Scans that are taken for scans of one person by their tokens alone.
    pub follow_ups: FollowUps,
    /// The evidence of intensities; `None` if all maps are those of tokens alone.
    pub evidence: Option<WindowEvidence>,
}

impl WindowScores {
    /// The scans that others were compared with.
    pub fn references(&self) -> Vec<&ScanScores> {
        let references = self.scans.iter().zip(&self.memberships);
        references.filter(|(_, own)| own.is_reference).map(|(scan, _)| scan).collect()
    }

    /// The scans that member `index` was compared with.
    pub fn others(&self, index: usize) -> Vec<&ScanScores> {
        self.compared_with(index).map(|other| &self.scans[other]).collect()
    }

    /// How far member `index` is from the scans that it was compared with: [`scoring::shift`].
    pub fn shift(&self, index: usize) -> Option<f64> {
        scoring::shift(&self.scans[index], &self.others(index))
    }

    /// Threshold of the map of member `index`: [`scoring::label_free_threshold`]. Brightness needs
    /// no other scan to be compared with. So where it counts, the threshold is at most
    /// [`MAX_BRIGHT_THRESHOLD`], also in a window in which every scan has a lesion.
    pub(crate) fn threshold(&self, index: usize, clean: Fraction) -> f32 {
        let others = self.compared_with(index).map(|other| self.profiles[other]);
        let own = self.profiles[index];
        let profiles: Vec<MapProfile> = [own].into_iter().chain(others).collect();
        let threshold = scoring::label_free_threshold(&profiles, 0, clean);
        if self.is_bright(index) && own.spread > 0.0 {
            threshold.min((own.median + MAX_BRIGHT_THRESHOLD * own.spread) as f32)
        } else {
            threshold
        }
    }

    /// Whether brightness counts in the map of member `index`.
    pub fn is_bright(&self, index: usize) -> bool {
        self.evidence.as_ref().is_some_and(|evidence| evidence.is_bright(index))
    }

    /// Share of the others that member `index` ranks above, by the sum of the excesses of its
    /// regions, or by the mean of its highest token scores if all maps are those of tokens alone:
    /// [`scoring::percentile`].
    pub fn percentile(&self, index: usize) -> f64 {
        let rank = |member: usize| match &self.evidence {
            Some(evidence) => evidence.total_excess(member) as f32,
            None => self.scans[member].top1_mean,
        };
        let others: Vec<f32> = self.compared_with(index).map(rank).collect();
        scoring::percentile(rank(index), &others)
    }

    /// Volume that a usual scan of the window has above the reference height of its map, ml: that
    /// of the scan which a share `clean` of the others stays below.
    pub fn usual_volume_ml(&self, index: usize, clean: Fraction) -> Option<f64> {
        let evidence = self.evidence.as_ref()?;
        let others = self.compared_with(index).map(|other| evidence.volumes_ml[other] as f32);
        let mut others: Vec<f32> = others.collect();
        (!others.is_empty()).then(|| scoring::quantile(&mut others, clean.get()))
    }

    /// What regions member `index` has if nothing in it is unusual. `None` if all maps are those of
    /// tokens alone.
    pub fn usual_regions(&self, index: usize) -> Option<UsualRegions> {
        let evidence = self.evidence.as_ref()?;
        let others: Vec<usize> = self.compared_with(index).collect();
        let excesses =
            others.iter().map(|&other| &evidence.excesses[other][..]).collect::<Vec<_>>();
        Some(UsualRegions::of(&excesses, evidence.n_people(&others), evidence.is_bright(index)))
    }

    /// Positions of the references of other people.
    fn compared_with(&self, index: usize) -> impl Iterator<Item = usize> {
        let own = &self.memberships[index];
        let is_compared = move |&other: &usize| {
            other != index
                && own.is_compared_with(&self.memberships[other])
                && !self.follow_ups.has(index, other)
        };
        (0..self.scans.len()).filter(is_compared)
    }
}

/// The scores of every member of a window, in the order of `members`.
///
/// Each member is compared with the references of other people: those of other patients that are no
/// hidden follow-up scans of it (`domain/follow_up.rs`). A guest (a member that is no
/// reference) changes nothing for the others. Without it the references have the same scores,
/// corrections by place and shared anomalies.
pub fn score_members(
    members: &[ScoredMember],
    layers: &[usize],
    settings: &Scoring,
    distances: &mut dyn WindowDistances,
    fines: &dyn FineVolumes,
) -> Result<WindowScores, ScanError> {
    let n_parts = members.first().map_or(0, |member| member.parts.len());
    let follow_ups = follow_ups(members, settings.follow_up_ratio, distances)?;
    let groups = Groups::of(members, &follow_ups);

    let (tokens, shared) = if settings.filter_shared {
        score_tokens_filtered(&groups, layers, n_parts, settings, distances)?
    } else {
        let scores = score_tokens(&groups, layers, n_parts, settings, distances)?;
        (scores, Vec::new())
    };
    let views = views(&groups, &tokens, n_parts, settings.positional_correction);

    let scans: Vec<ScanScores> = members
        .par_iter()
        .map(|member| ScanScores::new(joined_scores(&views[&member.id])))
        .collect();
    let (evidence, profiles) =
        if groups.references.iter().all(|own| own.weights.are_of_tokens_alone()) {
            let top = settings.false_positives;
            let profile = |scan: &ScanScores| MapProfile::new(scan.cells.clone(), top);
            (None, scans.par_iter().map(profile).collect())
        } else {
            let members = groups.evidence_members();
            let (evidence, profiles) =
                WindowEvidence::of(members, &scans, settings.false_positives, fines)?;
            (Some(evidence), profiles)
        };
    Ok(WindowScores {
        profiles,
        scans,
        evidence,
        memberships: members.iter().map(|member| member.membership.clone()).collect(),
        shared,
        follow_ups,
    })
}

/// The grid of tokens that shows which scans are of one person.
const FOLLOW_UP_GRID: usize = 0;

/// Finds hidden follow-up scans by the medians of the columns of one grid.
fn follow_ups(
    members: &[ScoredMember],
    ratio: f64,
    distances: &mut dyn WindowDistances,
) -> Result<FollowUps, ScanError> {
    let n_references = members.iter().filter(|member| member.is_reference()).count();
    if ratio <= 0.0 || n_references <= follow_up::MIN_OTHERS {
        return Ok(FollowUps::default());
    }

    let mut medians = MemberDistances::default();
    // In the order of their ids, as in `score_tokens`.
    let mut order: Vec<usize> = (0..members.len()).collect();
    order.sort_by_key(|&index| members[index].id);
    for index in order {
        let own = &members[index];
        let matters = |&other: &usize| {
            let theirs = &members[other];
            let is_compared = own.is_reference() || theirs.is_reference();
            other != index && is_compared && !own.is_of_same_patient(theirs)
        };
        let others: Vec<usize> = (0..members.len()).filter(matters).collect();
        let ids: Vec<ScanId> = others.iter().map(|&other| members[other].id).collect();
        let columns = distances.columns(own.id, &ids, FOLLOW_UP_GRID)?;
        let found: Vec<Option<f64>> = columns.into_par_iter().map(median_of_finite).collect();
        for (other, median) in others.into_iter().zip(found) {
            if let Some(median) = median {
                medians.set(index, other, median);
            }
        }
    }

    let roles: Vec<(ScanId, Membership)> =
        members.iter().map(|member| (member.id, member.membership.clone())).collect();
    Ok(find_follow_ups(&roles, &medians, ratio))
}

fn median_of_finite(mut distances: Vec<f32>) -> Option<f64> {
    distances.retain(|distance| distance.is_finite());
    (!distances.is_empty()).then(|| scoring::quantile(&mut distances, 0.5))
}

/// The members of a window, split into references and guests.
struct Groups<'a> {
    all: &'a [ScoredMember],
    /// Where each is in `all`.
    positions: BTreeMap<ScanId, usize>,
    follow_ups: &'a FollowUps,
    references: Vec<&'a ScoredMember>,
    guests: Vec<&'a ScoredMember>,
}

impl<'a> Groups<'a> {
    fn of(all: &'a [ScoredMember], follow_ups: &'a FollowUps) -> Self {
        let (references, guests) = all.iter().partition(|member| member.is_reference());
        let positions = all.iter().enumerate().map(|(index, member)| (member.id, index)).collect();
        Self { all, positions, follow_ups, references, guests }
    }

    /// Whether two scans are of one person, by their patient or by their tokens.
    fn are_of_one_person(&self, one: &ScoredMember, other: &ScoredMember) -> bool {
        let [first, second] = [one, other].map(|member| self.positions[&member.id]);
        one.is_of_same_patient(other) || self.follow_ups.has(first, second)
    }

    /// The members as far as their intensities matter.
    fn evidence_members(&self) -> Vec<EvidenceMember> {
        let own_references = |own: &ScoredMember| {
            let is_theirs =
                |other: &&&ScoredMember| other.id == own.id || self.are_of_one_person(other, own);
            self.references.iter().filter(is_theirs).map(|other| other.id).collect()
        };
        let member = |own: &ScoredMember| EvidenceMember {
            id: own.id,
            weights: own.weights,
            own_references: own_references(own),
        };
        self.all.iter().map(member).collect()
    }

    /// A number for the person of each reference: the position of that person's first reference.
    fn persons(&self) -> Vec<usize> {
        let number = |own: &&ScoredMember| {
            let is_theirs =
                |other: &&ScoredMember| other.id == own.id || self.are_of_one_person(other, own);
            self.references.iter().position(is_theirs).unwrap_or_default()
        };
        self.references.iter().map(number).collect()
    }

    /// The same numbers with that of a guest at the end, which the guest's own references share.
    fn persons_beside(&self, guest: &ScoredMember, persons: &[usize]) -> Vec<usize> {
        let own = self.references.len();
        let number = |(reference, &person): (&&ScoredMember, &usize)| {
            if self.are_of_one_person(reference, guest) { own } else { person }
        };
        self.references.iter().zip(persons).map(number).chain([own]).collect()
    }
}

/// One grid of tokens of each member.
#[derive(Clone, Copy)]
struct TokenSet {
    /// Position among all grids of a scan.
    grid: usize,
    /// Position among the grids of a layer.
    part: usize,
    /// Encoder block, counted from 1.
    layer: usize,
}

/// All token sets, part by part and layer by layer within a part.
fn token_sets(layers: &[usize], n_parts: usize) -> Vec<TokenSet> {
    let mut sets = Vec::new();
    for part in 0..n_parts {
        for (index, &layer) in layers.iter().enumerate() {
            sets.push(TokenSet { grid: index * n_parts + part, part, layer });
        }
    }
    sets
}

/// The scores of each member's tokens, part by part and layer by layer within a part.
#[derive(Default)]
struct TokenScores(BTreeMap<(ScanId, usize), Vec<Vec<Option<f32>>>>);

impl TokenScores {
    /// Scores one grid of tokens of a member; the layers of a part must be added in order.
    fn add(
        &mut self,
        of: &ScoredMember,
        tokens: TokenSet,
        nearest: &NearestDistances,
        keep: Fraction,
    ) {
        let scores = scoring::mutual_scores(nearest, keep);
        self.0.entry((of.id, tokens.part)).or_default().push(scores);
    }

    fn mean_over_layers(&self, of: &ScoredMember, part: usize) -> Vec<Option<f32>> {
        scoring::mean_over_layers(&self.0[&(of.id, part)])
    }
}

/// Scores all tokens, scan by scan, so that the columns of a large window need not be in memory
/// together.
fn score_tokens(
    groups: &Groups<'_>,
    layers: &[usize],
    n_parts: usize,
    settings: &Scoring,
    distances: &mut dyn WindowDistances,
) -> Result<TokenScores, ScanError> {
    let mut scores = TokenScores::default();
    let none = vec![Vec::new(); groups.references.len()];

    // In the order of their ids, because the store holds the columns to one scan in this order.
    // Data read for one column is then still cached for the next.
    let mut members: Vec<&ScoredMember> = groups.all.iter().collect();
    members.sort_by_key(|member| member.id);

    for member in members {
        for tokens in token_sets(layers, n_parts) {
            let nearest = nearest(member, groups, &none, tokens, distances)?;
            scores.add(member, tokens, &nearest, settings.keep);
        }
    }
    Ok(scores)
}

/// Scores all tokens. Tokens that references share do not count as candidates.
fn score_tokens_filtered(
    groups: &Groups<'_>,
    layers: &[usize],
    n_parts: usize,
    settings: &Scoring,
    distances: &mut dyn WindowDistances,
) -> Result<(TokenScores, Vec<SharedAnomaly>), ScanError> {
    let Groups { references, guests, .. } = groups;
    let none = vec![Vec::new(); references.len()];
    let mut scores = TokenScores::default();
    let mut shared = Vec::new();

    for tokens in token_sets(layers, n_parts) {
        let mut window: Vec<NearestDistances> = references
            .iter()
            .map(|member| nearest(member, groups, &none, tokens, distances))
            .collect::<Result<_, _>>()?;
        let found = leave_out_shared(&mut window, references, tokens, settings, distances)?;
        shared.extend(found.anomalies);

        for (member, nearest) in references.iter().zip(&window) {
            scores.add(member, tokens, nearest, settings.keep);
        }
        for guest in guests {
            let nearest = nearest(guest, groups, &found.excluded, tokens, distances)?;
            scores.add(guest, tokens, &nearest, settings.keep);
        }
    }
    Ok((scores, shared))
}

/// Distances of a member to all references but itself, as if these had no `excluded` tokens.
/// Distances to scans of the same person are infinite.
fn nearest(
    member: &ScoredMember,
    groups: &Groups<'_>,
    excluded: &[Vec<usize>],
    tokens: TokenSet,
    distances: &mut dyn WindowDistances,
) -> Result<NearestDistances, ScanError> {
    let n_tokens = member.parts[tokens.part].cells.len();
    let is_own = |other: &ScoredMember| groups.are_of_one_person(other, member);
    let others = groups.references.iter().zip(excluded).filter(|(other, _)| other.id != member.id);
    let compared = others.clone().filter(|(other, _)| !is_own(other));
    let ids: Vec<ScanId> = compared.map(|(other, _)| other.id).collect();
    let mut found = distances.columns(member.id, &ids, tokens.grid)?.into_iter();

    let columns = others.map(|(other, excluded)| {
        if is_own(other) {
            return Ok(vec![f32::INFINITY; n_tokens]);
        }
        let column = found.next().expect("a column per scan that was asked for");
        if excluded.is_empty() {
            return Ok(column);
        }
        distances.column_without(member.id, other.id, tokens.grid, excluded)
    });
    Ok(NearestDistances::new(n_tokens, columns.collect::<Result<_, ScanError>>()?))
}

/// What several references share, and the tokens of each that no longer count as candidates.
struct SharedTokens {
    anomalies: Vec<SharedAnomaly>,
    excluded: Vec<Vec<usize>>,
}

/// Finds anomalies that several members share, and removes their tokens from the candidates.
fn leave_out_shared(
    window: &mut [NearestDistances],
    members: &[&ScoredMember],
    tokens: TokenSet,
    settings: &Scoring,
    distances: &mut dyn WindowDistances,
) -> Result<SharedTokens, ScanError> {
    let found = community::find_communities(window, settings.keep, &settings.community);
    let excluded = found.excluded_tokens(members.len());

    for (scan, other) in community::due_columns(window, &excluded) {
        let (of, from) = (members[scan].id, members[other].id);
        let column = distances.column_without(of, from, tokens.grid, &excluded[other])?;
        // The scan itself has no column.
        window[scan].replace(other - usize::from(other > scan), column);
    }

    let anomalies = found.suspects.into_iter().map(|suspect| SharedAnomaly {
        layer: tokens.layer,
        members: suspect.members.iter().map(|&member| members[member].id).collect(),
        n_excluded: suspect.excluded.iter().map(Vec::len).sum(),
    });
    Ok(SharedTokens { anomalies: anomalies.collect(), excluded })
}

/// The scores of each member on its cells, part by part, averaged over the layers and corrected by
/// place.
fn views(
    groups: &Groups<'_>,
    tokens: &TokenScores,
    n_parts: usize,
    positional_correction: f64,
) -> BTreeMap<ScanId, Vec<ScoreGrid>> {
    let Groups { references, guests, .. } = groups;
    let persons = groups.persons();
    let mut views: BTreeMap<ScanId, Vec<ScoreGrid>> = BTreeMap::new();

    for part in 0..n_parts {
        let grid = |member: &&ScoredMember| ScoreGrid {
            foreground: member.parts[part].clone(),
            scores: tokens.mean_over_layers(member, part),
        };
        let mut grids: Vec<ScoreGrid> = references.iter().map(grid).collect();
        let mut guest_grids: Vec<ScoreGrid> = guests.iter().map(grid).collect();

        if positional_correction > 0.0 {
            for (grid, guest) in guest_grids.iter_mut().zip(guests) {
                let persons = groups.persons_beside(guest, &persons);
                correct_guest(grid, &grids, &persons, positional_correction);
            }
            scoring::correct_positions(&mut grids, &persons, positional_correction);
        }

        for (member, grid) in references.iter().zip(grids).chain(guests.iter().zip(guest_grids)) {
            views.entry(member.id).or_default().push(grid);
        }
    }
    views
}

/// Corrects the scores of a guest by the references' scores at the same places. `persons` are the
/// numbers of their people, that of the guest last.
fn correct_guest(guest: &mut ScoreGrid, references: &[ScoreGrid], persons: &[usize], share: f64) {
    let grids = references.iter().chain([&*guest]);
    let mut grids: Vec<ScoreGrid> = grids.cloned().collect();

    scoring::correct_positions(&mut grids, persons, share);
    *guest = grids.pop().expect("it was put there");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::evidence::NoFineVolumes;
    use crate::{config::Config, domain::patient::Patient, numeric::geometry::Shape3};

    /// Distances that depend on the scan, the token and the other scan.
    struct MadeUp;

    impl WindowDistances for MadeUp {
        fn column(&mut self, of: ScanId, other: ScanId, _: usize) -> Result<Vec<f32>, ScanError> {
            let [a, b] = [of, other].map(|id| f64::from(id.0[0]));
            let distance = |token: usize| 2.0 + (a + 1.7 * b + 0.3 * a * b + token as f64).sin();
            Ok((0..50).map(|token| distance(token) as f32).collect())
        }

        fn column_without(
            &mut self,
            of: ScanId,
            other: ScanId,
            grid: usize,
            _: &[usize],
        ) -> Result<Vec<f32>, ScanError> {
            self.column(of, other, grid)
        }
    }

    #[test]
    fn a_scan_that_is_no_reference_is_compared_with_those_that_are_and_changes_none() {
        let settings = Config::parse("").unwrap().scoring;
        let uncorrected = Scoring { positional_correction: 0.0, ..settings };
        let member = |n: u8, is_reference| ScoredMember {
            id: ScanId([n; 32]),
            parts: vec![Foreground { shape: Shape3([5, 5, 2]), cells: (0..50).collect() }; 3],
            weights: Weights::OF_TOKENS_ALONE,
            membership: Membership { is_reference, patient: None },
        };
        let score_by = |settings: &Scoring, members: &[ScoredMember]| {
            score_members(members, &[9], settings, &mut MadeUp, &NoFineVolumes).unwrap()
        };
        let score = |members: &[ScoredMember]| score_by(&settings, members);
        let references = [1, 3, 4, 5].map(|n| member(n, true));
        let alone = score(&references);
        let [one, rest @ ..] = references;
        let with = |is_reference| [&[one.clone(), member(2, is_reference)], &rest[..]].concat();
        let (aside, joined) = (score(&with(false)), score(&with(true)));
        let are_references: Vec<bool> =
            aside.memberships.iter().map(|own| own.is_reference).collect();
        assert_eq!(are_references, [true, false, true, true, true]);
        assert_ne!(aside.scans[2], joined.scans[2]);
        // Its own distances are the same whether it is a reference or not.
        let [aside_alone, joined_alone] =
            [false, true].map(|joins| score_by(&uncorrected, &with(joins)).scans[1].clone());
        assert_eq!(aside_alone, joined_alone);
        let unchanged = [0, 2, 3, 4].map(|index| aside.scans[index].clone());
        assert_eq!(unchanged.to_vec(), alone.scans);
        for (index, own) in [(0, 0), (2, 1), (4, 3)] {
            assert_eq!(aside.shift(index), alone.shift(own));
            let clean = settings.clean_scans;
            assert_eq!(aside.threshold(index, clean), alone.threshold(own, clean));
        }
        assert_eq!(aside.others(1).len(), 4);
        assert_eq!((aside.others(0).len(), aside.references().len()), (3, 4));
    }

    #[test]
    fn scans_of_one_patient_say_nothing_of_each_other() {
        let settings = Config::parse("").unwrap().scoring;
        let member = |n: u8, patient: Option<&str>| ScoredMember {
            id: ScanId([n; 32]),
            parts: vec![Foreground { shape: Shape3([5, 5, 2]), cells: (0..50).collect() }; 3],
            weights: Weights::OF_TOKENS_ALONE,
            membership: Membership {
                is_reference: n != 6,
                patient: patient.and_then(Patient::of_header),
            },
        };
        let all = [
            member(1, Some("a")),
            member(2, None),
            member(3, Some("a")),
            member(4, Some("b")),
            member(5, None),
            // A guest whose other scans are references.
            member(6, Some("a")),
        ];
        for (positional_correction, filter_shared) in [(0.0, false), (0.0, true), (0.3, false)] {
            let settings = Scoring { positional_correction, filter_shared, ..settings };
            let score = |members: &[ScoredMember]| {
                score_members(members, &[9], &settings, &mut MadeUp, &NoFineVolumes).unwrap()
            };
            let scores = score(&all);
            for index in [0, 2, 5] {
                assert_eq!(scores.others(index).len(), 3);
                if positional_correction == 0.0 {
                    let others = [1, 3, 4].map(|other| all[other].clone());
                    let alone = score(&[&[all[index].clone()][..], &others].concat());
                    assert_eq!(scores.scans[index], alone.scans[0]);
                }
            }
            assert_eq!([1, 3].map(|index| scores.others(index).len()), [4, 4]);
            assert_eq!(scores.references().len(), 5);
            let strangers = all.clone().map(|mut scan| {
                scan.membership.patient = None;
                scan
            });
            assert_ne!(score(&strangers).scans[0], scores.scans[0]);
            assert_eq!(score(&strangers).others(0).len(), 4);
        }
    }

    /// The same, but the scans 2, 5 and 8 are near each other.
    struct WithFollowUps;

    impl WindowDistances for WithFollowUps {
        fn column(
            &mut self,
            of: ScanId,
            other: ScanId,
            grid: usize,
        ) -> Result<Vec<f32>, ScanError> {
            let are_near = [of, other].iter().all(|id| [2, 5, 8].contains(&id.0[0]));
            let share = if are_near { 0.2 } else { 1.0 };
            let column = MadeUp.column(of, other, grid)?;
            Ok(column.into_iter().map(|distance| share * distance).collect())
        }

        fn column_without(
            &mut self,
            of: ScanId,
            other: ScanId,
            grid: usize,
            _: &[usize],
        ) -> Result<Vec<f32>, ScanError> {
            self.column(of, other, grid)
        }
    }

    #[test]
    fn hidden_follow_up_scans_are_scored_as_those_of_a_known_patient() {
        let settings = Config::parse("").unwrap().scoring;
        // The last is a guest.
        let member = |n: u8, patient: Option<&str>| ScoredMember {
            id: ScanId([n; 32]),
            parts: vec![Foreground { shape: Shape3([5, 5, 2]), cells: (0..50).collect() }; 3],
            weights: Weights::OF_TOKENS_ALONE,
            membership: Membership {
                is_reference: n != 8,
                patient: patient.and_then(Patient::of_header),
            },
        };
        let hidden: Vec<ScoredMember> = (1..=8).map(|n| member(n, None)).collect();
        let of_one = |n: u8| [2, 5, 8].contains(&n).then_some("a");
        let known: Vec<ScoredMember> = (1..=8).map(|n| member(n, of_one(n))).collect();

        for (positional_correction, filter_shared) in [(0.0, false), (0.0, true), (0.3, false)] {
            let settings = Scoring { positional_correction, filter_shared, ..settings };
            let score = |members: &[ScoredMember], settings: &Scoring| {
                score_members(members, &[9], settings, &mut WithFollowUps, &NoFineVolumes).unwrap()
            };
            let found = score(&hidden, &settings);
            let told = score(&known, &settings);
            assert_eq!(found.scans, told.scans);
            assert_eq!(found.follow_ups.groups, [[2, 5, 8].map(|n| ScanId([n; 32]))]);
            assert!(told.follow_ups.groups.is_empty());
            for index in 0..hidden.len() {
                assert_eq!(found.others(index), told.others(index));
                assert_eq!(found.shift(index), told.shift(index));
                let clean = settings.clean_scans;
                assert_eq!(found.threshold(index, clean), told.threshold(index, clean));
            }

            let off = score(&hidden, &Scoring { follow_up_ratio: 0.0, ..settings });
            assert_eq!((off.others(1).len(), found.others(1).len()), (6, 5));
            assert_ne!(off.scans[1], found.scans[1]);
            assert_eq!(off.follow_ups, FollowUps::default());
        }
    }
}
