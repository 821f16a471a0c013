//! How well maps and masks find known lesions: exact figures from ranked scores, overlaps, and
//! counts of lesions. Definitions as in scikit-learn (AUROC, average precision) and MedPy (Dice,
//! Jaccard); nothing is binned.

pub mod baseline;
pub mod froc;
pub mod froc_curve;
pub mod sizes;
pub mod sources;

use rayon::prelude::*;

use super::{geometry::Shape3, mask::Region, projection::Normal};

/// Scores with a known truth in descending order, each with its group (scan).
///
/// Each score is packed into one number, so that 10^8 voxels take 800 MB and sort in seconds. The
/// number holds the bits of the score in reversed order, the group and the truth.
pub struct Ranking {
    packed: Vec<u64>,
    n_groups: usize,
}

/// Most groups of a ranking.
pub const MAX_GROUPS: usize = 1 << 31;

/// The best that thresholds can reach on a ranking.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Curve {
    /// Area under the ROC curve; ties count half.
    pub auroc: f64,
    /// Sum over the thresholds of precision times gain in recall.
    pub average_precision: f64,
    /// Highest Dice of any threshold, over all groups pooled. It needs the truth, hence the name
    /// oracle.
    pub oracle_dice: f64,
    /// The threshold (score >= threshold) that reaches it.
    pub oracle_threshold: f32,
}

/// The best single threshold for several groups.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GlobalOracle {
    /// Mean of the groups' Dice at the threshold, over groups with any true score.
    pub mean_dice: f64,
    /// The threshold (score >= threshold).
    pub threshold: f32,
}

/// A number that grows as the score falls, for scores that are not NaN.
fn descending(score: f32) -> u32 {
    let bits = score.to_bits();
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    !ascending
}

fn score_of(key: u32) -> f32 {
    let ascending = !key;
    f32::from_bits(if ascending >> 31 == 1 { ascending & !(1 << 31) } else { !ascending })
}

impl Ranking {
    /// Ranks the scores of groups, each a list of (score, truth).
    ///
    /// # Panics
    /// If there are more than [`MAX_GROUPS`].
    pub fn new<G: IntoIterator<Item = (f32, bool)>>(groups: impl IntoIterator<Item = G>) -> Self {
        let mut packed = Vec::new();
        let mut n_groups = 0;

        for group in groups {
            assert!(n_groups < MAX_GROUPS, "groups fit into 31 bits");
            let tag = (n_groups as u64) << 1;
            packed.extend(
                group.into_iter().map(|(score, truth)| {
                    u64::from(descending(score)) << 32 | tag | u64::from(truth)
                }),
            );
            n_groups += 1;
        }

        packed.par_sort_unstable();
        Self { packed, n_groups }
    }

    fn n_true(&self) -> usize {
        self.packed.iter().filter(|&&entry| entry & 1 == 1).count()
    }

    /// Runs of equal scores, highest first.
    fn steps(&self) -> impl Iterator<Item = (f32, &[u64])> {
        let runs = self.packed.chunk_by(|a, b| a >> 32 == b >> 32);
        runs.map(|run| (score_of((run[0] >> 32) as u32), run))
    }

    /// The figures of all groups pooled; `None` unless there are both true and false scores.
    pub fn curve(&self) -> Option<Curve> {
        let n_true = self.n_true();
        let n_false = self.packed.len() - n_true;
        if n_true == 0 || n_false == 0 {
            return None;
        }

        let (mut hits, mut alarms, mut doubled_area) = (0_u64, 0_u64, 0_u128);
        let mut average_precision = 0.0;
        let mut oracle = (0.0, f32::INFINITY);

        for (threshold, run) in self.steps() {
            let gained = run.iter().filter(|&&entry| entry & 1 == 1).count() as u64;
            let wrong = run.len() as u64 - gained;
            doubled_area += u128::from(wrong) * u128::from(2 * hits + gained);
            hits += gained;
            alarms += wrong;
            let marked = (hits + alarms) as f64;
            average_precision += gained as f64 / n_true as f64 * (hits as f64 / marked);
            let dice = 2.0 * hits as f64 / (marked + n_true as f64);
            if dice > oracle.0 {
                oracle = (dice, threshold);
            }
        }

        Some(Curve {
            auroc: doubled_area as f64 / (2.0 * n_true as f64 * n_false as f64),
            average_precision,
            oracle_dice: oracle.0,
            oracle_threshold: oracle.1,
        })
    }

