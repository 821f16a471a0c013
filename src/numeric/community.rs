//! Consistent anomalies: which scans share a lesion, and in which tokens?
//!
//! A lesion that several scans of a window share finds matches in them and scores low. Le-Gia and
//! Ahn (CoDeGraph, TMLR 2025) recognise it by *neighbour burnout*. Its sorted distances to the
//! other scans stay small for the scans that share it, and then jump. Those of a normal token grow
//! slowly. Tokens that burn out link their scan to the near ones. Scans with many links between
//! them are a community. A community far denser than the rest is suspect. The tokens that only its
//! members explain no longer count as candidates for a match. Scans are never left out.
//!
//! The published outline does not fix the numbers; all of them are in [`CommunitySettings`].
//! Deliberate differences (ours):
//! * Distances are divided by the median of their column. Two scans of one scanner are near each
//!   other everywhere, so that only a token that is nearer than its scans counts. Without this, a
//!   scanner with a fifth of the window's scans is a suspect community, and one pair of follow-up
//!   scans takes all the links.
//! * Links come from tokens that are rare at the reference rank, not from those that score high: a
//!   lesion in nearly as many scans as the score averages over scores below its scan's median.
//!   Exactly such a lesion must be found.
//! * The weight of a single scan in the comparison of communities: see
//!   [`Suspect::mean_inner_weight`].
//! * A community whose members would lose many tokens is a group of similar scans, and loses none.
//!
//! Limits: a lesion in more scans than the reference rank does not burn out. A lesion in half of
//! the window or more is no anomaly there.

use std::cmp::Ordering;

use super::{
    leiden::{self, Weights},
    scoring::{Fraction, NearestDistances},
};

/// The constants of the filter. The defaults hold on synthetic windows of 15 to 60 scans, 25 seeds
/// each; they have not been measured on real cohorts yet.
///
/// "Outline" below is the value in the published description of CoDeGraph.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CommunitySettings {
    /// Rank of the reference distance, as a share of the other scans; at least one rank beyond
    /// those that the score averages. 0.3 (outline). A lesion in a larger share is not found.
    pub reference_rank: Fraction,
    /// Only tokens whose reference distance is above this quantile of their scan send links. 0.5,
    /// the median (outline, there of the score).
    pub rare_quantile: Fraction,
    /// Links are taken, lowest endurance ratio first, until this share of the scans has sent one.
    /// 0.9 (outline: 0.8 to 0.95, all of which gave the same suspects on synthetic windows).
    pub link_coverage: Fraction,
    /// At most this share of all (token, other scan) pairs become links. 0.005 (outline: 0.001,
    /// which gives few links per pair of scans: a lesion of many tokens would leave none for a
    /// second one, and in grids of some hundred cells hardly enough for itself).
    pub max_pair_share: Fraction,
    /// Divide the distances of each ordered pair of scans by their median. On; see the module.
    pub level_pairs: bool,
    /// The resolution of the communities is this quantile, over the scans, of the mean weight of a
    /// scan's links. 0.25. The outline takes this quantile of all positive weights instead. Then a
    /// lesion in 60 of 200 scans makes three quarters of the weights, sets the resolution itself
    /// and is split.
    pub resolution_quantile: Fraction,
    /// The resolution is at least this many links per pair of scans. 1: a single link joins no
    /// scans.
    pub min_resolution: f64,
    /// A suspect community has at least this many scans. 3 (outline): two may be one patient.
    pub min_scans: usize,
    /// A suspect community has less than this share of the scans. 0.5 (outline): a larger one
    /// defines what is normal.
    pub max_scan_share: Fraction,
    /// A suspect community's mean inner weight exceeds the third quartile of the others by this
    /// many interquartile ranges. 3 (outline: 1.5 to 4.5): windows without a lesion reached 2.5,
    /// lesions of three tokens in 30 % of the scans began at 3.6.
    pub iqr_factor: f64,
    /// The interquartile range counts as at least this many links per pair of scans. 1, the
    /// smallest step of a weight. Otherwise any difference would stand out where all others are
    /// equal.
    pub min_iqr: f64,
    /// A token of a suspect community is excluded if its ratio of scores, without and with the
    /// community's scans, exceeds this quantile of the ratios of all other scans. 0.99 (outline).
    pub exclusion_quantile: Fraction,
    /// A suspect community that would lose a larger share of its tokens loses none, because its
    /// scans differ as a whole. 0.25: scanner groups gave 0.8 and lesions 0.05.
    pub max_excluded_share: Fraction,
}

