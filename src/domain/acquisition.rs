//! How a scan was acquired. This decides which scans it may be compared with.
//!
//! The facts describe scanner model and sequence. They say nothing about the patient, the staff or
//! the individual device, because results have more readers than the scanner.

use serde::{Deserialize, Serialize};

/// Name of the cohort of scans that no rule takes and whose suffix is not known.
pub const UNKNOWN: &str = "unknown";

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

/// The BIDS suffix of a stem. It is the part after the last underscore, if that is a known one.
/// Else it is the only known one, if nothing but BIDS entities and words of processing follow it:
/// `sub-1_FLAIR_space-MNI`, `sub-1_T1w_reg`.
///
/// With the entity `ce-` a `T1w` is a `T1ce`, unless the label denies it (`ce-none`).
pub fn suffix_of(stem: &str) -> Option<&'static str> {
    by_name(stem).ok()
}

/// Why the name of a scan says no suffix although it has one. `None` if it has none. Quotes nothing
/// but suffixes and entities.
pub fn doubt_of(stem: &str) -> Option<String> {
    by_name(stem).err().flatten()
}

/// Which part of the complex signal the name of a file says, if it is not the magnitude:
/// `part-phase` of BIDS, `_ph` of dcm2niix, and the phases of field maps.
pub fn signal_part_of(stem: &str) -> Option<&'static str> {
    const PHASES: [&str; 5] = ["ph", "phase", "phasediff", "phase1", "phase2"];
    let parts: Vec<String> = stem.split('_').map(str::to_ascii_lowercase).collect();
    let of_entity = |part: &String| match part.as_str() {
        "part-phase" => Some("phase"),
        "part-real" => Some("real part"),
        "part-imag" => Some("imaginary part"),
        _ => None,
    };

    // A name of one word says nothing, and dcm2niix adds more words after its `_ph`.
    let last = parts.iter().skip(1).rev().find(|part| !is_of_conversion(part));
    let of_ending = match last.map(String::as_str) {
        Some("imaginary") => Some("imaginary part"),
        Some(last) if PHASES.contains(&last) => Some("phase"),
        _ => None,
    };
    parts.iter().find_map(of_entity).or(of_ending)
}

/// The suffix that a stem says. `Err` holds the cause if it has a known one and yet says none.
fn by_name(stem: &str) -> Result<&'static str, Option<String>> {
    let parts: Vec<&str> = stem.split('_').collect();
    let known = |part: &&str| known_suffix(part);
    let suffix = match parts.last().and_then(known) {
        Some(suffix) => suffix,
        None => before_the_end(&parts)?,
    };

    let entity = |key: &str| {
        let labels = parts.iter().filter_map(|part| part.split_once('-'));
        labels.filter(|(found, _)| *found == key).map(|(_, label)| label.to_lowercase()).next()
    };
    if entity("inv").is_some() {
        return Err(Some(format!("its name says {suffix} and one of several inversions (inv-)")));
    }
    let is_projection =
        |label: String| ["mip", "minip", "mpr", "sub"].iter().any(|word| label.contains(word));
    if entity("rec").is_some_and(is_projection) {
        return Err(Some(format!("its name says {suffix} and a reconstruction from it (rec-)")));
    }

    let is_denied = |label: String| {
        const DENIALS: [&str; 9] =
            ["none", "no", "0", "pre", "without", "wo", "off", "nocontrast", "noncontrast"];
        DENIALS.contains(&label.as_str()) || label.starts_with("nativ")
    };
    let has_agent = entity("ce").is_some_and(|label| !is_denied(label));
    Ok(if suffix == "T1w" && has_agent { "T1ce" } else { suffix })
}

/// The known suffix that stands before the last part of a name, if there is no doubt about it.
fn before_the_end(parts: &[&str]) -> Result<&'static str, Option<String>> {
    let known: Vec<(usize, &'static str)> = parts
        .iter()
        .enumerate()
        .filter_map(|(index, part)| Some((index, known_suffix(part)?)))
        .collect();

    // A converted series of an unknown kind says so at its end, whatever its description says.
    if known.is_empty() || parts.last() == Some(&UNKNOWN) {
        return Err(None);
    }
    let [(index, suffix)] = known[..] else {
        let suffixes: Vec<&str> = known.into_iter().map(|(_, suffix)| suffix).collect();
        return Err(Some(format!("its name says {}", suffixes.join(" and "))));
    };
    if !parts[index + 1..].iter().all(|part| is_harmless(&part.to_lowercase())) {
        let cause =
            format!("its name says {suffix}, and ends in words that may say a mask or a map");
        return Err(Some(cause));
    }
    Ok(suffix)
}

