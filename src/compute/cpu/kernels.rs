//! Element-wise kernels between the matrix products, vectorised by the compiler for the widest
//! instruction set that the processor has.
//!
//! Results differ between instruction sets in the last bits: those with vectors multiply and add at once.

use half::f16;

#[cfg(target_arch = "x86_64")]
use super::instructions::Instructions;
use super::{
    dots::RIGHT,
    product::{Element, MAX_ROWS, Place, Rows, Tile, WIDTH},
};

/// Compiles a kernel for AVX-512, for AVX2 and portably, and picks one at run time. A kernel may be generic
/// over the [`Element`] that it writes; within it, `FUSED` says whether there is a fused multiply-add.
macro_rules! vectorised {
    (
        $(#[$doc:meta])*
        fn $name:ident $(<$element:ident>)? ($($arg:ident: $ty:ty),* $(,)?) $body:block
    ) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub(super) fn $name $(<$element: Element>)? ($($arg: $ty),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn portable<const FUSED: bool $(, $element: Element)?>($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
                #[allow(clippy::too_many_arguments)]
                fn avx512 $(<$element: Element>)? ($($arg: $ty),*) {
                    portable::<true $(, $element)?>($($arg),*);
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2 $(<$element: Element>)? ($($arg: $ty),*) {
                    portable::<true $(, $element)?>($($arg),*);
                }
                let instructions = Instructions::in_use();
                if instructions >= Instructions::Avx512 {
                    // SAFETY: the processor has what is in use.
                    return unsafe { avx512($($arg),*) };
                }
                if instructions >= Instructions::Avx2 {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            portable::<false $(, $element)?>($($arg),*)
        }
    };
}

/// a * b + c.
#[inline(always)]
fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    // Where the processor has no such instruction, it is a call.
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// The polynomial of these coefficients, the highest power's first.
#[inline(always)]
fn polynomial<const FUSED: bool, const N: usize>(coefficients: [f32; N], x: f32) -> f32 {
    // A loop, because builds without optimisation do not take closures into the function with the
    // instructions.
    let mut sum = 0.0;
    for coefficient in coefficients {
        sum = multiply_add::<FUSED>(sum, x, coefficient);
    }
    sum
}

/// exp for arguments up to 88; relative error below 2e-7. Below -87 it stays at exp(-87), which
/// is nothing beside the 1 that each softmax row holds.
#[inline(always)]
fn exp<const FUSED: bool>(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
    const ROUND: f32 = 12_582_912.0;
    // Cephes expf.
    const P: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5];
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = multiply_add::<FUSED>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = multiply_add::<FUSED>(n, -LN2_LOW, multiply_add::<FUSED>(n, -LN2_HIGH, x));
    let p = multiply_add::<FUSED>(polynomial::<FUSED, 6>(P, r), r * r, r) + 1.0;
    // The last bits of `shifted` are n: moved to the exponent, they make 2^n.
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()))
}

/// The error function; absolute error below 4e-7. Its complement is exp(-z P(z)), P fitted for the smallest
/// error of erf itself.
#[inline(always)]
fn erf<const FUSED: bool>(x: f32) -> f32 {
    const P: [f32; 7] = [
        -6.946_803e-5,
        3.199_392e-4,
        1.595_785_1e-3,
        -2.041_492e-2,
        1.032_537_45e-1,
        6.365_369e-1,
        1.128_383_8,
    ];
    let z = x.abs();
    let z = if z > 4.0 { 4.0 } else { z };
    (1.0 - exp::<FUSED>(-z * polynomial::<FUSED, 7>(P, z))).copysign(x)
}

/// `tile + bias` through `map`, into rows of `out` that are `stride` apart.
#[inline(always)]
fn store<E: Element>(
    tile: &Tile,
    place: Place,
    bias: &[f32],
    out: &mut [E],
    stride: usize,
    map: impl Fn(f32) -> f32,
) {
    let bias = &bias[place.column..place.column + place.columns];
    for (row, values) in tile.0.iter().take(place.rows).enumerate() {
        let out = &mut out[(place.row + row) * stride + place.column..][..place.columns];
        for ((out, value), bias) in out.iter_mut().zip(values).zip(bias) {
            *out = E::of(map(value + bias));
        }
    }
}

