//! Binary morphology in millimetres, on grids with voxels of any shape.

use super::{geometry::Shape3, mask::regions};

/// The outside of a mask.
pub(super) fn not(mask: &[bool]) -> Vec<bool> {
    mask.iter().map(|inside| !inside).collect()
}

/// Morphology in millimetres. Places beyond the grid are neither inside nor outside.
pub struct Grid {
    /// Voxels along each axis.
    pub shape: Shape3,
    /// Distance between voxel centres along each axis, mm.
    pub spacing: [f64; 3],
}

impl Grid {
    /// All voxels within `mm` of the mask.
    pub(super) fn dilated(&self, mask: &[bool], mm: f64) -> Vec<bool> {
        self.distance_to(mask).into_iter().map(|distance| distance <= mm).collect()
    }

    /// All voxels of the mask that are more than `mm` from the outside.
    pub(super) fn eroded(&self, mask: &[bool], mm: f64) -> Vec<bool> {
        self.distance_to(&not(mask)).into_iter().map(|distance| distance > mm).collect()
    }

    /// The largest connected part; `None` of an empty mask.
    pub fn largest(&self, mask: &[bool]) -> Option<Vec<bool>> {
        let largest = regions(mask.to_vec(), self.shape, 1).into_iter().next()?;
        Some(self.only(&largest))
    }

    /// The mask and all voxels that it encloses, which cannot be reached from the ends of the grid.
    pub fn filled(&self, mask: &[bool]) -> Vec<bool> {
        let mut filled = vec![true; mask.len()];
        let is_at_end = |voxel: [usize; 3]| {
            (0..3).any(|axis| voxel[axis] == 0 || voxel[axis] + 1 == self.shape.0[axis])
        };
        let ends = (0..mask.len()).filter(|&offset| is_at_end(self.shape.voxel(offset)));
        let mut next: Vec<usize> = ends.filter(|&offset| !mask[offset]).collect();
        next.iter().for_each(|&offset| filled[offset] = false);

        // Only the front is kept, because the outside of a brain can be a hundred million voxels.
        while let Some(offset) = next.pop() {
            for neighbour in self.neighbours(offset) {
                if filled[neighbour] && !mask[neighbour] {
                    filled[neighbour] = false;
                    next.push(neighbour);
                }
            }
        }
        filled
    }

    /// The voxels that share a face with one.
    fn neighbours(&self, offset: usize) -> impl Iterator<Item = usize> {
        let (voxel, shape) = (self.shape.voxel(offset), self.shape.0);
        let strides = [1, shape[0], shape[0] * shape[1]];
        (0..3).flat_map(move |axis| {
            let before = (voxel[axis] > 0).then(|| offset - strides[axis]);
            let after = (voxel[axis] + 1 < shape[axis]).then(|| offset + strides[axis]);
            before.into_iter().chain(after)
        })
    }

    /// 95th percentile of the distance between the surfaces of two masks, mm: the larger of both
    /// directions. `None` if a mask is empty.
    ///
    /// The surface of a mask consists of its voxels that share a face with one outside, or with the
    /// end of the grid.
    pub fn surface_distance_95(&self, one: &[bool], other: &[bool]) -> Option<f64> {
        let surfaces = [self.surface(one), self.surface(other)];
        let directed = |from: &[bool], to: &[bool]| {
            let apart = self.distance_to(to).into_iter().zip(from).filter(|(_, is_on)| **is_on);
            let mut apart: Vec<f64> = apart.map(|(distance, _)| distance).collect();
            let last = apart.len().checked_sub(1)?;
            let at = (last as f64 * 0.95).round() as usize;
            Some(*apart.select_nth_unstable_by(at, f64::total_cmp).1)
        };
        let there = directed(&surfaces[0], &surfaces[1])?;
        let back = directed(&surfaces[1], &surfaces[0])?;
        Some(there.max(back))
    }

    fn surface(&self, mask: &[bool]) -> Vec<bool> {
        let n_inside =
            |offset| self.neighbours(offset).filter(|&neighbour| mask[neighbour]).count();
        (0..mask.len()).map(|offset| mask[offset] && n_inside(offset) < 6).collect()
    }

    fn only(&self, voxels: &[usize]) -> Vec<bool> {
        let mut mask = vec![false; self.shape.n_voxels()];
        voxels.iter().for_each(|&voxel| mask[voxel] = true);
        mask
    }

    /// Distance of each voxel centre to the nearest one in the mask, mm (Felzenszwalb and
    /// Huttenlocher 2012); infinite if the mask is empty.
    pub(super) fn distance_to(&self, mask: &[bool]) -> Vec<f64> {
        let start = |&inside: &bool| if inside { 0.0 } else { f64::INFINITY };
        let mut squares: Vec<f64> = mask.iter().map(start).collect();
        let [nx, ny, nz] = self.shape.0;
        let strides = [1, nx, nx * ny];
        let mut line = Line::default();

        for axis in 0..3 {
            let [a, b] = [(axis + 1) % 3, (axis + 2) % 3];
            for i in 0..[nx, ny, nz][a] {
                for j in 0..[nx, ny, nz][b] {
                    let start = i * strides[a] + j * strides[b];
                    let n = self.shape.0[axis];
                    line.transform(&mut squares, start, strides[axis], n, self.spacing[axis]);
                }
            }
        }

        squares.into_iter().map(f64::sqrt).collect()
    }
}

