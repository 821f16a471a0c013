//! Nearest distances between the tokens of two scans on the CPU.

use rayon::prelude::*;

use super::{
    encoder::{Matrix, product},
    kernels::{distances_to, nearest_of, squared_lengths},
};
use crate::{
    domain::{PairDistances, error::DeviceError},
    numeric::{
        scoring::{PairColumns, SearchReach},
        token::{TokenGrid, cells_per_patch},
    },
};

/// Exact distances on all cores. Mirrored pairs give mirrored columns, to the last bit.
#[derive(Debug, Default)]
pub struct CpuDistances {
    /// Single-precision copies of the two scans, kept for the next pair: fresh memory took as long as
    /// the search in it.
    scratch: [Vec<f32>; 2],
}

impl CpuDistances {
    /// Nothing to set up.
    pub fn new() -> Self {
        Self::default()
    }
}

impl PairDistances for CpuDistances {
    fn nearest(
        &mut self,
        first: &TokenGrid,
        second: &TokenGrid,
        reach: SearchReach,
    ) -> Result<PairColumns, DeviceError> {
        assert_eq!(first.channels(), second.channels(), "tokens of one method");
        assert_eq!(first.shape(), second.shape(), "tokens of one method");
        let [one, other] = &mut self.scratch;
        let (first, second) = (Tokens::of(first, one), Tokens::of(second, other));
        Ok(match reach {
            SearchReach::WholeVolume => whole_volume(&first, &second),
            SearchReach::Patches(reach) => within(&first, &second, reach.get()),
        })
    }
}

/// The tokens of one scan in single precision.
struct Tokens<'a> {
    grid: &'a TokenGrid,
    values: &'a [f32],
}

impl<'a> Tokens<'a> {
    fn of(grid: &'a TokenGrid, scratch: &'a mut Vec<f32>) -> Self {
        scratch.resize(grid.features().len(), 0.0);
        half::slice::HalfFloatSliceExt::convert_to_f32_slice(grid.features(), scratch);
        Self { grid, values: scratch }
    }

    fn row(&self, token: usize) -> &[f32] {
        let channels = self.grid.channels();
        &self.values[token * channels..(token + 1) * channels]
    }

    /// Squared lengths.
    fn norms(&self) -> Vec<f32> {
        let mut norms = vec![0.0; self.grid.n_tokens()];
        let width = self.grid.channels();
        let rows = self.values.par_chunks(ROWS * width.max(1));
        let chunks = norms.par_chunks_mut(ROWS).zip(rows);
        chunks.for_each(|(norms, rows)| squared_lengths(rows, width, norms));
        norms
    }
}

/// Each token against the tokens of the other scan at most `reach` patches away along each axis. Every
/// distance is taken once and counts for both directions.
fn within(first: &Tokens<'_>, second: &Tokens<'_>, reach: usize) -> PairColumns {
    let shape = first.grid.shape();
    let reach = cells_per_patch(shape).map(|n| n * reach);
    let token_of_cell = second.grid.foreground().token_of_cell();
    let candidates_of = |token: usize, candidates: &mut Vec<u32>| {
        let cell = shape.voxel(first.grid.cells()[token] as usize);
        candidates.clear();
        let around = shape.around(cell, reach);
        candidates.extend(around.filter_map(|cell| token_of_cell[shape.offset(cell)]));
    };
    let (n_first, n_second) = (first.grid.n_tokens(), second.grid.n_tokens());
    let mut to_second = vec![f32::INFINITY; n_first];
    // A few large parts: each has minima of its own for the whole second scan.
    let part = n_first.div_ceil(4 * rayon::current_num_threads()).max(1);
    let nearest_of_part = |(index, nearest): (usize, &mut [f32])| {
        let (mut to_first, mut candidates) = (vec![f32::INFINITY; n_second], Vec::new());
        for (offset, nearest) in nearest.iter_mut().enumerate() {
            let token = index * part + offset;
            candidates_of(token, &mut candidates);
            nearest_of(first.row(token), second.values, &candidates, nearest, &mut to_first);
        }
        to_first
    };
    let to_first = to_second
        .par_chunks_mut(part)
        .enumerate()
        .map(nearest_of_part)
        .reduce(|| vec![f32::INFINITY; n_second], smaller_of);
    let root = |squared: Vec<f32>| squared.into_iter().map(f32::sqrt).collect();
    PairColumns { first_to_second: root(to_second), second_to_first: root(to_first) }
}

