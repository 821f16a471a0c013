//! Made-up brains for the demo: FLAIR-like contrast, anatomy that varies between subjects, and if
//! asked for, a lesion at a known place. The same seed gives the same brain.
//!
//! This only imitates anatomy. It has enough folds, nuclei and ventricles that a healthy token
//! finds a match in other subjects and a lesion does not. Millimetres, RAS, origin near the
//! anterior commissure.

use crate::numeric::{
    geometry::{Affine, Shape3, VoxelPoint, WorldPoint},
    projection::Normal,
    volume::{RawMask, RawVolume},
};

/// Grid of all scans: 2 mm, the size of MNI152.
const SHAPE: Shape3 = Shape3([91, 109, 91]);
const SPACING_MM: f64 = 2.0;
const ORIGIN: WorldPoint = WorldPoint([-90.0, -126.0, -72.0]);

const CSF: f64 = 30.0;
const WHITE: f64 = 115.0;
const GREY: f64 = 150.0;
const LESION: f64 = 215.0;
const NOISE: f64 = 3.0;

/// A bright ball with a ragged rim.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lesion {
    /// Centre, mm.
    pub(super) centre: [f64; 3],
    /// Mean radius, mm.
    pub(super) radius_mm: f64,
}

/// A made-up scan with its truth.
pub(super) struct Phantom {
    /// The scan, skull-stripped: outside the brain it is 0.
    pub(super) scan: RawVolume,
    /// Where the lesion is.
    pub(super) lesion: RawMask,
}

/// A plane wave. Sums of waves fold the cortex and vary the rims.
struct Wave {
    direction: [f64; 3],
    phase: f64,
}

struct Subject {
    scale: [f64; 3],
    shift: [f64; 3],
    ventricles: f64,
    folds: Vec<Wave>,
    ragged: Vec<Wave>,
    bias: Wave,
    lesion: Option<Lesion>,
}

/// Makes the scan of subject `seed`.
pub(super) fn phantom(seed: u64, lesion: Option<Lesion>) -> Phantom {
    let mut random = Normal::new(seed);
    let subject = Subject::new(&mut random, lesion);
    let affine = Affine::scaling(SPACING_MM, ORIGIN).expect("a scaling is invertible");
    let n_voxels = SHAPE.n_voxels();
    let mut tissue = Vec::with_capacity(n_voxels);
    let mut inside = Vec::with_capacity(n_voxels);

    for offset in 0..n_voxels {
        let voxel = SHAPE.voxel(offset).map(|index| index as f64);
        let WorldPoint(world) = affine.to_world(VoxelPoint(voxel));
        let point = subject.to_anatomy(world);
        tissue.push(subject.tissue(point, world).unwrap_or(0.0));
        inside.push(tissue[offset] > 0.0 && subject.in_lesion(world));
    }

    let voxels = smooth(&tissue)
        .into_iter()
        .zip(&tissue)
        .map(|(value, &tissue)| {
            let noise = NOISE * random.next();
            if tissue > 0.0 { (value + noise).max(1.0) as f32 } else { 0.0 }
        })
        .collect();
    Phantom {
        scan: RawVolume { shape: SHAPE, voxels, affine },
        lesion: RawMask { shape: SHAPE, inside, affine },
    }
}

impl Subject {
    fn new(random: &mut Normal, lesion: Option<Lesion>) -> Self {
        let near = |random: &mut Normal, mean: f64, spread: f64| {
            mean + spread * random.next().clamp(-2.0, 2.0)
        };
        Self {
            scale: std::array::from_fn(|_| near(random, 1.0, 0.02)),
            shift: std::array::from_fn(|_| near(random, 0.0, 1.0)),
            ventricles: near(random, 1.0, 0.12),
            folds: folds(random),
            ragged: waves(random, 4, 12.0),
            bias: waves(random, 1, 250.0).remove(0),
            lesion,
        }
    }

