//! Which settings find known lesions best? Encodes every scan once at every block, keeps the tokens,
//! and scores them again and again under other settings, with the code that the daemon uses.
//!
//! ```sh
//! cargo run --example study -- --cache CACHE --out docs/quality SCANS...
//! ```
//!
//! SCANS are folders, each one window: `<subject>_<modality>.nii.gz` with `<subject>_brain.nii.gz`
//! and, for patients, `<subject>_lesion.nii.gz` beside it. What lies in CACHE is not made again.

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use clap::Parser;
use half::f16;
use oddscan::{
    compute::cpu::CpuDistances,
    config::Config,
    domain::{PairDistances, error::ScanError, scan::ScanId},
    engine::Engine,
    ingest::{self, Patterns},
    nifti::{self, Limits},
    numeric::{
        evaluation::{Overlap, Ranking, mean},
        geometry::Shape3,
        mask::{GridPlacement, map_samples, score_map},
        preprocess::cube_affine,
        projection::Projection,
        scoring::{Fraction, MapProfile, ScanScores, SearchReach, label_free_threshold},
        token::{TokenGrid, smooth},
        volume::Volume,
    },
    pipeline::steps::{self, Member},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Parser)]
struct Arguments {
    /// Where tokens and figures are kept.
    #[arg(long)]
    cache: PathBuf,
    /// Where `study.md` is written.
    #[arg(long)]
    out: PathBuf,
    /// Only variants whose names contain one of these texts.
    #[arg(long)]
    only: Vec<String>,
    /// Folders of scans; each is a window of its own.
    #[arg(required = true)]
    scans: Vec<PathBuf>,
}

/// Cells along each edge of the token grid.
const SIDE: usize = 16;

const LIMITS: Limits = Limits { max_file_bytes: u64::MAX, max_voxels: u64::MAX };

/// Everything that tokens of any variant can be made from.
const EVERYTHING: &str = "encoder.layers = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
tokens.projection = 0\ntokens.min_brain_fraction = 0.0\ntokens.smoothing_cells = 0.0\n";

/// The ways of encoding that are compared; each costs a pass over all slices.
const ENCODINGS: [(&str, &str); 1] = [("default", "")];

/// One way of scoring.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Variant {
    name: String,
    encoding: String,
    layers: Vec<usize>,
    /// Views kept, as positions in axial, coronal, sagittal.
    views: Vec<usize>,
    projection: usize,
    seed: u64,
    min_fraction: f64,
    smoothing: f64,
    reach: usize,
    keep: f64,
    /// Share of what its place scores in the other scans that is taken from a score.
    place_share: f64,
    /// Whether shared anomalies are filtered.
    filter: bool,
}

/// Stated false-positive shares at which masks are measured.
const SHARES: [f64; 4] = [0.005, 0.01, 0.02, 0.03];

/// The figures of one scan.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Figures {
    /// Of a scan with lesions.
    curve: Option<(f64, f64, f64)>,
    /// Dice and measured false-positive share at each of [`SHARES`].
    masks: Vec<(f64, f64)>,
    /// Median token score.
    median: f32,
    top1_mean: f32,
}

/// The figures of one window under one variant.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Outcome {
    variant: Variant,
    window: String,
    scans: BTreeMap<String, Figures>,
    pooled: Option<(f64, f64, f64)>,
}

/// One scan with everything that scoring needs.
struct Scan {
    stem: String,
    layers: Vec<Vec<f16>>,
    cells: Vec<u32>,
    fractions: Vec<f32>,
    placement: GridPlacement,
    brain: oddscan::numeric::volume::RawMask,
    truth: Vec<bool>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    fs::create_dir_all(&arguments.cache)?;
    for (name, settings) in ENCODINGS {
        encode(&arguments, name, settings)?;
    }
    let mut outcomes = Vec::new();
    for folder in &arguments.scans {
        let window = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut scans = None;
        let chosen = |v: &Variant| {
            arguments.only.is_empty() || arguments.only.iter().any(|text| v.name.contains(text))
        };
        for variant in variants().into_iter().filter(chosen) {
            let key = format!("{}-{window}.json", digest(&variant)?);
            let path = arguments.cache.join(key);
            if !path.exists() {
                if scans.is_none() {
                    scans = Some(load(&arguments, folder, &variant.encoding)?);
                }
                let outcome = score(scans.as_deref().unwrap_or_default(), &variant, &window)?;
                println!("{}", line(&outcome));
                fs::write(&path, serde_json::to_vec(&outcome)?)?;
            }
            outcomes.push(serde_json::from_slice::<Outcome>(&fs::read(&path)?)?);
        }
    }
    fs::create_dir_all(&arguments.out)?;
    fs::write(arguments.out.join("study.md"), report(&outcomes))?;
    Ok(())
}

