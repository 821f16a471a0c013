//! The parts that all pictures share: a canvas for pixels and text, the three planes, and their
//! panes.
//!
//! Radiological convention: the patient's right is on the left.

use embedded_graphics::{
    mono_font::{MonoFont, MonoTextStyle, ascii::FONT_9X15},
    pixelcolor::{Rgb888, RgbColor},
    prelude::{DrawTarget, OriginDimensions, Pixel, Point, Size},
    text::{Alignment, Baseline, Text, TextStyleBuilder},
};
use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

/// Width of a picture, pixels: three panes and the gaps around them.
pub(super) const WIDTH: usize = 1200;
/// Edge of a pane, pixels.
pub(super) const PANE: usize = 372;
/// Gap between panes and at the margins, pixels.
pub(super) const GAP: usize = 21;
/// Upper edge of the first row of panes, pixels. The texts are above it.
pub(super) const TOP: usize = 88;

/// Colour of main texts.
pub(super) const INK: Rgb888 = Rgb888::new(228, 230, 235);
/// Colour of side texts.
pub(super) const FAINT: Rgb888 = Rgb888::new(140, 146, 158);
/// Colour of the outline of the mask, and of the scan's brain in alignment pictures.
pub(super) const OUTLINE: Rgb888 = Rgb888::new(60, 220, 235);
const BACKGROUND: Rgb888 = Rgb888::new(13, 14, 18);

/// How an outline is drawn.
#[derive(Clone, Copy)]
pub(super) struct Stroke {
    pub(super) colour: Rgb888,
    pub(super) is_dashed: bool,
}

impl Stroke {
    pub(super) const FOUND: Self = Self { colour: OUTLINE, is_dashed: false };
    /// Length of a dash, and of the gap between two dashes, pixels.
    const DASH: usize = 6;

    /// Whether a pixel of the outline is drawn.
    pub(super) fn shows(self, x: usize, y: usize) -> bool {
        !self.is_dashed || (x / Self::DASH + y / Self::DASH).is_multiple_of(2)
    }
}

/// One of the three views: which world axes run to the right and upwards, and in which direction.
pub(super) struct Plane {
    pub(super) name: &'static str,
    /// World axis that the plane cuts.
    pub(super) through: usize,
    pub(super) across: (usize, f64),
    pub(super) up: (usize, f64),
    /// Letters at the left, right, top and bottom edge.
    letters: [&'static str; 4],
}

pub(super) const PLANES: [Plane; 3] = [
    Plane {
        name: "axial",
        through: 2,
        across: (0, -1.0),
        up: (1, 1.0),
        letters: ["R", "L", "A", "P"],
    },
    Plane {
        name: "coronal",
        through: 1,
        across: (0, -1.0),
        up: (2, 1.0),
        letters: ["R", "L", "S", "I"],
    },
    Plane {
        name: "sagittal",
        through: 0,
        across: (1, -1.0),
        up: (2, 1.0),
        letters: ["A", "P", "S", "I"],
    },
];

impl Plane {
    /// Caption of a pane: the plane's name and its place in mm.
    pub(super) fn caption(&self, focus: [f64; 3]) -> String {
        let place = focus[self.through];
        format!("{}  {} = {place:.0} mm", self.name, ["x", "y", "z"][self.through])
    }
}

/// The part of the world that the panes show. All panes have one scale.
pub(super) struct Field {
    /// World place at the centre of a pane, mm.
    pub(super) centre: [f64; 3],
    /// Half the edge of a pane, mm.
    pub(super) reach: f64,
}

impl Field {
    /// World place of a pixel of a pane. The pane shows the plane through `focus`.
    pub(super) fn place(
        &self,
        plane: &Plane,
        focus: [f64; 3],
        column: usize,
        row: usize,
    ) -> [f64; 3] {
        let shift = |pixel: usize| (pixel as f64 + 0.5) / PANE as f64 * 2.0 - 1.0;
        let mut place = focus;
        let ((across, right), (up, upwards)) = (plane.across, plane.up);
        place[across] = self.centre[across] + right * shift(column) * self.reach;
        place[up] = self.centre[up] - upwards * shift(row) * self.reach;
        place
    }
}

pub(super) fn to_rgb(colour: [f32; 3]) -> Rgb888 {
    let [r, g, b] = colour.map(|c| (c.clamp(0.0, 1.0) * 255.0 + 0.5) as u8);
    Rgb888::new(r, g, b)
}

/// An RGB picture that text can be drawn on.
pub(super) struct Canvas {
    height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    pub(super) fn new(height: usize) -> Self {
        let background = [BACKGROUND.r(), BACKGROUND.g(), BACKGROUND.b()];
        Self { height, pixels: background.repeat(WIDTH * height) }
    }

