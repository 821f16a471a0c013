//! Turns nearest distances into scores: how rare is a token among the other scans of the window?
//! (Le-Gia and Ahn 2026, section 3; MuSc's mutual scoring, Li et al. 2024.)

use std::{collections::BTreeMap, num::NonZeroUsize};

use super::{mask::ScoreGrid, smallest::means_of_smallest, token::Foreground};

/// How far from its own cell a token looks for a match in another scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SearchReach {
    /// Any token of the other scan (the paper; needs no alignment).
    WholeVolume,
    /// Tokens at most this many patches away along each axis (Chebyshev distance); where cells are
    /// half a patch deep, 1 means the 45 cells around the token's own. As good as the whole volume
    /// on aligned scans, at about a sixtieth of the distances.
    Patches(NonZeroUsize),
}

/// Nearest distances between one grid of tokens of two scans, in both directions.
///
/// Euclidean, unitless. A token without any candidate in reach has distance infinity.
#[derive(Debug, Clone, PartialEq)]
pub struct PairColumns {
    /// For each token of the first scan its distance to the nearest token of the second.
    pub first_to_second: Vec<f32>,
    /// For each token of the second scan its distance to the nearest token of the first.
    pub second_to_first: Vec<f32>,
}

impl PairColumns {
    /// The columns if one of the scans has no token: all distances are infinite.
    pub fn unmatched(n_first: usize, n_second: usize) -> Self {
        let [first_to_second, second_to_first] =
            [n_first, n_second].map(|n| vec![f32::INFINITY; n]);
        Self { first_to_second, second_to_first }
    }

    /// The same pair the other way round.
    pub fn mirrored(self) -> Self {
        let Self { first_to_second, second_to_first } = self;
        Self { first_to_second: second_to_first, second_to_first: first_to_second }
    }
}

/// A share in (0, 1]; never 0, more than 1 or NaN.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Fraction(f64);

impl Fraction {
    /// `None` unless `share` is in (0, 1].
    pub const fn new(share: f64) -> Option<Self> {
        if share > 0.0 && share <= 1.0 { Some(Self(share)) } else { None }
    }

    /// The share as a number.
    pub fn get(self) -> f64 {
        self.0
    }

    /// This share of `n` things, rounded up, at least 1. MuSc's code truncates instead, which
    /// gives 0 things and NaN for small windows.
    pub fn of(self, n: usize) -> usize {
        // 0.3 * 10 is 3.0000000000000004 in binary; without the slack it would be rounded up to 4.
        ((self.0 * n as f64 - 1e-9).ceil() as usize).max(1)
    }
}

/// For each token of one scan, its distance to the nearest token of each other scan: `[n_tokens,
/// n_others]`, Euclidean, unitless. The scan itself has no column. Infinite where the other scan
/// has no candidate in reach.
#[derive(Debug, Clone, PartialEq)]
pub struct NearestDistances {
    n_tokens: usize,
    columns: Vec<Vec<f32>>,
}

impl NearestDistances {
    /// Joins one column of `n_tokens` distances per other scan.
    ///
    /// # Panics
    /// If a column has another length: the store checks that.
    pub fn new(n_tokens: usize, columns: Vec<Vec<f32>>) -> Self {
        assert!(columns.iter().all(|column| column.len() == n_tokens), "a distance per token");
        Self { n_tokens, columns }
    }

    /// Number of tokens of the scan.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// One column of `n_tokens` distances per other scan.
    pub fn columns(&self) -> &[Vec<f32>] {
        &self.columns
    }

    /// For each column, whether any token has a match. Columns to scans that are not compared have
    /// none.
    pub fn have_matches(&self) -> Vec<bool> {
        self.columns.iter().map(|column| column.iter().any(|d| d.is_finite())).collect()
    }

    /// Replaces one column.
    ///
    /// # Panics
    /// If the column has another length.
    pub fn replace(&mut self, index: usize, column: Vec<f32>) {
        assert_eq!(column.len(), self.n_tokens, "a distance per token");
        self.columns[index] = column;
    }
}

