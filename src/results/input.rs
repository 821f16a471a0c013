//! What a result is made from.

use crate::{
    config::Config,
    domain::{scan::ScanRecord, window::WindowIdentity, window_scores::WindowScores},
    engine::Method,
    prepare::Source,
};

/// Everything that a result of one member of a window is made from.
pub struct ResultInput<'a> {
    /// Journal entry of the scan.
    pub record: &'a ScanRecord,
    /// The scan, read again.
    pub source: &'a Source,
    /// Scores of all members, in the order of the window's members.
    pub scores: &'a WindowScores,
    /// Position of this scan among them.
    pub index: usize,
    /// The window.
    pub window: &'a WindowIdentity,
    /// What is computed.
    pub method: &'a Method,
    /// The settings.
    pub config: &'a Config,
}
