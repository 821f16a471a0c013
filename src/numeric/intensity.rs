//! Which value does a tissue have? In MRI the value depends on sequence, coil and scanner.
//!
//! Standardisation by landmarks (Nyúl, Udupa and Zhang 2000, "New variants of a method of MRI scale
//! standardization"): percentiles of a scan's brain are mapped to the values that they have on
//! average in the scans of a cohort. Values between percentiles are mapped linearly.
//!
//! There are three deliberate differences. Values are shares of the white level, so that the mean
//! over scans does not depend on the scale of any scan. 0 stays 0, because it is background. Above
//! the last landmark the slope is that of all landmarks, not that of the last two, because a lesion
//! may be between those.

use super::{
    scoring::quantile,
    volume::{RawMask, RawVolume},
};

/// Percentiles that serve as landmarks. None is above 80: a lesion that is brighter than all
/// healthy tissue and fills a fifth of the brain begins there. Measured in docs/quality.md.
pub const PERCENTILES: [f64; 8] = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0];

/// The values that a scan's landmarks are mapped to.
///
/// At least two percentiles, strictly increasing, within (0, 100), and as many values, strictly
/// increasing, within (0, 1].
#[derive(Debug, Clone, PartialEq)]
pub struct Landmarks {
    percentiles: Vec<f64>,
    values: Vec<f64>,
}

impl Landmarks {
    /// Checks percentiles and values. The error gives the reason in words.
    pub fn new(percentiles: Vec<f64>, values: Vec<f64>) -> Result<Self, String> {
        check_percentiles(&percentiles)?;
        if values.len() != percentiles.len() {
            return Err(format!("{} values for {} percentiles", values.len(), percentiles.len()));
        }
        let is_in_range = values.iter().all(|value| *value > 0.0 && *value <= 1.0);
        if !is_in_range || !is_increasing(&values) {
            return Err(format!("values {values:?}; rising ones above 0 and at most 1 are needed"));
        }
        Ok(Self { percentiles, values })
    }

    /// The mean over scans of their landmarks. `scans` holds what [`of_scan`] finds, as shares of
    /// each scan's white level. Rounded to a millionth, which a file stores without loss.
    ///
    /// # Errors
    /// The reason in words, if there are no scans, or if a mean does not exceed the one before.
    pub fn mean_of(percentiles: &[f64], scans: &[Vec<f64>]) -> Result<Self, String> {
        if scans.is_empty() {
            return Err("no scans".to_owned());
        }
        let mean = |index: usize| {
            let sum: f64 = scans.iter().map(|scan| scan[index]).sum();
            (1e6 * sum / scans.len() as f64).round() / 1e6
        };
        Self::new(percentiles.to_vec(), (0..percentiles.len()).map(mean).collect())
    }

    /// The percentiles, strictly increasing, within (0, 100).
    pub fn percentiles(&self) -> &[f64] {
        &self.percentiles
    }

    /// Their values, as shares of the white level.
    pub fn values(&self) -> &[f64] {
        &self.values
    }
}

/// Checks that these can be landmarks. The error gives the reason in words.
pub fn check_percentiles(percentiles: &[f64]) -> Result<(), String> {
    let is_in_range = percentiles.iter().all(|p| *p > 0.0 && *p < 100.0);
    if percentiles.len() < 2 || !is_in_range || !is_increasing(percentiles) {
        return Err(format!(
            "percentiles {percentiles:?}; two or more, rising, between 0 and 100, are needed"
        ));
    }
    Ok(())
}

fn is_increasing(values: &[f64]) -> bool {
    values.windows(2).all(|pair| pair[0] < pair[1])
}

/// Percentiles of the brain's intensities, in the scan's units, by linear interpolation. One for
/// each of `percentiles`; none for an empty brain.
pub fn of_scan(raw: &RawVolume, brain: &RawMask, percentiles: &[f64]) -> Vec<f64> {
    let mut inside = brain.values(&raw.voxels);
    if inside.is_empty() {
        return Vec::new();
    }
    percentiles.iter().map(|percentile| quantile(&mut inside, percentile / 100.0)).collect()
}

/// How the intensities of one scan become values in [0, 1]: monotone, 0 to 0.
#[derive(Debug, Clone, PartialEq)]
pub enum Scale {
    /// Divided by the white level.
    Plain {
        /// Intensity that becomes 1.
        white: f64,
    },
    /// Linear between the knots.
    Standard {
        /// Intensity and value, both strictly increasing, from (0, 0) on; at least three.
        knots: Vec<[f64; 2]>,
        /// Slope above the last knot.
        beyond: f64,
    },
}

