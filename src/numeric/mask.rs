//! Turns token scores into a map on the scan's own grid, and the map into a mask of clusters.

use rayon::prelude::*;

use super::{
    geometry::{Affine, Shape3},
    token::Foreground,
    volume::{RawMask, interpolate},
};

/// The position of a grid of cells in the world.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GridPlacement {
    /// Voxels along each edge of the canonical cube that the grid divides.
    pub cube_side: usize,
    /// Canonical cube voxel -> world mm.
    pub cube: Affine,
}

/// The scores of a scan: one for each foreground cell of a grid.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreGrid {
    /// The cells that have a token, and the grid they belong to.
    pub foreground: Foreground,
    /// A score for each cell; `None` where there was nothing to compare with.
    pub scores: Vec<Option<f32>>,
}

/// Joins the scores of several views on one grid (ours; the paper joins the views' features
/// instead). It takes their mean at the centres of the cells that are in the foreground of all
/// views.
///
/// The grid is as fine as the finest view along each axis, with two to four cells per patch. Scores
/// are interpolated between cell centres as in the map, so that the grid holds the same values as
/// the map. Views without a score at a cell do not count there. A cell without any score gets none.
pub fn joined_scores(views: &[ScoreGrid]) -> ScoreGrid {
    let finest = |axis: usize| views.iter().map(|view| view.foreground.shape.0[axis]).max();
    let patches = views.iter().flat_map(|view| view.foreground.shape.0).min().unwrap_or(0);
    let edge = |axis| finest(axis).unwrap_or(0).clamp(2 * patches, MOST_PER_PATCH * patches);
    let shape = Shape3([edge(0), edge(1), edge(2)]);

    let views: Vec<View<'_>> = views.iter().map(View::new).collect();
    let mut joined =
        ScoreGrid { foreground: Foreground { shape, cells: Vec::new() }, scores: Vec::new() };
    for offset in 0..shape.n_voxels() {
        let cell = shape.voxel(offset);
        let centre = [0, 1, 2].map(|axis| (cell[axis] as f64 + 0.5) / shape.0[axis] as f64);
        if views.iter().any(|view| view.token(centre).is_none()) {
            continue;
        }

        let scored = views.iter().filter(|view| view.is_matched(centre));
        let (sum, n) = scored.fold((0.0, 0), |(sum, n), v| (sum + f64::from(v.at(centre)), n + 1));
        joined.foreground.cells.push(offset as u32);
        joined.scores.push((n > 0).then(|| (sum / f64::from(n)) as f32));
    }
    joined
}

/// More cells would show no more detail than the patches have, and cost grows with the third power.
const MOST_PER_PATCH: usize = 4;

/// One view's scores, found by place in the cube, from 0 to 1 along each axis.
struct View<'a> {
    of: &'a ScoreGrid,
    grid: Vec<f32>,
    token_of_cell: Vec<Option<u32>>,
}

impl<'a> View<'a> {
    fn new(of: &'a ScoreGrid) -> Self {
        let scores: Vec<f32> = of.scores.iter().map(|score| score.unwrap_or(0.0)).collect();
        let token_of_cell = of.foreground.token_of_cell();
        Self { of, grid: dense(&of.foreground, &scores), token_of_cell }
    }

    fn token(&self, place: [f64; 3]) -> Option<u32> {
        let shape = self.of.foreground.shape;
        self.token_of_cell[shape.offset([0, 1, 2].map(|a| (place[a] * shape.0[a] as f64) as usize))]
    }

    fn is_matched(&self, place: [f64; 3]) -> bool {
        self.token(place).is_some_and(|token| self.of.scores[token as usize].is_some())
    }

    fn at(&self, place: [f64; 3]) -> f32 {
        let shape = self.of.foreground.shape;
        interpolate(&self.grid, shape, [0, 1, 2].map(|a| place[a] * shape.0[a] as f64 - 0.5)) as f32
    }
}

