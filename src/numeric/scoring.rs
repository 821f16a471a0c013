//! From nearest distances to scores: how rare is a token among the other scans of the window?
//! (Le-Gia and Ahn 2026, section 3; MuSc's mutual scoring, Li et al. 2024.)

use std::num::NonZeroUsize;

/// How far from its own cell a token looks for a match in another scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SearchReach {
    /// Any token of the other scan (the paper; needs no alignment).
    WholeVolume,
    /// Tokens at most this many cells away along each axis (Chebyshev distance); 1 means the 27
    /// cells around the token's own. As good as the whole volume on aligned scans, at about a
    /// sixtieth of the distances.
    Cells(NonZeroUsize),
}

/// Nearest distances between the tokens of two scans at one layer, in both directions.
///
/// Euclidean, unitless. A token without any candidate in reach has distance infinity.
#[derive(Debug, Clone, PartialEq)]
pub struct PairColumns {
    /// For each token of the first scan its distance to the nearest token of the second.
    pub first_to_second: Vec<f32>,
    /// For each token of the second scan its distance to the nearest token of the first.
    pub second_to_first: Vec<f32>,
}

/// A share in (0, 1]; never 0, more than 1 or NaN.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Fraction(f64);

impl Fraction {
    /// `None` unless `share` lies in (0, 1].
    pub fn new(share: f64) -> Option<Self> {
        (share > 0.0 && share <= 1.0).then_some(Self(share))
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

/// For each token of one scan, its distance to the nearest token of each other scan:
/// `[n_tokens, n_others]`, Euclidean, unitless, own scan absent. Infinite where the other scan had
/// no candidate in reach.
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

    /// Tokens of the scan.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// One column of `n_tokens` distances per other scan.
    pub fn columns(&self) -> &[Vec<f32>] {
        &self.columns
    }

    /// Puts another column in the place of one.
    ///
    /// # Panics
    /// If it has another length.
    pub fn replace(&mut self, index: usize, column: Vec<f32>) {
        assert_eq!(column.len(), self.n_tokens, "a distance per token");
        self.columns[index] = column;
    }
}

/// Scores every token by how far away its closest matches are: `[n_tokens]`, larger = rarer.
///
/// The score is the mean of the `keep` smallest distances of the token's row. A minimum would call
/// a lesion seen twice common; a mean over all lets one odd scan spoil the row. Infinite distances
/// are no matches and are left out; a token without any finite one has no evidence for or against
/// it and gets `None`. The order of the columns does not change the result, to the last bit.
pub fn mutual_scores(nearest: &NearestDistances, keep: Fraction) -> Vec<Option<f32>> {
    let mut row = Vec::with_capacity(nearest.columns.len());
    (0..nearest.n_tokens)
        .map(|token| {
            row.clear();
            row.extend(nearest.columns.iter().map(|c| c[token]).filter(|d| d.is_finite()));
            row.sort_unstable_by(f32::total_cmp);
            row.truncate(keep.of(nearest.columns.len()));
            let sum: f64 = row.iter().copied().map(f64::from).sum();
            (!row.is_empty()).then(|| (sum / row.len() as f64) as f32)
        })
        .collect()
}

/// The scores of one scan: per token, and for the scan as a whole.
#[derive(Debug, Clone, PartialEq)]
pub struct ScanScores {
    /// Mean over the layers, `[n_tokens]`; 0 for unmatched tokens.
    pub tokens: Vec<f32>,
    /// Tokens without a match in any layer.
    pub n_unmatched: usize,
    /// Highest token score (the paper).
    pub max: f32,
    /// Mean of the highest 1 % of the token scores, rounded up: steadier than the maximum.
    pub top1_mean: f32,
    /// Median of the matched tokens' scores: how far the scan as a whole lies from the others. 0
    /// without any matched token.
    pub median: f32,
}

/// Averages the token scores of the layers and sums the scan up.
pub fn scan_scores(layers: &[Vec<Option<f32>>]) -> ScanScores {
    let n_tokens = layers.first().map_or(0, Vec::len);
    let layer_mean = |token: usize| {
        let sum: Option<f64> = layers.iter().map(|scores| scores[token].map(f64::from)).sum();
        sum.map(|sum| (sum / layers.len() as f64) as f32)
    };
    let scores: Vec<Option<f32>> = (0..n_tokens).map(layer_mean).collect();
    let mut matched: Vec<f32> = scores.iter().flatten().copied().collect();
    let n_unmatched = n_tokens - matched.len();
    let median = if matched.is_empty() { 0.0 } else { quantile(&mut matched, 0.5) as f32 };
    let tokens: Vec<f32> = scores.into_iter().map(|score| score.unwrap_or(0.0)).collect();
    let mut sorted = tokens.clone();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let n_top = TOP_SHARE.of(n_tokens).min(n_tokens);
    let top: f64 = sorted[..n_top].iter().copied().map(f64::from).sum();
    ScanScores {
        tokens,
        n_unmatched,
        max: sorted.first().copied().unwrap_or(0.0),
        top1_mean: (top / n_top.max(1) as f64) as f32,
        median,
    }
}

/// How far a scan as a whole lies from the others of its window, compared with how far they lie:
/// its median token score over the median of theirs. 1 is like them; `None` without others.
///
/// Lesions hardly move it, another scanner or protocol does (ours).
pub fn shift(own: &ScanScores, others: &[&ScanScores]) -> Option<f64> {
    let mut medians: Vec<f32> = others.iter().map(|other| other.median).collect();
    let typical = if medians.is_empty() { 0.0 } else { quantile(&mut medians, 0.5) };
    (typical > 0.0).then(|| f64::from(own.median) / typical)
}

/// How much the scans of a window differ as a whole: the 90th over the 10th percentile of their
/// median token scores. Near 1 in the window of one scanner; `None` below two scans (ours).
pub fn heterogeneity(scores: &[ScanScores]) -> Option<f64> {
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

/// A map threshold that needs no labels (ours; the paper picks its threshold on the labels): about a
/// share `false_positives` of the healthy voxels of a scan lies above it.
///
/// `values` are the map's voxels inside the brain. Lesions raise scores, so that they hardly move
/// the median and the lower quartile; from these two the spread of healthy tissue is taken, as if
/// its scores were normal. Nothing is taken from other scans: where sites mix, all scores of a scan
/// may lie higher, and where every scan has a lesion, all scans have high scores.
///
/// Healthy scores are skewed to the left, so that the spread comes out wide, and twice the stated
/// share asked of the normal distribution is what is measured: on two windows (one scanner, several
/// sites) 1.0 and 1.1 % for a stated 1 %, 2.2 and 2.3 % for 2.5 % (docs/quality.md). Infinite (nothing
/// is marked) without values.
pub fn label_free_threshold(mut values: Vec<f32>, false_positives: Fraction) -> f32 {
    if values.is_empty() {
        return f32::INFINITY;
    }
    let median = quantile(&mut values, 0.5);
    let spread = (median - quantile(&mut values, 0.25)) / normal_deviate(0.25);
    (median + normal_deviate(2.0 * false_positives.0) * spread) as f32
}

/// Quantile with linear interpolation between the two values around it; reorders the values.
fn quantile(values: &mut [f32], share: f64) -> f64 {
    let position = (values.len() - 1) as f64 * share;
    let (_, at, above) = values.select_nth_unstable_by(position.floor() as usize, f32::total_cmp);
    let next = above.iter().copied().min_by(f32::total_cmp).unwrap_or(*at);
    f64::from(*at) + position.fract() * (f64::from(next) - f64::from(*at))
}

/// The number of standard deviations above the mean that a share `tail` (in (0, 1/2]) of a normal
/// distribution exceeds.
fn normal_deviate(tail: f64) -> f64 {
    let above = |deviate: f64| 0.5 * libm::erfc(deviate / std::f64::consts::SQRT_2);
    let (mut low, mut high) = (0.0, 40.0);
    for _ in 0..64 {
        let middle = 0.5 * (low + high);
        if above(middle) > tail { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::projection::Normal;
    use proptest::prelude::*;

    fn fraction(share: f64) -> Fraction {
        Fraction::new(share).unwrap()
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
        let scan = scan_scores(&[vec![None, Some(2.0)], vec![None, Some(4.0)]]);
        assert_eq!((scan.tokens, scan.n_unmatched), (vec![0.0, 3.0], 1));
    }

    #[test]
    fn the_top_percent_is_rounded_up() {
        let scores: Vec<Option<f32>> = (0..150).map(|i| Some(i as f32)).collect();
        let scan = scan_scores(&[scores]);
        assert_eq!((scan.max, scan.top1_mean), (149.0, 148.5));
    }

    #[test]
    fn percentile_counts_ties_half() {
        assert_eq!(percentile(2.0, &[1.0, 2.0, 3.0, 0.0]), 0.625);
        assert_eq!(percentile(9.0, &[1.0, 2.0]), 1.0);
        assert_eq!(percentile(9.0, &[]), 0.5);
    }

    #[test]
    fn the_threshold_is_passed_by_twice_the_stated_share_of_a_normal_scan_and_by_lesions() {
        let mut normal = Normal::new(3);
        let healthy: Vec<f32> = (0..200_000).map(|_| (5.0 + normal.next()) as f32).collect();
        let above = |values: &[f32], threshold: f32| {
            values.iter().filter(|&&value| value > threshold).count() as f64 / values.len() as f64
        };
        let share = above(&healthy, label_free_threshold(healthy.clone(), fraction(0.01)));
        // Standard deviation of the share: sqrt(0.02 * 0.98 / 200,000) = 0.0003, more for the
        // quartile.
        assert!((share - 0.02).abs() < 0.001, "{share}");

        // A lesion in a tenth of the brain moves the threshold a little, and stays above it.
        let mut ill = healthy.clone();
        ill[..20_000].iter_mut().for_each(|value| *value += 5.0);
        let threshold = label_free_threshold(ill.clone(), fraction(0.01));
        assert!(above(&ill[..20_000], threshold) > 0.98);
        assert!((0.008..0.02).contains(&above(&ill[20_000..], threshold)));
        assert_eq!(label_free_threshold(Vec::new(), fraction(0.01)), f32::INFINITY);
    }

    #[test]
    fn a_scan_of_another_scanner_shifts_as_a_whole_and_a_lesion_does_not() {
        let scan = |level: f32, n_lesion: usize| {
            let score = |i: usize| if i < n_lesion { 9.0 } else { level + 0.001 * i as f32 };
            scan_scores(&[(0..101).map(|i| Some(score(i))).collect()])
        };
        let (one, two, ill, foreign) = (scan(1.0, 0), scan(1.1, 0), scan(1.0, 8), scan(2.0, 0));
        assert!((shift(&ill, &[&one, &two]).unwrap() - 1.0).abs() < 0.06);
        assert!(shift(&foreign, &[&one, &two]).unwrap() > 1.8);
        assert_eq!(shift(&one, &[]), None);
        let same = [one.clone(), two.clone(), ill.clone(), two.clone()];
        assert!(heterogeneity(&same).unwrap() < 1.15);
        assert!(heterogeneity(&[one, two, ill, foreign.clone(), foreign]).unwrap() > 1.7);
        assert_eq!(heterogeneity(&same[..1]), None);
    }

    #[test]
    fn deviates_are_those_of_the_table() {
        for (tail, deviate) in [(0.5, 0.0), (0.25, 0.674_489_75), (0.025, 1.959_963_98)] {
            assert!((normal_deviate(tail) - deviate).abs() < 1e-8, "{tail}");
        }
    }

    proptest! {
        #[test]
        fn the_order_of_the_columns_changes_no_bit(
            mut columns in prop::collection::vec(prop::collection::vec(0.0_f32..2.0, 5), 2..12),
            turn in 0_usize..12,
        ) {
            let before = mutual_scores(&NearestDistances::new(5, columns.clone()), fraction(0.3));
            let middle = turn % columns.len();
            columns.rotate_left(middle);
            let after = mutual_scores(&NearestDistances::new(5, columns), fraction(0.3));
            prop_assert_eq!(before, after);
        }
    }
}
