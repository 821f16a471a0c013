//! The nearest tokens of another scan, wherever they lie in it.

use std::{iter::StepBy, ops::Range};

use rayon::prelude::*;

use super::{
    distances::Tokens,
    product::{Element, Kernel, MAX_ROWS, Panels, Rows, WIDTH, multiply_panels},
    search::{Slots, keep_nearest, nearest_among, round_row},
};
use crate::numeric::scoring::PairColumns;

/// The factors of the products, kept for the next pair.
#[derive(Default)]
pub(super) struct Factors<E> {
    /// Of the first scan, `[n_tokens, padded channels]`, and the squared length of each row.
    rows: Vec<E>,
    row_norms: Vec<f32>,
    /// Of the second, as rows and in panels.
    columns: Vec<E>,
    panels: Panels<E>,
    /// Infinite where a panel has no column.
    column_norms: Vec<f32>,
}

/// Every token against every other. Products name candidates; the distances are then taken from the
/// differences in f32, because |a|^2 + |b|^2 - 2ab loses close ones to cancellation, in bf16 the more.
pub(super) fn whole_volume<E: Element>(
    kernel: Kernel<E>,
    first: &Tokens<'_>,
    second: &Tokens<'_>,
    factors: &mut Factors<E>,
) -> PairColumns {
    let channels = first.grid.channels();
    let stride = E::padded(channels);
    let Factors { rows, row_norms, columns, panels, column_norms } = factors;
    let set_panels = || {
        round(second, columns, column_norms);
        let columns = Rows { values: &columns[..], n: second.grid.n_tokens(), stride };
        panels.set_columns(columns, channels);
        column_norms.resize(panels.n_panels() * WIDTH, f32::INFINITY);
    };
    rayon::join(set_panels, || round(first, rows, row_norms));
    let rows = Rows { values: &rows[..], n: first.grid.n_tokens(), stride };
    let search = Search { kernel, first, second, rows, row_norms, panels, column_norms };
    search.run()
}

/// The tokens in the format of the products, rows filled up with zeros, and the squared lengths of what they
/// are then: with these, the distances are those of the rounded tokens, without another error.
fn round<E: Element>(tokens: &Tokens<'_>, rows: &mut Vec<E>, norms: &mut Vec<f32>) {
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
    first: &'a Tokens<'a>,
    second: &'a Tokens<'a>,
    rows: Rows<'a, E>,
    row_norms: &'a [f32],
    panels: &'a Panels<E>,
    column_norms: &'a [f32],
}

impl<E: Element> Search<'_, E> {
    fn run(&self) -> PairColumns {
        let n_panels = self.panels.n_panels();
        let part = n_panels.div_ceil(2 * rayon::current_num_threads()).max(1);
        let parts: Vec<usize> = (0..n_panels).step_by(part).collect();
        let found: Vec<[Vec<f32>; 2]> = parts
            .into_par_iter()
            .map_init(Vec::new, |slots, start| {
                self.search(start..n_panels.min(start + part), slots)
            })
            .collect();
        let mut first_to_second = vec![f32::INFINITY; self.rows.n];
        let mut second_to_first = Vec::with_capacity(self.n_columns());
        for [rows, columns] in found {
            first_to_second
                .iter_mut()
                .zip(rows)
                .for_each(|(nearest, other)| *nearest = nearest.min(other));
            second_to_first.extend(columns);
        }
        PairColumns { first_to_second, second_to_first }
    }

    /// The distances of all rows to the columns of these panels, and of the columns to all rows.
    fn search(&self, panels: Range<usize>, rows: &mut Vec<Slots<WIDTH>>) -> [Vec<f32>; 2] {
        rows.clear();
        rows.resize(self.rows.n, Slots::NONE);
        let mut distances = Vec::new();
        for panel in panels.clone() {
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
        let rows = rows.iter().enumerate().map(|(row, slots)| self.exact_row(row, slots, &panels));
        [rows.collect(), distances]
    }

    fn n_columns(&self) -> usize {
        self.second.grid.n_tokens()
    }

    fn exact_row(&self, row: usize, slots: &Slots<WIDTH>, panels: &Range<usize>) -> f32 {
        let end = self.n_columns().min(panels.end * WIDTH);
        let slots = (0..WIDTH)
            .map(|lane| Kept::new(slots, lane, (panels.start * WIDTH + lane..end).step_by(WIDTH)));
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

/// What one slot has kept of its members.
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

/// The distance to the nearest of the slots' members, tokens of `other`: of all that rounding could have put
/// behind the first.
fn exact<E: Element>(
    token: &[f32],
    norm: f32,
    other: &Tokens<'_>,
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
            // There may be a third.
            let members: Vec<u32> = slot.members.map(|member| member as u32).collect();
            nearest_among(token, other.values, &members, &mut nearest);
        }
    }
    nearest.sqrt()
}

/// How much too large a squared distance by products may be, beyond all doubt in practice. The first term is for
/// the rounding of the factors, by up to a unit each in random directions: over `channels` it moves a squared
/// distance by about 1.2 distance * length * unit / sqrt(channels), an eighth of what is allowed here. The
/// second is for the sums in f32, which drift by the root of their number (measured: a tenth of this). Where few
/// channels hold nearly all of the length there is less to spare.
fn margin<E: Element>(squared: f32, norm: f32, channels: usize) -> f32 {
    let (distance, channels) = (squared.max(0.0).sqrt(), channels as f32);
    // The other token is at most this long.
    let length = norm.sqrt() + distance;
    10.0 * E::UNIT * distance * length / channels.sqrt()
        + 4.0 * channels.sqrt() * f32::UNIT * length * length
}
