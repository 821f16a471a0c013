//! One scan: its identity, its state, and what the ledger keeps of it.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{acquisition::AcquisitionFacts, cohort::CohortKey, error::Refusal, patient::Patient};
use crate::numeric::volume::RawVolume;

/// Limits on the files that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest file, bytes.
    pub max_file_bytes: u64,
    /// Largest grid, voxels.
    pub max_voxels: u64,
}

impl Limits {
    /// No limits, for trusted files.
    pub const NONE: Self = Self { max_file_bytes: u64::MAX, max_voxels: u64::MAX };
}

/// Identity of a scan: SHA-256 of its decoded voxels and affine.
///
/// A copy that was renamed or compressed again has the same id. That matters: a copy in the window
/// would be at distance 0 and hide every lesion.
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

    /// The first 12 hex digits, for logs and file names.
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

/// The state of a scan. Every transition is written to the ledger before its effect is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ScanState {
    /// Its source is archived; it waits for the encoder.
    Ingested,
    /// It is a member of its window. Its tokens are in the store, or are made again.
    Encoded,
    /// It left the window; tokens, columns and archived source are gone, results stay.
    Evicted,
    /// It was refused and can never work.
    Quarantined {
        /// What was found, what was needed, and what a person can do.
        refusal: Refusal,
    },
    /// What oddscan kept of it is damaged or gone. It left its window, its results stay. Its file
    /// is read again if it is still there.
    Lost {
        /// What was found.
        why: String,
    },
}

/// Hashes of the files in the archive, as they were when the scan came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFacts {
    /// SHA-256 of the scan's file, hex.
    pub scan_sha256: String,
    /// SHA-256 of its mask's file, hex; `None` without a mask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_sha256: Option<String>,
}

/// The result files that are in the results folder now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reported {
    /// Grows by one each time the results are replaced.
    pub revision: u64,
    /// Hash of the window's members and the scoring settings: results with the same key are equal.
    pub key: String,
}

impl Reported {
    /// Key of a notice that the scan waits for more patients in its window, or the start of it. No
    /// scored result has such a key, so that the first scoring makes the notice stale.
    pub const WAITING: &str = "waiting";

    /// Whether only such a notice has this key.
    pub fn is_waiting_key(key: &str) -> bool {
        key.starts_with(Self::WAITING)
    }
}

/// How a scan was aligned to the template. Found once, at intake.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AlignmentFacts {
    /// Template world -> scan world, mm: the upper three rows of the matrix.
    pub template_to_scan: [[f64; 4]; 3],
    /// Share of the scan's contrast that the template explains, in [0, 1].
    pub explained: f64,
    /// How much worse the template fits in its best wrong pose: 0 = as well, 1 = shares nothing.
    /// `None` for scans from before this was measured.
    #[serde(default)]
    pub distinctness: Option<f64>,
    /// Share of the template's brain within the scan, in [0, 1].
    pub coverage: f64,
    /// Whether oddscan extracted the brain.
    pub brain_extracted: bool,
}

/// How the brain of a scan was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BrainSource {
    /// All voxels above 0: the scan was skull-stripped before it arrived.
    AboveZero,
    /// A mask file beside the scan.
    MaskFile,
    /// The site's own preprocessing.
    Program,
    /// Extracted by oddscan with the template.
    Template,
    /// Extracted by oddscan with the brain extraction networks.
    Network,
    /// Extracted by oddscan from a T1 of the same session, and carried over.
    SessionT1,
}

impl BrainSource {
    /// Whether oddscan extracted it from a head.
    pub fn is_extracted(self) -> bool {
        matches!(self, Self::Template | Self::Network | Self::SessionT1)
    }

    /// Whether it was made during intake, so that the archive must keep it.
    pub fn is_found(self) -> bool {
        matches!(self, Self::Program) || self.is_extracted()
    }
}

/// The brain that a scan was encoded with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BrainFacts {
    /// How it was found.
    pub from: BrainSource,
    /// Dice of this brain and one that was found in another way, in [0, 1]. The other way is the
    /// template beside the networks, or the scan itself beside a T1 of its session. `None` without
    /// another way.
    #[serde(default)]
    pub agreement: Option<f64>,
    /// The T1 of the session that it was carried over from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_t1: Option<ScanId>,
    /// SHA-256 over a byte per voxel of the scan's grid, 1 in the brain and 0 elsewhere, x fastest.
    pub sha256: String,
}

/// How a program of the site prepared a scan. It runs once, at intake.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreprocessFacts {
    /// Name of the program.
    pub name: String,
    /// The version that it reports, or the hash of its file.
    pub version: String,
    /// Hash over the command and the version. Scans with different hashes are not compared.
    pub identity: String,
    /// Whether it replaced the intensities of the scan.
    pub scan_replaced: bool,
    /// Whether it made the brain mask.
    pub mask_made: bool,
    /// Wall time, seconds.
    pub secs: f64,
}

