//! Affine alignment of a scan to a template, for any modality.
//!
//! Twelve parameters, found by normalised mutual information (Studholme, Hill and Hawkes 1999) with
//! Powell's BOBYQA from coarse to fine. The template shows a brain alone, while the scan may show a
//! whole head. So only the region of the template's brain is compared. The same scan gives the same
//! alignment, to the last bit.
//!
//! Does the scan show a brain in the pose that its header states? To test this, the template is
//! turned upside down, back to front and sideways, and each turned template is fitted, too. A brain
//! shares far more information with the upright template than with any turned one. A phantom,
//! noise, or a head with a wrong header does not. This holds for every sequence, because all poses
//! are compared with the same intensities.

use bobyqa::{Bobyqa, Config};
use rayon::prelude::*;
use thiserror::Error;

use super::{
    geometry::{Affine, AffineError, Shape3},
    morphology::Grid,
    volume::{RawMask, RawVolume},
};

/// A brain in standard space, 0 outside of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    image: RawVolume,
    brain: RawMask,
    centre: [f64; 3],
}

impl Template {
    /// A template whose brain is where `image` is above 0.
    pub fn new(image: RawVolume) -> Self {
        let inside: Vec<bool> = image.voxels.iter().map(|&v| v > 0.0).collect();
        let brain = RawMask { shape: image.shape, inside, affine: image.affine };
        let centre = centre(&brain);
        Self { image, brain, centre }
    }

    /// Where the template is above 0, on its own grid.
    pub fn brain(&self) -> &RawMask {
        &self.brain
    }
}

/// The position of a template in a scan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Alignment {
    /// Template world -> scan world, mm.
    pub to_scan: Affine,
    /// Share of the scan's variance, over the template's brain and a rim around it, that the
    /// template's intensities explain (correlation ratio, Roche et al. 1998), in [0, 1]. Depends on
    /// the sequence.
    pub explained: f64,
    /// How much less information the template shares with the scan in the best wrong pose: 1 -
    /// (best wrong pose / this pose), at most 1. About 0 if all poses fit alike. Negative if a
    /// wrong pose fits better, or if hardly anything is shared at all.
    pub distinctness: f64,
    /// Share of the template's brain within the scan's grid, in [0, 1].
    pub coverage: f64,
}

/// Why a scan cannot be aligned.
#[derive(Debug, Error, PartialEq)]
pub enum RegistrationError {
    /// All voxels are equal.
    #[error("the scan holds no contrast")]
    NoContrast,
    /// The scan is thinner than the coarsest step of the search.
    #[error("the scan measures {:.0} x {:.0} x {:.0} mm", .0[0], .0[1], .0[2])]
    TooSmall([f64; 3]),
    /// Too much of the brain is beyond the grid.
    #[error("{:.0} % of the template's brain is within the scan", 100.0 * .best.coverage)]
    Cut {
        /// Where the template fits best.
        best: Box<Alignment>,
    },
    /// The template fits about as well in a wrong pose.
    #[error(
        "a distinctness of {:.3}: the template fits {:.0} % as well in a wrong pose",
        .best.distinctness,
        100.0 * (1.0 - .best.distinctness)
    )]
    Unlike {
        /// Where the template fits best.
        best: Box<Alignment>,
        /// Whether the scan was treated as a whole head.
        is_head: bool,
    },
    /// The affine that was found cannot be inverted.
    #[error(transparent)]
    Geometry(#[from] AffineError),
}

impl RegistrationError {
    /// The best alignment, if one was searched for.
    pub fn best(&self) -> Option<&Alignment> {
        match self {
            Self::Cut { best } | Self::Unlike { best, .. } => Some(best),
            Self::NoContrast | Self::TooSmall(_) | Self::Geometry(_) => None,
        }
    }
}

