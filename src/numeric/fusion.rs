//! Joins the evidence of tokens with that of intensities to one map (ours; docs/quality/evidence.md
//! has the measurements).

use super::{
    fine::{FineVolume, standardised},
    mask::at_cells,
    scoring::ScanScores,
    token::Foreground,
};

/// How much each kind of evidence weighs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weights {
    /// Weight of the token scores, in units of their upper quartile above their median.
    pub tokens: f64,
    /// Weight of the scan's own brightness, in the same units.
    pub brightness: f64,
    /// Weight of how far an intensity lies beyond the range of the other scans.
    pub range: f64,
    /// Depth in the brain at which evidence counts in full, mm. Above that it fades to the rim.
    pub rim_mm: f64,
}

impl Weights {
    /// Those of a map that is made of tokens alone.
    pub const OF_TOKENS_ALONE: Self =
        Self { tokens: 1.0, brightness: 0.0, range: 0.0, rim_mm: 0.0 };

    /// Whether the map is that of the tokens alone.
    pub fn are_of_tokens_alone(&self) -> bool {
        self.brightness == 0.0 && self.range == 0.0 && self.rim_mm == 0.0
    }
}

/// The map of one scan in the fine cells of its brain.
#[derive(Debug, Clone, PartialEq)]
pub struct FusedMap {
    /// The cells.
    pub foreground: Foreground,
    /// The sum of all parts for each cell. 0 is usual; 1 is the upper quartile of one kind alone.
    pub values: Vec<f32>,
    /// What each kind of evidence adds.
    pub parts: Parts,
    /// The depth of each cell in the brain, mm, at most 15.9.
    pub depths_mm: Vec<f32>,
    /// Whether hardly any other scan has brain in a cell
    /// ([`super::range::WindowRange::few_have`]).
    pub few_have: Vec<bool>,
}

/// What each kind of evidence adds to a map, for each of its cells.
#[derive(Debug, Clone, PartialEq)]
pub struct Parts {
    /// By the tokens.
    pub tokens: Vec<f32>,
    /// By the scan's own brightness.
    pub brightness: Vec<f32>,
    /// By intensities beyond the range of the other scans.
    pub range: Vec<f32>,
}

/// Joins all evidence about one scan: the weighted sum of standardised token scores, standardised
/// brightness, and `beyond` ([`super::range::WindowRange::beyond`]). All of it fades towards the
/// rim of the brain. `few_have` goes into the map as it is.
pub fn fuse(
    tokens: &ScanScores,
    fine: &FineVolume,
    beyond: &[f32],
    few_have: Vec<bool>,
    weights: &Weights,
) -> FusedMap {
    let scores = at_cells(&tokens.foreground, &tokens.cells, &fine.foreground);
    let depths_mm: Vec<f32> = fine.depths_mm().collect();
    let fades: Vec<f32> = depths_mm.iter().map(|&depth| fade(depth, weights.rim_mm)).collect();
    let weighted = |values: &[f32], weight: f64| -> Vec<f32> {
        let values = values.iter().zip(&fades);
        values.map(|(value, fade)| weight as f32 * value * fade).collect()
    };
    let brightness: Vec<f32> = fine.values.iter().map(|value| value.to_f32()).collect();
    let parts = Parts {
        tokens: weighted(&standardised(&scores), weights.tokens),
        brightness: weighted(&brightness, weights.brightness),
        range: weighted(beyond, weights.range),
    };
    let sums = parts.tokens.iter().zip(&parts.brightness).zip(&parts.range);
    let values = sums.map(|((tokens, brightness), range)| tokens + brightness + range).collect();
    FusedMap { foreground: fine.foreground.clone(), values, parts, depths_mm, few_have }
}

fn fade(depth_mm: f32, rim_mm: f64) -> f32 {
    if rim_mm > 0.0 { (depth_mm / rim_mm as f32).min(1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::numeric::{geometry::Shape3, mask::ScoreGrid};

    #[test]
    fn evidence_is_added_by_its_weights_and_fades_towards_the_rim() {
        let shape = Shape3([5, 1, 1]);
        let foreground = Foreground { shape, cells: vec![0, 1, 2, 3, 4] };
        let scores = [3.0, 1.0, 2.0, 5.0, 4.0].map(Some).to_vec();
        let tokens = ScanScores::new(ScoreGrid { foreground: foreground.clone(), scores });
        let fine = FineVolume {
            foreground,
            values: [0.0, 1.0, 0.0, 4.0, 0.0].map(f16::from_f32).to_vec(),
            depths: vec![48, 96, 255, 96, 24],
            cell_mm: 1.0,
        };
        let weights = Weights { tokens: 1.0, brightness: 0.5, range: 2.0, rim_mm: 6.0 };
        let fused = |beyond: [f32; 5], weights: &Weights| {
            fuse(&tokens, &fine, &beyond, vec![false; 5], weights)
        };
        let map = fused([0.0, 0.0, 0.25, 0.0, 1.0], &weights);
        // Standardised scores are 0, -2, -1, 2 and 1.
        assert_eq!(map.values, [0.0, -1.5, -0.5, 4.0, 0.75]);
        assert_eq!(map.parts.brightness, [0.0, 0.5, 0.0, 2.0, 0.0]);
        assert_eq!(map.parts.range, [0.0, 0.0, 0.5, 0.0, 0.5]);
        let alone = Weights::OF_TOKENS_ALONE;
        assert_eq!(fused([9.0; 5], &alone).values, [0.0, -2.0, -1.0, 2.0, 1.0]);
        assert!(alone.are_of_tokens_alone() && !weights.are_of_tokens_alone());
    }
}
