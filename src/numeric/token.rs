//! Turns slice features into localised 3D tokens: depth pooling, l2 norm, projection, joining of
//! views (Le-Gia and Ahn 2026, section 3; `eq. 1` to `eq. 3`).

use std::sync::Arc;

use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::{
    geometry::{Axis, Shape3},
    projection::Projection,
    slice::in_plane,
    volume::Volume,
};

/// The cells in the brain, of a grid over the canonical cube.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreground {
    /// Cells along each axis.
    pub shape: Shape3,
    /// Positions of the foreground cells, ascending: `x + nx * (y + ny * z)`.
    pub cells: Vec<u32>,
}

impl Foreground {
    /// For every cell of the grid, the position of its token, or `None` in the background.
    pub fn token_of_cell(&self) -> Vec<Option<u32>> {
        let mut tokens = vec![None; self.shape.n_voxels()];
        for (token, &cell) in self.cells.iter().enumerate() {
            tokens[cell as usize] = Some(token as u32);
        }
        tokens
    }
}

/// The tokens of one scan at one encoder layer, of one view or of all joined: one row of features
/// per foreground cell of a grid over the canonical cube.
///
/// Cells outside the brain are absent, not zero: zero tokens would match each other. Features are
/// kept in half precision everywhere, so that scores from memory and from the store are the same
/// to the last bit.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenGrid {
    foreground: Foreground,
    channels: usize,
    features: Arc<Vec<f16>>,
}

/// The parts of a [`TokenGrid`] contradict each other.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "token grid of {n_cells} cells with {channels} channels in {shape:?} has {n_features} features, or cells out of order or range"
)]
pub struct TokenGridError {
    shape: [usize; 3],
    channels: usize,
    n_cells: usize,
    n_features: usize,
}

impl TokenGrid {
    /// Joins checked parts. `cells` are positions in `shape`, x fastest, ascending and unique;
    /// `features` is `[cells.len(), channels]`, row-major.
    pub fn new(
        shape: Shape3,
        channels: usize,
        cells: Vec<u32>,
        features: Vec<f16>,
    ) -> Result<Self, TokenGridError> {
        let ascending = cells.windows(2).all(|pair| pair[0] < pair[1]);
        let in_range = cells.last().is_none_or(|&last| (last as usize) < shape.n_voxels());
        // The loop has no early exit, so that it is vectorised. It runs for each scan that is read.
        let exponent = f16::INFINITY.to_bits();
        let finite =
            !features.iter().fold(false, |bad, f| bad | (f.to_bits() & exponent == exponent));
        if !ascending || !in_range || !finite || features.len() != cells.len() * channels {
            return Err(TokenGridError {
                shape: shape.0,
                channels,
                n_cells: cells.len(),
                n_features: features.len(),
            });
        }
        let features = Arc::new(features);
        Ok(Self { foreground: Foreground { shape, cells }, channels, features })
    }

    /// Cells along each axis.
    pub fn shape(&self) -> Shape3 {
        self.foreground.shape
    }

    /// The cells that have a token.
    pub fn foreground(&self) -> &Foreground {
        &self.foreground
    }

    /// Features per token.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Number of foreground cells, each with one token.
    pub fn n_tokens(&self) -> usize {
        self.foreground.cells.len()
    }

    /// Positions of the foreground cells, x fastest, ascending.
    pub fn cells(&self) -> &[u32] {
        &self.foreground.cells
    }

    /// `[n_tokens, channels]`, row-major.
    pub fn features(&self) -> &[f16] {
        &self.features
    }

    /// The same behind its pointer. Grids that share a pointer are copies of one another.
    pub fn shared_features(&self) -> &Arc<Vec<f16>> {
        &self.features
    }

