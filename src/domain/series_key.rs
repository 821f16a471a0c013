//! Which DICOM files may belong together, in a form short enough to keep for every file.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A series, by hashes of its identifiers. Like the hash of a patient, it stays in the state
/// folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct SeriesKey {
    /// The study, or the series if no study is named.
    pub study: u64,
    /// The series.
    pub series: u64,
}

impl SeriesKey {
    /// Length of a key as text, bytes.
    pub const TEXT_LEN: usize = 32;

    /// The key of a file whose header names these UIDs. A UID that is absent is empty. The patient
    /// has no part in it: a number that was corrected in some files must not tear a series.
    pub fn new(study_uid: &str, series_uid: &str) -> Self {
        let hash = |kind: &str, uid: &str| {
            let digest = Sha256::digest(format!("{kind} {uid}"));
            digest[..8].iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
        };
        let series = hash("series", series_uid);
        let study = if study_uid.is_empty() { series } else { hash("study", study_uid) };
        Self { study, series }
    }

    /// Reads a key from its text; `None` if it is none.
    pub fn of_text(text: &str) -> Option<Self> {
        if text.len() != Self::TEXT_LEN || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
        Some(Self { study: number(&text[..16])?, series: number(&text[16..])? })
    }
}

impl fmt::Display for SeriesKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{:016x}", self.study, self.series)
    }
}

impl From<SeriesKey> for String {
    fn from(key: SeriesKey) -> Self {
        key.to_string()
    }
}

impl TryFrom<String> for SeriesKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::of_text(&text).ok_or_else(|| format!("{} hexadecimal digits", Self::TEXT_LEN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_of_one_study_share_the_study_and_others_share_nothing() {
        let first = SeriesKey::new("1.2", "1.2.3");
        assert_eq!(first, SeriesKey::new("1.2", "1.2.3"));
        let second = SeriesKey::new("1.2", "1.2.4");
        assert_eq!(first.study, second.study);
        assert_ne!(first.series, second.series);
        assert_ne!(SeriesKey::new("", "1.2.3").study, SeriesKey::new("", "1.2.4").study);
    }

    #[test]
    fn a_key_survives_its_text_and_other_text_is_no_key() {
        let key = SeriesKey { study: 1, series: u64::MAX };
        assert_eq!(serde_json::to_string(&key).unwrap(), format!("\"{key}\""));
        assert_eq!(SeriesKey::of_text(&key.to_string()), Some(key));
        for text in ["", "12", &"x".repeat(32), &"é".repeat(16), &"+".repeat(32)] {
            assert_eq!(SeriesKey::of_text(text), None, "{text}");
        }
    }
}
