//! How many lesions of each size the map finds at how many false regions per scan.

use super::{
    case::Case,
    figures::{Froc, FrocPoint, SIZES, size_class},
};
use crate::numeric::evaluation::{
    Ranking,
    froc::{FrocCounts, FrocScan, MIN_REGION_MM3, counts, min_region_voxels},
};

const N_THRESHOLDS: usize = 64;
/// The thresholds are exceeded by these shares of all healthy voxels.
const SHARES: [f64; 2] = [2e-4, 0.1];

/// The curve over all scans; `None` without lesions. `ranking` holds the voxels of all cases.
pub(super) fn froc(cases: &[Case], ranking: &Ranking) -> Option<Froc> {
    let n_lesions = by_size(cases.iter().flat_map(volumes));
    if n_lesions.iter().sum::<usize>() == 0 {
        return None;
    }

    let thresholds = ranking.thresholds(&shares());
    let scans: Vec<FrocScan<'_>> = cases.iter().map(froc_scan).collect();
    let counts = counts(&scans, &thresholds);
    let points = thresholds
        .iter()
        .enumerate()
        .map(|(index, &threshold)| point(index, threshold, cases, &counts))
        .collect();
    let sizes = SIZES.map(|(size, ..)| size);
    Some(Froc { min_region_mm3: MIN_REGION_MM3, sizes, n_lesions, points })
}

/// Shares in a geometric row, rising.
fn shares() -> Vec<f64> {
    let [first, last] = SHARES;
    let step = |index: usize| index as f64 / (N_THRESHOLDS - 1) as f64;
    (0..N_THRESHOLDS).map(|index| first * (last / first).powf(step(index))).collect()
}

fn froc_scan(case: &Case) -> FrocScan<'_> {
    FrocScan {
        shape: case.shape,
        min_voxels: min_region_voxels(case.affine.voxel_volume_mm3()),
        voxels: &case.voxels,
        values: &case.values,
        lesions: &case.lesions,
        normal: &case.normal,
    }
}

fn point(index: usize, threshold: f32, cases: &[Case], counts: &[FrocCounts]) -> FrocPoint {
    let per_scan = |of: fn(&FrocCounts) -> &Vec<usize>| {
        counts.iter().map(|counts| of(counts)[index]).sum::<usize>() as f64 / counts.len() as f64
    };
    let found = cases.iter().zip(counts).flat_map(|(case, counts)| {
        let lesions = volumes(case).zip(&counts.found_at);
        lesions.filter_map(move |(volume, at)| at.is_some_and(|at| at <= index).then_some(volume))
    });
    FrocPoint {
        threshold,
        false_regions_per_scan: per_scan(|counts| &counts.n_false),
        regions_on_normal_per_scan: per_scan(|counts| &counts.n_on_normal),
        n_found: by_size(found),
    }
}

/// Volumes of the lesions of a scan, mm^3.
fn volumes(case: &Case) -> impl Iterator<Item = f64> + '_ {
    let voxel_mm3 = case.affine.voxel_volume_mm3();
    case.lesions.iter().map(move |region| region.len() as f64 * voxel_mm3)
}

fn by_size(volumes: impl Iterator<Item = f64>) -> [usize; SIZES.len()] {
    let mut n = [0; SIZES.len()];
    volumes.for_each(|volume| n[size_class(volume)] += 1);
    n
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
    fn volumes_are_counted_in_their_classes() {
        assert_eq!(by_size([10.0, 5000.0, 99.0, 100.0].into_iter()), [2, 1, 1]);
    }
}