impl Scale {
    /// Maps a scan's landmarks, as [`of_scan`] found them, to those of its cohort.
    ///
    /// Landmarks at one intensity, as in a scan with few distinct values, become one knot at the
    /// mean of their values. Landmarks at 0 and below are left out. `None` if fewer than two are
    /// left, because two points are needed to map one shape to another.
    pub fn standard(own: &[f64], landmarks: &Landmarks) -> Option<Self> {
        let mut knots = vec![[0.0, 0.0]];
        let pairs: Vec<[f64; 2]> =
            own.iter().zip(&landmarks.values).map(|(own, value)| [*own, *value]).collect();
        for level in pairs.chunk_by(|one, next| one[0] == next[0]) {
            let value = level.iter().map(|pair| pair[1]).sum::<f64>() / level.len() as f64;
            if level[0][0] > 0.0 && level[0][0].is_finite() {
                knots.push([level[0][0], value]);
            }
        }
        let [_, first, .., last] = knots[..] else { return None };
        let beyond = (last[1] - first[1]) / (last[0] - first[0]);
        beyond.is_finite().then_some(Self::Standard { knots, beyond })
    }

    /// The value of an intensity, in [0, 1].
    #[inline]
    pub fn value(&self, intensity: f64) -> f64 {
        let value = match self {
            Self::Plain { white } => intensity / white,
            Self::Standard { knots, beyond } => {
                let upper = knots.partition_point(|knot| knot[0] < intensity);
                match (upper.checked_sub(1).map(|lower| knots[lower]), knots.get(upper)) {
                    (None, _) => 0.0,
                    (Some([at, value]), None) => value + beyond * (intensity - at),
                    (Some([at, value]), Some([next_at, next])) => {
                        value + (next - value) * ((intensity - at) / (next_at - at))
                    }
                }
            }
        };

        value.clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::{
        geometry::{Affine, Shape3},
        preprocess::white_level,
        projection::Normal,
    };

    /// A brain of three tissues like a T1: cerebrospinal fluid, grey and white matter, each with
    /// some spread.
    fn scan(seed: u64) -> (RawVolume, RawMask) {
        let shape = Shape3([23, 29, 31]);
        let affine =
            Affine::new([[2.0, 0.1, 0.0, 5.0], [-0.1, 2.0, 0.0, 6.0], [0.0, 0.0, 2.0, 7.0]])
                .unwrap();
        let mut random = Normal::new(seed);
        let voxels = (0..shape.n_voxels()).map(|offset| {
            let tissue = [40.0, 90.0, 90.0, 90.0, 130.0, 130.0, 130.0][offset % 7];
            (tissue + 6.0 * random.next()).max(1.0) as f32
        });
        let voxels = voxels.collect();
        let inside = (0..shape.n_voxels()).map(|offset| offset % 3 != 0).collect();
        (RawVolume { shape, voxels, affine }, RawMask { shape, inside, affine })
    }

    fn landmarks_of(scans: &[(RawVolume, RawMask)]) -> Landmarks {
        let shares = |(raw, brain): &(RawVolume, RawMask)| {
            let white = white_level(raw, brain).unwrap();
            of_scan(raw, brain, &PERCENTILES).iter().map(|value| value / white).collect()
        };
        Landmarks::mean_of(&PERCENTILES, &scans.iter().map(shares).collect::<Vec<_>>()).unwrap()
    }

    fn scale_of((raw, brain): &(RawVolume, RawMask), landmarks: &Landmarks) -> Scale {
        Scale::standard(&of_scan(raw, brain, landmarks.percentiles()), landmarks).unwrap()
    }

    #[test]
    fn a_scale_worked_by_hand() {
        let landmarks = Landmarks::new(vec![25.0, 50.0, 75.0], vec![0.2, 0.4, 0.5]).unwrap();
        let scale = Scale::standard(&[10.0, 30.0, 40.0], &landmarks).unwrap();
        // Above the last landmark: (0.5 - 0.2) / (40 - 10) for each step.
        for (intensity, value) in
            [(0.0, 0.0), (-9.0, 0.0), (5.0, 0.1), (10.0, 0.2), (20.0, 0.3), (35.0, 0.45)]
                .into_iter()
                .chain([(40.0, 0.5), (60.0, 0.7), (95.0, 1.0), (f64::INFINITY, 1.0)])
        {
            assert!((scale.value(intensity) - value).abs() < 1e-12, "{intensity}: {scale:?}");
        }
        assert_eq!(Scale::Plain { white: 50.0 }.value(20.0), 0.4);
        let own = of_scan(&scan(1).0, &scan(1).1, &[0.0, 100.0]);
        assert!(own[0] >= 1.0 && own[1] > 130.0);
    }

    #[test]
    fn a_monotone_distortion_of_a_scan_is_undone() {
        let plain = scan(1);
        let landmarks = landmarks_of(&[scan(2), scan(3), scan(4)]);
        let values = |scan: &(RawVolume, RawMask)| {
            let scale = scale_of(scan, &landmarks);
            scan.0.voxels.iter().map(|v| scale.value(f64::from(*v))).collect::<Vec<f64>>()
        };
        let straight = values(&plain);
        for (gain, gamma) in [(0.01, 1.0), (70.0, 1.0), (1.0, 0.6), (1.0, 1.6)] {
            let mut bent = plain.clone();
            bent.0.voxels.iter_mut().for_each(|v| *v = gain * v.powf(gamma));
            let mut furthest: f64 = 0.0;
            for (one, other) in straight.iter().zip(values(&bent)) {
                // Only between the landmarks: beyond them a bent scale stays bent.
                if (landmarks.values[0]..landmarks.values[7]).contains(one) {
                    furthest = furthest.max((one - other).abs());
                }
            }
            // A gain is undone to the last digits of f32. Of a bent scale the bend between two
            // landmarks remains. It is largest between fluid and grey matter.
            let allowed = if gamma == 1.0 { 1e-5 } else { 0.06 };
            assert!(furthest < allowed, "{gain} {gamma}: {furthest}");
        }
    }

    #[test]
    fn a_large_lesion_moves_the_values_of_healthy_tissue_by_less_than_a_stated_bound() {
        let healthy = scan(1);
        let landmarks = landmarks_of(&[scan(2), scan(3), scan(4)]);
        // The middles of grey and white matter. Not of fluid: a lesion that is darker than fluid
        // and fills a tenth of the voxels replaces the lowest landmark.
        let tissues = [90.0, 130.0];
        let value = |scan: &(RawVolume, RawMask)| {
            let scale = scale_of(scan, &landmarks);
            tissues.map(|tissue| scale.value(tissue))
        };
        let without = value(&healthy);
        for (lesion, share, bound) in
            [(250.0, 10, 0.03), (250.0, 5, 0.06), (20.0, 10, 0.03), (60.0, 5, 0.05)]
        {
            let mut ill = healthy.clone();
            let n_voxels = ill.0.voxels.len();
            let mut random = Normal::new(9);
            for voxel in &mut ill.0.voxels[..n_voxels / share] {
                *voxel = (lesion + 10.0 * random.next()).max(1.0) as f32;
            }
            for (tissue, (one, other)) in tissues.iter().zip(without.iter().zip(value(&ill))) {
                let shift = (one - other).abs();
                assert!(shift < bound, "{lesion} in 1/{share}, tissue {tissue}: {shift}");
            }
            // With the white level alone, the bright lesion would darken all tissue to half.
            let white = |(raw, brain): &(RawVolume, RawMask)| white_level(raw, brain).unwrap();
            assert!(lesion < 130.0 || white(&healthy) / white(&ill) < 0.65);
        }
    }

    #[test]
    fn few_distinct_values_make_fewer_knots_and_a_constant_scan_has_no_scale() {
        let landmarks = Landmarks::new(vec![25.0, 50.0, 75.0], vec![0.2, 0.4, 0.5]).unwrap();
        let scale = Scale::standard(&[7.0, 7.0, 9.0], &landmarks).unwrap();
        assert!((scale.value(7.0) - 0.3).abs() < 1e-12 && (scale.value(9.0) - 0.5).abs() < 1e-12);
        assert_eq!(Scale::standard(&[7.0; 3], &landmarks), None);
        assert_eq!(Scale::standard(&[-3.0, 0.0, 9.0], &landmarks), None, "one above 0");
        assert_eq!(Scale::standard(&[], &landmarks), None, "no brain");
        let tiny = f64::from(f32::from_bits(1));
        let scale = Scale::standard(&[tiny, 2.0 * tiny, f64::from(f32::MAX)], &landmarks).unwrap();
        let mut last = 0.0;
        for intensity in [tiny, 1.5 * tiny, 1.0, 1e38, 1e300] {
            let value = scale.value(intensity);
            assert!((last..=1.0).contains(&value), "{intensity}: {value}");
            last = value;
        }
    }

    #[test]
    fn landmarks_rise_strictly_or_are_none() {
        let new = |p: &[f64], v: &[f64]| Landmarks::new(p.to_vec(), v.to_vec());
        assert!(new(&[10.0, 90.0], &[0.1, 1.0]).is_ok());
        for (percentiles, values) in [
            (&[10.0, 10.0], &[0.1, 0.2]),
            (&[10.0, 100.0], &[0.1, 0.2]),
            (&[f64::NAN, 90.0], &[0.1, 0.2]),
            (&[10.0, 90.0], &[0.2, 0.2]),
            (&[10.0, 90.0], &[0.0, 0.2]),
            (&[10.0, 90.0], &[0.5, 1.1]),
            (&[10.0, 90.0], &[0.5, f64::NAN]),
        ] {
            assert!(new(percentiles, values).is_err(), "{percentiles:?} {values:?}");
        }
        assert!(new(&[10.0, 90.0], &[0.5]).unwrap_err().starts_with("1 values for 2"));
        assert!(Landmarks::mean_of(&[10.0, 90.0], &[]).is_err());
        let mean = Landmarks::mean_of(&[10.0, 90.0], &[vec![0.2, 0.6], vec![0.3, 0.9]]).unwrap();
        assert_eq!(mean.values(), [0.25, 0.75]);
    }
}
