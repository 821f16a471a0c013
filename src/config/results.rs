//! `[results]`: optional files beside each result.

use super::check::Checker;

/// Which optional files are written beside each result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResultSettings {
    /// The brain mask within which the scan was scored.
    pub brain_mask: bool,
    /// A picture and a transform that show how the template is aligned to the scan. Only for
    /// aligned scans.
    pub alignment: bool,
    /// What each kind of evidence adds to the map.
    pub parts: bool,
}

pub(super) fn read(check: &mut Checker) -> ResultSettings {
    ResultSettings {
        brain_mask: check.flag("results.brain_mask"),
        alignment: check.flag("results.alignment"),
        parts: check.flag("results.parts"),
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
}
