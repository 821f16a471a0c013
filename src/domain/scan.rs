//! One scan: its identity, its state, and what the journal keeps of it.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{acquisition::AcquisitionFacts, cohort::CohortKey, error::Refusal, patient::Patient};
use crate::numeric::volume::RawVolume;

/// What is read at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest file, bytes.
    pub max_file_bytes: u64,
    /// Largest grid, voxels.
    pub max_voxels: u64,
}

impl Limits {
    /// For files that are trusted.
    pub const NONE: Self = Self { max_file_bytes: u64::MAX, max_voxels: u64::MAX };
}

/// Identity of a scan: SHA-256 of its decoded voxels and affine.
///
/// A copy that was renamed or compressed again has the same id. That matters: a copy in the window
/// would lie at distance 0 and hide every lesion.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ScanId(pub [u8; 32]);

impl ScanId {
    /// Hashes shape, affine and voxels as little-endian numbers.
    pub fn of(volume: &RawVolume) -> Self {
        let mut hash = Sha256::new();
        for extent in volume.shape.0 {
            hash.update((extent as u64).to_le_bytes());
        }
        for entry in volume.affine.rows().iter().flatten() {
            hash.update(entry.to_le_bytes());
        }
        for chunk in volume.voxels.chunks(4096) {
            let bytes: Vec<u8> = chunk.iter().flat_map(|v| v.to_le_bytes()).collect();
            hash.update(&bytes);
        }
        Self(hash.finalize().into())
    }

    /// The first 12 hex digits: what logs and file names carry.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }

    /// All 64 hex digits.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }

    /// Reads what [`ScanId::to_hex`] wrote.
    pub fn from_hex(text: &str) -> Option<Self> {
        let bytes = hex::decode(text).ok()?;
        Some(Self(bytes.try_into().ok()?))
    }
}

impl fmt::Debug for ScanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ScanId({})", self.short())
    }
}

impl fmt::Display for ScanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

impl Serialize for ScanId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

impl<'de> Deserialize<'de> for ScanId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_hex(&text).ok_or_else(|| serde::de::Error::custom("a scan id is 64 hex digits"))
    }
}

/// Where a scan stands. Every transition is written to the journal before its effect is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ScanState {
    /// Its source is archived; it waits for the encoder.
    Ingested,
    /// Its tokens are stored; it is a member of its window.
    Encoded,
    /// It left the window; tokens, columns and archived source are gone, results stay.
    Evicted,
    /// It can never work.
    Quarantined {
        /// Why.
        refusal: Refusal,
    },
}

/// The result files that now lie in the results folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reported {
    /// Grows by one each time the results are replaced.
    pub revision: u64,
    /// Hash of the window's members and the scoring settings: results with the same key are equal.
    pub key: String,
}

impl Reported {
    /// Key of a result that only says that its window is not full enough. Never equal to the key
    /// of a scored one: the first scoring makes it outdated.
    pub const WAITING: &str = "waiting";
}

/// How a scan was aligned to the template, found once when it was taken in.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AlignmentFacts {
    /// Template world -> scan world, mm: the upper three rows of the matrix.
    pub template_to_scan: [[f64; 4]; 3],
    /// Share of the scan's contrast that the template explains, in [0, 1].
    pub explained: f64,
    /// How much less the template shares with the scan when it is turned the wrong way, at most 1;
    /// nothing of scans from before it was measured.
    #[serde(default)]
    pub distinctness: Option<f64>,
    /// Share of the template's brain within the scan, in [0, 1].
    pub coverage: f64,
    /// Whether the brain was extracted here.
    pub brain_extracted: bool,
}

/// Where the brain of a scan is known from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BrainSource {
    /// All voxels above 0: the scan was stripped before.
    AboveZero,
    /// A mask that lay beside the scan.
    MaskFile,
    /// The site's own preprocessing.
    Program,
    /// Extracted here, by the template.
    Template,
    /// Extracted here, by the networks for brain extraction.
    Network,
    /// Extracted here from a T1 of the same session, and carried over.
    SessionT1,
}

impl BrainSource {
    /// Whether it was extracted from a head here.
    pub fn is_extracted(self) -> bool {
        matches!(self, Self::Template | Self::Network | Self::SessionT1)
    }

    /// Whether it was found on the way, so that the archive has to keep it.
    pub fn is_found(self) -> bool {
        matches!(self, Self::Program) || self.is_extracted()
    }
}

/// The brain that a scan was encoded with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BrainFacts {
    /// Where it is known from.
    pub from: BrainSource,
    /// Dice of this brain and one that was found another way, in [0, 1], where there was one: by
    /// the template beside one by the networks, in the scan itself beside one of a T1 of its
    /// session.
    #[serde(default)]
    pub agreement: Option<f64>,
    /// The T1 of the session that it was carried over from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_t1: Option<ScanId>,
    /// SHA-256 over a byte per voxel of the scan's grid, 1 in the brain and 0 elsewhere, x fastest.
    pub sha256: String,
}

/// How a program of the site prepared a scan, once, when it was taken in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreprocessFacts {
    /// Name of the program.
    pub name: String,
    /// Its version as it says, or the hash of its file.
    pub version: String,
    /// Hash over the command and the version: scans of two of them are not compared.
    pub identity: String,
    /// Whether it gave the intensities that the scan is compared by.
    pub scan_replaced: bool,
    /// Whether it gave the brain mask.
    pub mask_made: bool,
    /// Wall time.
    pub secs: f64,
}

