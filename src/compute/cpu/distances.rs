//! Nearest distances between the tokens of two scans on the CPU.

use std::cmp::Ordering;

use half::bf16;

use super::{
    tile::{kernel_bf16, kernel_f32},
    tokens::{Ready, both},
    whole_volume::{Factors, whole_volume},
    within_reach::within_reach,
};
use crate::{
    domain::{PairDistances, error::DeviceError},
    numeric::{
        scoring::{PairColumns, SearchReach},
        token::TokenGrid,
    },
};

/// Distances on all cores. Products find the nearest token, and the differences give its distance.
/// Mirrored pairs give mirrored columns, to the last bit.
#[derive(Default)]
pub struct CpuDistances {
    /// The two prepared scans of the last pair. They are kept, because one of them is often in the
    /// next pair, too, and to get new memory took as long as the search.
    ready: [Ready; 2],
    /// Factors of the products for the whole volume, kept for the same reason.
    f32: Factors<f32>,
    bf16: Factors<bf16>,
    /// Whether products of bf16 are not used.
    in_single: bool,
}

impl CpuDistances {
    /// Uses the fastest products of the processor to find candidates.
    pub fn new() -> Self {
        Self::default()
    }

    /// Finds candidates with products of f32, even if the processor has products of bf16. Distances
    /// are always computed in f32.
    pub fn in_single() -> Self {
        Self { in_single: true, ..Self::default() }
    }

    fn whole_volume(&mut self, first: &TokenGrid, second: &TokenGrid) -> PairColumns {
        // Each pair has one order, because candidates are stored differently for rows and columns.
        if order(first, second).is_gt() {
            return self.whole_volume(second, first).mirrored();
        }
        let (first, second) = both(&mut self.ready, [first, second]);
        match kernel_bf16().filter(|_| !self.in_single) {
            Some(kernel) => whole_volume(kernel, &first, &second, &mut self.bf16),
            None => whole_volume(kernel_f32(), &first, &second, &mut self.f32),
        }
    }
}

/// Some fixed order of scans by their content.
fn order(first: &TokenGrid, second: &TokenGrid) -> Ordering {
    fn bits(grid: &TokenGrid) -> impl Iterator<Item = u16> {
        grid.features().iter().map(|value| value.to_bits())
    }
    first.cells().cmp(second.cells()).then_with(|| bits(first).cmp(bits(second)))
}