/// Spreads token scores over the scan's own voxels: `[nx, ny, nz]`, x fastest.
///
/// Trilinear between cell centres, constant beyond the outermost centres. Absent cells and all
/// voxels outside the brain count as 0 (Le-Gia and Ahn 2026, section 3). The grid is evaluated
/// directly at the native voxel centres. The paper goes through the cube, which only adds a second
/// interpolation.
pub fn score_map(
    foreground: &Foreground,
    scores: &[f32],
    placement: &GridPlacement,
    brain: &RawMask,
) -> Vec<f32> {
    let shape = foreground.shape;
    let grid = dense(foreground, scores);
    let to_cells = cells_of_cube(shape, placement.cube_side)
        .after(&placement.cube.inverse())
        .after(&brain.affine);

    let mut map = vec![0.0; brain.shape.n_voxels()];
    let width = brain.shape.0[0];
    let rows = map.par_chunks_mut(width.max(1)).zip(brain.inside.par_chunks(width.max(1)));
    rows.enumerate().for_each(|(row, (values, inside))| {
        let [_, y, z] = brain.shape.voxel(row * width);
        for (x, (value, _)) in values.iter_mut().zip(inside).enumerate().filter(|(_, v)| *v.1) {
            let place = to_cells.apply([x, y, z].map(|v| v as f64));
            *value = rounded(interpolate(&grid, shape, place) as f32);
        }
    });
    map
}

/// The cell of a grid over the cube in which a voxel of the scan lies; `None` outside the cube.
pub fn cell_of_voxel(
    cells: Shape3,
    placement: &GridPlacement,
    scan: &Affine,
) -> impl Fn([usize; 3]) -> Option<usize> + use<> {
    let to_cells =
        cells_of_cube(cells, placement.cube_side).after(&placement.cube.inverse()).after(scan);
    move |voxel| cells.nearest(to_cells.apply(voxel.map(|v| v as f64)))
}

/// The scores at the centres of the cells of another grid over the same cube, as [`score_map`] has
/// them there.
pub fn at_cells(foreground: &Foreground, scores: &[f32], cells: &Foreground) -> Vec<f32> {
    let (from, to) = (foreground.shape, cells.shape);
    let grid = dense(foreground, scores);
    let place = |cell: &u32| {
        let at = to.voxel(*cell as usize);
        [0, 1, 2].map(|a| (at[a] as f64 + 0.5) * from.0[a] as f64 / to.0[a] as f64 - 0.5)
    };
    cells.cells.par_iter().map(|cell| interpolate(&grid, from, place(cell)) as f32).collect()
}

/// Rounds to 14 significant bits, 6e-5 of the value at most. The lower bits mean nothing and take a
/// third of the space in a file.
fn rounded(value: f32) -> f32 {
    const DROPPED: u32 = 10;
    f32::from_bits((value.to_bits() + (1 << (DROPPED - 1))) >> DROPPED << DROPPED)
}

/// Voxel of a cube of this side -> cell of a grid that divides it.
fn cells_of_cube(grid: Shape3, side: usize) -> Affine {
    let row = |axis: usize| {
        let cells_per_voxel = grid.0[axis] as f64 / side as f64;
        let mut row = [0.0, 0.0, 0.0, 0.5 * cells_per_voxel - 0.5];
        row[axis] = cells_per_voxel;
        row
    };
    Affine::new([row(0), row(1), row(2)])
        .expect("a grid has cells, and no more than voxels of a cube")
}

/// Scores by cell; absent cells hold 0.
fn dense(foreground: &Foreground, scores: &[f32]) -> Vec<f32> {
    let mut grid = vec![0.0_f32; foreground.shape.n_voxels()];
    for (&cell, &score) in foreground.cells.iter().zip(scores) {
        grid[cell as usize] = score;
    }
    grid
}

/// Voxels of one connected region, as positions in memory, ascending.
pub type Region = Vec<usize>;

