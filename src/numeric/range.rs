//! What the scans of a window have near a place, and how far a scan lies beyond it (ours;
//! docs/quality/evidence.md).

use half::f16;
use rayon::prelude::*;

use super::{fine::FineVolume, geometry::Shape3, scoring::Fraction};

/// How many of the others may lie farther out than the limit of the range. One odd scan then does
/// not widen the range.
const OUTER: Fraction = Fraction::new(0.2).expect("a share");

/// Largest rank of the limit. It bounds the memory of [`RangeBuilder`].
const MAX_RANK: usize = 8;

/// A value as a number whose order is that of the values. [`NONE`] is below all.
type Key = i16;

const NONE: Key = Key::MIN;

fn key(value: f16) -> Key {
    let bits = value.to_bits().cast_signed();
    // Negative floats are stored by size and sign; here they become complements.
    if bits < 0 { bits ^ Key::MAX } else { bits }
}

fn value(key: Key) -> f32 {
    let bits = if key < 0 { key ^ Key::MAX } else { key };
    f16::from_bits(bits.cast_unsigned()).to_f32()
}

/// For each cell of the grid, the highest and the lowest value within one cell along each axis, by
/// the scans of one patient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extremes {
    /// Highest values.
    highest: Vec<Key>,
    /// Highest of the negated values, so that one code serves both ends.
    lowest: Vec<Key>,
}

impl Extremes {
    /// The extremes of one scan.
    pub fn of(scan: &FineVolume) -> Self {
        let shape = scan.foreground.shape;
        let near = |sign: f32| {
            let mut keys = vec![NONE; shape.n_voxels()];
            for (&cell, value) in scan.foreground.cells.iter().zip(&scan.values) {
                keys[cell as usize] = key(f16::from_f32(sign * value.to_f32()));
            }
            highest_near(&keys, shape)
        };
        let (highest, lowest) = rayon::join(|| near(1.0), || near(-1.0));
        Self { highest, lowest }
    }

    /// The extremes of both: of several scans of one patient.
    pub fn joined(mut self, other: &Self) -> Self {
        for (own, other) in [(&mut self.highest, &other.highest), (&mut self.lowest, &other.lowest)]
        {
            own.iter_mut().zip(other).for_each(|(own, &other)| *own = other.max(*own));
        }
        self
    }
}

/// The highest key among each cell and its six neighbours.
fn highest_near(keys: &[Key], shape: Shape3) -> Vec<Key> {
    let [nx, ny, _] = shape.0;
    let (row, plane) = (nx, nx * ny);
    let mut near = keys.to_vec();
    near.par_chunks_mut(plane.max(1)).enumerate().for_each(|(z, near)| {
        let start = z * plane;
        let mut raise = |from: usize, to: usize, n: usize| {
            let neighbours = &keys[start + from..start + from + n];
            near[to..to + n]
                .iter_mut()
                .zip(neighbours)
                .for_each(|(own, &key)| *own = key.max(*own));
        };
        if plane > row {
            raise(row, 0, plane - row);
            raise(0, row, plane - row);
        }
        for y in (0..plane).step_by(row.max(1)) {
            raise(y + 1, y, row - 1);
            raise(y, y + 1, row - 1);
        }
        for other in [start.checked_sub(plane), Some(start + plane)].into_iter().flatten() {
            let others = keys.get(other..other + plane).unwrap_or_default();
            near.iter_mut().zip(others).for_each(|(own, &key)| *own = key.max(*own));
        }
    });
    near
}

/// Collects the range of a window, patient by patient.
pub struct RangeBuilder {
    shape: Shape3,
    rank: usize,
    highest: Levels,
    lowest: Levels,
}

/// The highest keys of each cell, in descending order: one plane of keys per place in that order.
struct Levels(Vec<Vec<Key>>);

impl Levels {
    fn add(&mut self, keys: &[Key]) {
        let n = keys.len().div_ceil(rayon::current_num_threads()).max(1);
        let mut planes: Vec<_> = self.0.iter_mut().map(|plane| plane.chunks_mut(n)).collect();
        let mut parts: Vec<(Vec<&mut [Key]>, &[Key])> = Vec::new();
        for keys in keys.chunks(n) {
            parts.push((planes.iter_mut().filter_map(Iterator::next).collect(), keys));
        }
        parts.into_par_iter().for_each(|(mut planes, keys)| {
            let mut sinking = keys.to_vec();
            for plane in &mut planes {
                for (kept, sinking) in plane.iter_mut().zip(&mut sinking) {
                    (*kept, *sinking) = ((*kept).max(*sinking), (*kept).min(*sinking));
                }
            }
        });
    }
}

