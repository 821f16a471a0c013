//! One scan to evaluate: its map, mask, truth and brain, read and compared.

use std::path::{Path, PathBuf};

use super::figures::{Lesion, Scan, VoxelFigures};
use crate::{
    companions,
    domain::scan::AlignmentFacts,
    nifti::{self, Limits},
    numeric::{
        evaluation::{Lesions, Overlap, Ranking},
        geometry::{Affine, Shape3},
        mask::{Region, regions},
        volume::{RawMask, RawVolume},
    },
    report,
};

/// The folders that files are looked for in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Folders<'a> {
    pub(super) maps: &'a Path,
    pub(super) truth: &'a Path,
    pub(super) brain: &'a Path,
}

/// A scan with its figures, and what later figures need of it.
pub(super) struct Case {
    pub(super) scan: Scan,
    pub(super) shape: Shape3,
    pub(super) affine: Affine,
    /// Positions in memory of the voxels of the brain.
    pub(super) voxels: Vec<u32>,
    /// Map value of each of these.
    pub(super) values: Vec<f32>,
    /// Whether each of these is in a lesion.
    pub(super) truth: Vec<bool>,
    pub(super) lesions: Vec<Region>,
    /// Hyperintensities that count as normal.
    pub(super) normal: Vec<Region>,
    /// Cohort of the sidecar; empty without one.
    pub(super) cohort: String,
    pub(super) alignment: Option<AlignmentFacts>,
    /// Hash of the template that the scan was aligned to.
    pub(super) template_sha256: Option<String>,
}

impl Case {
    pub(super) fn read(folders: Folders<'_>, stem: &str) -> Result<Self, String> {
        let result = |ending: &str| folders.maps.join(format!("{stem}_anomaly{ending}"));
        let map = nifti::read_map(&result("-map.nii.gz"), &Limits::NONE);
        let map = map.map_err(|error| error.to_string())?;
        let Masks { mask, brain, truth, normal } =
            Masks::read(folders, stem, &map, &result("-mask.nii.gz"))?;

        let overlap = Overlap::of(mask.iter().copied().zip(truth.iter().copied()));
        let voxels: Vec<u32> =
            (0..map.voxels.len()).filter(|&voxel| brain[voxel]).map(|voxel| voxel as u32).collect();
        let values: Vec<f32> = voxels.iter().map(|&voxel| map.voxels[voxel as usize]).collect();
        let is_lesion: Vec<bool> = voxels.iter().map(|&voxel| truth[voxel as usize]).collect();
        let [lesions, normal, marked] =
            [truth, normal, mask].map(|inside| regions(inside, map.shape, 1));
        let met = Lesions::of(&lesions, &normal, &marked, map.shape, map.affine.voxel_volume_mm3());

        let sidecar = report::read_sidecar(&result(".json")).ok();
        let scores = sidecar.as_ref().and_then(|sidecar| sidecar.scores.as_ref());
        Ok(Self {
            scan: Scan {
                stem: stem.to_owned(),
                score: scores.map(|scores| scores.top1_mean),
                tail_probability: scores.and_then(|scores| scores.tail_probability),
                voxels: voxel_figures(&values, &is_lesion, overlap),
                n_normal: normal.len(),
                ..scan(&map, overlap, met)
            },
            shape: map.shape,
            affine: map.affine,
            voxels,
            values,
            truth: is_lesion,
            lesions,
            normal,
            cohort: sidecar.as_ref().map(|sidecar| sidecar.cohort.clone()).unwrap_or_default(),
            alignment: sidecar.as_ref().and_then(|sidecar| sidecar.alignment),
            template_sha256: sidecar.and_then(|sidecar| sidecar.method.template_sha256),
        })
    }

    /// The score and the truth of each voxel of the brain, with another score than the map's.
    pub(super) fn scored_by<'a>(
        &'a self,
        values: &'a [f32],
    ) -> impl Iterator<Item = (f32, bool)> + 'a {
        values.iter().copied().zip(self.truth.iter().copied())
    }

    /// The brain on the grid of the map.
    pub(super) fn brain(&self) -> RawMask {
        let mut inside = vec![false; self.shape.n_voxels()];
        self.voxels.iter().for_each(|&voxel| inside[voxel as usize] = true);
        RawMask { shape: self.shape, inside, affine: self.affine }
    }
}

