//! The nearest tokens of another scan among those a few cells away.
//!
//! Tokens that follow one another along x lie one after the other in memory, and so do their candidates in each
//! line of cells around them: a few by a few, each token is read once for several products.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    distances::Tokens,
    dots::{LEFT, Products, RIGHT, dots},
    kernels::{Group, NO_TOKEN, Nearest, Own, Slots, distances_to, keep_in_reach, squared_lengths},
};
use crate::numeric::{geometry::Shape3, scoring::PairColumns, token::cells_per_patch};

/// Each token against the tokens of the other scan at most `reach` patches away along each axis. Every
/// product is taken once and counts for both directions.
pub(super) fn within_reach(first: &Tokens<'_>, second: &Tokens<'_>, reach: usize) -> PairColumns {
    let search = Search {
        first,
        second,
        reach: cells_per_patch(first.grid.shape()).map(|n| n * reach),
        places: [first, second].map(Places::of),
    };
    let (rows, columns) = search.run();
    PairColumns {
        first_to_second: exact(&rows, first, second),
        second_to_first: exact(&columns, second, first),
    }
}

/// Where the tokens of a scan are, with room for [`RIGHT`] more at the end.
struct Places {
    /// Number of the first token of each line of cells along x, and the number of tokens.
    lines: Vec<usize>,
    /// Place along x.
    x: Vec<i32>,
    /// Squared lengths.
    norms: Vec<f32>,
}

impl Places {
    fn of(tokens: &Tokens<'_>) -> Self {
        let Shape3([nx, ny, nz]) = tokens.grid.shape();
        let cells = tokens.grid.cells();
        let line_starts = (0..=ny * nz).map(|line| line * nx);
        let lines = line_starts.map(|start| cells.partition_point(|&cell| (cell as usize) < start));
        let mut x: Vec<i32> = cells.iter().map(|&cell| (cell as usize % nx) as i32).collect();
        x.resize(cells.len() + RIGHT, 0);
        let mut norms = vec![0.0; cells.len() + RIGHT];
        squared_lengths(tokens.values, tokens.grid.channels(), &mut norms);
        Self { lines: lines.collect(), x, norms }
    }

    /// What is needed of [`RIGHT`] tokens, of which `n` count.
    fn group(&self, start: usize, n: usize) -> Group<'_> {
        Group {
            start,
            n,
            x: self.x[start..].first_chunk().expect("room at the end"),
            norms: self.norms[start..].first_chunk().expect("room at the end"),
        }
    }

    /// The tokens of a line that lie at `x`.
    fn within(&self, line: usize, x: Range<i32>) -> Range<usize> {
        let tokens = self.lines[line]..self.lines[line + 1];
        let places = &self.x[tokens.clone()];
        let before = |limit: i32| tokens.start + places.partition_point(|&place| place < limit);
        before(x.start)..before(x.end)
    }
}

/// Chosen in the order of squared distances by products, then of tokens.
fn nearest_of(slots: &Slots<RIGHT>) -> u32 {
    let each = slots.squared.iter().zip(&slots.token);
    let nearest = each.min_by(|a, b| a.0.total_cmp(b.0).then(a.1.cmp(b.1)));
    nearest.map_or(NO_TOKEN, |(_, &token)| token)
}

/// The distances to the tokens named, from the differences, because |a|^2 + |b|^2 - 2ab loses close ones to
/// cancellation.
fn exact(nearest: &[u32], own: &Tokens<'_>, other: &Tokens<'_>) -> Vec<f32> {
    let mut distances = vec![f32::INFINITY; nearest.len()];
    let width = own.grid.channels();
    let rows = own.values.par_chunks(ROWS * width.max(1)).zip(nearest.par_chunks(ROWS));
    distances.par_chunks_mut(ROWS).zip(rows).for_each(|(distances, (rows, nearest))| {
        distances_to(rows, other.values, nearest, width, distances);
    });
    distances
}

/// Rows per task of what is done for each token alone.
const ROWS: usize = 256;

struct Search<'a> {
    first: &'a Tokens<'a>,
    second: &'a Tokens<'a>,
    reach: [usize; 3],
    places: [Places; 2],
}

impl Search<'_> {
    /// For each token of either scan the nearest of the other.
    fn run(&self) -> (Vec<u32>, Vec<u32>) {
        let n_lines = self.places[0].lines.len() - 1;
        let [n_first, n_second] = [self.first, self.second].map(|tokens| tokens.grid.n_tokens());
        // A few large parts: each has minima of its own for the whole second scan.
        let part = n_first.div_ceil(4 * rayon::current_num_threads()).max(1);
        let mut parts: Vec<Range<usize>> = Vec::new();
        for line in 0..n_lines {
            let starts_part = |range: &Range<usize>| {
                self.places[0].lines[range.end] - self.places[0].lines[range.start] >= part
            };
            match parts.last_mut() {
                Some(last) if !starts_part(last) => last.end = line + 1,
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

    /// The same for some lines of the first scan: the nearest of each of their tokens, and for each token of
    /// the second scan the nearest of theirs.
    fn search(&self, lines: Range<usize>) -> (Vec<u32>, Nearest) {
        let mut rows = Vec::new();
        let mut columns = Nearest::none(self.second.grid.n_tokens() + RIGHT);
        for line in lines {
            let tokens = self.places[0].lines[line]..self.places[0].lines[line + 1];
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
        let [own, others] = &self.places;
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
                    let own = Own { token: row as u32, x: own.x[row], norm: own.norms[row] };
                    keep_in_reach(products, own, &others, reach_x as i32, nearest, columns);
                }
            }
        }
        nearest
    }
}
