//! Which scans are good enough to be compared with.
//!
//! A bad scan is scored and reported like any other, with a warning. Other scans are not compared
//! with it: its tokens describe noise, or another place than they seem to.

use super::scan::ScanRecord;

/// With less of the template's brain in its field of view, a scan shows a part of a head.
const MIN_COVERAGE_OF_WHOLE: f64 = 0.97;

/// The share of the template's brain in the field of view of a scan that shows a part of a head.
/// `None` of whole heads, and of scans that were not aligned.
pub fn coverage_of_part(record: &ScanRecord) -> Option<f64> {
    let coverage = record.alignment.map(|found| found.coverage);
    coverage.filter(|&coverage| coverage < MIN_COVERAGE_OF_WHOLE)
}

/// Limits beyond which a scan is no reference for others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QualityLimits {
    /// Most noise, as a share of the brain's contrast.
    pub max_noise: f64,
    /// Largest share of the brain outside the cube.
    pub max_cut_fraction: f64,
    /// Least share of the scan's contrast that the template must explain, of scans that were
    /// aligned.
    pub min_explained: f64,
    /// Least distinctness of the alignment, of scans that were aligned.
    pub min_distinctness: f64,
    /// Least share of the template's brain in the scan's field of view, of scans that were aligned.
    pub min_coverage: f64,
    /// Least Dice of the brains that were found in two ways.
    pub min_brain_agreement: f64,
}

impl QualityLimits {
    /// The limits that a scan misses, in words with value, limit and key. Empty if others may be
    /// compared with it. A value that was not measured, as in old scans, misses no limit.
    pub fn faults(&self, record: &ScanRecord) -> Vec<String> {
        let encoded = record.encoded.as_ref();
        let noise = encoded.and_then(|found| found.noise).filter(|&noise| noise > self.max_noise);
        let cut =
            encoded.map(|found| found.cut_fraction).filter(|&cut| cut > self.max_cut_fraction);
        let explained = record.alignment.map(|found| found.explained);
        let explained = explained.filter(|&explained| explained < self.min_explained);
        let distinctness = record.alignment.and_then(|found| found.distinctness);
        let distinctness = distinctness.filter(|&found| found < self.min_distinctness);
        let coverage = record.alignment.map(|found| found.coverage);
        let coverage = coverage.filter(|&coverage| coverage < self.min_coverage);
        let agreement = record.brain.as_ref().and_then(|brain| brain.agreement);
        let agreement = agreement.filter(|&found| found < self.min_brain_agreement);

        let (percent, limit) = (|share: f64| 100.0 * share, "is the limit");
        let faults = [
            noise.map(|noise| {
                let most = percent(self.max_noise);
                format!(
                    "noise of {:.0} % of the brain's contrast, {most:.0} % {limit} \
                         (quality.max_noise)",
                    percent(noise)
                )
            }),
            cut.map(|cut| {
                let most = percent(self.max_cut_fraction);
                format!(
                    "{:.1} % of the brain outside the field of view, {most:.1} % {limit} \
                         (quality.max_cut_fraction)",
                    percent(cut)
                )
            }),
            explained.map(|explained| {
                let least = percent(self.min_explained);
                format!(
                    "{:.0} % of its contrast explained by the template, {least:.0} % {limit} \
                         (quality.min_explained)",
                    percent(explained)
                )
            }),
            distinctness.map(|found| {
                format!(
                    "the alignment has a distinctness of {found:.2}, {:.2} {limit} \
                     (quality.min_distinctness)",
                    self.min_distinctness
                )
            }),
            coverage.map(|coverage| {
                let least = percent(self.min_coverage);
                format!(
                    "{:.1} % of the template's brain within the scanner's field of view, {least:.1} % \
                     {limit} (quality.min_coverage)",
                    percent(coverage)
                )
            }),
            agreement.map(|found| {
                format!(
                    "two ways to find the brain agree with a Dice of {found:.2}, {:.2} {limit} \
                     (quality.min_brain_agreement)",
                    self.min_brain_agreement
                )
            }),
        ];
        faults.into_iter().flatten().collect()
    }

    /// Whether others may be compared with a scan.
    pub fn allow(&self, record: &ScanRecord) -> bool {
        self.faults(record).is_empty()
    }
}

