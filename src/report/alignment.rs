//! The template's place in a scan: a picture for people, and a transform for other programs.
//!
//! The picture has a row for each plane, with three slices through the brain. Everything is sampled
//! in world space at one scale. So a slice of 8 mm looks as thick as it is in the patient.

use embedded_graphics::{
    mono_font::ascii::{FONT_6X13, FONT_9X15, FONT_10X20},
    pixelcolor::Rgb888,
};
use rayon::prelude::*;

use super::{
    RESEARCH_USE_ONLY,
    canvas::{Canvas, FAINT, Field, GAP, INK, PANE, PLANES, Plane, Stroke, TOP, WIDTH, to_rgb},
};
use crate::numeric::{
    geometry::Affine,
    registration::percentile,
    volume::{RawVolume, interpolate},
};

/// The input of [`alignment_picture`].
pub struct AlignmentPicture<'a> {
    /// The scan on its own grid. Unlike a picture of results, this one also shows the tissue around
    /// the brain, because it reveals a wrong alignment.
    pub scan: &'a RawVolume,
    /// The brain that was found, on the scan's grid.
    pub brain: Option<&'a [bool]>,
    /// The template's brain at its best fit, on the scan's grid.
    pub template: Option<&'a [bool]>,
    /// First line: which scan.
    pub title: &'a str,
    /// Second line: how well it fits.
    pub line: &'a str,
}

const HEIGHT: usize = TOP + 3 * PANE + 2 * STEP + 56;
/// Gap between rows, pixels.
const STEP: usize = GAP / 2;
/// Margin around the brains, mm. A scan without any brain gets no margin.
const MARGIN_MM: f64 = 20.0;
/// Places of the slices, as shares of the brain's extent.
const SHARES: [f64; 3] = [0.25, 0.5, 0.75];
/// Line of the template's outline. Its dashes leave the other outline visible where both meet.
const TEMPLATE: Stroke = Stroke { colour: Rgb888::new(255, 165, 50), is_dashed: true };

/// The bytes of a PNG, 1200 x 1280; the same input gives the same bytes.
pub fn alignment_picture(input: &AlignmentPicture<'_>) -> Vec<u8> {
    let mut canvas = Canvas::new(HEIGHT);
    canvas.text(input.title, GAP, 18, &FONT_10X20, INK);
    canvas.text(input.line, GAP, 44, &FONT_9X15, FAINT);

    let panes = panes(input);
    let scale = Shades::of(&panes);
    for (index, pane) in panes.iter().enumerate() {
        let left = GAP + index % SHARES.len() * (PANE + GAP);
        let top = TOP + index / SHARES.len() * (PANE + STEP);
        draw_pane(&mut canvas, pane, &scale, (left, top));
    }

    draw_legend(&mut canvas, input);
    canvas.png()
}

/// One slice of the scan, `[PANE, PANE]`.
struct Pane {
    plane: &'static Plane,
    focus: [f64; 3],
    /// Intensities; `None` outside the scan's grid.
    voxels: Vec<Option<f32>>,
    brain: Vec<bool>,
    template: Vec<bool>,
}

/// All slices, row by row.
fn panes(input: &AlignmentPicture<'_>) -> Vec<Pane> {
    let scan = input.scan;
    let whole = world_box(scan, |_| true).unwrap_or_default();
    let brain = input.brain.and_then(|inside| world_box(scan, |offset| inside[offset]));
    let template = input.template.and_then(|inside| world_box(scan, |offset| inside[offset]));
    let brains = brain.into_iter().chain(template).reduce(around_both);

    let field = match brains {
        Some([low, high]) => field([low.map(|mm| mm - MARGIN_MM), high.map(|mm| mm + MARGIN_MM)]),
        None => field(whole),
    };
    let [low, high] = brain.or(template).unwrap_or(whole);
    let places = PLANES.iter().rev().flat_map(|plane| SHARES.map(|share| (plane, share)));
    let pane = |(plane, share): (&'static Plane, f64)| {
        let mut focus = field.centre;
        let axis = plane.through;
        focus[axis] = low[axis] + share * (high[axis] - low[axis]);
        sampled(input, plane, focus, &field)
    };
    let places: Vec<(&Plane, f64)> = places.collect();
    places.into_par_iter().map(pane).collect()
}

/// A field that shows the whole box.
fn field([low, high]: [[f64; 3]; 2]) -> Field {
    let extent = (0..3).map(|axis| high[axis] - low[axis]).fold(1.0, f64::max);
    Field { centre: [0, 1, 2].map(|axis| 0.5 * (low[axis] + high[axis])), reach: 0.5 * extent }
}

