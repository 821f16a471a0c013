//! `[intake]`: which files are scans, and when they are read.

use std::time::Duration;

use super::check::Checker;
use crate::domain::scan::Limits;

/// `[intake]` after its check.
#[derive(Debug, Clone, PartialEq)]
pub struct Intake {
    /// A file is whole after it has not changed for this long.
    pub settle: Duration,
    /// A DICOM series is complete after it has not changed for this long.
    pub series_settle: Duration,
    /// Longest time between two listings of the folder.
    pub rescan: Duration,
    /// Shell patterns of file names that are never read.
    pub ignore: Vec<String>,
    /// Shell patterns of file names that are scans.
    pub accept: Vec<String>,
    /// Largest accepted file and grid.
    pub limits: Limits,
    /// How many files are read in parallel. With 0 the number of processor cores decides.
    pub read_at_once: usize,
}

pub(super) fn read(check: &mut Checker) -> Intake {
    Intake {
        settle: check.seconds("intake.settle_secs", 0.0..=86_400.0),
        series_settle: check.seconds("intake.series_settle_secs", 0.0..=86_400.0),
        rescan: check.seconds("intake.rescan_secs", 0.1..=86_400.0),
        ignore: check.patterns("intake.ignore"),
        accept: check.patterns("intake.accept"),
        limits: Limits {
            max_file_bytes: check.mebibytes("intake.max_file_mib", 1..=65_536),
            max_voxels: 1_000_000 * check.whole("intake.max_megavoxels", 1..=2_000) as u64,
        },
        read_at_once: check.whole("intake.read_at_once", 0..=64),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::config::{Config, check::faults};

    #[test]
    fn a_series_settles_for_a_minute_or_as_long_as_a_site_says() {
        let settle = |site| Config::parse(site).unwrap().intake.series_settle;
        assert_eq!(settle(""), Duration::from_secs(60));
        assert_eq!(settle("intake.series_settle_secs = 5"), Duration::from_secs(5));
        let found = faults("intake.series_settle_secs = -1.0");
        assert_eq!(found, ["intake.series_settle_secs = -1: a number from 0 to 86400 is needed"]);
    }
}