fn smaller_of(mut one: Vec<f32>, other: Vec<f32>) -> Vec<f32> {
    one.iter_mut().zip(other).for_each(|(one, other)| *one = one.min(other));
    one
}

/// Rows per task of what is done for each token alone.
const ROWS: usize = 256;

/// Rows of the first scan per block of products: 128 x 2,000 products stay in the second-level
/// cache.
const BLOCK: usize = 128;

/// The best candidate so far: squared distance by products, and its index.
type Best = (f32, u32);

const NONE: Best = (f32::INFINITY, u32::MAX);

/// Every token against every other. Products find the nearest token; its distance is then taken
/// from the differences, because |a|^2 + |b|^2 - 2ab loses close ones to cancellation.
fn whole_volume(first: &Tokens<'_>, second: &Tokens<'_>) -> PairColumns {
    let (first_norms, second_norms) = (first.norms(), second.norms());
    let blocks: Vec<(Vec<Best>, Vec<Best>)> = first_norms
        .par_chunks(BLOCK)
        .enumerate()
        .map(|(block, norms)| block_minima(block * BLOCK, norms, &second_norms, first, second))
        .collect();
    let mut rows = Vec::with_capacity(first_norms.len());
    let mut columns = vec![NONE; second_norms.len()];
    for (block_rows, block_columns) in blocks {
        rows.extend(block_rows);
        for (best, candidate) in columns.iter_mut().zip(block_columns) {
            if candidate.0 < best.0 {
                *best = candidate;
            }
        }
    }
    PairColumns {
        first_to_second: exact(&rows, first, second),
        second_to_first: exact(&columns, second, first),
    }
}

fn block_minima(
    start: usize,
    norms: &[f32],
    other_norms: &[f32],
    first: &Tokens<'_>,
    second: &Tokens<'_>,
) -> (Vec<Best>, Vec<Best>) {
    let (channels, n_others) = (first.grid.channels(), other_norms.len());
    let mut products = vec![0.0; norms.len() * n_others];
    let rows = &first.values[start * channels..(start + norms.len()) * channels];
    product(
        Matrix {
            data: rows,
            rows: norms.len(),
            columns: channels,
            row_stride: channels,
            column_stride: 1,
        },
        Matrix {
            data: second.values,
            rows: channels,
            columns: n_others,
            row_stride: 1,
            column_stride: channels,
        },
        -2.0,
        &mut products,
        n_others,
    );
    let mut columns = vec![NONE; n_others];
    let mut row_minima = Vec::with_capacity(norms.len());
    for (index, (row, norm)) in products.chunks_exact(n_others.max(1)).zip(norms).enumerate() {
        let mut best = NONE;
        for (other, ((value, other_norm), column)) in
            row.iter().zip(other_norms).zip(&mut columns).enumerate()
        {
            let squared = value + norm + other_norm;
            if squared < best.0 {
                best = (squared, other as u32);
            }
            if squared < column.0 {
                *column = (squared, (start + index) as u32);
            }
        }
        row_minima.push(best);
    }
    row_minima.resize(norms.len(), NONE);
    (row_minima, columns)
}

