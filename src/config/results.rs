//! `[results]`: files that a site may ask for.

use super::check::Checker;

/// Files that are written beside each result where a site asks for them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResultSettings {
    /// The brain that the scan was scored within.
    pub brain_mask: bool,
    /// Where the template lies, of scans that were aligned: a picture and a transform.
    pub alignment: bool,
}

pub(super) fn read(check: &mut Checker) -> ResultSettings {
    ResultSettings {
        brain_mask: check.flag("results.brain_mask"),
        alignment: check.flag("results.alignment"),
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
