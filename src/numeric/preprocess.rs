//! Turns a scan on its own grid into the canonical cube that the encoder slices (method, section
//! 1).
//!
//! Ours where the paper does not say: the cube is centred on the box around the brain, or around
//! the template's brain if the scan was aligned. Intensities are divided by a high percentile
//! inside the brain, or mapped to landmarks ([`intensity`]).

use std::ops::Range;

use rayon::prelude::*;
use thiserror::Error;

use super::{
    background,
    fine::FineVolume,
    geometry::{Affine, AffineError, Shape3, WorldPoint},
    intensity::{self, Landmarks, Scale},
    volume::{RawMask, RawVolume, Volume, interpolate},
};

/// The cube that every scan is resampled to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CubeSettings {
    /// Voxels along each edge.
    pub side: usize,
    /// Length of each edge, mm. 176 keeps 99.9 % of an MNI-sized brain; the paper's 156 cuts 2.7 %.
    pub field_of_view_mm: f64,
    /// Smallest mask that counts as a brain, ml.
    pub min_brain_ml: f64,
}

/// A canonical volume and facts about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Canonical {
    /// Intensities and brain in the cube.
    pub volume: Volume,
    /// Volume of the brain mask, ml.
    pub brain_ml: f64,
    /// Share of the brain outside the cube, in [0, 1].
    pub cut_fraction: f64,
    /// The intensities on a finer grid than that of tokens, as the scanner gave them.
    pub fine: FineVolume,
    /// Whether its intensities were mapped to landmarks. Not if there are none for it, or if it has
    /// too few distinct values.
    pub is_standardised: bool,
}

/// Why a scan has no canonical volume.
#[derive(Debug, Error, PartialEq)]
pub enum PreprocessError {
    /// Nearly every voxel is above zero: the skull was not stripped.
    #[error("{:.0} % of the voxels are above zero", 100.0 * .nonzero)]
    NoBackground {
        /// Share of voxels above zero.
        nonzero: f64,
    },
    /// The image ends at the end of its grid, as a head does that the field of view cuts.
    #[error("the image meets the end of its grid over {found_cm2:.0} cm^2")]
    MeetsEdge {
        /// Largest area of the image at one face of the grid, cm^2.
        found_cm2: f64,
    },
    /// Tissue has intensities below 0, and no background value tells it apart.
    #[error(
        "{:.0} % of the voxels are below zero, and no single value fills the background",
        100.0 * .below
    )]
    BelowZero {
        /// Share of the voxels, in the brain if that is known, that are below 0.
        below: f64,
    },
    /// The mask is too small for a brain.
    #[error("the brain mask holds {found_ml:.1} ml")]
    TooSmall {
        /// Volume of the mask, ml.
        found_ml: f64,
        /// Smallest volume taken for a brain, ml.
        needed_ml: f64,
    },
    /// The mask is too large for a brain.
    #[error("the brain mask holds {found_ml:.1} ml")]
    TooLarge {
        /// Volume of the mask, ml.
        found_ml: f64,
    },
    /// The mask is scattered wider than a brain.
    #[error(
        "{:.0} % of the brain mask lies within {field_of_view_mm} mm around its middle",
        100.0 * .inside
    )]
    Scattered {
        /// Share of the mask within the cube.
        inside: f64,
        /// Length of each edge of the cube, mm.
        field_of_view_mm: f64,
    },
    /// All voxels of the brain are equal or none is positive.
    #[error("the brain holds no contrast: all its voxels lie between {low} and {high}")]
    Constant {
        /// Lowest intensity.
        low: f32,
        /// Highest intensity.
        high: f32,
    },
    /// No cube can be built around the brain.
    #[error(transparent)]
    Geometry(#[from] AffineError),
}

/// With a larger share of voxels above zero, a scan is assumed to still have its skull and
/// background.
const MAX_NONZERO_SHARE: f64 = 0.9;

/// Largest brain, ml. Adults have 900 to 1900, and the heaviest brains ever described are below 3
/// kg. A larger mask is a head with its skull, or has a wrong unit of length.
pub const MAX_BRAIN_ML: f64 = 3000.0;

/// Largest brain of a skull-stripped scan, ml. Measured in MNI space, where brains are larger than
/// in the scanner: at most 2294. Heads before a background of 0 that lie within their grid have at
/// least 2851.
const MAX_STRIPPED_ML: f64 = 2600.0;

