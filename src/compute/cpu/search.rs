//! Kernels of the search for the nearest tokens: the evaluation of products, and distances from
//! differences.

use half::f16;

#[cfg(target_arch = "x86_64")]
use super::instructions::Instructions;
use super::{
    dots::RIGHT,
    product::{Element, MAX_ROWS, Place, Tile, WIDTH},
    vectorised::{multiply_add, sum_of, sum_of_both, vectorised},
};

/// The index that means "no token".
pub(super) const NO_TOKEN: u32 = u32::MAX;

#[inline(always)]
fn squared_distance<const FUSED: bool>(a: &[f32], b: &[f32]) -> f32 {
    sum_of_both(a, b, |x, y, sum| multiply_add::<FUSED>(x - y, x - y, sum))
}

vectorised! {
    /// Rounds the values to another format, and computes the squared length of the rounded values.
    fn round_row<E>(values: &[f32], row: &mut [E], norm: &mut f32) {
        row.iter_mut().zip(values).for_each(|(out, &value)| *out = E::of(value));
        *norm = sum_of(&row[..values.len()], |v, sum| multiply_add::<FUSED>(v.to_f32(), v.to_f32(), sum));
    }
}

/// For each lane, the smallest squared distance so far, the token that has it, and the second
/// smallest distance.
#[derive(Clone, Copy)]
pub(super) struct Slots<const N: usize> {
    pub(super) squared: [f32; N],
    pub(super) token: [u32; N],
    pub(super) second: [f32; N],
}

impl<const N: usize> Slots<N> {
    pub(super) const NONE: Self =
        Self { squared: [f32::INFINITY; N], token: [NO_TOKEN; N], second: [f32::INFINITY; N] };

    /// Updates the lanes with the squared distances of the tokens that `name` returns for them.
    #[inline(always)]
    fn keep(&mut self, squared: &[f32; N], name: impl Fn(u32) -> u32) {
        let seconds = self.second.iter_mut().zip(self.squared.iter().zip(squared));
        for (second, (kept, new)) in seconds {
            let larger = if new < kept { *kept } else { *new };
            *second = if larger < *second { larger } else { *second };
        }
        keep_smaller(squared, name, &mut self.squared, &mut self.token);
    }
}

vectorised! {
    /// Computes the squared distances of a tile of scalar products and updates the slots. The slots
    /// of each row have a lane for each place of a column in its panel. The slots of each place of
    /// a row in its tile have a lane for each column of this panel. `row_norms` and `rows` are
    /// those of all rows. `column_norms` are those of the panel's columns, infinite for a missing
    /// column.
    fn keep_nearest(
        tile: &Tile,
        place: Place,
        row_norms: &[f32],
        column_norms: &[f32; WIDTH],
        rows: &mut [Slots<WIDTH>],
        columns: &mut [Slots<WIDTH>; MAX_ROWS],
    ) {
        let range = place.row..place.row + place.rows;
        let norms = row_norms[range.clone()].iter().zip(&mut rows[range]);
        for (index, (products, (norm, slots))) in tile.0.iter().zip(norms).enumerate() {
            let row = (place.row + index) as u32;
            let mut squared = [0.0_f32; WIDTH];
            for ((squared, product), other) in squared.iter_mut().zip(products).zip(column_norms) {
                *squared = norm + other - 2.0 * product;
            }
            columns[index].keep(&squared, |_| row);
            slots.keep(&squared, |lane| place.column as u32 + lane);
        }
    }
}

/// If `squared` is smaller than `nearest`, stores it and its token.
#[inline(always)]
fn keep_smaller<const N: usize>(
    squared: &[f32; N],
    name: impl Fn(u32) -> u32,
    nearest: &mut [f32; N],
    names: &mut [u32; N],
) {
    for (lane, ((nearest, kept), &squared)) in (0..).zip(nearest.iter_mut().zip(names).zip(squared))
    {
        *kept = if squared < *nearest { name(lane) } else { *kept };
        *nearest = if squared < *nearest { squared } else { *nearest };
    }
}

vectorised! {
    /// The smallest squared distance of `a` to those rows of `b` whose numbers are in `candidates`.
    fn nearest_among(a: &[f32], b: &[f32], candidates: &[u32], nearest: &mut f32) {
        let width = a.len();
        for &candidate in candidates {
            let start = candidate as usize * width;
            let distance = squared_distance::<FUSED>(a, &b[start..start + width]);
            *nearest = if distance < *nearest { distance } else { *nearest };
        }
    }
}

