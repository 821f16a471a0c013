//! The figures of `oddscan eval`, as `--json` prints them.

use serde::{Serialize, Serializer};
use serde_json::json;

use crate::numeric::evaluation::{
    Curve, Overlap, bootstrap,
    froc::MIN_REGION_MM3,
    froc_curve::{FrocCurve, FrocPoint},
    mean,
    sizes::SIZES,
};

/// The figures of one scan.
#[derive(Debug, Serialize)]
pub(super) struct Scan {
    pub(super) stem: String,
    /// Score of the scan as a whole (`scores.top1_mean` of its sidecar).
    pub(super) score: Option<f32>,
    /// How likely a healthy scan scores as high (`scores.tail_probability` of its sidecar).
    pub(super) tail_probability: Option<f64>,
    pub(super) n_lesion_voxels: usize,
    #[serde(skip)]
    pub(super) overlap: Overlap,
    /// Figures over voxels. `None` without lesions.
    pub(super) voxels: Option<VoxelFigures>,
    pub(super) lesions: Vec<Lesion>,
    /// Marked regions that touch neither a lesion nor a normal hyperintensity.
    pub(super) n_false_regions: usize,
    /// Marked regions that touch a normal hyperintensity and no lesion.
    pub(super) n_regions_on_normal: usize,
    pub(super) n_normal: usize,
    pub(super) n_normal_met: usize,
    pub(super) mask_ml: f64,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct VoxelFigures {
    pub(super) auroc: f64,
    pub(super) average_precision: f64,
    /// Dice at the best threshold for this scan.
    pub(super) oracle_dice: f64,
    pub(super) oracle_threshold: f32,
    /// Dice of the mask that was written.
    pub(super) dice: f64,
    pub(super) iou: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct Lesion {
    pub(super) volume_mm3: f64,
    pub(super) found: bool,
}

/// A mean over scans with its 95 % bootstrap interval over scans.
#[derive(Debug, Serialize)]
pub(super) struct Estimate {
    pub(super) value: f64,
    pub(super) interval: Option<(f64, f64)>,
}

#[derive(Debug, Serialize)]
pub(super) struct Means {
    pub(super) auroc: Estimate,
    pub(super) average_precision: Estimate,
    pub(super) oracle_dice: Estimate,
    pub(super) dice: Estimate,
    pub(super) iou: Estimate,
}

impl Means {
    /// `None` without scans.
    pub(super) fn of(scans: &[VoxelFigures]) -> Option<Self> {
        let estimate = |of: fn(&VoxelFigures) -> f64| {
            let value = mean(scans.iter().map(of))?;
            let of_draw = |draw: &[usize]| mean(draw.iter().map(|&i| of(&scans[i])));
            Some(Estimate { value, interval: bootstrap(scans.len(), of_draw) })
        };
        Some(Self {
            auroc: estimate(|v| v.auroc)?,
            average_precision: estimate(|v| v.average_precision)?,
            oracle_dice: estimate(|v| v.oracle_dice)?,
            dice: estimate(|v| v.dice)?,
            iou: estimate(|v| v.iou)?,
        })
    }
}

/// Means over scans of what a ranking of voxels reaches.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct RankingMeans {
    pub(super) n_scans: usize,
    pub(super) auroc: f64,
    pub(super) average_precision: f64,
    pub(super) oracle_dice: f64,
}

impl RankingMeans {
    /// `None` without scans. Each scan has AUROC, average precision and oracle Dice.
    fn of(scans: &[[f64; 3]]) -> Option<Self> {
        let figure = |index: usize| mean(scans.iter().map(|scan| scan[index]));
        Some(Self {
            n_scans: scans.len(),
            auroc: figure(0)?,
            average_precision: figure(1)?,
            oracle_dice: figure(2)?,
        })
    }

    /// Of the map itself.
    pub(super) fn of_maps<'a>(scans: impl IntoIterator<Item = &'a VoxelFigures>) -> Option<Self> {
        let figures = |v: &VoxelFigures| [v.auroc, v.average_precision, v.oracle_dice];
        Self::of(&scans.into_iter().map(figures).collect::<Vec<_>>())
    }

    pub(super) fn of_curves<'a>(scans: impl IntoIterator<Item = &'a Curve>) -> Option<Self> {
        let figures = |c: &Curve| [c.auroc, c.average_precision, c.oracle_dice];
        Self::of(&scans.into_iter().map(figures).collect::<Vec<_>>())
    }
}

