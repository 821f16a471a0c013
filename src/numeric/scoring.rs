//! From nearest distances to scores: how rare is a token among the other scans of the window?
//! (Le-Gia and Ahn 2026, section 3; MuSc's mutual scoring, Li et al. 2024.)

use std::num::NonZeroUsize;

/// How far from its own cell a token looks for a match in another scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SearchReach {
    /// Any token of the other scan (the paper; needs no alignment).
    WholeVolume,
    /// Tokens at most this many cells away along each axis (Chebyshev distance); 1 means the 27
    /// cells around the token's own. As good as the whole volume on aligned scans, at about a
    /// sixtieth of the distances.
    Cells(NonZeroUsize),
}

/// Nearest distances between the tokens of two scans at one layer, in both directions.
///
/// Euclidean, unitless. A token without any candidate in reach has distance infinity.
#[derive(Debug, Clone, PartialEq)]
pub struct PairColumns {
    /// For each token of the first scan its distance to the nearest token of the second.
    pub first_to_second: Vec<f32>,
    /// For each token of the second scan its distance to the nearest token of the first.
    pub second_to_first: Vec<f32>,
}