impl Default for CommunitySettings {
    fn default() -> Self {
        let share = |share| Fraction::new(share).expect("the defaults lie in (0, 1]");
        Self {
            reference_rank: share(0.3),
            rare_quantile: share(0.5),
            link_coverage: share(0.9),
            max_pair_share: share(0.005),
            level_pairs: true,
            resolution_quantile: share(0.25),
            min_resolution: 1.0,
            min_scans: 3,
            max_scan_share: share(0.5),
            iqr_factor: 3.0,
            min_iqr: 1.0,
            exclusion_quantile: share(0.99),
            max_excluded_share: share(0.25),
        }
    }
}

/// What was found in a window. Scans are numbered as in the window.
#[derive(Debug, Clone, PartialEq)]
pub struct CommunityFinding {
    /// Every scan is in exactly one community. Members are ascending; communities are ordered by
    /// their first member.
    pub communities: Vec<Vec<usize>>,
    /// The communities that stand out, in the order of `communities`.
    pub suspects: Vec<Suspect>,
    /// Number of suspicious links that the communities are based on.
    pub n_links: usize,
}

/// A community of scans that are linked far more than the others.
#[derive(Debug, Clone, PartialEq)]
pub struct Suspect {
    /// Its scans, ascending.
    pub members: Vec<usize>,
    /// Mean number of links between two of its scans, both directions together.
    ///
    /// A single scan has no pair. In the comparison it counts with its strongest link to any other
    /// scan, which was too weak to join the two. So the quartiles show how strong links usually are
    /// in the window, even if nearly all scans are single. If the whole window consists of a few
    /// dense communities (several scanners, several kinds of normal), none of them stands out.
    pub mean_inner_weight: f64,
    /// Share of the members' tokens that only its scans explain, in [0, 1].
    pub over_share: f64,
    /// For each member, as in `members`, the tokens that no longer count as candidates, ascending.
    /// Empty if `over_share` exceeds [`CommunitySettings::max_excluded_share`].
    pub excluded: Vec<Vec<usize>>,
}

impl CommunityFinding {
    /// For each of the `n_scans` scans of the window, its excluded tokens, ascending.
    pub fn excluded_tokens(&self, n_scans: usize) -> Vec<Vec<usize>> {
        let mut excluded = vec![Vec::new(); n_scans];
        for suspect in &self.suspects {
            for (&member, tokens) in suspect.members.iter().zip(&suspect.excluded) {
                excluded[member].clone_from(tokens);
            }
        }
        excluded
    }
}

/// Looks for consistent anomalies in a window at one layer.
///
/// `window` holds the distances of each scan to all others. The columns are in the order of the
/// window, without the scan itself. `keep` is that of
/// [`mutual_scores`](super::scoring::mutual_scores), so that the scores with and without a
/// community are means of as many distances. The same window gives the same finding, to the last
/// bit. On one core 60 scans of 2,000 tokens take about 0.4 s and 200 take 4 s, twice as much if
/// there is a suspect.
///
/// # Panics
/// If a scan has not one column per other scan.
pub fn find_communities(
    window: &[NearestDistances],
    keep: Fraction,
    settings: &CommunitySettings,
) -> CommunityFinding {
    let levelled = Levelled::new(window, settings.level_pairs);
    let links = suspicious_links(&levelled, keep, settings);

    let mut weights = Weights::new(window.len());
    for link in &links {
        weights.add(link.scan, link.near, 1.0);
    }
    let communities = leiden::communities(&weights, resolution(&weights, settings));

    let densities: Vec<f64> = communities.iter().map(|c| density(&weights, c)).collect();
    let fits = |members: &[usize]| {
        members.len() >= settings.min_scans.max(2)
            && (members.len() as f64) < settings.max_scan_share.get() * window.len() as f64
    };
    let suspects = communities
        .iter()
        .enumerate()
        .filter(|&(index, members)| fits(members) && stands_out(&densities, index, settings))
        .map(|(index, members)| suspect(&levelled, members, densities[index], keep, settings))
        .collect();
    CommunityFinding { communities, suspects, n_links: links.len() }
}