    /// For each share, which must rise, the lowest score that at most this share of the false
    /// scores exceeds. Equal ones are merged, so that the result falls strictly.
    pub fn thresholds(&self, shares: &[f64]) -> Vec<f32> {
        let n_false = (self.packed.len() - self.n_true()) as f64;
        let mut thresholds = Vec::new();
        let mut last = None;
        let mut n_above = 0;
        let mut shares = shares.iter().map(|share| share * n_false).peekable();

        for (score, run) in self.steps() {
            while shares.next_if(|&most| f64::from(n_above) > most).is_some() {
                thresholds.extend(last);
            }
            last = Some(score);
            n_above += run.iter().filter(|&&entry| entry & 1 == 0).count() as u32;
        }
        if shares.peek().is_some() {
            thresholds.extend(last);
        }
        thresholds.dedup();
        thresholds
    }

    /// The single threshold with the highest mean Dice of the groups; `None` if nothing is true.
    pub fn global_oracle(&self) -> Option<GlobalOracle> {
        let mut n_true = vec![0_u64; self.n_groups];
        for entry in self.packed.iter().filter(|&&entry| entry & 1 == 1) {
            n_true[group_of(*entry)] += 1;
        }
        let n_scored = n_true.iter().filter(|&&n| n > 0).count();
        if n_scored == 0 {
            return None;
        }

        let mut marked = vec![0_u64; self.n_groups];
        let mut hits = vec![0_u64; self.n_groups];
        let mut dice = vec![0.0_f64; self.n_groups];
        let mut sum = 0.0;
        let mut best = GlobalOracle { mean_dice: 0.0, threshold: f32::INFINITY };

        for (threshold, run) in self.steps() {
            for &entry in run {
                let group = group_of(entry);
                marked[group] += 1;
                hits[group] += entry & 1;
                let now = 2.0 * hits[group] as f64 / (marked[group] + n_true[group]) as f64;
                sum += now - dice[group];
                dice[group] = now;
            }
            let mean_dice = sum / n_scored as f64;
            if mean_dice > best.mean_dice {
                best = GlobalOracle { mean_dice, threshold };
            }
        }

        Some(best)
    }
}

fn group_of(entry: u64) -> usize {
    (entry as u32 >> 1) as usize
}

/// How far a mask and the truth agree, in voxels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Overlap {
    /// In both.
    pub both: usize,
    /// In the mask alone.
    pub mask_only: usize,
    /// In the truth alone.
    pub truth_only: usize,
}

impl Overlap {
    /// Counts (mask, truth) pairs.
    pub fn of(voxels: impl IntoIterator<Item = (bool, bool)>) -> Self {
        voxels.into_iter().fold(Self::default(), |mut overlap, (mask, truth)| {
            overlap.both += usize::from(mask && truth);
            overlap.mask_only += usize::from(mask && !truth);
            overlap.truth_only += usize::from(!mask && truth);
            overlap
        })
    }

    /// 2 |A and B| / (|A| + |B|); `None` if both are empty.
    pub fn dice(self) -> Option<f64> {
        let sizes = 2 * self.both + self.mask_only + self.truth_only;
        (sizes > 0).then(|| 2.0 * self.both as f64 / sizes as f64)
    }

    /// |A and B| / |A or B| (Jaccard); `None` if both are empty.
    pub fn iou(self) -> Option<f64> {
        let union = self.both + self.mask_only + self.truth_only;
        (union > 0).then(|| self.both as f64 / union as f64)
    }
}

impl std::iter::Sum for Overlap {
    fn sum<I: Iterator<Item = Self>>(overlaps: I) -> Self {
        overlaps.fold(Self::default(), |sum, overlap| Self {
            both: sum.both + overlap.both,
            mask_only: sum.mask_only + overlap.mask_only,
            truth_only: sum.truth_only + overlap.truth_only,
        })
    }
}

/// Found lesions and false alarms of one scan. Two regions meet if they share any voxel.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Lesions {
    /// Volume of each lesion, mm^3, and whether the mask meets it.
    pub found: Vec<(f64, bool)>,
    /// Normal hyperintensities that the mask meets.
    pub n_normal_met: usize,
    /// Regions of the mask that meet a normal hyperintensity and no lesion.
    pub n_on_normal: usize,
    /// Regions of the mask that meet neither.
    pub n_false: usize,
}