impl RangeBuilder {
    /// For a window of `n_patients`, on a grid of this shape.
    pub fn new(shape: Shape3, n_patients: usize) -> Self {
        let rank = OUTER.of(n_patients.saturating_sub(1)).min(MAX_RANK);
        let levels = || Levels(vec![vec![NONE; shape.n_voxels()]; rank + 1]);
        Self { shape, rank, highest: levels(), lowest: levels() }
    }

    /// Adds the extremes of one patient. The order of the patients changes nothing.
    ///
    /// # Panics
    /// If they are of another grid.
    pub fn add(&mut self, patient: &Extremes) {
        assert_eq!(patient.highest.len(), self.shape.n_voxels(), "one grid for all scans");
        self.highest.add(&patient.highest);
        self.lowest.add(&patient.lowest);
    }

    /// The range of all patients that were added.
    pub fn finish(self) -> WindowRange {
        let limits = |Levels(mut planes): Levels| {
            let beyond = planes.swap_remove(self.rank);
            let at = planes.swap_remove(self.rank - 1);
            Limits { at, beyond }
        };
        WindowRange { highest: limits(self.highest), lowest: limits(self.lowest) }
    }
}

/// The limits of what the scans of a window have near each cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowRange {
    highest: Limits,
    lowest: Limits,
}

/// The keys at the rank of the limit, and at the next one, which is the limit for a patient who is
/// among the outermost.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Limits {
    at: Vec<Key>,
    beyond: Vec<Key>,
}

impl Limits {
    /// The limit of the other patients; `None` if too few have the cell.
    fn of_others(&self, cell: usize, own: Option<&[Key]>) -> Option<f32> {
        let is_outermost = own.is_some_and(|own| own[cell] >= self.at[cell]);
        let limit = if is_outermost { self.beyond[cell] } else { self.at[cell] };
        (limit != NONE).then(|| value(limit))
    }
}

impl WindowRange {
    /// For each cell of a scan, how far its value lies above or below the range of the other
    /// patients, in units of [`FineVolume::values`]. `own` are the extremes of the scan's own
    /// patient, if they are in the range.
    ///
    /// It is 0 where so few patients have the cell that the upper limit lies below the lower one.
    pub fn beyond(&self, scan: &FineVolume, own: Option<&Extremes>) -> Vec<f32> {
        let cells = scan.foreground.cells.par_iter().zip(&scan.values);
        let beyond = |(&cell, &value): (&u32, &f16)| {
            let value = value.to_f32();
            let limits = self.limits(cell as usize, own);
            limits.map_or(0.0, |[low, high]| (value - high).max(low - value).max(0.0))
        };
        cells.map(beyond).collect()
    }

    /// For each cell of a scan, whether too few of the other patients have it to say what is usual
    /// there. `own` is as in [`Self::beyond`].
    pub fn few_have(&self, scan: &FineVolume, own: Option<&Extremes>) -> Vec<bool> {
        let cells = scan.foreground.cells.par_iter();
        cells.map(|&cell| self.limits(cell as usize, own).is_none()).collect()
    }