/// What was learnt while a scan was encoded: kept, because results are written again and again.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EncodedFacts {
    /// Volume of the brain mask, ml.
    pub brain_ml: f64,
    /// Share of the brain outside the field of view, in [0, 1].
    pub cut_fraction: f64,
    /// Noise in the brain as a share of its contrast; nothing of scans from before it was measured.
    #[serde(default)]
    pub noise: Option<f64>,
    /// Whether its intensities were brought to the landmarks of its cohort.
    #[serde(default)]
    pub is_standardised: bool,
    /// Tokens per layer, of all views.
    pub n_tokens: usize,
    /// Wall time of each step, seconds.
    pub timings_secs: BTreeMap<String, f64>,
}

/// What a file looks like from outside; when it changes, the file has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLook {
    /// Bytes.
    pub size: u64,
    /// Time of the last change of the content, ns since 1970.
    pub modified_ns: i64,
    /// Time of the last change of the inode, ns since 1970: also moves when the time of the
    /// content is set back, as copies with preserved times do.
    pub changed_ns: i64,
}

/// What the journal keeps of a scan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScanRecord {
    /// Identity.
    pub id: ScanId,
    /// Where it stands.
    #[serde(flatten)]
    pub state: ScanState,
    /// File name as exported, without folder. May name a patient: never logged above `debug`.
    pub source_name: String,
    /// Where the file lay below the incoming folder; of a volume made of DICOM files, their folder
    /// or zip. May name a patient, too. Empty for scans from before this was kept, and without a
    /// daemon.
    #[serde(default)]
    pub came_from: String,
    /// Whose scan it is by the DICOM header that it came with. Never in the results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header_patient: Option<Patient>,
    /// Stem of the result files, unique among all scans.
    pub output_stem: String,
    /// Window that it belongs to. Decided once, when the scan was taken in.
    pub cohort: CohortKey,
    /// How it was acquired, as far as known; nothing of scans from before that was asked.
    #[serde(default)]
    pub acquisition: AcquisitionFacts,
    /// What was noticed when it was taken in and a reader of its results should know.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Order of arrival; eviction takes the lowest.
    pub sequence: u64,
    /// When its file was first seen, seconds since 1970.
    pub first_seen_secs: u64,
    /// Times that the encoder was started on it without an end.
    pub attempts: u32,
    /// The brain that was found when it was taken in; nothing of scans from before that was kept.
    #[serde(default)]
    pub brain: Option<BrainFacts>,
    /// How it was aligned to the template, if it was.
    #[serde(default)]
    pub alignment: Option<AlignmentFacts>,
    /// How a program of the site prepared it, if one did.
    #[serde(default)]
    pub preprocess: Option<PreprocessFacts>,
    /// What the encoding found, once it is done.
    pub encoded: Option<EncodedFacts>,
    /// Latest results, if any.
    pub reported: Option<Reported>,
}

impl ScanRecord {
    /// A scan that was just taken in: nothing else is known of it yet.
    pub fn new(id: ScanId, cohort: CohortKey) -> Self {
        Self {
            id,
            state: ScanState::Ingested,
            source_name: String::new(),
            came_from: String::new(),
            header_patient: None,
            output_stem: String::new(),
            cohort,
            acquisition: AcquisitionFacts::default(),
            notes: Vec::new(),
            sequence: 0,
            first_seen_secs: 0,
            attempts: 0,
            brain: None,
            alignment: None,
            preprocess: None,
            encoded: None,
            reported: None,
        }
    }

    /// Whose scan it is, as far as its DICOM header or its name tell.
    pub fn patient(&self) -> Option<Patient> {
        self.header_patient.clone().or_else(|| Patient::of_name(&self.source_name))
    }

    /// Whether the scan has ever had more than the notice that it waits.
    pub fn was_scored(&self) -> bool {
        self.reported.as_ref().is_some_and(|done| done.key != Reported::WAITING)
    }

    /// Whether the scan is taken in once more where it comes again. One that was refused has been
    /// put back by a person: what was wrong may be mended. One that left without a result gets
    /// another turn.
    pub fn may_come_again(&self) -> bool {
        match self.state {
            ScanState::Quarantined { .. } => true,
            ScanState::Evicted => !self.was_scored(),
            ScanState::Ingested | ScanState::Encoded => false,
        }
    }

    /// Whether the scan takes part in scoring.
    pub fn is_member(&self) -> bool {
        self.state == ScanState::Encoded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_from_before_acquisitions_were_asked_for_is_read() {
        let old = format!(
            r#"{{"id": "{}", "state": "encoded", "source_name": "sub-1_T1w.nii.gz",
            "output_stem": "sub-1_T1w", "cohort": {{"modality": "t1w", "method": "0123"}},
            "sequence": 3, "first_seen_secs": 7, "attempts": 0,
            "encoded": {{"brain_ml": 1300.0, "cut_fraction": 0.0, "n_tokens": 9,
            "timings_secs": {{}}}}, "reported": {{"revision": 2, "key": "ab"}}}}"#,
            "07".repeat(32)
        );
        let record: ScanRecord = serde_json::from_str(&old).unwrap();
        assert!(record.is_member() && record.notes.is_empty());
        assert_eq!((record.cohort.label(), record.acquisition), ("t1w", Default::default()));
    }
}
