//! The finding of one scan: its scores, map and mask.

use serde::{Deserialize, Serialize};

use super::window_scores::{MaskPolicy, Scoring, WindowScores};
use crate::numeric::{
    fusion::{FusedMap, Parts},
    geometry::{Shape3, VoxelPoint},
    mask::{GridPlacement, Region, cell_of_voxel, regions_above, score_map},
    scoring::MapProfile,
    tail::{self, UsualRegions},
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
    /// What the evidence says about it. `None` if the map is that of tokens alone.
    #[serde(default, flatten, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<RegionEvidence>,
}

/// What the evidence says about a region.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RegionEvidence {
    /// Volume, ml, times mean height above the reference, spreads ([`tail::excess`]).
    pub excess: f64,
    /// The probability that a usual scan of the window has a region of at least this excess.
    pub tail_probability: f64,
    /// What to beware of. Regions with a mark come after all others.
    pub marks: Vec<RegionMark>,
    /// Share of each kind of evidence in the map here; they add up to 1.
    pub shares: Shares,
}

/// Why a region may not be what it seems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RegionMark {
    /// At least half of it lies in the outer 4 mm of the brain, where remains of skull and dura
    /// are.
    Rim,
    /// It touches the end of the field of view.
    CutEdge,
    /// At least half of it lies where hardly any other scan has brain: remains of skull or dura.
    Residue,
}

/// Share of each kind of evidence, in [0, 1].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Shares {
    /// Of the tokens.
    pub tokens: f64,
    /// Of the scan's own brightness.
    pub brightness: f64,
    /// Of intensities beyond the range of the other scans.
    pub range: f64,
}

/// What the window says about a scan as a whole.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tail {
    /// Sum of the excesses of its regions.
    pub excess: f64,
    /// The probability that a usual scan of the window has a region as large and high as its
    /// largest.
    pub probability: f64,
    /// The least probability that the window can claim.
    pub least_probability: f64,
    /// Whether that is unusual. `None` if the window is too small to say.
    pub stands_out: Option<bool>,
    /// Volume that a usual scan of the window has above the reference height, ml.
    pub usual_volume_ml: f64,
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
    /// Voxels above the threshold in clusters that are large enough; same grid. Empty if the scan
    /// does not stand out, unless the settings say otherwise.
    pub mask: Vec<bool>,
    /// What the window says about the scan as a whole. `None` if its map is that of tokens alone.
    pub tail: Option<Tail>,
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

/// A scan on its own grid, as far as its map needs it.
pub struct Place<'a> {
    /// The scan.
    pub scan: &'a RawVolume,
    /// Its brain, on the same grid.
    pub brain: &'a RawMask,
    /// Where the cells lie.
    pub placement: GridPlacement,
}

/// The finding of member `index` of a scored window, on the grid of its scan. `fused` is its map
/// ([`super::evidence::WindowEvidence::map`]); without it, the map is that of its tokens.
pub fn finding(
    place: &Place<'_>,
    scores: &WindowScores,
    index: usize,
    fused: Option<&FusedMap>,
    settings: &Scoring,
) -> Finding {
    let Place { scan, brain, placement } = place;
    let own = &scores.scans[index];
    let (foreground, cells) = match fused {
        Some(map) => (&map.foreground, &map.values),
        None => (&own.foreground, &own.cells),
    };
    let map = score_map(foreground, cells, placement, brain);
    let threshold = scores.threshold(index, settings.clean_scans);
    let usual = scores.usual_regions(index);
    let tail = usual.and_then(|usual| tail_of(&usual, scores, index, settings));

    let has_mask = settings.mask == MaskPolicy::Always
        || tail.is_none_or(|tail| tail.stands_out != Some(false));
    let mut regions = Vec::new();
    if has_mask {
        let min_mm3 = settings.smallest_cluster_mm3(scores.is_bright(index));
        let min_voxels = (min_mm3 / scan.affine.voxel_volume_mm3()).ceil() as usize;
        regions = regions_above(&map, &brain.inside, scan.shape, threshold, min_voxels.max(1));
    }
    let mut mask = vec![false; map.len()];
    for &voxel in regions.iter().flatten() {
        mask[voxel] = true;
    }

    let judge = fused.zip(usual);
    let judge =
        judge.map(|(fused, usual)| Judge::new(place, &scores.profiles[index], fused, usual));
    let mut clusters: Vec<Cluster> = regions
        .iter()
        .map(|region| {
            let evidence = judge.as_ref().map(|judge| judge.evidence(region, &map));
            cluster(region, &map, scan, evidence)
        })
        .collect();
    if judge.is_some() {
        rank(&mut clusters);
    }

    Finding {
        score_max: own.max,
        score_top1_mean: own.top1_mean,
        percentile: Some(scores.percentile(index)),
        shift: scores.shift(index),
        threshold,
        n_cells: own.cells.len(),
        n_unmatched_cells: own.n_unmatched,
        clusters,
        map,
        mask,
        tail,
    }
}

