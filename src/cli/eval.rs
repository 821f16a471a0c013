//! `oddscan eval`: measures how well maps and masks find known lesions.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{Failure, IO, REFUSED, USAGE};
use crate::{
    companions,
    nifti::{self, Limits},
    numeric::{
        evaluation::{Lesions, Overlap, Ranking, bootstrap, mean},
        mask::regions,
        volume::{RawMask, RawVolume},
    },
    report,
};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Folder with results of `oddscan score` or of the daemon.
    #[arg(long, value_name = "DIR")]
    maps: PathBuf,
    /// Folder with lesion masks on the grid of the scans: `<subject>_lesion.nii.gz`. A scan without
    /// one counts as healthy.
    #[arg(long, value_name = "DIR")]
    truth: PathBuf,
    /// Folder with brain masks: `<subject>_brain.nii.gz`. Default: the folder of the lesion masks.
    /// Without a mask, a scan's brain is where its map is not 0.
    #[arg(long, value_name = "DIR")]
    brain: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// Classes of lesion volume in the paper, mm^3.
const SIZES: [(&str, f64, f64); 3] = [
    ("below 100 mm3", 0.0, 100.0),
    ("100 to 1000 mm3", 100.0, 1000.0),
    ("above", 1000.0, f64::INFINITY),
];

/// The figures of one scan.
#[derive(Debug, Serialize)]
struct Scan {
    stem: String,
    /// Score of the scan as a whole (`scores.top1_mean` of its sidecar).
    score: Option<f32>,
    n_lesion_voxels: usize,
    #[serde(skip)]
    overlap: Overlap,
    /// Figures over voxels. `None` without lesions.
    voxels: Option<VoxelFigures>,
    lesions: Vec<Lesion>,
    n_false_regions: usize,
    mask_ml: f64,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct VoxelFigures {
    auroc: f64,
    average_precision: f64,
    /// Dice at the best threshold for this scan.
    oracle_dice: f64,
    oracle_threshold: f32,
    /// Dice of the mask that was written.
    dice: f64,
    iou: f64,
}

#[derive(Debug, Serialize)]
struct Lesion {
    volume_mm3: f64,
    found: bool,
}

/// A mean over scans with its 95 % bootstrap interval over scans.
#[derive(Debug, Serialize)]
struct Estimate {
    value: f64,
    interval: Option<(f64, f64)>,
}

#[derive(Debug, Serialize)]
struct Pooled {
    auroc: f64,
    average_precision: f64,
    oracle_dice: f64,
    oracle_threshold: f32,
    prevalence: f64,
    dice: f64,
}

#[derive(Debug, Serialize)]
struct SizeClass {
    size: &'static str,
    n_lesions: usize,
    n_found: usize,
}

/// How well scores separate scans with lesions from scans without.
#[derive(Debug, Serialize)]
struct Patients {
    n_with_lesions: usize,
    n_healthy: usize,
    auroc: Estimate,
    average_precision: Estimate,
}

#[derive(Debug, Serialize)]
struct Evaluation {
    scans: Vec<Scan>,
    /// Over scans with lesions.
    mean: Option<Means>,
    /// Over all brain voxels of all scans.
    pooled: Option<Pooled>,
    /// Mean Dice at the best single threshold.
    global_oracle_dice: Option<f64>,
    global_oracle_threshold: Option<f32>,
    lesions: Vec<SizeClass>,
    false_regions_per_scan: f64,
    patients: Option<Patients>,
}

#[derive(Debug, Serialize)]
struct Means {
    auroc: Estimate,
    average_precision: Estimate,
    oracle_dice: Estimate,
    dice: Estimate,
    iou: Estimate,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let stems = stems(&arguments.maps)?;
    let mut scans = Vec::new();
    let mut voxels = Vec::new();
    let mut refused = Vec::new();
    for stem in &stems {
        match evaluate(arguments, stem) {
            Ok((scan, scored)) => {
                scans.push(scan);
                voxels.push(scored);
            }
            Err(error) => refused.push(format!("{stem}: {error}")),
        }
    }

