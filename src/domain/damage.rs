//! What of the state folder can be found damaged.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A kind of thing that was damaged or gone when it was needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Damage {
    /// The ledger's record of a scan.
    Record,
    /// The archived source of a scan, or its mask.
    Source,
    /// The tokens of a scan in the store.
    Tokens,
    /// A decision about a file.
    SeenFile,
}

impl Damage {
    /// Every kind, for metrics that must exist from the start.
    pub const ALL: [Self; 4] = [Self::Record, Self::Source, Self::Tokens, Self::SeenFile];

    /// Metric label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::Source => "source",
            Self::Tokens => "tokens",
            Self::SeenFile => "seen_file",
        }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Record => "records of scans",
            Self::Source => "archived sources of scans",
            Self::Tokens => "scans without their tokens",
            Self::SeenFile => "decisions about files",
        })
    }
}