/// Scores every token by how far away its closest matches are: `[n_tokens]`, larger = rarer.
///
/// The score is the mean of the `keep` smallest distances of the token's row. A minimum would call
/// a lesion seen twice common. With a mean over all, one odd scan would spoil the row. Infinite
/// distances are no matches and are left out. A token without any finite distance has no evidence
/// for or against it and gets `None`. `keep` is a share of the scans with a match; a scan that is
/// not compared has none and does not count. The order of the columns does not change the result,
/// to the last bit.
pub fn mutual_scores(nearest: &NearestDistances, keep: Fraction) -> Vec<Option<f32>> {
    let n_compared = nearest.have_matches().into_iter().filter(|has_match| *has_match).count();
    means_of_smallest(&nearest.columns, nearest.n_tokens, keep.of(n_compared))
}

/// Averages the scores of one scan over the layers; `None` where any layer has none.
pub fn mean_over_layers(layers: &[Vec<Option<f32>>]) -> Vec<Option<f32>> {
    let mean = |token: usize| {
        let sum: Option<f64> = layers.iter().map(|scores| scores[token].map(f64::from)).sum();
        sum.map(|sum| (sum / layers.len() as f64) as f32)
    };
    (0..layers.first().map_or(0, Vec::len)).map(mean).collect()
}

/// Corrects the scores of a window by place (ours). It compares the mean score of a cell in other
/// patients' scans with that of the average cell, and subtracts a `share` of the difference.
/// Ventricles, folds and the rim differ between healthy people and score high in all scans.
///
/// `grids[i]` are the scores of scan `i`, whose patient has the number `patients[i]`; all are on
/// one grid of cells. Scores stay at or above 0. Cells that no other patient has do not change.
pub fn correct_positions(grids: &mut [ScoreGrid], patients: &[usize], share: f64) {
    let all = PositionSums::of(grids.iter());
    let average = all.average();

    let mut several: BTreeMap<usize, Vec<&ScoreGrid>> = BTreeMap::new();
    for (grid, &patient) in grids.iter().zip(patients) {
        several.entry(patient).or_default().push(grid);
    }
    several.retain(|_, of_patient| of_patient.len() > 1);
    let several: BTreeMap<usize, PositionSums> = several
        .into_iter()
        .map(|(patient, of_patient)| (patient, PositionSums::of(of_patient)))
        .collect();

    for (ScoreGrid { foreground, scores }, patient) in grids.iter_mut().zip(patients) {
        for (score, &cell) in scores.iter_mut().zip(&foreground.cells) {
            let Some(value) = score.map(f64::from) else { continue };
            let (sum, n) = all.0[cell as usize];
            let own = several.get(patient).map_or((value, 1.0), |own| own.0[cell as usize]);
            if n > own.1 {
                let others = (sum - own.0) / (n - own.1);
                *score = Some((value - share * (others - average)).max(0.0) as f32);
            }
        }
    }
}

/// For each cell, the sum of its scores and their number. The sums are exact, so that the order of
/// the scans changes no bit.
struct PositionSums(Vec<(f64, f64)>);

impl PositionSums {
    fn of<'g>(grids: impl IntoIterator<Item = &'g ScoreGrid>) -> Self {
        let mut places = Vec::new();
        for ScoreGrid { foreground, scores } in grids {
            places.resize(places.len().max(foreground.shape.n_voxels()), (0.0, 0.0));
            for (score, &cell) in scores.iter().zip(&foreground.cells) {
                if let Some(score) = score {
                    let (sum, n) = &mut places[cell as usize];
                    *sum += f64::from(*score);
                    *n += 1.0;
                }
            }
        }
        Self(places)
    }

    /// The mean score over the cells that several scans have.
    fn average(&self) -> f64 {
        let shared = self.0.iter().filter(|(_, n)| *n > 1.0);
        let (sum, n) = shared.fold((0.0, 0.0), |(sum, n), place| (sum + place.0, n + place.1));
        sum / n.max(1.0)
    }
}

