//! Loops that the compiler vectorises for the widest instruction set that the processor has.
//!
//! Results differ between instruction sets in the last bits, because those with vectors have a
//! fused multiply-add.

/// Compiles a kernel for AVX-512, for AVX2 and portably, and chooses one at run time. A kernel may
/// be generic over the [`Element`] that it writes. In the kernel, `FUSED` says whether there is a
/// fused multiply-add.
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
                use $crate::compute::cpu::instructions::Instructions;
                let instructions = Instructions::in_use();
                if instructions >= Instructions::Avx512 {
                    // SAFETY: the processor has the instructions in use.
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

pub(super) use vectorised;

/// a * b + c.
#[inline(always)]
pub(super) fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    // Without such an instruction, `mul_add` would be a call.
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Number of lanes of a sum. Separate lanes let the compiler use vectors, and the order is the same
/// on every machine.
pub(super) const LANES: usize = 16;

/// A sum to which `add` adds a term for each value.
#[inline(always)]
pub(super) fn sum_of<T: Copy>(row: &[T], add: impl Fn(T, f32) -> f32) -> f32 {
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

/// A sum to which `add` adds a term for each pair of values of two rows.
#[inline(always)]
pub(super) fn sum_of_both(a: &[f32], b: &[f32], add: impl Fn(f32, f32, f32) -> f32) -> f32 {
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
