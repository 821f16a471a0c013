//! Matrix products in tiles of a few rows and [`WIDTH`] columns. The step after a product (bias,
//! GELU, the smallest distance) is done tile by tile, while the tile is still in the cache.

use std::ops::Range;

use bytemuck::{Pod, Zeroable, cast_slice, cast_slice_mut};
use half::bf16;

/// Columns of a tile.
pub(super) const WIDTH: usize = 32;

/// Most rows of a tile.
pub(super) const MAX_ROWS: usize = 32;

/// One tile of a product, row by row.
#[repr(C, align(64))]
pub(super) struct Tile(pub(super) [[f32; WIDTH]; MAX_ROWS]);

/// A number format of the factors. Sums are f32.
pub(super) trait Element: Pod + Default + Send + Sync {
    /// Consecutive factors along the inner extent that a panel stores together for one column.
    const DEPTH: usize;
    /// The inner extent is padded with zeros to a multiple of this.
    const STEP: usize;

    /// Half the distance from 1 to the next value.
    const UNIT: f32;

    /// The nearest value of this format.
    fn of(value: f32) -> Self;

    fn to_f32(self) -> f32;

    /// The inner extent with its padding.
    fn padded(inner: usize) -> usize {
        inner.next_multiple_of(Self::STEP)
    }
}

impl Element for f32 {
    const DEPTH: usize = 1;
    const STEP: usize = 1;
    const UNIT: f32 = f32::EPSILON / 2.0;

    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const DEPTH: usize = 2;
    /// One step of AMX takes this many entries.
    const STEP: usize = 32;
    const UNIT: f32 = 1.0 / 256.0;

    /// Rounds to nearest, ties to even. `value` must not be NaN. Unlike `half`'s function, it has
    /// no branch and no check.
    #[inline(always)]
    fn of(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        Self::from_bits((rounded >> 16) as u16)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// A function that computes tiles, with instructions that the processor has.
#[derive(Clone, Copy)]
pub(super) struct Kernel<E> {
    /// Rows of a whole tile.
    pub(super) rows: usize,
    /// Writes the sums of products of the left rows, `stride` apart, with a panel into the tile.
    compute: TileFn<E>,
}

impl<E> Kernel<E> {
    /// # Safety
    /// The processor has the instructions of `compute`.
    pub(super) unsafe fn new(rows: usize, compute: TileFn<E>) -> Self {
        Self { rows, compute }
    }
}

/// Arguments: the first left row, entries from row to row, number of rows (at most the kernel's),
/// the panel, the padded inner extent, the tile.
///
/// # Safety
/// The processor has the kernel's instructions. Every row and the panel hold the padded inner
/// extent. Panels begin at a cache line.
pub(super) type TileFn<E> = unsafe fn(*const E, usize, usize, *const E, usize, &mut Tile);

/// The left factor: rows within a buffer.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, E> {
    pub(super) values: &'a [E],
    pub(super) n: usize,
    /// Entries from row to row.
    pub(super) stride: usize,
}

impl<'a, E> Rows<'a, E> {
    /// Rows of `width` entries without gaps.
    pub(super) fn of(values: &'a [E], width: usize) -> Self {
        Self { values, n: values.len() / width.max(1), stride: width }
    }
}

/// A cache line. Panels consist of these, so that they begin at one.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// The right factor, `[inner, columns]`, in panels of [`WIDTH`] columns. In a panel,
/// [`Element::DEPTH`] consecutive factors of each column follow one another: `[inner / DEPTH,
/// WIDTH, DEPTH]`.
#[derive(Clone, Default)]
pub(super) struct Panels<E> {
    lines: Vec<Line>,
    inner: usize,
    columns: usize,
    element: std::marker::PhantomData<E>,
}

impl<E: Element> Panels<E> {
    /// Makes the factor from rows that become its columns, as a linear layer stores them:
    /// `[columns, inner]`.
    pub(super) fn of_columns(values: &[f32], inner: usize) -> Self {
        let values: Vec<E> = values.iter().map(|&value| E::of(value)).collect();
        let mut panels = Self::default();
        panels.set_columns(Rows::of(&values, inner), inner);
        panels
    }

