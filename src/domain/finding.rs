//! What is said about one scan.

use serde::{Deserialize, Serialize};

use super::{cohort::CohortKey, scan::ScanId};

/// One connected region of the mask.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// Number of voxels on the scan's own grid.
    pub n_voxels: usize,
    /// Size, mm^3.
    pub volume_mm3: f64,
    /// Highest map value inside.
    pub peak_score: f32,
    /// Where that value lies: voxel index on the scan's own grid.
    pub peak_voxel: [usize; 3],
    /// Where that value lies, mm, RAS+.
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
    /// in [0, 1].
    pub percentile: f64,
    /// How far the scan as a whole lies from the others, compared with how far they lie from each
    /// other; 1 is like them.
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
    // Not `sum`: that of nothing is -0, which shows.
    clusters.iter().fold(0.0, |sum, cluster| sum + cluster.volume_mm3 / 1000.0)
}

/// An anomaly that several scans of a window share: they are each other's closest matches there,
/// and would hide it from the score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedAnomaly {
    /// Encoder block at which it was found, counted from 1.
    pub layer: usize,
    /// The scans, in the order of the window.
    pub members: Vec<ScanId>,
    /// Tokens of theirs that no longer count as matches; 0 if they differ as whole scans.
    pub n_excluded: usize,
}

/// The window that a finding was scored against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowIdentity {
    /// First 16 hex digits of the SHA-256 over the sorted member ids.
    pub id: String,
    /// Cohort that the window belongs to.
    pub cohort: CohortKey,
    /// Members, sorted; the scan itself is one of them.
    pub members: Vec<ScanId>,
    /// Those that the others are not compared with, sorted: not good enough.
    #[serde(default)]
    pub set_aside: Vec<ScanId>,
    /// Those of patients who have several, sorted: they are not compared with each other.
    #[serde(default)]
    pub same_patient: Vec<Vec<ScanId>>,
    /// Whether they are compared all the same, because the window is full and they are of too few
    /// patients: to wait longer would let scans go without a result.
    #[serde(default)]
    pub few_patients: bool,
}

impl WindowIdentity {
    /// Members that others are compared with.
    pub fn n_references(&self) -> usize {
        self.members.len() - self.set_aside.len()
    }

    /// Patients that others can be compared with: what a window needs enough of.
    pub fn n_patients(&self) -> usize {
        let is_reference = |scan: &&ScanId| !self.set_aside.contains(scan);
        let further = |scans: &Vec<ScanId>| scans.iter().filter(is_reference).count().max(1) - 1;
        let n_further: usize = self.same_patient.iter().map(further).sum();
        self.n_references() - n_further
    }

    /// The other scans of a scan's patient.
    pub fn of_same_patient(&self, scan: ScanId) -> impl Iterator<Item = ScanId> {
        let own = self.same_patient.iter().find(|scans| scans.contains(&scan));
        own.into_iter().flatten().copied().filter(move |&other| other != scan)
    }
}