    if !scans.is_empty() {
        let evaluation = summarise(scans, voxels);
        if arguments.json {
            println!("{}", serde_json::json!(evaluation));
        } else {
            print!("{}", tables(&evaluation));
        }
    }

    for refusal in &refused {
        eprintln!("not evaluated: {refusal}");
    }
    match refused.len() {
        0 => Ok(()),
        n => Err(Failure::new(REFUSED, format!("{n} of {} maps were not evaluated", stems.len()))),
    }
}

/// The scans with maps in a folder.
fn stems(maps: &Path) -> Result<Vec<String>, Failure> {
    let cannot = |error| Failure::new(IO, format!("cannot list {}: {error}", maps.display()));
    let entries = fs::read_dir(maps).map_err(cannot)?;
    let mut stems: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter_map(|name| Some(name.strip_suffix("_anomaly-map.nii.gz")?.to_owned()))
        .collect();
    stems.sort();
    if stems.is_empty() {
        let text = format!(
            "found no *_anomaly-map.nii.gz in {}; name a folder of results",
            maps.display()
        );
        return Err(Failure::new(USAGE, text));
    }
    Ok(stems)
}

type Scored = Vec<(f32, bool)>;

/// The figures of one scan, with score and truth of each voxel of its brain.
fn evaluate(arguments: &Arguments, stem: &str) -> Result<(Scan, Scored), String> {
    let text = |error: crate::domain::error::ScanError| error.to_string();
    let result = |ending: &str| arguments.maps.join(format!("{stem}_anomaly{ending}"));
    let map = nifti::read_map(&result("-map.nii.gz"), &Limits::NONE).map_err(text)?;
    let mask = on_grid(&map, &result("-mask.nii.gz"))?;

    let brains = arguments.brain.as_ref().unwrap_or(&arguments.truth);
    let companion = |folder: &Path, what| companions::companion(&folder.join(stem), what);
    let brain = match companion(brains, "brain") {
        Some(path) => on_grid(&map, &path)?,
        None => map.voxels.iter().map(|&value| value != 0.0).collect(),
    };
    let truth = match companion(&arguments.truth, "lesion") {
        Some(path) => on_grid(&map, &path)?,
        None => vec![false; map.voxels.len()],
    };

    let inside = |other: &[bool]| -> Vec<bool> {
        other.iter().zip(&brain).map(|(&other, &brain)| other && brain).collect()
    };
    let (mask, truth) = (inside(&mask), inside(&truth));
    let scored: Scored = (0..map.voxels.len())
        .filter(|&voxel| brain[voxel])
        .map(|voxel| (map.voxels[voxel], truth[voxel]))
        .collect();

    let overlap = Overlap::of(mask.iter().copied().zip(truth.iter().copied()));
    let voxels = Ranking::new([scored.iter().copied()]).curve().map(|curve| VoxelFigures {
        auroc: curve.auroc,
        average_precision: curve.average_precision,
        oracle_dice: curve.oracle_dice,
        oracle_threshold: curve.oracle_threshold,
        dice: overlap.dice().unwrap_or(0.0),
        iou: overlap.iou().unwrap_or(0.0),
    });

    let voxel_mm3 = map.affine.voxel_volume_mm3();
    let n_masked = overlap.both + overlap.mask_only;
    let (lesions, marked) = (regions(truth, map.shape, 1), regions(mask, map.shape, 1));
    let Lesions { found, n_false } = Lesions::of(&lesions, &marked, map.shape, voxel_mm3);

    let sidecar = report::read_sidecar(&result(".json")).ok();
    let scan = Scan {
        stem: stem.to_owned(),
        score: sidecar.and_then(|sidecar| Some(sidecar.scores?.top1_mean)),
        n_lesion_voxels: overlap.both + overlap.truth_only,
        overlap,
        voxels,
        lesions: found
            .into_iter()
            .map(|(volume_mm3, found)| Lesion { volume_mm3, found })
            .collect(),
        n_false_regions: n_false,
        mask_ml: n_masked as f64 * voxel_mm3 / 1000.0,
    };
    Ok((scan, scored))
}

/// A mask, which must be on the grid of the map.
fn on_grid(map: &RawVolume, path: &Path) -> Result<Vec<bool>, String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let RawMask { shape, inside, affine } =
        nifti::read_mask(path, &Limits::NONE).map_err(|error| format!("{name}: {error}"))?;
    if shape != map.shape {
        return Err(format!(
            "{name}: found a grid of {:?}, needed that of the map, {:?}; resample it",
            shape.0, map.shape.0
        ));
    }

