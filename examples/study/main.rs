//! Which settings find known lesions best? This example encodes every scan once for each way of
//! encoding and keeps the tokens. It then scores the tokens under each setting with the code of
//! the daemon, and writes `study.md`.
//!
//! ```sh
//! cargo run --release --example study -- --cache CACHE --out docs/quality SCANS...
//! python3 docs/pictures.py
//! ```
//!
//! SCANS are folders. Each folder is one window: `<subject>_<modality>.nii.gz`, beside it
//! `<subject>_brain.nii.gz`, and for patients `<subject>_lesion.nii.gz`. Figures that lie in CACHE
//! are used again. No test runs this example, because it needs such scans.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use clap::Parser;
use half::f16;
use oddscan::{
    companions::{companion, companion_mask, stem_of},
    compute::cpu::CpuDistances,
    config::Config,
    domain::{
        PairDistances,
        error::ScanError,
        evidence::NoFineVolumes,
        scan::ScanId,
        window::Membership,
        window_scores::{ScoredMember, WindowDistances, parts_of, score_members},
    },
    engine::Engine,
    ingest::{self, Links, Patterns},
    nifti::{self, Limits},
    numeric::{
        evaluation::{Overlap, Ranking, mean},
        fusion::Weights,
        geometry::Shape3,
        mask::{GridPlacement, score_map},
        preprocess::cube_affine,
        projection::Projection,
        scoring::{Fraction, MapProfile, ScanScores, SearchReach, label_free_threshold},
        token::{Foreground, TokenGrid, brain_per_cell, smooth},
        volume::Volume,
    },
    prepare::{canonical, read_source},
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

/// What all encodings share, so that every variant can be made from their tokens.
const RAW: &str = "tokens.projection = 0\ntokens.min_brain_fraction = 0.0\n\
                   tokens.smoothing_patches = 0.0\n";

/// A way of encoding; each costs a pass over all slices.
struct Encoding {
    name: &'static str,
    layers: &'static [usize],
    settings: &'static str,
}

const ALL: &[usize] = &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

const ENCODINGS: [Encoding; 11] = [
    Encoding {
        name: "joined",
        layers: ALL,
        settings: "tokens.join_views = true\ntokens.slices_per_token = 14",
    },
    Encoding { name: "views", layers: &[9], settings: "" },
    Encoding { name: "14 slices", layers: &[9], settings: "tokens.slices_per_token = 14" },
    Encoding { name: "2 slices", layers: &[9], settings: "tokens.slices_per_token = 2" },
    Encoding { name: "no final norm", layers: &[9], settings: "encoder.final_norm = false" },
    Encoding { name: "stride 2", layers: &[9], settings: "tokens.slice_stride = 2" },
    Encoding {
        name: "stride 2, background skipped",
        layers: &[9],
        settings: "tokens.slice_stride = 2\ntokens.skip_background = true",
    },
    Encoding { name: "stride 7", layers: &[9], settings: "tokens.slice_stride = 7" },
    // Cheap, so that these can be compared with "stride 7".
    Encoding {
        name: "stride 7, other blocks",
        layers: &[6, 7, 8, 10, 11, 12],
        settings: "tokens.slice_stride = 7",
    },
    Encoding {
        name: "stride 7, field 160 mm",
        layers: &[9],
        settings: "tokens.slice_stride = 7\nvolume.field_of_view_mm = 160.0",
    },
    Encoding {
        name: "stride 7, field 192 mm",
        layers: &[9],
        settings: "tokens.slice_stride = 7\nvolume.field_of_view_mm = 192.0",
    },
];

impl Encoding {
    fn named(name: &str) -> &'static Self {
        ENCODINGS.iter().find(|encoding| encoding.name == name).expect("a name of the list")
    }

    fn config(&self) -> Result<Config> {
        let Self { layers, settings, .. } = self;
        let or = |key, default| if settings.contains(key) { "" } else { default };
        let stride = or("slice_stride", "tokens.slice_stride = 1\n");
        let background = or("skip_background", "tokens.skip_background = false\n");
        let text = format!("{RAW}encoder.layers = {layers:?}\n{stride}{background}{settings}");
        Ok(Config::parse(&text)?)
    }
}

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
    positional_correction: f64,
    /// Whether shared anomalies are filtered.
    filter: bool,
    /// Seven layers are pooled into one token: per channel the mean of this many largest values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pooled_top: Option<usize>,
    /// Whether scores are z-scores against those of the same cell in the other scans.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    z_score: bool,
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
    parts: Vec<Part>,
    placement: GridPlacement,
    brain: oddscan::numeric::volume::RawMask,
    truth: Vec<bool>,
}