/// The (scan, other scan) columns that may change without the candidates in `excluded` (tokens per
/// scan), in ascending order. All others stay the same to the last bit.
///
/// Only columns to scans that lose tokens change. They change for all scans of the window, not just
/// for the members of the community. A scan with the lesion in one or two tokens is linked too
/// weakly to be a member, but must not match it any longer. Columns that surely stay the same are
/// left out: distances are symmetric, so that no token of `scan` is nearer to an excluded token
/// than the excluded token's own distance to `scan`.
pub fn due_columns(window: &[NearestDistances], excluded: &[Vec<usize>]) -> Vec<(usize, usize)> {
    let pairs =
        (0..window.len()).flat_map(|scan| others(scan, window.len()).map(move |o| (scan, o)));
    let due = pairs.filter(|&(scan, other)| {
        let back = column(window, other, scan);
        let nearest =
            excluded[other].iter().map(|&token| back[token]).fold(f32::INFINITY, f32::min);
        let mut distances = column(window, scan, other).iter().filter(|d| d.is_finite());
        distances.any(|&distance| distance >= nearest * (1.0 - DIRECTION_SLACK))
    });
    due.collect()
}

/// Relative difference that the two directions of a distance may have. They usually come from one
/// block, but a stored column may come from another device.
const DIRECTION_SLACK: f32 = 1e-3;

/// The other scans of a window of `n_scans`, in the order of the columns of `scan`.
fn others(scan: usize, n_scans: usize) -> impl Iterator<Item = usize> + Clone {
    (0..n_scans).filter(move |&other| other != scan)
}

/// Distances of the tokens of `scan` to `other`.
fn column(window: &[NearestDistances], scan: usize, other: usize) -> &[f32] {
    &window[scan].columns()[other - usize::from(other > scan)]
}

/// The distances of a window, each ordered pair of scans divided by its median.
struct Levelled<'a> {
    window: &'a [NearestDistances],
    /// For each scan and column, the divisor; `None` for a column without information.
    medians: Vec<Vec<Option<f64>>>,
    /// For each scan and column, whether there is any match. `keep` is a share of those columns.
    compared: Vec<Vec<bool>>,
}

/// A distance to another scan.
type Match = (f64, usize);

fn nearer(a: &Match, b: &Match) -> Ordering {
    a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))
}

impl<'a> Levelled<'a> {
    fn new(window: &'a [NearestDistances], level: bool) -> Self {
        let median = |column: &Vec<f32>| if level { positive_median(column) } else { Some(1.0) };
        let columns = |scan: &NearestDistances| {
            assert_eq!(scan.columns().len() + 1, window.len(), "a column per other scan");
            scan.columns().iter().map(median).collect()
        };
        Self {
            window,
            medians: window.iter().map(columns).collect(),
            compared: window.iter().map(NearestDistances::have_matches).collect(),
        }
    }

    fn n_scans(&self) -> usize {
        self.window.len()
    }

    /// The finite distances of a token, in the order of the window.
    fn matches(&self, scan: usize, token: usize) -> impl Iterator<Item = Match> {
        let columns = self.window[scan].columns().iter().zip(&self.medians[scan]);
        columns.zip(others(scan, self.n_scans())).filter_map(move |((column, median), other)| {
            let distance = f64::from(column[token]) / (*median)?;
            distance.is_finite().then_some((distance, other))
        })
    }
}

/// Median of the finite distances, if it is above 0. At 0 both are the same scan, and matches
/// between them mean nothing.
fn positive_median(column: &[f32]) -> Option<f64> {
    let finite = column.iter().copied().filter(|distance| distance.is_finite());
    let mut finite: Vec<f64> = finite.map(f64::from).collect();
    let middle = finite.len() / 2;
    if finite.is_empty() {
        return None;
    }
    let (_, median, _) = finite.select_nth_unstable_by(middle, f64::total_cmp);
    (*median > 0.0).then_some(*median)
}

/// A token that is much nearer to one scan than to the scans at higher ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Link {
    /// Endurance ratio: distance to `near` over the token's reference distance, in [0, 1].
    ratio: f64,
    scan: usize,
    token: usize,
    near: usize,
}

impl Link {
    /// Lowest ratio first; equal ones in the order of the window, so that the result is unique.
    fn order(&self, other: &Self) -> Ordering {
        let place = |link: &Self| (link.scan, link.token, link.near);
        self.ratio.total_cmp(&other.ratio).then_with(|| place(self).cmp(&place(other)))
    }
}