    /// The grid without these tokens (positions in [`TokenGrid::cells`]), as if their cells were
    /// background.
    pub fn without(&self, tokens: &[usize]) -> Self {
        let kept = (0..self.n_tokens()).filter(|token| !tokens.contains(token));
        let (mut cells, mut features) = (Vec::new(), Vec::new());
        for token in kept {
            cells.push(self.cells()[token]);
            let row = token * self.channels..(token + 1) * self.channels;
            features.extend_from_slice(&self.features[row]);
        }
        let foreground = Foreground { shape: self.shape(), cells };
        Self { foreground, channels: self.channels, features: Arc::new(features) }
    }
}

/// How features become tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenSettings {
    /// Axes that are sliced.
    pub views: Vec<Axis>,
    /// Whether the features of all views are joined to one token, in their order (eq. 3), or each
    /// view has tokens of its own.
    pub join_views: bool,
    /// Slices that a token pools; a divisor of the patch. 0 means the whole patch (the paper),
    /// which joined views need. Fewer keep small lesions from being diluted.
    pub slices_per_token: usize,
    /// Every how many-th slice of a depth group is encoded; 1 = all (the paper).
    pub slice_stride: usize,
    /// Whether the network skips the patches of a slice group without brain (ours; the paper
    /// encodes whole slices).
    pub skip_background: bool,
    /// Share of a cell's voxels that must be in the brain. At 0 a single voxel is enough. The rim
    /// of the brain is then noisy, because masks differ there.
    pub min_brain_fraction: f64,
    /// Standard deviation of the Gaussian by which tokens are averaged with their neighbours, in
    /// patches; 0 leaves them as they are (the paper).
    pub smoothing_patches: f64,
}

/// Consecutive slices along one axis that are pooled: one layer of cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceGroup {
    /// Position of the axis in [`TokenSettings::views`].
    view: usize,
    axis: Axis,
    depth: usize,
}

impl SliceGroup {
    /// Axis along which the slices are taken.
    pub fn axis(self) -> Axis {
        self.axis
    }
}

impl TokenSettings {
    /// Grids of tokens per layer: one for each view, or one for all.
    pub fn n_parts(&self) -> usize {
        if self.join_views { 1 } else { self.views.len() }
    }

    /// Slices that a token of an encoder with this patch pools.
    pub fn depth(&self, patch: usize) -> usize {
        if self.slices_per_token == 0 { patch } else { self.slices_per_token }
    }
}

/// Collects the slice features of one scan into its tokens. It adds one slice group at a time, so
/// that memory does not grow with the number of slices.
pub struct TokenBuilder<'a> {
    settings: &'a TokenSettings,
    projection: Option<&'a Projection>,
    /// Patches along each edge of a slice.
    side: usize,
    /// Slices per group.
    depth: usize,
    /// Features per view.
    width: usize,
    parts: Vec<PartBuilder>,
}

/// The tokens of one view, or of all joined.
struct PartBuilder {
    foreground: Foreground,
    /// Row of a cell in `rows`, or `None` in the background.
    token_of_cell: Vec<Option<u32>>,
    /// Voxels of the brain in each cell.
    n_brain: Vec<usize>,
    /// For each layer `[n_tokens, channels]`.
    rows: Vec<Vec<f32>>,
    channels: usize,
}

impl PartBuilder {
    fn new(
        volume: &Volume,
        cell: [usize; 3],
        min_fraction: f64,
        n_layers: usize,
        channels: usize,
    ) -> Self {
        let shape = Shape3(cell.map(|edge| volume.side() / edge));
        let n_brain = brain_per_cell(volume, shape);
        let foreground = foreground_of(volume, shape, &n_brain, cell, min_fraction);
        let token_of_cell = foreground.token_of_cell();
        let rows = vec![vec![0.0; foreground.cells.len() * channels]; n_layers];
        Self { foreground, token_of_cell, n_brain, rows, channels }
    }
}