/// Levels of the search: spacing of the grids in mm, first and last step of the search in mm.
const LEVELS: [(f64, f64, f64); 3] = [(8.0, 4.0, 0.8), (4.0, 2.0, 0.2), (2.0, 0.6, 0.05)];
/// Number of candidates that are searched from at each level.
const KEPT: [usize; 3] = [16, 8, 2];
/// Smallest extent of a scan, mm; a brain measures 110 to 190.
pub const MIN_EXTENT_MM: f64 = 60.0;
/// For a whole head, a rim of this width around the template's brain is compared, too, mm. With a
/// wider rim the template grows until its dark surroundings are the air around the head, or shrinks
/// into the brain.
pub(super) const HEAD_RIM_MM: f64 = 2.0;
/// The same for a brain without a head around it. Its edge gives the most information.
const STRIPPED_RIM_MM: f64 = 8.0;
/// Least [`Alignment::distinctness`] of a head. Measured on heads: 0.44 to 0.75 with a right
/// alignment (T1, FLAIR, T2; slices of 2 to 8 mm), at most 0.25 with a wrong one, and on images
/// without a head (docs/preprocessing.md).
const MIN_DISTINCTNESS_HEAD: f64 = 0.3;
/// The same for a brain alone, whose edge fits in every pose. Measured: 0.24 to 0.6.
const MIN_DISTINCTNESS_STRIPPED: f64 = 0.15;
/// Share of the template's brain that must be within the scan.
pub const MIN_COVERAGE: f64 = 0.6;
/// Most evaluations per search.
const MAX_EVALUATIONS: usize = 500;

/// Rotations, scales and shears are measured in millimetres at this distance from the centre, so
/// that one step has about the same effect in each parameter.
const RADIUS_MM: f64 = 80.0;
/// Limits of each group of parameters, mm at [`RADIUS_MM`]: translation from the start 80 mm,
/// rotation 45 degrees, scale 0.67 to 1.5, shear 0.25.
const BOUNDS: [f64; 4] = [80.0, 63.0, 32.0, 20.0];

const UPRIGHT: [[f64; 3]; 3] = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];