/// The links with the lowest endurance ratios, ascending, until enough scans have sent one.
fn suspicious_links(
    levelled: &Levelled<'_>,
    keep: Fraction,
    settings: &CommunitySettings,
) -> Vec<Link> {
    let n_scans = levelled.n_scans();
    let n_others = n_scans.saturating_sub(1);
    let rank = reference_rank(n_others, keep, settings);
    let n_tokens: usize = levelled.window.iter().map(NearestDistances::n_tokens).sum();
    let n_most = settings.max_pair_share.of(n_tokens * n_others);

    let mut links = Vec::new();
    for scan in 0..n_scans {
        links.extend(scan_links(levelled, scan, rank, settings.rare_quantile));
        // All candidates of a large window would take more memory than its distances.
        if links.len() > 4 * n_most {
            links.select_nth_unstable_by(n_most, Link::order);
            links.truncate(n_most);
        }
    }

    links.sort_unstable_by(Link::order);
    links.truncate(n_most);
    links.truncate(n_until_covered(&links, n_scans, settings.link_coverage));
    links
}

/// Rank of the reference distance among those to `n_others` scans, counted from 1. It is beyond the
/// `keep` that are averaged, so that a token which burns out within them is found.
fn reference_rank(n_others: usize, keep: Fraction, settings: &CommunitySettings) -> usize {
    settings.reference_rank.of(n_others).max(keep.of(n_others) + 1).min(n_others)
}

/// How many links it takes until a share of the scans has sent one.
fn n_until_covered(links: &[Link], n_scans: usize, coverage: Fraction) -> usize {
    let mut sent = vec![false; n_scans];
    let mut n_missing = coverage.of(n_scans);
    let enough = links.iter().position(|link| {
        n_missing -= usize::from(!std::mem::replace(&mut sent[link.scan], true));
        n_missing == 0
    });
    enough.map_or(links.len(), |last| last + 1)
}

/// The candidate links of one scan: from its rare tokens to the scans nearer than the reference at
/// `rank`. A token with fewer matches has no reference and sends no links.
fn scan_links(levelled: &Levelled<'_>, scan: usize, rank: usize, rare: Fraction) -> Vec<Link> {
    let n_tokens = levelled.window[scan].n_tokens();
    let mut links = Vec::new();
    let mut references = vec![0.0; n_tokens];
    let mut matches: Vec<Match> = Vec::with_capacity(levelled.n_scans());
    for (token, reference) in references.iter_mut().enumerate() {
        matches.clear();
        matches.extend(levelled.matches(scan, token));
        if rank < 2 || matches.len() < rank {
            continue;
        }
        let (before, &mut (far, _), _) = matches.select_nth_unstable_by(rank - 1, nearer);
        if far > 0.0 {
            *reference = far;
            let link = |&mut (near_by, near)| Link { ratio: near_by / far, scan, token, near };
            links.extend(before.iter_mut().map(link));
        }
    }

    let mut known: Vec<f64> = references.iter().copied().filter(|&far| far > 0.0).collect();
    let usual = quantile(&mut known, rare).unwrap_or(f64::INFINITY);
    links.retain(|link| references[link.token] > usual);
    links
}

/// The weight that a pair of scans needs to be in one community.
fn resolution(weights: &Weights, settings: &CommunitySettings) -> f64 {
    let n_scans = weights.n_nodes();
    let usual = |scan| {
        let links = others(scan, n_scans).map(|other| weights.get(scan, other));
        let links: Vec<f64> = links.filter(|&weight| weight > 0.0).collect();
        links.iter().sum::<f64>() / links.len().max(1) as f64
    };
    let mut means: Vec<f64> = (0..n_scans).map(usual).collect();
    quantile(&mut means, settings.resolution_quantile).unwrap_or(0.0).max(settings.min_resolution)
}

/// Mean weight over the pairs of a community; for a single scan, its strongest link.
fn density(weights: &Weights, members: &[usize]) -> f64 {
    match *members {
        [alone] => {
            let links = others(alone, weights.n_nodes()).map(|other| weights.get(alone, other));
            links.fold(0.0, f64::max)
        }
        _ => weights.inner(members) / (members.len() * (members.len() - 1) / 2) as f64,
    }
}