impl<'a> TokenBuilder<'a> {
    /// Starts the tokens of `volume` for an encoder with `patch` pixels per patch edge and
    /// `channels` features per patch, at `n_layers` layers.
    ///
    /// # Panics
    /// If the side of the volume is no multiple of the patch, or the patch is no multiple of the
    /// slices per token (the settings check that).
    pub fn new(
        volume: &Volume,
        patch: usize,
        channels: usize,
        n_layers: usize,
        projection: Option<&'a Projection>,
        settings: &'a TokenSettings,
    ) -> Self {
        assert_eq!(volume.side() % patch, 0, "cube side is no multiple of the patch");
        let depth = settings.depth(patch);
        assert!(
            patch.is_multiple_of(depth) && (depth == patch || !settings.join_views),
            "whole groups"
        );
        let width = projection.map_or(channels, Projection::n_outputs);
        let part = |cell, channels| {
            PartBuilder::new(volume, cell, settings.min_brain_fraction, n_layers, channels)
        };
        let of_view = |axis: &Axis| {
            let mut cell = [patch; 3];
            cell[axis.index()] = depth;
            part(cell, width)
        };

        let parts = if settings.join_views {
            vec![part([patch; 3], settings.views.len() * width)]
        } else {
            settings.views.iter().map(of_view).collect()
        };
        Self { settings, projection, side: volume.side() / patch, depth, width, parts }
    }

    /// The part that a view's features belong to, and their first channel there.
    fn place(&self, view: usize) -> (usize, usize) {
        if self.settings.join_views { (0, view * self.width) } else { (view, 0) }
    }

    /// The slice groups that must be encoded. Groups without a foreground cell are left out,
    /// because their features would be dropped.
    pub fn due_groups(&self) -> Vec<SliceGroup> {
        let mut due = Vec::new();
        for (view, &axis) in self.settings.views.iter().enumerate() {
            let Foreground { shape, cells } = &self.parts[self.place(view).0].foreground;
            let mut present = vec![false; shape.0[axis.index()]];
            for &cell in cells {
                present[shape.voxel(cell as usize)[axis.index()]] = true;
            }
            let depths = (0..present.len()).filter(|&depth| present[depth]);
            due.extend(depths.map(|depth| SliceGroup { view, axis, depth }));
        }
        due
    }

    /// Indices of the slices of a group that are encoded, centred within each stride.
    pub fn slices(&self, group: SliceGroup) -> Vec<usize> {
        let (stride, depth) = (self.settings.slice_stride, self.depth);
        let first = group.depth * depth + (stride - 1) / 2;
        (first..(group.depth + 1) * depth).step_by(stride).collect()
    }

    /// The patches of a group that are encoded, numbered row by row, ascending.
    pub fn patches(&self, group: SliceGroup) -> Vec<u32> {
        let PartBuilder { foreground, n_brain, .. } = &self.parts[self.place(group.view).0];
        let holds_brain =
            |patch: &u32| n_brain[cell_of(group, *patch as usize, self.side, foreground.shape)] > 0;
        let all = 0..(self.side * self.side) as u32;
        all.filter(|patch| !self.settings.skip_background || holds_brain(patch)).collect()
    }

    /// Adds the features of these patches of a group at one layer: the mean over its slices,
    /// `[patches.len(), channels]`. Steps: l2 norm (eq. 1), projection (eq. 2), and the place of
    /// this view in the joined token (eq. 3).
    pub fn add(&mut self, group: SliceGroup, layer: usize, patches: &[u32], features: &[f32]) {
        let channels = self.projection.map_or(self.width, Projection::n_inputs);
        assert_eq!(features.len(), patches.len() * channels, "features of one group");
        let (part, first_channel) = self.place(group.view);
        let part = &mut self.parts[part];
        for (&patch, feature) in patches.iter().zip(features.chunks_exact(channels)) {
            let cell = cell_of(group, patch as usize, self.side, part.foreground.shape);
            let Some(token) = part.token_of_cell[cell] else { continue };
            let feature = of_unit_length(feature);
            let start = token as usize * part.channels + first_channel;
            let out = &mut part.rows[layer][start..start + self.width];
            match self.projection {
                Some(projection) => projection.apply(&feature, out),
                None => out.copy_from_slice(&feature),
            }
        }
    }

