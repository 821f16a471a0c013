//! How many lesions of each size the map finds at how many false regions per scan.

use super::case::Case;
use crate::numeric::evaluation::{
    Ranking,
    froc::{FrocScan, counts, min_region_voxels},
    froc_curve::{CountedScan, FrocCurve, shares},
};

/// The curve over all scans; `None` without lesions. `ranking` holds the voxels of all cases.
pub(super) fn froc(cases: &[Case], ranking: &Ranking) -> Option<FrocCurve> {
    if cases.iter().all(|case| case.lesions.is_empty()) {
        return None;
    }
    let thresholds = ranking.thresholds(&shares());
    let scans: Vec<FrocScan<'_>> = cases.iter().map(froc_scan).collect();
    let counts = counts(&scans, &thresholds);

    let volumes: Vec<Vec<f64>> = cases.iter().map(volumes).collect();
    let counted: Vec<CountedScan<'_>> = volumes
        .iter()
        .zip(&counts)
        .map(|(volumes_mm3, counts)| CountedScan { volumes_mm3, counts })
        .collect();
    FrocCurve::of(&counted, &thresholds)
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

/// Volumes of the lesions of a scan, mm^3.
fn volumes(case: &Case) -> Vec<f64> {
    let voxel_mm3 = case.affine.voxel_volume_mm3();
    case.lesions.iter().map(|region| region.len() as f64 * voxel_mm3).collect()
}
