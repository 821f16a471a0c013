//! Finds the nearest tokens of another scan, anywhere in the volume.

use std::{iter::StepBy, ops::Range};

use rayon::prelude::*;

use super::{
    product::{Element, Kernel, MAX_ROWS, Panels, Rows, WIDTH, multiply_panels},
    search::{Slots, keep_nearest, nearest_among, round_row},
    tokens::ReadyTokens,
};
use crate::numeric::scoring::PairColumns;

/// Most parts of the columns that are searched in parallel. Each part has slots for all rows: 50 MB
/// for 4,096 rows.
const MAX_PARTS: usize = 32;

/// The factors of the products and the buffers for the search, kept for the next pair.
#[derive(Default)]
pub(super) struct Factors<E> {
    /// Tokens of the first scan, `[n_tokens, padded channels]`, and the squared length of each row.
    rows: Vec<E>,
    row_norms: Vec<f32>,
    /// Tokens of the second scan, as rows and in panels.
    columns: Vec<E>,
    panels: Panels<E>,
    /// Squared lengths of the columns; infinite for a missing column of a panel.
    column_norms: Vec<f32>,
    /// The candidates of each row, for each part of the columns.
    slots: Vec<Slots<WIDTH>>,
}

/// Compares every token with every token of the other scan. Products find candidates. Their
/// distances are then computed from the differences in f32, because |a|^2 + |b|^2 - 2ab is wrong
/// for close tokens through cancellation, even more in bf16.
pub(super) fn whole_volume<E: Element>(
    kernel: Kernel<E>,
    first: &ReadyTokens<'_>,
    second: &ReadyTokens<'_>,
    factors: &mut Factors<E>,
) -> PairColumns {
    let channels = first.grid.channels();
    let stride = E::padded(channels);
    let Factors { rows, row_norms, columns, panels, column_norms, slots } = factors;
    let set_panels = || {
        round(second, columns, column_norms);
        let columns = Rows { values: &columns[..], n: second.grid.n_tokens(), stride };
        panels.set_columns(columns, channels);
        column_norms.resize(panels.n_panels() * WIDTH, f32::INFINITY);
    };
    rayon::join(set_panels, || round(first, rows, row_norms));
    let rows = Rows { values: &rows[..], n: first.grid.n_tokens(), stride };
    let search = Search { kernel, first, second, rows, row_norms, panels, column_norms };
    search.run(slots)
}

/// Rounds the tokens to the format of the products, pads their rows with zeros, and computes the
/// squared lengths of the rounded tokens. With these lengths, the distances are those of the
/// rounded tokens, without a further error.
fn round<E: Element>(tokens: &ReadyTokens<'_>, rows: &mut Vec<E>, norms: &mut Vec<f32>) {
    let channels = tokens.grid.channels();
    let stride = E::padded(channels);
    let n = tokens.grid.n_tokens();
    rows.clear();
    rows.resize(n * stride, E::default());
    norms.resize(n, 0.0);
    let rounded = rows.par_chunks_exact_mut(stride).zip(&mut *norms);
    rounded
        .zip(tokens.values.par_chunks_exact(channels))
        .with_min_len(256)
        .for_each(|((row, norm), values)| round_row(values, row, norm));
}

struct Search<'a, E> {
    kernel: Kernel<E>,
    first: &'a ReadyTokens<'a>,
    second: &'a ReadyTokens<'a>,
    rows: Rows<'a, E>,
    row_norms: &'a [f32],
    panels: &'a Panels<E>,
    column_norms: &'a [f32],
}

