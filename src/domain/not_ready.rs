//! Why the daemon is not ready. It then takes no scans, or cannot do with them all that it should.
//!
//! Each reason has one place in the daemon that finds it and that notices its end.

use std::fmt;

/// A reason for not being ready: a metric label, and words for the pages and the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NotReady {
    /// The daemon loads the model and opens the store, or ends.
    StartingOrStopping,
    /// The incoming folder cannot be listed.
    IncomingUnreadable,
    /// The incoming folder lies on another file system than before.
    IncomingReplaced,
    /// The results folder is full.
    ResultsFull,
    /// The results folder is away or refuses files.
    ResultsUnwritable,
    /// The last try to write a result failed.
    ResultsFailed,
    /// The quarantine is full.
    QuarantineFull,
    /// The quarantine is away or refuses files.
    QuarantineUnwritable,
    /// The state folder is full.
    StateFull,
    /// The state folder is away or refuses files.
    StateUnwritable,
    /// Less than `service.min_free_mib` is free.
    DiskLow,
    /// The site's own preprocessing program is missing.
    PreprocessGone,
    /// The site's own preprocessing program is there and does not start.
    PreprocessUnstarted,
}

impl NotReady {
    /// Every reason, for metrics that must exist from the start.
    pub const ALL: [Self; 13] = [
        Self::StartingOrStopping,
        Self::IncomingUnreadable,
        Self::IncomingReplaced,
        Self::ResultsFull,
        Self::ResultsUnwritable,
        Self::ResultsFailed,
        Self::QuarantineFull,
        Self::QuarantineUnwritable,
        Self::StateFull,
        Self::StateUnwritable,
        Self::DiskLow,
        Self::PreprocessGone,
        Self::PreprocessUnstarted,
    ];

    /// Metric label.
    pub fn name(self) -> &'static str {
        match self {
            Self::StartingOrStopping => "starting_or_stopping",
            Self::IncomingUnreadable => "incoming_unreadable",
            Self::IncomingReplaced => "incoming_replaced",
            Self::ResultsFull => "results_full",
            Self::ResultsUnwritable => "results_unwritable",
            Self::ResultsFailed => "results_failed",
            Self::QuarantineFull => "quarantine_full",
            Self::QuarantineUnwritable => "quarantine_unwritable",
            Self::StateFull => "state_full",
            Self::StateUnwritable => "state_unwritable",
            Self::DiskLow => "disk_low",
            Self::PreprocessGone => "preprocess_gone",
            Self::PreprocessUnstarted => "preprocess_unstarted",
        }
    }

    /// The reason as `/readyz` and `/status.json` show it.
    pub fn words(self) -> &'static str {
        match self {
            Self::StartingOrStopping => "starting or stopping",
            Self::IncomingUnreadable => "the incoming folder cannot be read",
            Self::IncomingReplaced => {
                "paused: the incoming folder is on another file system than before; mount the \
                 share again, or restart oddscan"
            }
            Self::ResultsFull => "the results folder is full",
            Self::ResultsUnwritable => "the results folder cannot be written",
            Self::ResultsFailed => "a result could not be written; oddscan tries again",
            Self::QuarantineFull => "the quarantine folder is full",
            Self::QuarantineUnwritable => "the quarantine folder cannot be written",
            Self::StateFull => "paused: the state folder is full",
            Self::StateUnwritable => "paused: the state folder cannot be written",
            Self::DiskLow => "paused: disk low (service.min_free_mib)",
            Self::PreprocessGone => {
                "paused: the preprocessing program is missing (preprocess.command)"
            }
            Self::PreprocessUnstarted => {
                "the preprocessing program cannot be started (preprocess.command)"
            }
        }
    }
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_reasons_have_the_same_name_or_words() {
        let n_all = NotReady::ALL.len();
        assert_eq!(
            NotReady::ALL.map(NotReady::name).into_iter().collect::<BTreeSet<_>>().len(),
            n_all
        );
        assert_eq!(
            NotReady::ALL.map(NotReady::words).into_iter().collect::<BTreeSet<_>>().len(),
            n_all
        );
        assert_eq!(NotReady::ALL.into_iter().collect::<BTreeSet<_>>().len(), n_all);
    }
}