/// Largest area of a skull-stripped brain at one face of its grid, cm^2. Measured: 9.4 where the
/// MNI grid cuts the brain stem. Heads that the field of view cuts have at least 22.
pub const MAX_STRIPPED_CUT_CM2: f64 = 15.0;

/// Share of the brain that must be within the cube. The smallest sensible field of view cuts a few
/// percent of a brain; two bottles at the ends of the coil are completely outside.
pub const MIN_SHARE_IN_CUBE: f64 = 0.5;

/// Percentile of the brain's intensities that becomes 1. Not the maximum: a single bright vessel
/// would darken the whole brain.
pub const WHITE_PERCENTILE: f64 = 99.8;

/// The brain on the scan's own grid: `mask` resampled to that grid if there is one, else all voxels
/// above zero. On a skull-stripped scan these are the brain. If much of the tissue is below zero,
/// it is all that differs from the background ([`background::tissue`]).
///
/// # Errors
/// If there is no background, or if tissue below zero cannot be told from it.
pub fn brain_mask(raw: &RawVolume, mask: Option<&RawMask>) -> Result<RawMask, PreprocessError> {
    if let Some(mask) = mask {
        return Ok(onto_grid_of(raw, mask));
    }
    let inside = background::tissue(raw);
    let nonzero = share(&inside);
    if nonzero > MAX_NONZERO_SHARE {
        return Err(PreprocessError::NoBackground { nonzero });
    }

    let brain = RawMask { shape: raw.shape, inside, affine: raw.affine };
    // Air around a head can be below 0. Such a scan is judged when its brain has been found.
    match background::share_unexplained(raw, None) {
        Some(below) if !shows_head(&brain) => Err(PreprocessError::BelowZero { below }),
        _ => Ok(brain),
    }
}

/// Whether a mask of all tissue is that of a head, or of a part of it, and not of a brain alone: it
/// is too large, or it meets the end of the grid over too large an area.
pub fn shows_head(tissue: &RawMask) -> bool {
    volume_ml(tissue) > MAX_STRIPPED_ML || widest_cut_cm2(tissue) > MAX_STRIPPED_CUT_CM2
}

/// Largest area of a mask at one face of its grid, cm^2.
pub fn widest_cut_cm2(mask: &RawMask) -> f64 {
    let [x, y, z] = mask.affine.spacing_mm();
    let pixels_mm2 = [y * z, x * z, x * y];
    let faces = mask.n_at_faces().into_iter().zip(pixels_mm2);
    let widest_cm2 = faces.map(|(n, pixel_mm2)| n[0].max(n[1]) as f64 * pixel_mm2 / 100.0);
    widest_cm2.fold(0.0, f64::max)
}

fn volume_ml(mask: &RawMask) -> f64 {
    share(&mask.inside) * mask.shape.n_voxels() as f64 * mask.affine.voxel_volume_mm3() / 1000.0
}

/// The mask sampled at the scan's voxel centres (nearest neighbour, outside = false).
fn onto_grid_of(raw: &RawVolume, mask: &RawMask) -> RawMask {
    if mask.shape == raw.shape && mask.affine == raw.affine {
        return mask.clone();
    }
    let to_mask = mask.affine.inverse().after(&raw.affine);
    let inside = mask.onto(raw.shape, &to_mask);
    RawMask { shape: raw.shape, inside, affine: raw.affine }
}