/// Whether the noise of an encoded scan could not be measured, so that its limit says nothing.
/// Scans from before noise was measured do not count: they have no facts on their brain.
pub fn noise_is_unmeasured(record: &ScanRecord) -> bool {
    record.brain.is_some() && record.encoded.as_ref().is_some_and(|found| found.noise.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        cohort::CohortKey,
        scan::{AlignmentFacts, BrainFacts, BrainSource, EncodedFacts, ScanId, ScanState},
    };

    fn record(noise: Option<f64>, cut_fraction: f64, explained: Option<f64>) -> ScanRecord {
        let alignment = |explained| AlignmentFacts {
            template_to_scan: [[0.0; 4]; 3],
            explained,
            distinctness: Some(0.5),
            coverage: 1.0,
            brain_extracted: true,
        };
        let cohort = CohortKey { name: "t1w".into(), method: "m".into() };
        ScanRecord {
            state: ScanState::Encoded,
            alignment: explained.map(alignment),
            encoded: Some(EncodedFacts { noise, cut_fraction, ..EncodedFacts::default() }),
            ..ScanRecord::new(ScanId([1; 32]), cohort)
        }
    }

    #[test]
    fn every_limit_is_named_with_value_and_key_and_what_is_not_known_is_no_fault() {
        let limits = QualityLimits {
            max_noise: 0.2,
            max_cut_fraction: 0.1,
            min_explained: 0.4,
            min_distinctness: 0.3,
            min_coverage: 0.9,
            min_brain_agreement: 0.9,
        };
        assert!(limits.allow(&record(Some(0.2), 0.1, Some(0.4))), "the limits themselves are in");
        assert!(limits.allow(&record(None, 0.0, None)));
        assert!(limits.allow(&ScanRecord { encoded: None, ..record(None, 0.0, None) }));
        let faults = limits.faults(&record(Some(0.31), 0.125, Some(0.35)));
        assert_eq!(
            faults,
            [
                "noise of 31 % of the brain's contrast, 20 % is the limit (quality.max_noise)",
                "12.5 % of the brain outside the field of view, 10.0 % is the limit \
                 (quality.max_cut_fraction)",
                "35 % of its contrast explained by the template, 40 % is the limit \
                 (quality.min_explained)",
            ]
        );

        let mut doubtful = record(None, 0.0, Some(0.5));
        let brain = |agreement| BrainFacts {
            from: BrainSource::Network,
            agreement,
            session_t1: None,
            sha256: String::new(),
        };
        doubtful.brain = Some(brain(Some(0.84)));
        doubtful.alignment.as_mut().unwrap().distinctness = Some(0.21);
        assert_eq!(
            limits.faults(&doubtful),
            [
                "the alignment has a distinctness of 0.21, 0.30 is the limit \
                 (quality.min_distinctness)",
                "two ways to find the brain agree with a Dice of 0.84, 0.90 is the limit \
                 (quality.min_brain_agreement)",
            ]
        );
        assert!(noise_is_unmeasured(&doubtful));
        assert!(!noise_is_unmeasured(&record(None, 0.0, None)), "from before it was measured");
        assert!(!noise_is_unmeasured(&ScanRecord { encoded: None, ..doubtful.clone() }));
        doubtful.brain = Some(brain(None));
        doubtful.alignment.as_mut().unwrap().distinctness = Some(0.5);
        doubtful.alignment.as_mut().unwrap().coverage = 0.8994;
        assert_eq!(
            limits.faults(&doubtful),
            ["89.9 % of the template's brain within the scanner's field of view, 90.0 % is the \
                 limit (quality.min_coverage)"]
        );
        assert_eq!(coverage_of_part(&doubtful), Some(0.8994));

        // A part of a head with enough brain is a reference.
        doubtful.alignment.as_mut().unwrap().coverage = 0.95;
        assert!(limits.allow(&doubtful) && coverage_of_part(&doubtful).is_some());
        doubtful.alignment.as_mut().unwrap().coverage = 0.97;
        assert_eq!(coverage_of_part(&doubtful), None);
        doubtful.alignment.as_mut().unwrap().distinctness = None;
        assert!(limits.allow(&doubtful));
    }
}
