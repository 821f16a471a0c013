//! The mean of the smallest distances of every token. Scoring a window spends most of its time
//! here.

use rayon::prelude::*;

/// Number of tokens that are processed together.
const ABREAST: usize = 16;

/// One number for each of these tokens.
type Lanes<T> = [T; ABREAST];

/// For each of `n_tokens` tokens, the mean of its `keep` smallest finite distances, or of all if
/// there are fewer; `None` if there is none. `columns` hold one distance per token, none of them
/// negative.
///
/// The order of the columns does not change the result, to the last bit.
pub(super) fn means_of_smallest(
    columns: &[Vec<f32>],
    n_tokens: usize,
    keep: usize,
) -> Vec<Option<f32>> {
    let mut means = vec![None; n_tokens];
    let groups = means.par_chunks_mut(ABREAST).enumerate();
    groups.for_each_init(Vec::new, |rows, (group, means)| {
        rows.clear();
        rows.extend(columns.iter().map(|column| lanes_of(&column[group * ABREAST..])));
        means.copy_from_slice(&means_of_group(rows, keep)[..means.len()]);
    });
    means
}

/// The same for one group of tokens, with AVX2 if the processor has it. The results are equal with
/// and without it, because counts and exact sums are.
fn means_of_group(rows: &[Lanes<f32>], keep: usize) -> Lanes<Option<f32>> {
    #[inline(always)]
    fn portable(rows: &[Lanes<f32>], keep: usize) -> Lanes<Option<f32>> {
        Smallest::among(rows, keep).means(rows)
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2(rows: &[Lanes<f32>], keep: usize) -> Lanes<Option<f32>> {
            portable(rows, keep)
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { avx2(rows, keep) };
        }
    }
    portable(rows, keep)
}

/// The first distances of a column, infinity beyond its end.
fn lanes_of(column: &[f32]) -> Lanes<f32> {
    let mut lanes = [f32::INFINITY; ABREAST];
    for (lane, distance) in lanes.iter_mut().zip(column) {
        // The bits of -0 are not in the order of the numbers.
        *lane = distance.abs();
    }
    lanes
}

/// Separates the smallest distances of each token from the others. Counts are `f32` like the
/// distances, so that the compiler uses one vector per row.
struct Smallest {
    /// Number of smallest distances.
    n: Lanes<f32>,
    /// All distances below it belong to them ...
    limit: Lanes<f32>,
    /// ... and this is their number. The rest of them, if any, equal the limit.
    n_below: Lanes<f32>,
}

impl Smallest {
    /// Halves the interval of each limit until the limit separates the smallest from the others,
    /// for all tokens at once.
    #[inline(always)]
    fn among(rows: &[Lanes<f32>], keep: usize) -> Self {
        let (mut low, mut high, n_finite) = range(rows);
        let n = n_finite.map(|n_finite| n_finite.min(keep as f32));

        // Fewer than `n` are below `low`, at least `n` below `high`.
        let (mut n_low, mut n_high) = ([0.0; ABREAST], n_finite);
        let is_parted = |n_high: &Lanes<f32>, lane: usize| n_high[lane] <= n[lane];

        while (0..ABREAST)
            .any(|lane| !is_parted(&n_high, lane) && high[lane].next_down() > low[lane])
        {
            let mut middle = low;
            for lane in 0..ABREAST {
                middle[lane] = halfway(low[lane], high[lane]);
            }
            let n_middle = n_below(rows, &middle);
            for lane in 0..ABREAST {
                let (end, n_end) = if n_middle[lane] < n[lane] {
                    (&mut low[lane], &mut n_low[lane])
                } else {
                    (&mut high[lane], &mut n_high[lane])
                };
                (*end, *n_end) = (middle[lane], n_middle[lane]);
            }
        }

        // If no limit separates them, several are equal to the last one that is kept, which is
        // `low`.
        let (mut limit, mut n_below) = (low, n_low);
        for lane in (0..ABREAST).filter(|&lane| is_parted(&n_high, lane)) {
            (limit[lane], n_below[lane]) = (high[lane], n[lane]);
        }

        Self { n, limit, n_below }
    }

