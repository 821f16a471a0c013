//! The JSON beside each map: the finding, the scans it was compared with, and the method.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::place::N_FILES;
use crate::domain::{
    acquisition::AcquisitionFacts,
    finding::Cluster,
    scan::{AlignmentFacts, BrainFacts, DicomFacts, PreprocessFacts, ScanId},
    window_scores::SharedAnomaly,
};

/// Name and version of the sidecar's layout.
pub const SCHEMA: &str = "oddscan/sidecar/2";

/// This notice is in every sidecar and on every picture.
pub const RESEARCH_USE_ONLY: &str = "Research use only. Not a diagnosis.";

/// Whether there is a result yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Standing {
    /// Scores, map, mask and picture exist.
    Scored,
    /// The window holds too few scans to score anything.
    WaitingForScans {
        /// Patients in the window whose scans count.
        have: usize,
        /// Patients needed (`window.min_scans`).
        need: usize,
    },
}

/// The scan's scores, compared with its window.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Highest score of a cell.
    pub max: f32,
    /// Mean of the highest 1 % of the scores.
    pub top1_mean: f32,
    /// Share of the window's other scans with a lower `excess`, or with a lower `top1_mean` if the
    /// map is that of tokens alone, in [0, 1]. Null if the window has fewer patients than
    /// `window.min_scans` (`oddscan score --force`).
    pub percentile: Option<f64>,
    /// How far the scan as a whole is from the others, relative to how far they are from each
    /// other. 1 means that it is like them.
    pub shift: Option<f64>,
    /// Number of scored cells.
    pub n_cells: usize,
    /// Number of cells whose tokens have no candidate within reach in any other scan.
    pub n_unmatched_cells: usize,
    /// Sum of the excesses of the regions of the map: volume, ml, times mean height above the
    /// reference, in spreads. Null, like all below, if the map is that of tokens alone.
    #[serde(default)]
    pub excess: Option<f64>,
    /// The probability that a scan of this window in which nothing is unusual has a region as large
    /// and high as the largest of this scan.
    #[serde(default)]
    pub tail_probability: Option<f64>,
    /// The least probability that the window can claim: with n others, 1 / (n + 1).
    #[serde(default)]
    pub least_tail_probability: Option<f64>,
    /// Whether `tail_probability` is at most `scoring.alarm_probability`. If not, nothing stands
    /// out. Null if the window is too small to say.
    #[serde(default)]
    pub stands_out: Option<bool>,
    /// Volume that a usual scan of this window has above the reference height of its map, ml.
    #[serde(default)]
    pub usual_volume_ml: Option<f64>,
}

/// The threshold of the mask, and how it was chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ThresholdFacts {
    /// Map value above which a voxel belongs to the mask. Null if the map is flat; then the mask is
    /// empty.
    pub value: Option<f32>,
    /// Share of healthy voxels above the threshold, as the settings state it.
    pub false_positive_fraction: f64,
    /// Volume of the smallest region in the mask, mm^3.
    pub min_cluster_mm3: f64,
    /// How it was chosen, in words.
    pub chosen_by: String,
}

/// The quality of the scan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QualityFacts {
    /// Noise in the brain as a share of the brain's contrast; null if it could not be measured.
    pub noise: Option<f64>,
    /// Share of the brain outside the field of view, in [0, 1].
    pub cut_fraction: f64,
    /// Whether other scans are compared with this one (reference scan), or not (guest).
    pub is_reference: bool,
}

/// How the intensities were scaled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "scaling", rename_all = "snake_case")]
pub enum IntensityFacts {
    /// Divided by a high percentile of the brain's intensities.
    Plain,
    /// Mapped by the landmarks of the cohort (Nyul).
    Nyul {
        /// SHA-256 of the set of landmarks, as the set's file states it.
        landmarks_sha256: String,
        /// Number of scans of the cohort from which the landmarks were learnt.
        n_scans: usize,
        /// Whether this scan was one of those.
        learnt_from_this_scan: bool,
    },
}

/// The window that the scan was scored against.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WindowFacts {
    /// First 16 hex digits of the SHA-256 over the sorted member ids.
    pub id: String,
    /// Number of members, including the scan itself.
    pub size: usize,
    /// How much the scans differ as a whole: the 90th percentile of their median scores divided by
    /// the 10th. Null before the scan is scored.
    pub heterogeneity: Option<f64>,
    /// Guests: members that the others were not compared with, because they miss a limit of
    /// `[quality]`.
    #[serde(default)]
    pub set_aside: Vec<ScanId>,
    /// Groups of members that belong to one patient. Members of a group were not compared with each
    /// other.
    #[serde(default)]
    pub same_patient: Vec<Vec<ScanId>>,
    /// Groups of members that are taken for scans of one person, because their tokens are much
    /// nearer to each other than usual (`scoring.follow_up_ratio`). Members of a group were not
    /// compared with each other. Absent if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hidden_follow_ups: Vec<Vec<ScanId>>,
    /// Whether scans of one patient were compared after all, because a full window had too few
    /// patients.
    #[serde(default)]
    pub few_patients: bool,
    /// Anomalies that several members share; always empty without `community.enabled`.
    pub shared_anomalies: Vec<SharedAnomaly>,
    /// Ids of the members, sorted.
    pub members: Vec<ScanId>,
}