    /// Maps a point of the scanner to the common anatomy, mm.
    fn to_anatomy(&self, world: [f64; 3]) -> [f64; 3] {
        std::array::from_fn(|axis| (world[axis] - self.shift[axis]) / self.scale[axis])
    }

    /// Signal at a point. `None` outside the brain.
    fn tissue(&self, point: [f64; 3], world: [f64; 3]) -> Option<f64> {
        let healthy = self.stem(point).or_else(|| self.cerebellum(point));
        let healthy = self.cerebrum(point).or(healthy)?;
        let value = if self.in_lesion(world) { LESION } else { healthy };
        Some(value * (1.0 + 0.05 * sum(std::slice::from_ref(&self.bias), point)))
    }

    fn in_lesion(&self, world: [f64; 3]) -> bool {
        self.lesion.is_some_and(|lesion| {
            let offset: [f64; 3] = std::array::from_fn(|axis| world[axis] - lesion.centre[axis]);
            norm(offset) < lesion.radius_mm * (1.0 + 0.15 * sum(&self.ragged, world))
        })
    }

    fn cerebrum(&self, point @ [x, _, z]: [f64; 3]) -> Option<f64> {
        let fold = sum(&self.folds, point);
        let lower = if z < 10.0 { 42.0 } else { 64.0 };
        let depth_mm = 62.0 * (1.0 - ellipsoid(point, [0.0, -17.0, 10.0], [67.0, 86.0, lower]));
        if depth_mm < 0.0 {
            return None;
        }
        let fissure = x.abs() < 1.5 && !(0.0..24.0).contains(&z);
        // Sulci are the surfaces where the folds change sign. Grey matter is beside them.
        let sulcus = depth_mm < 15.0 && fold.abs() < 0.16;
        Some(if fissure || sulcus {
            CSF
        } else if let Some(nucleus) = self.deep(point) {
            nucleus
        } else if depth_mm < 3.0 || (depth_mm < 18.0 && fold.abs() < 0.6) {
            GREY
        } else {
            WHITE
        })
    }

    /// Ventricles and grey nuclei, equal on both sides.
    fn deep(&self, [x, y, z]: [f64; 3]) -> Option<f64> {
        let side = [x.abs(), y, z];
        let size = |axes: [f64; 3]| axes.map(|axis| axis * self.ventricles);
        let arch = [side[0], y, z + 0.008 * (y + 12.0).powi(2)];
        if ellipsoid(arch, [11.0, -14.0, 20.0], size([6.0, 36.0, 7.0])) < 1.0
            || ellipsoid(side, [0.0, -18.0, 4.0], size([2.5, 12.0, 9.0])) < 1.0
        {
            return Some(CSF);
        }
        let nuclei = [
            ([11.0, -18.0, 8.0], [8.0, 13.0, 8.0]),
            ([14.0, 14.0, 10.0], [5.0, 10.0, 9.0]),
            ([26.0, 3.0, 2.0], [5.0, 16.0, 9.0]),
        ];
        let nucleus = nuclei.iter().any(|&(centre, axes)| ellipsoid(side, centre, axes) < 1.0);
        nucleus.then_some(GREY)
    }

    fn cerebellum(&self, point @ [_, y, z]: [f64; 3]) -> Option<f64> {
        let radius = ellipsoid(point, [0.0, -62.0, -38.0], [50.0, 32.0, 24.0]);
        let leaf = (0.8 * z + 0.35 * y + 0.5 * sum(&self.folds, point)).sin();
        let white = radius < 0.45;
        (radius < 1.0).then_some(match white {
            true => WHITE,
            false if leaf > 0.85 => CSF,
            false => GREY,
        })
    }

    fn stem(&self, point: [f64; 3]) -> Option<f64> {
        (ellipsoid(point, [0.0, -28.0, -38.0], [13.0, 14.0, 32.0]) < 1.0).then_some(WHITE)
    }
}

