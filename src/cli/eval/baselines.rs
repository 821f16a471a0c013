//! Simple maps beside the anomaly map: brightness, darkness, and the deviation from the median of
//! the window. A map that none of them reaches shows more than the scan does by itself.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::{
    case::{Case, check_grid},
    figures::{Baseline, RankingMeans},
};
use crate::{
    domain::scan::ScanId,
    model,
    nifti::{self, Limits},
    numeric::{
        evaluation::{
            Curve, Ranking,
            baseline::{MIN_OTHERS, brightness, deviations},
        },
        fine::FineVolume,
        geometry::Affine,
        mask::{GridPlacement, score_map},
        preprocess::{self, CubeSettings},
        registration::Template,
        volume::{RawMask, RawVolume},
    },
};

/// The cube of the default settings.
const CUBE: CubeSettings = CubeSettings { side: 224, field_of_view_mm: 176.0, min_brain_ml: 0.0 };

/// Names of the baselines, in the order of [`Curves`].
const NAMES: [&str; 3] = ["brightness", "darkness", "deviation"];
const DEVIATION: usize = 2;

/// What the baselines reach in one scan. `None` without lesions, or if a baseline cannot be
/// computed.
type Curves = [Option<Curve>; NAMES.len()];

/// A scan on the fine grid, with its place.
struct Fine {
    /// Position of the scan among the cases.
    case: usize,
    /// Canonical cube voxel -> world mm.
    cube: Affine,
    volume: FineVolume,
}

/// The baselines over the scans that lie in `folder`, and notes about what is missing.
pub(super) fn baselines(folder: &Path, cases: &[Case]) -> (Vec<Baseline>, Vec<String>) {
    // Stems by the reason why a scan has not all baselines.
    let mut reasons: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut curves: Vec<Curves> = vec![[None; NAMES.len()]; cases.len()];
    let mut windows: BTreeMap<&str, Vec<Fine>> = BTreeMap::new();
    let mut templates = Templates::default();
    let mut n_found = 0;

    for (index, case) in cases.iter().enumerate() {
        let Some(path) = scan_path(folder, &case.scan.stem) else { continue };
        n_found += 1;
        let look = read(&path, case).and_then(|raw| {
            let brain = case.brain();
            curves[index][..DEVIATION].copy_from_slice(&of_brightness(case, &raw, &brain));
            fine(index, case, &raw, &brain, &mut templates)
        });
        match look {
            Ok(fine) => windows.entry(&case.cohort).or_default().push(fine),
            Err(why) => reasons.entry(why).or_default().push(&case.scan.stem),
        }
    }

    let mut notes: Vec<String> = reasons.iter().map(|(why, stems)| note(why, stems)).collect();
    for (cohort, window) in windows {
        if window.len() > MIN_OTHERS {
            of_window(window, cases, &mut curves);
        } else {
            notes.push(too_few(cohort, window.len()));
        }
    }
    notes.extend(missing(folder, n_found, cases.len()));
    (rows(cases, &curves), notes)
}

fn note(why: &str, stems: &[&str]) -> String {
    match stems {
        [stem] => format!("baselines of {stem}: {why}"),
        stems => format!("baselines of {} scans, such as {}: {why}", stems.len(), stems[0]),
    }
}

fn too_few(cohort: &str, n_scans: usize) -> String {
    let needed = MIN_OTHERS + 1;
    format!("no deviation in the cohort \"{cohort}\": {n_scans} scans, {needed} are needed")
}

fn scan_path(folder: &Path, stem: &str) -> Option<PathBuf> {
    let names = [".nii.gz", ".nii"].map(|ending| folder.join(format!("{stem}{ending}")));
    names.into_iter().find(|path| path.is_file())
}

fn missing(folder: &Path, n_found: usize, n_scans: usize) -> Option<String> {
    let folder = folder.display();
    match n_found {
        0 => Some(format!(
            "no baselines: they need the scans, and {folder} holds none of them; name their folder \
             with --scans"
        )),
        n if n < n_scans => Some(format!(
            "the baselines leave out {} of {n_scans} scans, which are not in {folder}",
            n_scans - n
        )),
        _ => None,
    }
}

fn read(path: &Path, case: &Case) -> Result<RawVolume, String> {
    let raw = nifti::read_map(path, &Limits::NONE).map_err(|error| error.to_string())?;
    check_grid((case.shape, &case.affine), (raw.shape, &raw.affine))?;
    Ok(raw)
}