/// What each kind of evidence adds to the map of a scan, on the scan's grid: tokens, brightness,
/// range.
pub fn parts_of_map(place: &Place<'_>, fused: &FusedMap) -> [Vec<f32>; 3] {
    let Parts { tokens, brightness, range } = &fused.parts;
    [tokens, brightness, range]
        .map(|part| score_map(&fused.foreground, part, &place.placement, place.brain))
}

fn tail_of(
    usual: &UsualRegions,
    scores: &WindowScores,
    index: usize,
    settings: &Scoring,
) -> Option<Tail> {
    let evidence = scores.evidence.as_ref()?;
    let probability = usual.probability(evidence.excesses[index].first().copied().unwrap_or(0.0));
    let can_say = usual.least_probability() <= settings.alarm_probability;
    Some(Tail {
        excess: evidence.total_excess(index),
        probability,
        least_probability: usual.least_probability(),
        stands_out: can_say.then_some(probability <= settings.alarm_probability),
        usual_volume_ml: scores.usual_volume_ml(index, settings.clean_scans).unwrap_or(0.0),
    })
}

/// The outer part of the brain in which remains of skull and dura are, mm.
const RIM_MM: f32 = 4.0;

/// Judges the regions of one scan.
struct Judge<'a> {
    fused: &'a FusedMap,
    usual: UsualRegions,
    profile: MapProfile,
    shape: Shape3,
    voxel_mm3: f64,
    /// For each fine cell its position in the map.
    positions: Vec<Option<u32>>,
    to_cell: Box<dyn Fn([usize; 3]) -> Option<usize>>,
}

impl<'a> Judge<'a> {
    fn new(
        place: &Place<'_>,
        profile: &MapProfile,
        fused: &'a FusedMap,
        usual: UsualRegions,
    ) -> Self {
        let cells = fused.foreground.shape;
        Self {
            fused,
            usual,
            profile: *profile,
            shape: place.scan.shape,
            voxel_mm3: place.scan.affine.voxel_volume_mm3(),
            positions: fused.foreground.token_of_cell(),
            to_cell: Box::new(cell_of_voxel(cells, &place.placement, &place.scan.affine)),
        }
    }

    fn evidence(&self, region: &Region, map: &[f32]) -> RegionEvidence {
        let heights = region.iter().map(|&voxel| map[voxel]);
        let excess = tail::excess(heights, &self.profile, self.voxel_mm3);
        RegionEvidence {
            excess,
            tail_probability: self.usual.probability(excess),
            marks: self.marks(region),
            shares: self.shares(region),
        }
    }

    /// The positions in the map of the cells in which a region lies, one per voxel.
    fn cells<'r>(&'r self, region: &'r Region) -> impl Iterator<Item = usize> + 'r {
        let cell = |&voxel: &usize| self.positions[(self.to_cell)(self.shape.voxel(voxel))?];
        region.iter().filter_map(cell).map(|position| position as usize)
    }

    fn marks(&self, region: &Region) -> Vec<RegionMark> {
        let is_half = |is_so: &dyn Fn(usize) -> bool| {
            2 * self.cells(region).filter(|&cell| is_so(cell)).count() >= self.cells(region).count()
        };
        let is_at_end = |&voxel: &usize| {
            let voxel = self.shape.voxel(voxel);
            (0..3).any(|axis| voxel[axis] == 0 || voxel[axis] + 1 == self.shape.0[axis])
        };

        let mut marks = Vec::new();
        if is_half(&|cell| self.fused.depths_mm[cell] <= RIM_MM) {
            marks.push(RegionMark::Rim);
        }
        if region.iter().any(is_at_end) {
            marks.push(RegionMark::CutEdge);
        }
        if is_half(&|cell| self.fused.few_have[cell]) {
            marks.push(RegionMark::Residue);
        }
        marks
    }

    fn shares(&self, region: &Region) -> Shares {
        let Parts { tokens, brightness, range } = &self.fused.parts;
        let sum = |part: &[f32]| {
            self.cells(region).fold(0.0, |sum, cell| sum + f64::from(part[cell].max(0.0)))
        };
        let [tokens, brightness, range] = [tokens, brightness, range].map(|part| sum(part));
        let all = (tokens + brightness + range).max(f64::MIN_POSITIVE);
        Shares { tokens: tokens / all, brightness: brightness / all, range: range / all }
    }
}