    /// Sets each column to the first `inner` entries of a row.
    pub(super) fn set_columns(&mut self, rows: Rows<'_, E>, inner: usize) {
        self.resize(inner, rows.n);
        assert!(rows.n == 0 || (rows.n - 1) * rows.stride + inner <= rows.values.len());
        let per_panel = E::padded(inner) * WIDTH;
        let panels = self.values_mut().chunks_exact_mut(per_panel.max(1));
        for (index, panel) in panels.enumerate() {
            let first = index * WIDTH;
            for column in 0..WIDTH.min(rows.n - first) {
                let row = &rows.values[(first + column) * rows.stride..][..inner];
                for (k, factors) in row.chunks(E::DEPTH).enumerate() {
                    let at = (k * WIDTH + column) * E::DEPTH;
                    panel[at..at + factors.len()].copy_from_slice(factors);
                }
            }
        }
    }

    /// Sets each row to the first `columns` entries of a row.
    pub(super) fn set_rows(&mut self, rows: Rows<'_, E>, columns: usize) {
        self.resize(rows.n, columns);
        let per_panel = E::padded(rows.n) * WIDTH;
        let panels = self.values_mut().chunks_exact_mut(per_panel.max(1));
        for (index, panel) in panels.enumerate() {
            let first = index * WIDTH;
            let width = WIDTH.min(columns - first);
            for k in 0..rows.n {
                let row = &rows.values[k * rows.stride + first..][..width];
                let start = k / E::DEPTH * WIDTH * E::DEPTH + k % E::DEPTH;
                let places = panel[start..].iter_mut().step_by(E::DEPTH);
                places.zip(row).for_each(|(place, &value)| *place = value);
            }
        }
    }

    /// Makes space for `[inner, columns]`. If the extents change, all entries become zero.
    fn resize(&mut self, inner: usize, columns: usize) {
        if (self.inner, self.columns) != (inner, columns) {
            let n = columns.div_ceil(WIDTH) * E::padded(inner) * WIDTH;
            self.lines.clear();
            self.lines.resize((n * size_of::<E>()).div_ceil(64), Line([0; 64]));
            (self.inner, self.columns) = (inner, columns);
        }
    }

    fn values(&self) -> &[E] {
        cast_slice(&self.lines)
    }

    fn values_mut(&mut self) -> &mut [E] {
        cast_slice_mut(&mut self.lines)
    }

    pub(super) fn n_panels(&self) -> usize {
        self.columns.div_ceil(WIDTH)
    }
}

/// The place of a tile in its product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) row: usize,
    pub(super) rows: usize,
    pub(super) column: usize,
    pub(super) columns: usize,
}

/// Computes all tiles of `left * right`, panel by panel, and calls `finish` with each.
pub(super) fn multiply<E: Element>(
    kernel: Kernel<E>,
    left: Rows<'_, E>,
    right: &Panels<E>,
    finish: impl FnMut(Place, &Tile),
) {
    multiply_panels(kernel, left, right, 0..right.n_panels(), finish);
}

/// As [`multiply`], for some of the panels.
pub(super) fn multiply_panels<E: Element>(
    kernel: Kernel<E>,
    left: Rows<'_, E>,
    right: &Panels<E>,
    panels: Range<usize>,
    mut finish: impl FnMut(Place, &Tile),
) {
    let inner = E::padded(right.inner);
    assert!(
        left.n == 0 || (left.n - 1) * left.stride + inner <= left.values.len(),
        "left rows hold the inner extent"
    );
    let mut tile = Tile([[0.0; WIDTH]; MAX_ROWS]);
    for index in panels {
        let panel = &right.values()[index * inner * WIDTH..(index + 1) * inner * WIDTH];
        let column = index * WIDTH;
        let columns = WIDTH.min(right.columns - column);
        for row in (0..left.n).step_by(kernel.rows) {
            let rows = kernel.rows.min(left.n - row);
            let start = left.values[row * left.stride..].as_ptr();
            // SAFETY: a kernel has only instructions that the processor has. The left extent was
            // checked above, and `panel` is a whole panel.
            unsafe { (kernel.compute)(start, left.stride, rows, panel.as_ptr(), inner, &mut tile) };
            finish(Place { row, rows, column, columns }, &tile);
        }
    }
}