/// Distance from the centre in units of the half axes: below 1 is inside.
fn ellipsoid(point: [f64; 3], centre: [f64; 3], axes: [f64; 3]) -> f64 {
    norm(std::array::from_fn(|axis| (point[axis] - centre[axis]) / axes[axis]))
}

fn norm([x, y, z]: [f64; 3]) -> f64 {
    (x * x + y * y + z * z).sqrt()
}

fn waves(random: &mut Normal, n: usize, length_mm: f64) -> Vec<Wave> {
    let mut wave = || {
        let direction: [f64; 3] = std::array::from_fn(|_| random.next());
        let length_mm = length_mm * (1.0 + 0.3 * random.uniform());
        let frequency = std::f64::consts::TAU / length_mm / norm(direction).max(1e-6);
        let phase = std::f64::consts::TAU * random.uniform();
        Wave { direction: direction.map(|part| part * frequency), phase }
    };
    (0..n).map(|_| wave()).collect()
}

/// The folds that all subjects have in common, each moved a little.
fn folds(random: &mut Normal) -> Vec<Wave> {
    let mut shared = waves(&mut Normal::new(0), 10, 30.0);
    shared.iter_mut().for_each(|wave| wave.phase += 0.5 * random.next());
    shared
}

/// Sum of the waves at a point, of variance about 1.
fn sum(waves: &[Wave], point: [f64; 3]) -> f64 {
    let wave = |wave: &Wave| {
        let turn: f64 = wave.direction.iter().zip(point).map(|(d, p)| d * p).sum();
        (turn + wave.phase).sin()
    };
    waves.iter().map(wave).sum::<f64>() * (2.0 / waves.len() as f64).sqrt()
}

/// Imitates the partial volumes of a real scan: weights 1, 2, 1 along each axis.
fn smooth(values: &[f64]) -> Vec<f64> {
    let mut smoothed = values.to_vec();
    for axis in 0..3 {
        let step = SHAPE.0[..axis].iter().product::<usize>();
        let before = smoothed.clone();
        for (offset, value) in smoothed.iter_mut().enumerate() {
            let index = SHAPE.voxel(offset)[axis];
            if index > 0 && index + 1 < SHAPE.0[axis] {
                *value = 0.25 * before[offset - step] + 0.5 * *value + 0.25 * before[offset + step];
            }
        }
    }
    smoothed
}

#[cfg(test)]
mod tests {
    use super::*;

    const LESION: Lesion = Lesion { centre: [-30.0, -40.0, 25.0], radius_mm: 10.0 };

    #[test]
    fn a_seed_is_a_subject_of_the_size_of_a_person() {
        let one = phantom(1, None);
        assert_eq!(one.scan, phantom(1, None).scan);
        assert_ne!(one.scan, phantom(2, None).scan);
        let n_brain = one.scan.voxels.iter().filter(|&&v| v > 0.0).count();
        let brain_ml = n_brain as f64 * one.scan.affine.voxel_volume_mm3() / 1000.0;
        assert!((900.0..1700.0).contains(&brain_ml), "{brain_ml} ml");
        assert!(!one.lesion.inside.contains(&true));
    }

    #[test]
    fn a_lesion_is_bright_where_its_mask_says() {
        let (healthy, ill) = (phantom(1, None), phantom(1, Some(LESION)));
        let n_lesion = ill.lesion.inside.iter().filter(|&&inside| inside).count();
        let lesion_mm3 = n_lesion as f64 * ill.scan.affine.voxel_volume_mm3();
        // A ball of 10 mm has 4189 mm^3.
        assert!((3000.0..6000.0).contains(&lesion_mm3), "{lesion_mm3} mm^3");
        let mean = |scan: &RawVolume| {
            let inside = scan.voxels.iter().zip(&ill.lesion.inside).filter(|(_, inside)| **inside);
            inside.map(|(value, _)| value).sum::<f32>() / n_lesion as f32
        };
        assert!(mean(&ill.scan) > 1.3 * mean(&healthy.scan));
    }
}
