//! Which scans may be compared with which.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Scans are compared only within a cohort: one modality, processed in one way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CohortKey {
    /// Lower-case BIDS suffix of the file name (`flair`, `t1w`), or `unknown`.
    pub modality: String,
    /// First 16 hex digits of the hash over everything that shapes the tokens: weights, layers,
    /// preprocessing, pooling, projection.
    pub method: String,
}

/// BIDS suffixes of the structural images that a cohort can be made of.
const MODALITIES: [&str; 12] = [
    "T1w",
    "T2w",
    "FLAIR",
    "PDw",
    "T2star",
    "T1map",
    "T2map",
    "inplaneT1",
    "inplaneT2",
    "angio",
    "swi",
    "T1ce",
];

impl CohortKey {
    /// The cohort of a file by the BIDS suffix of its stem: the part after the last underscore.
    /// What is not a known suffix is its own cohort, never silently mixed with a known one.
    pub fn from_stem(stem: &str, method: &str) -> Self {
        let suffix = stem.rsplit_once('_').map_or(stem, |(_, suffix)| suffix);
        let known = MODALITIES.iter().find(|m| m.eq_ignore_ascii_case(suffix));
        let modality = known.map_or("unknown".to_owned(), |m| m.to_lowercase());
        Self { modality, method: method.to_owned() }
    }

    /// Metric label: the modality, one of a dozen words.
    pub fn label(&self) -> &str {
        &self.modality
    }
}

impl fmt::Display for CohortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.modality, self.method)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_modality_is_the_bids_suffix_and_anything_else_is_unknown() {
        let modality = |stem| CohortKey::from_stem(stem, "m").modality;
        assert_eq!(modality("sub-01_ses-2_FLAIR"), "flair");
        assert_eq!(modality("brats13-0001_t1W"), "t1w");
        assert_eq!(modality("T2w"), "t2w");
        assert_eq!(modality("scan"), "unknown");
        assert_eq!(modality("DOE^JOHN_1980"), "unknown");
    }
}