/// What the header of a DICOM series says of its place among others. UIDs and times can lead to the
/// patient: results have them only as [`Pseudonyms::dicom`](super::identity::Pseudonyms::dicom)
/// gives them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DicomFacts {
    /// The examination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub study_instance_uid: Option<String>,
    /// The series.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub series_instance_uid: Option<String>,
    /// Series with the same one share their coordinates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frame_of_reference_uid: Option<String>,
    /// Start of the acquisition by the scanner's clock, ISO 8601. The time zone follows only if the
    /// header states it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acquisition_datetime: Option<String>,
}

/// Facts found while a scan was encoded. They are kept because its results are written many times.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EncodedFacts {
    /// Volume of the brain mask, ml.
    pub brain_ml: f64,
    /// Share of the brain outside the field of view, in [0, 1].
    pub cut_fraction: f64,
    /// Noise in the brain as a share of its contrast. `None` for scans from before this was
    /// measured.
    #[serde(default)]
    pub noise: Option<f64>,
    /// Whether its intensities were mapped to the landmarks of its cohort.
    #[serde(default)]
    pub is_standardised: bool,
    /// Cells with brain that are not scored, because the scanner's field of view cuts them. 0 for
    /// scans from before they were left out.
    #[serde(default)]
    pub n_cut_cells: usize,
    /// Tokens per layer, of all views.
    pub n_tokens: usize,
    /// When they were made, seconds since 1970. 0 for scans from before this was kept.
    #[serde(default)]
    pub encoded_secs: u64,
    /// Wall time of each step, seconds.
    pub timings_secs: BTreeMap<String, f64>,
}

/// Size and times of a file. When they change, the file has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    /// Size, bytes.
    pub size: u64,
    /// Time of the last change of the content, ns since 1970.
    pub modified_ns: i64,
    /// Time of the last change of the inode, ns since 1970. It also changes when a copy restores
    /// the old time of the content.
    pub changed_ns: i64,
}

/// The ledger's record of a scan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScanRecord {
    /// SHA-256 of its voxels and affine.
    pub id: ScanId,
    /// Whether it waits, is a member, has left, or was refused.
    #[serde(flatten)]
    pub state: ScanState,
    /// File name as exported, without folder. May name a patient: never logged above `debug`.
    pub source_name: String,
    /// Path of the file below the incoming folder, or of the folder or zip of its DICOM files. May
    /// name a patient, too. Empty for scans from before this was kept, and without a daemon.
    #[serde(default)]
    pub came_from: String,
    /// The patient by the DICOM header of the scan. Never in the results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header_patient: Option<Patient>,
    /// Its series, if it was converted from DICOM files. `None` for scans from before this was
    /// kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dicom: Option<DicomFacts>,
    /// Stem of the result files in clear, unique among all scans.
    pub output_stem: String,
    /// Stem under which its results lie now, if that is not `output_stem`: `results.identity` may
    /// ask for another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written_stem: Option<String>,
    /// Scans of fewer slices of the same DICOM series, which this one replaces as a reference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replaces: Vec<ScanId>,
    /// Cohort that it belongs to. Decided once, at intake.
    pub cohort: CohortKey,
    /// How it was acquired, as far as known. Empty for scans from before this was kept.
    #[serde(default)]
    pub acquisition: AcquisitionFacts,
    /// Remarks from intake that a reader of its results should know.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Order of arrival: the oldest scan has the lowest number.
    pub sequence: u64,
    /// When its file was first seen, seconds since 1970.
    pub first_seen_secs: u64,
    /// How often encoding began and did not end.
    pub attempts: u32,
    /// Its files in the archive. `None` for scans from before this was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceFacts>,
    /// The brain found at intake. `None` for scans from before this was kept.
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
    /// The entry of a scan that has just arrived: nothing else is known yet.
    pub fn new(id: ScanId, cohort: CohortKey) -> Self {
        Self {
            id,
            state: ScanState::Ingested,
            source_name: String::new(),
            came_from: String::new(),
            header_patient: None,
            dicom: None,
            output_stem: String::new(),
            written_stem: None,
            replaces: Vec::new(),
            cohort,
            acquisition: AcquisitionFacts::default(),
            notes: Vec::new(),
            sequence: 0,
            first_seen_secs: 0,
            attempts: 0,
            source: None,
            brain: None,
            alignment: None,
            preprocess: None,
            encoded: None,
            reported: None,
        }
    }

    /// The patient by the DICOM header, else by the file name; `None` if neither names one.
    pub fn patient(&self) -> Option<Patient> {
        self.header_patient.clone().or_else(|| Patient::of_name(&self.source_name))
    }

    /// Whether the scan has ever had a scored result, not only the notice that it waits.
    pub fn was_scored(&self) -> bool {
        self.reported.as_ref().is_some_and(|done| !Reported::is_waiting_key(&done.key))
    }

    /// Whether the scan is accepted when it arrives again. A person put a refused scan back, and
    /// the fault may be gone. A scan that left without a result, or was lost, gets another chance.
    pub fn may_come_again(&self) -> bool {
        match self.state {
            ScanState::Quarantined { .. } | ScanState::Lost { .. } => true,
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
