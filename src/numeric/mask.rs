//! From token scores to a map on the scan's own grid, and from the map to a mask of clusters.

use rayon::prelude::*;

use super::{
    geometry::{Affine, Shape3},
    volume::RawMask,
};

/// Where the score grid lies in the world.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GridPlacement {
    /// Cells along each edge.
    pub side: usize,
    /// Voxels of the canonical cube along the edge of a cell.
    pub patch: usize,
    /// Canonical cube voxel -> world mm.
    pub cube: Affine,
}

/// Spreads token scores over the scan's own voxels: `[nx, ny, nz]`, x fastest.
///
/// Trilinear between cell centres, held constant beyond the outermost centres; absent cells count
/// as 0, and so does everything outside the brain (Le-Gia and Ahn 2026, section 3). The grid is
/// evaluated at the native voxel centres directly; going through the cube, as the paper does, adds
/// a second interpolation and nothing else.
pub fn score_map(
    cells: &[u32],
    scores: &[f32],
    placement: &GridPlacement,
    brain: &RawMask,
) -> Vec<f32> {
    let cell_shape = Shape3::cube(placement.side);
    let grid = score_grid(cell_shape, cells, scores);
    let to_cube = placement.cube.inverse().after(&brain.affine);
    let patch = placement.patch as f64;
    let last = (placement.side - 1) as f64;
    let mut map = vec![0.0; brain.shape.n_voxels()];
    map.par_chunks_mut(4096).enumerate().for_each(|(chunk, voxels)| {
        for (index, value) in voxels.iter_mut().enumerate() {
            let offset = chunk * 4096 + index;
            if brain.inside[offset] {
                let place = to_cube.apply(brain.shape.voxel(offset).map(|v| v as f64));
                let place = place.map(|c| ((c + 0.5) / patch - 0.5).clamp(0.0, last));
                *value = trilinear(&grid, cell_shape, place);
            }
        }
    });
    map
}

/// What the map of a scan holds, whatever its grid: the same interpolation at [`SAMPLES`]^3 places,
/// evenly spread, in each of the `cells` of a grid with `side` cells along each edge.
pub fn map_samples(side: usize, cells: &[u32], scores: &[f32]) -> Vec<f32> {
    let shape = Shape3::cube(side);
    let grid = score_grid(shape, cells, scores);
    let last = (side - 1) as f64;
    let places = Shape3::cube(SAMPLES);
    let sample = |cell: [usize; 3], offset: usize| {
        let within = places.voxel(offset);
        let place = |axis: usize| {
            let inner = (within[axis] as f64 + 0.5) / SAMPLES as f64 - 0.5;
            (cell[axis] as f64 + inner).clamp(0.0, last)
        };
        trilinear(&grid, shape, [place(0), place(1), place(2)])
    };
    let of_cell = |&cell: &u32| {
        let cell = shape.voxel(cell as usize);
        (0..places.n_voxels()).map(move |offset| sample(cell, offset))
    };
    cells.iter().flat_map(of_cell).collect()
}

/// Places along each edge of a cell: centre and thirds.
const SAMPLES: usize = 3;

/// Scores by cell; absent cells hold 0.
fn score_grid(shape: Shape3, cells: &[u32], scores: &[f32]) -> Vec<f32> {
    let mut grid = vec![0.0_f32; shape.n_voxels()];
    for (&cell, &score) in cells.iter().zip(scores) {
        grid[cell as usize] = score;
    }
    grid
}

fn trilinear(grid: &[f32], shape: Shape3, place: [f64; 3]) -> f32 {
    let mut sum = 0.0;
    for corner in 0..8_usize {
        let mut weight = 1.0;
        let mut cell = [0; 3];
        for axis in 0..3 {
            let step = (corner >> axis) & 1;
            let floor = place[axis].floor();
            let fraction = place[axis] - floor;
            weight *= if step == 1 { fraction } else { 1.0 - fraction };
            cell[axis] = (floor as usize + step).min(shape.0[axis] - 1);
        }
        sum += weight * f64::from(grid[shape.offset(cell)]);
    }
    sum as f32
}

/// Voxels of one connected region, as positions in memory, ascending.
pub type Region = Vec<usize>;

/// Connected regions (26 neighbours) of the voxels above `threshold` that hold at least
/// `min_voxels`, largest first; regions of equal size in the order of their first voxel.
pub fn regions_above(map: &[f32], shape: Shape3, threshold: f32, min_voxels: usize) -> Vec<Region> {
    regions(map.iter().map(|&value| value > threshold).collect(), shape, min_voxels)
}