/// Resamples scan and brain to the cube and scales the intensities to [0, 1].
///
/// `brain` is on the scan's grid. `aligned` is the cube of an aligned scan
/// ([`aligned_cube_affine`]); without it the cube is centred on the brain ([`cube_affine`]).
/// Intensities are trilinear and 0 beyond the grid; the brain is nearest neighbour. Zero stays
/// zero. The 99.8th percentile of the brain becomes 1; with `landmarks`, the brain's percentiles
/// are mapped to these instead. Values above 1 are clipped.
pub fn canonicalise(
    raw: &RawVolume,
    brain: &RawMask,
    settings: &CubeSettings,
    aligned: Option<&Affine>,
    landmarks: Option<&Landmarks>,
) -> Result<Canonical, PreprocessError> {
    let brain_ml = volume_ml(brain);
    if brain_ml < settings.min_brain_ml || brain_ml == 0.0 {
        let needed_ml = settings.min_brain_ml;
        return Err(PreprocessError::TooSmall { found_ml: brain_ml, needed_ml });
    }
    if brain_ml > MAX_BRAIN_ML {
        return Err(PreprocessError::TooLarge { found_ml: brain_ml });
    }

    let white = white_level(raw, brain)?;
    let cube = aligned.map_or_else(|| cube_affine(brain, settings), |cube| Ok(*cube))?;
    let cut_fraction = cut_fraction(brain, &cube, settings.side);
    if 1.0 - cut_fraction < MIN_SHARE_IN_CUBE {
        let field_of_view_mm = settings.field_of_view_mm;
        return Err(PreprocessError::Scattered { inside: 1.0 - cut_fraction, field_of_view_mm });
    }

    let standard = landmarks.and_then(|landmarks| {
        let own = intensity::of_scan(raw, brain, landmarks.percentiles());
        Scale::standard(&own, landmarks)
    });
    let is_standardised = standard.is_some();
    let scale = standard.unwrap_or(Scale::Plain { white });

    let side = settings.side;
    let Resampled { intensities, voxels, inside } = resample(raw, brain, &cube, side, &scale);
    let spacing_mm = settings.field_of_view_mm / side as f64;
    let beyond = beyond_grid(brain, &cube, side);
    let fine = FineVolume::of(&intensities, &inside, beyond.as_deref(), side, spacing_mm);
    let volume = Volume { side, voxels, brain: inside, beyond, affine: cube };
    Ok(Canonical { volume, fine, brain_ml, cut_fraction, is_standardised })
}

fn share(inside: &[bool]) -> f64 {
    inside.iter().filter(|&&i| i).count() as f64 / inside.len().max(1) as f64
}

/// The intensity that becomes 1: a percentile with linear interpolation between the two voxels
/// around it. Finite and above 0, so that no voxel divided by it becomes NaN.
pub fn white_level(raw: &RawVolume, brain: &RawMask) -> Result<f64, PreprocessError> {
    let mut values = brain.values(&raw.voxels);
    let position = (values.len() - 1) as f64 * WHITE_PERCENTILE / 100.0;
    let (below, at, above) =
        values.select_nth_unstable_by(position.floor() as usize, f32::total_cmp);
    let next = above.iter().copied().min_by(f32::total_cmp).unwrap_or(*at);
    // In f64: the difference of two f32 may not fit f32.
    let white = f64::from(*at) + position.fract() * (f64::from(next) - f64::from(*at));

    let low = below.iter().copied().min_by(f32::total_cmp).unwrap_or(*at).min(*at);
    let high = above.iter().copied().max_by(f32::total_cmp).unwrap_or(*at);
    if low == high || !white.is_finite() || white <= 0.0 {
        return Err(PreprocessError::Constant { low, high });
    }
    Ok(white)
}

/// Cube voxel -> world mm for the cube around this brain. Its axes are the world's; its centre is
/// that of the box around the brain's voxel centres.
pub fn cube_affine(brain: &RawMask, settings: &CubeSettings) -> Result<Affine, AffineError> {
    let [low, high] = brain.world_box();
    let spacing = settings.field_of_view_mm / settings.side as f64;
    let half = 0.5 * (settings.side as f64 - 1.0) * spacing;
    Affine::scaling(spacing, WorldPoint([0, 1, 2].map(|a| 0.5 * (low[a] + high[a]) - half)))
}

/// Cube voxel -> world mm of an aligned scan: the cube around the template's brain. `to_scan` maps
/// the template's world to the scan's.
pub fn aligned_cube_affine(
    template: &RawMask,
    to_scan: &Affine,
    settings: &CubeSettings,
) -> Result<Affine, AffineError> {
    Ok(to_scan.after(&cube_affine(template, settings)?))
}

/// The voxels of the cube that lie beyond a face of the scan's grid at which there is brain. There,
/// nobody knows how the brain goes on. `None` if the brain lies within the grid.
fn beyond_grid(brain: &RawMask, cube: &Affine, side: usize) -> Option<Vec<bool>> {
    let is_cut = brain.n_at_faces().map(|ends| ends.map(|n| n > 0));
    if is_cut == [[false; 2]; 3] {
        return None;
    }

    let to_raw = brain.affine.inverse().after(cube);
    let shape = Shape3::cube(side);
    let is_beyond = |offset: usize| {
        let place = to_raw.apply(shape.voxel(offset).map(|v| v as f64));
        (0..3).any(|axis| {
            let end = brain.shape.0[axis] as f64 - 0.5;
            is_cut[axis][0] && place[axis] < -0.5 || is_cut[axis][1] && place[axis] > end
        })
    };
    Some((0..shape.n_voxels()).into_par_iter().map(is_beyond).collect())
}