/// Puts the most unusual region first, and those with marks last.
fn rank(clusters: &mut [Cluster]) {
    let key = |cluster: &Cluster| {
        let evidence = cluster.evidence.as_ref();
        (evidence.is_some_and(|e| !e.marks.is_empty()), evidence.map_or(0.0, |e| e.excess))
    };
    clusters.sort_by(|a, b| {
        let ((marked_a, a), (marked_b, b)) = (key(a), key(b));
        marked_a.cmp(&marked_b).then(b.total_cmp(&a))
    });
}

fn cluster(
    region: &Region,
    map: &[f32],
    raw: &RawVolume,
    evidence: Option<RegionEvidence>,
) -> Cluster {
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
        evidence,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::{
        geometry::{Affine, WorldPoint},
        token::Foreground,
    };

    fn region(excess: f64, marks: &[RegionMark]) -> Cluster {
        Cluster {
            n_voxels: 1,
            volume_mm3: 1.0,
            peak_score: 1.0,
            peak_voxel: [0; 3],
            peak_world_mm: [0.0; 3],
            evidence: Some(RegionEvidence {
                excess,
                tail_probability: 0.5,
                marks: marks.to_vec(),
                shares: Shares { tokens: 1.0, brightness: 0.0, range: 0.0 },
            }),
        }
    }

    #[test]
    fn the_most_unusual_region_is_first_and_marked_ones_are_last() {
        let mut clusters = vec![
            region(9.0, &[RegionMark::Rim]),
            region(1.0, &[]),
            region(3.0, &[]),
            region(20.0, &[RegionMark::Rim, RegionMark::CutEdge]),
        ];
        rank(&mut clusters);
        let excesses: Vec<f64> =
            clusters.iter().filter_map(|cluster| Some(cluster.evidence.as_ref()?.excess)).collect();
        assert_eq!(excesses, [3.0, 1.0, 20.0, 9.0]);
    }

    #[test]
    fn a_region_at_the_rim_at_the_end_or_where_few_others_have_brain_has_a_mark() {
        // The regions lie in the middle row of nine.
        let (shape, row) = (Shape3([8, 3, 3]), 8 * (1 + 3));
        let affine = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        let scan = RawVolume { shape, voxels: vec![1.0; 72], affine };
        let brain = RawMask { shape, inside: vec![true; 72], affine };
        let placement = GridPlacement { cube_side: 8, cube: affine };
        let none = || vec![0.0; 8];
        let fused = FusedMap {
            foreground: Foreground { shape: Shape3::cube(8), cells: (72..80).collect() },
            values: none(),
            parts: Parts { tokens: none(), brightness: none(), range: none() },
            depths_mm: vec![9.0, 9.0, 9.0, 9.0, 2.0, 2.0, 9.0, 9.0],
            few_have: [false, false, true, true, false, false, false, false].to_vec(),
        };
        let place = Place { scan: &scan, brain: &brain, placement };
        let profile = MapProfile { median: 0.0, spread: 1.0, tail: 1.0 };
        let judge = Judge::new(&place, &profile, &fused, UsualRegions::of(&[], 9, true));
        let marks =
            |region: &[usize]| judge.marks(&region.iter().map(|x| row + x).collect::<Vec<usize>>());
        use RegionMark::{CutEdge, Residue, Rim};
        assert_eq!(marks(&[1, 6]), []);
        assert_eq!(marks(&[4, 5, 6]), [Rim]);
        assert_eq!(marks(&[2, 1]), [Residue]);
        assert_eq!(marks(&[0, 1, 2]), [CutEdge]);
        assert_eq!(marks(&[3, 4]), [Rim, Residue]);
    }

    #[test]
    fn a_region_says_in_json_what_its_evidence_is_and_one_of_tokens_alone_says_nothing() {
        let json = serde_json::to_value(region(2.0, &[RegionMark::CutEdge])).unwrap();
        assert_eq!(json["marks"], serde_json::json!(["cut_edge"]));
        assert_eq!(json["excess"], 2.0);
        let alone = Cluster { evidence: None, ..region(0.0, &[]) };
        let json = serde_json::to_value(&alone).unwrap();
        assert!(json.get("excess").is_none());
        assert_eq!(serde_json::from_value::<Cluster>(json).unwrap(), alone);
    }
}