    pub(super) fn set(&mut self, x: usize, y: usize, colour: Rgb888) {
        if x < WIDTH && y < self.height {
            let start = 3 * (y * WIDTH + x);
            self.pixels[start..start + 3].copy_from_slice(&[colour.r(), colour.g(), colour.b()]);
        }
    }

    /// Draws text from its upper left corner and cuts it at the right margin.
    pub(super) fn text(
        &mut self,
        text: &str,
        x: usize,
        y: usize,
        font: &MonoFont<'_>,
        colour: Rgb888,
    ) {
        let room = (WIDTH - GAP).saturating_sub(x) / font.character_size.width as usize;
        let text: String = text.chars().take(room).collect();
        let style = MonoTextStyle::new(font, colour);
        let place = Point::new(x as i32, y as i32);
        drawn(Text::with_baseline(&text, place, style, Baseline::Top), self);
    }

    pub(super) fn centred(
        &mut self,
        text: &str,
        x: usize,
        y: usize,
        font: &MonoFont<'_>,
        colour: Rgb888,
    ) {
        let style = MonoTextStyle::new(font, colour);
        let middle =
            TextStyleBuilder::new().alignment(Alignment::Center).baseline(Baseline::Middle).build();
        drawn(Text::with_text_style(text, Point::new(x as i32, y as i32), style, middle), self);
    }

    /// Draws a line of two pixels along the inner edge of the `marked` pixels of a pane, `[PANE,
    /// PANE]`.
    pub(super) fn outline(&mut self, marked: &[bool], (left, top): (usize, usize), stroke: Stroke) {
        let outside = |row: isize, column: isize| {
            let range = 0..PANE as isize;
            !range.contains(&row)
                || !range.contains(&column)
                || !marked[row as usize * PANE + column as usize]
        };

        for row in 0..PANE as isize {
            for column in 0..PANE as isize {
                let near = [(-1, 0), (1, 0), (0, -1), (0, 1), (-2, 0), (2, 0), (0, -2), (0, 2)];
                let edge = near.iter().any(|(r, c)| outside(row + r, column + c));
                let (x, y) = (column as usize, row as usize);
                if !outside(row, column) && edge && stroke.shows(x, y) {
                    self.set(left + x, top + y, stroke.colour);
                }
            }
        }
    }

    /// Draws the letters of the patient's directions at the edges of a pane.
    pub(super) fn letters(&mut self, plane: &Plane, (left, top): (usize, usize)) {
        let middle = PANE / 2;
        let places = [(14, middle), (PANE - 14, middle), (middle, 24), (middle, PANE - 14)];
        for (letter, (x, y)) in plane.letters.iter().zip(places) {
            self.centred(letter, left + x, top + y, &FONT_9X15, FAINT);
        }
    }

    pub(super) fn png(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        PngEncoder::new(&mut bytes)
            .write_image(&self.pixels, WIDTH as u32, self.height as u32, ExtendedColorType::Rgb8)
            .expect("a Vec takes all bytes, and the size fits");
        bytes
    }
}

fn drawn(text: Text<'_, MonoTextStyle<'_, Rgb888>>, canvas: &mut Canvas) {
    use embedded_graphics::Drawable;
    text.draw(canvas).expect("drawing into memory cannot fail");
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(WIDTH as u32, self.height as u32)
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = std::convert::Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Self::Error> {
        for Pixel(place, colour) in pixels {
            if let (Ok(x), Ok(y)) = (usize::try_from(place.x), usize::try_from(place.y)) {
                self.set(x, y, colour);
            }
        }
        Ok(())
    }
}