fn cut_fraction(brain: &RawMask, cube: &Affine, side: usize) -> f64 {
    let to_cube = cube.inverse().after(&brain.affine);
    let is_cut = |offset: usize| {
        let place = to_cube.apply(brain.shape.voxel(offset).map(|v| v as f64));
        place.iter().any(|p| !(-0.5 - 1e-9..=side as f64 - 0.5 + 1e-9).contains(p))
    };
    let n_inside = |span: Range<usize>| brain.inside[span].iter().filter(|&&i| i).count();

    let (mut all, mut cut) = (0, 0);
    for span in brain.spans() {
        all += n_inside(span.clone());
        // The places between two places within the cube are within it, too.
        if is_cut(span.start) || is_cut(span.end - 1) {
            cut += span.filter(|&offset| brain.inside[offset] && is_cut(offset)).count();
        }
    }

    cut as f64 / all.max(1) as f64
}

/// A scan in the cube, voxel by voxel.
struct Resampled {
    /// As the scanner gave them; 0 outside the brain.
    intensities: Vec<f32>,
    /// Scaled to [0, 1].
    voxels: Vec<f32>,
    inside: Vec<bool>,
}

fn resample(
    raw: &RawVolume,
    brain: &RawMask,
    cube: &Affine,
    side: usize,
    scale: &Scale,
) -> Resampled {
    let to_raw = raw.affine.inverse().after(cube);
    let around = brain.voxel_box();
    let shape = Shape3::cube(side);

    let mut intensities = vec![0.0; shape.n_voxels()];
    let mut voxels = vec![0.0; shape.n_voxels()];
    let mut inside = vec![false; shape.n_voxels()];
    let rows = intensities.par_chunks_mut(side).zip(voxels.par_chunks_mut(side));
    let rows = rows.zip(inside.par_chunks_mut(side));
    rows.enumerate().for_each(|(row, ((intensities, voxels), inside))| {
        let (y, z) = ((row % side) as f64, (row / side) as f64);
        for x in to_raw.row_within(y, z, around, side) {
            let place = to_raw.apply([x as f64, y, z]);
            if brain.at(place) {
                inside[x] = true;
                let intensity = trilinear(raw, place);
                intensities[x] = intensity as f32;
                voxels[x] = scale.value(intensity) as f32;
            }
        }
    });

    Resampled { intensities, voxels, inside }
}

/// The intensity between voxel centres; places beyond the grid count as 0.
#[inline(always)]
pub(super) fn trilinear(raw: &RawVolume, place: [f64; 3]) -> f64 {
    let is_within =
        |axis: usize| place[axis] >= 0.0 && place[axis] < (raw.shape.0[axis] - 1) as f64;
    if (0..3).all(is_within) {
        interpolate(&raw.voxels, raw.shape, place)
    } else {
        trilinear_at_rim(raw, place)
    }
}

