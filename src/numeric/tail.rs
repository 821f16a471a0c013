//! How likely a region is in a scan in which nothing is unusual (ours; docs/quality/mask.md has the
//! measurements).
//!
//! The *excess* of a region joins its size and its height: the sum, over its volume, of how far the
//! map lies above a reference height. Healthy scans have many regions of a small excess and few of
//! a large one. Their number per scan falls as a power of the excess. The power is measured. The
//! number of small regions is that of the other scans of the window. The median of these numbers
//! stays the same whatever the lesions of fewer than half of the scans are.

use super::{
    fusion::FusedMap,
    mask::regions,
    scoring::{MapProfile, quantile},
};

/// The reference height, spreads above the median of the map.
const HEIGHT: f64 = 2.0;

/// Regions count from this excess on.
const COUNTED: f64 = 0.1;

/// The number of healthy regions falls as this power of the excess, if the map shows tokens.
const TOKEN_POWER: f64 = 0.7;

/// The same where brightness counts in the map. Bright healthy tissue has smaller regions.
const BRIGHT_POWER: f64 = 1.1;

/// Fewest regions per scan that are expected, so that a clean window does not claim too much.
const MIN_RATE: f64 = 0.3;

/// The excess of a region: its volume, ml, times its mean height above the reference, spreads.
/// `heights` are the values of its voxels.
pub fn excess(heights: impl Iterator<Item = f32>, map: &MapProfile, voxel_mm3: f64) -> f64 {
    let above = |value: f32| (f64::from(value) - map.median) / map.spread - HEIGHT;
    heights.map(|value| above(value).max(0.0)).sum::<f64>() * voxel_mm3 / 1000.0
}

/// The reference height of a map; infinite if its values do not vary.
pub fn height(map: &MapProfile) -> f32 {
    if map.spread > 0.0 { (map.median + HEIGHT * map.spread) as f32 } else { f32::INFINITY }
}

/// The excess of every region of a map above the reference height, the largest first.
pub fn excesses(map: &FusedMap, profile: &MapProfile, cell_mm3: f64) -> Vec<f64> {
    if profile.spread <= 0.0 {
        return Vec::new();
    }
    let height = height(profile);
    let shape = map.foreground.shape;
    let (mut open, mut values) = (vec![false; shape.n_voxels()], vec![0.0; shape.n_voxels()]);
    for (&cell, &value) in map.foreground.cells.iter().zip(&map.values) {
        open[cell as usize] = value > height;
        values[cell as usize] = value;
    }
    let of_region =
        |region: &Vec<usize>| excess(region.iter().map(|&cell| values[cell]), profile, cell_mm3);
    let mut found: Vec<f64> = regions(open, shape, 1).iter().map(of_region).collect();
    found.sort_unstable_by(|a, b| b.total_cmp(a));
    found
}

/// What regions a scan of a window has if nothing in it is unusual.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UsualRegions {
    /// Regions per scan with an excess above [`COUNTED`].
    rate: f64,
    power: f64,
    n_others: usize,
}

impl UsualRegions {
    /// By the excesses of the regions of the other scans, of `n_others` people. `is_bright` says
    /// whether brightness counts in the maps.
    pub fn of(others: &[&[f64]], n_others: usize, is_bright: bool) -> Self {
        let count = |excesses: &&[f64]| excesses.iter().filter(|&&e| e > COUNTED).count() as f32;
        let mut counts: Vec<f32> = others.iter().map(count).collect();
        let rate = if counts.is_empty() { 0.0 } else { quantile(&mut counts, 0.5) };
        let power = if is_bright { BRIGHT_POWER } else { TOKEN_POWER };
        Self { rate: rate.max(MIN_RATE), power, n_others }
    }

    /// The probability that such a scan has a region of at least this excess. It is never below
    /// [`UsualRegions::least_probability`].
    pub fn probability(&self, excess: f64) -> f64 {
        let n_expected = if excess > 0.0 {
            self.rate * (COUNTED / excess).powf(self.power)
        } else {
            f64::INFINITY
        };
        (-(-n_expected).exp_m1()).max(self.least_probability())
    }

    /// The least that the window can claim: with n others, 1 / (n + 1).
    pub fn least_probability(&self) -> f64 {
        1.0 / (self.n_others + 1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::{fusion::Parts, geometry::Shape3, token::Foreground};

    const PROFILE: MapProfile = MapProfile { median: 1.0, spread: 2.0, tail: 3.0 };

    #[test]
    fn an_excess_grows_with_size_and_height() {
        // Heights are in spreads of 2 above 1: 1.5 is below the reference of 2, 4 is 2 above it.
        let excess = |values: &[f32]| excess(values.iter().copied(), &PROFILE, 500.0);
        assert_eq!(excess(&[4.0]), 0.0);
        assert_eq!(excess(&[9.0]), 1.0);
        assert_eq!(excess(&[9.0, 9.0, 7.0]), 2.5);
    }

    #[test]
    fn regions_of_a_map_are_found_with_the_largest_first() {
        let values = vec![9.0, 0.0, 0.0, 7.0, 9.0, 5.0];
        let foreground = Foreground { shape: Shape3([6, 1, 1]), cells: (0..6).collect() };
        let none = || vec![0.0; 6];
        let parts = Parts { tokens: none(), brightness: none(), range: none() };
        let (depths_mm, few_have) = (vec![9.0; 6], vec![false; 6]);
        let map = FusedMap { foreground, values, parts, depths_mm, few_have };
        assert_eq!(excesses(&map, &PROFILE, 500.0), [1.5, 1.0]);
        let flat = MapProfile { spread: 0.0, ..PROFILE };
        assert_eq!(excesses(&map, &flat, 500.0), [0.0; 0]);
    }

    #[test]
    fn a_probability_falls_with_the_excess_and_stops_where_the_window_can_say_no_more() {
        let others: [&[f64]; 3] = [&[5.0, 0.2], &[900.0, 0.3, 0.01], &[0.05]];
        let usual = UsualRegions::of(&others, 99, true);
        // The median of 2, 2 and 0 regions is 2.
        let n_expected = 2.0 * 0.05_f64.powf(1.1);
        assert!((usual.probability(2.0) - (1.0 - (-n_expected).exp())).abs() < 1e-12);
        assert!(usual.probability(1.0) > usual.probability(2.0));
        assert_eq!(usual.probability(0.0), 1.0);
        assert_eq!(usual.probability(1e9), 0.01);
        assert_eq!(UsualRegions::of(&others, 9, true).probability(1e9), 0.1);
        // Tokens have larger healthy regions.
        let tokens = UsualRegions::of(&others, 99, false);
        assert!(tokens.probability(2.0) > usual.probability(2.0));
        // A clean window does not make every region unusual.
        assert!(UsualRegions::of(&[&[]], 99, true).probability(0.1) > 0.2);
    }
}