/// The settings and weights that shaped tokens and scores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MethodFacts {
    /// Hash over all that shapes the tokens, except the scans' brain masks and the number format of
    /// the products ([`EncoderFacts::precision`]). The number format changes tokens less than scans
    /// differ.
    pub fingerprint: String,
    /// SHA-256 of the template's voxels and affine, if there is a template.
    #[serde(default)]
    pub template_sha256: Option<String>,
    /// SHA-256 of the weights of the networks that found the brain, if networks found it.
    #[serde(default)]
    pub brain_network_sha256: Option<String>,
    /// All settings that shape tokens and scores, as in the configuration.
    pub settings: serde_json::Value,
}

/// The encoder and the device that it ran on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncoderFacts {
    /// Name of the network.
    pub model: String,
    /// SHA-256 of the weights file.
    pub weights_sha256: String,
    /// Encoder blocks whose features were scored, counted from 1.
    pub layers: Vec<usize>,
    /// The device in words.
    pub device: String,
    /// Number format of the matrix products: `f32`, `f16` or `bf16`. Empty in older sidecars.
    #[serde(default)]
    pub precision: String,
}

/// Name, size and hash of one result file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    /// Name of the file, in the same folder as the sidecar.
    pub name: String,
    /// Size, bytes.
    pub n_bytes: u64,
    /// SHA-256 of the content, hex.
    pub sha256: String,
}

/// The files that belong to the sidecar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// Anomaly map, `.nii.gz`.
    pub map: FileFacts,
    /// Anomaly mask, `.nii.gz`.
    pub mask: FileFacts,
    /// Picture of the result, PNG.
    pub picture: FileFacts,
    /// The brain in which the scan was scored (`results.brain_mask`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brain: Option<FileFacts>,
    /// What each kind of evidence adds to the map (`results.parts`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<FileFacts>,
    /// The volume that was converted from DICOM files (`results.keep_nifti`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scan: Option<FileFacts>,
    /// Picture of the template's place in the scan (`results.alignment`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment_picture: Option<FileFacts>,
    /// The template's place in the scan as an ITK transform (`results.alignment`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment_transform: Option<FileFacts>,
}

impl Files {
    /// From the facts in the order of `SUFFIXES`; `None` if a file is missing that every result
    /// has.
    pub(super) fn from_array(files: [Option<FileFacts>; N_FILES]) -> Option<Self> {
        let [map, mask, picture, brain, parts, scan, alignment_picture, alignment_transform] =
            files;
        let (map, mask, picture) = (map?, mask?, picture?);
        Some(Self {
            map,
            mask,
            picture,
            brain,
            parts,
            scan,
            alignment_picture,
            alignment_transform,
        })
    }

    /// The facts in the order of `SUFFIXES`.
    pub(super) fn as_array(&self) -> [Option<&FileFacts>; N_FILES] {
        [
            Some(&self.map),
            Some(&self.mask),
            Some(&self.picture),
            self.brain.as_ref(),
            self.parts.as_ref(),
            self.scan.as_ref(),
            self.alignment_picture.as_ref(),
            self.alignment_transform.as_ref(),
        ]
    }
}