/// The scores of one scan: per cell, and for the scan as a whole.
#[derive(Debug, Clone, PartialEq)]
pub struct ScanScores {
    /// The scored cells and the grid they belong to.
    pub foreground: Foreground,
    /// Score per cell; 0 for cells without a match.
    pub cells: Vec<f32>,
    /// Number of cells without a match.
    pub n_unmatched: usize,
    /// Highest score (the paper).
    pub max: f32,
    /// Mean of the highest 1 % of the scores, rounded up: steadier than the maximum.
    pub top1_mean: f32,
    /// Median of the matched cells' scores: how far the scan as a whole is from the others. 0
    /// without any matched cell.
    pub median: f32,
}

impl ScanScores {
    /// Sums up the scores of a scan.
    pub fn new(grid: ScoreGrid) -> Self {
        let ScoreGrid { foreground, scores } = grid;
        let mut matched: Vec<f32> = scores.iter().flatten().copied().collect();
        let n_unmatched = scores.len() - matched.len();
        let median = if matched.is_empty() { 0.0 } else { quantile(&mut matched, 0.5) as f32 };

        let cells: Vec<f32> = scores.into_iter().map(|score| score.unwrap_or(0.0)).collect();
        let mut sorted = cells.clone();
        sorted.sort_unstable_by(|a, b| b.total_cmp(a));
        let n_top = TOP_SHARE.of(cells.len()).min(cells.len());
        let top: f64 = sorted[..n_top].iter().copied().map(f64::from).sum();

        Self {
            foreground,
            cells,
            n_unmatched,
            max: sorted.first().copied().unwrap_or(0.0),
            top1_mean: (top / n_top.max(1) as f64) as f32,
            median,
        }
    }
}

/// How far a scan as a whole is from the others of its window, compared with the others: its median
/// score over the median of theirs. 1 is typical; `None` without others.
///
/// Lesions hardly change it; another scanner or protocol does (ours).
pub fn shift(own: &ScanScores, others: &[&ScanScores]) -> Option<f64> {
    let mut medians: Vec<f32> = others.iter().map(|other| other.median).collect();
    let typical = if medians.is_empty() { 0.0 } else { quantile(&mut medians, 0.5) };
    (typical > 0.0).then(|| f64::from(own.median) / typical)
}

/// How much the scans of a window differ as a whole: the 90th over the 10th percentile of their
/// median scores. Near 1 in the window of one scanner; `None` below two scans (ours).
pub fn heterogeneity(scores: &[&ScanScores]) -> Option<f64> {
    let mut medians: Vec<f32> = scores.iter().map(|scan| scan.median).collect();
    if medians.len() < 2 {
        return None;
    }
    let low = quantile(&mut medians, 0.1);
    (low > 0.0).then(|| quantile(&mut medians, 0.9) / low)
}

const TOP_SHARE: Fraction = Fraction(0.01);

/// Share of `others` below `own`, ties counting half, in [0, 1]; 0.5 without others.
pub fn percentile(own: f32, others: &[f32]) -> f64 {
    if others.is_empty() {
        return 0.5;
    }
    let halves: usize =
        others.iter().map(|&o| 2 * usize::from(o < own) + usize::from(o == own)).sum();
    halves as f64 / (2 * others.len()) as f64
}

/// How the values of a map are distributed, as needed for a threshold without labels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MapProfile {
    /// Median of the values.
    pub median: f64,
    /// Distance between the quartiles.
    pub spread: f64,
    /// Where the stated highest share of the values begins, in spreads above the median.
    pub tail: f64,
}

impl MapProfile {
    /// The profile of the values; their highest share `top` is the tail. Without values, or if they
    /// do not vary, the tail is infinitely far.
    pub fn new(mut values: Vec<f32>, top: Fraction) -> Self {
        if values.is_empty() {
            return Self { median: 0.0, spread: 0.0, tail: f64::INFINITY };
        }
        let mut at = |share| quantile(&mut values, share);
        let (median, spread) = (at(0.5), at(0.75) - at(0.25));
        let tail = if spread > 0.0 { (at(1.0 - top.0) - median) / spread } else { f64::INFINITY };
        Self { median, spread, tail }
    }
}