fn digest(variant: &Variant) -> Result<String> {
    use sha2::{Digest, Sha256};
    Ok(hex::encode(&Sha256::digest(serde_json::to_vec(variant)?)[..8]))
}

/// The settings of the table in the design, and what is changed in them one at a time.
fn variants() -> Vec<Variant> {
    let base = Variant {
        name: "base".into(),
        encoding: "default".into(),
        layers: vec![9],
        views: vec![0, 1, 2],
        projection: 128,
        seed: 20_260_211,
        min_fraction: 0.3,
        smoothing: 0.0,
        reach: 1,
        keep: 0.3,
        place_share: 0.0,
        filter: false,
    };
    let mut all = vec![base.clone()];
    let mut add = |name: String, change: &dyn Fn(&mut Variant)| {
        let mut variant = Variant { name, ..base.clone() };
        change(&mut variant);
        all.push(variant);
    };
    add("whole volume".into(), &|v| v.reach = 0);
    for seed in 1..=4 {
        add(format!("projection seed {seed}"), &|v| v.seed = seed);
    }
    for k in [0, 32, 64, 256] {
        add(format!("projection {k}"), &|v| v.projection = k);
    }
    for layer in 3..=12 {
        add(format!("layer {layer}"), &|v| v.layers = vec![layer]);
        add(format!("layer {layer}, no projection"), &|v| {
            v.layers = vec![layer];
            v.projection = 0;
        });
    }
    for layers in [vec![3, 6, 9, 12], vec![6, 9], vec![7, 9], vec![8, 9, 10], vec![7, 8, 9, 10]] {
        add(format!("layers {layers:?}, no projection"), &|v| {
            v.layers = layers.clone();
            v.projection = 0;
        });
    }
    add("layers [3, 6, 9, 12], whole volume".into(), &|v| {
        v.layers = vec![3, 6, 9, 12];
        v.reach = 0;
    });
    for views in [vec![0], vec![1], vec![2], vec![0, 1], vec![0, 2], vec![1, 2]] {
        add(format!("views {views:?}, no projection"), &|v| {
            v.views = views.clone();
            v.projection = 0;
        });
    }
    for smoothing in [0.4, 0.6, 0.8, 1.0] {
        add(format!("smoothing {smoothing}"), &|v| v.smoothing = smoothing);
        for layer in [8, 9, 10] {
            add(format!("layer {layer}, smoothing {smoothing}, no projection"), &|v| {
                v.layers = vec![layer];
                v.smoothing = smoothing;
                v.projection = 0;
            });
        }
    }
    add("layers [8, 9, 10], smoothing 0.6, no projection".into(), &|v| {
        v.layers = vec![8, 9, 10];
        v.smoothing = 0.6;
        v.projection = 0;
    });
    add("filter, smoothing 0.4, no projection".into(), &|v| {
        v.filter = true;
        v.smoothing = 0.4;
        v.projection = 0;
    });
    for keep in [0.1, 0.2, 0.5, 0.8, 1.0] {
        add(format!("K {keep}, smoothing 0.4, no projection"), &|v| {
            v.keep = keep;
            v.smoothing = 0.4;
            v.projection = 0;
        });
        add(format!("K {keep}"), &|v| v.keep = keep);
        add(format!("K {keep}, smoothing 0.6, no projection"), &|v| {
            v.keep = keep;
            v.smoothing = 0.6;
            v.projection = 0;
        });
    }
    for min_fraction in [0.0, 0.1, 0.2, 0.5] {
        add(format!("brain fraction {min_fraction}"), &|v| v.min_fraction = min_fraction);
    }
    for reach in [2, 3] {
        add(format!("reach {reach}"), &|v| v.reach = reach);
    }
    add("filter".into(), &|v| v.filter = true);
    add("filter, whole volume".into(), &|v| {
        v.filter = true;
        v.reach = 0;
    });
    for place_share in [0.5, 1.0] {
        add(format!("place share {place_share}"), &|v| v.place_share = place_share);
    }
    all
}

fn config(settings: &str) -> Result<Config> {
    Ok(Config::parse(&format!("{EVERYTHING}{settings}"))?)
}

fn listed(folder: &Path) -> Result<Vec<PathBuf>> {
    let intake = Config::parse("")?.intake;
    let patterns = Patterns::new(&intake.accept, &intake.ignore)?;
    let listed = ingest::list(folder, &patterns, || {})?;
    Ok(listed.into_iter().map(|candidate| candidate.path).collect())
}

