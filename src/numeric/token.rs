//! From slice features to localised 3D tokens: depth pooling, l2 norm, projection, joining of views
//! (Le-Gia and Ahn 2026, section 3; `eq. 1` to `eq. 3`).

use half::f16;

/// The tokens of one scan at one encoder layer: one row of features per foreground cell of an
/// `[n, n, n]` grid over the canonical cube.
///
/// Cells outside the brain are absent, not zero: zero tokens would match each other. Features are
/// kept in half precision everywhere, so that scores from memory and from the store are the same
/// to the last bit.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenGrid {
    side: usize,
    channels: usize,
    cells: Vec<u32>,
    features: Vec<f16>,
}

/// What makes the parts of a [`TokenGrid`] contradict each other.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "token grid of {n_cells} cells with {channels} channels on a side of {side} has {n_features} features, or cells out of order or range"
)]
pub struct TokenGridError {
    side: usize,
    channels: usize,
    n_cells: usize,
    n_features: usize,
}

impl TokenGrid {
    /// Joins checked parts. `cells` are positions `x + side * (y + side * z)`, ascending and
    /// unique; `features` is `[cells.len(), channels]`, row-major.
    pub fn new(
        side: usize,
        channels: usize,
        cells: Vec<u32>,
        features: Vec<f16>,
    ) -> Result<Self, TokenGridError> {
        let ascending = cells.windows(2).all(|pair| pair[0] < pair[1]);
        let in_range = cells.last().is_none_or(|&last| (last as usize) < side.pow(3));
        let finite = features.iter().all(|f| f.is_finite());
        if !ascending || !in_range || !finite || features.len() != cells.len() * channels {
            return Err(TokenGridError {
                side,
                channels,
                n_cells: cells.len(),
                n_features: features.len(),
            });
        }
        Ok(Self { side, channels, cells, features })
    }

    /// Cells along each edge of the grid.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Features per token.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Number of foreground cells.
    pub fn n_tokens(&self) -> usize {
        self.cells.len()
    }

    /// Positions of the foreground cells, ascending: `x + side * (y + side * z)`.
    pub fn cells(&self) -> &[u32] {
        &self.cells
    }

    /// `[n_tokens, channels]`, row-major.
    pub fn features(&self) -> &[f16] {
        &self.features
    }
}
