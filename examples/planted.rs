//! From which size and contrast are lesions found? This example plants lesions into healthy scans,
//! one at a time, and looks for them with the code of the daemon. It also measures how many voxels
//! of the healthy scans lie above the threshold of the mask. It writes `planted.md`.
//!
//! ```sh
//! cargo run --release --example planted -- --cache CACHE --out docs/quality --into 5 SCAN...
//! python3 docs/pictures.py
//! ```
//!
//! The scans are one window. They are healthy, come from one scanner, and have
//! `<subject>_brain.nii.gz` beside them. Figures that lie in CACHE are used again. No test runs
//! this example, because it needs such scans.

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use clap::Parser;
use half::f16;
use oddscan::{
    companions::{companion_mask, stem_of},
    compute::{
        EncoderOptions, Precision,
        cpu::{CpuDistances, CpuEncoder},
    },
    config::Config,
    domain::{
        PairDistances, SliceEncoder,
        error::ScanError,
        evidence::NoFineVolumes,
        finding::{Place, finding},
        scan::ScanId,
        window::Membership,
        window_scores::{
            ScoredMember, Scoring, WindowDistances, WindowScores, parts_of, score_members,
        },
    },
    engine::Engine,
    model::{find_weights, load_weights},
    nifti::Limits,
    numeric::{
        evaluation::{Ranking, mean},
        fusion::Weights,
        mask::{GridPlacement, score_map},
        preprocess::cube_affine,
        projection::Normal,
        scoring::{Fraction, MapProfile, PairColumns, SearchReach, label_free_threshold},
        slice::{ImageBatch, slice_pixels},
        token::{Foreground, TokenBuilder, TokenGrid, TokenSettings, smooth},
        volume::Volume,
    },
    prepare::{Source, canonical, read_source},
};
use serde::{Deserialize, Serialize};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Parser)]
struct Arguments {
    /// Where figures are kept.
    #[arg(long)]
    cache: PathBuf,
    /// Where `planted.md` is written.
    #[arg(long)]
    out: PathBuf,
    /// Plant into the first so many of them only.
    #[arg(long, value_name = "N", default_value_t = usize::MAX)]
    into: usize,
    /// Healthy scans; all together are the window.
    #[arg(required = true)]
    scans: Vec<PathBuf>,
}

const DIAMETERS_MM: [f64; 4] = [4.0, 6.0, 8.0, 12.0];

/// Change of intensity inside a lesion, as a share of what is there: darker, as lesions are in T1.
const CONTRASTS: [f64; 3] = [-0.25, -0.5, -0.75];

/// Slices that differ less from the original are not encoded anew: the darker lesion may move the
/// white level of the whole scan by less.
const UNCHANGED: f32 = 2e-3;

/// Stated false-positive shares at which healthy scans are measured.
const SHARES: [f64; 7] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05];

/// What became of one lesion.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Found {
    diameter_mm: f64,
    contrast: f64,
    /// Whether the mask touches it.
    is_met: bool,
    /// Whether any voxel of it lies above the threshold, however small the region.
    is_above: bool,
    /// Voxels of the lesion against all others of the brain.
    auroc: f64,
}

/// A healthy scan with its tokens before smoothing.
struct Scan {
    source: Source,
    volume: Volume,
    grids: Vec<TokenGrid>,
}

struct Bench {
    encoder: CpuEncoder,
    patch: usize,
    channels: usize,
    settings: TokenSettings,
    config: Config,
    scoring: Scoring,
    method: oddscan::engine::Method,
    scans: Vec<Scan>,
    window: Window,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    fs::create_dir_all(&arguments.cache)?;
    let mut bench = None;
    let healthy = kept(&arguments.cache.join("healthy.json"), || {
        with_window(&mut bench, &arguments.scans)?.healthy()
    })?;
    let mut found: Vec<Found> = Vec::new();
    let n_ill = arguments.into.min(arguments.scans.len());
    for (index, path) in arguments.scans[..n_ill].iter().enumerate() {
        for diameter in DIAMETERS_MM {
            for contrast in CONTRASTS {
                let name = format!("{}-{diameter}-{contrast}.json", stem_of(path));
                found.push(kept(&arguments.cache.join(name), || {
                    with_window(&mut bench, &arguments.scans)?.plant(index, diameter, contrast)
                })?);
            }
        }
    }
    fs::create_dir_all(&arguments.out)?;
    fs::write(arguments.out.join("planted.md"), report(&found, &healthy, n_ill))?;
    Ok(())
}