    /// The finished tokens: layer by layer, within a layer view by view or all views joined.
    pub fn finish(self) -> Result<Vec<TokenGrid>, TokenGridError> {
        let n_layers = self.parts.first().map_or(0, |part| part.rows.len());
        let sigma = self.settings.smoothing_patches;

        let mut grids = Vec::new();
        for layer in 0..n_layers {
            for PartBuilder { foreground, rows, channels, .. } in &self.parts {
                let rows = &rows[layer];
                let features = match sigma > 0.0 {
                    true => halves(&smooth(foreground, rows, sigma)),
                    false => halves(rows),
                };
                let Foreground { shape, cells } = foreground.clone();
                grids.push(TokenGrid::new(shape, *channels, cells, features)?);
            }
        }
        Ok(grids)
    }
}

/// Rounds to half precision, on all cores.
fn halves(rows: &[f32]) -> Vec<f16> {
    const CHUNK: usize = 1 << 14;
    let mut halves = vec![f16::ZERO; rows.len()];
    let chunks = halves.par_chunks_mut(CHUNK).zip(rows.par_chunks(CHUNK));
    chunks.for_each(|(halves, rows)| halves.convert_from_f32_slice(rows));
    halves
}

/// The grid cell of a patch of a group's slices, which have `side` patches along each edge.
fn cell_of(group: SliceGroup, patch_index: usize, side: usize, shape: Shape3) -> usize {
    let (row_axis, column_axis) = in_plane(group.axis);
    let mut cell = [0; 3];
    cell[group.axis.index()] = group.depth;
    cell[row_axis] = patch_index / side;
    cell[column_axis] = patch_index % side;
    shape.offset(cell)
}

/// For each axis, how many cells of a grid fit along one coarse cell. The grid may be finer along
/// some axes.
pub fn cells_per_patch(shape: Shape3) -> [usize; 3] {
    let coarse = shape.0.into_iter().min().unwrap_or(1).max(1);
    shape.0.map(|n| n / coarse)
}

/// Averages the tokens of neighbouring cells (ours). `rows` and the result are `[n_cells,
/// channels]`, row-major. Weights are Gaussian with a standard deviation of `sigma` patches, up to
/// three standard deviations along each axis. They sum to 1 over the foreground cells in reach, so
/// that the rim is not darkened.
///
/// Noise of single cells decreases; a change that fills several cells remains.
pub fn smooth(foreground: &Foreground, rows: &[f32], sigma: f64) -> Vec<f32> {
    let sigmas = cells_per_patch(foreground.shape).map(|n| n as f64 * sigma);

    // A Gaussian is the product of one along each axis, which takes a tenth of the work. Between
    // two axes, all cells are needed that the next axis reads.
    let [x, y, z] = sigmas.map(gaussian);
    let second = widened(foreground, 2, &z);
    let first = widened(&second, 1, &y);
    let weighted = |rows: &[f32]| {
        let rows = weighted_along(0, &x, foreground, rows, &first);
        let rows = weighted_along(1, &y, &first, &rows, &second);
        weighted_along(2, &z, &second, &rows, foreground)
    };

    let n_cells = foreground.cells.len();
    let totals = weighted(&vec![1.0; n_cells]);
    let mut smoothed = weighted(rows);

    let tokens = smoothed.par_chunks_mut((rows.len() / n_cells.max(1)).max(1));
    tokens.zip(totals).for_each(|(token, total)| token.iter_mut().for_each(|sum| *sum /= total));
    smoothed
}

/// Weights by the distance in cells.
fn gaussian(sigma: f64) -> Vec<f32> {
    let reach = (3.0 * sigma).ceil() as usize;
    (0..=reach).map(|apart| (-0.5 * (apart as f64 / sigma).powi(2)).exp() as f32).collect()
}

/// All cells along an axis that are as near to one of `cells` as the weights reach.
fn widened(cells: &Foreground, axis: usize, weights: &[f32]) -> Foreground {
    let Foreground { shape, cells } = cells;
    let mut is_near = vec![false; shape.n_voxels()];
    for &cell in cells {
        for place in shape.around(shape.voxel(cell as usize), reach_along(axis, weights)) {
            is_near[shape.offset(place)] = true;
        }
    }
    let near = (0..is_near.len()).filter(|&cell| is_near[cell]);
    Foreground { shape: *shape, cells: near.map(|cell| cell as u32).collect() }
}

