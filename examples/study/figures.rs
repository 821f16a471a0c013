//! What a window reaches under one variant.

use std::collections::BTreeMap;

use oddscan::{
    domain::{
        finding::{Place, finding},
        window_scores::{Scoring, WindowScores},
    },
    numeric::{
        evaluation::{
            Curve, Lesions, Overlap, Ranking,
            froc::{FrocCounts, FrocScan, counts, min_region_voxels},
            froc_curve::shares,
            mean,
        },
        fusion::FusedMap,
        mask::{Region, regions, score_map},
        scoring::{Fraction, MapProfile, ScanScores, label_free_threshold},
    },
};
use serde::{Deserialize, Serialize};

use crate::{scans::Scan, variants::Variant};

/// Stated false-positive shares at which masks are measured.
pub(crate) const SHARES: [f64; 4] = [0.005, 0.01, 0.02, 0.03];

/// The figures of one scan.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// AUROC, average precision and oracle Dice of a scan with lesions.
    pub(crate) curve: Option<(f64, f64, f64)>,
    /// Dice and measured false-positive share at each of [`SHARES`]. Empty for maps.
    pub(crate) masks: Vec<(f64, f64)>,
    /// Median token score.
    median: f32,
    top1_mean: f32,
    /// What the mask and the regions of a map find.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) regions: Option<RegionFigures>,
}

/// Lesions and false regions of one scan.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct RegionFigures {
    /// Volume of each lesion, mm^3, and whether the mask of the product meets it.
    pub(crate) lesions: Vec<(f64, bool)>,
    /// Regions of that mask that meet no lesion.
    pub(crate) n_false: usize,
    /// Regions that meet no lesion, at each threshold of the window's curve.
    pub(crate) n_false_at: Vec<usize>,
    /// For each lesion, the position of the first threshold that finds it.
    pub(crate) found_at: Vec<Option<usize>>,
}

impl RegionFigures {
    /// The counts for a curve over several scans.
    pub(crate) fn counts(&self) -> FrocCounts {
        FrocCounts {
            n_false: self.n_false_at.clone(),
            n_on_normal: vec![0; self.n_false_at.len()],
            found_at: self.found_at.clone(),
        }
    }
}

/// The figures of one window under one variant.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) variant: Variant,
    pub(crate) window: String,
    pub(crate) scans: BTreeMap<String, Figures>,
    pub(crate) pooled: Option<(f64, f64, f64)>,
    /// The thresholds at which all scans of maps count their regions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) thresholds: Vec<f32>,
}

/// AUROC, average precision and oracle Dice over the scans with lesions among `scans`.
pub(crate) fn means<'a>(scans: impl IntoIterator<Item = &'a Figures>) -> [f64; 3] {
    let curves: Vec<(f64, f64, f64)> = scans.into_iter().filter_map(|scan| scan.curve).collect();
    let of = |get: fn(&(f64, f64, f64)) -> f64| mean(curves.iter().map(get)).unwrap_or(f64::NAN);
    [of(|c| c.0), of(|c| c.1), of(|c| c.2)]
}

fn reached(curve: Option<Curve>) -> Option<(f64, f64, f64)> {
    curve.map(|c| (c.auroc, c.average_precision, c.oracle_dice))
}

/// Thresholds of every scan at one stated share.
fn thresholds(scores: &[ScanScores], share: f64, clean: Fraction) -> Vec<f32> {
    let share = Fraction::new(share).expect("shares are shares");
    let profiles: Vec<MapProfile> =
        scores.iter().map(|scan| MapProfile::new(scan.cells.clone(), share)).collect();
    (0..scores.len()).map(|own| label_free_threshold(&profiles, own, clean)).collect()
}

/// The figures of token scores.
pub(crate) fn of_tokens(
    scans: &[Scan],
    scores: &[ScanScores],
    clean: Fraction,
    variant: &Variant,
    window: &str,
) -> Outcome {
    let mut found = BTreeMap::new();
    let mut all = Vec::new();
    let thresholds = SHARES.map(|share| thresholds(scores, share, clean));
    for (index, scan) in scans.iter().enumerate() {
        let ScanScores { foreground, cells, .. } = &scores[index];
        let map = score_map(foreground, cells, &scan.placement, &scan.brain);
        let scored: Vec<(f32, bool)> = (0..map.len())
            .filter(|&voxel| scan.brain.inside[voxel])
            .map(|voxel| (map[voxel], scan.truth[voxel]))
            .collect();
        let n_healthy = scored.iter().filter(|(_, truth)| !truth).count();
        let masks = thresholds.iter().map(|thresholds| {
            let threshold = thresholds[index];
            let overlap = Overlap::of(scored.iter().map(|&(s, truth)| (s > threshold, truth)));
            (overlap.dice().unwrap_or(0.0), overlap.mask_only as f64 / n_healthy as f64)
        });
        let figures = Figures {
            curve: reached(Ranking::new([scored.iter().copied()]).curve()),
            masks: masks.collect(),
            median: scores[index].median,
            top1_mean: scores[index].top1_mean,
            regions: None,
        };
        found.insert(scan.stem.clone(), figures);
        all.push(scored);
    }
    let pooled = reached(Ranking::new(all).curve());
    let (variant, window) = (variant.clone(), window.to_owned());
    Outcome { variant, window, scans: found, pooled, thresholds: Vec::new() }
}