/// The figure in a file, made and written there where there is none yet.
fn kept<T>(path: &Path, make: impl FnOnce() -> Result<T>) -> Result<T>
where
    T: Serialize + for<'de> Deserialize<'de>,
{
    if !path.exists() {
        let made = make()?;
        println!("{}: {}", path.display(), serde_json::to_string(&made)?);
        fs::write(path, serde_json::to_vec(&made)?)?;
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// The scans, encoded when they are first needed.
fn with_window<'b>(bench: &'b mut Option<Bench>, scans: &[PathBuf]) -> Result<&'b mut Bench> {
    if bench.is_none() {
        let mut new = Bench::new()?;
        for path in scans {
            let scan = new.scan(path)?;
            new.window.scans.push(new.smoothed(&scan.grids)?);
            new.scans.push(scan);
        }
        *bench = Some(new);
    }
    Ok(bench.as_mut().expect("it was just made"))
}

impl Bench {
    fn new() -> Result<Self> {
        let config = Config::parse("")?;
        let weights = load_weights(&find_weights(None)?)?.into_grey();
        let options = EncoderOptions {
            layers: config.layers(weights.architecture.depth),
            final_norm: config.encoder.final_norm,
            position: config.encoder.position_resize,
            precision: Some(Precision::F32),
        };
        Ok(Self {
            encoder: CpuEncoder::new(&weights, &options),
            patch: weights.architecture.patch,
            channels: weights.architecture.channels,
            settings: TokenSettings { smoothing_patches: 0.0, ..config.tokens.clone() },
            scoring: config.scoring,
            method: Engine::start(&config)?.method,
            scans: Vec::new(),
            window: Window {
                reach: config.scoring.reach,
                scans: Vec::new(),
                columns: BTreeMap::new(),
            },
            config,
        })
    }

    fn scan(&mut self, path: &Path) -> Result<Scan> {
        println!("encoding {}", path.display());
        let mask = companion_mask(path);
        let source = read_source(path, mask.as_deref(), &Limits::NONE)?;
        let volume = canonical(&source, &self.method, None)?.volume;
        let grids = self.encode(&volume, None)?;
        Ok(Scan { source, volume, grids })
    }

    /// The tokens of a volume before smoothing; those of slices that did not change are taken from
    /// the original.
    fn encode(&mut self, volume: &Volume, original: Option<usize>) -> Result<Vec<TokenGrid>> {
        let Self { encoder, patch, channels, settings, scans, .. } = self;
        let original = original.map(|index| &scans[index]);
        let mut builder = TokenBuilder::new(volume, *patch, *channels, 1, None, settings);
        for group in builder.due_groups() {
            let slices = builder.slices(group);
            let cut = |volume: &Volume| {
                let mut pixels = vec![0.0; slices.len() * volume.side().pow(2)];
                slice_pixels(volume, group.axis(), &slices, &mut pixels);
                pixels
            };
            let pixels = cut(volume);
            let is_unchanged = original.is_some_and(|original| {
                let before = cut(&original.volume);
                pixels.iter().zip(&before).all(|(a, b)| (a - b).abs() < UNCHANGED)
            });
            if !is_unchanged {
                let (side, patches) = (volume.side(), builder.patches(group));
                let images = ImageBatch {
                    side,
                    pixels,
                    group: slices.len(),
                    patches: vec![patches.clone()],
                };
                builder.add(group, 0, &patches, &encoder.encode(&images)?[0].values);
            }
        }
        let grids = builder.finish()?;
        let Some(original) = original else { return Ok(grids) };
        grids.iter().zip(&original.grids).map(|(new, old)| merged(new, old)).collect()
    }