    #[inline(always)]
    fn means(&self, rows: &[Lanes<f32>]) -> Lanes<Option<f32>> {
        let (mut sums, mut least) = ([0.0; ABREAST], [f32::INFINITY; ABREAST]);
        for row in rows {
            for lane in 0..ABREAST {
                let kept = if row[lane] < self.limit[lane] { row[lane] } else { 0.0 };
                sums[lane] += f64::from(kept);
                let counts = if kept > 0.0 { kept } else { f32::INFINITY };
                least[lane] = if counts < least[lane] { counts } else { least[lane] };
            }
        }

        std::array::from_fn(|lane| {
            let n = f64::from(self.n[lane]);
            let n_equal = n - f64::from(self.n_below[lane]);
            let mut least = f64::from(least[lane]);
            if n_equal > 0.0 {
                let equal = f64::from(self.limit[lane]);
                sums[lane] += n_equal * equal;
                least = if equal > 0.0 { least.min(equal) } else { least };
            }
            // All except 0 are multiples of the last bit of the least one, and this bit is at least
            // 2^-24 of it. A sum below 2^53 times that bit is exact in `f64`.
            if sums[lane] >= f64::from(1 << 29) * least {
                sums[lane] = self.sorted_sum(rows, lane);
            }
            (n > 0.0).then(|| (sums[lane] / n) as f32)
        })
    }

    /// The sum if it may be rounded, for example with a distance of nearly 0. It runs from the
    /// smallest to the largest, so that the order of the columns does not change the rounding.
    fn sorted_sum(&self, rows: &[Lanes<f32>], lane: usize) -> f64 {
        let mut kept: Vec<f32> = rows.iter().map(|row| row[lane]).collect();
        kept.sort_unstable_by(f32::total_cmp);
        kept[..self.n[lane] as usize].iter().copied().map(f64::from).sum()
    }
}

/// The middle one of the `f32` from `low` to `high`. They are not negative, so that their bits are
/// in order. `low` if there is none: a token without any distance.
fn halfway(low: f32, high: f32) -> f32 {
    f32::from_bits(low.to_bits() + high.to_bits().saturating_sub(low.to_bits()) / 2)
}

/// The least finite distance of each token, the number after the largest, and how many there are.
#[inline(always)]
fn range(rows: &[Lanes<f32>]) -> (Lanes<f32>, Lanes<f32>, Lanes<f32>) {
    let (mut least, mut most, mut n) = ([f32::INFINITY; ABREAST], [0.0; ABREAST], [0.0; ABREAST]);
    for row in rows {
        for lane in 0..ABREAST {
            let finite = if row[lane] < f32::INFINITY { row[lane] } else { 0.0 };
            least[lane] = if row[lane] < least[lane] { row[lane] } else { least[lane] };
            most[lane] = if finite > most[lane] { finite } else { most[lane] };
            n[lane] += if row[lane] < f32::INFINITY { 1.0 } else { 0.0 };
        }
    }
    (least, most.map(f32::next_up), n)
}

/// Number of distances of each token below its limit.
#[inline(always)]
fn n_below(rows: &[Lanes<f32>], limit: &Lanes<f32>) -> Lanes<f32> {
    let mut n = [0.0; ABREAST];
    for row in rows {
        for lane in 0..ABREAST {
            n[lane] += if row[lane] < limit[lane] { 1.0 } else { 0.0 };
        }
    }
    n
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Usual distances, repeated ones, and ones so small that a sum in `f64` is rounded.
    fn distance() -> impl Strategy<Value = f32> {
        prop_oneof![
            9 => 0.0_f32..2.0,
            2 => (0_u8..4).prop_map(|n| f32::from(n) / 8.0),
            1 => 0.0_f32..1e-12,
            1 => Just(-0.0),
            1 => Just(f32::INFINITY),
        ]
    }

    /// The definition, computed directly.
    fn mean_of_smallest(mut row: Vec<f32>, keep: usize) -> Option<f32> {
        row.retain(|distance| distance.is_finite());
        row.iter_mut().for_each(|distance| *distance = distance.abs());
        row.sort_by(f32::total_cmp);
        row.truncate(keep);
        let sum: f64 = row.iter().copied().map(f64::from).sum();
        (!row.is_empty()).then(|| (sum / row.len() as f64) as f32)
    }

    fn bits(means: &[Option<f32>]) -> Vec<Option<u32>> {
        means.iter().map(|mean| mean.map(f32::to_bits)).collect()
    }

    proptest! {
        #[test]
        fn means_are_those_of_the_sorted_rows_to_the_last_bit(
            mut columns in prop::collection::vec(prop::collection::vec(distance(), 35), 1..60),
            keep in 1_usize..70,
            turn in 0_usize..60,
        ) {
            let row = |token: usize| columns.iter().map(|column| column[token]).collect();
            let expected: Vec<_> = (0..35).map(|token| mean_of_smallest(row(token), keep)).collect();
            prop_assert_eq!(bits(&means_of_smallest(&columns, 35, keep)), bits(&expected));
            let middle = turn % columns.len();
            columns.rotate_left(middle);
            prop_assert_eq!(bits(&means_of_smallest(&columns, 35, keep)), bits(&expected));
        }
    }

    #[test]
    fn without_columns_or_tokens_there_is_nothing() {
        assert_eq!(means_of_smallest(&[], 2, 1), [None, None]);
        assert_eq!(means_of_smallest(&[vec![]], 0, 1), []);
    }
}