/// Whether a community is an outlier among the others (Tukey's fence). The community itself is left
/// out of the quartiles, because it would change them if there are few.
fn stands_out(densities: &[f64], index: usize, settings: &CommunitySettings) -> bool {
    let mut rest = densities.to_vec();
    let own = rest.swap_remove(index);
    let mut quartile = |share| quantile(&mut rest, Fraction::new(share)?);
    let (Some(first), Some(third)) = (quartile(0.25), quartile(0.75)) else { return false };
    own > third + settings.iqr_factor * (third - first).max(settings.min_iqr)
}

/// Finds the tokens of a community that only its own scans explain.
fn suspect(
    levelled: &Levelled<'_>,
    members: &[usize],
    mean_inner_weight: f64,
    keep: Fraction,
    settings: &CommunitySettings,
) -> Suspect {
    let mut is_member = vec![false; levelled.n_scans()];
    members.iter().for_each(|&member| is_member[member] = true);

    let outside = (0..levelled.n_scans()).filter(|&scan| !is_member[scan]);
    let mut usual: Vec<f64> =
        outside.flat_map(|scan| score_ratios(levelled, scan, &is_member, keep)).flatten().collect();
    let limit = quantile(&mut usual, settings.exclusion_quantile).unwrap_or(f64::INFINITY);

    let over = |&member: &usize| -> Vec<usize> {
        let ratios = score_ratios(levelled, member, &is_member, keep).into_iter().enumerate();
        ratios
            .filter(|(_, ratio)| ratio.is_some_and(|r| r > limit))
            .map(|(token, _)| token)
            .collect()
    };
    let mut excluded: Vec<Vec<usize>> = members.iter().map(over).collect();

    let n_over: usize = excluded.iter().map(Vec::len).sum();
    let n_tokens: usize = members.iter().map(|&m| levelled.window[m].n_tokens()).sum();
    let over_share = n_over as f64 / n_tokens.max(1) as f64;
    if over_share > settings.max_excluded_share.get() {
        excluded.iter_mut().for_each(Vec::clear);
    }
    Suspect { members: members.to_vec(), mean_inner_weight, over_share, excluded }
}

/// For each token of a scan, its score against the scans outside a community divided by its score
/// against all. `None` if one of the two has no match, because that is no evidence.
fn score_ratios(
    levelled: &Levelled<'_>,
    scan: usize,
    is_member: &[bool],
    keep: Fraction,
) -> Vec<Option<f64>> {
    let compared = levelled.compared[scan].iter().zip(others(scan, levelled.n_scans()));
    let compared = compared.filter(|(is_compared, _)| **is_compared).map(|(_, other)| other);
    let n_all = compared.clone().count();
    let n_outside = compared.filter(|&other| !is_member[other]).count();

    let ratio = |token| {
        let mut all: Vec<f64> =
            levelled.matches(scan, token).map(|(distance, _)| distance).collect();
        let outside = levelled.matches(scan, token).filter(|&(_, other)| !is_member[other]);
        let mut outside: Vec<f64> = outside.map(|(distance, _)| distance).collect();
        let score = mean_of_smallest(&mut all, keep.of(n_all))?;
        let without = mean_of_smallest(&mut outside, keep.of(n_outside))?;
        (score > 0.0).then_some(without / score)
    };
    (0..levelled.window[scan].n_tokens()).map(ratio).collect()
}

/// Mean of the `n` smallest values, or of all if there are fewer; `None` without values.
fn mean_of_smallest(values: &mut Vec<f64>, n: usize) -> Option<f64> {
    if n < values.len() {
        values.select_nth_unstable_by(n, f64::total_cmp);
        values.truncate(n);
    }
    // The order of the values decides the last bits of a sum.
    values.sort_unstable_by(f64::total_cmp);
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Quantile, interpolated linearly between neighbours; `None` without values. Reorders the values.
fn quantile(values: &mut [f64], share: Fraction) -> Option<f64> {
    let last = values.len().checked_sub(1)?;
    let position = last as f64 * share.get();
    let below = position.floor() as usize;
    let (_, &mut at, above) = values.select_nth_unstable_by(below, f64::total_cmp);
    let next = above.iter().copied().min_by(f64::total_cmp).unwrap_or(at);
    Some(at + position.fract() * (next - at))
}

#[cfg(test)]
mod tests;
