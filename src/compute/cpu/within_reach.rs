//! Finds the nearest tokens of another scan within a few cells.
//!
//! Neighbours along x are also neighbours in memory, and so are their candidates in each line of
//! cells around them. Both are processed in small groups, so that each token is read once for
//! several products.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    dots::{LEFT, Products, RIGHT, dots},
    search::{NO_TOKEN, Nearest, QueryToken, Slots, distances_to, keep_in_reach},
    tokens::ReadyTokens,
};
use crate::numeric::{geometry::Shape3, scoring::PairColumns, token::cells_per_patch};

/// Compares each token with the tokens of the other scan that are at most `reach` patches away
/// along each axis. Every product is computed once and counts for both directions. If two tokens
/// are equally near, within the rounding of products in f32 (some 1e-5 of their squared lengths),
/// either may be chosen.
pub(super) fn within_reach(
    first: &ReadyTokens<'_>,
    second: &ReadyTokens<'_>,
    reach: usize,
) -> PairColumns {
    let reach = cells_per_patch(first.grid.shape()).map(|n| n * reach);
    let (rows, columns) = Search { first, second, reach }.run();
    let (first_to_second, second_to_first) =
        rayon::join(|| exact(&rows, first, second), || exact(&columns, second, first));
    PairColumns { first_to_second, second_to_first }
}

/// The nearest token of the slots: the smallest squared distance by products, then the smallest
/// index.
fn nearest_of(slots: &Slots<RIGHT>) -> u32 {
    let each = slots.squared.iter().zip(&slots.token);
    let nearest = each.min_by(|a, b| a.0.total_cmp(b.0).then(a.1.cmp(b.1)));
    nearest.map_or(NO_TOKEN, |(_, &token)| token)
}

/// The distances to the tokens in `nearest`. They are computed from the differences, because |a|^2
/// + |b|^2 - 2ab is wrong for close tokens through cancellation.
fn exact(nearest: &[u32], own: &ReadyTokens<'_>, other: &ReadyTokens<'_>) -> Vec<f32> {
    let mut distances = vec![f32::INFINITY; nearest.len()];
    let width = own.grid.channels();
    let rows = own.values.par_chunks(ROWS * width.max(1)).zip(nearest.par_chunks(ROWS));
    distances.par_chunks_mut(ROWS).zip(rows).for_each(|(distances, (rows, nearest))| {
        distances_to(rows, other.values, nearest, width, distances);
    });
    distances
}

/// Rows per task, for steps that treat each token alone.
const ROWS: usize = 256;

struct Search<'a> {
    first: &'a ReadyTokens<'a>,
    second: &'a ReadyTokens<'a>,
    reach: [usize; 3],
}

impl Search<'_> {
    /// For each token of either scan, the nearest token of the other.
    fn run(&self) -> (Vec<u32>, Vec<u32>) {
        let n_lines = self.first.places.n_lines();
        let [n_first, n_second] = [self.first, self.second].map(|tokens| tokens.grid.n_tokens());
        // The parts are few and large, because each has its own minima for the whole second scan.
        let part = n_first.div_ceil(4 * rayon::current_num_threads()).max(1);
        let mut parts: Vec<Range<usize>> = Vec::new();
        for line in 0..n_lines {
            match parts.last_mut() {
                Some(last) if self.n_tokens(last) < part => last.end = line + 1,
                _ => parts.push(line..line + 1),
            }
        }
        let found: Vec<_> = parts.into_par_iter().map(|lines| self.search(lines)).collect();
        let mut rows = Vec::with_capacity(n_first);
        let mut columns = Nearest::none(n_second + RIGHT);
        for (part_rows, part_columns) in found {
            rows.extend(part_rows);
            columns.merge(&part_columns);
        }
        columns.token.truncate(n_second);
        (rows, columns.token)
    }

    /// Number of tokens of the first scan in some lines.
    fn n_tokens(&self, lines: &Range<usize>) -> usize {
        let places = self.first.places;
        places.line(lines.end - 1).end - places.line(lines.start).start
    }

    /// Searches some lines of the first scan. Returns the nearest token for each of their tokens,
    /// and for each token of the second scan the nearest token in these lines.
    fn search(&self, lines: Range<usize>) -> (Vec<u32>, Nearest) {
        let mut rows = Vec::new();
        let mut columns = Nearest::none(self.second.grid.n_tokens() + RIGHT);
        for line in lines {
            let tokens = self.first.places.line(line);
            for start in tokens.clone().step_by(LEFT) {
                let block = start..tokens.end.min(start + LEFT);
                let nearest = self.search_around(line, block.clone(), &mut columns);
                rows.extend(nearest.iter().take(block.len()).map(nearest_of));
            }
        }
        (rows, columns)
    }

    fn search_around(
        &self,
        line: usize,
        block: Range<usize>,
        columns: &mut Nearest,
    ) -> [Slots<RIGHT>; LEFT] {
        let Shape3([_, ny, nz]) = self.first.grid.shape();
        let [own, others] = [self.first.places, self.second.places];
        let [reach_x, reach_y, reach_z] = self.reach;
        let x = own.x[block.start] - reach_x as i32..own.x[block.end - 1] + reach_x as i32 + 1;
        let around = Shape3([1, ny, nz]).around([0, line % ny, line / ny], [0, reach_y, reach_z]);
        let mut nearest = [Slots::NONE; LEFT];
        let mut products = Products::default();
        for [_, y, z] in around {
            let candidates = others.within(y + ny * z, x.clone());
            for start in candidates.clone().step_by(RIGHT) {
                let n = RIGHT.min(candidates.end - start);
                let rows = [self.first.rows(block.clone()), self.second.rows(start..start + n)];
                dots(rows[0], rows[1], self.first.grid.channels(), &mut products);
                let others = others.group(start, n);
                for ((row, products), nearest) in block.clone().zip(&products).zip(&mut nearest) {
                    let own = QueryToken { token: row as u32, x: own.x[row], norm: own.norms[row] };
                    keep_in_reach(products, own, &others, reach_x as i32, nearest, columns);
                }
            }
        }
        nearest
    }
}
