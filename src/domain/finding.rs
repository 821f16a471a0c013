//! The finding of one scan: its scores, map and mask.

use serde::{Deserialize, Serialize};

use super::window_scores::{Scoring, WindowScores};
use crate::numeric::{
    geometry::VoxelPoint,
    mask::{GridPlacement, Region, regions_above, score_map},
    scoring,
    volume::{RawMask, RawVolume},
};

/// One connected region of the mask.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// Number of voxels on the scan's own grid.
    pub n_voxels: usize,
    /// Size, mm^3.
    pub volume_mm3: f64,
    /// Highest map value inside.
    pub peak_score: f32,
    /// Voxel index of that value on the scan's own grid.
    pub peak_voxel: [usize; 3],
    /// World position of that value, mm, RAS+.
    pub peak_world_mm: [f64; 3],
}

/// The scores of one scan against its window, and the map and mask on the scan's own grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// Highest score of a cell (the paper's volume score).
    pub score_max: f32,
    /// Mean of the highest 1 % of the scores: steadier than the maximum.
    pub score_top1_mean: f32,
    /// Share of the other scans of the window with a lower `score_top1_mean` (ties count half),
    /// in [0, 1]. `None` if the window has too few scans for it to mean anything.
    pub percentile: Option<f64>,
    /// How far the scan as a whole is from the others, compared with how far they are from each
    /// other. 1 is typical; `None` without others.
    pub shift: Option<f64>,
    /// Map value above which a voxel belongs to the mask.
    pub threshold: f32,
    /// Scored cells.
    pub n_cells: usize,
    /// Cells whose tokens had no candidate in reach in any other scan; their score is 0.
    pub n_unmatched_cells: usize,
    /// Regions of the mask, largest first.
    pub clusters: Vec<Cluster>,
    /// Anomaly score per voxel of the scan's own grid, x fastest; 0 outside the brain.
    pub map: Vec<f32>,
    /// Voxels above the threshold in clusters that are large enough; same grid.
    pub mask: Vec<bool>,
}

impl Finding {
    /// Volume of the mask, ml.
    pub fn mask_ml(&self) -> f64 {
        mask_ml(&self.clusters)
    }
}

/// Volume of all regions of a mask, ml.
pub fn mask_ml(clusters: &[Cluster]) -> f64 {
    // Not `sum`: without clusters it gives -0, and results would show the sign.
    clusters.iter().fold(0.0, |sum, cluster| sum + cluster.volume_mm3 / 1000.0)
}

/// The finding of member `index` of a scored window, on the grid of its scan.
pub fn finding(
    scan: &RawVolume,
    brain: &RawMask,
    placement: &GridPlacement,
    scores: &WindowScores,
    index: usize,
    settings: &Scoring,
) -> Finding {
    let own = &scores.scans[index];
    let other_tops: Vec<f32> = scores.others(index).iter().map(|other| other.top1_mean).collect();

    let map = score_map(&own.foreground, &own.cells, placement, brain);
    let threshold = scores.threshold(index, settings.clean_scans);
    let min_voxels = (settings.min_cluster_mm3 / scan.affine.voxel_volume_mm3()).ceil() as usize;
    let regions = regions_above(&map, scan.shape, threshold, min_voxels.max(1));

    let mut mask = vec![false; map.len()];
    for &voxel in regions.iter().flatten() {
        mask[voxel] = true;
    }

    Finding {
        score_max: own.max,
        score_top1_mean: own.top1_mean,
        percentile: Some(scoring::percentile(own.top1_mean, &other_tops)),
        shift: scores.shift(index),
        threshold,
        n_cells: own.cells.len(),
        n_unmatched_cells: own.n_unmatched,
        clusters: regions.iter().map(|region| cluster(region, &map, scan)).collect(),
        map,
        mask,
    }
}

fn cluster(region: &Region, map: &[f32], raw: &RawVolume) -> Cluster {
    // The first of equal peaks, so that the result does not depend on the search.
    let peak = region
        .iter()
        .copied()
        .fold(region[0], |best, voxel| if map[voxel] > map[best] { voxel } else { best });

    let peak_voxel = raw.shape.voxel(peak);
    Cluster {
        n_voxels: region.len(),
        volume_mm3: region.len() as f64 * raw.affine.voxel_volume_mm3(),
        peak_score: map[peak],
        peak_voxel,
        peak_world_mm: raw.affine.to_world(VoxelPoint(peak_voxel.map(|v| v as f64))).0,
    }
}
