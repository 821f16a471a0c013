//! Decodes and scales the pixels of one file, frame by frame.

use std::{borrow::Cow, io::Read};

use dicom_core::{VR, value::Value};
use dicom_dictionary_std::{tags, uids};
use dicom_object::DefaultDicomObject;
use dicom_pixeldata::PixelDecoder;

use super::{
    codestream,
    elements::Part,
    faults::{EXPORT_AGAIN, unreadable},
    header::Dataset,
    open::{EXPLICIT_VR_BIG_ENDIAN, open},
    values,
};
use crate::domain::error::{
    QuarantineReason::{BadHeader, Corrupt, NonFinite, Truncated, Unsupported},
    Refusal,
};

/// A file with its pixels, not yet decoded.
pub struct Pixels {
    file: DefaultDicomObject,
    /// Columns and rows.
    extents: [usize; 2],
    layout: Layout,
}

/// The layout of a number in its bytes (PS3.5, 8.1.1).
#[derive(Debug, Clone, Copy)]
struct Layout {
    n_bytes: usize,
    bits_stored: u32,
    high_bit: u32,
    is_signed: bool,
    /// Whether the words of 16 bits come with the high one first, as in big-endian files.
    is_high_word_first: bool,
}

/// The transfer syntaxes of pixels that can be read. Implicit and deflated data sets are explicit
/// ones once they are open.
const READABLE: [&str; 9] = [
    uids::EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    uids::JPEG_BASELINE8_BIT,
    uids::JPEG_EXTENDED12_BIT,
    uids::JPEG_LOSSLESS,
    uids::JPEG_LOSSLESS_SV1,
    uids::JPEG2000_LOSSLESS,
    uids::JPEG2000,
    uids::RLE_LOSSLESS,
];

impl Pixels {
    /// Reads a file up to the end of its pixels.
    ///
    /// # Errors
    /// If the file cannot be parsed, or the layout or compression of its pixels is not supported.
    pub fn read(reader: impl Read) -> Result<Self, Refusal> {
        // Data after the pixels, such as signatures, is not needed.
        let opened = open(reader, Part::Pixels)?;
        let file = opened.object;

        let whole = |tag| values::whole(&file, tag);
        let [columns, rows, allocated] =
            [tags::COLUMNS, tags::ROWS, tags::BITS_ALLOCATED].map(|tag| whole(tag).unwrap_or(0));
        // The file may have changed since its header was read.
        Dataset(&file).check_pixels([columns as usize, rows as usize])?;
        let bits_stored = whole(tags::BITS_STORED).unwrap_or(allocated);
        let high_bit = whole(tags::HIGH_BIT).unwrap_or(bits_stored.saturating_sub(1));
        let is_sound = bits_stored >= 1 && high_bit < allocated && bits_stored <= high_bit + 1;
        if !is_sound {
            let found = format!(
                "bits stored {bits_stored}, high bit {high_bit}, bits allocated {allocated}"
            );
            return Err(Refusal::new(Corrupt, found, "values that fit each other", EXPORT_AGAIN));
        }

        let Some(syntax) = opened.syntax else {
            let found = "compressed pixels, and no transfer syntax that says how";
            let action = "export the series with meta information (PS3.10), or uncompressed";
            return Err(Refusal::new(BadHeader, found, "a transfer syntax", action));
        };
        if !READABLE.contains(&syntax.as_str()) {
            let needed = "no compression, JPEG, JPEG lossless, JPEG 2000 or RLE";
            let action =
                "let the archive send it uncompressed, or decompress it (dcmdjpls, dcmdjpeg)";
            let found = format!("pixels in the transfer syntax {syntax}");
            return Err(Refusal::new(Unsupported, found, needed, action));
        }

        let layout = Layout {
            n_bytes: allocated as usize / 8,
            bits_stored,
            high_bit,
            is_signed: whole(tags::PIXEL_REPRESENTATION) == Some(1),
            // The parser returns each word as little endian, not each pixel.
            is_high_word_first: syntax == EXPLICIT_VR_BIG_ENDIAN
                && allocated == 32
                && file.get(tags::PIXEL_DATA).is_some_and(|pixels| pixels.vr() == VR::OW),
        };
        let extents = [columns as usize, rows as usize];
        if let Some(Value::PixelSequence(pixels)) = file.get(tags::PIXEL_DATA).map(|it| it.value())
        {
            codestream::check(&syntax, pixels.fragments(), extents, layout.n_bytes)?;
        }
        Ok(Self { extents, layout, file })
    }