impl Lesions {
    /// Compares the connected regions of the truth and of the mask on a grid of `shape`. `normal`
    /// are hyperintensities that count as normal.
    pub fn of(
        lesions: &[Region],
        normal: &[Region],
        marked: &[Region],
        shape: Shape3,
        voxel_mm3: f64,
    ) -> Self {
        let lookup = |regions: &[Region]| {
            let mut inside = vec![false; shape.n_voxels()];
            regions.iter().flatten().for_each(|&voxel| inside[voxel] = true);
            inside
        };
        let [in_lesion, in_normal, in_mask] = [lesions, normal, marked].map(lookup);
        let meets = |region: &Region, other: &[bool]| region.iter().any(|&voxel| other[voxel]);

        let lesion = |r: &Region| (r.len() as f64 * voxel_mm3, meets(r, &in_mask));
        let off_lesions = marked.iter().filter(|region| !meets(region, &in_lesion));
        let (on_normal, others): (Vec<&Region>, Vec<&Region>) =
            off_lesions.partition(|region| meets(region, &in_normal));
        Self {
            found: lesions.iter().map(lesion).collect(),
            n_normal_met: normal.iter().filter(|region| meets(region, &in_mask)).count(),
            n_on_normal: on_normal.len(),
            n_false: others.len(),
        }
    }
}

/// Ranks by two keys: a larger first key is ranked higher, and among equal ones a larger second
/// key. Equal pairs have one rank.
pub fn ranks(keys: &[(f64, f32)]) -> Vec<f32> {
    let compare = |a: &(f64, f32), b: &(f64, f32)| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1));
    let mut sorted = keys.to_vec();
    sorted.sort_unstable_by(compare);
    let rank = |key| sorted.partition_point(|other| compare(other, key).is_lt()) as f32;
    keys.iter().map(rank).collect()
}

/// Resamples of a bootstrap.
const N_RESAMPLES: usize = 2000;

/// 95 % percentile bootstrap interval of a figure of `n` units (scans), drawn with replacement.
/// `figure` gets the drawn indices and may have no value for some draws. The seed is fixed, so that
/// the same units give the same interval. `None` if fewer than half of the draws have a value, or
/// if `n` is below 2.
pub fn bootstrap(n: usize, figure: impl Fn(&[usize]) -> Option<f64>) -> Option<(f64, f64)> {
    let mut random = Normal::new(0);
    let mut draw = vec![0; n];
    let mut figures = Vec::with_capacity(N_RESAMPLES);

    for _ in 0..N_RESAMPLES {
        draw.fill_with(|| ((random.uniform() * n as f64) as usize).min(n - 1));
        figures.extend(figure(&draw));
    }

    if n < 2 || figures.len() < N_RESAMPLES / 2 {
        return None;
    }

    figures.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| figures[((figures.len() - 1) as f64 * share).round() as usize];
    Some((at(0.025), at(0.975)))
}