/// The tokens of one view, or of all joined, at all cells with any brain.
struct Part {
    foreground: Foreground,
    /// Share of brain in each cell.
    fractions: Vec<f32>,
    /// By encoder block.
    layers: BTreeMap<usize, Vec<f16>>,
}

impl Part {
    /// Seven layers of a view at a time as one: per channel the mean of the `top` largest values.
    fn pooled(&self, top: usize) -> Self {
        let Foreground { shape, cells } = &self.foreground;
        let axis = (0..3).max_by_key(|&axis| shape.0[axis]).expect("three axes");
        let mut coarse = *shape;
        coarse.0[axis] /= LAYERS_POOLED;
        let mut members: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (token, &cell) in cells.iter().enumerate() {
            let mut place = shape.voxel(cell as usize);
            place[axis] /= LAYERS_POOLED;
            members.entry(coarse.offset(place) as u32).or_default().push(token);
        }
        let pool = |features: &Vec<f16>| -> Vec<f16> {
            let channels = features.len() / cells.len();
            let of = |tokens: &Vec<usize>| {
                let value = |channel: usize| {
                    let mut values: Vec<f32> =
                        tokens.iter().map(|t| features[t * channels + channel].to_f32()).collect();
                    values.sort_unstable_by(|a, b| b.total_cmp(a));
                    values.truncate(top);
                    f16::from_f32(values.iter().sum::<f32>() / values.len() as f32)
                };
                (0..channels).map(value).collect::<Vec<f16>>()
            };
            members.values().flat_map(of).collect()
        };
        let fraction = |tokens: &Vec<usize>| {
            tokens.iter().map(|&token| self.fractions[token]).sum::<f32>() / LAYERS_POOLED as f32
        };
        Self {
            foreground: Foreground { shape: coarse, cells: members.keys().copied().collect() },
            fractions: members.values().map(fraction).collect(),
            layers: self.layers.iter().map(|(layer, features)| (*layer, pool(features))).collect(),
        }
    }
}