/// For each cell of `to`, the weighted sum of the rows of the cells of `from` on a line along an
/// axis.
fn weighted_along(
    axis: usize,
    weights: &[f32],
    from: &Foreground,
    rows: &[f32],
    to: &Foreground,
) -> Vec<f32> {
    let shape = from.shape;
    let channels = rows.len() / from.cells.len().max(1);
    let row_of_cell = from.token_of_cell();

    let add_up = |cell: usize, out: &mut [f32]| {
        let centre = shape.voxel(cell);
        for place in shape.around(centre, reach_along(axis, weights)) {
            let Some(row) = row_of_cell[shape.offset(place)] else { continue };
            let weight = weights[place[axis].abs_diff(centre[axis])];
            let row = &rows[row as usize * channels..(row as usize + 1) * channels];
            out.iter_mut().zip(row).for_each(|(sum, value)| *sum += weight * value);
        }
    };

    let mut sums = vec![0.0; to.cells.len() * channels];
    let out = sums.par_chunks_mut(channels.max(1)).zip(&to.cells);
    out.for_each(|(out, &cell)| add_up(cell as usize, out));
    sums
}

fn reach_along(axis: usize, weights: &[f32]) -> [usize; 3] {
    let mut reach = [0; 3];
    reach[axis] = weights.len() - 1;
    reach
}

/// Cells of `cell` voxels. At least `min_fraction` of these, and at least one, is in the brain.
/// Cells that reach beyond the scanner's field of view, where that cuts the brain, are left out:
/// what they lack would look like an anomaly.
///
/// # Panics
/// If the side of the volume is no multiple of each edge of a cell.
pub fn foreground_cells(volume: &Volume, cell: [usize; 3], min_fraction: f64) -> Foreground {
    assert!(cell.iter().all(|&edge| volume.side().is_multiple_of(edge)), "whole cells");
    let shape = Shape3(cell.map(|edge| volume.side() / edge));
    foreground_of(volume, shape, &brain_per_cell(volume, shape), cell, min_fraction)
}

/// Number of cells that hold enough brain, but that the scanner's field of view cuts. See
/// [`foreground_cells`].
pub fn n_cut_cells(volume: &Volume, cell: [usize; 3], min_fraction: f64) -> usize {
    let Some(beyond) = volume.beyond() else { return 0 };
    let shape = Shape3(cell.map(|edge| volume.side() / edge));
    let is_cut = count_per_cell(beyond, volume.side(), shape);
    let enough = with_enough(&brain_per_cell(volume, shape), cell, min_fraction);
    enough.into_iter().filter(|&index| is_cut[index as usize] > 0).count()
}

fn foreground_of(
    volume: &Volume,
    shape: Shape3,
    n_brain: &[usize],
    cell: [usize; 3],
    min_fraction: f64,
) -> Foreground {
    let mut cells = with_enough(n_brain, cell, min_fraction);
    if let Some(beyond) = volume.beyond() {
        let n_beyond = count_per_cell(beyond, volume.side(), shape);
        cells.retain(|&cell| n_beyond[cell as usize] == 0);
    }
    Foreground { shape, cells }
}

/// The cells with enough voxels of the brain.
fn with_enough(n_brain: &[usize], cell: [usize; 3], min_fraction: f64) -> Vec<u32> {
    let needed = (min_fraction * cell.iter().product::<usize>() as f64).max(1.0);
    let inside = n_brain.iter().enumerate().filter(|(_, count)| **count as f64 >= needed);
    inside.map(|(cell, _)| cell as u32).collect()
}

/// Voxels of the brain in each cell of a grid over the volume.
pub fn brain_per_cell(volume: &Volume, shape: Shape3) -> Vec<usize> {
    count_per_cell(volume.brain(), volume.side(), shape)
}