/// Turns by 180 and 90 degrees about each axis. A search covers only 45 degrees and cannot reach
/// them.
const WRONG_TURNS: [[[f64; 3]; 3]; 9] = [
    [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]],
    [[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]],
    [[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0]],
    [[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]],
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]],
    [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]],
    [[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]],
    [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
    [[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
];
/// Number of them that are fitted at 4 mm.
const WRONG_KEPT: usize = 3;
/// Information (normalised mutual information - 1) that noise may share with the template in a
/// lucky pose: 32 x 32 bins of 30,000 points share 0.003 by their number alone. Heads share 0.028
/// to 0.076.
const SHARED_BY_CHANCE: f64 = 0.01;

/// Translations, rotations, logarithms of the scales, shears: three each.
type Parameters = [f64; 12];

/// Finds the template in a scan: a whole head, or a brain that has been extracted.
///
/// Takes one to two seconds on two cores, at any resolution.
///
/// # Errors
/// If there is nothing to align, or if no brain was found.
pub fn register(
    scan: &RawVolume,
    template: &Template,
    is_head: bool,
) -> Result<Alignment, RegistrationError> {
    let levels = levels(scan, template, if is_head { HEAD_RIM_MM } else { STRIPPED_RIM_MM })?;
    let mut candidates = levels[0].starts(template);
    for ((level, (_, first, last)), n_kept) in levels.iter().zip(LEVELS).zip(KEPT) {
        candidates.truncate(n_kept);
        candidates = candidates
            .into_par_iter()
            .map(|candidate| level.search(candidate, 12, first, last))
            .collect();
        candidates.sort_by(|a, b| a.cost.total_cmp(&b.cost));
    }
    judged(&levels, candidates[0], scan, is_head)
}

/// Finds the brain of a head in another scan of the same session: a rigid motion, near the one that
/// the headers of both state.
///
/// # Errors
/// Like [`register`]; also if the headers do not describe the position of the head.
pub fn register_same_head(
    scan: &RawVolume,
    brain: &Template,
) -> Result<Alignment, RegistrationError> {
    let levels = levels(scan, brain, HEAD_RIM_MM)?;
    let from = brain.centre;
    let mut found = Candidate { from, to: from, turn: UPRIGHT, parameters: [0.0; 12], cost: 0.0 };
    for (level, (_, first, last)) in levels.iter().zip(LEVELS) {
        found = level.search(found, 6, first, last);
    }
    judged(&levels, found, scan, true)
}

/// Template and scan from coarse to fine.
fn levels(
    scan: &RawVolume,
    template: &Template,
    rim_mm: f64,
) -> Result<[Level; 3], RegistrationError> {
    let spacing = scan.affine.spacing_mm();
    let extent = [0, 1, 2].map(|axis| spacing[axis] * scan.shape.0[axis] as f64);
    if extent.iter().any(|&mm| mm < MIN_EXTENT_MM) {
        return Err(RegistrationError::TooSmall(extent));
    }
    let grey = GreyScale::of(scan).ok_or(RegistrationError::NoContrast)?;
    Ok(LEVELS.map(|(mm, ..)| Level::new(scan, template, &grey, mm, rim_mm)))
}

/// The alignment that was found, if it is good enough.
fn judged(
    levels: &[Level],
    found: Candidate,
    scan: &RawVolume,
    is_head: bool,
) -> Result<Alignment, RegistrationError> {
    let to_scan = Affine::new(found.map())?;
    let explained = levels[1].explained(&to_scan);
    let coverage = levels[2].coverage(&to_scan, scan);
    let distinctness = distinctness(levels, found);
    let best = Alignment { to_scan, explained, distinctness, coverage };
    if coverage < MIN_COVERAGE {
        return Err(RegistrationError::Cut { best: Box::new(best) });
    }
    if distinctness < min_distinctness(is_head) {
        return Err(RegistrationError::Unlike { best: Box::new(best), is_head });
    }
    Ok(best)
}

/// The least [`Alignment::distinctness`] that is accepted.
pub fn min_distinctness(is_head: bool) -> f64 {
    if is_head { MIN_DISTINCTNESS_HEAD } else { MIN_DISTINCTNESS_STRIPPED }
}

/// See [`Alignment::distinctness`].
///
/// Each wrong pose is fitted at 8 mm, starting at the place that was found, and the best of them at
/// 4 mm. For comparison the found pose is fitted at 4 mm again.
fn distinctness(levels: &[Level], found: Candidate) -> f64 {
    let [(_, _, last), (_, first, finer), _] = LEVELS;
    let coarse = |turn: [[f64; 3]; 3]| {
        let start = levels[0].search(Candidate { turn, ..found }, 6, 3.0 * first, first);
        levels[0].search(start, 12, first, last)
    };
    let mut wrong: Vec<Candidate> = WRONG_TURNS.into_par_iter().map(coarse).collect();
    wrong.sort_by(|a, b| a.cost.total_cmp(&b.cost));
    wrong.truncate(WRONG_KEPT);

    // Normalised mutual information is 1 if nothing is shared.
    let shared = |start: Candidate| -levels[1].search(start, 12, first, finer).cost - 1.0;
    let right = shared(found);
    let wrong = wrong.into_par_iter().map(shared).reduce(|| SHARED_BY_CHANCE, f64::max);
    if right > 0.0 { 1.0 - wrong / right } else { 0.0 }
}

/// A state of the search.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// Centre of the template's brain, mm.
    from: [f64; 3],
    /// First guess of the centre of the scan's brain, mm.
    to: [f64; 3],
    /// Turns the template before it is moved.
    turn: [[f64; 3]; 3],
    parameters: Parameters,
    /// Lower is better.
    cost: f64,
}

impl Candidate {
    /// Template world -> scan world.
    fn map(&self) -> [[f64; 4]; 3] {
        let linear = product(&linear_part(&self.parameters), &self.turn);
        let row = |axis: usize| {
            let r = linear[axis];
            let at_centre: f64 = (0..3).map(|column| r[column] * self.from[column]).sum();
            [r[0], r[1], r[2], self.to[axis] + self.parameters[axis] - at_centre]
        };
        [row(0), row(1), row(2)]
    }
}

/// Rotation x scale x shear.
fn linear_part(p: &Parameters) -> [[f64; 3]; 3] {
    let [a, b, c] = [3, 4, 5].map(|i| p[i] / RADIUS_MM);
    let x = [[1.0, 0.0, 0.0], [0.0, a.cos(), -a.sin()], [0.0, a.sin(), a.cos()]];
    let y = [[b.cos(), 0.0, b.sin()], [0.0, 1.0, 0.0], [-b.sin(), 0.0, b.cos()]];
    let z = [[c.cos(), -c.sin(), 0.0], [c.sin(), c.cos(), 0.0], [0.0, 0.0, 1.0]];
    let scale = [6, 7, 8].map(|i| (p[i] / RADIUS_MM).exp());
    let [d, e, f] = [9, 10, 11].map(|i| p[i] / RADIUS_MM);
    let stretch = [
        [scale[0], scale[0] * d, scale[0] * e],
        [0.0, scale[1], scale[1] * f],
        [0.0, 0.0, scale[2]],
    ];
    product(&product(&z, &product(&y, &x)), &stretch)
}

fn product(a: &[[f64; 3]; 3], b: &[[f64; 3]; 3]) -> [[f64; 3]; 3] {
    a.map(|row| [0, 1, 2].map(|c| (0..3).map(|k| row[k] * b[k][c]).sum()))
}

/// Maps intensities to bins of the joint histogram. Each bin holds about as many voxels that are
/// not background, so that a bright scalp leaves the brain as many bins as a dark one.
#[derive(Debug, Clone)]
pub(super) struct GreyScale {
    /// The intensity at which each bin is centred, ascending.
    centres: Vec<f32>,
}

impl GreyScale {
    /// `None` without contrast.
    pub(super) fn of(scan: &RawVolume) -> Option<Self> {
        let step = (scan.voxels.len() / 1_000_000).max(1);
        let mut some: Vec<f32> = scan.voxels.iter().copied().step_by(step).collect();
        let low = percentile(&mut some, 0.01)?;
        some.retain(|&v| v > low);
        let high = percentile(&mut some, 0.995)?;

        let background = low + BACKGROUND_SHARE * (high - low);
        some.retain(|&v| v > background);
        some.sort_unstable_by(f32::total_cmp);
        let quantile = |bin: usize| some[(some.len() - 1) * (2 * bin - 1) / (2 * BINS - 2)];
        if some.is_empty() {
            return None;
        }

        let mut centres = vec![low];
        centres.extend((1..BINS).map(quantile));
        centres.dedup();
        (centres.len() > 2 && centres.iter().all(|v| v.is_finite())).then_some(Self { centres })
    }

    /// In [0, BINS - 1].
    pub(super) fn in_bins(&self, value: f32) -> f32 {
        let above = self.centres.partition_point(|&centre| centre <= value);
        if above == 0 {
            return 0.0;
        }
        let Some(&next) = self.centres.get(above) else { return (self.centres.len() - 1) as f32 };
        let centre = self.centres[above - 1];
        (above - 1) as f32 + (value - centre) / (next - centre)
    }
}

/// Intensities below this share of the 99.5th percentile are background.
const BACKGROUND_SHARE: f32 = 0.05;

/// The value that exceeds this share of the values; reorders them. `None` without values.
pub fn percentile(values: &mut [f32], share: f64) -> Option<f32> {
    let last = values.len().checked_sub(1)?;
    let (_, at, _) = values.select_nth_unstable_by((last as f64 * share) as usize, f32::total_cmp);
    Some(*at)
}

/// Bins of each intensity in the joint histogram.
pub(super) const BINS: usize = 32;

/// Template and scan at one spacing.
pub(super) struct Level {
    /// Places in the template's world that are compared.
    points: Vec<[f64; 3]>,
    /// The template's intensity at each, in bins; 0 in the rim around its brain.
    values: Vec<u8>,
    /// Scan in bins, `[nx, ny, nz]`.
    scan: Vec<f32>,
    shape: Shape3,
    to_voxel: Affine,
}

impl Level {
    pub(super) fn new(
        scan: &RawVolume,
        template: &Template,
        grey: &GreyScale,
        mm: f64,
        rim_mm: f64,
    ) -> Self {
        let coarse = shrink(scan, mm);
        let small = shrink(&template.image, mm);
        let top = small.voxels.iter().copied().fold(0.0, f32::max).max(f32::MIN_POSITIVE);
        let brain: Vec<bool> = small.voxels.iter().map(|&v| v > 0.05 * top).collect();
        let grid = Grid { shape: small.shape, spacing: small.affine.spacing_mm() };
        let outside = grid.distance_to(&brain);
        let chosen: Vec<usize> =
            (0..brain.len()).filter(|&offset| outside[offset] <= rim_mm).collect();
        let place =
            |&offset: &usize| small.affine.apply(small.shape.voxel(offset).map(|v| v as f64));
        let bin = |&offset: &usize| {
            let value = small.voxels[offset] / top * (BINS - 1) as f32;
            if brain[offset] { value.round().max(1.0) as u8 } else { 0 }
        };
        Self {
            points: chosen.iter().map(place).collect(),
            values: chosen.iter().map(bin).collect(),
            scan: coarse.voxels.iter().map(|&v| grey.in_bins(v)).collect(),
            shape: coarse.shape,
            to_voxel: coarse.affine.inverse(),
        }
    }

    /// Several places where the brain may be, best first.
    fn starts(&self, template: &Template) -> Vec<Candidate> {
        let from = template.centre;
        let (mass, top) = self.head();
        // The middle of a brain is 80 mm below the top of the head.
        let below_top = [mass[0], mass[1], top - 80.0];
        let centre = self.shape.0.map(|n| (n as f64 - 1.0) / 2.0);
        let centre = self.to_voxel.inverse().apply(centre);

        let mut starts = Vec::new();
        for to in [from, mass, below_top, centre] {
            // Templates are larger than most brains, and a third larger than those of children.
            for (pitch, scale) in
                [-0.3, 0.0, 0.3].into_iter().flat_map(|p| [(p, -0.04), (p, -0.14)])
            {
                let mut parameters = [0.0; 12];
                parameters[3] = pitch * RADIUS_MM;
                parameters[6..9].fill(scale * RADIUS_MM);
                starts.push(Candidate { from, to, turn: UPRIGHT, parameters, cost: 0.0 });
            }
        }

        let mut found: Vec<Candidate> =
            starts.into_par_iter().map(|start| self.search(start, 6, 12.0, 2.0)).collect();
        found.sort_by(|a, b| a.cost.total_cmp(&b.cost));
        found
    }

    /// Middle of the bright voxels, and their upper end, mm.
    fn head(&self) -> ([f64; 3], f64) {
        let mean = self.scan.iter().sum::<f32>() / self.scan.len() as f32;
        let to_world = self.to_voxel.inverse();
        let (mut sum, mut n, mut heights) = ([0.0; 3], 0.0, Vec::new());
        for offset in (0..self.scan.len()).filter(|&offset| self.scan[offset] > mean) {
            let place = to_world.apply(self.shape.voxel(offset).map(|v| v as f64));
            (0..3).for_each(|axis| sum[axis] += place[axis]);
            n += 1.0;
            heights.push(place[2] as f32);
        }
        let top = percentile(&mut heights, 0.995).unwrap_or(0.0);
        (sum.map(|sum| sum / f64::max(n, 1.0)), f64::from(top))
    }

    /// Varies the first `n` parameters, by steps from `first` to `last` mm.
    fn search(&self, start: Candidate, n: usize, first: f64, last: f64) -> Candidate {
        let mut config = Config::new(n);
        config.rho_begin = first;
        config.rho_end = last;
        config.max_fun = MAX_EVALUATIONS;
        let mut found = start;
        let cost = |x: &[f64]| {
            let mut candidate = start;
            candidate.parameters[..n].copy_from_slice(x);
            -self.similarity(&candidate.map())
        };

        let bound = |sign: f64| -> Vec<f64> { (0..n).map(|i| sign * BOUNDS[i / 3]).collect() };
        let (low, high) = (bound(-1.0), bound(1.0));

        let mut solver = Bobyqa::new(n, config).expect("these numbers fit each other");
        found.cost = solver.minimize(cost, &mut found.parameters[..n], &low, &high).f;
        found
    }

    /// Normalised mutual information, from 1 (unrelated) to 2; 0 if hardly anything overlaps.
    fn similarity(&self, map: &[[f64; 4]; 3]) -> f64 {
        let Ok(map) = Affine::new(*map) else { return 0.0 };
        let to_voxel = self.to_voxel.after(&map);

        let chunks = self.points.par_chunks(CHUNK).zip(self.values.par_chunks(CHUNK));
        let parts: Vec<Histogram> = chunks
            .map(|(points, values)| {
                let mut histogram = [0.0; BINS * BINS];
                for (&point, &value) in points.iter().zip(values) {
                    if let Some(at) = self.sample(to_voxel.apply(point)) {
                        add(&mut histogram, value, at);
                    }
                }
                histogram
            })
            .collect();

        // Sums the chunks in order, so that the result does not depend on the threads.
        let mut joint = [0.0; BINS * BINS];
        parts.iter().for_each(|part| joint.iter_mut().zip(part).for_each(|(sum, &n)| *sum += n));

        let total: f64 = joint.iter().sum();
        if total < MIN_OVERLAP * self.points.len() as f64 {
            return 0.0;
        }
        normalised_mutual_information(&joint, total)
    }

    /// Intensity of the scan at a voxel place, in bins; `None` beyond the grid.
    #[inline]
    fn sample(&self, place: [f64; 3]) -> Option<f32> {
        let [nx, ny, nz] = self.shape.0;
        let [x, y, z] = place;
        if !(x >= 0.0 && y >= 0.0 && z >= 0.0) {
            return None;
        }

        let (i, j, k) = (x as usize, y as usize, z as usize);
        if i + 1 >= nx || j + 1 >= ny || k + 1 >= nz {
            return None;
        }

        let [u, v, w] = [x - i as f64, y - j as f64, z - k as f64].map(|f| f as f32);
        let at = self.shape.offset([i, j, k]);
        let row =
            |offset: usize| self.scan[offset] + u * (self.scan[offset + 1] - self.scan[offset]);
        let plane = |offset: usize| {
            let near = row(offset);
            near + v * (row(offset + nx) - near)
        };
        let near = plane(at);
        Some(near + w * (plane(at + nx * ny) - near))
    }

    /// Pairs of intensities, in bins, of template and scan at the same place: 0 and above for the
    /// template, where 0 is the rim around its brain.
    pub(super) fn pairs(&self, map: &Affine) -> impl Iterator<Item = (u8, f32)> {
        let to_voxel = self.to_voxel.after(map);
        let points = self.points.iter().zip(&self.values);
        points
            .filter_map(move |(&point, &value)| Some((value, self.sample(to_voxel.apply(point))?)))
    }

    /// Correlation ratio, see [`Alignment::explained`].
    fn explained(&self, map: &Affine) -> f64 {
        let to_voxel = self.to_voxel.after(map);
        let mut groups = [(0.0_f64, 0.0_f64, 0.0_f64); BINS];
        for index in 0..self.points.len() {
            let value = self.sample(to_voxel.apply(self.points[index]));
            let Some(value) = value.map(f64::from) else { continue };
            let group = &mut groups[usize::from(self.values[index])];
            *group = (group.0 + 1.0, group.1 + value, group.2 + value * value);
        }
        let sum = groups.iter().fold((0.0, 0.0, 0.0), |s, g| (s.0 + g.0, s.1 + g.1, s.2 + g.2));
        let spread = |(n, sum, squares): (f64, f64, f64)| squares - sum * sum / f64::max(n, 1.0);
        let within: f64 = groups.into_iter().map(spread).sum();
        if spread(sum) > 0.0 { 1.0 - within / spread(sum) } else { 0.0 }
    }

    /// Share of the template's brain within the scan's own grid, up to the outer faces of its
    /// voxels. The coarse grid of this level ends up to a voxel earlier.
    fn coverage(&self, map: &Affine, scan: &RawVolume) -> f64 {
        let to_voxel = scan.affine.inverse().after(map);
        let is_brain = |&index: &usize| self.values[index] > 0;
        let is_within =
            |&index: &usize| scan.shape.nearest(to_voxel.apply(self.points[index])).is_some();
        let n_brain = (0..self.points.len()).filter(is_brain).count();
        let n_within = (0..self.points.len()).filter(is_brain).filter(is_within).count();
        n_within as f64 / n_brain.max(1) as f64
    }
}

/// Points per piece of parallel work.
const CHUNK: usize = 8192;
/// Share of the compared points that must be within the scan's grid.
const MIN_OVERLAP: f64 = 0.3;

type Histogram = [f64; BINS * BINS];

/// Shares a sample between the two bins around its intensity, so that the measure is continuous.
#[inline]
fn add(histogram: &mut Histogram, template: u8, scan: f32) {
    let bin = (scan as usize).min(BINS - 2);
    let share = f64::from(scan - bin as f32);
    let at = usize::from(template) * BINS + bin;
    histogram[at] += 1.0 - share;
    histogram[at + 1] += share;
}

fn normalised_mutual_information(joint: &Histogram, total: f64) -> f64 {
    let entropy = |counts: &mut dyn Iterator<Item = f64>| -> f64 {
        counts.filter(|&n| n > 0.0).map(|n| -n / total * (n / total).ln()).sum()
    };
    let rows = |row: usize| joint[row * BINS..][..BINS].iter().sum::<f64>();
    let columns = |column: usize| joint.iter().skip(column).step_by(BINS).sum::<f64>();
    let of_rows = entropy(&mut (0..BINS).map(rows));
    let of_columns = entropy(&mut (0..BINS).map(columns));
    let of_both = entropy(&mut joint.iter().copied());
    if of_both > 0.0 { (of_rows + of_columns) / of_both } else { 0.0 }
}

/// Means over blocks of whole voxels, so that the spacing comes near `mm` but not above.
pub(super) fn shrink(raw: &RawVolume, mm: f64) -> RawVolume {
    let spacing = raw.affine.spacing_mm();
    let factor =
        [0, 1, 2].map(|axis| ((mm / spacing[axis] + 0.1) as usize).clamp(1, raw.shape.0[axis]));
    let shape = Shape3([0, 1, 2].map(|axis| raw.shape.0[axis] / factor[axis]));
    let n = factor.iter().product::<usize>() as f64;
    let mean = |offset: usize| {
        let [x, y, z] = shape.voxel(offset);
        let mut sum = 0.0;
        for k in 0..factor[2] {
            for j in 0..factor[1] {
                let start = raw.shape.offset([x * factor[0], y * factor[1] + j, z * factor[2] + k]);
                let row = &raw.voxels[start..start + factor[0]];
                sum += row.iter().map(|&v| f64::from(v)).sum::<f64>();
            }
        }
        (sum / n) as f32
    };
    let voxels = (0..shape.n_voxels()).into_par_iter().map(mean).collect();
    let middle = factor.map(|f| (f as f64 - 1.0) / 2.0);
    let rows = raw.affine.rows().map(|r| {
        let origin = r[3] + (0..3).map(|axis| r[axis] * middle[axis]).sum::<f64>();
        [r[0] * factor[0] as f64, r[1] * factor[1] as f64, r[2] * factor[2] as f64, origin]
    });
    let affine = Affine::new(rows).unwrap_or(raw.affine);
    RawVolume { shape, voxels, affine }
}

/// Mean world place of the voxels of a mask.
fn centre(mask: &RawMask) -> [f64; 3] {
    let (mut sum, mut n) = ([0.0; 3], 0.0);
    for offset in (0..mask.inside.len()).filter(|&offset| mask.inside[offset]) {
        let voxel = mask.shape.voxel(offset);
        (0..3).for_each(|axis| sum[axis] += voxel[axis] as f64);
        n += 1.0;
    }
    mask.affine.apply(sum.map(|sum| sum / f64::max(n, 1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::geometry::WorldPoint;

    #[test]
    fn coverage_counts_up_to_the_outer_faces_of_the_scan_s_own_voxels() {
        // A template of 40 mm along each axis.
        let shape = Shape3([40, 40, 40]);
        let affine = Affine::scaling(1.0, WorldPoint([0.5; 3])).unwrap();
        let inside = |offset: usize| f32::from(u8::from(offset > 0)) * 100.0;
        let voxels: Vec<f32> = (0..64_000).map(inside).collect();
        let template = Template::new(RawVolume { shape, voxels: voxels.clone(), affine });
        let unmoved = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        let grey = GreyScale { centres: vec![0.0, 1.0, 2.0] };

        // 39 voxels do not fill blocks of 4 mm: the last three belong to no coarse voxel.
        for (n, expected) in [(40, 1.0), (39, 1.0), (20, 0.5), (32, 0.8)] {
            let shape = Shape3([n, 40, 40]);
            let scan = RawVolume { shape, voxels: vec![1.0; shape.n_voxels()], affine };
            let level = Level::new(&scan, &template, &grey, 4.0, 8.0);
            assert_eq!(level.coverage(&unmoved, &scan), expected, "{n}");
        }
    }
}