/// Pairs of slices in a patch.
const LAYERS_POOLED: usize = 7;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    fs::create_dir_all(&arguments.cache)?;
    let mut outcomes = Vec::new();
    for folder in &arguments.scans {
        let window = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut loaded: Option<(String, Vec<Scan>)> = None;
        let chosen = |v: &Variant| {
            arguments.only.is_empty() || arguments.only.iter().any(|text| v.name.contains(text))
        };
        for variant in variants().into_iter().filter(chosen) {
            let key = format!("{}-{window}.json", digest(&variant)?);
            let path = arguments.cache.join(key);
            if !path.exists() {
                if loaded.as_ref().is_none_or(|(encoding, _)| *encoding != variant.encoding) {
                    let encoding = Encoding::named(&variant.encoding);
                    encode(&arguments, folder, encoding)?;
                    loaded = Some((variant.encoding.clone(), load(&arguments, folder, encoding)?));
                }
                let scans = loaded.as_ref().map_or(&[][..], |(_, scans)| scans);
                let outcome = score(scans, &variant, &window)?;
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

/// The defaults, and what is changed in them, one thing at a time.
fn variants() -> Vec<Variant> {
    let base = Variant {
        name: "default".into(),
        encoding: "views".into(),
        layers: vec![9],
        views: vec![0, 1, 2],
        projection: 0,
        seed: 20_260_211,
        min_fraction: 0.3,
        smoothing: 0.4,
        reach: 1,
        keep: 0.4,
        positional_correction: 0.3,
        filter: false,
        pooled_top: None,
        z_score: false,
    };
    let joined = Variant { encoding: "joined".into(), ..base.clone() };
    let plain = Variant {
        projection: 128,
        smoothing: 0.0,
        keep: 0.3,
        positional_correction: 0.0,
        reach: 0,
        ..joined.clone()
    };
    let mut all = vec![base.clone()];
    let mut add = |from: &Variant, name: String, change: &dyn Fn(&mut Variant)| {
        let mut variant = Variant { name, ..from.clone() };
        change(&mut variant);
        all.push(variant);
    };
    for block in [6, 7, 8, 10, 11, 12] {
        add(&base, format!("stride 7, block {block}"), &|v| {
            v.encoding = "stride 7, other blocks".into();
            v.layers = vec![block];
        });
    }
    for views in [vec![0], vec![1], vec![2], vec![0, 1], vec![0, 2], vec![1, 2]] {
        add(&base, format!("views {views:?}"), &|v| v.views = views.clone());
    }
    for smoothing in [0.0, 0.2, 0.6] {
        add(&base, format!("smoothing {smoothing}"), &|v| v.smoothing = smoothing);
    }
    for keep in [0.1, 0.2, 0.3, 0.5, 0.8] {
        add(&base, format!("K {keep}"), &|v| v.keep = keep);
    }
    for share in [0.0, 0.5, 1.0] {
        add(&base, format!("place share {share}"), &|v| v.positional_correction = share);
    }
    for fraction in [0.0, 0.1, 0.5] {
        add(&base, format!("brain fraction {fraction}"), &|v| v.min_fraction = fraction);
    }
    for reach in [2, 0] {
        add(&base, format!("reach {reach}"), &|v| v.reach = reach);
    }
    add(&base, "projection 128".into(), &|v| v.projection = 128);
    add(&base, "filter".into(), &|v| v.filter = true);
    add(&base, "z-score against the other scans".into(), &|v| {
        v.positional_correction = 0.0;
        v.z_score = true;
    });
    for (top, name) in [(7, "mean"), (3, "mean of the top 3"), (1, "maximum")] {
        add(&base, format!("14 slices, {name} of 7 pairs of slices"), &|v| {
            v.encoding = "2 slices".into();
            v.pooled_top = Some(top);
        });
    }
    for encoding in ENCODINGS.iter().filter(|e| e.layers == [9] && e.name != "views") {
        add(&base, encoding.name.into(), &|v| v.encoding = encoding.name.into());
    }
    add(&joined, "views joined, 14 slices".into(), &|_| {});
    add(&joined, "views joined, 14 slices, K 0.3, scores not levelled".into(), &|v| {
        v.keep = 0.3;
        v.positional_correction = 0.0;
    });
    add(&plain, "plain: block 9 as in the paper".into(), &|_| {});
    add(&plain, "plain, reach 1".into(), &|v| v.reach = 1);
    for seed in 1..=2 {
        add(&plain, format!("plain, reach 1, projection seed {seed}"), &|v| {
            v.reach = 1;
            v.seed = seed;
        });
    }
    for layer in [3, 6, 7, 8, 10, 11, 12] {
        add(&plain, format!("plain, reach 1, block {layer}"), &|v| {
            v.reach = 1;
            v.layers = vec![layer];
        });
    }
    for layers in [vec![3, 6, 9, 12], vec![6, 9]] {
        add(&plain, format!("plain, blocks {layers:?}"), &|v| v.layers = layers.clone());
    }
    all
}

fn listed(folder: &Path) -> Result<Vec<PathBuf>> {
    let intake = Config::parse("")?.intake;
    let patterns = Patterns::new(&intake.accept, &intake.ignore)?;
    let listed = ingest::list(folder, &patterns, Links::ToFiles, || {})?;
    Ok(listed.scans.into_iter().map(|candidate| candidate.path).collect())
}

fn tokens_path(arguments: &Arguments, encoding: &Encoding, scan: &Path) -> PathBuf {
    let window = scan.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let name = format!("{}-{window}-{}.safetensors", encoding.name, stem_of(scan));
    arguments.cache.join(name)
}

/// Encodes what is not there yet.
fn encode(arguments: &Arguments, folder: &Path, encoding: &Encoding) -> Result<()> {
    let mut engine = None;
    let config = encoding.config()?;
    for path in listed(folder)? {
        let target = tokens_path(arguments, encoding, &path);
        if target.exists() {
            continue;
        }
        let engine = match &mut engine {
            Some(engine) => engine,
            empty => empty.insert(Engine::start(&config)?),
        };
        println!("encoding {} ({})", path.display(), encoding.name);
        let mask = companion_mask(&path);
        let source = read_source(&path, mask.as_deref(), &Limits::NONE)?;
        let volume = canonical(&source, &engine.method, None)?.volume;
        let grids = engine.tokeniser.tokens(&volume, |_| ControlFlow::Continue(()))?;
        save(&target, encoding, &grids, &volume)?;
    }
    Ok(())
}

/// Share of brain in each cell.
fn fractions(volume: &Volume, Foreground { shape, cells }: &Foreground) -> Vec<f32> {
    let counts = brain_per_cell(volume, *shape);
    let n_voxels = (volume.shape().n_voxels() / shape.n_voxels()) as f32;
    cells.iter().map(|&cell| counts[cell as usize] as f32 / n_voxels).collect()
}

fn save(path: &Path, encoding: &Encoding, grids: &[TokenGrid], volume: &Volume) -> Result<()> {
    let n_parts = grids.len() / encoding.layers.len();
    let fractions: Vec<Vec<f32>> =
        grids[..n_parts].iter().map(|grid| fractions(volume, grid.foreground())).collect();
    let shapes: Vec<[u32; 3]> =
        grids[..n_parts].iter().map(|grid| grid.shape().0.map(|n| n as u32)).collect();
    let mut tensors = Vec::new();
    for (index, grid) in grids.iter().enumerate() {
        let (layer, part, n) = (encoding.layers[index / n_parts], index % n_parts, grid.n_tokens());
        let features = bytemuck::cast_slice(grid.features());
        let view = TensorView::new(Dtype::F16, vec![n, grid.channels()], features)?;
        tensors.push((format!("layer.{layer}.{part}"), view));
        if index < n_parts {
            let shape = bytemuck::cast_slice(&shapes[part]);
            let cells = bytemuck::cast_slice(grid.cells());
            let shares = bytemuck::cast_slice(&fractions[part]);
            tensors.push((format!("shape.{part}"), TensorView::new(Dtype::U32, vec![3], shape)?));
            tensors.push((format!("cells.{part}"), TensorView::new(Dtype::U32, vec![n], cells)?));
            let view = TensorView::new(Dtype::F32, vec![n], shares)?;
            tensors.push((format!("fractions.{part}"), view));
        }
    }
    let partial = path.with_extension("partial");
    fs::write(&partial, safetensors::serialize(tensors, None)?)?;
    Ok(fs::rename(partial, path)?)
}

fn load(arguments: &Arguments, folder: &Path, encoding: &Encoding) -> Result<Vec<Scan>> {
    let cube = encoding.config()?.volume;
    let mut scans = Vec::new();
    for path in listed(folder)? {
        let mask = companion_mask(&path);
        let source = read_source(&path, mask.as_deref(), &Limits::NONE)?;
        let truth = match companion(&path, "lesion") {
            Some(path) => nifti::read_mask(&path, &Limits::NONE)?.inside,
            None => vec![false; source.brain.inside.len()],
        };
        let bytes = fs::read(tokens_path(arguments, encoding, &path))?;
        scans.push(Scan {
            stem: stem_of(&path),
            parts: load_parts(&bytes, encoding)?,
            placement: GridPlacement {
                cube_side: cube.side,
                cube: cube_affine(&source.brain, &cube)?,
            },
            brain: source.brain,
            truth,
        });
    }
    Ok(scans)
}

fn load_parts(bytes: &[u8], encoding: &Encoding) -> Result<Vec<Part>> {
    let tensors = SafeTensors::deserialize(bytes)?;
    let halves = |name: &str| -> Result<Vec<f16>> {
        let data = tensors.tensor(name)?.data();
        Ok(data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect())
    };
    let words = |name: &str| -> Result<Vec<u32>> {
        let data = tensors.tensor(name)?.data();
        Ok(data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    };
    let part = |part: usize| -> Result<Part> {
        let shape = words(&format!("shape.{part}"))?;
        let shape = Shape3([shape[0], shape[1], shape[2]].map(|n| n as usize));
        let fractions = words(&format!("fractions.{part}"))?.into_iter().map(f32::from_bits);
        let layer = |&layer: &usize| Ok((layer, halves(&format!("layer.{layer}.{part}"))?));
        Ok(Part {
            foreground: Foreground { shape, cells: words(&format!("cells.{part}"))? },
            fractions: fractions.collect(),
            layers: encoding.layers.iter().map(layer).collect::<Result<_>>()?,
        })
    };
    (0..encoding.config()?.tokens.n_parts()).map(part).collect()
}

/// The parts of a scan that a variant scores; of joined views some channels.
fn chosen_parts(scan: &Scan, variant: &Variant) -> Vec<usize> {
    if scan.parts.len() == 1 { vec![0] } else { variant.views.clone() }
}

/// Tokens of one part of a scan at one layer under a variant.
fn tokens(part: &Part, layer: usize, is_joined: bool, variant: &Variant) -> Result<TokenGrid> {
    let Part { foreground, fractions, layers } = part;
    let kept: Vec<usize> = (0..fractions.len())
        .filter(|&token| f64::from(fractions[token]) >= variant.min_fraction)
        .collect();
    let cells: Vec<u32> = kept.iter().map(|&token| foreground.cells[token]).collect();
    let features = &layers[&layer];
    let channels = features.len() / fractions.len();
    let (views, width) =
        if is_joined { (variant.views.as_slice(), channels / 3) } else { (&[0][..], channels) };
    let projection =
        (variant.projection > 0).then(|| Projection::new(variant.seed, width, variant.projection));
    let mut rows = Vec::new();
    for &token in &kept {
        for &view in views {
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
    let foreground = Foreground { shape: foreground.shape, cells };
    if variant.smoothing > 0.0 {
        rows = smooth(&foreground, &rows, variant.smoothing);
    }
    let channels = rows.len() / foreground.cells.len();
    let features = rows.into_iter().map(f16::from_f32).collect();
    Ok(TokenGrid::new(foreground.shape, channels, foreground.cells, features)?)
}

/// The token grids of a window: `[scan][grid]`.
struct Grids {
    scans: Vec<Vec<TokenGrid>>,
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
    fn grid(&self, scan: ScanId, grid: usize) -> &TokenGrid {
        &self.scans[usize::from(scan.0[0])][grid]
    }
}

impl WindowDistances for Grids {
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
        "[scoring]\nreach_patches = {}\nkeep_fraction = {:?}\npositional_correction = {:?}\n\
         [community]\nenabled = {}\n",
        variant.reach, variant.keep, variant.positional_correction, variant.filter
    ))?
    .scoring;
    let grids = |scan: &Scan| -> Result<Vec<TokenGrid>> {
        let mut grids = Vec::new();
        for &layer in &variant.layers {
            for part in chosen_parts(scan, variant) {
                let is_joined = scan.parts.len() == 1;
                let pooled = variant.pooled_top.map(|top| scan.parts[part].pooled(top));
                let part = pooled.as_ref().unwrap_or(&scan.parts[part]);
                grids.push(tokens(part, layer, is_joined, variant)?);
            }
        }
        Ok(grids)
    };
    let grids: Vec<Vec<TokenGrid>> = scans.iter().map(grids).collect::<Result<_>>()?;
    let member = |(index, grids): (usize, &Vec<TokenGrid>)| {
        let n_parts = grids.len() / variant.layers.len();
        ScoredMember {
            weights: Weights::OF_TOKENS_ALONE,
            id: id(index),
            parts: parts_of(grids, n_parts),
            membership: Membership::REFERENCE,
        }
    };
    let members: Vec<ScoredMember> = grids.iter().enumerate().map(member).collect();
    let mut grids = Grids { scans: grids, reach: settings.reach, columns: BTreeMap::new() };
    let mut found =
        score_members(&members, &variant.layers, &settings, &mut grids, &NoFineVolumes)?;
    if variant.z_score {
        z_scores(&mut found.scans);
    }
    for shared in &found.shared {
        let stems = shared.members.iter().map(|id| scans[usize::from(id.0[0])].stem.as_str());
        println!("shared: {:?}, {} tokens", stems.collect::<Vec<_>>(), shared.n_excluded);
    }
    figures(scans, &found.scans, settings.clean_scans, variant, window)
}

/// Scores as z-scores against those of the same cell in the other scans, moved above 0.
fn z_scores(scans: &mut [ScanScores]) {
    let mut places: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
    for scan in scans.iter() {
        for (&cell, &score) in scan.foreground.cells.iter().zip(&scan.cells) {
            places.entry(cell).or_default().push(f64::from(score));
        }
    }
    for scan in scans {
        for (cell, score) in scan.foreground.cells.iter().zip(&mut scan.cells) {
            let mut others = places[cell].clone();
            let own = others.iter().position(|other| *other == f64::from(*score));
            others.swap_remove(own.expect("it was put there"));
            let level = mean(others.iter().copied()).unwrap_or(0.0);
            let spread = mean(others.iter().map(|other| (other - level).powi(2))).unwrap_or(0.0);
            let z =
                if others.len() < 3 { 0.0 } else { (f64::from(*score) - level) / spread.sqrt() };
            *score = (z.clamp(-9.0, 90.0) + 9.0) as f32;
        }
    }
}

/// Thresholds of every scan at one stated share.
fn thresholds(scores: &[ScanScores], share: f64, clean: Fraction) -> Vec<f32> {
    let share = Fraction::new(share).expect("shares are shares");
    let profiles: Vec<MapProfile> =
        scores.iter().map(|scan| MapProfile::new(scan.cells.clone(), share)).collect();
    (0..scores.len()).map(|own| label_free_threshold(&profiles, own, clean)).collect()
}

fn figures(
    scans: &[Scan],
    scores: &[ScanScores],
    clean: Fraction,
    variant: &Variant,
    window: &str,
) -> Result<Outcome> {
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
    text + &cross_validation(outcomes)
}

/// For each source of scans with lesions: which setting is best on all others, by average
/// precision, and what it gives on this one, beside the default.
fn cross_validation(outcomes: &[Outcome]) -> String {
    let source_of = |stem: &str| stem.split('-').next().unwrap_or_default().to_owned();
    let precision = |outcome: &Outcome, is_wanted: &dyn Fn(&str) -> bool| {
        let wanted = outcome.scans.iter().filter(|(stem, _)| is_wanted(&source_of(stem)));
        mean(wanted.filter_map(|(_, figures)| figures.curve.map(|curve| curve.1)))
    };
    // Settings that every window was scored with: the mean over windows counts each alike.
    let mut by_name: BTreeMap<&str, Vec<&Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        by_name.entry(&outcome.variant.name).or_default().push(outcome);
    }
    let n_windows = by_name.values().map(Vec::len).max().unwrap_or(0);
    by_name.retain(|_, windows| windows.len() == n_windows);
    let sources: BTreeSet<String> = outcomes
        .iter()
        .flat_map(|outcome| outcome.scans.iter())
        .filter(|(_, figures)| figures.curve.is_some())
        .map(|(stem, _)| source_of(stem))
        .collect();
    let mut text = CROSS_VALIDATION.to_owned();
    for source in &sources {
        let over = |windows: &[&Outcome], is_wanted: &dyn Fn(&str) -> bool| {
            mean(windows.iter().filter_map(|outcome| precision(outcome, is_wanted)))
        };
        let elsewhere = |windows: &[&Outcome]| over(windows, &|s| s != source).unwrap_or(0.0);
        let here = |name: &str| over(&by_name[name], &|s| s == source).unwrap_or(f64::NAN);
        let best = by_name.iter().max_by(|a, b| elsewhere(a.1).total_cmp(&elsewhere(b.1)));
        let Some((best, windows)) = best.filter(|_| by_name.contains_key("default")) else {
            continue;
        };
        text += &format!(
            "| {source} | {best} | {:.3} | {:.3} | {:.3} |\n",
            elsewhere(windows),
            here(best),
            here("default")
        );
    }
    text
}

const CROSS_VALIDATION: &str = "\n## One source left out
Each source of scans with lesions is left out in turn. *Best elsewhere* is the setting with the highest mean
average precision on the other sources, where each window counts alike. The other columns give average
precision: of that setting on the others, of that setting on the source left out, and of the default there.\n
| left out | best elsewhere | there | on the source left out | default on it |
|---|---|---|---|---|
";

const REPORT: &str = "# Every setting that was tried\n
[How the defaults were chosen](defaults.md) explains what these tables show. The first row of each table is
the default. Every other row changes in it what its name says. The rows called *plain* follow the paper with
block 9: views joined, 14 slices per token, projected to 128 channels, not smoothed, K = 30 %, no positional
correction, whole volume searched.\n
- *mean*: AUROC / average precision / oracle Dice, the mean over scans with lesions.
- *pooled*: the same over all voxels of the window.
- *masks*: Dice of the mask (measured false-positive rate) at stated rates of 0.5, 1, 2 and 3 %.
- *place share*: strength of the positional correction; *not levelled*: without it.
";