    fn smoothed(&self, grids: &[TokenGrid]) -> Result<Vec<TokenGrid>> {
        let sigma = self.config.tokens.smoothing_patches;
        let one = |grid: &TokenGrid| -> Result<TokenGrid> {
            let rows: Vec<f32> = grid.features().iter().map(|f| f.to_f32()).collect();
            let rows = smooth(grid.foreground(), &rows, sigma);
            let Foreground { shape, cells } = grid.foreground().clone();
            let features = rows.into_iter().map(f16::from_f32).collect();
            Ok(TokenGrid::new(shape, grid.channels(), cells, features)?)
        };
        grids.iter().map(one).collect()
    }

    /// Share of the voxels of each scan above the threshold, at each of [`SHARES`].
    fn healthy(&mut self) -> Result<Vec<Vec<f64>>> {
        let scores = self.score()?;
        let mut measured = Vec::new();
        for (index, scan) in self.scans.iter().enumerate() {
            let own = &scores.scans[index];
            let placement = GridPlacement {
                cube_side: self.method.cube.side,
                cube: cube_affine(&scan.source.brain, &self.method.cube)?,
            };
            let map = score_map(&own.foreground, &own.cells, &placement, &scan.source.brain);
            let n_brain = scan.source.brain.inside.iter().filter(|inside| **inside).count();
            let above = |share: &f64| {
                let share = Fraction::new(*share).expect("shares are shares");
                let profiles: Vec<MapProfile> = scores
                    .scans
                    .iter()
                    .map(|scan| MapProfile::new(scan.cells.clone(), share))
                    .collect();
                let threshold = label_free_threshold(&profiles, index, self.scoring.clean_scans);
                map.iter().filter(|&&value| value > threshold).count() as f64 / n_brain as f64
            };
            measured.push(SHARES.iter().map(above).collect());
        }
        Ok(measured)
    }

    fn score(&mut self) -> Result<WindowScores> {
        let Self { window, method, scoring, .. } = self;
        Ok(score_members(&window.members(), &method.layers, scoring, window, &NoFineVolumes)?)
    }

    fn plant(&mut self, index: usize, diameter_mm: f64, contrast: f64) -> Result<Found> {
        let original = &self.scans[index].source;
        let centre = place(original, index as u64);
        let (source, lesion) = with_lesion(original, centre, diameter_mm / 2.0, contrast);
        let volume = canonical(&source, &self.method, None)?.volume;
        let grids = self.encode(&volume, Some(index))?;
        let healthy = self.window.replace(index, self.smoothed(&grids)?);
        let scores = self.score()?;
        let placement =
            GridPlacement { cube_side: self.method.cube.side, cube: source.cube(&self.method)? };
        let place = Place { scan: &source.raw, brain: &source.brain, placement };
        let finding = finding(&place, &scores, index, None, &self.scoring);
        self.window.restore(index, healthy);
        let brain = &source.brain.inside;
        let voxels = (0..brain.len()).filter(|&voxel| brain[voxel]);
        let curve = Ranking::new([voxels.map(|v| (finding.map[v], lesion[v]))]).curve();
        let touched =
            |what: &dyn Fn(usize) -> bool| (0..lesion.len()).any(|v| lesion[v] && what(v));
        Ok(Found {
            diameter_mm,
            contrast,
            is_met: touched(&|voxel| finding.mask[voxel]),
            is_above: touched(&|voxel| finding.map[voxel] > finding.threshold),
            auroc: curve.ok_or("a lesion without voxels")?.auroc,
        })
    }
}

/// The new tokens where there are any, the old ones elsewhere.
fn merged(new: &TokenGrid, old: &TokenGrid) -> Result<TokenGrid> {
    let width = new.channels();
    let mut features = old.features().to_vec();
    for (token, row) in new.features().chunks_exact(width).enumerate() {
        if row.iter().any(|feature| *feature != f16::ZERO) {
            features[token * width..(token + 1) * width].copy_from_slice(row);
        }
    }
    let Foreground { shape, cells } = old.foreground().clone();
    Ok(TokenGrid::new(shape, width, cells, features)?)
}