/// Everything that oddscan reports about one scan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sidecar {
    /// The [`SCHEMA`] of the version that wrote the sidecar.
    pub schema: String,
    /// Always [`RESEARCH_USE_ONLY`].
    pub notice: String,
    /// Version of oddscan that wrote the sidecar.
    pub oddscan_version: String,
    /// Whether there is a result yet.
    #[serde(flatten)]
    pub standing: Standing,
    /// File name as the sender wrote it, in the form of `results.identity`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source_name: String,
    /// Path of the file below the incoming folder, in the form of `results.identity`. For a volume
    /// made of DICOM files, it is their folder or zip file.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub came_from: String,
    /// Its DICOM series, in the form of `results.identity`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dicom: Option<DicomFacts>,
    /// When oddscan first saw the file, RFC 3339, UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_at: Option<String>,
    /// When its tokens were made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoded_at: Option<String>,
    /// When this result was made; absent before the scan is scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scored_at: Option<String>,
    /// SHA-256 of the decoded voxels and the affine.
    pub scan_id: ScanId,
    /// Modality of the scan, by its file name.
    pub modality: String,
    /// Cohort of the scan, by a rule of the settings or, without one, by the modality.
    #[serde(default)]
    pub cohort: String,
    /// How it was acquired, as far as known.
    #[serde(default)]
    pub acquisition: AcquisitionFacts,
    /// Grows each time the result is replaced.
    pub revision: u64,
    /// Scores; null before the scan is scored.
    pub scores: Option<Scores>,
    /// Threshold of the mask; null before the scan is scored.
    pub threshold: Option<ThresholdFacts>,
    /// Regions of the mask, largest first.
    pub clusters: Vec<Cluster>,
    /// Volume of the brain mask, ml.
    pub brain_ml: f64,
    /// The brain mask; null for scans from versions that did not store it.
    #[serde(default)]
    pub brain_mask: Option<BrainFacts>,
    /// The quality of the scan; null in sidecars from versions that did not measure it.
    #[serde(default)]
    pub quality: Option<QualityFacts>,
    /// How its intensities were scaled; null in sidecars from versions with only one way.
    #[serde(default)]
    pub intensity: Option<IntensityFacts>,
    /// How the scan was aligned to the template, if it was.
    pub alignment: Option<AlignmentFacts>,
    /// How a program of the site prepared the scan, if one did.
    #[serde(default)]
    pub preprocess: Option<PreprocessFacts>,
    /// The window that the scan was scored against.
    pub window: WindowFacts,
    /// The method that scored the scan.
    pub method: MethodFacts,
    /// The encoder of the scan.
    pub encoder: EncoderFacts,
    /// What a reader should know before trusting the result.
    pub warnings: Vec<String>,
    /// Wall time of each step, seconds.
    pub timings_secs: BTreeMap<String, f64>,
    /// The other files; null before the scan is scored.
    pub files: Option<Files>,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::domain::scan::BrainSource;

    pub(crate) fn scored() -> Sidecar {
        Sidecar {
            schema: SCHEMA.into(),
            notice: RESEARCH_USE_ONLY.into(),
            oddscan_version: "0".into(),
            standing: Standing::Scored,
            source_name: "sub-1_T1w.nii.gz".into(),
            came_from: "2026/sub-1_T1w.nii.gz".into(),
            dicom: Some(DicomFacts {
                series_instance_uid: Some("1.2.3".into()),
                ..DicomFacts::default()
            }),
            received_at: Some("2026-01-02T03:04:05Z".into()),
            encoded_at: None,
            scored_at: None,
            scan_id: ScanId([7; 32]),
            modality: "t1w".into(),
            cohort: "t1-3t".into(),
            acquisition: AcquisitionFacts::of("sub-1_T1w", [1.0, 1.0, 1.2]),
            revision: 3,
            scores: Some(Scores {
                max: 1.5,
                top1_mean: 1.25,
                percentile: Some(0.9),
                shift: Some(1.1),
                n_cells: 100,
                n_unmatched_cells: 1,
                excess: None,
                tail_probability: None,
                least_tail_probability: None,
                stands_out: None,
                usual_volume_ml: None,
            }),
            threshold: None,
            clusters: Vec::new(),
            brain_ml: 1300.0,
            brain_mask: Some(BrainFacts {
                from: BrainSource::MaskFile,
                agreement: None,
                session_t1: None,
                sha256: "b".into(),
            }),
            quality: Some(QualityFacts {
                noise: Some(0.02),
                cut_fraction: 0.0,
                is_reference: true,
            }),
            intensity: Some(IntensityFacts::Plain),
            alignment: None,
            preprocess: None,
            window: WindowFacts {
                id: "ab".into(),
                size: 1,
                heterogeneity: None,
                set_aside: Vec::new(),
                same_patient: Vec::new(),
                hidden_follow_ups: Vec::new(),
                few_patients: false,
                shared_anomalies: Vec::new(),
                members: vec![ScanId([7; 32])],
            },
            method: MethodFacts {
                fingerprint: "f".into(),
                template_sha256: None,
                brain_network_sha256: None,
                settings: serde_json::json!({"a": 1}),
            },
            encoder: EncoderFacts {
                precision: "f32".into(),
                model: "dinov2_vits14".into(),
                weights_sha256: "w".into(),
                layers: vec![9],
                device: "cpu".into(),
            },
            warnings: Vec::new(),
            timings_secs: BTreeMap::new(),
            files: None,
        }
    }

    #[test]
    fn a_sidecar_reads_back_as_written_and_says_what_a_script_looks_for() {
        let waiting = Sidecar {
            standing: Standing::WaitingForScans { have: 3, need: 8 },
            scores: None,
            ..scored()
        };
        for sidecar in [scored(), waiting.clone()] {
            let text = serde_json::to_string(&sidecar).unwrap();
            assert_eq!(serde_json::from_str::<Sidecar>(&text).unwrap(), sidecar);
        }
        let json = serde_json::to_value(&waiting).unwrap();
        assert_eq!((&json["status"], &json["have"]), (&"waiting_for_scans".into(), &3.into()));
        assert_eq!(serde_json::to_value(scored()).unwrap()["status"], "scored");
    }

    #[test]
    fn sidecars_from_before_there_were_optional_files_are_read_and_written_alike() {
        let file = |name: &str| serde_json::json!({"name": name, "n_bytes": 1, "sha256": "ab"});
        let old = serde_json::json!({
            "map": file("map"), "mask": file("mask"), "picture": file("picture")
        });
        let files: Files = serde_json::from_value(old.clone()).unwrap();
        assert_eq!((&files.brain, &files.alignment_picture), (&None, &None));
        assert_eq!(serde_json::to_value(files).unwrap(), old);
    }
}
