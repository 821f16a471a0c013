//! Gives a scan of any sequence the contrast of the template.
//!
//! Ours. Once template and scan are aligned, each intensity of the scan has a mean intensity in the
//! template. With these mean intensities a T2 looks like a T1: cerebrospinal fluid and bone are
//! dark, white matter is brighter than grey matter. Programs for T1 images then work on it.

use rayon::prelude::*;

use super::{
    geometry::Affine,
    registration::{BINS, GreyScale, HEAD_RIM_MM, Level, Template},
    volume::RawVolume,
};

/// Spacing at which template and scan are compared, mm.
const WORK_MM: f64 = 2.0;
/// The curve is smoothed by a Gaussian of this standard deviation, bins.
const SMOOTH_BINS: f64 = 1.0;

/// With a lower correlation the contrast is foreign. Measured: T1 0.45 to 0.66, FLAIR 0.33 to 0.49,
/// T2 -0.25 to 0.18.
const MIN_CORRELATION: f64 = 0.25;

/// How the intensities of a scan become those of the template.
#[derive(Debug, Clone)]
pub struct Contrast {
    scale: GreyScale,
    /// The template's intensity for each bin of the scan's.
    curve: [f32; BINS],
    /// Pearson's correlation of the two intensities inside the brain, in [-1, 1].
    correlation: f64,
}

impl Contrast {
    /// The contrast of an aligned scan; `to_scan` maps the template's world to the scan's. `None`
    /// if the scan has no contrast.
    pub fn of(scan: &RawVolume, template: &Template, to_scan: &Affine) -> Option<Self> {
        let scale = GreyScale::of(scan)?;
        let level = Level::new(scan, template, &scale, WORK_MM, HEAD_RIM_MM);

        let mut sums = [(0.0, 0.0); BINS];
        let mut moments = Moments::default();
        for (template, scan) in level.pairs(to_scan) {
            let (bin, template) = ((scan.round() as usize).min(BINS - 1), f64::from(template));
            sums[bin] = (sums[bin].0 + 1.0, sums[bin].1 + template);
            if template > 0.0 {
                moments.add(template, f64::from(scan));
            }
        }
        Some(Self { scale, curve: smoothed(&sums), correlation: moments.correlation() })
    }

    /// Whether the tissues have another order of brightness than in the template, as in a T2.
    pub fn is_foreign(&self) -> bool {
        self.correlation < MIN_CORRELATION
    }

    /// The scan with the intensities of the template.
    pub fn applied(&self, scan: &RawVolume) -> RawVolume {
        let value = |&voxel: &f32| {
            let place = self.scale.in_bins(voxel);
            let bin = (place as usize).min(BINS - 2);
            let share = place - bin as f32;
            self.curve[bin] + share * (self.curve[bin + 1] - self.curve[bin])
        };
        RawVolume { voxels: scan.voxels.par_iter().map(value).collect(), ..*scan }
    }
}

/// The mean of each bin's values, smoothed over the bins around it. Intensities that do not occur
/// in or near the brain count as dark.
fn smoothed(sums: &[(f64, f64); BINS]) -> [f32; BINS] {
    let mut curve = [0.0; BINS];
    for (bin, value) in curve.iter_mut().enumerate() {
        let mean_of = |(other, &(n, sum)): (usize, &(f64, f64))| {
            let apart = (bin as f64 - other as f64) / SMOOTH_BINS;
            let weight = (-0.5 * apart * apart).exp();
            (weight, weight * sum / f64::max(n, 1.0))
        };
        let parts = sums.iter().enumerate().map(mean_of);
        let (weight, sum) = parts.fold((0.0, 0.0), |all, part| (all.0 + part.0, all.1 + part.1));
        *value = (sum / weight) as f32;
    }
    curve
}

/// Sums for Pearson's correlation of x and y.
#[derive(Default)]
struct Moments {
    n: f64,
    x: f64,
    y: f64,
    xx: f64,
    yy: f64,
    xy: f64,
}

impl Moments {
    fn add(&mut self, x: f64, y: f64) {
        self.n += 1.0;
        self.x += x;
        self.y += y;
        self.xx += x * x;
        self.yy += y * y;
        self.xy += x * y;
    }

    fn correlation(&self) -> f64 {
        let Self { n, x, y, xx, yy, xy } = self;
        let spread = (n * xx - x * x) * (n * yy - y * y);
        if spread > 0.0 { (n * xy - x * y) / spread.sqrt() } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::{
        geometry::{Shape3, WorldPoint},
        projection::Normal,
    };

    /// A ball of three shells, `[white, grey, fluid]` from the inside, in air.
    fn shells([white, grey, fluid]: [f32; 3]) -> RawVolume {
        let shape = Shape3([44, 50, 40]);
        let affine = Affine::scaling(2.0, WorldPoint([-43.0, -49.0, -39.0])).unwrap();
        let mut random = Normal::new(3);
        let value = |offset: usize| {
            let place = affine.apply(shape.voxel(offset).map(|v| v as f64));
            let radius = place.iter().map(|v| v * v).sum::<f64>().sqrt();
            match radius {
                r if r < 20.0 => white,
                r if r < 30.0 => grey,
                r if r < 34.0 => fluid,
                _ => 0.0,
            }
        };
        let values = (0..shape.n_voxels()).map(value);
        let voxels = values.map(|v| if v > 0.0 { v + random.next() as f32 } else { v }).collect();
        RawVolume { shape, voxels, affine }
    }

    #[test]
    fn a_t2_becomes_a_t1_and_a_t1_stays_one() {
        let template = Template::new(shells([200.0, 120.0, 40.0]));
        let identity = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        for (tissues, is_foreign) in [([70.0, 110.0, 220.0], true), ([180.0, 120.0, 50.0], false)] {
            let scan = shells(tissues);
            let contrast = Contrast::of(&scan, &template, &identity).unwrap();
            assert_eq!(contrast.is_foreign(), is_foreign, "{}", contrast.correlation);
            let like_t1 = contrast.applied(&scan);
            let at = |x: usize| like_t1.voxels[scan.shape.offset([x, 25, 20])];
            // Middle, grey matter, fluid, air.
            let [white, grey, fluid, air] = [22, 34, 37, 43].map(at);
            assert!(white > grey + 3.0 && grey > fluid + 3.0, "{white} {grey} {fluid}");
            assert!(air < grey, "{air}");
        }
    }

    #[test]
    fn without_contrast_there_is_none() {
        let template = Template::new(shells([200.0, 120.0, 40.0]));
        let mut scan = shells([1.0; 3]);
        scan.voxels.fill(5.0);
        let identity = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        assert!(Contrast::of(&scan, &template, &identity).is_none());
    }
}