/// A place deep in the brain where the tissue is bright, as white matter is in T1.
fn place(source: &Source, seed: u64) -> [f64; 3] {
    let (shape, spacing) = (source.raw.shape, source.raw.affine.spacing_mm());
    let inside: Vec<usize> =
        (0..shape.n_voxels()).filter(|&voxel| source.brain.inside[voxel]).collect();
    let mut values: Vec<f32> = inside.iter().map(|&voxel| source.raw.voxels[voxel]).collect();
    values.sort_unstable_by(f32::total_cmp);
    let bright = values[values.len() * 6 / 10];
    let mut normal = Normal::new(seed);
    loop {
        // A normal number is uniform enough to draw a voxel by.
        let draw = (normal.next().abs() * 1e6) as usize % inside.len();
        let centre = shape.voxel(inside[draw]);
        let is_deep = within(shape.0, spacing, centre.map(|c| c as f64), 14.0)
            .all(|(voxel, _)| source.brain.inside[shape.offset(voxel)]);
        let mut around = within(shape.0, spacing, centre.map(|c| c as f64), 5.0);
        if is_deep && around.all(|(voxel, _)| source.raw.voxels[shape.offset(voxel)] > bright) {
            return centre.map(|c| c as f64);
        }
    }
}

/// Voxels of the grid around a place, with their distance in mm, up to `radius_mm`.
fn within(
    shape: [usize; 3],
    spacing: [f64; 3],
    centre: [f64; 3],
    radius_mm: f64,
) -> impl Iterator<Item = ([usize; 3], f64)> {
    let range = |axis: usize| {
        let reach = radius_mm / spacing[axis];
        let low = (centre[axis] - reach).ceil().max(0.0) as usize;
        let high = (centre[axis] + reach).floor() as usize;
        low..(high + 1).min(shape[axis])
    };
    let (x, y, z) = (range(0), range(1), range(2));
    z.flat_map(move |z| {
        let x = x.clone();
        y.clone().flat_map(move |y| x.clone().map(move |x| [x, y, z]))
    })
    .filter_map(move |voxel| {
        let apart = [0, 1, 2].map(|a| (voxel[a] as f64 - centre[a]) * spacing[a]);
        let distance = apart.iter().map(|d| d * d).sum::<f64>().sqrt();
        (distance <= radius_mm).then_some((voxel, distance))
    })
}

/// The scan with a ball of another intensity, its border one voxel soft, and the ball's voxels.
fn with_lesion(
    source: &Source,
    centre: [f64; 3],
    radius_mm: f64,
    contrast: f64,
) -> (Source, Vec<bool>) {
    let (shape, spacing) = (source.raw.shape, source.raw.affine.spacing_mm());
    let softness = spacing.into_iter().fold(f64::INFINITY, f64::min);
    let mut raw = source.raw.clone();
    let mut lesion = vec![false; shape.n_voxels()];
    for (voxel, distance) in within(shape.0, spacing, centre, radius_mm + softness) {
        let offset = shape.offset(voxel);
        let share = ((radius_mm - distance) / softness + 0.5).clamp(0.0, 1.0);
        raw.voxels[offset] *= (1.0 + share * contrast) as f32;
        lesion[offset] = share >= 0.5;
    }
    let (grid, brain) = (source.grid.clone(), source.brain.clone());
    let planted = Source { raw, grid, brain, preprocess: None, ..*source };
    (planted, lesion)
}

/// The tokens of the window, and the distances between its scans.
struct Window {
    reach: SearchReach,
    scans: Vec<Vec<TokenGrid>>,
    columns: BTreeMap<(ScanId, ScanId, usize), Vec<f32>>,
}

type Columns = Vec<((ScanId, ScanId, usize), Vec<f32>)>;

fn id(index: usize) -> ScanId {
    ScanId([index as u8; 32])
}

impl Window {
    fn members(&self) -> Vec<ScoredMember> {
        let member = |(index, grids): (usize, &Vec<TokenGrid>)| ScoredMember {
            weights: Weights::OF_TOKENS_ALONE,
            id: id(index),
            parts: parts_of(grids, grids.len()),
            membership: Membership::REFERENCE,
        };
        self.scans.iter().enumerate().map(member).collect()
    }