    let (ours, theirs) = (map.affine.rows(), affine.rows());
    let distance = ours.iter().flatten().zip(theirs.iter().flatten());
    let distance = distance.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    // 0.005 mm: qform and sform of one file differ by rounding.
    if distance > 5e-3 {
        return Err(format!(
            "{name}: found an affine that differs from the map's by up to {distance:.3}; needed \
             the scan's own grid; resample it"
        ));
    }
    Ok(inside)
}

fn summarise(scans: Vec<Scan>, voxels: Vec<Scored>) -> Evaluation {
    let ill: Vec<VoxelFigures> = scans.iter().filter_map(|scan| scan.voxels).collect();
    let estimate = |of: fn(&VoxelFigures) -> f64| Estimate {
        value: mean(ill.iter().map(of)).unwrap_or(0.0),
        interval: bootstrap(ill.len(), |draw| mean(draw.iter().map(|&i| of(&ill[i])))),
    };
    let means = (!ill.is_empty()).then(|| Means {
        auroc: estimate(|v| v.auroc),
        average_precision: estimate(|v| v.average_precision),
        oracle_dice: estimate(|v| v.oracle_dice),
        dice: estimate(|v| v.dice),
        iou: estimate(|v| v.iou),
    });

    let n_voxels: usize = voxels.iter().map(Vec::len).sum();
    let n_true: usize = scans.iter().map(|scan| scan.n_lesion_voxels).sum();
    let ranking = Ranking::new(voxels);
    let global = ranking.global_oracle();
    let overlap = scans.iter().map(|scan| scan.overlap).sum::<Overlap>();
    let pooled = ranking.curve().map(|curve| Pooled {
        auroc: curve.auroc,
        average_precision: curve.average_precision,
        oracle_dice: curve.oracle_dice,
        oracle_threshold: curve.oracle_threshold,
        prevalence: n_true as f64 / n_voxels as f64,
        dice: overlap.dice().unwrap_or(0.0),
    });

    let n_false: usize = scans.iter().map(|scan| scan.n_false_regions).sum();
    Evaluation {
        mean: means,
        pooled,
        global_oracle_dice: global.map(|global| global.mean_dice),
        global_oracle_threshold: global.map(|global| global.threshold),
        lesions: by_size(&scans),
        false_regions_per_scan: n_false as f64 / scans.len() as f64,
        patients: patients(&scans),
        scans,
    }
}

fn by_size(scans: &[Scan]) -> Vec<SizeClass> {
    let class = |&(size, from, to): &(&'static str, f64, f64)| {
        let lesions = scans.iter().flat_map(|scan| &scan.lesions);
        let lesions = lesions.filter(|lesion| (from..to).contains(&lesion.volume_mm3));
        let (n_lesions, n_found) =
            lesions.fold((0, 0), |(n, found), l| (n + 1, found + usize::from(l.found)));
        SizeClass { size, n_lesions, n_found }
    };
    SIZES.iter().map(class).collect()
}

