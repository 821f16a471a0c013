//! What is known of a sequence, and what one source says about the kind of image.

/// What a header says of the sequence. Lists and words as in DICOM, upper case; times in ms.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Acquisition {
    /// `SE`, `IR`, `GR`, `EP`, `RM` (0018,0020).
    pub scanning_sequence: Vec<String>,
    /// `MP` is magnetisation prepared, `TOF` time of flight (0018,0021).
    pub sequence_variant: Vec<String>,
    /// `ORIGINAL` or `DERIVED`, `PRIMARY` or `SECONDARY`, then words of the vendor (0008,0008).
    pub image_type: Vec<String>,
    /// `2D` or `3D` (0018,0023).
    pub acquisition_type: Option<String>,
    /// Vendor's name of the sequence (0018,0024).
    pub sequence_name: Option<String>,
    /// Echo time.
    pub echo_time_ms: Option<f64>,
    /// Repetition time.
    pub repetition_time_ms: Option<f64>,
    /// Inversion time.
    pub inversion_time_ms: Option<f64>,
    /// Echoes that are read after one excitation (0018,0091).
    pub echo_train: Option<f64>,
    /// What a technician called the series (0008,103E).
    pub description: Option<String>,
    /// Name of the protocol (0018,1030).
    pub protocol: Option<String>,
    /// The fields on a contrast agent.
    pub agent: AgentFields,
}

/// The fields of a header on a contrast agent. Sites write any text into them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AgentFields {
    /// Name of the agent (0018,0010), or of its ingredient.
    pub name: Option<String>,
    /// Volume that was injected, ml (0018,1041).
    pub volume_ml: Option<f64>,
}

/// What one source says about the kind of image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hint {
    /// The suffix of one kind of image.
    Kind(&'static str),
    /// One of these kinds.
    OneOf(&'static [&'static str]),
    /// A kind without a rule. The text says which, and quotes nothing.
    Other(&'static str),
    /// It does not decide.
    Open,
}

/// Whether a word of the image type tells that these are no magnitudes (PS3.3, C.8.3.1.1.1).
pub fn is_no_magnitude(image_type: &[String]) -> bool {
    const PARTS: [&str; 11] = [
        "P",
        "PHASE",
        "PHASE MAP",
        "R",
        "REAL",
        "I",
        "IMAGINARY",
        "VELOCITY MAP",
        "PHASE_MAP",
        "P_FFE",
        "VELOCITY",
    ];
    // dcm2niix writes IN_PHASE of a Dixon image, which is a magnitude, as two words.
    let is_dixon = |index: usize| ["IN", "OPP", "OUT"].contains(&image_type[index - 1].as_str());
    let mut words = image_type.iter().enumerate().skip(2);
    words.any(|(index, word)| PARTS.contains(&word.as_str()) && !is_dixon(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_type_tells_phases_from_magnitudes() {
        for (image_type, is_other) in [
            ("ORIGINAL\\PRIMARY\\P\\ND", true),
            ("ORIGINAL\\PRIMARY\\PHASE MAP\\P\\FFE", true),
            ("ORIGINAL\\PRIMARY\\R_IR\\R\\IR", true),
            ("ORIGINAL\\PRIMARY\\M\\ND", false),
            ("ORIGINAL\\PRIMARY\\M\\DIXON\\IN\\PHASE", false),
            ("P\\PRIMARY", false),
            ("", false),
        ] {
            let words: Vec<String> = image_type.split('\\').map(str::to_owned).collect();
            assert_eq!(is_no_magnitude(&words), is_other, "{image_type}");
        }
    }
}
