//! Why a file in the incoming folder is left alone: it stays where it is and makes no scan.
//!
//! Nothing is wrong with most such files. Still, somebody may wait for their results, so that every
//! one is counted by its reason.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A reason for leaving a file alone: a metric label and a word of the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftAlone {
    /// DICOM of another modality than MR.
    NotMr,
    /// DICOM without an image.
    NoImage,
    /// A screen capture.
    Capture,
    /// A localiser.
    Localiser,
    /// Computed from other images.
    Derived,
    /// In colour.
    Colour,
    /// Diffusion-weighted.
    Diffusion,
    /// Phase, real or imaginary part.
    Phase,
    /// Too few slices for a volume.
    TooFewSlices,
    /// Several images at every place.
    TimeSeries,
    /// Slices that do not belong to the stack of their series.
    Stray,
    /// A zip without DICOM files.
    EmptyZip,
    /// The converter did not mention it.
    Unmentioned,
    /// A format of images that oddscan does not read.
    ForeignFormat,
    /// Neither NIfTI nor DICOM by name and content.
    NotAScan,
    /// A link, pipe or device.
    NotAFile,
    /// Below more folders than are searched.
    TooDeep,
    /// In a hidden folder.
    Hidden,
    /// In a folder that cannot be listed.
    Unreadable,
}

impl LeftAlone {
    /// Every reason, for metrics that must exist from the start.
    pub const ALL: [Self; 19] = [
        Self::NotMr,
        Self::NoImage,
        Self::Capture,
        Self::Localiser,
        Self::Derived,
        Self::Colour,
        Self::Diffusion,
        Self::Phase,
        Self::TooFewSlices,
        Self::TimeSeries,
        Self::Stray,
        Self::EmptyZip,
        Self::Unmentioned,
        Self::ForeignFormat,
        Self::NotAScan,
        Self::NotAFile,
        Self::TooDeep,
        Self::Hidden,
        Self::Unreadable,
    ];

    /// Metric label, and name in `oddscan status --json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotMr => "not_mr",
            Self::NoImage => "no_image",
            Self::Capture => "capture",
            Self::Localiser => "localiser",
            Self::Derived => "derived",
            Self::Colour => "colour",
            Self::Diffusion => "diffusion",
            Self::Phase => "phase",
            Self::TooFewSlices => "too_few_slices",
            Self::TimeSeries => "time_series",
            Self::Stray => "stray",
            Self::EmptyZip => "empty_zip",
            Self::Unmentioned => "unmentioned",
            Self::ForeignFormat => "foreign_format",
            Self::NotAScan => "not_a_scan",
            Self::NotAFile => "not_a_file",
            Self::TooDeep => "too_deep",
            Self::Hidden => "hidden",
            Self::Unreadable => "unreadable",
        }
    }
}

/// The reason in words, for lines that people read.
impl fmt::Display for LeftAlone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotMr => "not of the modality MR",
            Self::NoImage => "no image",
            Self::Capture => "a screen capture",
            Self::Localiser => "a localiser",
            Self::Derived => "derived from other images",
            Self::Colour => "in colour",
            Self::Diffusion => "diffusion-weighted",
            Self::Phase => "phase, real or imaginary part",
            Self::TooFewSlices => "too few slices: a localiser, or hardly begun",
            Self::TimeSeries => "a time series or a diffusion series",
            Self::Stray => "slices that do not belong to the stack of their series",
            Self::EmptyZip => "a zip without DICOM files",
            Self::Unmentioned => "not mentioned by the converter",
            Self::ForeignFormat => "of a format that oddscan does not read; convert it to NIfTI",
            Self::NotAScan => "neither NIfTI nor DICOM",
            Self::NotAFile => "a link, a pipe or a device",
            Self::TooDeep => "below too many folders",
            Self::Hidden => "in a hidden folder",
            Self::Unreadable => "in a folder that cannot be listed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_written_as_it_is_named() {
        for reason in LeftAlone::ALL {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.name());
        }
    }
}