fn around_both([low, high]: [[f64; 3]; 2], other: [[f64; 3]; 2]) -> [[f64; 3]; 2] {
    [
        [0, 1, 2].map(|axis| low[axis].min(other[0][axis])),
        [0, 1, 2].map(|axis| high[axis].max(other[1][axis])),
    ]
}

/// The box around the voxels whose offset satisfies `is_inside`, world mm.
fn world_box(scan: &RawVolume, is_inside: impl Fn(usize) -> bool) -> Option<[[f64; 3]; 2]> {
    let width = scan.shape.0[0];
    let rows = (0..scan.shape.n_voxels()).step_by(width.max(1));
    // Along a row, each coordinate only grows or only falls. So the two ends are enough.
    let ends = rows.filter_map(|first| {
        let mut row = (first..first + width).filter(|&offset| is_inside(offset));
        let start = row.next()?;
        Some([start, row.next_back().unwrap_or(start)])
    });
    ends.flatten()
        .map(|offset| scan.affine.apply(scan.shape.voxel(offset).map(|v| v as f64)))
        .map(|place| [place, place])
        .reduce(around_both)
}

fn sampled(
    input: &AlignmentPicture<'_>,
    plane: &'static Plane,
    focus: [f64; 3],
    field: &Field,
) -> Pane {
    let RawVolume { shape, voxels, affine } = input.scan;
    let to_voxel = affine.inverse();
    let mut pane =
        Pane { plane, focus, voxels: Vec::new(), brain: Vec::new(), template: Vec::new() };

    for (row, column) in (0..PANE * PANE).map(|pixel| (pixel / PANE, pixel % PANE)) {
        let voxel = to_voxel.apply(field.place(plane, focus, column, row));
        let nearest = shape.nearest(voxel);
        let is_in = |mask: Option<&[bool]>| {
            nearest.is_some_and(|offset| mask.is_some_and(|inside| inside[offset]))
        };
        pane.voxels.push(nearest.map(|_| interpolate(voxels, *shape, voxel) as f32));
        pane.brain.push(is_in(input.brain));
        pane.template.push(is_in(input.template));
    }
    pane
}

/// The intensities that are drawn black and white. They are percentiles of the visible voxels, so
/// that neither a bright vessel nor noise in air decides.
struct Shades {
    black: f32,
    white: f32,
}

impl Shades {
    fn of(panes: &[Pane]) -> Self {
        let shown = panes.iter().flat_map(|pane| pane.voxels.iter().flatten());
        let mut shown: Vec<f32> = shown.copied().collect();
        let black = percentile(&mut shown, 0.01).unwrap_or(0.0);
        let white = percentile(&mut shown, 0.995).unwrap_or(0.0);
        Self { black, white: white.max(black + f32::MIN_POSITIVE) }
    }

    fn grey(&self, voxel: f32) -> f32 {
        let share = (voxel - self.black) / (self.white - self.black).max(f32::MIN_POSITIVE);
        share.clamp(0.0, 1.0).powf(0.9) * 0.96
    }
}

fn draw_pane(canvas: &mut Canvas, pane: &Pane, scale: &Shades, (left, top): (usize, usize)) {
    for (pixel, voxel) in pane.voxels.iter().enumerate() {
        let grey = voxel.map_or(0.0, |voxel| scale.grey(voxel));
        canvas.set(left + pixel % PANE, top + pixel / PANE, to_rgb([grey; 3]));
    }
    canvas.outline(&pane.brain, (left, top), Stroke::FOUND);
    canvas.outline(&pane.template, (left, top), TEMPLATE);
    canvas.letters(pane.plane, (left, top));
    canvas.text(&pane.plane.caption(pane.focus), left + 8, top + 6, &FONT_6X13, FAINT);
}

/// Draws the meaning of the outlines, and the notice.
fn draw_legend(canvas: &mut Canvas, input: &AlignmentPicture<'_>) {
    let middle = TOP + 3 * PANE + 2 * STEP + 28;
    let mut left = GAP;
    let brain = input.brain.map(|_| (Stroke::FOUND, "brain of the scan"));
    let template = input.template.map(|_| (TEMPLATE, "template's brain where it fits best"));

    for (stroke, text) in brain.into_iter().chain(template) {
        for x in (0..30).filter(|&x| stroke.shows(x, 0)) {
            canvas.set(left + x, middle - 1, stroke.colour);
            canvas.set(left + x, middle, stroke.colour);
        }
        canvas.text(text, left + 40, middle - 6, &FONT_6X13, FAINT);
        left += 40 + 6 * text.len() + 30;
    }

    canvas.text("radiological convention", left, middle - 6, &FONT_6X13, FAINT);
    let notice = RESEARCH_USE_ONLY;
    canvas.text(notice, WIDTH - GAP - 9 * notice.len(), middle - 7, &FONT_9X15, INK);
}