/// A map threshold that needs no labels (ours; the paper picks its threshold on the labels): about
/// the stated share of the healthy voxels is above it.
///
/// Median and spread are the scan's own, because scans of another scanner may score higher as a
/// whole. Half of the brain would have to be ill to change them much. The tail of healthy tissue
/// comes from the other scans: a share `clean` of them has a shorter tail. So only this share must
/// be free of lesions larger than the stated share of a brain. Measured in docs/quality.md. Without
/// other scans the scan's own tail is used. `profiles` are those of a window, `own` is the position
/// of the scan among them.
pub fn label_free_threshold(profiles: &[MapProfile], own: usize, clean: Fraction) -> f32 {
    let others = profiles.iter().enumerate().filter(|(index, _)| *index != own);
    let mut tails: Vec<f32> = others.map(|(_, other)| other.tail as f32).collect();
    let own = &profiles[own];
    let tail = if tails.is_empty() { own.tail } else { quantile(&mut tails, clean.0) };
    if own.spread > 0.0 { (own.median + tail * own.spread) as f32 } else { f32::INFINITY }
}

/// Quantile with linear interpolation between the two values around it; reorders the values.
pub fn quantile(values: &mut [f32], share: f64) -> f64 {
    let position = (values.len() - 1) as f64 * share;
    let (_, at, above) = values.select_nth_unstable_by(position.floor() as usize, f32::total_cmp);
    let next = above.iter().copied().min_by(f32::total_cmp).unwrap_or(*at);
    // A weight of 0 is skipped, so that two infinite values do not give NaN.
    let [here, next] = [*at, next].map(f64::from);
    let weigh = |value: f64, weight: f64| if weight > 0.0 { weight * value } else { 0.0 };
    weigh(here, 1.0 - position.fract()) + weigh(next, position.fract())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::{geometry::Shape3, projection::Normal};
    use proptest::prelude::*;

    fn fraction(share: f64) -> Fraction {
        Fraction::new(share).unwrap()
    }

    fn grid(cells: &[u32], scores: Vec<Option<f32>>) -> ScoreGrid {
        let foreground = Foreground { shape: Shape3::cube(6), cells: cells.to_vec() };
        ScoreGrid { foreground, scores }
    }

    #[test]
    fn a_fraction_is_rounded_up_and_never_nothing() {
        assert_eq!(fraction(0.3).of(10), 3);
        assert_eq!(fraction(0.3).of(9), 3);
        assert_eq!(fraction(0.3).of(1), 1);
        assert_eq!(fraction(0.01).of(3), 1);
        assert_eq!(fraction(1.0).of(7), 7);
        for bad in [0.0, -0.1, 1.1, f64::NAN] {
            assert_eq!(Fraction::new(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_mean_of_the_closest_matches_worked_by_hand() {
        let columns =
            vec![vec![4.0, 1.0], vec![1.0, f32::INFINITY], vec![2.0, 3.0], vec![9.0, 7.0]];
        let scores = mutual_scores(&NearestDistances::new(2, columns), fraction(0.5));
        // Token 0 keeps 1 and 2; token 1 keeps 1 and 3, the infinite one is no match.
        assert_eq!(scores, [Some(1.5), Some(2.0)]);
    }

    #[test]
    fn a_token_without_candidates_is_unmatched_and_scores_zero() {
        let none =
            mutual_scores(&NearestDistances::new(1, vec![vec![f32::INFINITY]]), fraction(0.3));
        assert_eq!(none, [None]);
        let mean = mean_over_layers(&[vec![None, Some(2.0)], vec![None, Some(4.0)]]);
        assert_eq!(mean, [None, Some(3.0)]);
        let scan = ScanScores::new(grid(&[3, 5], mean));
        assert_eq!((scan.cells, scan.n_unmatched), (vec![0.0, 3.0], 1));
    }

    #[test]
    fn the_top_percent_is_rounded_up() {
        let scores: Vec<Option<f32>> = (0..150).map(|i| Some(i as f32)).collect();
        let scan = ScanScores::new(grid(&(0..150).collect::<Vec<_>>(), scores));
        assert_eq!((scan.max, scan.top1_mean), (149.0, 148.5));
    }

    #[test]
    fn percentile_counts_ties_half() {
        assert_eq!(percentile(2.0, &[1.0, 2.0, 3.0, 0.0]), 0.625);
        assert_eq!(percentile(9.0, &[1.0, 2.0]), 1.0);
        assert_eq!(percentile(9.0, &[]), 0.5);
    }

    #[test]
    fn places_that_score_high_everywhere_are_corrected_by_hand() {
        // Cell 7 scores high everywhere, cell 9 in one scan, cell 8 is in one scan only.
        let scores = [
            grid(&[5, 7, 9], vec![Some(1.0), Some(3.0), Some(1.0)]),
            grid(&[5, 7, 8, 9], vec![Some(1.0), Some(3.0), Some(4.0), Some(5.0)]),
            grid(&[5, 7, 9], vec![Some(1.0), Some(3.0), None]),
        ];
        let mut corrected = scores.clone();
        correct_positions(&mut corrected, &[0, 1, 2], 0.5);
        let corrected = corrected.map(|grid| grid.scores);
        // Scores of others: 1, 3, 5 in the first scan; 1, 3, -, 1 in the second; 1, 3, - in the
        // third: 2.25 on average (18 over 8). Cell 5 gets 0.5 * 1.25 more, cell 7 0.5 * 0.75 less.
        // Cell 9 of the first scan would fall to 1 - 0.5 * 2.75, below 0.
        assert_eq!(corrected[0], [Some(1.625), Some(2.625), Some(0.0)]);
        assert_eq!(corrected[1], [Some(1.625), Some(2.625), Some(4.0), Some(5.625)]);
        assert_eq!(corrected[2], [Some(1.625), Some(2.625), None]);

        let mut alone = [scores[0].clone()];
        correct_positions(&mut alone, &[0], 0.5);
        assert_eq!(alone[0], scores[0], "nothing to compare with");
    }

    #[test]
    fn places_are_not_corrected_by_scans_of_the_same_patient() {
        // Cell 1 scores high in the first patient only, who has two scans.
        let scores = [[1.0, 5.0], [1.0, 4.0], [1.0, 1.0]];
        let mut grids = scores.map(|scores| grid(&[0, 1], scores.map(Some).to_vec()));
        correct_positions(&mut grids, &[0, 0, 1], 0.5);
        // The average cell scores 13 / 6. Of other patients: 1 for both cells of the first two
        // scans; 1 and 4.5 for the third's.
        let more = 0.5 * (13.0_f32 / 6.0 - 1.0);
        assert_eq!(grids[0].scores, [Some(1.0 + more), Some(5.0 + more)]);
        assert_eq!(grids[1].scores, [Some(1.0 + more), Some(4.0 + more)]);
        assert_eq!(grids[2].scores[0], Some(1.0 + more));
        assert_eq!(grids[2].scores[1], Some(0.0), "1 - 0.5 * (4.5 - 13 / 6) is below");
        let mut alone = [grids[0].clone(), grids[1].clone()];
        correct_positions(&mut alone, &[0, 0], 0.5);
        assert_eq!(alone[..], grids[..2], "nobody to compare with");
    }

    #[test]
    fn a_scan_without_any_match_is_none_that_a_share_is_kept_of() {
        let far = f32::INFINITY;
        let columns = vec![vec![4.0, 1.0], vec![far, far], vec![2.0, 3.0], vec![far, far]];
        // Half of two, not of four.
        let scores = mutual_scores(&NearestDistances::new(2, columns), fraction(0.5));
        assert_eq!(scores, [Some(2.0), Some(1.0)]);
    }

    /// Scans whose healthy values have a level and spread of their own, and a tail to the right.
    fn skewed(seed: u64, level: f64, spread: f64, n: usize) -> Vec<f32> {
        let mut normal = Normal::new(seed);
        (0..n).map(|_| (level + spread * (0.6 * normal.next()).exp()) as f32).collect()
    }

    #[test]
    fn the_stated_share_of_healthy_values_lies_above_the_threshold_whatever_their_tail() {
        let stated = fraction(0.01);
        let healthy: Vec<Vec<f32>> =
            (0..8).map(|i| skewed(i, 1.0 + i as f64, 0.1 + 0.1 * i as f64, 100_000)).collect();
        let mut window = healthy.clone();
        // Half of them have a lesion in 4 % of the brain.
        for scan in &mut window[..4] {
            let high = scan.iter().copied().fold(0.0, f32::max);
            scan[..4000].fill(2.0 * high);
        }
        let profiles: Vec<MapProfile> =
            window.iter().map(|values| MapProfile::new(values.clone(), stated)).collect();
        for (index, values) in healthy.iter().enumerate() {
            let threshold = label_free_threshold(&profiles, index, fraction(0.25));
            let above = values.iter().filter(|&&v| v > threshold).count() as f64 / 100_000.0;
            // The standard deviation of a share of 0.01 in 100,000 is 0.0003, and about the same
            // for a tail. With lesions in 4 % of the values, median and spread rise.
            assert!((0.006..0.0115).contains(&above), "{index} {above}");
            assert!(window[index][..4000].iter().all(|&v| v > threshold) || index >= 4);
        }
    }

    #[test]
    fn without_values_or_spread_nothing_is_marked() {
        let flat = MapProfile::new(vec![1.0; 9], fraction(0.01));
        let empty = MapProfile::new(Vec::new(), fraction(0.01));
        let normal = MapProfile::new(skewed(1, 1.0, 1.0, 1000), fraction(0.01));
        for odd in [flat, empty] {
            let threshold = label_free_threshold(&[odd, normal, normal], 0, fraction(0.25));
            assert_eq!(threshold, f32::INFINITY);
            // Nothing is marked either if all others are like that, and the threshold is never NaN.
            let threshold = label_free_threshold(&[normal, odd, odd, odd], 0, fraction(0.25));
            assert_eq!(threshold, f32::INFINITY);
        }
        let alone = label_free_threshold(&[normal], 0, fraction(0.25));
        assert_eq!(alone, (normal.median + normal.tail * normal.spread) as f32);
    }

    #[test]
    fn a_scan_of_another_scanner_shifts_as_a_whole_and_a_lesion_does_not() {
        let scan = |level: f32, n_lesion: usize| {
            let score = |i: usize| if i < n_lesion { 9.0 } else { level + 0.001 * i as f32 };
            ScanScores::new(grid(
                &(0..101).collect::<Vec<_>>(),
                (0..101).map(|i| Some(score(i))).collect(),
            ))
        };
        let (one, two, ill, foreign) = (scan(1.0, 0), scan(1.1, 0), scan(1.0, 8), scan(2.0, 0));
        assert!((shift(&ill, &[&one, &two]).unwrap() - 1.0).abs() < 0.06);
        assert!(shift(&foreign, &[&one, &two]).unwrap() > 1.8);
        assert_eq!(shift(&one, &[]), None);
        let same = [&one, &two, &ill, &two];
        assert!(heterogeneity(&same).unwrap() < 1.15);
        assert!(heterogeneity(&[&one, &two, &ill, &foreign, &foreign]).unwrap() > 1.7);
        assert_eq!(heterogeneity(&same[..1]), None);
    }

    proptest! {
        #[test]
        fn the_order_of_the_scans_changes_no_bit_of_the_levelling(
            scores in prop::collection::vec(prop::collection::vec(0.1_f32..2.0, 20), 3..9),
            turn in 1_usize..8,
        ) {
            let cells: Vec<u32> = (0..20).collect();
            let some = |scores: &Vec<f32>| scores.iter().copied().map(Some).collect();
            let mut grids: Vec<ScoreGrid> = scores.iter().map(|s| grid(&cells, some(s))).collect();
            let middle = turn % grids.len();
            let mut turned = grids.clone();
            turned.rotate_left(middle);
            let patients: Vec<usize> = (0..grids.len()).collect();
            correct_positions(&mut grids, &patients, 0.3);
            correct_positions(&mut turned, &patients, 0.3);
            grids.rotate_left(middle);
            prop_assert_eq!(grids, turned);
        }
    }
}
