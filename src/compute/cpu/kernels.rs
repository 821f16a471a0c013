//! The steps between the products of the network, element by element.

use super::{
    product::{Element, Place, Rows, Tile},
    vectorised::{LANES, multiply_add, sum_of, vectorised},
};

/// The polynomial with these coefficients. That of the highest power is first.
#[inline(always)]
fn polynomial<const FUSED: bool, const N: usize>(coefficients: [f32; N], x: f32) -> f32 {
    // This is a loop, because builds without optimisation do not inline closures into the function
    // that has the instructions.
    let mut sum = 0.0;
    for coefficient in coefficients {
        sum = multiply_add::<FUSED>(sum, x, coefficient);
    }
    sum
}

/// exp for arguments up to 88, with a relative error below 2e-7. Below -87 it stays at exp(-87),
/// which is negligible beside the 1 in each softmax row.
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
    // The last bits of `shifted` are n. Moved to the exponent, they make 2^n.
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()))
}

/// The error function, with an absolute error below 4e-7. Its complement is exp(-z P(z)), with P
/// fitted for the smallest error of erf itself.
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

/// Writes `map(tile + bias)` to rows of `out` that are `stride` apart.
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
    /// Writes the tile plus `bias`, `[columns of the product]`, to rows of `out` that are `stride`
    /// apart.
    fn store_biased<E>(tile: &Tile, place: Place, bias: &[f32], out: &mut [E], stride: usize) {
        store(tile, place, bias, out, stride, |v| v);
    }
}

vectorised! {
    /// As `store_biased`, through the exact GELU, x/2 (1 + erf(x / sqrt 2)).
    fn store_gelu<E>(tile: &Tile, place: Place, bias: &[f32], out: &mut [E], stride: usize) {
        let gelu = |v: f32| {
            let half = 0.5 * v;
            multiply_add::<FUSED>(half, erf::<FUSED>(v * std::f32::consts::FRAC_1_SQRT_2), half)
        };
        store(tile, place, bias, out, stride, gelu);
    }
}

vectorised! {
    /// Ends a branch: `out += scale * (tile + bias)` (LayerScale, residual). Rows of `out` are
    /// `stride` apart.
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
    /// Writes each row of the tile times its factor, `[rows of the product]`, to rows of `out` that
    /// are `stride` apart.
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

vectorised! {
    /// 1 / (1 + exp(-x)) in place. This is the softmax of two values, of which one exceeds the
    /// other by x.
    fn sigmoid(row: &mut [f32]) {
        for value in row {
            let below = if *value < -87.0 { 87.0 } else { -*value };
            *value = 1.0 / (1.0 + exp::<FUSED>(below));
        }
    }
}

/// The largest value; minus infinity for an empty row.
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
    /// Writes exp(scale * (x - largest x)) for the first `width` scores of each of the [`Rows`] to
    /// rows of `out` that are `stride` apart. `factors` gets the reciprocals of the sums. The two
    /// together make a softmax.
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
    fn a_sigmoid_reaches_both_ends_and_no_further() {
        let mut row = [-1e9, -100.0, -2.0, 0.0, 3.0, 100.0, 1e9];
        let exact = row.map(|x: f32| (1.0 / (1.0 + (-f64::from(x)).exp())) as f32);
        sigmoid(&mut row);
        for (found, exact) in row.iter().zip(exact) {
            assert!((found - exact).abs() < 3e-7, "{found} {exact}");
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