/// Mean of the values; `None` without values.
pub fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (n, sum) = values.into_iter().fold((0, 0.0), |(n, sum), value| (n + 1, sum + value));
    (n > 0).then(|| sum / f64::from(n))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::mask::regions;
    use proptest::prelude::*;

    fn ranking(scores: &[f32], truth: &[bool]) -> Ranking {
        Ranking::new([scores.iter().copied().zip(truth.iter().copied())])
    }

    #[test]
    fn the_figures_of_a_curve_worked_by_hand() {
        // Descending: 4 true, 3 false and true (a tie), 1 false, -2 false.
        let curve = ranking(&[3.0, 4.0, 3.0, -2.0, 1.0], &[false, true, true, false, false]);
        let curve = curve.curve().unwrap();
        // Pairs (true, false): 6, of which 5 are in order and one is tied.
        assert_eq!(curve.auroc, 5.5 / 6.0);
        assert_eq!(curve.average_precision, 0.5 * 1.0 + 0.5 * (2.0 / 3.0));
        assert_eq!((curve.oracle_dice, curve.oracle_threshold), (0.8, 3.0));
    }

    #[test]
    fn a_curve_needs_both_classes() {
        assert_eq!(ranking(&[1.0, 2.0], &[true, true]).curve(), None);
        assert_eq!(ranking(&[1.0, 2.0], &[false, false]).global_oracle(), None);
    }

    #[test]
    fn one_threshold_for_two_scans_is_worse_than_one_each() {
        let one = [(9.0, true), (8.0, false), (1.0, false)];
        let other = [(2.0, true), (0.5, false), (0.4, false)];
        let best = Ranking::new([one, other]).global_oracle().unwrap();
        // At 2: 2/3 and 1; at 9: 1 and 0.
        assert!((best.mean_dice - 5.0 / 6.0).abs() < 1e-12, "{best:?}");
        assert_eq!(best.threshold, 2.0);
    }

    #[test]
    fn overlaps_and_lesions_worked_by_hand() {
        let shape = Shape3([6, 1, 2]);
        // Voxels 1 and 2 lie in a row of z = 0, voxel 11 in the far corner of z = 1.
        let of = |voxels: &[usize]| -> [bool; 12] { std::array::from_fn(|v| voxels.contains(&v)) };
        let (truth, mask) = (of(&[0, 1, 5]), of(&[1, 2, 11]));
        let overlap = Overlap::of(mask.into_iter().zip(truth));
        assert_eq!(overlap, Overlap { both: 1, mask_only: 2, truth_only: 2 });
        assert_eq!((overlap.dice(), overlap.iou()), (Some(2.0 / 6.0), Some(1.0 / 5.0)));
        assert_eq!(Overlap::default().dice(), None);
        let all = |inside: &[bool]| regions(inside.to_vec(), shape, 1);
        let found = vec![(16.0, true), (8.0, false)];
        let lesions = Lesions::of(&all(&truth), &[], &all(&mask), shape, 8.0);
        assert_eq!(
            lesions,
            Lesions { found: found.clone(), n_normal_met: 0, n_on_normal: 0, n_false: 1 }
        );
        // The region at voxel 11 is on a normal hyperintensity. The mask does not meet the other.
        let lesions = Lesions::of(&all(&truth), &[vec![11], vec![9]], &all(&mask), shape, 8.0);
        assert_eq!(lesions, Lesions { found, n_normal_met: 1, n_on_normal: 1, n_false: 0 });
    }

    #[test]
    fn thresholds_by_the_share_of_healthy_voxels_above_them() {
        // False: 6, 5, 4, 4 and 1. True: 7 and 3.
        let scores = [6.0, 7.0, 5.0, 4.0, 4.0, 3.0, 1.0];
        let truth = [false, true, false, false, false, true, false];
        let ranking = ranking(&scores, &truth);
        // None of five is above 6, one above 5, two above 4, four above 3 and above 1.
        assert_eq!(ranking.thresholds(&[0.1, 0.2, 0.45, 0.5, 0.8]), [6.0, 5.0, 4.0, 1.0]);
        assert!(ranking.thresholds(&[]).is_empty());
    }

    #[test]
    fn the_second_key_breaks_ties_of_the_first() {
        let keys = [(0.5, 9.0), (0.9, 1.0), (0.9, 2.0), (0.1, 3.0), (0.9, 1.0)];
        assert_eq!(ranks(&keys), [1.0, 2.0, 4.0, 0.0, 2.0]);
    }

    #[test]
    fn an_interval_holds_the_mean_and_narrows_with_the_units() {
        let interval = |n: usize| {
            let values: Vec<f64> = (0..n).map(|i| (i % 10) as f64).collect();
            let of = |draw: &[usize]| mean(draw.iter().map(|&i| values[i]));
            let (low, high) = bootstrap(n, of).unwrap();
            assert!(low < 4.5 && 4.5 < high);
            high - low
        };
        assert!(interval(1000) < interval(10) / 5.0);
        assert_eq!(bootstrap(1, |_| Some(1.0)), None);
    }

    proptest! {
        #[test]
        fn the_packed_order_is_that_of_the_scores(a in -1e9_f32..1e9, b in -1e9_f32..1e9) {
            prop_assert_eq!(score_of(descending(a)), a);
            prop_assert_eq!(descending(a) < descending(b), a > b);
        }

        #[test]
        fn the_area_is_the_share_of_pairs_in_order(
            entries in prop::collection::vec((0_u8..20, any::<bool>()), 2..60),
        ) {
            let scores: Vec<f32> = entries.iter().map(|&(score, _)| f32::from(score)).collect();
            let truth: Vec<bool> = entries.iter().map(|&(_, truth)| truth).collect();
            let (mut pairs, mut in_order) = (0.0, 0.0);
            for (a, _) in entries.iter().filter(|(_, truth)| *truth) {
                for (b, _) in entries.iter().filter(|(_, truth)| !*truth) {
                    pairs += 1.0;
                    in_order += if a > b { 1.0 } else if a == b { 0.5 } else { 0.0 };
                }
            }
            match ranking(&scores, &truth).curve() {
                None => prop_assert_eq!(pairs, 0.0),
                Some(curve) => prop_assert!((curve.auroc - in_order / pairs).abs() < 1e-12),
            }
        }
    }
}
