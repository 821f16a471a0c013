//! `[evidence]`: how much intensities count beside tokens.

use super::check::Checker;
use crate::{domain::acquisition::AcquisitionFacts, numeric::fusion::Weights};

/// Above this voxel edge tokens count less, mm: thick slices blur two of the three views.
const SHARP_MM: f64 = 3.0;

/// Weights of the evidence in scans of one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SequenceWeights {
    /// Weight of the scan's own brightness.
    pub brightness: f64,
    /// Weight of intensities beyond the range of the other scans.
    pub range: f64,
}

/// `[evidence]` after its check.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvidenceSettings {
    /// For scans with the suffix FLAIR.
    pub flair: SequenceWeights,
    /// For scans with the suffix T1w.
    pub t1w: SequenceWeights,
    /// For scans with the suffix T2w.
    pub t2w: SequenceWeights,
    /// For all others.
    pub other: SequenceWeights,
    /// Depth in the brain at which evidence counts in full, mm.
    pub rim_mm: f64,
}

pub(super) fn read(check: &mut Checker) -> EvidenceSettings {
    let mut weights = |sequence: &str| SequenceWeights {
        brightness: check.number(&format!("evidence.{sequence}_brightness"), 0.0..=10.0),
        range: check.number(&format!("evidence.{sequence}_range"), 0.0..=10.0),
    };
    let [flair, t1w, t2w, other] = ["flair", "t1w", "t2w", "other"].map(&mut weights);
    EvidenceSettings { flair, t1w, t2w, other, rim_mm: check.number("evidence.rim_mm", 0.0..=15.0) }
}

impl EvidenceSettings {
    /// The weights for a scan. All of them are those of tokens alone if `[evidence]` is all 0.
    pub fn weights(&self, acquisition: &AcquisitionFacts) -> Weights {
        let SequenceWeights { brightness, range } = match acquisition.suffix.as_deref() {
            Some("FLAIR") => self.flair,
            Some("T1w") => self.t1w,
            Some("T2w") => self.t2w,
            _ => self.other,
        };
        let longest =
            acquisition.spacing_mm.map_or(0.0, |edges| edges.into_iter().fold(0.0, f64::max));
        let rim_mm = self.rim_mm;
        let sharp = Weights { tokens: 1.0, brightness, range, rim_mm };
        if sharp.are_of_tokens_alone() {
            return sharp;
        }
        Weights { tokens: SHARP_MM / longest.max(SHARP_MM), ..sharp }
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        config::{Config, check::faults},
        domain::acquisition::AcquisitionFacts,
        numeric::fusion::Weights,
    };

    #[test]
    fn weights_follow_the_sequence_and_the_slices() {
        let evidence = Config::parse("").unwrap().evidence;
        let weights = |stem: &str, thick: f64| {
            let Weights { tokens, brightness, range, .. } =
                evidence.weights(&AcquisitionFacts::of(stem, [1.0, 1.0, thick]));
            [tokens, brightness, range]
        };
        assert_eq!(weights("sub-1_FLAIR", 1.0), [1.0, 1.0, 0.3]);
        assert_eq!(weights("sub-1_FLAIR", 6.0), [0.5, 1.0, 0.3]);
        assert_eq!(weights("sub-1_T1w", 2.0), [1.0, 0.0, 1.0]);
        assert_eq!(weights("sub-1_T1ce", 1.0), [1.0, 0.0, 0.3]);
        assert_eq!(weights("scan", 1.0), [1.0, 0.0, 0.3]);
    }

    #[test]
    fn the_preset_of_the_paper_has_maps_of_tokens_alone() {
        let paper = Config::parse("preset = \"paper\"").unwrap().evidence;
        let thick = AcquisitionFacts::of("sub-1_FLAIR", [1.0, 1.0, 6.0]);
        assert_eq!(paper.weights(&thick), Weights::OF_TOKENS_ALONE);
        let found = faults("evidence.flair_brightness = -1.0");
        assert_eq!(found, ["evidence.flair_brightness = -1: a number from 0 to 10 is needed"]);
    }
}
