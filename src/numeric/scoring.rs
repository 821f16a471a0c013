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
}

/// Averages the token scores of the layers and sums the scan up.
pub fn scan_scores(layers: &[Vec<Option<f32>>]) -> ScanScores {
    let n_tokens = layers.first().map_or(0, Vec::len);
    let layer_mean = |token: usize| {
        let sum: Option<f64> = layers.iter().map(|scores| scores[token].map(f64::from)).sum();
        sum.map(|sum| (sum / layers.len() as f64) as f32)
    };
    let scores: Vec<Option<f32>> = (0..n_tokens).map(layer_mean).collect();
    let n_unmatched = scores.iter().filter(|score| score.is_none()).count();
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
    }
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

/// A map threshold that needs no labels (ours; the paper picks its threshold on the labels): the
/// value that a share `false_positives` of the tokens of unsuspicious scans exceeds.
///
/// Unsuspicious are those of `others` in the lower half by `top1_mean`. Each was scored without
/// itself, so these are leave-one-out scores. The quantile is interpolated linearly. Infinite
/// (nothing is marked) when there is no other scan.
pub fn label_free_threshold(others: &[&ScanScores], false_positives: Fraction) -> f32 {
    let mut ranked: Vec<&ScanScores> = others.to_vec();
    ranked.sort_by(|a, b| a.top1_mean.total_cmp(&b.top1_mean));
    ranked.truncate(others.len().div_ceil(2));
    let mut pool: Vec<f32> = ranked.iter().flat_map(|scan| scan.tokens.iter().copied()).collect();
    if pool.is_empty() {
        return f32::INFINITY;
    }
    let position = (pool.len() - 1) as f64 * (1.0 - false_positives.0);
    let (_, at, above) = pool.select_nth_unstable_by(position.floor() as usize, f32::total_cmp);
    let next = above.iter().copied().min_by(f32::total_cmp).unwrap_or(*at);
    (f64::from(*at) + position.fract() * f64::from(next - *at)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn the_threshold_rests_on_the_unsuspicious_half() {
        let scan = |low: f32| scan_scores(&[(0..101).map(|i| Some(low + i as f32)).collect()]);
        let (quiet, loud) = (scan(0.0), scan(1000.0));
        assert_eq!(label_free_threshold(&[&loud, &quiet], fraction(0.01)), 99.0);
        assert_eq!(label_free_threshold(&[&loud, &quiet], fraction(0.1)), 90.0);
        assert_eq!(label_free_threshold(&[], fraction(0.01)), f32::INFINITY);
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