vectorised! {
    /// The distance of each row of `a` to the row of `b` whose number is in `nearest`. It is
    /// infinite for [`NO_TOKEN`].
    fn distances_to(a: &[f32], b: &[f32], nearest: &[u32], width: usize, out: &mut [f32]) {
        for ((row, &other), out) in a.chunks_exact(width).zip(nearest).zip(out) {
            let start = other as usize * width;
            *out = match b.get(start..start + width) {
                Some(other) => squared_distance::<FUSED>(row, other).sqrt(),
                None => f32::INFINITY,
            };
        }
    }
}

vectorised! {
    /// The squared lengths of rows of `width`.
    fn squared_lengths(rows: &[f32], width: usize, out: &mut [f32]) {
        for (row, out) in rows.chunks_exact(width).zip(out) {
            *out = sum_of(row, |v, sum| multiply_add::<FUSED>(v, v, sum));
        }
    }
}

/// Converts half to single precision.
pub(super) fn to_single(values: &[f16], out: &mut [f32]) {
    assert_eq!(values.len(), out.len(), "a place for each value");
    #[cfg(target_arch = "x86_64")]
    if Instructions::in_use() >= Instructions::Avx512 {
        // SAFETY: the processor has the instructions in use.
        return unsafe { to_single_avx512(values, out) };
    }
    half::slice::HalfFloatSliceExt::convert_to_f32_slice(values, out);
}

/// Three times as fast as `half`, which converts eight values at a time, each in a call.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn to_single_avx512(values: &[f16], out: &mut [f32]) {
    use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps, _mm512_storeu_ps};
    let (chunks, rest) = values.as_chunks::<16>();
    let (out_chunks, out_rest) = out.as_chunks_mut::<16>();
    for (values, out) in chunks.iter().zip(out_chunks) {
        // SAFETY: the block reads sixteen values and writes sixteen.
        unsafe {
            let halves = _mm256_loadu_si256(values.as_ptr().cast());
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_cvtph_ps(halves));
        }
    }
    rest.iter().zip(out_rest).for_each(|(value, out)| *out = value.to_f32());
}

/// For each token of a scan, the nearest token of the other scan and its squared distance by
/// products.
pub(super) struct Nearest {
    pub(super) squared: Vec<f32>,
    pub(super) token: Vec<u32>,
}

impl Nearest {
    pub(super) fn none(n: usize) -> Self {
        Self { squared: vec![f32::INFINITY; n], token: vec![NO_TOKEN; n] }
    }

    /// Takes the nearer tokens of `other`.
    pub(super) fn merge(&mut self, other: &Self) {
        let own = self.squared.iter_mut().zip(&mut self.token);
        for ((squared, token), (&other, &other_token)) in
            own.zip(other.squared.iter().zip(&other.token))
        {
            if other < *squared {
                (*squared, *token) = (other, other_token);
            }
        }
    }
}

/// A token, its place along x and its squared length.
#[derive(Clone, Copy)]
pub(super) struct QueryToken {
    pub(super) token: u32,
    pub(super) x: i32,
    pub(super) norm: f32,
}

/// Tokens from `start` on. Only the first `n` count.
pub(super) struct Group<'a> {
    pub(super) start: usize,
    pub(super) n: usize,
    pub(super) x: &'a [i32; RIGHT],
    pub(super) norms: &'a [f32; RIGHT],
}

vectorised! {
    /// Evaluates the products of a token with a group of others. For the token itself and for each
    /// of the others, it stores a nearer token if that is at most `reach` away along x.
    fn keep_in_reach(
        products: &[f32; RIGHT],
        own: QueryToken,
        others: &Group<'_>,
        reach: i32,
        nearest: &mut Slots<RIGHT>,
        nearest_to: &mut Nearest,
    ) {
        let mut squared = [f32::INFINITY; RIGHT];
        for lane in 0..RIGHT {
            let is_near = (others.x[lane] - own.x).abs() <= reach && lane < others.n;
            let value = own.norm + others.norms[lane] - 2.0 * products[lane];
            squared[lane] = if is_near { value } else { f32::INFINITY };
        }
        let name = |lane| others.start as u32 + lane;
        keep_smaller(&squared, name, &mut nearest.squared, &mut nearest.token);
        let (to_squared, to_token) = (&mut nearest_to.squared, &mut nearest_to.token);
        let to_squared = to_squared[others.start..].first_chunk_mut().expect("room at the end");
        let to_token = to_token[others.start..].first_chunk_mut().expect("room at the end");
        keep_smaller(&squared, |_| own.token, to_squared, to_token);
    }
}
