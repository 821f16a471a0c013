//! `[quality]`: which scans are good enough to be compared with.

use super::check::Checker;
use crate::domain::quality::QualityLimits;

pub(super) fn read(check: &mut Checker) -> QualityLimits {
    QualityLimits {
        max_noise: check.number("quality.max_noise", 0.0..=10.0),
        max_cut_fraction: check.number("quality.max_cut_fraction", 0.0..=1.0),
        min_explained: check.number("quality.min_explained", 0.0..=1.0),
        min_distinctness: check.number("quality.min_distinctness", 0.0..=1.0),
        min_coverage: check.number("quality.min_coverage", 0.0..=1.0),
        min_brain_agreement: check.number("quality.min_brain_agreement", 0.0..=1.0),
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, check::faults};

    #[test]
    fn limits_of_quality_are_checked() {
        let quality = Config::parse("").unwrap().quality;
        assert_eq!((quality.max_noise, quality.max_cut_fraction), (0.2, 0.1));
        assert_eq!(quality.min_coverage, 0.9);
        let found = faults("[quality]\nmin_coverage = 1.5");
        assert!(
            found[0].starts_with("quality.min_coverage = 1.5: a number from 0 to 1"),
            "{found:?}"
        );
        let found = faults("[quality]\nmax_noise = -1.0\nmin_explained = 2");
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("quality.max_noise = -1: a number from 0 to 10"), "{found:?}");
    }
}
