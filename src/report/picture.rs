//! The picture of a result: three planes of the scan, and below them the same planes with map and
//! mask.
//!
//! Everything is sampled in world space. So oblique, left-handed and anisotropic grids look right
//! without special cases.

use embedded_graphics::mono_font::ascii::{FONT_6X13, FONT_9X15, FONT_10X20};

use super::{
    RESEARCH_USE_ONLY,
    canvas::{
        Canvas, FAINT, Field, GAP, INK, OUTLINE, PANE, PLANES, Plane, Stroke, TOP, WIDTH, to_rgb,
    },
};
use crate::numeric::{
    geometry::{Affine, VoxelPoint},
    volume::{RawMask, RawVolume, interpolate},
};

/// The input of [`render`].
pub struct PictureInput<'a> {
    /// The scan on its own grid.
    pub scan: &'a RawVolume,
    /// The brain on the same grid. Everything outside it stays black, above all the face.
    pub brain: &'a RawMask,
    /// Anomaly map on the same grid.
    pub map: &'a [f32],
    /// Anomaly mask on the same grid.
    pub mask: &'a [bool],
    /// Map value at which the mask begins.
    pub threshold: f32,
    /// World place that all planes go through, mm. It is in the largest region, because the highest
    /// value is often a speck at the rim. `None` means the highest value.
    pub focus: Option<[f64; 3]>,
    /// Map value at the upper end of the colours. It is the same for a whole window, so that
    /// pictures can be compared.
    pub top: f32,
    /// What the colours mean.
    pub scale: &'a str,
    /// First line: which scan.
    pub title: &'a str,
    /// Second line: what was found.
    pub summary: &'a str,
    /// Third line: how good the scan is.
    pub quality: &'a str,
}

const HEIGHT: usize = 940;

/// The bytes of a PNG, 1200 x 940; the same input gives the same bytes.
pub fn render(input: &PictureInput<'_>) -> Vec<u8> {
    let mut canvas = Canvas::new(HEIGHT);
    let scene = Scene::new(input);
    canvas.text(input.title, GAP, 18, &FONT_10X20, INK);
    canvas.text(input.summary, GAP, 44, &FONT_9X15, FAINT);
    canvas.text(input.quality, GAP, 66, &FONT_6X13, FAINT);

    for (column, plane) in PLANES.iter().enumerate() {
        let left = GAP + column * (PANE + GAP);
        draw_panes(&mut canvas, &scene, plane, left);
        canvas.text(&plane.caption(scene.focus), left + 8, TOP + 6, &FONT_6X13, FAINT);
    }

    draw_scale(&mut canvas, &scene, input);
    canvas.png()
}

/// What all panes share.
struct Scene<'a> {
    input: &'a PictureInput<'a>,
    to_voxel: Affine,
    /// World place that all planes go through.
    focus: [f64; 3],
    field: Field,
    white: f32,
    low: f32,
    high: f32,
}

impl<'a> Scene<'a> {
    fn new(input: &'a PictureInput<'a>) -> Self {
        let (shape, affine) = (input.scan.shape, &input.scan.affine);
        let [low, high] = input.brain.world_box();
        let centre = [0, 1, 2].map(|axis| 0.5 * (low[axis] + high[axis]));
        let extent = (0..3).map(|axis| high[axis] - low[axis]).fold(0.0, f64::max);
        let peak = || {
            let peak = (0..input.map.len()).max_by(|&a, &b| input.map[a].total_cmp(&input.map[b]));
            let peak = peak.filter(|&offset| input.map[offset] > 0.0)?;
            Some(affine.to_world(VoxelPoint(shape.voxel(peak).map(|v| v as f64))).0)
        };

        let grey = quantile(input.brain, &input.scan.voxels, 0.995);
        let median = quantile(input.brain, input.map, 0.5);

        Self {
            input,
            to_voxel: affine.inverse(),
            focus: input.focus.or_else(peak).unwrap_or(centre),
            field: Field { centre, reach: 0.5 * extent * 1.16 },
            white: grey.max(f32::MIN_POSITIVE),
            low: median,
            high: if input.top > median { input.top } else { median + 1.0 },
        }
    }

