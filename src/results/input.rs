//! The input for one result.

use crate::{
    config::Config,
    domain::{
        evidence::FineVolumes, identity::Pseudonyms, scan::ScanRecord, window::WindowIdentity,
        window_scores::WindowScores,
    },
    engine::Method,
    prepare::Source,
};

/// Everything that is needed to build the result of one member of a window.
pub struct ResultInput<'a> {
    /// Record of the scan.
    pub record: &'a ScanRecord,
    /// The scan, read again.
    pub source: &'a Source,
    /// Scores of all members, in the order of the window's members.
    pub scores: &'a WindowScores,
    /// Position of this scan in `scores`.
    pub index: usize,
    /// Members of the scored window, and who is compared with whom.
    pub window: &'a WindowIdentity,
    /// Method that made the tokens.
    pub method: &'a Method,
    /// Settings in force, for thresholds and optional files.
    pub config: &'a Config,
    /// The intensities of the members.
    pub fines: &'a dyn FineVolumes,
    /// What the result says instead of names.
    pub pseudonyms: &'a Pseudonyms,
    /// Seconds since 1970.
    pub now_secs: u64,
}
