//! Lesions found against false regions while the threshold of a map falls (free-response ROC,
//! Bunch et al. 1977).
//!
//! Regions are those of [`mask::regions_above`](crate::numeric::mask::regions_above). As the
//! threshold falls, regions only grow and join. So one pass over the voxels, brightest first, gives
//! the counts at all thresholds (union-find); a test compares it with separate searches.

use rayon::prelude::*;

use crate::numeric::{geometry::Shape3, mask::Region};

/// Smallest region that counts, mm^3.
pub const MIN_REGION_MM3: f64 = 30.0;

/// What the curve needs of one scan.
#[derive(Debug, Clone, Copy)]
pub struct FrocScan<'a> {
    /// Extents of the scan's grid.
    pub shape: Shape3,
    /// Fewest voxels of a region that counts.
    pub min_voxels: usize,
    /// Positions in memory of the voxels of the brain.
    pub voxels: &'a [u32],
    /// Map value of each of these voxels.
    pub values: &'a [f32],
    /// Regions that should be found.
    pub lesions: &'a [Region],
    /// Regions that look like lesions but are normal.
    pub normal: &'a [Region],
}

/// The counts of one scan at each threshold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FrocCounts {
    /// Regions that touch neither a lesion nor a normal hyperintensity.
    pub n_false: Vec<usize>,
    /// Regions that touch a normal hyperintensity and no lesion.
    pub n_on_normal: Vec<usize>,
    /// For each lesion, the position of the first threshold that finds it. The later ones find it,
    /// too.
    pub found_at: Vec<Option<usize>>,
}

/// The fewest voxels of at least [`MIN_REGION_MM3`].
pub fn min_region_voxels(voxel_mm3: f64) -> usize {
    // A voxel of 1 mm^3 whose affine is rounded still takes 30.
    (MIN_REGION_MM3 / voxel_mm3 - 1e-6).ceil().max(1.0) as usize
}

/// Counts the regions of voxels above each of the `thresholds`, which fall, in each scan.
pub fn counts(scans: &[FrocScan<'_>], thresholds: &[f32]) -> Vec<FrocCounts> {
    scans.par_iter().map(|scan| count_regions(scan, thresholds)).collect()
}

fn count_regions(scan: &FrocScan<'_>, thresholds: &[f32]) -> FrocCounts {
    let lowest = thresholds.last().copied().unwrap_or(f32::INFINITY);
    let above = scan.voxels.iter().zip(scan.values).filter(|(_, value)| **value > lowest);
    let mut above: Vec<(f32, u32)> = above.map(|(&voxel, &value)| (value, voxel)).collect();
    above.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));

    let mut growing = Growing::new(scan, &above);
    let mut counts = FrocCounts::default();
    let mut next = 0;
    for (index, &threshold) in thresholds.iter().enumerate() {
        growing.threshold = index;
        while above.get(next).is_some_and(|(value, _)| *value > threshold) {
            growing.open(next);
            next += 1;
        }
        counts.n_false.push(growing.n_false);
        counts.n_on_normal.push(growing.n_on_normal);
    }
    FrocCounts { found_at: growing.found_at, ..counts }
}

/// A connected region.
#[derive(Debug, Clone, Default)]
struct Part {
    n_voxels: usize,
    is_on_lesion: bool,
    is_on_normal: bool,
    /// Lesions that it touches, while it is too small to find them.
    lesions: Vec<u32>,
}

const NONE: u32 = u32::MAX;

/// The regions of the voxels that were opened so far. Voxels have numbers: their places in the
/// order of falling values.
struct Growing<'a> {
    shape: Shape3,
    min_voxels: usize,
    above: &'a [(f32, u32)],
    /// Number of each voxel of the grid, or [`NONE`]. It is open if the number was opened.
    number_of: Vec<u32>,
    /// Number of another voxel of the region; that of the voxel itself for one voxel per region.
    parents: Vec<u32>,
    /// The regions, at the number of the voxel without another parent.
    parts: Vec<Part>,
    /// Position of the current threshold.
    threshold: usize,
    n_false: usize,
    n_on_normal: usize,
    found_at: Vec<Option<usize>>,
}