fn tokens_path(arguments: &Arguments, encoding: &str, scan: &Path) -> PathBuf {
    let window = scan.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let name = format!("{encoding}-{window}-{}.safetensors", steps::stem_of(scan));
    arguments.cache.join(name)
}

/// Encodes what is not there yet.
fn encode(arguments: &Arguments, encoding: &str, settings: &str) -> Result<()> {
    let mut engine = None;
    for folder in &arguments.scans {
        for path in listed(folder)? {
            let target = tokens_path(arguments, encoding, &path);
            if target.exists() {
                continue;
            }
            let engine = match &mut engine {
                Some(engine) => engine,
                empty => empty.insert(Engine::start(&config(settings)?)?),
            };
            println!("encoding {}", path.display());
            let mask = steps::companion_mask(&path);
            let source = steps::read_source(&path, mask.as_deref(), &LIMITS)?;
            let volume = steps::canonical(&source, &engine.method)?.volume;
            let layers = engine.tokeniser.tokens(&volume, |_| ControlFlow::Continue(()))?;
            let fractions = fractions(&volume, engine.method.patch, layers[0].cells());
            save(&target, &layers, &fractions)?;
        }
    }
    Ok(())
}

/// Share of brain in each cell.
fn fractions(volume: &Volume, patch: usize, cells: &[u32]) -> Vec<f32> {
    let shape = Shape3::cube(volume.side() / patch);
    let mut counts = vec![0_u32; shape.n_voxels()];
    for (offset, _) in volume.brain().iter().enumerate().filter(|(_, inside)| **inside) {
        counts[shape.offset(volume.shape().voxel(offset).map(|v| v / patch))] += 1;
    }
    cells.iter().map(|&cell| counts[cell as usize] as f32 / patch.pow(3) as f32).collect()
}

fn save(path: &Path, layers: &[TokenGrid], fractions: &[f32]) -> Result<()> {
    let (n, channels) = (layers[0].n_tokens(), layers[0].channels());
    let cells = bytemuck::cast_slice(layers[0].cells());
    let mut tensors = vec![
        ("cells".to_owned(), TensorView::new(Dtype::U32, vec![n], cells)?),
        (
            "fractions".to_owned(),
            TensorView::new(Dtype::F32, vec![n], bytemuck::cast_slice(fractions))?,
        ),
    ];
    for (index, layer) in layers.iter().enumerate() {
        let data = bytemuck::cast_slice(layer.features());
        let view = TensorView::new(Dtype::F16, vec![n, channels], data)?;
        tensors.push((format!("layer.{}", index + 1), view));
    }
    let partial = path.with_extension("partial");
    fs::write(&partial, safetensors::serialize(tensors, None)?)?;
    Ok(fs::rename(partial, path)?)
}