vectorised! {
    /// The tile plus `bias`, `[columns of the product]`, into rows of `out`, `stride` apart.
    fn store_biased<E>(tile: &Tile, place: Place, bias: &[f32], out: &mut [E], stride: usize) {
        store(tile, place, bias, out, stride, |v| v);
    }
}

vectorised! {
    /// The same through the exact GELU, x/2 (1 + erf(x / sqrt 2)).
    fn store_gelu<E>(tile: &Tile, place: Place, bias: &[f32], out: &mut [E], stride: usize) {
        let gelu = |v: f32| {
            let half = 0.5 * v;
            multiply_add::<FUSED>(half, erf::<FUSED>(v * std::f32::consts::FRAC_1_SQRT_2), half)
        };
        store(tile, place, bias, out, stride, gelu);
    }
}

vectorised! {
    /// The end of a branch: `out += scale * (tile + bias)` (LayerScale, residual); rows of `out` are `stride`
    /// apart.
    fn add_scaled(
        tile: &Tile,
        place: Place,
        bias: &[f32],
        scale: &[f32],
        out: &mut [f32],
        stride: usize,
    ) {
        let columns = place.column..place.column + place.columns;
        let (bias, scale) = (&bias[columns.clone()], &scale[columns]);
        for (row, values) in tile.0.iter().take(place.rows).enumerate() {
            let out = &mut out[(place.row + row) * stride + place.column..][..place.columns];
            for (((out, value), bias), scale) in out.iter_mut().zip(values).zip(bias).zip(scale) {
                *out = multiply_add::<FUSED>(*scale, value + bias, *out);
            }
        }
    }
}

vectorised! {
    /// Each row of the tile times its factor, `[rows of the product]`, into rows of `out` that are `stride`
    /// apart.
    fn store_scaled<E>(tile: &Tile, place: Place, factors: &[f32], out: &mut [E], stride: usize) {
        let rows = tile.0.iter().take(place.rows).zip(&factors[place.row..]);
        for (row, (values, factor)) in rows.enumerate() {
            let out = &mut out[(place.row + row) * stride + place.column..][..place.columns];
            for (out, value) in out.iter_mut().zip(values) {
                *out = E::of(factor * value);
            }
        }
    }
}

/// DINOv2's layer-norm epsilon.
const EPSILON: f32 = 1e-6;

/// Lanes of the sums, so that the compiler may keep them apart: a fixed order on every machine.
const LANES: usize = 16;

