//! Golden values for the tests of both engines: those of `make_goldens.py`, and those of the real
//! network where the shared folder is there.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use oddscan::{
    domain::weights::VitWeights,
    numeric::{
        geometry::{Affine, Axis, Shape3},
        scoring::SearchReach,
        token::{TokenGrid, TokenSettings},
        volume::RawVolume,
    },
};
use safetensors::SafeTensors;

/// Voxels of each golden scan.
pub const SHAPE: Shape3 = Shape3([22, 26, 20]);
/// Voxels along each edge of the cube.
pub const CUBE_SIDE: usize = 24;
/// Patches along each edge of the cube.
pub const SIDE: usize = 4;
/// Voxels along each edge of a patch.
pub const PATCH: usize = 6;
/// Encoder blocks that are scored.
pub const LAYERS: [usize; 2] = [2, 3];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/reference").join(name)
}

/// The tiny network.
pub fn weights() -> VitWeights {
    oddscan::model::load_weights(&fixture("weights.safetensors")).unwrap()
}

/// A file of the shared folder (`ODDSCAN_SHARED`, else beside the repository), or `None` and a line
/// that says why the test skips.
pub fn shared(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("ODDSCAN_SHARED").map(PathBuf::from);
    let folder =
        folder.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let path = folder.join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is absent; ODDSCAN_SHARED names the folder", path.display());
    None
}

/// The smallest cosine between tokens of the same place; rows of `channels`.
pub fn worst_cosine(found: &[f32], expected: &[f32], channels: usize) -> f64 {
    assert_eq!(found.len(), expected.len());
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let cosine = |(a, b): (&[f32], &[f32])| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    found.chunks(channels).zip(expected.chunks(channels)).map(cosine).fold(1.0, f64::min)
}

/// A safetensors file of f32 tensors.
pub struct Goldens(Vec<u8>);

impl Goldens {
    /// The values of `make_goldens.py`.
    pub fn load() -> Self {
        Self::open(&fixture("goldens.safetensors"))
    }

    pub fn open(path: &Path) -> Self {
        Self(std::fs::read(path).unwrap())
    }

    /// Values of a tensor, row-major.
    pub fn values(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let numbers = tensor.data().chunks_exact(4);
        numbers.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    pub fn scan(&self, number: usize) -> RawVolume {
        let rows = self.values(&format!("scan{number}.affine"));
        let row = |row: usize| std::array::from_fn(|column| f64::from(rows[4 * row + column]));
        RawVolume {
            shape: SHAPE,
            voxels: self.values(&format!("scan{number}.voxels")),
            affine: Affine::new([row(0), row(1), row(2)]).unwrap(),
        }
    }

    /// One grid of tokens of a scan at one layer.
    pub fn tokens(&self, case: &Case, scan: usize, layer: usize, part: usize) -> TokenGrid {
        let name = case.name;
        let values = self.values(&format!("{name}.scan{scan}.tokens.{layer}.{part}"));
        let cells = self.values(&format!("{name}.scan{scan}.cells.{part}"));
        let cells = cells.into_iter().map(|cell| cell as u32).collect();
        let features = values.into_iter().map(half::f16::from_f32).collect();
        TokenGrid::new(case.shape(part), case.channels, cells, features).unwrap()
    }
}

/// A set of settings that `make_goldens.py` computes everything for.
pub struct Case {
    /// Prefix of its tensors.
    pub name: &'static str,
    pub tokens: TokenSettings,
    pub projected: bool,
    /// Channels of a token.
    pub channels: usize,
    pub reach: SearchReach,
    pub keep_fraction: f64,
    pub positional_correction: f64,
}

impl Case {
    /// Cells along each axis.
    pub fn shape(&self, part: usize) -> Shape3 {
        let mut shape = [SIDE; 3];
        if !self.tokens.join_views {
            shape[self.tokens.views[part].index()] *= PATCH / self.tokens.slices_per_token;
        }
        Shape3(shape)
    }
}

/// The paper's settings and the defaults.
pub fn cases() -> [Case; 2] {
    let tokens = TokenSettings {
        views: vec![Axis::Axial, Axis::Coronal, Axis::Sagittal],
        join_views: true,
        slices_per_token: PATCH,
        slice_stride: 1,
        skip_background: false,
        min_brain_fraction: 0.3,
        smoothing_patches: 0.0,
    };
    let default_tokens = TokenSettings {
        join_views: false,
        slices_per_token: 3,
        skip_background: true,
        smoothing_patches: 0.4,
        ..tokens.clone()
    };
    let paper = Case {
        name: "paper",
        tokens,
        projected: true,
        channels: 24,
        reach: SearchReach::WholeVolume,
        keep_fraction: 0.3,
        positional_correction: 0.0,
    };
    let default = Case {
        name: "default",
        tokens: default_tokens,
        projected: false,
        channels: 32,
        reach: SearchReach::Patches(NonZeroUsize::MIN),
        keep_fraction: 0.4,
        positional_correction: 0.3,
    };
    [paper, default]
}

/// Every value within `tolerance`, relative above 1 and absolute below.
pub fn assert_close(found: &[f32], golden: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), golden.len(), "{what}");
    let error = |(found, golden): (&f32, &f32)| {
        // Both infinite: no candidate in reach.
        if found == golden { 0.0 } else { (found - golden).abs() / golden.abs().max(1.0) }
    };
    let worst = found.iter().zip(golden).map(error).fold(0.0, f32::max);
    println!("{what}: worst error {worst:.1e} of {} values", found.len());
    assert!(worst <= tolerance, "{what}: {worst:e}");
}