/// The text of an ITK transform file (`.tfm`). With it, ITK, SimpleITK, ANTs and Slicer resample
/// the scan onto the template's grid.
///
/// ITK's first two axes point left and back (LPS), those of oddscan right and front (RAS). So these
/// axes change their sign on either side of the matrix. ITK's transforms map places of the fixed
/// image to the moving image. `template_to_scan` does so, too, with the template as the fixed
/// image.
pub fn itk_transform(template_to_scan: &Affine) -> String {
    const TO_LPS: [f64; 3] = [-1.0, -1.0, 1.0];
    let rows = template_to_scan.rows();
    // Adding 0 turns -0 into 0.
    let entry = |row: usize, column: usize| TO_LPS[row] * rows[row][column] * TO_LPS[column] + 0.0;
    let matrix = (0..9).map(|index| entry(index / 3, index % 3));
    let shift = (0..3).map(|row| TO_LPS[row] * rows[row][3] + 0.0);
    let parameters: Vec<String> = matrix.chain(shift).map(|number| number.to_string()).collect();
    format!(
        "#Insight Transform File V1.0\n\
         #Transform 0\n\
         Transform: AffineTransform_double_3_3\n\
         Parameters: {}\n\
         FixedParameters: 0 0 0\n",
        parameters.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::geometry::{Shape3, VoxelPoint};

    /// Slices of 8 mm along z: a ball of 40 mm around the origin, brighter at the patient's left.
    fn scan(rows: [[f64; 4]; 3], shape: Shape3) -> (RawVolume, Vec<bool>) {
        let affine = Affine::new(rows).unwrap();
        let places = (0..shape.n_voxels())
            .map(|offset| affine.to_world(VoxelPoint(shape.voxel(offset).map(|v| v as f64))).0);
        let places: Vec<[f64; 3]> = places.collect();
        let inside: Vec<bool> =
            places.iter().map(|[x, y, z]| x * x + y * y + z * z < 1600.0).collect();
        let voxel = |(place, inside): (&[f64; 3], &bool)| match (inside, place[0] < 0.0) {
            (false, _) => 1.0,
            (true, false) => 50.0,
            (true, true) => 100.0,
        };
        let voxels = places.iter().zip(&inside).map(voxel).collect();
        (RawVolume { shape, voxels, affine }, inside)
    }

    const THICK: [[f64; 4]; 3] =
        [[2.0, 0.0, 0.0, -69.0], [0.0, 2.0, 0.0, -75.0], [0.0, 0.0, 8.0, -68.0]];
    const SHAPE: Shape3 = Shape3([70, 76, 18]);

    fn drawn(scan: &RawVolume, brain: Option<&[bool]>, template: Option<&[bool]>) -> Vec<u8> {
        alignment_picture(&AlignmentPicture { scan, brain, template, title: "title", line: "line" })
    }

    fn pixels(png: &[u8]) -> image::RgbImage {
        let picture = image::load_from_memory(png).unwrap().to_rgb8();
        assert_eq!(picture.dimensions(), (1200, 1280));
        picture
    }

    /// Corner of a pane, by row and column.
    fn corner(row: usize, column: usize) -> (u32, u32) {
        ((GAP + column * (PANE + GAP)) as u32, (TOP + row * (PANE + STEP)) as u32)
    }

    /// The box around the pixels of a colour in a pane: width and height.
    fn extent(picture: &image::RgbImage, row: usize, column: usize, colour: [u8; 3]) -> [u32; 2] {
        let (left, top) = corner(row, column);
        let size = PANE as u32;
        let places = (0..size * size).map(|pixel| (pixel % size, pixel / size));
        let found: Vec<(u32, u32)> =
            places.filter(|&(x, y)| picture.get_pixel(left + x, top + y).0 == colour).collect();
        let range = |axis: fn(&(u32, u32)) -> u32| {
            let all = found.iter().map(axis);
            all.clone().max().unwrap() + 1 - all.min().unwrap()
        };
        [range(|place| place.0), range(|place| place.1)]
    }

    const CYAN: [u8; 3] = [60, 220, 235];
    const ORANGE: [u8; 3] = [255, 165, 50];

    #[test]
    fn a_ball_is_round_in_every_plane_whatever_the_thickness_of_the_slices() {
        let (scan, inside) = scan(THICK, SHAPE);
        let picture = pixels(&drawn(&scan, Some(&inside), None));
        // 80 mm of the 120 that a pane shows; slices of 8 mm end up to 4 mm before the ball does.
        let pixels_per_mm = PANE as f64 / 116.0;
        for row in 0..3 {
            let [width, height] = extent(&picture, row, 1, CYAN).map(f64::from);
            for size in [width, height] {
                assert!((size / pixels_per_mm - 80.0).abs() < 9.0, "{row}: {width} x {height}");
            }
        }
    }

    #[test]
    fn the_patients_left_is_on_the_right_on_any_grid() {
        let left_handed = [[-2.0, 0.0, 0.0, 69.0], [0.0, 2.0, 0.0, -75.0], [0.0, 0.0, 8.0, -68.0]];
        // Slices along y; the first voxel axis runs upwards.
        let coronal = [[0.0, 2.0, 0.0, -75.0], [0.0, 0.0, 8.0, -68.0], [2.0, 0.0, 0.0, -69.0]];
        for rows in [THICK, left_handed, coronal] {
            let (scan, inside) = scan(rows, SHAPE);
            let picture = pixels(&drawn(&scan, Some(&inside), None));
            // The middle slices of the coronal and the axial row.
            for row in [1, 2] {
                let (left, top) = corner(row, 1);
                let at = |share: f64| {
                    let x = left + (share * PANE as f64) as u32;
                    picture.get_pixel(x, top + PANE as u32 / 2).0[0]
                };
                assert!(at(0.6) > at(0.4) + 50, "{} {}", at(0.4), at(0.6));
            }
        }
    }

    #[test]
    fn both_outlines_show_where_they_meet_and_none_is_drawn_that_is_not_known() {
        let (scan, inside) = scan(THICK, SHAPE);
        let both = drawn(&scan, Some(&inside), Some(&inside));
        assert_eq!(both, drawn(&scan, Some(&inside), Some(&inside)), "byte by byte");
        let picture = pixels(&both);
        let n_of = |picture: &image::RgbImage, colour: [u8; 3]| {
            picture.pixels().filter(|pixel| pixel.0 == colour).count()
        };
        let (cyan, orange) = (n_of(&picture, CYAN), n_of(&picture, ORANGE));
        assert!(cyan > 1000 && orange > 1000, "{cyan} {orange}");
        let neither = pixels(&drawn(&scan, None, None));
        assert_eq!((n_of(&neither, CYAN), n_of(&neither, ORANGE)), (0, 0));
        let alone = pixels(&drawn(&scan, None, Some(&inside)));
        assert_eq!(n_of(&alone, CYAN), 0);
        assert!(n_of(&alone, ORANGE) > 1000);
    }

    #[test]
    fn scans_with_nothing_to_see_are_drawn_all_the_same() {
        let (mut scan, _) = scan(THICK, SHAPE);
        let nothing = vec![false; scan.voxels.len()];
        for value in [0.0, 7.0, -3.0, f32::MAX, f32::MIN] {
            scan.voxels.fill(value);
            scan.voxels[5] = -value;
            pixels(&drawn(&scan, Some(&nothing), Some(&nothing)));
        }
        let affine = scan.affine;
        let one = RawVolume { shape: Shape3::cube(1), voxels: vec![3.0], affine };
        pixels(&drawn(&one, Some(&[true]), None));
    }

    #[test]
    fn an_itk_transform_counts_to_the_left_and_to_the_back() {
        let affine =
            Affine::new([[0.5, 0.25, 0.125, 10.0], [0.0, 2.0, 1e-7, 20.0], [3.0, 0.0, 4.0, 30.0]]);
        let text = itk_transform(&affine.unwrap());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "#Insight Transform File V1.0");
        assert_eq!(lines[2], "Transform: AffineTransform_double_3_3");
        let parameters = "0.5 0.25 -0.125 0 2 -0.0000001 -3 0 4 -10 -20 30";
        assert_eq!(lines[3], format!("Parameters: {parameters}"));
        assert_eq!(lines[4..], ["FixedParameters: 0 0 0"]);
    }
}