/// Buffers for one row of a distance transform.
#[derive(Default)]
struct Line {
    values: Vec<f64>,
    /// Vertices of the lower envelope of parabolas, and where each begins.
    vertices: Vec<usize>,
    starts: Vec<f64>,
}

impl Line {
    /// Replaces a row by its lower envelope of parabolas.
    fn transform(&mut self, all: &mut [f64], start: usize, stride: usize, n: usize, spacing: f64) {
        let Self { values, vertices, starts } = self;
        values.clear();
        values.extend((0..n).map(|i| all[start + i * stride]));
        vertices.clear();
        starts.clear();

        let square = spacing * spacing;
        for (at, &value) in values.iter().enumerate().filter(|(_, value)| value.is_finite()) {
            let mut begin = f64::NEG_INFINITY;
            while let (Some(&last), Some(&last_begin)) = (vertices.last(), starts.last()) {
                let (p, q) = (last as f64, at as f64);
                let rise = (value - values[last]) / square;
                begin = (rise + q * q - p * p) / (2.0 * (q - p));
                if begin > last_begin {
                    break;
                }
                vertices.pop();
                starts.pop();
                begin = f64::NEG_INFINITY;
            }
            vertices.push(at);
            starts.push(begin);
        }

        let mut current = 0;
        for i in 0..if vertices.is_empty() { 0 } else { n } {
            while current + 1 < vertices.len() && starts[current + 1] <= i as f64 {
                current += 1;
            }
            let vertex = vertices[current];
            let apart = i as f64 - vertex as f64;
            all[start + i * stride] = values[vertex] + square * apart * apart;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hollow_is_filled_and_a_bay_is_not() {
        let grid = Grid { shape: Shape3([9, 8, 7]), spacing: [1.0; 3] };
        let shell = |open: [usize; 3]| -> Vec<bool> {
            let voxels = (0..grid.shape.n_voxels()).map(|offset| grid.shape.voxel(offset));
            let is_shell = |v: [usize; 3]| {
                let is_block = v.iter().all(|i| (1..6).contains(i));
                is_block && !v.iter().all(|i| (2..5).contains(i)) && v != open
            };
            voxels.map(is_shell).collect()
        };
        let n = |mask: &[bool]| mask.iter().filter(|&&inside| inside).count();
        // 125 voxels with a hollow of 27; then with a hole of one.
        assert_eq!(n(&grid.filled(&shell([0; 3]))), 125);
        let open = shell([1, 3, 3]);
        assert_eq!(grid.filled(&open), open);
    }

    #[test]
    fn surfaces_of_shifted_boxes_lie_as_far_apart_as_the_shift() {
        let grid = Grid { shape: Shape3([12, 9, 7]), spacing: [1.0, 2.0, 8.0] };
        let block = |x: usize, z: usize| -> Vec<bool> {
            let inside = |[vx, vy, vz]: [usize; 3]| {
                (x..x + 5).contains(&vx) && (2..6).contains(&vy) && (z..z + 3).contains(&vz)
            };
            (0..grid.shape.n_voxels()).map(|offset| inside(grid.shape.voxel(offset))).collect()
        };
        let distance = |a: &[bool], b: &[bool]| grid.surface_distance_95(a, b);
        assert_eq!(distance(&block(3, 2), &block(3, 2)), Some(0.0));
        assert_eq!(distance(&block(3, 2), &block(5, 2)), Some(2.0));
        assert_eq!(distance(&block(3, 2), &block(3, 3)), Some(8.0));
        assert_eq!(distance(&block(3, 2), &vec![false; grid.shape.n_voxels()]), None);
    }

    #[test]
    fn distances_are_those_of_a_search_through_all_pairs() {
        let shape = Shape3([7, 5, 6]);
        let grid = Grid { shape, spacing: [0.7, 2.0, 1.1] };
        // Sparse, dense, a single voxel, none.
        for every in [13, 2, 1000, 0] {
            let mask: Vec<bool> = (0..shape.n_voxels())
                .map(|o| every > 0 && (o * 7 + 3) % every.min(211) == 0)
                .collect();
            for (offset, &found) in grid.distance_to(&mask).iter().enumerate() {
                let apart = |other: usize| {
                    let (a, b) = (shape.voxel(offset), shape.voxel(other));
                    let square = |i: usize| ((a[i] as f64 - b[i] as f64) * grid.spacing[i]).powi(2);
                    (square(0) + square(1) + square(2)).sqrt()
                };
                let nearest =
                    (0..mask.len()).filter(|&o| mask[o]).map(apart).fold(f64::INFINITY, f64::min);
                assert!(
                    found == nearest || (found - nearest).abs() < 1e-9,
                    "{every}: {} {nearest}",
                    found
                );
            }
        }
    }
}
