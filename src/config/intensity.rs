//! `[intensity]`: how the intensities of all scans get one scale.

use std::path::PathBuf;

use super::check::Checker;

/// How the intensities of all scans get one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standardise {
    /// They are divided by the level of white matter.
    None,
    /// The landmarks of the scan's cohort map them (Nyúl).
    Nyul,
}

/// `[intensity]` after its check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntensitySettings {
    /// Which way is used.
    pub standardise: Standardise,
    /// File of landmarks. Empty without [`Standardise::Nyul`].
    pub landmarks: PathBuf,
}

pub(super) fn read(check: &mut Checker) -> IntensitySettings {
    let ways = [("none", Standardise::None), ("nyul", Standardise::Nyul)];
    let standardise = check.word("intensity.standardise", &ways);
    let landmarks = check.path("intensity.landmarks");

    if standardise == Standardise::Nyul && landmarks.as_os_str().is_empty() {
        let needed = "a file is needed with intensity.standardise = \"nyul\"; `oddscan intensity \
                      learn` makes one";
        check.fault("intensity.landmarks", "\"\"", needed);
    }
    IntensitySettings { standardise, landmarks }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Config, check::faults};

    #[test]
    fn standardisation_is_off_and_needs_a_file() {
        assert_eq!(Config::parse("").unwrap().intensity.standardise, Standardise::None);
        let found = faults("intensity.standardise = \"nyul\"");
        assert!(found[0].starts_with("intensity.landmarks = \"\": a file is needed"), "{found:?}");
        let found = faults("intensity.standardise = \"nyúl\"");
        assert!(found[0].ends_with("\"none\" or \"nyul\" is needed"), "{found:?}");
        let site = "intensity.standardise = \"nyul\"\nintensity.landmarks = \"/l.json\"";
        assert_eq!(Config::parse(site).unwrap().intensity.landmarks, Path::new("/l.json"));
    }
}