/// The distances to the winners, from the differences.
fn exact(winners: &[Best], own: &Tokens<'_>, other: &Tokens<'_>) -> Vec<f32> {
    let mut distances = vec![f32::INFINITY; winners.len()];
    let width = own.grid.channels();
    let rows = own.values.par_chunks(ROWS * width.max(1)).zip(winners.par_chunks(ROWS));
    distances.par_chunks_mut(ROWS).zip(rows).for_each(|(distances, (rows, winners))| {
        let nearest: Vec<u32> = winners.iter().map(|&(_, winner)| winner).collect();
        distances_to(rows, other.values, &nearest, width, distances);
    });
    distances
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use half::f16;

    use super::*;
    use crate::numeric::{geometry::Shape3, projection::Normal};

    fn tokens(seed: u64, side: usize, channels: usize, keep: impl Fn(u32) -> bool) -> TokenGrid {
        tokens_of(seed, Shape3::cube(side), channels, keep)
    }

    fn tokens_of(
        seed: u64,
        shape: Shape3,
        channels: usize,
        keep: impl Fn(u32) -> bool,
    ) -> TokenGrid {
        let cells: Vec<u32> = (0..shape.n_voxels() as u32).filter(|&c| keep(c)).collect();
        let mut normal = Normal::new(seed);
        let features = (0..cells.len() * channels).map(|_| f16::from_f64(normal.next())).collect();
        TokenGrid::new(shape, channels, cells, features).unwrap()
    }

    /// Straight from the definition, in double precision.
    fn brute_force(own: &TokenGrid, other: &TokenGrid, reach: [usize; 3]) -> Vec<f64> {
        let (shape, width) = (own.shape(), own.channels());
        let row = |grid: &TokenGrid, token: usize| -> Vec<f64> {
            grid.features()[token * width..(token + 1) * width].iter().map(|f| f.to_f64()).collect()
        };
        let near = |a: u32, b: u32| {
            let (a, b) = (shape.voxel(a as usize), shape.voxel(b as usize));
            (0..3).all(|axis| a[axis].abs_diff(b[axis]) <= reach[axis])
        };
        (0..own.n_tokens())
            .map(|token| {
                (0..other.n_tokens())
                    .filter(|&o| near(own.cells()[token], other.cells()[o]))
                    .map(|o| {
                        let (a, b) = (row(own, token), row(other, o));
                        a.iter().zip(&b).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt()
                    })
                    .fold(f64::INFINITY, f64::min)
            })
            .collect()
    }

    fn assert_close(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            // Single precision over some 40 terms.
            let close = f64::from(*f) == *e || (f64::from(*f) - e).abs() < 1e-5 * e;
            assert!(close, "{f} instead of {e}");
        }
    }

    #[test]
    fn distances_are_those_of_the_definition_for_any_reach() {
        let a = tokens(1, 6, 37, |c| c % 3 != 0);
        let b = tokens(2, 6, 37, |c| c % 5 == 1);
        for (reach, cells) in [(6, 0), (1, 1), (2, 2)] {
            let search =
                NonZeroUsize::new(cells).map_or(SearchReach::WholeVolume, SearchReach::Patches);
            let found = CpuDistances::new().nearest(&a, &b, search).unwrap();
            assert_close(&found.first_to_second, &brute_force(&a, &b, [reach; 3]));
            assert_close(&found.second_to_first, &brute_force(&b, &a, [reach; 3]));
        }
    }

    #[test]
    fn the_reach_is_that_of_a_patch_along_the_finer_axis_too() {
        let shape = Shape3([4, 8, 4]);
        let a = tokens_of(7, shape, 24, |c| c % 3 != 0);
        let b = tokens_of(8, shape, 24, |c| c % 5 < 2);
        let reach = SearchReach::Patches(NonZeroUsize::MIN);
        let found = CpuDistances::new().nearest(&a, &b, reach).unwrap();
        assert_close(&found.first_to_second, &brute_force(&a, &b, [1, 2, 1]));
        assert_close(&found.second_to_first, &brute_force(&b, &a, [1, 2, 1]));
    }

    #[test]
    fn a_copied_scan_gets_distance_zero_and_mirrored_pairs_are_equal() {
        let (a, b) = (tokens(3, 6, 48, |c| c != 7), tokens(4, 6, 48, |c| c > 100));
        for reach in [SearchReach::WholeVolume, SearchReach::Patches(NonZeroUsize::MIN)] {
            let own = CpuDistances::new().nearest(&a, &a, reach).unwrap();
            assert!(own.first_to_second.iter().all(|&d| d == 0.0));
            let there = CpuDistances::new().nearest(&a, &b, reach).unwrap();
            let back = CpuDistances::new().nearest(&b, &a, reach).unwrap();
            assert_eq!(there.first_to_second, back.second_to_first);
            assert_eq!(there.second_to_first, back.first_to_second);
        }
    }

    #[test]
    fn a_token_out_of_reach_of_all_others_is_infinitely_far() {
        let (a, b) = (tokens(5, 4, 8, |c| c == 0), tokens(6, 4, 8, |c| c == 63));
        let found =
            CpuDistances::new().nearest(&a, &b, SearchReach::Patches(NonZeroUsize::MIN)).unwrap();
        assert_eq!(found.first_to_second, [f32::INFINITY]);
    }
}