fn patients(scans: &[Scan]) -> Option<Patients> {
    let scored: Scored =
        scans.iter().filter_map(|scan| Some((scan.score?, scan.n_lesion_voxels > 0))).collect();
    let curve = |draw: &[usize]| Ranking::new([draw.iter().map(|&i| scored[i])]).curve();

    let all: Vec<usize> = (0..scored.len()).collect();
    let whole = curve(&all)?;
    let n_with_lesions = scored.iter().filter(|(_, ill)| *ill).count();
    Some(Patients {
        n_with_lesions,
        n_healthy: scored.len() - n_with_lesions,
        auroc: Estimate {
            value: whole.auroc,
            interval: bootstrap(scored.len(), |draw| Some(curve(draw)?.auroc)),
        },
        average_precision: Estimate {
            value: whole.average_precision,
            interval: bootstrap(scored.len(), |draw| Some(curve(draw)?.average_precision)),
        },
    })
}

fn tables(evaluation: &Evaluation) -> String {
    let mut text = format!(
        "{:<28} {:>6} {:>6} {:>11} {:>6} {:>6}  {:>13} {:>6}\n",
        "scan", "AUROC", "AP", "oracle Dice", "Dice", "IoU", "lesions found", "false"
    );
    for scan in &evaluation.scans {
        let n_found = scan.lesions.iter().filter(|lesion| lesion.found).count();
        let found = format!("{n_found} of {}", scan.lesions.len());
        text += &match scan.voxels {
            Some(v) => format!(
                "{:<28} {:>6.3} {:>6.3} {:>11.3} {:>6.3} {:>6.3}  {found:>13} {:>6}\n",
                scan.stem,
                v.auroc,
                v.average_precision,
                v.oracle_dice,
                v.dice,
                v.iou,
                scan.n_false_regions
            ),
            None => format!(
                "{:<28} no known lesion; {:.1} ml marked {:>31}\n",
                scan.stem, scan.mask_ml, scan.n_false_regions
            ),
        };
    }

    if let Some(mean) = &evaluation.mean {
        text += "\nmean over scans with lesions [95 % interval over scans]\n";
        for (name, estimate) in [
            ("AUROC", &mean.auroc),
            ("average precision", &mean.average_precision),
            ("oracle Dice", &mean.oracle_dice),
            ("Dice of the mask", &mean.dice),
            ("IoU of the mask", &mean.iou),
        ] {
            row(&mut text, name, estimate);
        }
    }
    if let Some(Pooled { auroc, average_precision, oracle_dice, dice, prevalence, .. }) =
        evaluation.pooled
    {
        _ = writeln!(
            text,
            "\nall voxels pooled: AUROC {auroc:.3}, AP {average_precision:.3}, oracle Dice \
             {oracle_dice:.3}, Dice of the masks {dice:.3}; lesions are {:.1} % of the brain",
            100.0 * prevalence
        );
    }

    if let Some(dice) = evaluation.global_oracle_dice {
        _ = writeln!(text, "mean Dice at the best single threshold: {dice:.3}");
    }
    for class in evaluation.lesions.iter().filter(|class| class.n_lesions > 0) {
        let SizeClass { size, n_lesions, n_found } = class;
        _ = writeln!(text, "lesions {size}: {n_found} of {n_lesions} found");
    }
    _ = writeln!(text, "false regions per scan: {:.2}", evaluation.false_regions_per_scan);

    if let Some(patients) = &evaluation.patients {
        _ = writeln!(
            text,
            "\n{} scans with lesions against {} without",
            patients.n_with_lesions, patients.n_healthy
        );
        row(&mut text, "AUROC", &patients.auroc);
        row(&mut text, "average precision", &patients.average_precision);
    }
    text
}

fn row(text: &mut String, name: &str, estimate: &Estimate) {
    let interval =
        estimate.interval.map_or(String::new(), |(low, high)| format!(" [{low:.3}, {high:.3}]"));
    _ = writeln!(text, "  {name:<20} {:.3}{interval}", estimate.value);
}