/// The part of a scan's figures that follows from its mask.
fn scan(map: &RawVolume, overlap: Overlap, met: Lesions) -> Scan {
    let n_masked = overlap.both + overlap.mask_only;
    let lesion = |(volume_mm3, found)| Lesion { volume_mm3, found };
    Scan {
        stem: String::new(),
        score: None,
        tail_probability: None,
        n_lesion_voxels: overlap.both + overlap.truth_only,
        overlap,
        voxels: None,
        lesions: met.found.into_iter().map(lesion).collect(),
        n_false_regions: met.n_false,
        n_regions_on_normal: met.n_on_normal,
        n_normal: 0,
        n_normal_met: met.n_normal_met,
        mask_ml: n_masked as f64 * map.affine.voxel_volume_mm3() / 1000.0,
    }
}

fn voxel_figures(values: &[f32], truth: &[bool], overlap: Overlap) -> Option<VoxelFigures> {
    let scored = values.iter().copied().zip(truth.iter().copied());
    let curve = Ranking::new([scored]).curve()?;
    Some(VoxelFigures {
        auroc: curve.auroc,
        average_precision: curve.average_precision,
        oracle_dice: curve.oracle_dice,
        oracle_threshold: curve.oracle_threshold,
        dice: overlap.dice().unwrap_or(0.0),
        iou: overlap.iou().unwrap_or(0.0),
    })
}

/// The masks of a scan on the grid of its map. All but the brain are within the brain.
struct Masks {
    mask: Vec<bool>,
    brain: Vec<bool>,
    truth: Vec<bool>,
    /// Normal hyperintensities, without voxels of lesions.
    normal: Vec<bool>,
}

impl Masks {
    fn read(
        folders: Folders<'_>,
        stem: &str,
        map: &RawVolume,
        mask: &Path,
    ) -> Result<Self, String> {
        let companion = |folder: &Path, what| companions::companion(&folder.join(stem), what);
        let on_grid_or = |path: Option<PathBuf>, other: fn(&f32) -> bool| match path {
            Some(path) => on_grid(map, &path),
            None => Ok(map.voxels.iter().map(other).collect()),
        };
        let mask = on_grid(map, mask)?;
        let brain = on_grid_or(companion(folders.brain, "brain"), |&value| value != 0.0)?;
        let truth = on_grid_or(companion(folders.truth, "lesion"), |_| false)?;
        let normal = on_grid_or(companion(folders.truth, "normalWMH"), |_| false)?;

        let within = |mask: &[bool], of: &[bool]| -> Vec<bool> {
            mask.iter().zip(of).map(|(&mask, &of)| mask && of).collect()
        };
        let (mask, truth, normal) =
            (within(&mask, &brain), within(&truth, &brain), within(&normal, &brain));
        let no_lesion: Vec<bool> = truth.iter().map(|truth| !truth).collect();
        Ok(Self { mask, brain, normal: within(&normal, &no_lesion), truth })
    }
}

/// A mask, which must be on the grid of the map.
fn on_grid(map: &RawVolume, path: &Path) -> Result<Vec<bool>, String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let RawMask { shape, inside, affine } =
        nifti::read_mask(path, &Limits::NONE).map_err(|error| format!("{name}: {error}"))?;
    check_grid((map.shape, &map.affine), (shape, &affine))
        .map_err(|why| format!("{name}: {why}"))?;
    Ok(inside)
}

/// Checks that a volume is on the grid of the map.
pub(super) fn check_grid(map: (Shape3, &Affine), found: (Shape3, &Affine)) -> Result<(), String> {
    let (needed, shape) = (map.0, found.0);
    if shape != needed {
        return Err(format!(
            "found a grid of {:?}, needed that of the map, {:?}; resample it",
            shape.0, needed.0
        ));
    }

    let (ours, theirs) = (map.1.rows(), found.1.rows());
    let distance = ours.iter().flatten().zip(theirs.iter().flatten());
    let distance = distance.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    // 0.005 mm: qform and sform of one file differ by rounding.
    if distance > 5e-3 {
        return Err(format!(
            "found an affine that differs from the map's by up to {distance:.3}; needed the \
             scan's own grid; resample it"
        ));
    }
    Ok(())
}
