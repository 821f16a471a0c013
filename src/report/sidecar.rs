//! The JSON beside each map: what was found, against what, by which method.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::domain::{
    acquisition::AcquisitionFacts,
    finding::Cluster,
    scan::{AlignmentFacts, BrainFacts, PreprocessFacts, ScanId},
    window_scores::SharedAnomaly,
};

/// Layout of the sidecar.
pub const SCHEMA: &str = "oddscan/sidecar/2";

/// Stands in every sidecar and on every picture.
pub const RESEARCH_USE_ONLY: &str = "Research use only. Not a diagnosis.";

/// Whether there is a result yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Standing {
    /// Scores, map, mask and picture are there.
    Scored,
    /// The window holds too few scans to score anything.
    WaitingForScans {
        /// Scans in the window.
        have: usize,
        /// Scans needed.
        need: usize,
    },
}

/// The scores of the scan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Highest score of a cell.
    pub max: f32,
    /// Mean of the highest 1 % of the scores.
    pub top1_mean: f32,
    /// Share of the window's other scans with a lower `top1_mean`, in [0, 1].
    pub percentile: f64,
    /// How far the scan as a whole lies from the others, compared with how far they lie from each
    /// other; 1 is like them.
    pub shift: Option<f64>,
    /// Scored cells.
    pub n_cells: usize,
    /// Cells whose tokens have no candidate in reach in any other scan.
    pub n_unmatched_cells: usize,
}

/// Where the mask begins, and why there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ThresholdFacts {
    /// Map value above which a voxel belongs to the mask; null where the map is flat, which marks
    /// nothing.
    pub value: Option<f32>,
    /// Stated share of healthy voxels above it.
    pub false_positive_fraction: f64,
    /// Smallest region kept, mm^3.
    pub min_cluster_mm3: f64,
    /// How it was chosen, in words.
    pub chosen_by: String,
}

/// How good the scan is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QualityFacts {
    /// Noise in the brain as a share of its contrast; null if it could not be measured.
    pub noise: Option<f64>,
    /// Share of the brain outside the field of view, in [0, 1].
    pub cut_fraction: f64,
    /// Whether other scans are compared with this one.
    pub is_reference: bool,
}

/// How intensities were brought to one scale.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "scaling", rename_all = "snake_case")]
pub enum IntensityFacts {
    /// Divided by a high percentile of the brain's.
    Plain,
    /// By the landmarks of the cohort.
    Nyul {
        /// SHA-256 of the set of landmarks, as its file states it.
        landmarks_sha256: String,
        /// Scans of the cohort that they were learnt from.
        n_scans: usize,
        /// Whether the scan was one of them.
        learnt_from_this_scan: bool,
    },
}

/// The window that the scan was scored against.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WindowFacts {
    /// First 16 hex digits of the SHA-256 over the sorted member ids.
    pub id: String,
    /// Members, the scan itself included.
    pub size: usize,
    /// How much the scans differ as a whole: the 90th over the 10th percentile of their median
    /// scores, once scored.
    pub heterogeneity: Option<f64>,
    /// Members that the others were not compared with, because they are not good enough.
    #[serde(default)]
    pub set_aside: Vec<ScanId>,
    /// Members of patients who have several: they were not compared with each other.
    #[serde(default)]
    pub same_patient: Vec<Vec<ScanId>>,
    /// Whether they were compared all the same, because a full window had too few patients.
    #[serde(default)]
    pub few_patients: bool,
    /// Anomalies that several members share; looked for with `community.enabled`.
    pub shared_anomalies: Vec<SharedAnomaly>,
    /// Ids of the members, sorted.
    pub members: Vec<ScanId>,
}

/// The method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MethodFacts {
    /// Hash over what shapes the tokens, but for the number format of the products, which moves
    /// them less than scans differ ([`EncoderFacts::precision`]), and the brain masks of the scans.
    pub fingerprint: String,
    /// SHA-256 of the voxels and affine of the template, where there is one.
    #[serde(default)]
    pub template_sha256: Option<String>,
    /// SHA-256 of the weights of the networks that found the brain, where they did.
    #[serde(default)]
    pub brain_network_sha256: Option<String>,
    /// All settings that shape tokens and scores, as in the configuration.
    pub settings: serde_json::Value,
}