    /// Position of a score between the lower (0) and the upper end (1) of the scale.
    fn share(&self, score: f32) -> f32 {
        ((score - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

/// A quantile over every eighth row of the brain, which is enough for the colour scale.
fn quantile(brain: &RawMask, all: &[f32], share: f64) -> f32 {
    let rows = brain.spans().step_by(8).flatten();
    let mut values: Vec<f32> =
        rows.filter(|&offset| brain.inside[offset]).map(|offset| all[offset]).collect();
    if values.is_empty() {
        return 0.0;
    }
    let index = ((values.len() - 1) as f64 * share) as usize;
    *values.select_nth_unstable_by(index, f32::total_cmp).1
}

/// Upper edges of the two panes of a plane.
const TOPS: [usize; 2] = [TOP, TOP + PANE + GAP / 2];

/// Draws a plane of the scan, and below it the same plane with map and mask.
fn draw_panes(canvas: &mut Canvas, scene: &Scene<'_>, plane: &Plane, left: usize) {
    let input = scene.input;
    let shape = input.scan.shape;
    let mut marked = vec![false; PANE * PANE];

    for row in 0..PANE {
        for column in 0..PANE {
            let voxel = scene.to_voxel.apply(scene.field.place(plane, scene.focus, column, row));
            let nearest = shape.nearest(voxel).filter(|&offset| input.brain.inside[offset]);
            let mut colours = [[0.0; 3]; 2];
            if let Some(nearest) = nearest {
                let grey = interpolate(&input.scan.voxels, shape, voxel) as f32 / scene.white;
                let grey = grey.clamp(0.0, 1.0).powf(0.9) * 0.96;
                let share = scene.share(interpolate(input.map, shape, voxel) as f32);
                let strength = (share * 1.6).min(1.0).powi(2) * 0.85;
                let heat = heat(share).map(|heat| grey * (1.0 - strength) + heat * strength);
                colours = [[grey; 3], heat];
                marked[row * PANE + column] = input.mask[nearest];
            }

            for (top, colour) in TOPS.into_iter().zip(colours) {
                canvas.set(left + column, top + row, to_rgb(colour));
            }
        }
    }

    canvas.outline(&marked, (left, TOPS[1]), Stroke::FOUND);
    cross(canvas, scene, plane, (left, TOPS[1]));
    TOPS.into_iter().for_each(|top| canvas.letters(plane, (left, top)));
}

/// Draws short ticks at the pane's edges where the other two planes cut it.
fn cross(canvas: &mut Canvas, scene: &Scene<'_>, plane: &Plane, (left, top): (usize, usize)) {
    let field = &scene.field;
    let pixel = |axis: usize, direction: f64| {
        let shift = direction * (scene.focus[axis] - field.centre[axis]) / field.reach;
        (((shift + 1.0) * 0.5 * PANE as f64) as usize).min(PANE - 1)
    };
    let column = pixel(plane.across.0, plane.across.1);
    let row = PANE - 1 - pixel(plane.up.0, plane.up.1);

    for length in 0..12 {
        for (x, y) in
            [(column, length), (column, PANE - 1 - length), (length, row), (PANE - 1 - length, row)]
        {
            canvas.set(left + x, top + y, FAINT);
        }
    }
}

/// Draws the colour bar with its numbers, the legend and the notice.
fn draw_scale(canvas: &mut Canvas, scene: &Scene<'_>, input: &PictureInput<'_>) {
    let (left, top, width, height) = (GAP, TOP + 2 * PANE + GAP / 2 + 22, 460, 16);
    for x in 0..width {
        let colour = to_rgb(heat(x as f32 / (width - 1) as f32));
        for y in 0..height {
            canvas.set(left + x, top + y, colour);
        }
    }

    let label = |value: f32| format!("{value:.2}");
    canvas.text(&label(scene.low), left, top + height + 5, &FONT_6X13, FAINT);
    let end = label(scene.high);
    canvas.text(&end, left + width - 6 * end.len(), top + height + 5, &FONT_6X13, FAINT);

    if input.threshold.is_finite() {
        let x = left + (scene.share(input.threshold) * (width - 1) as f32) as usize;
        for y in 0..height + 6 {
            canvas.set(x, top + y - 3, OUTLINE);
            canvas.set(x + 1, top + y - 3, OUTLINE);
        }
        let text = format!("mask from {:.2}", input.threshold);
        canvas.centred(
            &text,
            x.clamp(left + 100, left + width - 100),
            top + height + 11,
            &FONT_6X13,
            OUTLINE,
        );
    }

    canvas.text(input.scale, left + width + 24, top + 1, &FONT_6X13, FAINT);
    canvas.text("radiological convention", left + width + 24, top + 19, &FONT_6X13, FAINT);
    let notice = RESEARCH_USE_ONLY;
    canvas.text(notice, WIDTH - GAP - 9 * notice.len(), top + 8, &FONT_9X15, INK);
}

/// Colours from dark violet over red and orange to pale yellow. Their lightness grows in even
/// steps, so that people without colour vision can read them (control points of matplotlib's
/// "inferno").
fn heat(share: f32) -> [f32; 3] {
    const STOPS: [[f32; 3]; 6] = [
        [0.087, 0.045, 0.225],
        [0.342, 0.062, 0.429],
        [0.578, 0.148, 0.404],
        [0.842, 0.311, 0.264],
        [0.978, 0.558, 0.035],
        [0.988, 0.998, 0.645],
    ];

    let place = share.clamp(0.0, 1.0) * (STOPS.len() - 1) as f32;
    let index = (place as usize).min(STOPS.len() - 2);
    let fraction = place - index as f32;
    [0, 1, 2].map(|c| STOPS[index][c] * (1.0 - fraction) + STOPS[index + 1][c] * fraction)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::geometry::Shape3;

    /// A ball of brain with an odd spot at the patient's left front.
    fn picture(rows: [[f64; 4]; 3]) -> Vec<u8> {
        let shape = Shape3([30, 34, 26]);
        let affine = Affine::new(rows).unwrap();
        let world = |o: usize| affine.to_world(VoxelPoint(shape.voxel(o).map(|v| v as f64))).0;
        let near = |o: usize, place: [f64; 3], radius: f64| {
            let d2: f64 = world(o).iter().zip(place).map(|(a, b)| (a - b).powi(2)).sum();
            d2 < radius * radius
        };
        let inside: Vec<bool> = (0..shape.n_voxels()).map(|o| near(o, [0.0; 3], 11.0)).collect();
        let map: Vec<f32> = (0..shape.n_voxels())
            .map(|o| if near(o, [-5.0, 5.0, 2.0], 3.0) { 2.0 } else { f32::from(inside[o]) })
            .collect();
        let mask: Vec<bool> = map.iter().map(|&v| v > 1.5).collect();
        let scan = RawVolume { shape, voxels: vec![100.0; shape.n_voxels()], affine };
        render(&PictureInput {
            scale: "anomaly score",
            scan: &scan,
            brain: &RawMask { shape, inside, affine },
            map: &map,
            mask: &mask,
            threshold: 1.5,
            focus: None,
            top: 2.0,
            title: "title",
            summary: "summary",
            quality: "",
        })
    }

    fn pixel(png: &[u8], x: usize, y: usize) -> [u8; 3] {
        let picture = image::load_from_memory(png).unwrap().to_rgb8();
        assert_eq!(picture.dimensions(), (WIDTH as u32, HEIGHT as u32));
        picture.get_pixel(x as u32, y as u32).0
    }

    const RIGHT_HANDED: [[f64; 4]; 3] =
        [[1.0, 0.0, 0.0, -15.0], [0.0, 1.0, 0.0, -17.0], [0.0, 0.0, 1.0, -13.0]];

    #[test]
    fn the_spot_at_the_left_front_is_drawn_at_the_upper_right_on_any_grid() {
        let left_handed = [[-1.0, 0.0, 0.0, 14.0], [0.0, 1.0, 0.0, -17.0], [0.0, 0.0, 1.0, -13.0]];
        let (c, s) = (0.8, 0.6);
        let turned = [
            [c, -s, 0.0, -15.0 * c + 17.0 * s],
            [s, c, 0.0, -15.0 * s - 17.0 * c],
            [0.0, 0.0, 1.0, -13.0],
        ];
        for rows in [RIGHT_HANDED, left_handed, turned] {
            let png = picture(rows);
            // Axial pane with overlay: 5 mm to the left and front of the middle.
            let (left, top) = (GAP, TOP + PANE + GAP / 2);
            let step = (PANE as f64 / 2.0 * 5.0 / (11.0 * 1.16)) as usize;
            let spot = pixel(&png, left + PANE / 2 + step, top + PANE / 2 - step);
            let mirrored = pixel(&png, left + PANE / 2 - step, top + PANE / 2 - step);
            assert!(spot[0] > 150 && spot[0] > spot[2], "hot: {spot:?}");
            assert!(mirrored[0].abs_diff(mirrored[2]) < 12, "grey: {mirrored:?}");
        }
    }

    #[test]
    fn nothing_outside_the_brain_is_shown() {
        let png = picture(RIGHT_HANDED);
        assert_eq!(pixel(&png, GAP + 60, TOP + 60), [0, 0, 0]);
        assert_eq!(png, picture(RIGHT_HANDED));
    }
}
