//! How a scan was acquired. This decides which scans it may be compared with.
//!
//! The facts describe scanner model and sequence. They say nothing about the patient, the staff or
//! the individual device, because results have more readers than the scanner.

use serde::{Deserialize, Serialize};

/// BIDS suffixes of the structural images that a cohort can be made of.
pub const SUFFIXES: [&str; 12] = [
    "T1w",
    "T2w",
    "FLAIR",
    "PDw",
    "T2star",
    "T1map",
    "T2map",
    "inplaneT1",
    "inplaneT2",
    "angio",
    "swi",
    "T1ce",
];

/// The suffix as BIDS spells it; the case of `word` does not matter.
pub fn known_suffix(word: &str) -> Option<&'static str> {
    SUFFIXES.into_iter().find(|suffix| suffix.eq_ignore_ascii_case(word))
}

/// The BIDS suffix of a stem: the part after the last underscore, if it is a known one.
pub fn suffix_of(stem: &str) -> Option<&'static str> {
    known_suffix(stem.rsplit_once('_').map_or(stem, |(_, suffix)| suffix))
}

/// What is known of the acquisition: from the file name, the grid, and the JSON that dcm2niix or a
/// BIDS data set puts beside the scan. A fact that no source states is absent. Numbers are finite
/// and above 0.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AcquisitionFacts {
    /// BIDS suffix of the file name, as BIDS spells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suffix: Option<String>,
    /// Voxel sizes of the grid, mm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spacing_mm: Option<[f64; 3]>,
    /// Whether a JSON beside the scan was read.
    pub has_json: bool,
    /// `MagneticFieldStrength`, tesla.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field_strength_t: Option<f64>,
    /// `Manufacturer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manufacturer: Option<String>,
    /// `ManufacturersModelName`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// `SeriesDescription`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub series: Option<String>,
    /// `ProtocolName`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// `MRAcquisitionType`: `2D` or `3D`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dimensions: Option<String>,
    /// `EchoTime`, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub echo_time_ms: Option<f64>,
    /// `RepetitionTime`, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_time_ms: Option<f64>,
    /// `InversionTime`, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inversion_time_ms: Option<f64>,
    /// `SliceThickness`, mm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slice_thickness_mm: Option<f64>,
}

impl AcquisitionFacts {
    /// Whether a voxel edge is known to be longer than `most_mm`; never if that is 0. The tolerance
    /// covers headers that hold spacings in f32.
    pub fn has_voxels_above(&self, most_mm: f64) -> bool {
        let is_above = |edges: [f64; 3]| edges.iter().any(|edge| *edge > most_mm + 1e-4);
        most_mm > 0.0 && self.spacing_mm.is_some_and(is_above)
    }

    /// The facts that name and grid give.
    pub fn of(stem: &str, spacing_mm: [f64; 3]) -> Self {
        Self {
            suffix: suffix_of(stem).map(str::to_owned),
            spacing_mm: Some(spacing_mm),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suffix_is_what_follows_the_last_underscore_and_anything_unknown_is_none() {
        assert_eq!(suffix_of("sub-01_ses-2_FLAIR"), Some("FLAIR"));
        assert_eq!(suffix_of("brats13-0001_t1W"), Some("T1w"));
        assert_eq!(suffix_of("T2w"), Some("T2w"));
        assert_eq!(suffix_of("scan"), None);
        assert_eq!(suffix_of("DOE^JOHN_1980"), None);
    }
}