impl<'a> Growing<'a> {
    fn new(scan: &FrocScan<'_>, above: &'a [(f32, u32)]) -> Self {
        let mut number_of = vec![NONE; scan.shape.n_voxels()];
        for (number, &(_, voxel)) in above.iter().enumerate() {
            number_of[voxel as usize] = number as u32;
        }

        let mut parts = vec![Part { n_voxels: 1, ..Part::default() }; above.len()];
        let number = |voxel: usize| (number_of[voxel] != NONE).then_some(number_of[voxel] as usize);
        for number in scan.normal.iter().flatten().filter_map(|&voxel| number(voxel)) {
            parts[number].is_on_normal = true;
        }
        for (lesion, region) in scan.lesions.iter().enumerate() {
            for number in region.iter().filter_map(|&voxel| number(voxel)) {
                parts[number].is_on_lesion = true;
                parts[number].lesions.push(lesion as u32);
            }
        }

        Self {
            shape: scan.shape,
            min_voxels: scan.min_voxels,
            above,
            number_of,
            parents: (0..above.len() as u32).collect(),
            parts,
            threshold: 0,
            n_false: 0,
            n_on_normal: 0,
            found_at: vec![None; scan.lesions.len()],
        }
    }

    /// Opens the voxel with a number. All voxels with lower numbers must be open.
    fn open(&mut self, number: usize) {
        self.count(number);
        let voxel = self.shape.voxel(self.above[number].1 as usize);
        for neighbour in self.shape.around(voxel, [1; 3]) {
            let other = self.number_of[self.shape.offset(neighbour)];
            if (other as usize) < number {
                self.join(number, other as usize);
            }
        }
    }

    fn root(&mut self, number: usize) -> usize {
        let mut at = number;
        while self.parents[at] as usize != at {
            // Halves the way for later calls.
            self.parents[at] = self.parents[self.parents[at] as usize];
            at = self.parents[at] as usize;
        }
        at
    }

    fn join(&mut self, one: usize, other: usize) {
        let (one, other) = (self.root(one), self.root(other));
        if one == other {
            return;
        }
        for root in [one, other] {
            if let Some(n) = self.tally(root) {
                *n -= 1;
            }
        }

        let is_larger = self.parts[one].n_voxels >= self.parts[other].n_voxels;
        let (kept, joined) = if is_larger { (one, other) } else { (other, one) };
        self.parents[joined] = kept as u32;
        let joined = std::mem::take(&mut self.parts[joined]);
        let part = &mut self.parts[kept];
        part.n_voxels += joined.n_voxels;
        part.is_on_lesion |= joined.is_on_lesion;
        part.is_on_normal |= joined.is_on_normal;
        part.lesions.extend(joined.lesions);
        self.count(kept);
    }

    /// Counts a region that is new or has grown. If it is large enough, its lesions are found.
    fn count(&mut self, root: usize) {
        if let Some(n) = self.tally(root) {
            *n += 1;
        }
        let part = &mut self.parts[root];
        if part.n_voxels >= self.min_voxels {
            for lesion in part.lesions.drain(..) {
                self.found_at[lesion as usize].get_or_insert(self.threshold);
            }
        }
    }