/// A simple map to hold the anomaly map against.
#[derive(Debug, Serialize)]
pub(super) struct Baseline {
    pub(super) name: &'static str,
    #[serde(flatten)]
    pub(super) means: RankingMeans,
    /// Mean average precision of the anomaly map over the same scans.
    pub(super) map_average_precision: f64,
}

/// By how much a baseline must exceed the map's average precision to be called better. Smaller
/// differences are rounding.
const CLEAR_LEAD: f64 = 0.005;

impl Baseline {
    pub(super) fn beats_the_map(&self) -> bool {
        self.means.average_precision > self.map_average_precision + CLEAR_LEAD
    }
}

/// Mean figures of the scans with lesions from one source.
#[derive(Debug, Serialize)]
pub(super) struct Source {
    pub(super) source: String,
    #[serde(flatten)]
    pub(super) means: RankingMeans,
    pub(super) n_lesions: usize,
    pub(super) n_found: usize,
}

#[derive(Debug, Serialize)]
pub(super) struct Pooled {
    pub(super) auroc: f64,
    pub(super) average_precision: f64,
    pub(super) oracle_dice: f64,
    pub(super) oracle_threshold: f32,
    pub(super) prevalence: f64,
    pub(super) dice: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct SizeClass {
    pub(super) size: &'static str,
    pub(super) n_lesions: usize,
    pub(super) n_found: usize,
}

/// The curve as JSON, with the names of its classes.
fn froc_json<S: Serializer>(curve: &Option<FrocCurve>, serializer: S) -> Result<S::Ok, S::Error> {
    let point = |point: &FrocPoint| {
        json!({
            "threshold": point.threshold,
            "false_regions_per_scan": point.false_regions_per_scan,
            "regions_on_normal_per_scan": point.regions_on_normal_per_scan,
            "n_found": point.n_found,
        })
    };
    let whole = |curve: &FrocCurve| {
        json!({
            "min_region_mm3": MIN_REGION_MM3,
            "sizes": SIZES.map(|(size, ..)| size),
            "n_lesions": curve.n_lesions,
            "points": curve.points.iter().map(point).collect::<Vec<_>>(),
        })
    };
    curve.as_ref().map(whole).serialize(serializer)
}

/// How well scores separate scans with lesions from scans without.
#[derive(Debug, Serialize)]
pub(super) struct Patients {
    pub(super) n_with_lesions: usize,
    pub(super) n_healthy: usize,
    /// `tail_probability` if all scans have one, else `top1_mean`.
    pub(super) ranked_by: &'static str,
    pub(super) auroc: Estimate,
    pub(super) average_precision: Estimate,
    /// AUROC by each ranking. `None` if a scan has no tail probability.
    pub(super) auroc_by_tail_probability: Option<f64>,
    pub(super) auroc_by_top1_mean: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct Evaluation {
    pub(super) scans: Vec<Scan>,
    /// Over scans with lesions.
    pub(super) mean: Option<Means>,
    /// Simple maps beside the anomaly map, over scans with lesions.
    pub(super) baselines: Vec<Baseline>,
    /// Scans with lesions by source; empty if all are from one source or each is from another.
    pub(super) sources: Vec<Source>,
    /// Over all brain voxels of all scans.
    pub(super) pooled: Option<Pooled>,
    /// Mean Dice at the best single threshold.
    pub(super) global_oracle_dice: Option<f64>,
    pub(super) global_oracle_threshold: Option<f32>,
    pub(super) lesions: Vec<SizeClass>,
    /// `None` without lesions.
    #[serde(serialize_with = "froc_json")]
    pub(super) froc: Option<FrocCurve>,
    pub(super) false_regions_per_scan: f64,
    pub(super) regions_on_normal_per_scan: f64,
    pub(super) patients: Option<Patients>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_baseline_beats_the_map_by_a_clear_lead_over_the_same_scans() {
        let beats = |average_precision: f64| {
            let means =
                RankingMeans { n_scans: 1, auroc: 0.5, average_precision, oracle_dice: 0.5 };
            Baseline { name: "brightness", means, map_average_precision: 0.5 }.beats_the_map()
        };
        assert_eq!([0.4, 0.504, 0.506].map(beats), [false, false, true]);
    }
}