/// Whether a part of a name, in lower case, leaves the kind of image as it is.
fn is_harmless(part: &str) -> bool {
    const ENTITIES: [&str; 10] =
        ["acq", "run", "desc", "space", "res", "den", "echo", "ses", "task", "dir"];
    const PROCESSING: [&str; 52] = [
        "reg",
        "registered",
        "coreg",
        "coregistered",
        "aligned",
        "rigid",
        "affine",
        "brain",
        "bet",
        "n4",
        "bc",
        "bfc",
        "biascorr",
        "biascorrected",
        "unbiased",
        "corr",
        "corrected",
        "norm",
        "normalized",
        "normalised",
        "mni",
        "mni152",
        "resampled",
        "resliced",
        "iso",
        "1mm",
        "2mm",
        "crop",
        "cropped",
        "deface",
        "defaced",
        "stripped",
        "skullstripped",
        "ss",
        "preproc",
        "preprocessed",
        "restore",
        "acpc",
        "dc",
        "orig",
        "original",
        "denoised",
        "reoriented",
        "ro",
        "std",
        "warped",
        "anon",
        "to",
        "in",
        "final",
        "new",
        "masked",
    ];
    // A value of `desc` can say that these are no intensities.
    const OTHERS: [&str; 7] = ["mask", "seg", "lesion", "label", "prob", "bias", "map"];

    if let Some((key, label)) = part.split_once('-') {
        return ENTITIES.contains(&key) && !OTHERS.iter().any(|word| label.contains(word));
    }
    PROCESSING.contains(&part) || is_of_conversion(part)
}

/// Whether dcm2niix adds this part at the end of a name: number, echo, letter, corrections.
fn is_of_conversion(part: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    let is_echo = part.strip_prefix('e').is_some_and(is_number);
    is_number(part) || is_echo || ["a", "b", "c", "eq", "tilt"].contains(&part)
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

    #[test]
    fn entities_and_words_after_the_suffix_are_understood() {
        for (stem, suffix) in [
            ("sub-01_ce-gadolinium_T1w", Some("T1ce")),
            ("sub-01_ce-none_T1w", Some("T1w")),
            ("sub-01_ce-native_T1w", Some("T1w")),
            ("sub-01_ce-gd_FLAIR", Some("FLAIR")),
            ("sub-01_part-mag_T2star", Some("T2star")),
            ("sub-01_rec-norm_T1w", Some("T1w")),
            ("sub-01_rec-minip_swi", None),
            ("sub-01_inv-1_T1w", None),
            ("sub-01_echo-2_T1w", Some("T1w")),
            ("sub-01_desc-preproc_T1w", Some("T1w")),
            ("sub-01_T1w_desc-preproc", Some("T1w")),
            ("sub-01_FLAIR_space-MNI152NLin6Asym", Some("FLAIR")),
            ("sub-01_T1w_reg", Some("T1w")),
            ("sub-01_FLAIR_brain", Some("FLAIR")),
            ("sub-01_ce-gd_T1w_to_MNI", Some("T1ce")),
            ("sub-01_T1w_Crop_1", Some("T1w")),
            ("sub-01_T1w_seg", None),
            ("sub-01_T1w_desc-brain_mask", None),
            ("sub-01_FLAIR_desc-lesion", None),
            ("sub-01_T1w_pve_0", None),
            ("sub-01_T1w_FLAIR_reg", None),
            ("7_T1w_reformat_unknown", None),
        ] {
            assert_eq!(suffix_of(stem), suffix, "{stem}");
        }
        assert_eq!(doubt_of("sub-01_T1w_FLAIR_reg").unwrap(), "its name says T1w and FLAIR");
        assert!(doubt_of("sub-01_inv-1_T1w").unwrap().contains("inv-"));
        assert!(doubt_of("DOE_T1w_JOHN").is_some_and(|doubt| !doubt.contains("JOHN")));
        assert_eq!([doubt_of("scan"), doubt_of("sub-01_T1w")], [None, None]);
    }

    #[test]
    fn a_name_says_which_part_of_the_signal_a_file_holds() {
        for (stem, part) in [
            ("sub-01_part-phase_T2star", Some("phase")),
            ("sub-01_part-imag_T1w", Some("imaginary part")),
            ("sub-01_part-real_T1w", Some("real part")),
            ("t2_swi3d_e2_ph", Some("phase")),
            ("7_swi_ph_Eq_1", Some("phase")),
            ("sub-01_phasediff", Some("phase")),
            ("gre_PHASE", Some("phase")),
            ("gre_imaginary", Some("imaginary part")),
            ("sub-01_part-mag_T2star", None),
            ("sub-01_phase_T1w", None),
            ("phase", None),
            ("sub-01_T1w", None),
        ] {
            assert_eq!(signal_part_of(stem), part, "{stem}");
        }
    }
}
