//! One file with the landmarks of several cohorts. They are learnt once, do not change afterwards,
//! and are part of the method.
//!
//! A file that was changed after it was written is refused: tokens made with other landmarks cannot
//! be compared, and results name the landmarks by their digest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::scan::ScanId;
use crate::numeric::intensity::Landmarks;

/// Layout of the file.
pub const SCHEMA: &str = "oddscan/landmarks/1";

/// What was learnt from the scans of one cohort.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Learnt {
    /// Values of the percentiles as shares of the white level: the mean over the scans.
    pub values: Vec<f64>,
    /// Number of scans that they were learnt from.
    pub n_scans: usize,
    /// Ids of these scans.
    pub scans: Vec<ScanId>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema: String,
    percentiles: Vec<f64>,
    cohorts: BTreeMap<String, Learnt>,
    sha256: String,
}

/// Landmarks by cohort.
#[derive(Debug, Clone, PartialEq)]
pub struct LandmarkSet {
    percentiles: Vec<f64>,
    cohorts: BTreeMap<String, (Learnt, Landmarks)>,
    digest: String,
}

impl LandmarkSet {
    /// Checks and joins what was learnt. The error gives the reason in words.
    pub fn new(percentiles: Vec<f64>, cohorts: BTreeMap<String, Learnt>) -> Result<Self, String> {
        let digest = digest(&percentiles, &cohorts);
        let mut checked = BTreeMap::new();
        for (name, learnt) in cohorts {
            let landmarks = Landmarks::new(percentiles.clone(), learnt.values.clone())
                .map_err(|why| format!("cohort {name}: {why}"))?;
            checked.insert(name, (learnt, landmarks));
        }
        if checked.is_empty() {
            return Err("no cohort".to_owned());
        }
        Ok(Self { percentiles, cohorts: checked, digest })
    }

    /// Reads a file. The error says in words why it is invalid, or that it was changed.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let File { schema, percentiles, cohorts, sha256 } =
            serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if schema != SCHEMA {
            return Err(format!("schema {schema:?}; {SCHEMA:?} is needed"));
        }

        let set = Self::new(percentiles, cohorts)?;
        if set.digest != sha256 {
            return Err(format!(
                "the content has the digest {}, but the file states {sha256}: it was changed; learn it again",
                set.digest
            ));
        }
        Ok(set)
    }

    /// The file that [`LandmarkSet::parse`] reads.
    pub fn to_json(&self) -> String {
        let learnt = self.cohorts.iter();
        let cohorts = learnt.map(|(name, (learnt, _))| (name.clone(), learnt.clone())).collect();
        let file = File {
            schema: SCHEMA.to_owned(),
            percentiles: self.percentiles.clone(),
            cohorts,
            sha256: self.digest.clone(),
        };
        serde_json::to_string_pretty(&file).expect("our own types become JSON") + "\n"
    }

    /// SHA-256 over percentiles, values and scans of all cohorts, hex.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The landmarks of a cohort, if it has any.
    pub fn landmarks(&self, cohort: &str) -> Option<&Landmarks> {
        self.cohorts.get(cohort).map(|(_, landmarks)| landmarks)
    }

    /// What a cohort's landmarks were learnt from.
    pub fn learnt(&self, cohort: &str) -> Option<&Learnt> {
        self.cohorts.get(cohort).map(|(learnt, _)| learnt)
    }
}

/// The hash of the JSON without spaces. Its maps are sorted, and its numbers read back exactly.
fn digest(percentiles: &[f64], cohorts: &BTreeMap<String, Learnt>) -> String {
    let content = serde_json::to_string(&(SCHEMA, percentiles, cohorts));
    hex::encode(Sha256::digest(content.expect("our own types become JSON")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> LandmarkSet {
        let learnt = Learnt {
            values: vec![0.300001, 0.333333],
            n_scans: 2,
            scans: vec![ScanId([1; 32]), ScanId([2; 32])],
        };
        LandmarkSet::new(vec![10.0, 90.0], [("t1w".to_owned(), learnt)].into()).unwrap()
    }

    #[test]
    fn a_set_reads_back_as_written_to_the_last_bit() {
        let text = set().to_json();
        assert_eq!(LandmarkSet::parse(text.as_bytes()).unwrap(), set());
        assert_eq!(set().landmarks("t1w").unwrap().values(), [0.300001, 0.333333]);
        assert_eq!(set().landmarks("flair"), None);
    }

    #[test]
    fn what_was_changed_or_is_of_another_layout_is_refused_with_the_reason() {
        let text = set().to_json();
        let refused = |from: &str, to: &str| {
            assert!(text.contains(from), "{text}");
            LandmarkSet::parse(text.replace(from, to).as_bytes()).unwrap_err()
        };
        assert!(refused("0.333333", "0.333334").contains("it was changed"));
        assert!(refused("\"n_scans\": 2", "\"n_scans\": 3").contains("it was changed"));
        assert!(
            refused("landmarks/1", "landmarks/2").contains("\"oddscan/landmarks/1\" is needed")
        );
        assert!(refused("0.333333", "0.2").starts_with("cohort t1w: values"));
        assert!(refused("10.0", "95.0").contains("rising, between 0 and 100"));
        assert!(refused("n_scans", "scans_n").contains("unknown field"));
        assert_eq!(LandmarkSet::new(vec![10.0, 90.0], BTreeMap::new()).unwrap_err(), "no cohort");
    }
}