    /// The count that a region belongs to, if it belongs to one.
    fn tally(&mut self, root: usize) -> Option<&mut usize> {
        let part = &self.parts[root];
        if part.n_voxels < self.min_voxels || part.is_on_lesion {
            return None;
        }
        Some(if part.is_on_normal { &mut self.n_on_normal } else { &mut self.n_false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::mask::regions_above;
    use proptest::prelude::*;

    fn whole(shape: Shape3) -> Vec<u32> {
        (0..shape.n_voxels() as u32).collect()
    }

    #[test]
    fn a_curve_worked_by_hand() {
        // A row of voxels. Lesions: 1 and 2, and 9. Voxel 6 is a normal hyperintensity.
        let values = [0.0, 9.0, 1.0, 0.0, 7.0, 0.0, 5.0, 5.0, 0.0, 3.0, 3.0, 2.0];
        let shape = Shape3([12, 1, 1]);
        let scan = FrocScan {
            shape,
            min_voxels: 1,
            voxels: &whole(shape),
            values: &values,
            lesions: &[vec![1, 2], vec![9]],
            normal: &[vec![6]],
        };
        // Above 8: voxel 1. Above 6: 4 as well, a false region. Above 4: 6 and 7, on the normal
        // one. Above 2.5: 9 and 10. Above 0: 11 joins these, and 2 joins voxel 1.
        let counts = count_regions(&scan, &[8.0, 6.0, 4.0, 2.5, 0.0]);
        let expected = FrocCounts {
            n_false: vec![0, 1, 1, 1, 1],
            n_on_normal: vec![0, 0, 1, 1, 1],
            found_at: vec![Some(0), Some(3)],
        };
        assert_eq!(counts, expected);

        // With two voxels, voxel 1 alone is too small, and voxel 4 always is.
        let counts = count_regions(&FrocScan { min_voxels: 2, ..scan }, &[8.0, 6.0, 4.0, 2.5, 0.0]);
        assert_eq!(counts.n_false, [0; 5]);
        assert_eq!(counts.n_on_normal, [0, 0, 1, 1, 1]);
        assert_eq!(counts.found_at, [Some(4), Some(3)]);
    }

    #[test]
    fn a_false_region_that_reaches_a_lesion_is_no_longer_false() {
        let shape = Shape3([5, 1, 1]);
        let scan = FrocScan {
            shape,
            min_voxels: 1,
            voxels: &whole(shape),
            values: &[4.0, 3.0, 1.0, 0.0, 2.0],
            lesions: &[vec![2]],
            normal: &[],
        };
        let counts = count_regions(&scan, &[2.5, 1.5, 0.5]);
        assert_eq!(counts.n_false, [1, 2, 1]);
        assert_eq!(counts.found_at, [Some(2)]);
    }

    #[test]
    fn a_region_of_thirty_cubic_millimetres_counts() {
        assert_eq!([1.0, 0.999_999_99, 8.0, 10.0, 100.0].map(min_region_voxels), [30, 30, 4, 3, 1]);
    }

    proptest! {
        #[test]
        fn the_counts_are_those_of_a_search_at_each_threshold(
            values in prop::collection::vec(0_u8..8, 5 * 4 * 3),
            lesions in prop::collection::btree_set(0_usize..60, 1..6),
            normal in prop::collection::btree_set(0_usize..60, 0..4),
            min_voxels in 1_usize..5,
        ) {
            let shape = Shape3([5, 4, 3]);
            let values: Vec<f32> = values.into_iter().map(f32::from).collect();
            let lesions: Vec<Region> = lesions.into_iter().map(|voxel| vec![voxel]).collect();
            let normal: Vec<Region> = normal.into_iter().map(|voxel| vec![voxel]).collect();
            let thresholds = [6.0, 4.5, 3.0, 1.0];
            let (voxels, values) = (whole(shape), &values[..]);
            let (voxels, lesions, normal) = (&voxels[..], &lesions[..], &normal[..]);
            let scan = FrocScan { shape, min_voxels, voxels, values, lesions, normal };
            let counts = count_regions(&scan, &thresholds);

            for (index, &threshold) in thresholds.iter().enumerate() {
                let regions = regions_above(values, &[true; 60], shape, threshold, min_voxels);
                let meets = |region: &Region, others: &[Region]| {
                    others.iter().flatten().any(|voxel| region.contains(voxel))
                };
                let off_lesions = regions.iter().filter(|region| !meets(region, lesions));
                let on_normal = off_lesions.clone().filter(|region| meets(region, normal)).count();
                prop_assert_eq!(counts.n_on_normal[index], on_normal);
                prop_assert_eq!(counts.n_false[index], off_lesions.count() - on_normal);
                for (lesion, found_at) in lesions.iter().zip(&counts.found_at) {
                    let is_found = regions.iter().any(|region| region.contains(&lesion[0]));
                    prop_assert_eq!(found_at.is_some_and(|first| first <= index), is_found);
                }
            }
        }
    }
}