    /// Decodes some frames and scales each by its own slope and intercept. `take` gets the position
    /// in `frames` and the intensities, row by row from the top.
    ///
    /// # Errors
    /// If a frame cannot be decoded, is not as large as the header says, or is not finite.
    pub fn frames(
        &self,
        frames: &[(usize, [f64; 2])],
        mut take: impl FnMut(usize, Vec<f32>),
    ) -> Result<(), Refusal> {
        let n_pixels = self.extents[0] * self.extents[1];
        let plain = self.plain()?;
        for (position, &(frame, rescale)) in frames.iter().enumerate() {
            let bytes = match &plain {
                Some(all) => {
                    self.check_length(all.len(), n_pixels * self.layout.n_bytes)?;
                    frame_of(all, frame, n_pixels * self.layout.n_bytes)?
                }
                None => Cow::Owned(self.decompress(frame)?),
            };
            if bytes.len() < n_pixels * self.layout.n_bytes {
                return Err(too_short(bytes.len(), n_pixels * self.layout.n_bytes));
            }

            let values = self.layout.values(&bytes, n_pixels, rescale);
            if values.iter().any(|value| !value.is_finite()) {
                let action = "check the rescale slope and intercept";
                return Err(Refusal::new(NonFinite, "infinite pixels", "finite pixels", action));
            }
            take(position, values);
        }
        Ok(())
    }

    /// Refuses pixels that are longer than the header says by a row or more: its rows, columns or
    /// bits are wrong then, and the image would be cut or sheared.
    fn check_length(&self, found: usize, of_frame: usize) -> Result<(), Refusal> {
        let n_frames = self.file.get(tags::NUMBER_OF_FRAMES).and_then(|n| n.to_int::<usize>().ok());
        let stated = of_frame.saturating_mul(n_frames.unwrap_or(1).max(1));
        if found < stated.saturating_add(self.extents[0] * self.layout.n_bytes) {
            return Ok(());
        }
        let found = format!("{found} bytes of pixels");
        let needed = format!("{stated}, as rows, columns, bits and frames in the header say");
        Err(Refusal::new(Corrupt, found, needed, EXPORT_AGAIN))
    }

    /// The bytes of all frames; `None` if they are compressed.
    fn plain(&self) -> Result<Option<Cow<'_, [u8]>>, Refusal> {
        let Some(element) = self.file.get(tags::PIXEL_DATA) else {
            return Err(Refusal::new(Truncated, "no pixels", "pixel data", EXPORT_AGAIN));
        };
        match element.value() {
            Value::Primitive(bytes) => Ok(Some(bytes.to_bytes())),
            _ => Ok(None),
        }
    }

    fn decompress(&self, frame: usize) -> Result<Vec<u8>, Refusal> {
        let decoded = self.file.decode_pixel_data_frame(frame as u32).map_err(|error| {
            let text = unreadable(error).found;
            let found = format!("pixels that cannot be decompressed: {text}");
            Refusal::new(Corrupt, found, "a compressed image that matches its header", EXPORT_AGAIN)
        })?;
        Ok(decoded.into_data())
    }
}

fn too_short(found: usize, needed: usize) -> Refusal {
    let found = format!("{found} bytes of pixels in a frame");
    Refusal::new(Truncated, found, format!("{needed}, as the header announces"), EXPORT_AGAIN)
}

fn frame_of<'a>(all: &'a [u8], frame: usize, n_bytes: usize) -> Result<Cow<'a, [u8]>, Refusal> {
    let start = frame.saturating_mul(n_bytes);
    let bytes = all.get(start..start.saturating_add(n_bytes));
    bytes.map(Cow::Borrowed).ok_or_else(|| too_short(all.len().saturating_sub(start), n_bytes))
}

impl Layout {
    fn values(self, bytes: &[u8], n_pixels: usize, [slope, intercept]: [f64; 2]) -> Vec<f32> {
        let pixels = bytes.chunks_exact(self.n_bytes).take(n_pixels);
        let stored = pixels.map(|pixel| {
            // The codecs and the parser return little-endian numbers for every file.
            let number =
                pixel.iter().rev().fold(0_u32, |number, &byte| number << 8 | u32::from(byte));
            if self.is_high_word_first { number.rotate_left(16) } else { number }
        });
        stored.map(|stored| (self.value(stored) * slope + intercept) as f32).collect()
    }

    /// The number in the stored bits. The bits above and below are ignored, because old files keep
    /// overlays there.
    fn value(self, stored: u32) -> f64 {
        let shifted = stored << (31 - self.high_bit);
        let unused = 32 - self.bits_stored;
        if self.is_signed {
            f64::from(shifted.cast_signed() >> unused)
        } else {
            f64::from(shifted >> unused)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_stored_bits_count_and_the_highest_of_them_is_the_sign() {
        let layout = |bits_stored, high_bit, is_signed| Layout {
            n_bytes: 2,
            bits_stored,
            high_bit,
            is_signed,
            is_high_word_first: false,
        };
        assert_eq!(layout(12, 11, false).value(0xf123), f64::from(0x123));
        assert_eq!(layout(12, 11, true).value(0x0fff), -1.0);
        assert_eq!(layout(12, 15, false).value(0x1234), f64::from(0x123));
        assert_eq!(layout(16, 15, true).value(0x8000), -32768.0);
        assert_eq!(layout(16, 15, false).values(&[1, 2], 1, [2.0, -3.0]), [1023.0]);
        let wide = Layout { n_bytes: 4, ..layout(32, 31, true) };
        assert_eq!(wide.values(&[255, 255, 255, 255], 1, [1.0, 0.0]), [-1.0]);
        let swapped = Layout { is_high_word_first: true, ..wide };
        assert_eq!(swapped.values(&[1, 0, 2, 0], 1, [1.0, 0.0]), [65538.0]);
    }
}