/// A scored window with the map of each scan; `None` if that is the map of its tokens.
pub(crate) struct FoundWindow<'a> {
    pub(crate) scores: &'a WindowScores,
    pub(crate) maps: &'a [Option<FusedMap>],
    pub(crate) settings: &'a Scoring,
}

/// A scan with its map on its own grid.
struct MappedScan<'a> {
    scan: &'a Scan,
    /// Positions in memory of the voxels of the brain.
    voxels: Vec<u32>,
    /// Map value of each of these.
    values: Vec<f32>,
    lesions: Vec<Region>,
    /// Compared with the mask.
    met: Lesions,
}

impl<'a> MappedScan<'a> {
    fn of(scan: &'a Scan, found: &FoundWindow<'_>, index: usize) -> Self {
        let Scan { raw, brain, placement, truth, .. } = scan;
        let place = Place { scan: raw, brain, placement: *placement };
        let FoundWindow { scores, maps, settings } = found;
        let own = finding(&place, scores, index, maps[index].as_ref(), settings);

        let n_voxels = own.map.len();
        let is_lesion = (0..n_voxels).map(|voxel| truth[voxel] && brain.inside[voxel]);
        let [lesions, marked] =
            [is_lesion.collect(), own.mask].map(|inside| regions(inside, raw.shape, 1));
        let voxel_mm3 = raw.affine.voxel_volume_mm3();
        let met = Lesions::of(&lesions, &[], &marked, raw.shape, voxel_mm3);

        let inside = (0..n_voxels as u32).filter(|&voxel| brain.inside[voxel as usize]);
        let voxels: Vec<u32> = inside.collect();
        let values = voxels.iter().map(|&voxel| own.map[voxel as usize]).collect();
        Self { scan, voxels, values, lesions, met }
    }

    fn scored(&self) -> impl Iterator<Item = (f32, bool)> {
        let truth = self.voxels.iter().map(|&voxel| self.scan.truth[voxel as usize]);
        self.values.iter().copied().zip(truth)
    }

    fn for_froc(&self) -> FrocScan<'_> {
        FrocScan {
            shape: self.scan.raw.shape,
            min_voxels: min_region_voxels(self.scan.raw.affine.voxel_volume_mm3()),
            voxels: &self.voxels,
            values: &self.values,
            lesions: &self.lesions,
            normal: &[],
        }
    }

    fn figures(&self, counts: FrocCounts, scores: &ScanScores) -> Figures {
        Figures {
            curve: reached(Ranking::new([self.scored()]).curve()),
            masks: Vec::new(),
            median: scores.median,
            top1_mean: scores.top1_mean,
            regions: Some(RegionFigures {
                lesions: self.met.found.clone(),
                n_false: self.met.n_false,
                n_false_at: counts.n_false,
                found_at: counts.found_at,
            }),
        }
    }
}

/// The figures of maps, with the mask of each scan as the product makes it.
pub(crate) fn of_maps(
    scans: &[Scan],
    found: &FoundWindow<'_>,
    variant: &Variant,
    window: &str,
) -> Outcome {
    let mapped = |(index, scan)| MappedScan::of(scan, found, index);
    let mapped: Vec<MappedScan<'_>> = scans.iter().enumerate().map(mapped).collect();
    let ranking = Ranking::new(mapped.iter().map(MappedScan::scored));
    let thresholds = ranking.thresholds(&shares());
    let for_froc: Vec<FrocScan<'_>> = mapped.iter().map(MappedScan::for_froc).collect();
    let counts = counts(&for_froc, &thresholds);

    let figures = mapped.iter().zip(counts).zip(&found.scores.scans);
    let figures = figures
        .map(|((scan, counts), scores)| (scan.scan.stem.clone(), scan.figures(counts, scores)));
    Outcome {
        variant: variant.clone(),
        window: window.to_owned(),
        scans: figures.collect(),
        pooled: reached(ranking.curve()),
        thresholds,
    }
}