/// Voxels of a mask over the cube, whose edge has `side` voxels, in each cell of a grid.
pub(super) fn count_per_cell(mask: &[bool], side: usize, shape: Shape3) -> Vec<usize> {
    let edges = shape.0.map(|n| side / n);
    let [nx, ny, _] = shape.0;

    let mut counts = vec![0; shape.n_voxels()];
    let layers = mask.par_chunks((side * side * edges[2]).max(1));
    counts.par_chunks_mut((nx * ny).max(1)).zip(layers).for_each(|(counts, layer)| {
        // Rows of voxels are added up first, because that is vectorised.
        let mut columns = vec![0_u16; side];
        for slice in layer.chunks_exact(side * side) {
            let rows = slice.chunks_exact(side * edges[1]);
            for (counts, rows) in counts.chunks_exact_mut(nx).zip(rows) {
                columns.fill(0);
                for row in rows.chunks_exact(side) {
                    columns.iter_mut().zip(row).for_each(|(n, &inside)| *n += u16::from(inside));
                }
                for (count, columns) in counts.iter_mut().zip(columns.chunks_exact(edges[0])) {
                    *count += columns.iter().map(|&n| usize::from(n)).sum::<usize>();
                }
            }
        }
    });
    counts
}

/// Features shorter than this are not scaled to unit length.
const MIN_NORM: f64 = 1e-6;

