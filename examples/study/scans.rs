//! Scans with their tokens and intensities, which are made once and kept in the cache.

use std::{
    collections::BTreeMap,
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use half::f16;
use oddscan::{
    companions::{companion, companion_mask, stem_of},
    config::Config,
    engine::Engine,
    ingest::{self, Links, Patterns},
    nifti::{self, Limits},
    numeric::{
        fine::FineVolume,
        geometry::Shape3,
        mask::GridPlacement,
        preprocess::{Canonical, cube_affine},
        token::{Foreground, TokenGrid, brain_per_cell},
        volume::{RawMask, RawVolume, Volume},
    },
    prepare::{canonical, read_source},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::{Result, encodings::Encoding};

/// One scan with everything that scoring needs.
pub(crate) struct Scan {
    pub(crate) stem: String,
    pub(crate) raw: RawVolume,
    pub(crate) parts: Vec<Part>,
    /// Its intensities, of encodings that keep them.
    pub(crate) fine: Option<FineVolume>,
    pub(crate) placement: GridPlacement,
    pub(crate) brain: RawMask,
    pub(crate) truth: Vec<bool>,
}

/// The tokens of one view, or of all joined, at all cells with any brain.
pub(crate) struct Part {
    pub(crate) foreground: Foreground,
    /// Share of brain in each cell.
    pub(crate) fractions: Vec<f32>,
    /// By encoder block.
    pub(crate) layers: BTreeMap<usize, Vec<f16>>,
}

impl Part {
    /// Seven layers of a view at a time as one: per channel the mean of the `top` largest values.
    pub(crate) fn pooled(&self, top: usize) -> Self {
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

fn listed(folder: &Path) -> Result<Vec<PathBuf>> {
    let intake = Config::parse("")?.intake;
    let patterns = Patterns::new(&intake.accept, &intake.ignore)?;
    let listed = ingest::list(folder, &patterns, Links::ToFiles, || {})?;
    Ok(listed.scans.into_iter().map(|candidate| candidate.path).collect())
}

/// Where something of a scan is kept.
fn kept(cache: &Path, encoding: &Encoding, scan: &Path, what: &str) -> PathBuf {
    let window = scan.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    cache.join(format!("{}-{window}-{}{what}.safetensors", encoding.name, stem_of(scan)))
}

const TOKENS: &str = "";
const INTENSITIES: &str = "-intensities";

/// Encodes what is not there yet.
pub(crate) fn encode(cache: &Path, folder: &Path, encoding: &Encoding) -> Result<()> {
    let mut engine = None;
    let config = encoding.config()?;
    for path in listed(folder)? {
        let [tokens, fine] = [TOKENS, INTENSITIES].map(|what| kept(cache, encoding, &path, what));
        let needs_fine = encoding.has_intensities() && !fine.exists();
        if tokens.exists() && !needs_fine {
            continue;
        }
        let engine = match &mut engine {
            Some(engine) => engine,
            empty => empty.insert(Engine::start(&config)?),
        };

        println!("encoding {} ({})", path.display(), encoding.name);
        let mask = companion_mask(&path);
        let source = read_source(&path, mask.as_deref(), &Limits::NONE)?;
        let Canonical { volume, fine: own, .. } = canonical(&source, &engine.method, None)?;
        if needs_fine {
            save_fine(&fine, &own)?;
        }
        if !tokens.exists() {
            let grids = engine.tokeniser.tokens(&volume, |_| ControlFlow::Continue(()))?;
            save(&tokens, encoding, &grids, &volume)?;
        }
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
    write(path, tensors)
}

fn save_fine(path: &Path, fine: &FineVolume) -> Result<()> {
    let FineVolume { foreground: Foreground { shape, cells }, values, depths, cell_mm } = fine;
    let (shape, n) = (shape.0.map(|n| n as u32), cells.len());
    let edge = [*cell_mm];
    let tensors: [(&str, Dtype, usize, &[u8]); 5] = [
        ("shape", Dtype::U32, 3, bytemuck::cast_slice(&shape)),
        ("cells", Dtype::U32, n, bytemuck::cast_slice(cells)),
        ("values", Dtype::F16, n, bytemuck::cast_slice(values)),
        ("depths", Dtype::U8, n, &depths[..]),
        ("cell_mm", Dtype::F64, 1, bytemuck::cast_slice(&edge)),
    ];
    let tensors = tensors.into_iter().map(|(name, dtype, n, bytes)| {
        Ok((name.to_owned(), TensorView::new(dtype, vec![n], bytes)?))
    });
    write(path, tensors.collect::<Result<_>>()?)
}

/// Writes a file that appears whole.
fn write(path: &Path, tensors: Vec<(String, TensorView<'_>)>) -> Result<()> {
    let partial = path.with_extension("partial");
    fs::write(&partial, safetensors::serialize(tensors, None)?)?;
    Ok(fs::rename(partial, path)?)
}

pub(crate) fn load(cache: &Path, folder: &Path, encoding: &Encoding) -> Result<Vec<Scan>> {
    let cube = encoding.config()?.volume;
    let mut scans = Vec::new();
    for path in listed(folder)? {
        let mask = companion_mask(&path);
        let source = read_source(&path, mask.as_deref(), &Limits::NONE)?;
        let truth = match companion(&path, "lesion") {
            Some(path) => nifti::read_mask(&path, &Limits::NONE)?.inside,
            None => vec![false; source.brain.inside.len()],
        };
        let bytes = fs::read(kept(cache, encoding, &path, TOKENS))?;
        let fine = encoding.has_intensities().then(|| kept(cache, encoding, &path, INTENSITIES));
        scans.push(Scan {
            stem: stem_of(&path),
            raw: source.raw,
            parts: load_parts(&bytes, encoding)?,
            fine: fine.map(|path| load_fine(&path)).transpose()?,
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
    let kept = Kept(SafeTensors::deserialize(bytes)?);
    let part = |part: usize| -> Result<Part> {
        let fractions = kept.words(&format!("fractions.{part}"))?.into_iter().map(f32::from_bits);
        let layer = |&layer: &usize| Ok((layer, kept.halves(&format!("layer.{layer}.{part}"))?));
        Ok(Part {
            foreground: Foreground {
                shape: kept.shape(&format!("shape.{part}"))?,
                cells: kept.words(&format!("cells.{part}"))?,
            },
            fractions: fractions.collect(),
            layers: encoding.layers.iter().map(layer).collect::<Result<_>>()?,
        })
    };
    (0..encoding.config()?.tokens.n_parts()).map(part).collect()
}

fn load_fine(path: &Path) -> Result<FineVolume> {
    let bytes = fs::read(path)?;
    let kept = Kept(SafeTensors::deserialize(&bytes)?);
    let edge: [u8; 8] = kept.bytes("cell_mm")?.try_into()?;
    Ok(FineVolume {
        foreground: Foreground { shape: kept.shape("shape")?, cells: kept.words("cells")? },
        values: kept.halves("values")?,
        depths: kept.bytes("depths")?.to_vec(),
        cell_mm: f64::from_le_bytes(edge),
    })
}

/// The tensors of a file.
struct Kept<'a>(SafeTensors<'a>);

impl<'a> Kept<'a> {
    fn bytes(&self, name: &str) -> Result<&'a [u8]> {
        Ok(self.0.tensor(name)?.data())
    }

    fn halves(&self, name: &str) -> Result<Vec<f16>> {
        let data = self.bytes(name)?;
        Ok(data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect())
    }

    fn words(&self, name: &str) -> Result<Vec<u32>> {
        let data = self.bytes(name)?;
        Ok(data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    fn shape(&self, name: &str) -> Result<Shape3> {
        let extents: [u32; 3] = self.words(name)?[..].try_into()?;
        Ok(Shape3(extents.map(|n| n as usize)))
    }
}