impl<E: Element> Search<'_, E> {
    /// Finds the distances of both scans. `slots` is the buffer for the rows' candidates.
    fn run(&self, slots: &mut Vec<Slots<WIDTH>>) -> PairColumns {
        let (n_rows, n_panels) = (self.rows.n, self.panels.n_panels());
        if n_rows == 0 {
            return PairColumns::unmatched(0, self.n_columns());
        }
        let part = n_panels.div_ceil(MAX_PARTS.min(2 * rayon::current_num_threads())).max(1);
        let parts: Vec<Range<usize>> =
            (0..n_panels).step_by(part).map(|start| start..n_panels.min(start + part)).collect();
        slots.resize(parts.len() * n_rows, Slots::NONE);
        let searched = parts.par_iter().zip(slots.par_chunks_exact_mut(n_rows));
        let columns: Vec<Vec<f32>> =
            searched.map(|(panels, rows)| self.search(panels.clone(), rows)).collect();
        // All parts of a row are evaluated together, because most hold no candidate that is near
        // enough.
        let rows = (0..n_rows).into_par_iter().with_min_len(64);
        let first_to_second = rows.map(|row| self.exact_row(row, &parts, slots)).collect();
        PairColumns { first_to_second, second_to_first: columns.concat() }
    }

    /// Finds the candidates of the rows among the columns of these panels. Returns the distances of
    /// the columns to all rows.
    fn search(&self, panels: Range<usize>, rows: &mut [Slots<WIDTH>]) -> Vec<f32> {
        rows.fill(Slots::NONE);
        let mut distances = Vec::new();
        for panel in panels {
            let mut slots = [Slots::NONE; MAX_ROWS];
            let norms = self.column_norms[panel * WIDTH..].first_chunk().expect("whole panels");
            multiply_panels(
                self.kernel,
                self.rows,
                self.panels,
                panel..panel + 1,
                |place, tile| {
                    keep_nearest(tile, place, self.row_norms, norms, rows, &mut slots);
                },
            );
            let columns = panel * WIDTH..self.n_columns().min((panel + 1) * WIDTH);
            distances.extend(columns.map(|column| self.exact_column(column, &slots)));
        }
        distances
    }

    fn n_columns(&self) -> usize {
        self.second.grid.n_tokens()
    }

    fn exact_row(&self, row: usize, parts: &[Range<usize>], slots: &[Slots<WIDTH>]) -> f32 {
        let found = parts.iter().zip(slots[row..].iter().step_by(self.rows.n));
        let slots = found.flat_map(|(panels, slots)| {
            let (start, end) = (panels.start * WIDTH, self.n_columns().min(panels.end * WIDTH));
            (0..WIDTH).map(move |lane| Kept::new(slots, lane, (start + lane..end).step_by(WIDTH)))
        });
        exact::<E>(self.first.row(row), self.row_norms[row], self.second, slots)
    }

    fn exact_column(&self, column: usize, slots: &[Slots<WIDTH>]) -> f32 {
        let step = self.kernel.rows;
        let slots = slots[..step].iter().enumerate().map(|(place, slots)| {
            Kept::new(slots, column % WIDTH, (place..self.rows.n).step_by(step))
        });
        exact::<E>(self.second.row(column), self.column_norms[column], self.first, slots)
    }
}

/// The candidates of one slot.
struct Kept {
    squared: f32,
    token: u32,
    second: f32,
    members: StepBy<Range<usize>>,
}

impl Kept {
    fn new(slots: &Slots<WIDTH>, lane: usize, members: StepBy<Range<usize>>) -> Self {
        let Slots { squared, token, second } = slots;
        Self { squared: squared[lane], token: token[lane], second: second[lane], members }
    }
}

/// The distance to the nearest member of the slots, a token of `other`. It checks all members that
/// only rounding may have put behind the first.
fn exact<E: Element>(
    token: &[f32],
    norm: f32,
    other: &ReadyTokens<'_>,
    slots: impl Iterator<Item = Kept> + Clone,
) -> f32 {
    let smallest = slots.clone().map(|slot| slot.squared).fold(f32::INFINITY, f32::min);
    if smallest == f32::INFINITY {
        return f32::INFINITY;
    }
    let bound = smallest + margin::<E>(smallest, norm, token.len());
    let mut nearest = f32::INFINITY;
    for slot in slots.filter(|slot| slot.squared <= bound) {
        if slot.second > bound {
            nearest_among(token, other.values, &[slot.token], &mut nearest);
        } else {
            // A third member of the slot may be as near.
            let members: Vec<u32> = slot.members.map(|member| member as u32).collect();
            nearest_among(token, other.values, &members, &mut nearest);
        }
    }
    nearest.sqrt()
}

/// The largest error of a squared distance by products, with a large reserve in practice.
///
/// The first term is for the rounding of the factors, by up to a unit each in random directions.
/// Over `channels` it changes a squared distance by about 1.2 distance * length * unit /
/// sqrt(channels), an eighth of this term. The second term is for the sums in f32, whose error
/// grows with the root of their number (measured: a tenth of this term). If few channels hold
/// nearly all of the length, the reserve is smaller.
fn margin<E: Element>(squared: f32, norm: f32, channels: usize) -> f32 {
    let (distance, channels) = (squared.max(0.0).sqrt(), channels as f32);
    // The length of the other token is at most this.
    let length = norm.sqrt() + distance;
    10.0 * E::UNIT * distance * length / channels.sqrt()
        + 4.0 * channels.sqrt() * f32::UNIT * length * length
}
