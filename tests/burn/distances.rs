//! The distances.

use std::num::NonZeroUsize;

use burn::backend::Flex;
use oddscan::{
    compute::{burn::BurnDistances, cpu::CpuDistances},
    domain::PairDistances,
    numeric::{scoring::SearchReach, token::TokenGrid},
};

use crate::tiny::tokens;

fn burn() -> BurnDistances<Flex> {
    BurnDistances::new(Default::default(), "burn-cpu")
}

/// Straight from the definition, in double precision.
fn brute_force(own: &TokenGrid, other: &TokenGrid) -> Vec<f64> {
    let distance = |a: &[half::f16], b: &[half::f16]| {
        let squares = a.iter().zip(b).map(|(a, b)| (a.to_f64() - b.to_f64()).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let others = || other.features().chunks(other.channels());
    let nearest = |own| others().map(|other| distance(own, other)).fold(f64::INFINITY, f64::min);
    own.features().chunks(own.channels()).map(nearest).collect()
}

fn assert_close(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        // f32 over 37 terms.
        assert!((f64::from(*found) - expected).abs() < 1e-5 * expected, "{found} {expected}");
    }
}

#[test]
fn distances_are_those_of_the_definition_in_blocks_of_any_size() {
    let (a, b) = (tokens(1, 6, 37, |c| c % 3 != 0), tokens(2, 6, 37, |c| c % 5 == 1));
    for max_block in [1, 1000, 1 << 26] {
        let mut distances = burn().with_max_block(max_block);
        let found = distances.nearest(&a, &b, SearchReach::WholeVolume).unwrap();
        assert_close(&found.first_to_second, &brute_force(&a, &b));
        assert_close(&found.second_to_first, &brute_force(&b, &a));
    }
}

#[test]
fn a_copied_scan_gets_distance_zero_and_mirrored_pairs_are_equal() {
    let (a, b) = (tokens(3, 6, 48, |c| c != 7), tokens(4, 6, 48, |c| c > 100));
    let own = burn().nearest(&a, &a, SearchReach::WholeVolume).unwrap();
    assert!(own.first_to_second.iter().chain(&own.second_to_first).all(|&d| d == 0.0));
    let there = burn().nearest(&a, &b, SearchReach::WholeVolume).unwrap();
    let back = burn().nearest(&b, &a, SearchReach::WholeVolume).unwrap();
    assert_eq!(there.first_to_second, back.second_to_first);
    assert_eq!(there.second_to_first, back.first_to_second);
}

#[test]
fn a_scan_without_tokens_is_infinitely_far() {
    let (a, b) = (tokens(5, 4, 8, |c| c < 3), tokens(6, 4, 8, |_| false));
    let found = burn().nearest(&a, &b, SearchReach::WholeVolume).unwrap();
    assert_eq!(found.first_to_second, [f32::INFINITY; 3]);
    assert!(found.second_to_first.is_empty());
}

#[test]
fn a_search_within_cells_is_that_of_the_native_engine() {
    let (a, b) = (tokens(7, 5, 16, |c| c % 2 == 0), tokens(8, 5, 16, |c| c % 3 == 0));
    let reach = SearchReach::Patches(NonZeroUsize::MIN);
    let expected = CpuDistances::new().nearest(&a, &b, reach).unwrap();
    assert_eq!(burn().nearest(&a, &b, reach).unwrap(), expected);
}
