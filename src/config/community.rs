//! `[community]`: the filter for anomalies that occur in several scans.

use super::check::Checker;
use crate::numeric::community::CommunitySettings;

/// Whether the filter is on, and its constants.
pub(super) fn read(check: &mut Checker) -> (bool, CommunitySettings) {
    let is_enabled = check.flag("community.enabled");
    let mut share = |key: &str| check.share(&format!("community.{key}"), 1.0);
    let settings = CommunitySettings {
        reference_rank: share("reference_rank"),
        rare_quantile: share("rare_quantile"),
        link_coverage: share("link_coverage"),
        max_pair_share: share("max_pair_share"),
        resolution_quantile: share("resolution_quantile"),
        max_scan_share: share("max_scan_share"),
        exclusion_quantile: share("exclusion_quantile"),
        max_excluded_share: share("max_excluded_share"),
        level_pairs: check.flag("community.level_pairs"),
        min_resolution: check.number("community.min_resolution", 0.0..=1e6),
        min_scans: check.whole("community.min_scans", 2..=100_000),
        iqr_factor: check.number("community.iqr_factor", 0.0..=1e3),
        min_iqr: check.number("community.min_iqr", 0.0..=1e6),
    };
    (is_enabled, settings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn the_filter_is_off_and_its_constants_are_those_of_the_code() {
        let scoring = Config::parse("").unwrap().scoring;
        assert!(!scoring.filter_shared);
        assert_eq!(scoring.community, CommunitySettings::default());
    }
}
