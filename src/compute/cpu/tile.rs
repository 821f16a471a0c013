//! The innermost loops: one tile of a product in each instruction set.

use half::bf16;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::instructions::Amx;
#[cfg(target_arch = "x86_64")]
use super::instructions::{Avx2, Avx512, Avx512Bf16};
use super::product::{Kernel, Tile, WIDTH};

/// The kernel for single precision, with the widest instructions in use.
pub(super) fn kernel_f32() -> Kernel<f32> {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(has) = Avx512::in_use() {
            return avx512::kernel_f32(has);
        }
        if let Some(has) = Avx2::in_use() {
            return avx2::kernel_f32(has);
        }
    }
    portable_kernel()
}

/// The kernel for bf16, if the instructions in use have products of bf16.
pub(super) fn kernel_bf16() -> Option<Kernel<bf16>> {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Some(has) = Amx::in_use() {
        return Some(amx::kernel_bf16(has));
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(has) = Avx512Bf16::in_use() {
        return Some(avx512::kernel_bf16(has));
    }
    None
}

fn portable_kernel() -> Kernel<f32> {
    // SAFETY: the function needs only instructions that every processor has.
    unsafe { Kernel::new(PORTABLE_ROWS, portable_f32) }
}

/// The function of a kernel. It calls one of several by the number of rows, so that the sums stay
/// in registers.
macro_rules! by_rows {
    ($name:ident, $element:ty, $of:ident, $($n:literal)*) => {
        unsafe fn $name(
            left: *const $element,
            stride: usize,
            rows: usize,
            panel: *const $element,
            inner: usize,
            tile: &mut Tile,
        ) {
            match rows {
                // SAFETY: the caller guarantees instructions and extents.
                $($n => unsafe { $of::<$n>(left, stride, panel, inner, tile) },)*
                _ => unreachable!("more rows than the kernel has"),
            }
        }
    };
}

const PORTABLE_ROWS: usize = 4;

/// Plain loops. The compiler vectorises them with instructions that every processor has.
unsafe fn portable_f32(
    left: *const f32,
    stride: usize,
    rows: usize,
    panel: *const f32,
    inner: usize,
    tile: &mut Tile,
) {
    /// Columns at a time: 4 x 8 sums and a line of the panel fit into 16 registers of 4 lanes.
    const PART: usize = 8;
    for row in 0..rows {
        tile.0[row] = [0.0; WIDTH];
    }
    // SAFETY: the caller guarantees these extents.
    let panel = unsafe { std::slice::from_raw_parts(panel, inner * WIDTH) };
    for start in (0..WIDTH).step_by(PART) {
        let mut sums = [[0.0_f32; PART]; PORTABLE_ROWS];
        for (k, line) in panel.chunks_exact(WIDTH).enumerate() {
            let line: &[f32; PART] = line[start..start + PART].try_into().expect("of this length");
            for (row, sums) in sums.iter_mut().enumerate() {
                // A row beyond the last repeats it, so that the loop has a fixed length.
                // SAFETY: as above.
                let factor = unsafe { *left.add(row.min(rows - 1) * stride + k) };
                sums.iter_mut().zip(line).for_each(|(sum, value)| *sum += factor * value);
            }
        }
        for (row, sums) in sums.iter().enumerate().take(rows) {
            tile.0[row][start..start + PART].copy_from_slice(sums);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::super::{
        instructions::{Avx512, Avx512Bf16},
        product::{Kernel, Tile, WIDTH},
    };

    /// 24 sums, two lines of the panel and a broadcast: 27 of 32 registers.
    const ROWS: usize = 12;

    pub(super) fn kernel_f32(_: Avx512) -> Kernel<f32> {
        // SAFETY: the token says that the processor has the instructions.
        unsafe { Kernel::new(ROWS, tile_f32) }
    }

    by_rows!(tile_f32, f32, f32_rows, 1 2 3 4 5 6 7 8 9 10 11 12);

    #[target_feature(enable = "avx512f")]
    unsafe fn f32_rows<const R: usize>(
        left: *const f32,
        stride: usize,
        panel: *const f32,
        inner: usize,
        tile: &mut Tile,
    ) {
        // SAFETY: the caller guarantees the extents.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; R];
            for k in 0..inner {
                let line = panel.add(k * WIDTH);
                let line = [_mm512_load_ps(line), _mm512_load_ps(line.add(16))];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let factor = _mm512_set1_ps(*left.add(row * stride + k));
                    sums[0] = _mm512_fmadd_ps(factor, line[0], sums[0]);
                    sums[1] = _mm512_fmadd_ps(factor, line[1], sums[1]);
                }
            }
            store(&sums, tile);
        }
    }

    pub(super) fn kernel_bf16(_: Avx512Bf16) -> Kernel<bf16> {
        // SAFETY: the token says that the processor has the instructions.
        unsafe { Kernel::new(ROWS, tile_bf16) }
    }

    by_rows!(tile_bf16, bf16, bf16_rows, 1 2 3 4 5 6 7 8 9 10 11 12);

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn bf16_rows<const R: usize>(
        left: *const bf16,
        stride: usize,
        panel: *const bf16,
        inner: usize,
        tile: &mut Tile,
    ) {
        // SAFETY: the caller guarantees the extents; registers of 512 bits are read as what they
        // hold.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; R];
            for k in (0..inner).step_by(2) {
                let line = panel.add(k * WIDTH);
                let pairs = |at: usize| -> __m512bh {
                    std::mem::transmute(_mm512_load_si512(line.add(at).cast()))
                };
                let line = [pairs(0), pairs(32)];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let pair = left.add(row * stride + k).cast::<i32>().read_unaligned();
                    let pair: __m512bh = std::mem::transmute(_mm512_set1_epi32(pair));
                    sums[0] = _mm512_dpbf16_ps(sums[0], pair, line[0]);
                    sums[1] = _mm512_dpbf16_ps(sums[1], pair, line[1]);
                }
            }
            store(&sums, tile);
        }
    }

    #[target_feature(enable = "avx512f")]
    fn store<const R: usize>(sums: &[[__m512; 2]; R], tile: &mut Tile) {
        for (row, sums) in tile.0.iter_mut().zip(sums) {
            // SAFETY: rows of a tile have 32 entries and begin at a cache line.
            unsafe {
                _mm512_store_ps(row.as_mut_ptr(), sums[0]);
                _mm512_store_ps(row.as_mut_ptr().add(16), sums[1]);
            }
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    //! Two by two registers of 16 x 16 sums each. The compiler does not know these registers. So
    //! one block of assembly does all work in them, and nothing else in the process uses them.

    use std::{arch::asm, cell::Cell};

    use half::bf16;

    use super::super::{
        instructions::Amx,
        product::{Kernel, Tile, WIDTH},
    };

    /// Rows of two registers.
    const ROWS: usize = 32;

    pub(super) fn kernel_bf16(_: Amx) -> Kernel<bf16> {
        // SAFETY: the token says that the processor has the instructions.
        unsafe { Kernel::new(ROWS, tile_bf16) }
    }

    /// The data that LDTILECFG reads.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes_per_row: [u16; 16],
        rows: [u8; 16],
    }

    /// Registers 0 to 3 hold sums, 4 and 5 left rows, and 6 and 7 the halves of a panel.
    fn configuration(rows: usize) -> Configuration {
        let (upper, lower) = (rows.min(16) as u8, rows.saturating_sub(16) as u8);
        let mut of = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes_per_row: [0; 16],
            rows: [0; 16],
        };
        of.rows[..8].copy_from_slice(&[upper, upper, lower, lower, upper, lower, 16, 16]);
        for (bytes, &rows) in of.bytes_per_row.iter_mut().zip(&of.rows) {
            *bytes = if rows == 0 { 0 } else { 64 };
        }
        of
    }

    thread_local! {
        /// Rows for which this thread's registers are configured. They are stored, because the
        /// configuration takes as long as a third of a tile.
        static CONFIGURED: Cell<usize> = const { Cell::new(0) };
    }

    unsafe fn tile_bf16(
        left: *const bf16,
        stride: usize,
        rows: usize,
        panel: *const bf16,
        inner: usize,
        tile: &mut Tile,
    ) {
        if CONFIGURED.replace(rows) != rows {
            let configuration = configuration(rows);
            // SAFETY: the caller guarantees that the processor has AMX and the process may use it.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &configuration, options(nostack, preserves_flags, readonly));
            }
        }
        // SAFETY: as for the caller. A step takes 32 entries of the inner extent, which is padded
        // to a multiple of 32.
        unsafe {
            if rows > 16 {
                two_by_two(left, stride, panel, inner / 32, tile);
            } else {
                one_by_two(left, stride, panel, inner / 32, tile);
            }
        }
    }

    /// Bytes from row to row, the same for a panel (pairs of bf16) and a tile (f32).
    const ROW: usize = 4 * WIDTH;

    unsafe fn two_by_two(
        left: *const bf16,
        stride: usize,
        panel: *const bf16,
        n_steps: usize,
        tile: &mut Tile,
    ) {
        // SAFETY: the caller guarantees the values that are read, and the tile has the 32 rows that
        // are written.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "test {n}, {n}",
                "jz 3f",
                "2:",
                "tileloadd tmm6, [{panel} + {row}]",
                "tileloadd tmm7, [{panel} + {row} + 64]",
                "tileloadd tmm4, [{upper} + {stride}]",
                "tileloadd tmm5, [{lower} + {stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {panel}, 2048",
                "add {upper}, 64",
                "add {lower}, 64",
                "dec {n}",
                "jnz 2b",
                "3:",
                "tilestored [{tile} + {row}], tmm0",
                "tilestored [{tile} + {row} + 64], tmm1",
                "tilestored [{tile} + {row} + 2048], tmm2",
                "tilestored [{tile} + {row} + 2112], tmm3",
                n = inout(reg) n_steps => _,
                panel = inout(reg) panel => _,
                upper = inout(reg) left => _,
                lower = inout(reg) left.add(16 * stride) => _,
                stride = in(reg) 2 * stride,
                row = in(reg) ROW,
                tile = in(reg) tile.0.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// As [`two_by_two`], for at most 16 rows.
    unsafe fn one_by_two(
        left: *const bf16,
        stride: usize,
        panel: *const bf16,
        n_steps: usize,
        tile: &mut Tile,
    ) {
        // SAFETY: as above.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "test {n}, {n}",
                "jz 3f",
                "2:",
                "tileloadd tmm6, [{panel} + {row}]",
                "tileloadd tmm7, [{panel} + {row} + 64]",
                "tileloadd tmm4, [{left} + {stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {panel}, 2048",
                "add {left}, 64",
                "dec {n}",
                "jnz 2b",
                "3:",
                "tilestored [{tile} + {row}], tmm0",
                "tilestored [{tile} + {row} + 64], tmm1",
                n = inout(reg) n_steps => _,
                panel = inout(reg) panel => _,
                left = inout(reg) left => _,
                stride = in(reg) 2 * stride,
                row = in(reg) ROW,
                tile = in(reg) tile.0.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::super::{
        instructions::Avx2,
        product::{Kernel, Tile, WIDTH},
    };

    /// 12 sums, two parts of a panel's line and a broadcast: 15 of 16 registers.
    const ROWS: usize = 6;

    pub(super) fn kernel_f32(_: Avx2) -> Kernel<f32> {
        // SAFETY: the token says that the processor has the instructions.
        unsafe { Kernel::new(ROWS, tile_f32) }
    }

    by_rows!(tile_f32, f32, f32_rows, 1 2 3 4 5 6);

    #[target_feature(enable = "avx2,fma")]
    unsafe fn f32_rows<const R: usize>(
        left: *const f32,
        stride: usize,
        panel: *const f32,
        inner: usize,
        tile: &mut Tile,
    ) {
        // SAFETY: the caller guarantees the extents.
        unsafe {
            for half in [0, 16] {
                let mut sums = [[_mm256_setzero_ps(); 2]; R];
                for k in 0..inner {
                    let line = panel.add(k * WIDTH + half);
                    let line = [_mm256_load_ps(line), _mm256_load_ps(line.add(8))];
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let factor = _mm256_set1_ps(*left.add(row * stride + k));
                        sums[0] = _mm256_fmadd_ps(factor, line[0], sums[0]);
                        sums[1] = _mm256_fmadd_ps(factor, line[1], sums[1]);
                    }
                }
                for (row, sums) in tile.0.iter_mut().zip(&sums) {
                    _mm256_store_ps(row.as_mut_ptr().add(half), sums[0]);
                    _mm256_store_ps(row.as_mut_ptr().add(half + 8), sums[1]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::product::{Element, Panels, Rows, multiply},
        *,
    };

    /// Every kernel that this processor has, against the definition.
    #[test]
    fn tiles_are_the_products_of_the_definition_for_all_numbers_of_rows() {
        check("portable", Some(portable_kernel()));
        #[cfg(target_arch = "x86_64")]
        {
            check("AVX2", Avx2::in_use().map(avx2::kernel_f32));
            check("AVX-512", Avx512::in_use().map(avx512::kernel_f32));
            check("AVX-512 BF16", Avx512Bf16::in_use().map(avx512::kernel_bf16));
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        check("AMX", Amx::in_use().map(amx::kernel_bf16));
    }

    fn check<E: Element>(instructions: &str, kernel: Option<Kernel<E>>) {
        let Some(kernel) = kernel else {
            eprintln!("skipped: {instructions}, which this processor does not have");
            return;
        };
        // Whole numbers are exact in both formats and in any order.
        let value = |i: usize| ((i * 7919) % 31) as f32 - 15.0;
        for (inner, columns) in [(1, 1), (7, 33), (32, 32), (37, 70), (384, 40)] {
            let right: Vec<f32> = (0..columns * inner).map(value).collect();
            let panels = Panels::<E>::of_columns(&right, inner);
            for n in 1..=2 * kernel.rows {
                // Entries between the rows, which must not count.
                let stride = E::padded(inner) + 3;
                let mut left = vec![E::of(0.0); n * stride];
                for (row, left) in left.chunks_exact_mut(stride).enumerate() {
                    left[E::padded(inner)..].fill(E::of(1000.0));
                    let values = (row * inner..).map(|i| E::of(value(i)));
                    left[..inner].iter_mut().zip(values).for_each(|(left, value)| *left = value);
                }
                let mut found = vec![f32::NAN; n * columns];
                multiply(kernel, Rows { values: &left, n, stride }, &panels, |place, tile| {
                    for row in 0..place.rows {
                        let at = (place.row + row) * columns + place.column;
                        let values = &tile.0[row][..place.columns];
                        found[at..at + place.columns].copy_from_slice(values);
                    }
                });
                for (index, found) in found.iter().enumerate() {
                    let (row, column) = (index / columns, index % columns);
                    let right = &right[column * inner..(column + 1) * inner];
                    let products =
                        right.iter().enumerate().map(|(k, b)| value(row * inner + k) * b);
                    let expected: f32 = products.sum();
                    let place =
                        format!("{instructions}, {n} x {inner} x {columns} at {row}, {column}");
                    assert_eq!(*found, expected, "{place}");
                }
            }
        }
    }
}