/// The encoder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncoderFacts {
    /// Network.
    pub model: String,
    /// SHA-256 of the weights file.
    pub weights_sha256: String,
    /// Blocks that were scored, counted from 1.
    pub layers: Vec<usize>,
    /// Device.
    pub device: String,
    /// Number format of its products: `f32`, `f16` or `bf16`.
    #[serde(default)]
    pub precision: String,
}

/// One result file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    /// Name in the folder of the sidecar.
    pub name: String,
    /// Bytes.
    pub n_bytes: u64,
    /// Hash of the content, hex.
    pub sha256: String,
}

/// The files that belong to the sidecar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// Anomaly map.
    pub map: FileFacts,
    /// Anomaly mask.
    pub mask: FileFacts,
    /// Picture.
    pub picture: FileFacts,
    /// The brain that the scan was scored within (`results.brain_mask`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brain: Option<FileFacts>,
    /// Where the template lies in the scan (`results.alignment`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment_picture: Option<FileFacts>,
    /// The same as an ITK transform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment_transform: Option<FileFacts>,
}

/// Everything that is said about one scan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sidecar {
    /// [`SCHEMA`].
    pub schema: String,
    /// [`RESEARCH_USE_ONLY`].
    pub notice: String,
    /// Version that wrote it.
    pub oddscan_version: String,
    /// Whether there is a result yet.
    #[serde(flatten)]
    pub standing: Standing,
    /// File name as exported.
    pub source_name: String,
    /// Where it lay below the incoming folder; of a volume made of DICOM files, their folder or
    /// zip.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub came_from: String,
    /// SHA-256 of decoded voxels and affine.
    pub scan_id: ScanId,
    /// Modality that the scan was taken for, by its file name.
    pub modality: String,
    /// Cohort that the scan is compared within: a rule of the settings, else the modality.
    #[serde(default)]
    pub cohort: String,
    /// How it was acquired, as far as known.
    #[serde(default)]
    pub acquisition: AcquisitionFacts,
    /// Grows each time the result is replaced.
    pub revision: u64,
    /// Scores, once scored.
    pub scores: Option<Scores>,
    /// Threshold of the mask, once scored.
    pub threshold: Option<ThresholdFacts>,
    /// Regions of the mask, largest first.
    pub clusters: Vec<Cluster>,
    /// Volume of the brain mask, ml.
    pub brain_ml: f64,
    /// The brain mask; nothing of scans from before it was kept.
    #[serde(default)]
    pub brain_mask: Option<BrainFacts>,
    /// How good the scan is; nothing in sidecars from before that was asked.
    #[serde(default)]
    pub quality: Option<QualityFacts>,
    /// How its intensities were scaled; nothing in sidecars from before there was a choice.
    #[serde(default)]
    pub intensity: Option<IntensityFacts>,
    /// How the scan was aligned to the template, if it was.
    pub alignment: Option<AlignmentFacts>,
    /// How a program of the site prepared the scan, if one did.
    #[serde(default)]
    pub preprocess: Option<PreprocessFacts>,
    /// The window.
    pub window: WindowFacts,
    /// The method.
    pub method: MethodFacts,
    /// The encoder.
    pub encoder: EncoderFacts,
    /// What a reader should know before trusting the result.
    pub warnings: Vec<String>,
    /// Wall time of each step, seconds.
    pub timings_secs: BTreeMap<String, f64>,
    /// The other files, once scored.
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
            scan_id: ScanId([7; 32]),
            modality: "t1w".into(),
            cohort: "t1-3t".into(),
            acquisition: AcquisitionFacts::of("sub-1_T1w", [1.0, 1.0, 1.2]),
            revision: 3,
            scores: Some(Scores {
                max: 1.5,
                top1_mean: 1.25,
                percentile: 0.9,
                shift: Some(1.1),
                n_cells: 100,
                n_unmatched_cells: 1,
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
