//! The innermost loop of a convolution: it computes a row of outputs with the widest vectors of the
//! processor.
//!
//! The vectors are explicit. With AVX2, compilers turn the same loops over arrays into scalar code,
//! which takes twenty times as long.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use super::instructions::Instructions;
use super::vectorised::LANES;

/// Weights of one input value for [`LANES`] outputs.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Lanes(pub(super) [f32; LANES]);

/// A vector of sums or weights, one for each of [`Vector::N`] outputs.
trait Vector: Copy {
    /// Values of a vector; divides [`LANES`].
    const N: usize;

    /// # Safety
    /// The processor has the instructions of this vector; `from` holds its values.
    unsafe fn load(from: *const f32) -> Self;

    /// `self + value * weights`.
    ///
    /// # Safety
    /// The processor has the instructions of this vector.
    unsafe fn add_product(self, value: f32, weights: Self) -> Self;

    /// # Safety
    /// As for [`Vector::load`].
    unsafe fn store(self, to: *mut f32);
}

impl Vector for [f32; LANES] {
    const N: usize = LANES;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller guarantees the values.
        unsafe { from.cast::<Self>().read() }
    }

    #[inline(always)]
    unsafe fn add_product(mut self, value: f32, weights: Self) -> Self {
        for (sum, weight) in self.iter_mut().zip(&weights) {
            *sum += value * weight;
        }
        self
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller guarantees the space.
        unsafe { to.cast::<Self>().write(self) }
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! impl_vector {
    ($vector:ty, $n:literal, $load:ident, $splat:ident, $fused:ident, $store:ident) => {
        impl Vector for $vector {
            const N: usize = $n;

            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                // SAFETY: the caller guarantees instructions and values.
                unsafe { $load(from) }
            }

            #[inline(always)]
            unsafe fn add_product(self, value: f32, weights: Self) -> Self {
                // SAFETY: the caller guarantees the instructions.
                unsafe { $fused($splat(value), weights, self) }
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                // SAFETY: the caller guarantees instructions and space.
                unsafe { $store(to, self) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
impl_vector!(__m512, 16, _mm512_loadu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_storeu_ps);
#[cfg(target_arch = "x86_64")]
impl_vector!(__m256, 8, _mm256_loadu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_storeu_ps);

/// A row of outputs along x, and its sources.
pub(super) struct Row<'a> {
    /// Inputs, from the first value that the first output needs.
    pub(super) inputs: &'a [f32],
    /// Start of each run of inputs.
    pub(super) runs: &'a [usize],
    /// Entries from the inputs of one place to those of the next.
    pub(super) step: usize,
    /// `[blocks of outputs, runs, values of a run]`.
    pub(super) weights: &'a [Lanes],
    /// Bias of each block of outputs.
    pub(super) bias: &'a [Lanes],
    /// Outputs of a place.
    pub(super) n_outputs: usize,
    /// `[places, n_outputs]`.
    pub(super) out: &'a mut [f32],
}

/// Computes the row with the instructions in use.
pub(super) fn convolve_row(row: Row<'_>) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn avx512(row: Row<'_>) {
            // SAFETY: this function is compiled for these instructions.
            unsafe { row.compute::<__m512, 8>() }
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(row: Row<'_>) {
            // SAFETY: as above.
            unsafe { row.compute::<__m256, 8>() }
        }
        let instructions = Instructions::in_use();
        if instructions >= Instructions::Avx512 {
            // SAFETY: the processor has the instructions in use.
            return unsafe { avx512(row) };
        }
        if instructions >= Instructions::Avx2 {
            // SAFETY: as above.
            return unsafe { avx2(row) };
        }
    }
    // SAFETY: the function needs only instructions that every processor has.
    unsafe { row.compute::<[f32; LANES], 4>() }
}

impl Row<'_> {
    /// # Safety
    /// The processor has the instructions of the vector.
    #[inline(always)]
    unsafe fn compute<V: Vector, const MOST: usize>(mut self) {
        let n_places = self.out.len() / self.n_outputs;
        for from in (0..self.n_outputs).step_by(V::N) {
            let mut place = 0;
            while place < n_places {
                let left = n_places - place;
                // SAFETY: the caller guarantees the instructions.
                unsafe {
                    place += match left {
                        _ if left >= MOST => self.places::<V, MOST>(place, from),
                        4.. => self.places::<V, 4>(place, from),
                        _ => self.places::<V, 1>(place, from),
                    };
                }
            }
        }
    }

    /// Computes a vector of outputs, from one on, for `N` places. Their sums stay in registers.
    /// Returns the vector's length.
    ///
    /// # Safety
    /// The processor has the instructions of the vector.
    #[inline(always)]
    unsafe fn places<V: Vector, const N: usize>(&mut self, place: usize, from: usize) -> usize {
        let Self { inputs, runs, step, weights, bias, n_outputs, .. } = *self;
        let (block, lane) = (from / LANES, from % LANES);
        let per_block = weights.len() / bias.len();
        let weights = &weights[block * per_block..][..per_block];
        let n_values = per_block / runs.len();
        // SAFETY: the caller guarantees the instructions. A vector from here on ends within the
        // lanes, because its length divides theirs.
        let load = |lanes: &Lanes| unsafe { V::load(lanes.0.as_ptr().add(lane)) };
        let mut sums = [load(&bias[block]); N];
        for (start, weights) in runs.iter().zip(weights.chunks_exact(n_values)) {
            let mut values = [&inputs[..0]; N];
            for (index, values) in values.iter_mut().enumerate() {
                *values = &inputs[start + (place + index) * step..][..n_values];
            }
            for (index, weights) in weights.iter().enumerate() {
                let weights = load(weights);
                for (sum, values) in sums.iter_mut().zip(&values) {
                    // SAFETY: the caller guarantees the instructions.
                    *sum = unsafe { sum.add_product(values[index], weights) };
                }
            }
        }
        let width = V::N.min(n_outputs - from);
        for (index, sum) in sums.into_iter().enumerate() {
            let mut found = [0.0; LANES];
            // SAFETY: the caller guarantees the instructions, and no vector is longer than the
            // lanes.
            unsafe { sum.store(found.as_mut_ptr()) };
            let out = &mut self.out[(place + index) * n_outputs + from..][..width];
            out.copy_from_slice(&found[..width]);
        }
        N
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::projection::Normal;

    /// 13 places of 19 outputs from two runs of three values each, computed by `with`.
    fn computed(with: impl Fn(Row<'_>)) -> Vec<f32> {
        let mut normal = Normal::new(3);
        let mut random = || normal.next() as f32;
        let inputs: Vec<f32> = (0..60).map(|_| random()).collect();
        let mut lanes = || Lanes(std::array::from_fn(|_| random()));
        let weights: Vec<Lanes> = (0..12).map(|_| lanes()).collect();
        let bias = [lanes(), lanes()];
        let mut out = vec![0.0; 13 * 19];
        let row = Row {
            inputs: &inputs,
            runs: &[1, 30],
            step: 2,
            weights: &weights,
            bias: &bias,
            n_outputs: 19,
            out: &mut out,
        };
        with(row);
        let sum = |place: usize, output: usize| {
            let (block, lane) = (output / LANES, output % LANES);
            let terms = [1, 2, 3, 30, 31, 32].map(|at| f64::from(inputs[at + 2 * place]));
            let weights = weights[6 * block..].iter().map(|lanes| f64::from(lanes.0[lane]));
            let products = terms.iter().zip(weights).map(|(value, weight)| value * weight);
            f64::from(bias[block].0[lane]) + products.sum::<f64>()
        };
        for (at, found) in out.iter().enumerate() {
            // Six products of magnitude 1.
            assert!((f64::from(*found) - sum(at / 19, at % 19)).abs() < 5e-6, "{at}");
        }
        out
    }

    #[test]
    fn every_vector_gives_the_sums_of_the_definition() {
        // SAFETY: the function needs only instructions that every processor has.
        computed(|row| unsafe { row.compute::<[f32; LANES], 4>() });
        let in_use = computed(convolve_row);
        #[cfg(target_arch = "x86_64")]
        if Instructions::in_use() >= Instructions::Avx2 {
            #[target_feature(enable = "avx2,fma")]
            fn avx2(row: Row<'_>) {
                // SAFETY: this function is compiled for these instructions.
                unsafe { row.compute::<__m256, 8>() }
            }
            // SAFETY: the processor has the instructions in use.
            let with_avx2 = computed(|row| unsafe { avx2(row) });
            assert_eq!(with_avx2, in_use, "products are fused and summed in one order in both");
        }
        let _ = in_use;
    }
}
