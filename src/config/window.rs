//! `[window]`: the scans that are compared with each other.

use std::num::NonZeroUsize;

use super::check::Checker;
use crate::store::MIN_MEMORY;

/// `[window]` after its check.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WindowSettings {
    /// Number of scans that a window needs before it is scored.
    pub min_scans: usize,
    /// Largest number of scans in a window.
    pub max_scans: NonZeroUsize,
    /// Memory for the tokens and distances of all windows, bytes.
    pub memory_bytes: u64,
    /// How many times its live data the store may take before it is copied into a smaller one.
    pub compact_above: f64,
    /// Number of cohorts with a metric label of their own.
    pub max_cohort_labels: usize,
    /// Whether scans of one patient are compared with each other, too.
    pub compare_same_patient: bool,
    /// Longest voxel edge in mm. Where no rule applies, scans with longer voxels form a cohort of
    /// their own. 0 turns this off.
    pub thick_slice_mm: f64,
}

pub(super) fn read(check: &mut Checker) -> WindowSettings {
    let max_scans = check.positive("window.max_scans", 100_000);
    let min_scans = check.whole("window.min_scans", 2..=100_000);
    // If one of them has a fault of its own, the number here is not the site's.
    let are_meant =
        !["window.min_scans", "window.max_scans"].iter().any(|key| check.has_fault(key));
    if are_meant && min_scans > max_scans.get() {
        let needed = format!("at most window.max_scans ({max_scans}) is needed");
        check.fault("window.min_scans", min_scans, needed);
    }

    let least_memory = (MIN_MEMORY >> 20) as i64;
    WindowSettings {
        min_scans,
        max_scans,
        max_cohort_labels: check.whole("window.max_cohort_labels", 1..=1000),
        memory_bytes: check.mebibytes("window.memory_mib", least_memory..=1 << 20),
        compact_above: check.number("window.compact_above", 1.2..=100.0),
        compare_same_patient: check.flag("window.compare_same_patient"),
        thick_slice_mm: check.number("window.thick_slice_mm", 0.0..=100.0),
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, check::faults};

    #[test]
    fn the_memory_of_the_windows_is_checked() {
        assert_eq!(Config::parse("").unwrap().window.memory_bytes, 256 << 20);
        let found = faults("window.memory_mib = 64");
        assert_eq!(found, ["window.memory_mib = 64: a whole number from 128 to 1048576 is needed"]);
    }

    #[test]
    fn the_size_above_which_the_store_is_copied_is_checked() {
        assert_eq!(Config::parse("").unwrap().window.compact_above, 1.6);
        let found = faults("window.compact_above = 1.1");
        assert_eq!(found, ["window.compact_above = 1.1: a number from 1.2 to 100 is needed"]);
    }

    #[test]
    fn the_thickness_of_slices_is_checked_and_its_cohorts_are_taken() {
        assert_eq!(Config::parse("").unwrap().window.thick_slice_mm, 4.0);
        let found = faults("window.thick_slice_mm = -1");
        assert!(found[0].starts_with("window.thick_slice_mm = -1: "), "{found:?}");
        let found = faults("[[cohort]]\nname = \"flair-thick\"\nsuffix = \"FLAIR\"");
        assert!(found[0].contains("another name is needed"), "{found:?}");
    }
}
