//! Which patient a scan belongs to. Scans of one patient would hide from each other what both show.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Identifies a patient by a hash of name or number. Somebody who tries all numbers of a hospital
/// can find the number again. So the hash stays in the ledger, which is patient data anyway.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Patient(String);

/// Values that anonymising software writes into DICOM headers instead of the patient's number.
const PLACEHOLDERS: [&str; 11] = [
    "anon",
    "anonym",
    "anonymized",
    "anonymised",
    "anonymous",
    "deidentified",
    "none",
    "patient",
    "redacted",
    "removed",
    "unknown",
];

impl Patient {
    /// By the label that a BIDS name begins with: `sub-01` of `sub-01_ses-2_T1w.nii.gz`.
    pub fn of_name(file_name: &str) -> Option<Self> {
        let label = file_name.strip_prefix("sub-")?;
        let label = label.split(['_', '.']).next()?;
        // Names in another encoding have lost the letters that distinguish them.
        let is_told = !label.is_empty() && !label.contains(char::REPLACEMENT_CHARACTER);
        is_told.then(|| Self::hash("sub-", label))
    }

    /// By the PatientID of a DICOM header; `None` if it is empty or a placeholder.
    pub fn of_header(patient_id: &str) -> Option<Self> {
        let id = patient_id.trim();
        let told: String = id.to_lowercase().chars().filter(|c| c.is_alphanumeric()).collect();
        let is_placeholder =
            told.chars().all(|c| c == '0' || c == 'x') || PLACEHOLDERS.contains(&told.as_str());
        (!is_placeholder).then(|| Self::hash("PatientID ", id))
    }

    fn hash(kind: &str, text: &str) -> Self {
        Self(hex::encode(&Sha256::digest(format!("{kind}{text}"))[..8]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_and_sequences_of_one_label_are_of_one_patient() {
        let of = Patient::of_name;
        assert!(of("sub-01_T1w.nii.gz").is_some());
        assert_eq!(of("sub-01_ses-1_T1w.nii.gz"), of("sub-01_ses-2_FLAIR.nii"));
        assert_ne!(of("sub-01_T1w.nii.gz"), of("sub-1_T1w.nii.gz"));
        for nobody in [
            "scan.nii.gz",
            "sub-_T1w.nii.gz",
            "sub01_T1w.nii.gz",
            "a_sub-1_T1w.nii.gz",
            "sub-M\u{fffd}_T1w.nii",
        ] {
            assert_eq!(of(nobody), None, "{nobody}");
        }
    }

    #[test]
    fn a_number_that_everybody_has_is_nobodys() {
        let of = Patient::of_header;
        for nobody in ["", " ", "0000", "XXXX", "ANONYMIZED", "Anonymous^"] {
            assert_eq!(of(nobody), None, "{nobody}");
        }
        assert!(of("ANON-0017").is_some() && of("ANON-0017") != of("ANON-0018"));
        assert_eq!(of("4711 "), of("4711"));
        assert_ne!(of("01"), Patient::of_name("sub-01_T1w.nii"));
        assert!(!format!("{:?}", of("4711")).contains("4711"));
    }
}