/// What brightness and darkness reach.
fn of_brightness(case: &Case, raw: &RawVolume, brain: &RawMask) -> [Option<Curve>; DEVIATION] {
    if case.scan.voxels.is_none() {
        return [None; DEVIATION];
    }
    let bright = brain.values(&brightness(raw, brain));
    let dark: Vec<f32> = bright.iter().map(|value| -value).collect();
    [bright, dark].map(|values| curve(case, &values))
}

fn curve(case: &Case, values: &[f32]) -> Option<Curve> {
    Ranking::new([case.scored_by(values)]).curve()
}

/// The scan on the fine grid of its canonical cube.
fn fine(
    index: usize,
    case: &Case,
    raw: &RawVolume,
    brain: &RawMask,
    templates: &mut Templates,
) -> Result<Fine, String> {
    let aligned = match &case.alignment {
        None => None,
        Some(facts) => {
            let template = templates.brain(case.template_sha256.as_deref())?;
            let cube = Affine::new(facts.template_to_scan)
                .and_then(|to_scan| preprocess::aligned_cube_affine(template, &to_scan, &CUBE));
            Some(cube.map_err(|error| error.to_string())?)
        }
    };
    let canonical = preprocess::canonicalise(raw, brain, &CUBE, aligned.as_ref(), None)
        .map_err(|error| format!("no deviation: {error}"))?;
    Ok(Fine { case: index, cube: *canonical.volume.affine(), volume: canonical.fine })
}

/// What the deviation reaches in the scans of one window.
fn of_window(window: Vec<Fine>, cases: &[Case], curves: &mut [Curves]) {
    let (places, volumes): (Vec<_>, Vec<_>) =
        window.into_iter().map(|fine| ((fine.case, fine.cube), fine.volume)).unzip();
    let deviations = deviations(&volumes);

    for (((index, cube), volume), deviation) in places.into_iter().zip(&volumes).zip(&deviations) {
        let case = &cases[index];
        if case.scan.voxels.is_none() {
            continue;
        }
        let (placement, brain) = (GridPlacement { cube_side: CUBE.side, cube }, case.brain());
        let map = score_map(&volume.foreground, deviation, &placement, &brain);
        curves[index][DEVIATION] = curve(case, &brain.values(&map));
    }
}

/// The mean figures of each baseline that any scan with lesions has.
fn rows(cases: &[Case], curves: &[Curves]) -> Vec<Baseline> {
    let row = |(index, &name): (usize, &&'static str)| {
        let both = || {
            cases.iter().zip(curves).filter_map(move |(case, curves)| {
                Some((case.scan.voxels.as_ref()?, curves[index].as_ref()?))
            })
        };
        let means = RankingMeans::of_curves(both().map(|(_, baseline)| baseline))?;
        let map = RankingMeans::of_maps(both().map(|(map, _)| map))?;
        Some(Baseline { name, means, map_average_precision: map.average_precision })
    };
    NAMES.iter().enumerate().filter_map(row).collect()
}

/// The brain of the template that `oddscan model fetch` fetches, read when it is first needed.
#[derive(Default)]
struct Templates {
    fetched: Option<Result<(String, RawMask), String>>,
}

impl Templates {
    /// The template's brain, if it is the template with this hash.
    fn brain(&mut self, sha256: Option<&str>) -> Result<&RawMask, String> {
        let fetched = self.fetched.get_or_insert_with(read_template).as_ref();
        let (found, brain) = fetched.map_err(Clone::clone)?;
        if sha256.is_some_and(|needed| needed != found) {
            return Err("no deviation: it was aligned to another template than that of \
                        `oddscan model fetch`"
                .to_owned());
        }
        Ok(brain)
    }
}

fn read_template() -> Result<(String, RawMask), String> {
    let path = model::find_template(None).ok_or(
        "no deviation: the scan was aligned, and there is no template; run `oddscan model fetch`",
    )?;
    let image = nifti::read_map(&path, &Limits::NONE)
        .map_err(|error| format!("no deviation: the template cannot be used: {error}"))?;
    let sha256 = ScanId::of(&image).to_hex();
    Ok((sha256, Template::new(image).brain().clone()))
}
