//! `[results]`: optional files beside each result, and what they say of the patient.

use super::check::Checker;
use crate::domain::identity::IdentityChoice;

/// Which optional files are written beside each result, and how results name scans.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResultSettings {
    /// The brain mask within which the scan was scored.
    pub brain_mask: bool,
    /// A picture and a transform that show how the template is aligned to the scan. Only for
    /// aligned scans.
    pub alignment: bool,
    /// What each kind of evidence adds to the map.
    pub parts: bool,
    /// The volume that was converted from DICOM files.
    pub keep_nifti: bool,
    /// In which form results have paths, names and UIDs.
    pub identity: IdentityChoice,
}

/// The words of `results.identity`.
const CHOICES: [(&str, IdentityChoice); 3] = [
    ("path", IdentityChoice::Clear),
    ("hash", IdentityChoice::Hashed),
    ("none", IdentityChoice::Absent),
];

pub(super) fn read(check: &mut Checker) -> ResultSettings {
    ResultSettings {
        brain_mask: check.flag("results.brain_mask"),
        alignment: check.flag("results.alignment"),
        parts: check.flag("results.parts"),
        keep_nifti: check.flag("results.keep_nifti"),
        identity: check.word("results.identity", &CHOICES),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, check::faults};

    #[test]
    fn files_beside_the_results_are_off() {
        assert_eq!(Config::parse("").unwrap().results, ResultSettings::default());
        let found = faults("[results]\nbrain_mask = 1\nmap = true");
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("results.brain_mask = 1: a value of type boolean"));
    }

    #[test]
    fn names_are_hashed_unless_a_site_says_otherwise() {
        let choice = |text: &str| Config::parse(text).unwrap().results.identity;
        assert_eq!(choice(""), IdentityChoice::Hashed);
        assert_eq!(choice("results.identity = \"path\""), IdentityChoice::Clear);
        assert_eq!(choice("results.identity = \"none\""), IdentityChoice::Absent);
        let found = faults("results.identity = \"clear\"");
        assert!(found[0].contains("\"path\", \"hash\" or \"none\" is needed"), "{found:?}");
    }
}