/// The same where some of the eight voxels around the place may be missing.
#[cold]
fn trilinear_at_rim(raw: &RawVolume, place: [f64; 3]) -> f64 {
    let floor = place.map(f64::floor);
    let mut sum = 0.0;

    for corner in 0..8_usize {
        let mut weight = 1.0;
        let mut voxel = [0; 3];
        let mut on_grid = true;
        for axis in 0..3 {
            let step = (corner >> axis) & 1;
            let fraction = place[axis] - floor[axis];
            weight *= if step == 1 { fraction } else { 1.0 - fraction };
            let index = floor[axis] + step as f64;
            on_grid &= index >= 0.0 && index < raw.shape.0[axis] as f64;
            voxel[axis] = index.max(0.0) as usize;
        }

        if on_grid && weight > 0.0 {
            sum += weight * f64::from(raw.voxels[raw.shape.offset(voxel)]);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::token::{Foreground, foreground_cells, n_cut_cells};

    const SETTINGS: CubeSettings =
        CubeSettings { side: 28, field_of_view_mm: 28.0, min_brain_ml: 0.01 };

    /// A box of brain in a `[20, 24, 22]` grid whose intensity rises along the patient's x axis.
    fn box_scan(affine: Affine) -> RawVolume {
        let shape = Shape3([20, 24, 22]);
        let voxels = (0..shape.n_voxels())
            .map(|offset| {
                let v = shape.voxel(offset);
                let inside =
                    (4..16).contains(&v[0]) && (5..19).contains(&v[1]) && (6..15).contains(&v[2]);
                let world = affine.apply(v.map(|i| i as f64));
                if inside { (100.0 + world[0]) as f32 } else { 0.0 }
            })
            .collect();
        RawVolume { shape, voxels, affine }
    }

    fn identity() -> Affine {
        Affine::scaling(1.0, WorldPoint([-10.0, -12.0, -11.0])).unwrap()
    }

    fn canonical(raw: &RawVolume) -> Canonical {
        canonicalise(raw, &brain_mask(raw, None).unwrap(), &SETTINGS, None, None).unwrap()
    }

    #[test]
    fn a_left_handed_grid_gives_the_same_cube_as_a_right_handed_one() {
        let right = box_scan(identity());
        // The same voxels in the world, listed from right to left.
        let mut left = right.clone();
        for offset in 0..right.shape.n_voxels() {
            let [x, y, z] = right.shape.voxel(offset);
            left.voxels[right.shape.offset([19 - x, y, z])] = right.voxels[offset];
        }
        let rows = [[-1.0, 0.0, 0.0, 9.0], [0.0, 1.0, 0.0, -12.0], [0.0, 0.0, 1.0, -11.0]];
        left.affine = Affine::new(rows).unwrap();
        assert_eq!(canonical(&right).volume, canonical(&left).volume);
    }

    #[test]
    fn every_voxel_is_in_range_and_zero_outside_the_brain() {
        let volume = canonical(&box_scan(identity())).volume;
        assert!(volume.voxels().iter().all(|v| (0.0..=1.0).contains(v)));
        let outside = volume.voxels().iter().zip(volume.brain()).filter(|(_, inside)| !**inside);
        assert!(outside.clone().count() > 0 && outside.clone().all(|(v, _)| *v == 0.0));
    }

    /// A scan whose first `n_brain` voxels are brain, `n_high` of them of value `high`; all others
    /// are `low`.
    fn two_valued(n_brain: usize, n_high: usize, low: f32, high: f32) -> (RawVolume, RawMask) {
        let shape = Shape3([11, 12, 13]);
        let voxels = (0..shape.n_voxels()).map(|i| if i < n_high { high } else { low }).collect();
        let inside = (0..shape.n_voxels()).map(|i| i < n_brain).collect();
        let affine = identity();
        (RawVolume { shape, voxels, affine }, RawMask { shape, inside, affine })
    }

    #[test]
    fn voxels_at_the_ends_of_f32_make_no_voxel_of_the_cube_nan() {
        // The white level is between the two values, whose difference overflows f32.
        let (scan, brain) = two_valued(1512, 4, -3e38, 3e38);
        let volume = canonicalise(&scan, &brain, &SETTINGS, None, None).unwrap().volume;
        assert!(volume.voxels().iter().all(|v| (0.0..=1.0).contains(v)));
        assert!(volume.voxels().iter().any(|v| *v > 0.1), "the high voxels are to be seen");
        // It is exactly the low value. The difference does not count, as it would give 0 x
        // infinity.
        let (scan, brain) = two_valued(501, 1, -3e38, 3e38);
        assert_eq!(
            canonicalise(&scan, &brain, &SETTINGS, None, None),
            Err(PreprocessError::Constant { low: -3e38, high: 3e38 })
        );
        // The smallest white level there is.
        let (scan, brain) = two_valued(501, 2, f32::from_bits(1), f32::MAX);
        let volume = canonicalise(&scan, &brain, &SETTINGS, None, None).unwrap().volume;
        assert!(volume.voxels().iter().all(|v| (0.0..=1.0).contains(v)));
    }

    #[test]
    fn the_brain_lies_in_the_middle_of_the_cube() {
        let volume = canonical(&box_scan(identity())).volume;
        let columns: Vec<usize> =
            (0..28).filter(|&x| volume.brain()[volume.shape().offset([x, 14, 14])]).collect();
        assert_eq!((columns[0], columns[columns.len() - 1]), (8, 19));
    }

    #[test]
    fn a_mask_on_another_grid_is_brought_onto_the_scan() {
        let scan = box_scan(identity());
        let coarse = RawMask {
            shape: Shape3([10, 12, 11]),
            inside: vec![true; 1320],
            affine: Affine::scaling(2.0, WorldPoint([-9.5, -11.5, -10.5])).unwrap(),
        };
        let mask = brain_mask(&scan, Some(&coarse)).unwrap();
        assert_eq!(mask.shape, scan.shape);
        assert!(mask.inside.iter().all(|&i| i));
    }

    #[test]
    fn a_brain_larger_than_the_cube_is_said_to_be_cut() {
        let scan = box_scan(identity());
        let brain = brain_mask(&scan, None).unwrap();
        let small = CubeSettings { field_of_view_mm: 10.0, ..SETTINGS };
        let cut = canonicalise(&scan, &brain, &small, None, None).unwrap().cut_fraction;
        assert!(cut > 0.2, "cut {cut}");
        assert_eq!(canonical(&scan).cut_fraction, 0.0);
    }

    /// The box scan without its first `n` planes along x.
    fn without_planes(n: usize) -> RawVolume {
        let whole = box_scan(identity());
        let shape = Shape3([20 - n, 24, 22]);
        let voxel = |offset: usize| {
            let [x, y, z] = shape.voxel(offset);
            whole.voxels[whole.shape.offset([x + n, y, z])]
        };
        let voxels = (0..shape.n_voxels()).map(voxel).collect();
        let affine = Affine::scaling(1.0, WorldPoint([n as f64 - 10.0, -12.0, -11.0])).unwrap();
        RawVolume { shape, voxels, affine }
    }

    #[test]
    fn cells_that_the_grid_cuts_are_no_foreground_and_a_whole_brain_loses_none() {
        let whole = cube_affine(&brain_mask(&box_scan(identity()), None).unwrap(), &SETTINGS);
        let cube = whole.unwrap();
        let canonical = |raw: &RawVolume| {
            let brain = brain_mask(raw, None).unwrap();
            canonicalise(raw, &brain, &SETTINGS, Some(&cube), None).unwrap()
        };
        // The brain lies at 8..20 of the cube. The planes below 12 lie beyond the grid.
        let cut = canonical(&without_planes(8));
        let beyond = cut.volume.beyond().unwrap();
        let is_beyond = |x| beyond[cut.volume.shape().offset([x, 14, 14])];
        assert!((0..12).all(is_beyond) && !(12..28).any(is_beyond));
        let x_of = |cells: &Foreground| -> Vec<usize> {
            cells.cells.iter().map(|&cell| cells.shape.voxel(cell as usize)[0]).collect()
        };
        let cells = x_of(&foreground_cells(&cut.volume, [7; 3], 0.1));
        assert!(
            !cells.is_empty() && cells.iter().all(|&x| x == 2),
            "14 to 20 are whole: {cells:?}"
        );
        assert!(n_cut_cells(&cut.volume, [7; 3], 0.1) > 0);
        assert_eq!(x_of(&cut.fine.foreground).into_iter().min(), Some(6), "12 and 13");

        // Planes of air at the end of the grid cut nothing.
        let air = canonical(&without_planes(3));
        assert_eq!(air, canonical(&box_scan(identity())));
        assert_eq!(air.volume.beyond(), None);
    }

    #[test]
    fn a_head_is_larger_than_a_brain_or_meets_the_end_of_its_grid() {
        let tissue = |spacing: f64, inside: fn([usize; 3]) -> bool| {
            let shape = Shape3([20, 24, 22]);
            let inside = (0..shape.n_voxels()).map(|offset| inside(shape.voxel(offset))).collect();
            let affine = Affine::scaling(spacing, WorldPoint([0.0; 3])).unwrap();
            RawMask { shape, inside, affine }
        };
        // 12 x 14 x 13 voxels of 512 mm^3: 1118 ml.
        let brain = tissue(8.0, |[x, y, z]| {
            x.clamp(3, 14) == x && y.clamp(4, 17) == y && z.clamp(5, 17) == z
        });
        assert!(!shows_head(&brain));
        // A stem of 4 x 5 voxels of 64 mm^2: 12.8 cm^2.
        let stem = tissue(8.0, |[x, y, z]| x.clamp(7, 10) == x && y.clamp(8, 12) == y && z < 15);
        assert_eq!(widest_cut_cm2(&stem), 12.8);
        assert!(!shows_head(&stem));
        let slab = tissue(8.0, |[x, y, z]| x.clamp(7, 10) == x && y.clamp(8, 13) == y && z < 15);
        assert!(shows_head(&slab), "15.4 cm^2");
        let head = tissue(11.0, |[x, y, z]| {
            x.clamp(3, 14) == x && y.clamp(4, 17) == y && z.clamp(5, 17) == z
        });
        assert!(shows_head(&head), "2907 ml");
    }

    #[test]
    fn tissue_below_0_is_brain_before_one_background_and_refused_before_none() {
        let mut scan = box_scan(identity());
        let whole = brain_mask(&scan, None).unwrap();
        for (voxel, inside) in scan.voxels.iter_mut().zip(&whole.inside) {
            *voxel = if *inside { *voxel - 98.5 } else { 0.0 };
        }
        assert!(scan.voxels.iter().any(|&voxel| voxel < 0.0));
        assert_eq!(brain_mask(&scan, None).unwrap().inside, whole.inside);
        for (offset, voxel) in scan.voxels.iter_mut().enumerate() {
            *voxel -= 1e-3 * (offset % 97) as f32;
        }
        let error = brain_mask(&scan, None).unwrap_err();
        assert!(matches!(error, PreprocessError::BelowZero { below } if below > 0.5), "{error}");
        assert_eq!(brain_mask(&scan, Some(&whole)).unwrap(), whole);
    }

    #[test]
    fn a_wrong_unit_of_length_is_seen_by_the_size_of_the_brain() {
        let mut scan = box_scan(identity());
        scan.affine = Affine::scaling(1000.0, WorldPoint([0.0; 3])).unwrap();
        let brain = brain_mask(&scan, None).unwrap();
        let settings = CubeSettings { field_of_view_mm: 1e6, ..SETTINGS };
        // 12 x 14 x 9 voxels of a cubic metre.
        let error = PreprocessError::TooLarge { found_ml: 1512.0 * 1e6 };
        assert_eq!(canonicalise(&scan, &brain, &settings, None, None), Err(error));
    }

    #[test]
    fn what_lies_at_both_ends_of_the_grid_is_no_brain() {
        let mut scan = box_scan(identity());
        let mut brain = brain_mask(&scan, None).unwrap();
        let shape = scan.shape;
        for offset in 0..shape.n_voxels() {
            let [x, ..] = shape.voxel(offset);
            brain.inside[offset] = !(3..17).contains(&x);
            scan.voxels[offset] = if brain.inside[offset] { 1.0 + offset as f32 } else { 0.0 };
        }
        let narrow = CubeSettings { field_of_view_mm: 12.0, ..SETTINGS };
        let error = canonicalise(&scan, &brain, &narrow, None, None).unwrap_err();
        assert_eq!(error, PreprocessError::Scattered { inside: 0.0, field_of_view_mm: 12.0 });
        assert_eq!(error.to_string(), "0 % of the brain mask lies within 12 mm around its middle");
        assert!(canonicalise(&scan, &brain, &SETTINGS, None, None).is_ok());
    }

    #[test]
    fn scans_without_a_brain_are_refused_with_figures() {
        let mut scan = box_scan(identity());
        let brain = brain_mask(&scan, None).unwrap();
        let huge = CubeSettings { min_brain_ml: 100.0, ..SETTINGS };
        assert!(matches!(
            canonicalise(&scan, &brain, &huge, None, None),
            Err(PreprocessError::TooSmall { needed_ml: 100.0, .. })
        ));
        scan.voxels.fill(7.0);
        assert_eq!(brain_mask(&scan, None), Err(PreprocessError::NoBackground { nonzero: 1.0 }));
        assert_eq!(
            canonicalise(&scan, &brain, &SETTINGS, None, None),
            Err(PreprocessError::Constant { low: 7.0, high: 7.0 })
        );
        scan.voxels.fill(0.0);
        let empty = brain_mask(&scan, None).unwrap();
        assert!(matches!(
            canonicalise(&scan, &empty, &SETTINGS, None, None),
            Err(PreprocessError::TooSmall { .. })
        ));
    }
}
