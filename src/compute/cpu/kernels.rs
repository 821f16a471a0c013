//! Element-wise kernels between the matrix products, vectorised by the compiler for the widest
//! instruction set that the processor has.
//!
//! No fused multiply-add is used, so that the results are the same on every instruction set.

/// Compiles a kernel for AVX-512, for AVX2 and portably, and picks one at run time.
macro_rules! vectorised {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        pub(super) fn $name($($arg: $ty),*) {
            #[inline(always)]
            fn portable($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
                fn avx512($($arg: $ty),*) { portable($($arg),*) }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) { portable($($arg),*) }
                if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                {
                    // SAFETY: the processor has these instructions, as was just asked.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has these instructions, as was just asked.
                    return unsafe { avx2($($arg),*) };
                }
            }
            portable($($arg),*)
        }
    };
}

/// exp for arguments up to 88; relative error below 2e-7. Below -87 it stays at exp(-87), which
/// is nothing beside the 1 that each softmax row holds.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    // Cephes expf.
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_6e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // SAFETY: |x| <= 88, so n lies in -126..=127.
    let exponent = unsafe { n.to_int_unchecked::<i32>() };
    p * f32::from_bits(((exponent + 127) << 23) as u32)
}

/// The error function; absolute error below 2e-7 (Abramowitz and Stegun 7.1.26).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let z = x.abs();
    let z = if z > 4.0 { 4.0 } else { z };
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let p = 1.061_405_4;
    let p = p * t - 1.453_152;
    let p = p * t + 1.421_413_7;
    let p = p * t - 0.284_496_74;
    let p = p * t + 0.254_829_6;
    (1.0 - p * t * exp(-z * z)).copysign(x)
}

vectorised! {
    /// `x = gelu(x + bias)` for rows of `bias.len()`; the exact GELU, x/2 (1 + erf(x / sqrt 2)).
    fn add_bias_gelu(x: &mut [f32], bias: &[f32]) {
        for row in x.chunks_exact_mut(bias.len()) {
            for (value, b) in row.iter_mut().zip(bias) {
                let v = *value + b;
                *value = 0.5 * v * (1.0 + erf(v * std::f32::consts::FRAC_1_SQRT_2));
            }
        }
    }
}

vectorised! {
    /// Adds `bias` to every row.
    fn add_bias(x: &mut [f32], bias: &[f32]) {
        for row in x.chunks_exact_mut(bias.len()) {
            for (value, b) in row.iter_mut().zip(bias) {
                *value += b;
            }
        }
    }
}

vectorised! {
    /// The end of a branch: `x += scale * (branch + bias)` row by row (LayerScale, residual).
    fn add_scaled(x: &mut [f32], branch: &[f32], bias: &[f32], scale: &[f32]) {
        let width = bias.len();
        for (row, branch) in x.chunks_exact_mut(width).zip(branch.chunks_exact(width)) {
            for (((value, part), b), s) in row.iter_mut().zip(branch).zip(bias).zip(scale) {
                *value += s * (part + b);
            }
        }
    }
}

/// DINOv2's layer-norm epsilon.
const EPSILON: f32 = 1e-6;

/// Lanes of the sums, so that the compiler may keep them apart: a fixed order on every machine.
const LANES: usize = 16;

#[inline(always)]
fn sum_of(row: &[f32], part: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|&v| part(v)).sum();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += part(value);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

vectorised! {
    /// Layer norm of every row of `weight.len()` from `x` to `out`.
    fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
        let width = weight.len();
        for (row, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let mean = sum_of(row, |v| v) / width as f32;
            let variance = sum_of(row, |v| (v - mean) * (v - mean)) / width as f32;
            let scale = 1.0 / (variance + EPSILON).sqrt();
            for (((out, value), w), b) in out.iter_mut().zip(row).zip(weight).zip(bias) {
                *out = (value - mean) * scale * w + b;
            }
        }
    }
}

vectorised! {
    /// Softmax of every row of `width`.
    fn softmax(x: &mut [f32], width: usize) {
        for row in x.chunks_exact_mut(width) {
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
            let highest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
            for value in row.iter_mut() {
                *value = exp(*value - highest);
            }
            let scale = 1.0 / sum_of(row, |v| v);
            for value in row.iter_mut() {
                *value *= scale;
            }
        }
    }
}

/// Sum of squared differences in a fixed order.
#[inline(always)]
fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 =
        a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| (x - y) * (x - y)).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            let difference = a[lane] - b[lane];
            lanes[lane] += difference * difference;
        }
    }
    lanes.iter().sum::<f32>() + rest
}

vectorised! {
    /// The squared lengths of rows of `width`.
    fn squared_lengths(rows: &[f32], width: usize, out: &mut [f32]) {
        for (row, out) in rows.chunks_exact(width).zip(out) {
            *out = sum_of(row, |v| v * v);
        }
    }
}

vectorised! {
    /// The distance of each row of `a` to the row of `b` that `nearest` names, infinite where it names none.
    fn distances_to(a: &[f32], b: &[f32], nearest: &[u32], width: usize, out: &mut [f32]) {
        for ((row, &other), out) in a.chunks_exact(width).zip(nearest).zip(out) {
            let start = other as usize * width;
            let other = b.get(start..start + width);
            *out = other.map_or(f32::INFINITY, |other| squared_distance(row, other).sqrt());
        }
    }
}

vectorised! {
    /// The squared distances between token `a` and the tokens `candidates` of `b` (`[n, a.len()]`):
    /// the smallest into `nearest`, and each into its candidate's place in `nearest_to` (`[n]`) where
    /// it is smaller than what is there.
    fn nearest_of(
        a: &[f32],
        b: &[f32],
        candidates: &[u32],
        nearest: &mut f32,
        nearest_to: &mut [f32],
    ) {
        let width = a.len();
        for &candidate in candidates {
            let start = candidate as usize * width;
            let distance = squared_distance(a, &b[start..start + width]);
            *nearest = if distance < *nearest { distance } else { *nearest };
            let to = &mut nearest_to[candidate as usize];
            *to = if distance < *to { distance } else { *to };
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
            let relative = f64::from(exp(x)) / f64::from(x).exp() - 1.0;
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
            assert!((f64::from(erf(z)) - exact).abs() < 5e-7, "erf({z})");
        }
    }

    #[test]
    fn softmax_rows_sum_to_one_whatever_their_size() {
        let mut x: Vec<f32> = (0..3 * 37).map(|i| (i % 37) as f32 * 3.0 - 900.0).collect();
        softmax(&mut x, 37);
        for row in x.chunks_exact(37) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            assert!((row[36] / row[35] - 3.0_f32.exp()).abs() < 1e-4);
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
