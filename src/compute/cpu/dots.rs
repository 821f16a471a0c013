//! Scalar products of a few tokens with a few others. Each token is read once.

#[cfg(target_arch = "x86_64")]
use super::instructions::Instructions;
use super::vectorised::{multiply_add, sum_of_both, vectorised};

/// Most tokens on the left.
pub(super) const LEFT: usize = 3;

/// Most tokens on the right. With 24 sums, registers remain for the values that are read.
pub(super) const RIGHT: usize = 8;

/// The product of each pair. Entries beyond the tokens have any value.
pub(super) type Products = [[f32; RIGHT]; LEFT];

/// The products of up to [`LEFT`] rows with up to [`RIGHT`] rows of `width`. The order of each sum
/// depends neither on its place nor on which side is left.
pub(super) fn dots(left: &[f32], right: &[f32], width: usize, products: &mut Products) {
    let [n_left, n_right] = [left, right].map(|rows| rows.len() / width);
    assert!((1..=LEFT).contains(&n_left) && (1..=RIGHT).contains(&n_right), "a few rows");
    #[cfg(target_arch = "x86_64")]
    if Instructions::in_use() >= Instructions::Avx512 {
        // SAFETY: the processor has the instructions in use, and both sides hold that many rows.
        return unsafe {
            avx512::dots(left.as_ptr(), n_left, right.as_ptr(), n_right, width, products)
        };
    }
    for (products, left) in products.iter_mut().zip(left.chunks_exact(width)) {
        dots_of(left, right, products);
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

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{Products, RIGHT};

    /// # Safety
    /// The processor has AVX-512, and the sides hold the rows.
    pub(super) unsafe fn dots(
        left: *const f32,
        n_left: usize,
        right: *const f32,
        n_right: usize,
        width: usize,
        products: &mut Products,
    ) {
        macro_rules! call {
            ($($n_left:literal)*; $n_rights:tt) => {
                match n_left {
                    $($n_left => call!(@ $n_left $n_rights),)*
                    _ => unreachable!("more rows than asked for"),
                }
            };
            (@ $n_left:literal ($($n_right:literal)*)) => {
                match n_right {
                    // SAFETY: as for the caller.
                    $($n_right => unsafe { block::<$n_left, $n_right>(left, right, width, products) },)*
                    _ => unreachable!("more rows than asked for"),
                }
            };
        }
        call!(1 2 3; (1 2 3 4 5 6 7 8));
    }

    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn block<const L: usize, const R: usize>(
        left: *const f32,
        right: *const f32,
        width: usize,
        products: &mut Products,
    ) {
        let mut sums = [[_mm512_setzero_ps(); RIGHT]; L];
        let mut add = |at: usize, mask: __mmask16| {
            // SAFETY: lanes beyond the row are not read, and the caller guarantees the rows.
            let read = |row: *const f32| unsafe { _mm512_maskz_loadu_ps(mask, row.add(at)) };
            let left: [__m512; L] = std::array::from_fn(|row| read(left.wrapping_add(row * width)));
            for column in 0..R {
                let value = read(right.wrapping_add(column * width));
                for (sums, left) in sums.iter_mut().zip(&left) {
                    sums[column] = _mm512_fmadd_ps(*left, value, sums[column]);
                }
            }
        };
        let whole = width / 16 * 16;
        (0..whole).step_by(16).for_each(|at| add(at, !0));
        if whole < width {
            add(whole, (1 << (width - whole)) - 1);
        }
        for (sums, products) in sums.iter().zip(products) {
            // SAFETY: the array has eight places.
            unsafe { _mm256_storeu_ps(products.as_mut_ptr(), sums_of_lanes(sums)) };
        }
    }

    /// The sum of the lanes of each of eight registers.
    #[target_feature(enable = "avx512f,avx512dq")]
    fn sums_of_lanes(of: &[__m512; RIGHT]) -> __m256 {
        let pair = |a: usize| {
            let (a, b) = (of[a], of[a + 1]);
            _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
        };
        let four = |a: __m512, b: __m512| {
            _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b))
        };
        // Sums 0 to 3 and 4 to 7, each in four parts of 128 bits.
        let (low, high) = (four(pair(0), pair(2)), four(pair(4), pair(6)));
        let halves = _mm512_add_ps(
            _mm512_shuffle_f32x4::<0x44>(low, high),
            _mm512_shuffle_f32x4::<0xee>(low, high),
        );
        let swapped = _mm512_shuffle_f32x4::<0xb1>(halves, halves);
        let sums = _mm512_add_ps(halves, swapped);
        _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0x08>(sums, sums))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_the_definition_for_all_numbers_of_rows_and_widths() {
        let value = |i: usize| ((i * 7919) % 23) as f32 - 11.0;
        for width in [1, 15, 16, 37, 384] {
            let rows: Vec<f32> = (0..(LEFT + RIGHT) * width).map(value).collect();
            for n_left in 1..=LEFT {
                for n_right in 1..=RIGHT {
                    let (left, right) =
                        (&rows[..n_left * width], &rows[width..][..n_right * width]);
                    let mut found = Products::default();
                    dots(left, right, width, &mut found);
                    for (found, a) in found.iter().zip(left.chunks_exact(width)) {
                        for (found, b) in found.iter().zip(right.chunks_exact(width)) {
                            // Sums of whole numbers are exact in any order.
                            let expected: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                            assert_eq!(*found, expected, "{n_left} x {n_right} of {width}");
                        }
                    }
                }
            }
        }
    }
}
