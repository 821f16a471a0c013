//! The steps before and after the encoder, with a made-up scan. Its grid is oblique, as most are;
//! `mm` is the edge of its voxels.

use oddscan::{
    nifti,
    numeric::{
        geometry::{Affine, Axis, Shape3},
        mask::{GridPlacement, score_map},
        preprocess::{CubeSettings, brain_mask, canonicalise, cube_affine},
        projection::Normal,
        slice::slice_pixels,
        token::{TokenBuilder, TokenSettings, foreground_cells},
        volume::{RawMask, RawVolume, Volume},
    },
    report::picture::{self, PictureInput},
};

const CUBE: CubeSettings = CubeSettings { side: 224, field_of_view_mm: 176.0, min_brain_ml: 200.0 };

/// Makes the canonical cube of a scan.
pub fn canonical(mm: f64) -> impl FnMut() {
    let (scan, brain) = scan(mm);
    move || drop(std::hint::black_box(canonicalise(&scan, &brain, &CUBE, None, None)))
}

/// Cuts all slices that `balanced` encodes, group by group.
pub fn slices() -> impl FnMut() {
    let cube = cube();
    let mut pixels = vec![0.0; 4 * CUBE.side * CUBE.side];
    move || {
        for axis in Axis::VIEWS {
            for first in (0..CUBE.side).step_by(7) {
                let indices = [0, 2, 4, 6].map(|slice| first + slice);
                slice_pixels(&cube, axis, &indices, &mut pixels);
                std::hint::black_box(&pixels);
            }
        }
    }
}

/// Makes tokens of the features of all slices, three views of `channels` each.
pub fn tokens(channels: usize) -> impl FnMut() {
    let cube = cube();
    let settings = TokenSettings {
        views: Axis::VIEWS.to_vec(),
        join_views: false,
        slices_per_token: 7,
        slice_stride: 2,
        skip_background: true,
        min_brain_fraction: 0.3,
        smoothing_patches: 0.4,
    };
    let mut normal = Normal::new(8);
    let values: Vec<f32> = (0..256 * channels).map(|_| normal.next() as f32).collect();
    move || {
        let mut builder = TokenBuilder::new(&cube, 14, channels, 1, None, &settings);
        for group in builder.due_groups() {
            let patches = builder.patches(group);
            builder.add(group, 0, &patches, &values[..patches.len() * channels]);
        }
        drop(std::hint::black_box(builder.finish()));
    }
}

/// Makes the map of a scan from the scores of cells.
pub fn map(mm: f64) -> impl FnMut() {
    let (_, brain) = scan(mm);
    let map = scores();
    move || drop(std::hint::black_box(map(&brain)))
}

/// Packs a map into the bytes of its file.
pub fn packed_map(mm: f64) -> impl FnMut() {
    let (scan, brain) = scan(mm);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("scan.nii.gz");
    std::fs::write(&path, nifti::encode_volume(&scan)).expect("it is written");
    let grid = nifti::read_scan(&path, &nifti::Limits::NONE).expect("it is read").grid;
    let map = scores()(&brain);
    move || drop(std::hint::black_box(nifti::encode_map(&grid, &map)))
}

/// Draws the picture of a result.
pub fn picture(mm: f64) -> impl FnMut() {
    let (scan, brain) = scan(mm);
    let map = scores()(&brain);
    let mask: Vec<bool> = map.iter().map(|&value| value > 1.0).collect();
    move || {
        let input = PictureInput {
            scale: "anomaly score",
            scan: &scan,
            brain: &brain,
            map: &map,
            mask: &mask,
            threshold: 1.0,
            focus: Some([0.0; 3]),
            top: 1.2,
            title: "title",
            summary: "summary",
            quality: "quality",
        };
        drop(std::hint::black_box(picture::render(&input)));
    }
}

fn cube() -> Volume {
    let (scan, brain) = scan(2.0);
    canonicalise(&scan, &brain, &CUBE, None, None).expect("a brain").volume
}

/// Spreads random scores over a scan.
fn scores() -> impl Fn(&RawMask) -> Vec<f32> {
    let cells = foreground_cells(&cube(), [7; 3], 0.3);
    let mut normal = Normal::new(7);
    let scores: Vec<f32> = cells.cells.iter().map(|_| 0.7 + 0.1 * normal.next() as f32).collect();
    let (_, brain) = scan(2.0);
    let cube = cube_affine(&brain, &CUBE).expect("a brain");
    let placement = GridPlacement { cube_side: CUBE.side, cube };
    move |brain| score_map(&cells, &scores, &placement, brain)
}

/// An ellipsoid of noise, 1.4 l, in voxels of `mm`: 8 million of 1 mm.
fn scan(mm: f64) -> (RawVolume, RawMask) {
    let shape = Shape3([192.0, 240.0, 176.0].map(|edge| (edge / mm) as usize));
    let radii = [64.0, 82.0, 64.0];
    let axes = [[0.99, 0.05, -0.1], [-0.06, 0.99, 0.1], [0.1, -0.1, 0.99]];
    let row = |[x, y, z]: [f64; 3], origin| [x * mm, y * mm, z * mm, origin];
    let rows = [row(axes[0], -90.0), row(axes[1], -119.0), row(axes[2], -80.0)];
    let affine = Affine::new(rows).expect("axes that span space");
    let mut normal = Normal::new(6);
    let voxel = |offset: usize| {
        let voxel = shape.voxel(offset);
        let apart = |axis: usize| mm * (voxel[axis] as f64 - shape.0[axis] as f64 / 2.0);
        let is_inside = (0..3).map(|axis| (apart(axis) / radii[axis]).powi(2)).sum::<f64>() < 1.0;
        if is_inside { (100.0 + 10.0 * normal.next()) as f32 } else { 0.0 }
    };
    let voxels = (0..shape.n_voxels()).map(voxel).collect();
    let scan = RawVolume { shape, voxels, affine };
    let brain = brain_mask(&scan, None).expect("background around it");
    (scan, brain)
}
