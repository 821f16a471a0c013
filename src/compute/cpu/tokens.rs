//! The preparation of the tokens of two scans, before their distances are computed.

use std::{ops::Range, sync::Arc};

use half::f16;
use rayon::prelude::*;

use super::{
    dots::RIGHT,
    search::{Group, squared_lengths, to_single},
};
use crate::numeric::{geometry::Shape3, token::TokenGrid};

/// Rows that are prepared at a time.
const ROWS: usize = 64;

/// The prepared tokens of a scan, made once for all its pairs.
#[derive(Default)]
pub(super) struct Ready {
    /// The features that this was made from. They are held, so that another scan cannot get the
    /// same address.
    of: Option<Arc<Vec<f16>>>,
    values: Vec<f32>,
    places: Option<TokenPlaces>,
}

impl Ready {
    fn is_of(&self, grid: &TokenGrid) -> bool {
        self.of.as_ref().is_some_and(|features| Arc::ptr_eq(features, grid.shared_features()))
    }

    fn make(&mut self, grid: &TokenGrid) {
        if !self.is_of(grid) {
            self.of = None;
            self.values.resize(grid.features().len(), 0.0);
            let places = self.places.insert(TokenPlaces::of(grid));
            // A few rows at a time, so that their lengths are computed while they are in the cache.
            let (width, rows) = (grid.channels(), (ROWS * grid.channels()).max(1));
            let parts = self.values.par_chunks_mut(rows).zip(grid.features().par_chunks(rows));
            parts.zip(places.norms.par_chunks_mut(ROWS)).for_each(|((values, features), norms)| {
                to_single(features, values);
                squared_lengths(values, width, norms);
            });
            self.of = Some(grid.shared_features().clone());
        }
    }
}

pub(super) fn both<'a>(
    ready: &'a mut [Ready; 2],
    grids: [&'a TokenGrid; 2],
) -> (ReadyTokens<'a>, ReadyTokens<'a>) {
    if ready[0].is_of(grids[1]) || ready[1].is_of(grids[0]) {
        ready.swap(0, 1);
    }
    for (ready, grid) in ready.iter_mut().zip(grids) {
        ready.make(grid);
    }
    (ReadyTokens::of(grids[0], &ready[0]), ReadyTokens::of(grids[1], &ready[1]))
}

/// The tokens of one scan in single precision.
pub(super) struct ReadyTokens<'a> {
    pub(super) grid: &'a TokenGrid,
    /// `[n_tokens, channels]`.
    pub(super) values: &'a [f32],
    /// Their places, and their squared lengths.
    pub(super) places: &'a TokenPlaces,
}

impl<'a> ReadyTokens<'a> {
    fn of(grid: &'a TokenGrid, ready: &'a Ready) -> Self {
        let places = ready.places.as_ref().expect("was made ready");
        Self { grid, values: &ready.values, places }
    }

    pub(super) fn row(&self, token: usize) -> &[f32] {
        self.rows(token..token + 1)
    }

    pub(super) fn rows(&self, tokens: Range<usize>) -> &[f32] {
        let channels = self.grid.channels();
        &self.values[tokens.start * channels..tokens.end * channels]
    }
}

/// The places of the tokens of a scan.
pub(super) struct TokenPlaces {
    shape: Shape3,
    /// For each cell, and for the end of the grid, how many tokens come before it.
    before: Vec<usize>,
    /// Place along x, with [`RIGHT`] unused entries at the end.
    pub(super) x: Vec<i32>,
    /// Squared lengths, with as many unused entries at the end.
    pub(super) norms: Vec<f32>,
}

impl TokenPlaces {
    /// The places of a grid's tokens, without their lengths.
    fn of(grid: &TokenGrid) -> Self {
        let (shape, cells) = (grid.shape(), grid.cells());
        let mut before = vec![0; shape.n_voxels() + 1];
        for &cell in cells {
            before[cell as usize + 1] = 1;
        }
        for cell in 1..before.len() {
            before[cell] += before[cell - 1];
        }
        let mut x: Vec<i32> =
            cells.iter().map(|&cell| shape.voxel(cell as usize)[0] as i32).collect();
        x.resize(cells.len() + RIGHT, 0);
        let norms = vec![0.0; cells.len() + RIGHT];
        Self { shape, before, x, norms }
    }

    /// Lines of cells along x.
    pub(super) fn n_lines(&self) -> usize {
        self.shape.0[1] * self.shape.0[2]
    }

    pub(super) fn line(&self, line: usize) -> Range<usize> {
        self.within(line, 0..self.shape.0[0] as i32)
    }

    /// The tokens of a line whose x is in the range `x`. The range may exceed the grid.
    pub(super) fn within(&self, line: usize, x: Range<i32>) -> Range<usize> {
        let nx = self.shape.0[0];
        let before = |x: i32| self.before[line * nx + x.clamp(0, nx as i32) as usize];
        before(x.start)..before(x.end)
    }

    /// The values of [`RIGHT`] tokens, of which only the first `n` count.
    pub(super) fn group(&self, start: usize, n: usize) -> Group<'_> {
        Group {
            start,
            n,
            x: self.x[start..].first_chunk().expect("room at the end"),
            norms: self.norms[start..].first_chunk().expect("room at the end"),
        }
    }
}