/// Connected regions of a mask, as [`regions_above`].
pub fn regions(mut open: Vec<bool>, shape: Shape3, min_voxels: usize) -> Vec<Region> {
    let mut regions = Vec::new();
    for seed in 0..open.len() {
        if open[seed] {
            let region = flood(&mut open, shape, seed);
            if region.len() >= min_voxels {
                regions.push(region);
            }
        }
    }
    regions.sort_by_key(|region| std::cmp::Reverse(region.len()));
    regions
}

fn flood(open: &mut [bool], shape: Shape3, seed: usize) -> Region {
    let mut region = vec![seed];
    open[seed] = false;
    let mut next = 0;
    while next < region.len() {
        let voxel = shape.voxel(region[next]);
        next += 1;
        let [x, y, z] = [0, 1, 2]
            .map(|axis| voxel[axis].saturating_sub(1)..(voxel[axis] + 2).min(shape.0[axis]));
        for z in z {
            for y in y.clone() {
                for x in x.clone() {
                    let neighbour = shape.offset([x, y, z]);
                    if std::mem::take(&mut open[neighbour]) {
                        region.push(neighbour);
                    }
                }
            }
        }
    }
    region.sort_unstable();
    region
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::geometry::WorldPoint;

    fn whole(shape: Shape3, affine: Affine) -> RawMask {
        RawMask { shape, inside: vec![true; shape.n_voxels()], affine }
    }

    fn placement() -> GridPlacement {
        let cube = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        GridPlacement { side: 3, patch: 2, cube }
    }

    #[test]
    fn samples_are_what_a_map_holds() {
        // Two cells side by side with absent neighbours; the scan has 3 voxels per cell and axis.
        let cells = [13, 14];
        let samples = map_samples(3, &cells, &[2.0, 5.0]);
        let shape = Shape3::cube(9);
        let affine = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        let brain = RawMask { shape, inside: vec![true; 729], affine };
        let placement = GridPlacement { side: 3, patch: 3, cube: affine };
        let map = score_map(&cells, &[2.0, 5.0], &placement, &brain);
        let (mut of_map, mut samples) = (Vec::new(), samples);
        for (offset, value) in map.into_iter().enumerate() {
            let cell = shape.voxel(offset).map(|v| v / 3);
            if cells.contains(&(Shape3::cube(3).offset(cell) as u32)) {
                of_map.push(value);
            }
        }
        assert_eq!(samples.len(), 2 * 27);
        of_map.sort_unstable_by(f32::total_cmp);
        samples.sort_unstable_by(f32::total_cmp);
        for (a, b) in samples.iter().zip(&of_map) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }

    #[test]
    fn a_cell_shows_its_score_at_its_centre_and_half_of_it_one_cell_border_away() {
        // Cell [1, 0, 2] covers cube voxels 2..4, 0..2, 4..6; its centre is (2.5, 0.5, 4.5).
        let cell = Shape3::cube(3).offset([1, 0, 2]) as u32;
        let probe =
            whole(Shape3([2, 1, 1]), Affine::scaling(1.0, WorldPoint([2.5, 0.5, 4.5])).unwrap());
        assert_eq!(score_map(&[cell], &[8.0], &placement(), &probe), [8.0, 4.0]);
    }

    #[test]
    fn an_oblique_left_handed_grid_finds_the_same_place() {
        let cell = Shape3::cube(3).offset([1, 0, 2]) as u32;
        let rows = [[-0.8, 0.3, 0.0, 2.5], [0.3, 0.8, 0.1, 0.5], [0.1, -0.2, 0.9, 4.5]];
        let probe = whole(Shape3([1, 1, 1]), Affine::new(rows).unwrap());
        assert_eq!(score_map(&[cell], &[8.0], &placement(), &probe), [8.0]);
    }

    #[test]
    fn beyond_the_brain_there_is_no_score() {
        let mut brain = whole(Shape3([5, 1, 1]), placement().cube);
        brain.inside[3] = false;
        let cells: Vec<u32> = (0..27).collect();
        assert_eq!(score_map(&cells, &[1.0; 27], &placement(), &brain), [1.0, 1.0, 1.0, 0.0, 1.0]);
    }

    #[test]
    fn regions_touch_at_corners_and_small_ones_are_dropped() {
        let shape = Shape3([5, 4, 3]);
        let mut map = vec![0.0; shape.n_voxels()];
        for voxel in [[0, 0, 0], [1, 1, 1], [2, 2, 2], [4, 0, 0], [4, 3, 2], [4, 3, 1]] {
            map[shape.offset(voxel)] = 2.0;
        }
        let sizes = |min| -> Vec<usize> {
            regions_above(&map, shape, 1.0, min).iter().map(Vec::len).collect()
        };
        assert_eq!(sizes(1), [3, 2, 1]);
        assert_eq!(sizes(2), [3, 2]);
        assert_eq!(regions_above(&map, shape, 2.0, 1), Vec::<Region>::new());
    }
}