fn load(arguments: &Arguments, folder: &Path, encoding: &str) -> Result<Vec<Scan>> {
    let cube = config("")?.volume;
    let mut scans = Vec::new();
    for path in listed(folder)? {
        let bytes = fs::read(tokens_path(arguments, encoding, &path))?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let halves = |name: &str| -> Result<Vec<f16>> {
            let data = tensors.tensor(name)?.data();
            Ok(data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect())
        };
        let words = |name: &str| -> Result<Vec<u32>> {
            let data = tensors.tensor(name)?.data();
            Ok(data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let mask = steps::companion_mask(&path);
        let source = steps::read_source(&path, mask.as_deref(), &LIMITS)?;
        let truth = match steps::companion(&path, "lesion") {
            Some(path) => nifti::read_mask(&path, &LIMITS)?.inside,
            None => vec![false; source.brain.inside.len()],
        };
        let cube = cube_affine(&source.brain, &cube)?;
        scans.push(Scan {
            stem: steps::stem_of(&path),
            layers: (1..=12)
                .map(|layer| halves(&format!("layer.{layer}")))
                .collect::<Result<_>>()?,
            cells: words("cells")?,
            fractions: words("fractions")?.into_iter().map(f32::from_bits).collect(),
            placement: GridPlacement { side: SIDE, patch: 14, cube },
            brain: source.brain,
            truth,
        });
    }
    Ok(scans)
}

/// The tokens of a scan at one layer under a variant.
fn tokens(scan: &Scan, layer: usize, variant: &Variant) -> Result<TokenGrid> {
    let kept: Vec<usize> = (0..scan.cells.len())
        .filter(|&token| f64::from(scan.fractions[token]) >= variant.min_fraction)
        .collect();
    let cells: Vec<u32> = kept.iter().map(|&token| scan.cells[token]).collect();
    let features = &scan.layers[layer - 1];
    let channels = features.len() / scan.cells.len();
    let width = channels / 3;
    let projection =
        (variant.projection > 0).then(|| Projection::new(variant.seed, width, variant.projection));
    let mut rows = Vec::new();
    for &token in &kept {
        for &view in &variant.views {
            let start = token * channels + view * width;
            let own: Vec<f32> = features[start..start + width].iter().map(|f| f.to_f32()).collect();
            match &projection {
                Some(projection) => {
                    let from = rows.len();
                    rows.resize(from + variant.projection, 0.0);
                    projection.apply(&own, &mut rows[from..]);
                }
                None => rows.extend(own),
            }
        }
    }
    if variant.smoothing > 0.0 {
        rows = smooth(SIDE, &cells, &rows, variant.smoothing);
    }
    let channels = rows.len() / cells.len();
    Ok(TokenGrid::new(SIDE, channels, cells, rows.into_iter().map(f16::from_f32).collect())?)
}

/// The token grids of a window: `[layer][scan]`.
struct Grids {
    layers: Vec<Vec<TokenGrid>>,
    reach: SearchReach,
    columns: BTreeMap<(ScanId, ScanId, usize), Vec<f32>>,
}

/// A made-up id: the position of the scan in the window.
fn id(index: usize) -> ScanId {
    let mut id = [0; 32];
    id[0] = index as u8;
    ScanId(id)
}

impl Grids {
    fn grid(&self, scan: ScanId, layer: usize) -> &TokenGrid {
        &self.layers[layer][usize::from(scan.0[0])]
    }
}

impl steps::Distances for Grids {
    fn column(
        &mut self,
        of: ScanId,
        other: ScanId,
        layer: usize,
    ) -> std::result::Result<Vec<f32>, ScanError> {
        if let Some(column) = self.columns.remove(&(of, other, layer)) {
            return Ok(column);
        }
        let (a, b) = (self.grid(of, layer), self.grid(other, layer));
        let pair = CpuDistances::new().nearest(a, b, self.reach)?;
        self.columns.insert((other, of, layer), pair.second_to_first);
        Ok(pair.first_to_second)
    }

    fn column_without(
        &mut self,
        of: ScanId,
        other: ScanId,
        layer: usize,
        excluded: &[usize],
    ) -> std::result::Result<Vec<f32>, ScanError> {
        let theirs = self.grid(other, layer).without(excluded);
        Ok(CpuDistances::new().nearest(self.grid(of, layer), &theirs, self.reach)?.first_to_second)
    }
}

fn score(scans: &[Scan], variant: &Variant, window: &str) -> Result<Outcome> {
    let settings = Config::parse(&format!(
        "[scoring]\nreach_cells = {}\nkeep_fraction = {:?}\nplace_share = {:?}\n\
         [community]\nenabled = {}\n",
        variant.reach, variant.keep, variant.place_share, variant.filter
    ))?
    .scoring;
    let grids = |&layer: &usize| -> Result<Vec<TokenGrid>> {
        scans.iter().map(|scan| tokens(scan, layer, variant)).collect()
    };
    let layers: Vec<Vec<TokenGrid>> = variant.layers.iter().map(grids).collect::<Result<_>>()?;
    let member =
        |(index, grid): (usize, &TokenGrid)| Member { id: id(index), cells: grid.cells().to_vec() };
    let members: Vec<Member> = layers[0].iter().enumerate().map(member).collect();
    let mut grids = Grids { layers, reach: settings.reach, columns: BTreeMap::new() };
    let found = steps::score_members(&members, SIDE, &variant.layers, &settings, &mut grids)?;
    for shared in &found.shared {
        let stems = shared.members.iter().map(|id| scans[usize::from(id.0[0])].stem.as_str());
        println!("shared: {:?}, {} tokens", stems.collect::<Vec<_>>(), shared.n_excluded);
    }
    figures(scans, &members, &found.scans, settings.clean_scans, variant, window)
}

/// Thresholds of every scan at one stated share.
fn thresholds(members: &[Member], scores: &[ScanScores], share: f64, clean: Fraction) -> Vec<f32> {
    let share = Fraction::new(share).expect("shares are shares");
    let profiles = members.iter().zip(scores).map(|(member, scores)| {
        MapProfile::new(map_samples(SIDE, &member.cells, &scores.tokens), share)
    });
    let profiles: Vec<MapProfile> = profiles.collect();
    let threshold = |own: usize| {
        let mut others = profiles.clone();
        label_free_threshold(&others.remove(own), &others, clean)
    };
    (0..members.len()).map(threshold).collect()
}

fn figures(
    scans: &[Scan],
    members: &[Member],
    scores: &[ScanScores],
    clean: Fraction,
    variant: &Variant,
    window: &str,
) -> Result<Outcome> {
    let mut found = BTreeMap::new();
    let mut all = Vec::new();
    let thresholds = SHARES.map(|share| thresholds(members, scores, share, clean));
    for (index, scan) in scans.iter().enumerate() {
        let cells = &members[index].cells;
        let map = score_map(cells, &scores[index].tokens, &scan.placement, &scan.brain);
        let scored: Vec<(f32, bool)> = (0..map.len())
            .filter(|&voxel| scan.brain.inside[voxel])
            .map(|voxel| (map[voxel], scan.truth[voxel]))
            .collect();
        let curve = Ranking::new([scored.iter().copied()]).curve();
        let n_healthy = scored.iter().filter(|(_, truth)| !truth).count();
        let masks = thresholds.iter().map(|thresholds| {
            let threshold = thresholds[index];
            let overlap = Overlap::of(scored.iter().map(|&(s, truth)| (s > threshold, truth)));
            (overlap.dice().unwrap_or(0.0), overlap.mask_only as f64 / n_healthy as f64)
        });
        let figures = Figures {
            curve: curve.map(|c| (c.auroc, c.average_precision, c.oracle_dice)),
            masks: masks.collect(),
            median: scores[index].median,
            top1_mean: scores[index].top1_mean,
        };
        found.insert(scan.stem.clone(), figures);
        all.push(scored);
    }
    let pooled = Ranking::new(all).curve();
    let pooled = pooled.map(|c| (c.auroc, c.average_precision, c.oracle_dice));
    Ok(Outcome { variant: variant.clone(), window: window.to_owned(), scans: found, pooled })
}

/// AUROC, average precision and oracle Dice over scans with lesions.
fn means(outcome: &Outcome) -> [f64; 3] {
    let curves = || outcome.scans.values().filter_map(|f| f.curve);
    let of = |get: fn((f64, f64, f64)) -> f64| mean(curves().map(get)).unwrap_or(f64::NAN);
    [of(|c| c.0), of(|c| c.1), of(|c| c.2)]
}

/// Mean Dice over scans with lesions and mean false-positive share over all, at each of [`SHARES`].
fn masks(outcome: &Outcome) -> String {
    let at = |index: usize| {
        let ill = outcome.scans.values().filter(|f| f.curve.is_some());
        let dice = mean(ill.map(|f| f.masks[index].0)).unwrap_or(f64::NAN);
        let measured = mean(outcome.scans.values().map(|f| f.masks[index].1)).unwrap_or(f64::NAN);
        format!("{dice:.3} ({:.2} %)", 100.0 * measured)
    };
    (0..SHARES.len()).map(at).collect::<Vec<_>>().join(", ")
}

fn line(outcome: &Outcome) -> String {
    let [auroc, ap, oracle] = means(outcome);
    let (pa, pp, pd) = outcome.pooled.unwrap_or((f64::NAN, f64::NAN, f64::NAN));
    format!(
        "{:<24} {:<46} {auroc:.3} / {ap:.3} / {oracle:.3}   pooled {pa:.3} / {pp:.3} / {pd:.3}   masks {}",
        outcome.window,
        outcome.variant.name,
        masks(outcome)
    )
}

/// A table per window.
fn report(outcomes: &[Outcome]) -> String {
    let mut windows: BTreeMap<&str, Vec<&Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        windows.entry(&outcome.window).or_default().push(outcome);
    }
    let mut text = REPORT.to_owned();
    for (window, outcomes) in windows {
        text += &format!("\n## {window}\n| setting | mean | pooled | masks |\n|---|---|---|---|\n");
        for outcome in outcomes {
            let [auroc, ap, oracle] = means(outcome);
            let (pa, pp, pd) = outcome.pooled.unwrap_or((f64::NAN, f64::NAN, f64::NAN));
            text += &format!(
                "| {} | {auroc:.3} / {ap:.3} / {oracle:.3} | {pa:.3} / {pp:.3} / {pd:.3} | {} |\n",
                outcome.variant.name,
                masks(outcome)
            );
        }
    }
    text
}

const REPORT: &str = "# Every setting that was tried\n
See [../quality.md](../quality.md). The base is block 9, three views projected to 128 channels, no
smoothing, one cell around, K = 30 %, cells with at least 30 % brain; each row changes what its name
says. Mean AUROC / average precision / oracle Dice over scans with lesions, the same pooled over all
voxels, and Dice of the mask (measured share of false positives) at stated shares of 0.5, 1, 2 and 3 %.
";