    /// The lower and the upper limit of the other patients in a cell.
    fn limits(&self, cell: usize, own: Option<&Extremes>) -> Option<[f32; 2]> {
        let high = self.highest.of_others(cell, own.map(|own| &own.highest[..]))?;
        let low = -self.lowest.of_others(cell, own.map(|own| &own.lowest[..]))?;
        (low <= high).then_some([low, high])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::token::Foreground;
    use proptest::prelude::*;

    /// A scan of one row of cells.
    fn row(values: &[f32]) -> FineVolume {
        let cells: Vec<u32> = (0..values.len() as u32).collect();
        FineVolume {
            foreground: Foreground { shape: Shape3([values.len(), 1, 1]), cells },
            values: values.iter().map(|&value| f16::from_f32(value)).collect(),
            depths: vec![0; values.len()],
            cell_mm: 1.0,
        }
    }

    fn range(patients: &[Extremes], shape: Shape3) -> WindowRange {
        let mut builder = RangeBuilder::new(shape, patients.len());
        patients.iter().for_each(|patient| builder.add(patient));
        builder.finish()
    }

    #[test]
    fn a_value_is_compared_with_the_extremes_of_the_others_near_its_place() {
        let scans = [
            row(&[0.0, 0.0, 0.0, 9.0, 0.0]),
            row(&[1.0, 0.0, 0.0, 0.0, -2.0]),
            row(&[0.0, 0.0, 0.0, 0.0, 0.0]),
        ];
        let extremes = scans.each_ref().map(Extremes::of);
        let range = range(&extremes, scans[0].foreground.shape);
        let beyond = |index: usize| range.beyond(&scans[index], Some(&extremes[index]));
        // The highest of the others near the fourth cell is 0, and the lowest near the first.
        assert_eq!(beyond(0), [0.0, 0.0, 0.0, 9.0, 0.0]);
        assert_eq!(beyond(1), [1.0, 0.0, 0.0, 0.0, 2.0]);
        assert_eq!(beyond(2), [0.0; 5]);
        // A stranger is compared with all three.
        assert_eq!(
            range.beyond(&row(&[1.5, 1.0, 10.0, 10.0, -3.0]), None),
            [0.5, 0.0, 1.0, 1.0, 1.0]
        );
    }

    #[test]
    fn scans_of_one_patient_have_one_range_and_cells_without_others_no_limit() {
        let (one, other) = (row(&[0.0, 3.0]), row(&[0.0, 4.0]));
        let patient = Extremes::of(&one).joined(&Extremes::of(&other));
        let stranger = Extremes::of(&row(&[1.0]).in_shape(2));
        let range = range(&[patient.clone(), stranger], Shape3([2, 1, 1]));
        // The stranger has 1 at the first cell, which lies beside the second.
        assert_eq!(range.beyond(&other, Some(&patient)), [1.0, 3.0]);
        let alone = RangeBuilder::new(Shape3([2, 1, 1]), 1).finish();
        assert_eq!(alone.beyond(&other, None), [0.0, 0.0]);
    }

    impl FineVolume {
        fn in_shape(mut self, n: usize) -> Self {
            self.foreground.shape = Shape3([n, 1, 1]);
            self
        }
    }

    #[test]
    fn where_few_patients_have_a_cell_nothing_is_beyond_their_range() {
        // Of twelve patients five have the last cell. The third highest of these is the third
        // lowest, and for the outermost the limits cross.
        let scan = |n: u8| FineVolume {
            foreground: Foreground {
                shape: Shape3([3, 1, 1]),
                cells: if n < 5 { vec![0, 2] } else { vec![0] },
            },
            ..row(&[0.0, f32::from(n)][..if n < 5 { 2 } else { 1 }])
        };
        let scans: Vec<FineVolume> = (0..12).map(scan).collect();
        let extremes: Vec<Extremes> = scans.iter().map(Extremes::of).collect();
        let range = range(&extremes, Shape3([3, 1, 1]));
        for (scan, own) in scans.iter().zip(&extremes) {
            assert!(range.beyond(scan, Some(own)).iter().all(|&beyond| beyond == 0.0));
            let few_have = range.few_have(scan, Some(own));
            assert_eq!(few_have, [false, true][..few_have.len()]);
        }
    }

    #[test]
    fn an_outlier_does_not_widen_the_range_of_many() {
        let scans: Vec<FineVolume> = (0..12).map(|n| row(&[n as f32])).collect();
        let extremes: Vec<Extremes> = scans.iter().map(Extremes::of).collect();
        // A fifth of eleven others, rounded up, is 3: of 0 to 10 the third highest is 8.
        let range = range(&extremes, Shape3([1, 1, 1]));
        assert_eq!(range.beyond(&scans[11], Some(&extremes[11])), [3.0]);
        assert_eq!(range.beyond(&scans[0], Some(&extremes[0])), [3.0]);
        assert_eq!(range.beyond(&scans[5], Some(&extremes[5])), [0.0]);
    }

    proptest! {
        #[test]
        fn keys_keep_the_order_and_the_value(a in -60000.0_f32..60000.0, b in -60000.0_f32..60000.0) {
            let [a, b] = [a, b].map(f16::from_f32);
            prop_assert_eq!(value(key(a)), a.to_f32());
            prop_assert_eq!(key(a).cmp(&key(b)), a.to_f32().total_cmp(&b.to_f32()));
            prop_assert!(key(a) > NONE);
        }

        #[test]
        fn the_order_of_the_patients_changes_nothing(
            mut scans in prop::collection::vec(prop::collection::vec(-9.0_f32..9.0, 4), 2..14),
        ) {
            let shape = Shape3([4, 1, 1]);
            let of = |scans: &[Vec<f32>]| {
                let all: Vec<Extremes> = scans.iter().map(|own| Extremes::of(&row(own))).collect();
                range(&all, shape)
            };
            let forward = of(&scans);
            scans.reverse();
            prop_assert_eq!(forward, of(&scans));
        }
    }
}
