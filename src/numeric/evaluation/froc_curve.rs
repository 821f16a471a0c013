//! The curve of several scans from their counts ([`super::froc`]): lesions found by size against
//! false regions per scan, at thresholds that all scans share.

use super::{
    froc::FrocCounts,
    sizes::{BySize, by_size},
};

const N_THRESHOLDS: usize = 64;
/// The thresholds are exceeded by these shares of all healthy voxels.
const SHARES: [f64; 2] = [2e-4, 0.1];

/// Shares of healthy voxels that lie above the thresholds of a curve, in a geometric row, rising.
/// [`super::Ranking::thresholds`] makes thresholds of them.
pub fn shares() -> Vec<f64> {
    let [first, last] = SHARES;
    let step = |index: usize| index as f64 / (N_THRESHOLDS - 1) as f64;
    (0..N_THRESHOLDS).map(|index| first * (last / first).powf(step(index))).collect()
}

/// What a curve needs of one scan.
#[derive(Debug, Clone, Copy)]
pub struct CountedScan<'a> {
    /// Volume of each lesion, mm^3, in the order of the counts.
    pub volumes_mm3: &'a [f64],
    /// Its counts at the thresholds of the curve.
    pub counts: &'a FrocCounts,
}

/// Lesions that regions of the map meet, against false regions, at thresholds that all scans share.
#[derive(Debug, Clone, PartialEq)]
pub struct FrocCurve {
    /// Lesions of each class of volume.
    pub n_lesions: BySize,
    /// By falling threshold.
    pub points: Vec<FrocPoint>,
}

/// A threshold of the curve.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FrocPoint {
    /// Regions are those of voxels above it.
    pub threshold: f32,
    /// Regions that touch neither a lesion nor a normal hyperintensity.
    pub false_regions_per_scan: f64,
    /// Regions that touch a normal hyperintensity and no lesion.
    pub regions_on_normal_per_scan: f64,
    /// Lesions found, for each class of volume.
    pub n_found: BySize,
}

impl FrocCurve {
    /// The curve over some scans, whose counts are those at `thresholds`. `None` without lesions.
    pub fn of(scans: &[CountedScan<'_>], thresholds: &[f32]) -> Option<Self> {
        let n_lesions = by_size(scans.iter().flat_map(|scan| scan.volumes_mm3).copied());
        let has_lesions = n_lesions.iter().any(|&n| n > 0);
        let point = |(index, &threshold)| point(scans, index, threshold);
        has_lesions
            .then(|| Self { n_lesions, points: thresholds.iter().enumerate().map(point).collect() })
    }

    /// Most lesions of a class found at a threshold with at most `rate` false regions per scan.
    /// `None` if each threshold gives more.
    pub fn best(&self, class: usize, rate: f64) -> Option<usize> {
        let allowed = self.points.iter().filter(|point| point.false_regions_per_scan <= rate);
        allowed.map(|point| point.n_found[class]).max()
    }
}

fn point(scans: &[CountedScan<'_>], index: usize, threshold: f32) -> FrocPoint {
    let per_scan = |of: fn(&FrocCounts) -> &Vec<usize>| {
        scans.iter().map(|scan| of(scan.counts)[index]).sum::<usize>() as f64 / scans.len() as f64
    };
    let found = scans.iter().flat_map(|scan| {
        let lesions = scan.volumes_mm3.iter().zip(&scan.counts.found_at);
        lesions.filter(|(_, at)| at.is_some_and(|at| at <= index)).map(|(volume, _)| *volume)
    });
    FrocPoint {
        threshold,
        false_regions_per_scan: per_scan(|counts| &counts.n_false),
        regions_on_normal_per_scan: per_scan(|counts| &counts.n_on_normal),
        n_found: by_size(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_rise_evenly_from_the_first_to_the_last() {
        let shares = shares();
        assert_eq!(shares.len(), N_THRESHOLDS);
        assert!((shares[0] - 2e-4).abs() < 1e-12 && (shares[N_THRESHOLDS - 1] - 0.1).abs() < 1e-12);
        let ratios: Vec<f64> = shares.windows(2).map(|pair| pair[1] / pair[0]).collect();
        assert!(ratios.iter().all(|ratio| (ratio - ratios[0]).abs() < 1e-9 && *ratio > 1.0));
    }

    #[test]
    fn a_curve_adds_up_the_counts_of_its_scans() {
        let ill = FrocCounts {
            n_false: vec![1, 4],
            n_on_normal: vec![0, 2],
            found_at: vec![Some(1), Some(0), None],
        };
        let healthy = FrocCounts { n_false: vec![0, 3], n_on_normal: vec![1, 1], found_at: vec![] };
        let ill = CountedScan { volumes_mm3: &[50.0, 2000.0, 60.0], counts: &ill };
        let healthy = CountedScan { volumes_mm3: &[], counts: &healthy };

        let curve = FrocCurve::of(&[ill, healthy], &[2.0, 1.0]).unwrap();
        assert_eq!(curve.n_lesions, [2, 0, 1]);
        let [first, second] = curve.points[..] else { panic!("two thresholds") };
        assert_eq!((first.threshold, first.false_regions_per_scan), (2.0, 0.5));
        assert_eq!((first.regions_on_normal_per_scan, first.n_found), (0.5, [0, 0, 1]));
        assert_eq!((second.threshold, second.false_regions_per_scan), (1.0, 3.5));
        assert_eq!((second.regions_on_normal_per_scan, second.n_found), (1.5, [1, 0, 1]));
        // Without the healthy scan there are more false regions per scan.
        assert_eq!(
            FrocCurve::of(&[ill], &[2.0, 1.0]).unwrap().points[1].false_regions_per_scan,
            4.0
        );
        assert_eq!(FrocCurve::of(&[healthy], &[2.0, 1.0]), None);
    }

    #[test]
    fn the_best_point_within_a_rate_need_not_be_the_last() {
        // The rate falls where two false regions join, or where one reaches a lesion.
        let points = [(0.5, 1), (3.0, 2), (1.5, 4), (9.0, 5)].map(|(rate, n_found)| FrocPoint {
            threshold: 0.0,
            false_regions_per_scan: rate,
            regions_on_normal_per_scan: 0.0,
            n_found: [0, n_found, 0],
        });
        let curve = FrocCurve { n_lesions: [0, 6, 0], points: points.into() };
        let best = [0.25, 1.0, 2.0, 4.0, 9.0].map(|rate| curve.best(1, rate));
        assert_eq!(best, [None, Some(1), Some(4), Some(4), Some(5)]);
    }
}