impl PairDistances for CpuDistances {
    fn nearest(
        &mut self,
        first: &TokenGrid,
        second: &TokenGrid,
        reach: SearchReach,
    ) -> Result<PairColumns, DeviceError> {
        assert_eq!(first.channels(), second.channels(), "tokens of one method");
        assert_eq!(first.shape(), second.shape(), "tokens of one method");
        Ok(match reach {
            SearchReach::WholeVolume => self.whole_volume(first, second),
            SearchReach::Patches(reach) => {
                let (first, second) = both(&mut self.ready, [first, second]);
                within_reach(&first, &second, reach.get())
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use half::f16;

    use super::{super::instructions::Instructions, *};
    use crate::numeric::{geometry::Shape3, projection::Normal};

    fn tokens(seed: u64, side: usize, channels: usize, keep: impl Fn(u32) -> bool) -> TokenGrid {
        tokens_of(seed, Shape3::cube(side), channels, keep)
    }

    fn tokens_of(
        seed: u64,
        shape: Shape3,
        channels: usize,
        keep: impl Fn(u32) -> bool,
    ) -> TokenGrid {
        let cells: Vec<u32> = (0..shape.n_voxels() as u32).filter(|&c| keep(c)).collect();
        let mut normal = Normal::new(seed);
        let features = (0..cells.len() * channels).map(|_| f16::from_f64(normal.next())).collect();
        TokenGrid::new(shape, channels, cells, features).unwrap()
    }

    /// The distances by definition, in double precision.
    fn brute_force(own: &TokenGrid, other: &TokenGrid, reach: [usize; 3]) -> Vec<f64> {
        let (shape, width) = (own.shape(), own.channels());
        let row = |grid: &TokenGrid, token: usize| -> Vec<f64> {
            grid.features()[token * width..(token + 1) * width].iter().map(|f| f.to_f64()).collect()
        };
        let near = |a: u32, b: u32| {
            let (a, b) = (shape.voxel(a as usize), shape.voxel(b as usize));
            (0..3).all(|axis| a[axis].abs_diff(b[axis]) <= reach[axis])
        };
        (0..own.n_tokens())
            .map(|token| {
                (0..other.n_tokens())
                    .filter(|&o| near(own.cells()[token], other.cells()[o]))
                    .map(|o| {
                        let (a, b) = (row(own, token), row(other, o));
                        a.iter().zip(&b).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt()
                    })
                    .fold(f64::INFINITY, f64::min)
            })
            .collect()
    }

    /// Both ways to find candidates.
    fn both() -> [CpuDistances; 2] {
        [CpuDistances::new(), CpuDistances::in_single()]
    }

    fn assert_close(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            // Single precision over some 40 terms.
            let close = f64::from(*f) == *e || (f64::from(*f) - e).abs() < 1e-5 * e;
            assert!(close, "{f} instead of {e}");
        }
    }

    #[test]
    fn distances_are_those_of_the_definition_for_any_reach() {
        let a = tokens(1, 6, 37, |c| c % 3 != 0);
        let b = tokens(2, 6, 37, |c| c % 5 == 1);
        for (reach, cells) in [(6, 0), (1, 1), (2, 2)] {
            let search =
                NonZeroUsize::new(cells).map_or(SearchReach::WholeVolume, SearchReach::Patches);
            for mut distances in both() {
                let found = distances.nearest(&a, &b, search).unwrap();
                assert_close(&found.first_to_second, &brute_force(&a, &b, [reach; 3]));
                assert_close(&found.second_to_first, &brute_force(&b, &a, [reach; 3]));
            }
        }
    }

    #[test]
    fn the_reach_is_that_of_a_patch_along_the_finer_axis_too() {
        let shape = Shape3([4, 8, 4]);
        let a = tokens_of(7, shape, 24, |c| c % 3 != 0);
        let b = tokens_of(8, shape, 24, |c| c % 5 < 2);
        let reach = SearchReach::Patches(NonZeroUsize::MIN);
        let found = CpuDistances::new().nearest(&a, &b, reach).unwrap();
        assert_close(&found.first_to_second, &brute_force(&a, &b, [1, 2, 1]));
        assert_close(&found.second_to_first, &brute_force(&b, &a, [1, 2, 1]));
    }

    #[test]
    fn a_copied_scan_gets_distance_zero_and_mirrored_pairs_are_equal() {
        let (a, b) = (tokens(3, 6, 48, |c| c != 7), tokens(4, 6, 48, |c| c > 100));
        for reach in [SearchReach::WholeVolume, SearchReach::Patches(NonZeroUsize::MIN)] {
            for mut distances in both() {
                let own = distances.nearest(&a, &a, reach).unwrap();
                assert!(own.first_to_second.iter().all(|&d| d == 0.0));
                let there = distances.nearest(&a, &b, reach).unwrap();
                let back = distances.nearest(&b, &a, reach).unwrap();
                assert_eq!(there.first_to_second, back.second_to_first);
                assert_eq!(there.second_to_first, back.first_to_second);
            }
        }
    }

    #[test]
    fn the_nearest_is_found_among_many_that_are_nearly_as_near() {
        // Tokens close around a few centres, closer than those of brains. Products alone cannot
        // separate these.
        let around = |seed: u64, scatter: f64| {
            let (mut normal, mut centres) = (Normal::new(seed), Normal::new(9));
            let centres: Vec<f64> = (0..8 * 96).map(|_| centres.next()).collect();
            let cells: Vec<u32> = (0..600).collect();
            let features = cells.iter().flat_map(|&cell| {
                let centre = centres[cell as usize % 8 * 96..][..96].iter();
                let near = centre.map(|c| f16::from_f64(0.1 * (c + scatter * normal.next())));
                near.collect::<Vec<_>>()
            });
            let features = features.collect();
            TokenGrid::new(Shape3::cube(12), 96, cells, features).unwrap()
        };
        for scatter in [0.4, 0.03, 0.003] {
            let (a, b) = (around(1, scatter), around(2, scatter));
            let expected = brute_force(&a, &b, [12; 3]);
            for mut distances in both() {
                let found = distances.nearest(&a, &b, SearchReach::WholeVolume).unwrap();
                assert_close(&found.first_to_second, &expected);
            }
        }
    }

    #[test]
    fn odd_shapes_and_scans_of_few_tokens_are_compared() {
        for shape in [[1, 5, 7], [7, 1, 1], [3, 6, 3]] {
            let shape = Shape3(shape);
            let some = tokens_of(1, shape, 5, |c| c % 2 == 0);
            for other in [
                tokens_of(2, shape, 5, |_| true),
                tokens_of(3, shape, 5, |c| c == 1),
                tokens_of(4, shape, 5, |_| false),
            ] {
                for cells in [0, 1, 50] {
                    let search = NonZeroUsize::new(cells);
                    let search = search.map_or(SearchReach::WholeVolume, SearchReach::Patches);
                    let reach = match cells {
                        0 => [50; 3],
                        _ => crate::numeric::token::cells_per_patch(shape).map(|n| n * cells),
                    };
                    for mut distances in both() {
                        let found = distances.nearest(&some, &other, search).unwrap();
                        let there = brute_force(&some, &other, reach);
                        assert_close(&found.first_to_second, &there);
                        let back = brute_force(&other, &some, reach);
                        assert_close(&found.second_to_first, &back);
                    }
                }
            }
        }
    }

    /// With `cargo nextest`, each test has its own process. With `cargo test`, the first limit
    /// counts.
    #[test]
    fn distances_are_those_of_the_definition_with_avx2() {
        Instructions::Avx2.limit();
        distances_are_those_of_the_definition_for_any_reach();
        the_nearest_is_found_among_many_that_are_nearly_as_near();
    }

    #[test]
    fn distances_are_those_of_the_definition_on_any_processor() {
        Instructions::Portable.limit();
        distances_are_those_of_the_definition_for_any_reach();
        the_nearest_is_found_among_many_that_are_nearly_as_near();
    }

    #[test]
    fn a_token_out_of_reach_of_all_others_is_infinitely_far() {
        let (a, b) = (tokens(5, 4, 8, |c| c == 0), tokens(6, 4, 8, |c| c == 63));
        let found =
            CpuDistances::new().nearest(&a, &b, SearchReach::Patches(NonZeroUsize::MIN)).unwrap();
        assert_eq!(found.first_to_second, [f32::INFINITY]);
    }
}