/// The sum of what `add` adds to it for each value.
#[inline(always)]
fn sum_of<T: Copy>(row: &[T], add: impl Fn(T, f32) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder().iter().fold(0.0, |sum, &value| add(value, sum));
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = add(value, *lane);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

vectorised! {
    /// Layer norm of every row of `weight.len()` from `x` to `out`.
    fn layer_norm<E>(x: &[f32], weight: &[f32], bias: &[f32], out: &mut [E]) {
        let width = weight.len();
        for (row, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let mean = sum_of(row, |v, sum| v + sum) / width as f32;
            let variance = sum_of(row, |v, sum| multiply_add::<FUSED>(v - mean, v - mean, sum)) / width as f32;
            let scale = 1.0 / (variance + EPSILON).sqrt();
            for (((out, value), w), b) in out.iter_mut().zip(row).zip(weight).zip(bias) {
                *out = E::of(multiply_add::<FUSED>((value - mean) * scale, *w, *b));
            }
        }
    }
}

/// The largest value; of nothing, minus infinity.
#[inline(always)]
fn largest_of(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    for (lane, &value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = value;
    }
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

vectorised! {
    /// exp(scale * (x - largest x)) for the first `width` of each [`Rows`] of scores, into rows of `out` that
    /// are `stride` apart, and in `factors` the reciprocals of their sums: with them, a softmax.
    fn softmax<E>(
        scores: Rows<'_, f32>,
        width: usize,
        scale: f32,
        out: &mut [E],
        stride: usize,
        factors: &mut [f32],
    ) {
        let rows = scores.values.chunks_exact(scores.stride).zip(out.chunks_exact_mut(stride));
        for ((row, out), factor) in rows.zip(factors).take(scores.n) {
            let (row, out) = (&row[..width], &mut out[..width]);
            let highest = largest_of(row);
            for (out, value) in out.iter_mut().zip(row) {
                *out = E::of(exp::<FUSED>(scale * (value - highest)));
            }
            *factor = 1.0 / sum_of(out, |v, sum| v.to_f32() + sum);
        }
    }
}

/// The same for the values of two rows.
#[inline(always)]
fn sum_of_both(a: &[f32], b: &[f32], add: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    let rest = rest.fold(0.0, |sum, (&x, &y)| add(x, y, sum));
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] = add(a[lane], b[lane], lanes[lane]);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

#[inline(always)]
fn squared_distance<const FUSED: bool>(a: &[f32], b: &[f32]) -> f32 {
    sum_of_both(a, b, |x, y, sum| multiply_add::<FUSED>(x - y, x - y, sum))
}

vectorised! {
    /// The values in another format, and the squared length of what they are then.
    fn round_row<E>(values: &[f32], row: &mut [E], norm: &mut f32) {
        row.iter_mut().zip(values).for_each(|(out, &value)| *out = E::of(value));
        *norm = sum_of(&row[..values.len()], |v, sum| multiply_add::<FUSED>(v.to_f32(), v.to_f32(), sum));
    }
}

/// For each lane, the smallest squared distance of those seen in it, whose it is, and the second smallest.
#[derive(Clone, Copy)]
pub(super) struct Slots<const N: usize> {
    pub(super) squared: [f32; N],
    pub(super) token: [u32; N],
    pub(super) second: [f32; N],
}

impl<const N: usize> Slots<N> {
    pub(super) const NONE: Self =
        Self { squared: [f32::INFINITY; N], token: [NO_TOKEN; N], second: [f32::INFINITY; N] };

    /// Takes the tokens that `name` gives for the lanes.
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
    /// Takes the squared distances of a tile of scalar products into the slots: of each row, by the places of
    /// columns in their panel; of each place of a row in its tile, by columns of this panel. `row_norms` and
    /// `rows` are those of all rows, `column_norms` those of the panel's columns, infinite where there is none.
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

/// Where `squared` is smaller than `nearest`, takes it and its name.
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
    /// The smallest squared distance of `a` to the rows of `b` that `candidates` names.
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
    /// The distance of each row of `a` to the row of `b` that `nearest` names, infinite where it names none.
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

vectorised! {
    /// The scalar products of `left` with rows of its length.
    fn dots_of(left: &[f32], rows: &[f32], products: &mut [f32; RIGHT]) {
        for (product, row) in products.iter_mut().zip(rows.chunks_exact(left.len())) {
            *product = sum_of_both(left, row, multiply_add::<FUSED>);
        }
    }
}

/// Half to single precision.
pub(super) fn to_single(values: &[f16], out: &mut [f32]) {
    assert_eq!(values.len(), out.len(), "a place for each value");
    #[cfg(target_arch = "x86_64")]
    if Instructions::in_use() >= Instructions::Avx512 {
        // SAFETY: the processor has what is in use.
        return unsafe { to_single_avx512(values, out) };
    }
    half::slice::HalfFloatSliceExt::convert_to_f32_slice(values, out);
}

/// `half` converts eight at a time, each in a call: three times as long.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn to_single_avx512(values: &[f16], out: &mut [f32]) {
    use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps, _mm512_storeu_ps};
    let (chunks, rest) = values.as_chunks::<16>();
    let (out_chunks, out_rest) = out.as_chunks_mut::<16>();
    for (values, out) in chunks.iter().zip(out_chunks) {
        // SAFETY: sixteen values are read, sixteen written.
        unsafe {
            let halves = _mm256_loadu_si256(values.as_ptr().cast());
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_cvtph_ps(halves));
        }
    }
    rest.iter().zip(out_rest).for_each(|(value, out)| *out = value.to_f32());
}