/// Connected regions (26 neighbours) of the voxels above `threshold` with at least `min_voxels`,
/// largest first. Regions of equal size are in the order of their first voxel.
///
/// Only voxels `inside` count: a map may be lower there than the 0 around it.
pub fn regions_above(
    map: &[f32],
    inside: &[bool],
    shape: Shape3,
    threshold: f32,
    min_voxels: usize,
) -> Vec<Region> {
    let is_above = |(&value, &inside): (&f32, &bool)| inside && value > threshold;
    regions(map.iter().zip(inside).map(is_above).collect(), shape, min_voxels)
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
        GridPlacement { cube_side: 6, cube }
    }

    fn one(cell: [usize; 3]) -> Foreground {
        let shape = Shape3::cube(3);
        Foreground { shape, cells: vec![shape.offset(cell) as u32] }
    }

    #[test]
    fn a_cell_shows_its_score_at_its_centre_and_half_of_it_one_cell_border_away() {
        // Cell [1, 0, 2] covers cube voxels 2..4, 0..2, 4..6; its centre is (2.5, 0.5, 4.5).
        let probe =
            whole(Shape3([2, 1, 1]), Affine::scaling(1.0, WorldPoint([2.5, 0.5, 4.5])).unwrap());
        assert_eq!(score_map(&one([1, 0, 2]), &[8.0], &placement(), &probe), [8.0, 4.0]);
    }

    #[test]
    fn an_oblique_left_handed_grid_finds_the_same_place() {
        let rows = [[-0.8, 0.3, 0.0, 2.5], [0.3, 0.8, 0.1, 0.5], [0.1, -0.2, 0.9, 4.5]];
        let probe = whole(Shape3([1, 1, 1]), Affine::new(rows).unwrap());
        assert_eq!(score_map(&one([1, 0, 2]), &[8.0], &placement(), &probe), [8.0]);
    }

    #[test]
    fn values_of_a_map_have_fourteen_significant_bits() {
        for value in [0.0, 1.0, 1.0001, 0.6180339, 1e-20, 123.456] {
            let kept = rounded(value);
            assert!((kept - value).abs() <= 6.2e-5 * value, "{kept} {value}");
            assert_eq!((kept.to_bits() & 0x3ff, rounded(kept)), (0, kept));
        }
    }

    #[test]
    fn beyond_the_brain_there_is_no_score() {
        let mut brain = whole(Shape3([5, 1, 1]), placement().cube);
        brain.inside[3] = false;
        let all = Foreground { shape: Shape3::cube(3), cells: (0..27).collect() };
        assert_eq!(score_map(&all, &[1.0; 27], &placement(), &brain), [1.0, 1.0, 1.0, 0.0, 1.0]);
    }

    #[test]
    fn one_view_joined_is_itself_at_twice_the_cells() {
        // Cells [0, 0, 0] and [1, 0, 0] of two along each edge.
        let foreground = Foreground { shape: Shape3::cube(2), cells: vec![0, 1] };
        let view = ScoreGrid { foreground, scores: vec![Some(4.0), None] };
        let joined = joined_scores(&[view]);
        assert_eq!(joined.foreground.shape, Shape3::cube(4));
        // The 16 fine cells of the two, x fastest: centres at 1/8, 3/8, 5/8, 7/8 along x, whose
        // values are 4 between the borders and its centre, and linear between the centres.
        let along_x = [4.0, 3.0, 1.0, 0.0];
        let expected: Vec<f32> = [1.0, 0.75]
            .into_iter()
            .flat_map(|z| [1.0, 0.75].into_iter().flat_map(move |y| along_x.map(|x| x * y * z)))
            .collect();
        assert_eq!(
            joined.foreground.cells,
            [0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23]
        );
        for (index, (found, expected)) in joined.scores.iter().zip(expected).enumerate() {
            // Fine cells 2 and 3 of each row lie in the cell without a score.
            assert_eq!(*found, (index % 4 < 2).then_some(expected), "{index}");
        }
    }

    #[test]
    fn views_are_averaged_where_all_have_a_cell() {
        let view = |shape, cells: Vec<u32>, value: f32| {
            let scores = vec![Some(value); cells.len()];
            ScoreGrid { foreground: Foreground { shape: Shape3(shape), cells }, scores }
        };
        // Both whole but for the upper half of the second along x; the first is twice as fine along
        // z.
        let first = view([2, 2, 4], (0..16).collect(), 1.0);
        let second = view([2, 2, 2], vec![0, 2, 4, 6], 3.0);
        let joined = joined_scores(&[first, second]);
        assert_eq!(joined.foreground.shape, Shape3::cube(4));
        let shape = joined.foreground.shape;
        assert_eq!(joined.foreground.cells.len(), 32);
        for (&cell, score) in joined.foreground.cells.iter().zip(&joined.scores) {
            let x = shape.voxel(cell as usize)[0];
            assert!(x < 2);
            // The second falls off towards its absent half: 3 at 1/8, 2.25 at 3/8.
            assert_eq!(*score, Some([2.0, 1.625][x]));
        }
    }

    #[test]
    fn regions_touch_at_corners_and_small_ones_are_dropped() {
        let shape = Shape3([5, 4, 3]);
        let (mut map, inside) = (vec![0.0; shape.n_voxels()], vec![true; shape.n_voxels()]);
        for voxel in [[0, 0, 0], [1, 1, 1], [2, 2, 2], [4, 0, 0], [4, 3, 2], [4, 3, 1]] {
            map[shape.offset(voxel)] = 2.0;
        }
        let sizes = |min| -> Vec<usize> {
            regions_above(&map, &inside, shape, 1.0, min).iter().map(Vec::len).collect()
        };
        assert_eq!(sizes(1), [3, 2, 1]);
        assert_eq!(sizes(2), [3, 2]);
        assert_eq!(regions_above(&map, &inside, shape, 2.0, 1), Vec::<Region>::new());
    }
}