fn of_unit_length(feature: &[f32]) -> Vec<f32> {
    let norm = feature.iter().map(|&f| f64::from(f).powi(2)).sum::<f64>().sqrt();
    let scale = (1.0 / norm.max(MIN_NORM)) as f32;
    feature.iter().map(|f| f * scale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::geometry::{Affine, WorldPoint};

    fn volume(side: usize, inside: impl Fn([usize; 3]) -> bool) -> Volume {
        let shape = Shape3::cube(side);
        let brain: Vec<bool> = (0..shape.n_voxels()).map(|o| inside(shape.voxel(o))).collect();
        let voxels = brain.iter().map(|&b| f32::from(b)).collect();
        let affine = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        Volume { side, voxels, brain, beyond: None, affine }
    }

    fn settings(views: &[Axis]) -> TokenSettings {
        TokenSettings {
            views: views.to_vec(),
            join_views: true,
            slices_per_token: 2,
            slice_stride: 1,
            skip_background: false,
            min_brain_fraction: 0.3,
            smoothing_patches: 0.0,
        }
    }

    #[test]
    fn a_cell_is_foreground_from_the_stated_share_on() {
        // Of the 8 voxels of cell [1, 0, 0] three lie in the brain, of cell [0, 0, 0] two.
        let few = [[0, 0, 0], [1, 1, 1], [2, 0, 0], [3, 0, 0], [3, 1, 1]];
        let volume = volume(4, |v| few.contains(&v));
        let cells = |fraction| foreground_cells(&volume, [2; 3], fraction).cells;
        assert_eq!(cells(0.3), [1]);
        assert_eq!(cells(0.25), [0, 1]);
        assert_eq!(cells(0.0), [0, 1]);
        // Of the two layers of cell [1, 0, 0] one has two voxels of four, the other one.
        let fine = foreground_cells(&volume, [2, 2, 1], 0.5);
        assert_eq!((fine.shape, fine.cells), (Shape3([2, 2, 4]), vec![1]));
    }

    #[test]
    fn a_cell_that_the_field_of_view_cuts_is_no_foreground() {
        let whole = volume(6, |_| true);
        let beyond = (0..216).map(|offset| whole.shape().voxel(offset)[2] == 5).collect();
        let cut = Volume { beyond: Some(beyond), ..whole.clone() };
        let cells = |volume: &Volume| foreground_cells(volume, [2; 3], 0.3).cells;
        assert_eq!(cells(&cut), (0..18).collect::<Vec<u32>>(), "two of three layers");
        assert_eq!((n_cut_cells(&cut, [2; 3], 0.3), n_cut_cells(&whole, [2; 3], 0.3)), (9, 0));
        assert_eq!(cells(&cut.with_cut_cells()), cells(&whole));
    }

    #[test]
    fn every_view_puts_its_features_on_the_same_cell() {
        // Each patch's feature is its own cell number as an angle; all views must agree on it.
        let volume = volume(6, |_| true);
        let settings = settings(&Axis::VIEWS);
        let mut builder = TokenBuilder::new(&volume, 2, 2, 1, None, &settings);
        let shape = Shape3::cube(3);
        for group in builder.due_groups() {
            let mut features = Vec::new();
            for patch in 0..9 {
                let (row, column) = in_plane(group.axis());
                let mut cell = [0; 3];
                cell[group.axis().index()] = group.depth;
                cell[row] = patch / 3;
                cell[column] = patch % 3;
                let angle = shape.offset(cell) as f32 / 27.0;
                features.extend([angle.cos(), angle.sin()]);
            }
            builder.add(group, 0, &builder.patches(group), &features);
        }
        let grid = &builder.finish().unwrap()[0];
        assert_eq!((grid.n_tokens(), grid.channels()), (27, 6));
        for (cell, token) in grid.cells().iter().zip(grid.features().chunks_exact(6)) {
            let angle = *cell as f32 / 27.0;
            for view in token.chunks_exact(2) {
                assert!((view[0].to_f32() - angle.cos()).abs() < 1e-3);
                assert!((view[1].to_f32() - angle.sin()).abs() < 1e-3);
            }
        }
    }

    #[test]
    fn views_on_their_own_have_grids_that_are_finer_along_their_axis() {
        // Brain in the lower half along z only; the feature of a slice is its index as an angle.
        let volume = volume(8, |v| v[2] < 4);
        let settings = TokenSettings {
            join_views: false,
            slices_per_token: 2,
            ..settings(&[Axis::Axial, Axis::Sagittal])
        };
        let mut builder = TokenBuilder::new(&volume, 4, 2, 1, None, &settings);
        let groups = builder.due_groups();
        // Two of four axial groups hold brain, and all four sagittal ones.
        assert_eq!(groups.iter().filter(|group| group.axis() == Axis::Axial).count(), 2);
        assert_eq!(groups.len(), 6);
        for group in groups {
            let slices = builder.slices(group);
            let angle = slices.iter().sum::<usize>() as f32 / slices.len() as f32 / 8.0;
            let patches = builder.patches(group);
            let features = [angle.cos(), angle.sin()].repeat(patches.len());
            builder.add(group, 0, &patches, &features);
        }
        let grids = builder.finish().unwrap();
        assert_eq!(grids.len(), 2);
        for (grid, (shape, axis)) in grids.iter().zip([([2, 2, 4], 2), ([4, 2, 2], 0)]) {
            assert_eq!((grid.shape(), grid.channels()), (Shape3(shape), 2));
            assert_eq!(grid.n_tokens(), 8);
            for (&cell, token) in grid.cells().iter().zip(grid.features().chunks_exact(2)) {
                // The middle of the two slices of the group.
                let depth = grid.shape().voxel(cell as usize)[axis];
                let angle = (2.0 * depth as f32 + 0.5) / 8.0;
                assert!((token[0].to_f32() - angle.cos()).abs() < 1e-3, "{depth}");
                assert!((token[1].to_f32() - angle.sin()).abs() < 1e-3, "{depth}");
            }
        }
    }

    #[test]
    fn features_get_unit_length() {
        let volume = volume(2, |_| true);
        let settings = settings(&[Axis::Axial]);
        let mut builder = TokenBuilder::new(&volume, 2, 2, 1, None, &settings);
        let group = builder.due_groups()[0];
        builder.add(group, 0, &[0], &[3.0, 1.0]);
        let expected = [3.0 / 10.0_f32.sqrt(), 1.0 / 10.0_f32.sqrt()].map(f16::from_f32);
        assert_eq!(builder.finish().unwrap()[0].features(), expected);
    }

    #[test]
    fn a_stride_takes_the_middle_of_each_step_and_empty_groups_are_left_out() {
        let volume = volume(28, |v| v[2] < 14);
        let settings =
            TokenSettings { slice_stride: 3, slices_per_token: 14, ..settings(&[Axis::Axial]) };
        let builder = TokenBuilder::new(&volume, 14, 2, 1, None, &settings);
        let groups = builder.due_groups();
        assert_eq!(groups.len(), 1);
        assert_eq!(builder.slices(groups[0]), [1, 4, 7, 10, 13]);
    }

    #[test]
    fn patches_without_any_brain_in_the_slices_of_a_group_may_be_skipped() {
        // Of 4^3 voxels two in the brain: one in each axial group of two slices.
        let volume = volume(4, |v| v == [3, 0, 1] || v == [0, 3, 3]);
        let patches = |skip_background| {
            let settings = TokenSettings {
                skip_background,
                min_brain_fraction: 0.0,
                ..settings(&[Axis::Axial])
            };
            let builder = TokenBuilder::new(&volume, 2, 2, 1, None, &settings);
            builder.due_groups().into_iter().map(|g| builder.patches(g)).collect::<Vec<_>>()
        };
        // A row of patches holds those with the same x.
        assert_eq!(patches(true), [[2], [1]]);
        assert_eq!(patches(false), [[0, 1, 2, 3], [0, 1, 2, 3]]);
    }

    #[test]
    fn smoothing_averages_neighbours_and_only_those_that_are_there() {
        // Cells [0, 0, 0] and [1, 0, 0] touch, cell [2, 2, 2] is alone.
        let foreground = Foreground { shape: Shape3::cube(3), cells: vec![0, 1, 26] };
        let smoothed = smooth(&foreground, &[1.0, 10.0, 3.0, 30.0, 7.0, 70.0], 0.5);
        let weight = (-2.0_f32).exp();
        let mix = |own: f32, other: f32| (own + weight * other) / (1.0 + weight);
        let expected = [mix(1.0, 3.0), mix(10.0, 30.0), mix(3.0, 1.0), mix(30.0, 10.0), 7.0, 70.0];
        for (found, expected) in smoothed.iter().zip(expected) {
            // Two cells three steps away weigh e^-24.
            assert!((found - expected).abs() < 1e-5, "{found} instead of {expected}");
        }
    }

    #[test]
    fn a_grid_without_some_tokens_keeps_the_others() {
        let halves = |values: &[f32]| values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>();
        let features = halves(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let grid = TokenGrid::new(Shape3::cube(2), 2, vec![1, 4, 7], features).unwrap();
        let expected = TokenGrid::new(Shape3::cube(2), 2, vec![4], halves(&[3.0, 4.0])).unwrap();
        assert_eq!(grid.without(&[2, 0]), expected);
        assert_eq!(grid.without(&[]), grid);
    }

    #[test]
    fn smoothing_keeps_a_constant_grid() {
        let cells: Vec<u32> = (0..125).filter(|c| c % 4 != 0).collect();
        let foreground = Foreground { shape: Shape3::cube(5), cells };
        let smoothed = smooth(&foreground, &vec![2.5; foreground.cells.len() * 3], 0.8);
        assert!(smoothed.iter().all(|value| (value - 2.5).abs() < 1e-5));
    }

    #[test]
    fn contradicting_parts_are_refused() {
        let half = |n| vec![f16::ZERO; n];
        assert!(TokenGrid::new(Shape3::cube(2), 3, vec![0, 5], half(6)).is_ok());
        assert!(TokenGrid::new(Shape3::cube(2), 3, vec![5, 0], half(6)).is_err());
        assert!(TokenGrid::new(Shape3::cube(2), 3, vec![0, 8], half(6)).is_err());
        assert!(TokenGrid::new(Shape3::cube(2), 3, vec![0, 5], half(5)).is_err());
        assert!(TokenGrid::new(Shape3::cube(2), 1, vec![0], vec![f16::NAN]).is_err());
    }
}