    /// Puts other tokens in the place of a scan's; gives back what [`Window::restore`] needs.
    fn replace(&mut self, index: usize, grids: Vec<TokenGrid>) -> (Vec<TokenGrid>, Columns) {
        let own = id(index);
        let is_own = |key: &(ScanId, ScanId, usize)| key.0 == own || key.1 == own;
        let keys: Vec<_> = self.columns.keys().copied().filter(is_own).collect();
        let columns =
            keys.into_iter().filter_map(|key| Some((key, self.columns.remove(&key)?))).collect();
        (std::mem::replace(&mut self.scans[index], grids), columns)
    }

    fn restore(&mut self, index: usize, (grids, columns): (Vec<TokenGrid>, Columns)) {
        self.scans[index] = grids;
        self.columns.extend(columns);
    }
}

impl WindowDistances for Window {
    fn column(
        &mut self,
        of: ScanId,
        other: ScanId,
        grid: usize,
    ) -> std::result::Result<Vec<f32>, ScanError> {
        if let Some(column) = self.columns.get(&(of, other, grid)) {
            return Ok(column.clone());
        }
        let tokens = |id: ScanId| &self.scans[usize::from(id.0[0])][grid];
        let PairColumns { first_to_second, second_to_first } =
            CpuDistances::new().nearest(tokens(of), tokens(other), self.reach)?;
        self.columns.insert((other, of, grid), second_to_first);
        self.columns.insert((of, other, grid), first_to_second.clone());
        Ok(first_to_second)
    }

    fn column_without(
        &mut self,
        _: ScanId,
        _: ScanId,
        _: usize,
        _: &[usize],
    ) -> std::result::Result<Vec<f32>, ScanError> {
        unreachable!("the filter is off by default")
    }
}

fn of(found: &[Found], diameter_mm: f64, contrast: f64) -> Vec<&Found> {
    let is_wanted = |one: &&Found| one.diameter_mm == diameter_mm && one.contrast == contrast;
    found.iter().filter(is_wanted).collect()
}

fn report(found: &[Found], healthy: &[Vec<f64>], n_ill: usize) -> String {
    let n_window = healthy.len();
    let mut text = format!(
        "# Planted lesions, and healthy scans\n
[The mask, and lesions by size](mask.md) explains what these tables show. The window holds {n_window}
healthy scans of one scanner, and the settings are the defaults. Into {n_ill} of the scans a darker ball is
planted, one at a time, at one place in the white matter of each.\n
Each cell holds: lesions that the final mask touches, of {n_ill}; in brackets, lesions with any voxel above
the threshold, before small regions are dropped; the mean AUROC of the lesion's voxels against the rest of
the brain.\n
| diameter | volume |"
    );
    for contrast in CONTRASTS {
        text += &format!(" {:.0} % |", 100.0 * contrast);
    }
    text += "\n|---|---|---|---|---|\n";
    for diameter in DIAMETERS_MM {
        let volume = std::f64::consts::PI * diameter.powi(3) / 6.0;
        text += &format!("| {diameter} mm | {volume:.0} mm³ |");
        for contrast in CONTRASTS {
            let these = of(found, diameter, contrast);
            let n_met = these.iter().filter(|one| one.is_met).count();
            let n_above = these.iter().filter(|one| one.is_above).count();
            let auroc = mean(these.iter().map(|one| one.auroc)).unwrap_or(f64::NAN);
            text += &format!(" {n_met} ({n_above}); {auroc:.3} |");
        }
        text += "\n";
    }
    text += "\nFalse-positive rate in the healthy scans, as a share of brain voxels: the mean of the scans \
             (lowest to highest).\n\n| stated | measured |\n|---|---|\n";
    for (index, share) in SHARES.iter().enumerate() {
        let of_scans = healthy.iter().map(|shares| 100.0 * shares[index]);
        let average = mean(of_scans.clone()).unwrap_or(f64::NAN);
        let low = of_scans.clone().fold(f64::INFINITY, f64::min);
        let high = of_scans.fold(0.0, f64::max);
        text += &format!("| {} % | {average:.2} % ({low:.2} to {high:.2}) |\n", 100.0 * share);
    }
    text
}