/// No token at all.
pub(super) const NO_TOKEN: u32 = u32::MAX;

/// For each token of a scan the nearest of the other's and its squared distance by products.
pub(super) struct Nearest {
    pub(super) squared: Vec<f32>,
    pub(super) token: Vec<u32>,
}

impl Nearest {
    pub(super) fn none(n: usize) -> Self {
        Self { squared: vec![f32::INFINITY; n], token: vec![NO_TOKEN; n] }
    }

    /// Takes over what is nearer in `other`.
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
pub(super) struct Own {
    pub(super) token: u32,
    pub(super) x: i32,
    pub(super) norm: f32,
}

/// Tokens from `start` on, of which `n` count.
pub(super) struct Group<'a> {
    pub(super) start: usize,
    pub(super) n: usize,
    pub(super) x: &'a [i32; RIGHT],
    pub(super) norms: &'a [f32; RIGHT],
}

vectorised! {
    /// From the products of a token with a group of others, takes what is nearer and at most `reach` away
    /// along x, for the token itself and for each of the others.
    fn keep_in_reach(
        products: &[f32; RIGHT],
        own: Own,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_erf_are_exact_to_their_stated_error() {
        // The platform's double-precision exp as reference; erf from its Taylor series in f64.
        let mut x = -20.0_f32;
        while x < 20.0 {
            let relative = f64::from(exp::<false>(x)) / f64::from(x).exp() - 1.0;
            assert!(relative.abs() < 3e-7, "exp({x}): {relative:e}");
            x += 0.013;
        }
        for z in [-3.1_f32, -1.0, -0.2, 0.0, 0.4, 1.7, 2.9] {
            let (mut term, mut sum) = (f64::from(z), 0.0);
            for n in 0..200 {
                sum += term / f64::from(2 * n + 1);
                term *= -f64::from(z).powi(2) / f64::from(n + 1);
            }
            let exact = sum * 2.0 / std::f64::consts::PI.sqrt();
            assert!((f64::from(erf::<false>(z)) - exact).abs() < 5e-7, "erf({z})");
        }
    }

    #[test]
    fn softmax_rows_sum_to_one_whatever_their_size() {
        let x: Vec<f32> = (0..3 * 39).map(|i| (i % 39) as f32 * 6.0 - 900.0).collect();
        let (mut out, mut factors) = ([0.0_f32; 3 * 40], [0.0; 3]);
        softmax(Rows::of(&x, 39), 37, 0.5, &mut out, 40, &mut factors);
        for (row, factor) in out.chunks_exact(40).zip(factors) {
            assert!((row.iter().sum::<f32>() * factor - 1.0).abs() < 1e-6);
            assert!((row[36] / row[35] - 3.0_f32.exp()).abs() < 1e-4);
            assert_eq!(row[37..], [0.0; 3]);
        }
    }

    #[test]
    fn a_layer_norm_has_mean_zero_and_variance_one() {
        let x: Vec<f32> = (0..50).map(|i| (i * i) as f32).collect();
        let mut out = vec![0.0; 50];
        layer_norm(&x, &[1.0; 25], &[0.0; 25], &mut out);
        for row in out.chunks_exact(25) {
            let mean = row.iter().sum::<f32>() / 25.0;
            let variance = row.iter().map(|v| v * v).sum::<f32>() / 25.0;
            assert!(mean.abs() < 1e-5 && (variance - 1.0).abs() < 1e-4);
        }
    }
}
