//! Which scans may be compared with which.
//!
//! The rules of the settings decide first, in their order. A scan that no rule takes belongs to the
//! cohort of the BIDS suffix in its file name. That cohort is separate from every named one.

use std::{fmt, ops::RangeInclusive};

use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Serialize};

pub use super::acquisition::UNKNOWN;
use super::acquisition::{AcquisitionFacts, suffix_of};

/// Ending of the names of cohorts with thick slices.
pub const THICK: &str = "-thick";

/// Scans are compared only within a cohort: one kind of image, processed in one way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CohortKey {
    /// Name of the rule that took the scan, or the lower-case BIDS suffix of the file name
    /// (`flair`, `t1w`), with [`THICK`] for thick slices, or [`UNKNOWN`]. The ledger calls it
    /// `modality`, from the time before there were rules.
    #[serde(rename = "modality")]
    pub name: String,
    /// First 16 hex digits of the hash over everything that shapes the tokens: weights, layers,
    /// preprocessing, pooling, projection.
    pub method: String,
}

impl CohortKey {
    /// The cohort of a scan: that of the first rule that takes it, else that of its suffix. Also
    /// returns the first earlier rule that could not be decided. Scans without a known suffix are a
    /// cohort of their own.
    ///
    /// Without a rule, scans with a voxel edge above `thick_mm` are a separate cohort of their
    /// suffix; 0 separates none.
    pub fn choose(
        rules: &[CohortRule],
        facts: &AcquisitionFacts,
        file_name: &str,
        thick_mm: f64,
        method: &str,
    ) -> (Self, Option<Undecided>) {
        let mut undecided = None;
        for rule in rules {
            match rule.verdict(facts, file_name) {
                Verdict::Takes => return (Self::named(&rule.name, method), undecided),
                Verdict::Lacks(missing) => {
                    let rule = rule.name.clone();
                    undecided = undecided.or(Some(Undecided { rule, missing }));
                }
                Verdict::Refuses => {}
            }
        }

        let mut name = facts.suffix.as_deref().map_or(UNKNOWN.to_owned(), str::to_lowercase);
        if name != UNKNOWN && facts.has_voxels_above(thick_mm) {
            name.push_str(THICK);
        }
        (Self::named(&name, method), undecided)
    }

    fn named(name: &str, method: &str) -> Self {
        Self { name: name.to_owned(), method: method.to_owned() }
    }

    /// Metric label: one of a dozen suffixes, or the name of a rule of the settings.
    pub fn label(&self) -> &str {
        &self.name
    }
}

/// The cohort of a file with this stem without rules: its suffix in lower case, or [`UNKNOWN`].
pub fn modality_of(stem: &str) -> String {
    suffix_of(stem).map_or(UNKNOWN.to_owned(), str::to_lowercase)
}

impl fmt::Display for CohortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.name, self.method)
    }
}

/// A rule that could not be decided for a scan, because facts are missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Undecided {
    /// Name of the rule, which is also that of its cohort.
    pub rule: String,
    /// Keys of the missing facts.
    pub missing: Vec<&'static str>,
}

/// A shell pattern that ignores case.
#[derive(Debug, Clone)]
pub struct Pattern(GlobMatcher);

impl Pattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// The reason in words, if the text is no valid pattern.
    pub fn new(text: &str) -> Result<Self, String> {
        let glob = GlobBuilder::new(text).case_insensitive(true).build();
        glob.map(|glob| Self(glob.compile_matcher())).map_err(|error| error.kind().to_string())
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0.glob().glob())
    }
}

/// A fact about a scan that is a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextFact {
    /// Name of the file, with its ending.
    File,
    /// Who built the scanner.
    Manufacturer,
    /// Model of the scanner.
    Model,
    /// Description of the series, or name of the protocol: sites write into either.
    Series,
    /// `2D` or `3D`.
    Dimensions,
}

impl TextFact {
    /// Every text fact, for lookups by key.
    pub const ALL: [Self; 5] =
        [Self::File, Self::Manufacturer, Self::Model, Self::Series, Self::Dimensions];

    /// Key in the settings.
    pub fn key(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Manufacturer => "manufacturer",
            Self::Model => "model",
            Self::Series => "series",
            Self::Dimensions => "dimensions",
        }
    }

    /// The known texts; one match is enough.
    fn texts<'a>(self, facts: &'a AcquisitionFacts, file_name: &'a str) -> [Option<&'a str>; 2] {
        match self {
            Self::File => [Some(file_name), None],
            Self::Manufacturer => [facts.manufacturer.as_deref(), None],
            Self::Model => [facts.model.as_deref(), None],
            Self::Series => [facts.series.as_deref(), facts.protocol.as_deref()],
            Self::Dimensions => [facts.dimensions.as_deref(), None],
        }
    }
}

/// A fact about a scan that is a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumberFact {
    /// Field strength, tesla.
    FieldStrength,
    /// Echo time, ms.
    EchoTime,
    /// Repetition time, ms.
    RepetitionTime,
    /// Inversion time, ms.
    InversionTime,
    /// Slice thickness, mm.
    SliceThickness,
}

impl NumberFact {
    /// Every number fact, for lookups by key.
    pub const ALL: [Self; 5] = [
        Self::FieldStrength,
        Self::EchoTime,
        Self::RepetitionTime,
        Self::InversionTime,
        Self::SliceThickness,
    ];

    /// Key in the settings.
    pub fn key(self) -> &'static str {
        match self {
            Self::FieldStrength => "field_strength_t",
            Self::EchoTime => "echo_time_ms",
            Self::RepetitionTime => "repetition_time_ms",
            Self::InversionTime => "inversion_time_ms",
            Self::SliceThickness => "slice_thickness_mm",
        }
    }

    fn value(self, facts: &AcquisitionFacts) -> Option<f64> {
        match self {
            Self::FieldStrength => facts.field_strength_t,
            Self::EchoTime => facts.echo_time_ms,
            Self::RepetitionTime => facts.repetition_time_ms,
            Self::InversionTime => facts.inversion_time_ms,
            Self::SliceThickness => facts.slice_thickness_mm,
        }
    }
}

/// Key of the condition on the largest voxel edge.
pub const MAX_SPACING: &str = "max_spacing_mm";

/// One requirement of a rule.
#[derive(Debug, Clone)]
pub enum Condition {
    /// The file name has this suffix, as BIDS spells it.
    Suffix(&'static str),
    /// A text matches this pattern.
    Like(TextFact, Pattern),
    /// A number is in this range, ends included.
    Within(NumberFact, RangeInclusive<f64>),
    /// No voxel edge is longer than this, mm.
    MaxSpacing(f64),
}

impl Condition {
    /// Key in the settings.
    pub fn key(&self) -> &'static str {
        match self {
            Self::Suffix(_) => "suffix",
            Self::Like(fact, _) => fact.key(),
            Self::Within(fact, _) => fact.key(),
            Self::MaxSpacing(_) => MAX_SPACING,
        }
    }

    /// Whether it describes the kind of image. Scanner and field strength do not.
    pub fn tells_images_apart(&self) -> bool {
        use TextFact::{File, Series};
        matches!(self, Self::Suffix(_) | Self::Like(File | Series, _))
    }

    /// Whether it holds; `None` if the fact is not known.
    fn holds(&self, facts: &AcquisitionFacts, file_name: &str) -> Option<bool> {
        match self {
            // A name without a known suffix is a known fact, too: it has none.
            Self::Suffix(wanted) => Some(facts.suffix.as_deref() == Some(*wanted)),
            Self::Like(fact, pattern) => {
                let texts = fact.texts(facts, file_name).into_iter().flatten();
                texts.map(|text| pattern.0.is_match(text)).reduce(|one, other| one || other)
            }
            Self::Within(fact, range) => fact.value(facts).map(|value| range.contains(&value)),
            Self::MaxSpacing(most) => {
                // A header's f32 of 1.2 mm is 1.2000000477.
                facts.spacing_mm.map(|_| !facts.has_voxels_above(*most))
            }
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.key();
        match self {
            Self::Suffix(suffix) => write!(f, "{key} {suffix}"),
            Self::Like(_, pattern) => write!(f, "{key} like {pattern}"),
            Self::Within(_, range) => write!(f, "{key} {} to {}", range.start(), range.end()),
            Self::MaxSpacing(most) => write!(f, "{key} {most}"),
        }
    }
}

/// Puts the scans for which all its conditions hold into a cohort of its name.
#[derive(Debug, Clone)]
pub struct CohortRule {
    /// Name of the rule and of its cohort.
    pub name: String,
    /// At least one.
    pub conditions: Vec<Condition>,
}

/// The decision of a rule about a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Takes,
    Refuses,
    /// All known facts fit, but these are missing.
    Lacks(Vec<&'static str>),
}

impl CohortRule {
    /// A rule does not take a scan that lacks a fact it needs. To compare the scan with another
    /// kind of image is worse than to let it wait.
    fn verdict(&self, facts: &AcquisitionFacts, file_name: &str) -> Verdict {
        let mut missing = Vec::new();
        for condition in &self.conditions {
            match condition.holds(facts, file_name) {
                Some(true) => {}
                Some(false) => return Verdict::Refuses,
                None => missing.push(condition.key()),
            }
        }
        if missing.is_empty() { Verdict::Takes } else { Verdict::Lacks(missing) }
    }
}

impl fmt::Display for CohortRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let conditions: Vec<String> = self.conditions.iter().map(ToString::to_string).collect();
        write!(f, "{}: {}", self.name, conditions.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(
        suffix: &str,
        field_strength_t: Option<f64>,
        series: Option<&str>,
    ) -> AcquisitionFacts {
        AcquisitionFacts {
            field_strength_t,
            series: series.map(str::to_owned),
            ..AcquisitionFacts::of(suffix, [1.0, 1.0, 1.2])
        }
    }

    fn rule(name: &str, conditions: Vec<Condition>) -> CohortRule {
        CohortRule { name: name.to_owned(), conditions }
    }

    fn like(fact: TextFact, pattern: &str) -> Condition {
        Condition::Like(fact, Pattern::new(pattern).unwrap())
    }

    fn tesla(low: f64, high: f64) -> Condition {
        Condition::Within(NumberFact::FieldStrength, low..=high)
    }

    fn name(rules: &[CohortRule], facts: &AcquisitionFacts) -> String {
        CohortKey::choose(rules, facts, "sub-1_T1w.nii.gz", 4.0, "m").0.name
    }

    #[test]
    fn without_rules_the_suffix_decides_and_anything_else_is_unknown() {
        let choose = |stem: &str| name(&[], &AcquisitionFacts::of(stem, [1.0; 3]));
        assert_eq!(choose("sub-01_ses-2_FLAIR"), "flair");
        assert_eq!(choose("brats13-0001_t1W"), "t1w");
        assert_eq!(choose("DOE^JOHN_1980"), "unknown");
        for stem in ["sub-01_FLAIR", "scan"] {
            assert_eq!(modality_of(stem), choose(stem));
        }
    }

    #[test]
    fn the_first_rule_that_takes_a_scan_wins() {
        let narrow = rule("narrow", vec![Condition::Suffix("T1w"), tesla(2.5, 3.5)]);
        let wide = rule("wide", vec![Condition::Suffix("T1w"), tesla(1.0, 7.0)]);
        let rules = [narrow.clone(), wide.clone()];
        assert_eq!(name(&rules, &facts("a_T1w", Some(3.0), None)), "narrow");
        assert_eq!(name(&rules, &facts("a_T1w", Some(1.5), None)), "wide");
        assert_eq!(name(&[wide, narrow], &facts("a_T1w", Some(3.0), None)), "wide");
        assert_eq!(name(&rules, &facts("a_T1w", Some(0.2), None)), "t1w");
        assert_eq!(name(&rules, &facts("a_FLAIR", Some(3.0), None)), "flair");
        assert_eq!(name(&rules, &facts("scan", Some(3.0), None)), "unknown");
    }

    #[test]
    fn a_scan_that_lacks_a_fact_is_not_taken_and_the_rule_is_named() {
        let rules = [
            rule("t2", vec![Condition::Suffix("T2w"), tesla(2.5, 3.5)]),
            rule("t1", vec![like(TextFact::Series, "*mprage*"), tesla(2.5, 3.5)]),
            rule("any", vec![like(TextFact::File, "SUB-*")]),
        ];
        let choose = |facts| CohortKey::choose(&rules, &facts, "sub-1_T1w.nii.gz", 4.0, "m");
        // The first rule refuses by what is known: that it also lacks a fact does not matter.
        let (key, undecided) = choose(facts("a_T1w", None, Some("t1 MPRAGE sag")));
        assert_eq!(key.name, "any");
        let missing = vec!["field_strength_t"];
        assert_eq!(undecided, Some(Undecided { rule: "t1".into(), missing }));
        let (key, undecided) = choose(facts("a_T1w", Some(3.0), Some("t1 MPRAGE sag")));
        assert_eq!((key.name.as_str(), undecided), ("t1", None));
    }

    #[test]
    fn series_or_protocol_may_match_and_the_ends_of_a_range_belong_to_it() {
        let rules = [rule("x", vec![like(TextFact::Series, "*[Mm]prage*"), tesla(1.5, 3.0)])];
        let by_protocol = AcquisitionFacts {
            protocol: Some("T1_MPRAGE".into()),
            ..facts("a_T1w", Some(3.0), Some("sag 1mm"))
        };
        assert_eq!(name(&rules, &by_protocol), "x");
        assert_eq!(name(&rules, &AcquisitionFacts { protocol: None, ..by_protocol }), "t1w");
    }

    #[test]
    fn thick_slices_are_a_cohort_of_their_own_unless_a_rule_takes_them() {
        let rule = rule("night", vec![like(TextFact::File, "night_*")]);
        let name = |spacing, file_name, thick_mm| {
            let facts = AcquisitionFacts::of("sub-1_FLAIR", spacing);
            CohortKey::choose(std::slice::from_ref(&rule), &facts, file_name, thick_mm, "m").0.name
        };
        let [thin, thick] = [[0.9, 4.0, 0.9], [0.9, 0.9, 6.5]];
        assert_eq!(name(thin, "sub-1_FLAIR.nii.gz", 4.0), "flair");
        assert_eq!(name(thick, "sub-1_FLAIR.nii.gz", 4.0), "flair-thick");
        assert_eq!(name(thick, "sub-1_FLAIR.nii.gz", 0.0), "flair");
        assert_eq!(name(thick, "night_FLAIR.nii.gz", 4.0), "night");
    }

    #[test]
    fn the_largest_voxel_edge_decides_about_the_spacing() {
        let at_most = |most| [rule("x", vec![Condition::MaxSpacing(most)])];
        let scan = facts("a_T1w", None, None);
        assert_eq!(name(&at_most(1.2), &scan), "x");
        assert_eq!(name(&at_most(1.1), &scan), "t1w");
        let float = AcquisitionFacts { spacing_mm: Some([f64::from(1.2_f32); 3]), ..scan };
        assert_eq!(name(&at_most(1.2), &float), "x");
    }

    #[test]
    fn the_ledger_keeps_the_name_of_the_field_from_before_there_were_rules() {
        let old = r#"{"modality":"t1w","method":"m"}"#;
        let key: CohortKey = serde_json::from_str(old).unwrap();
        assert_eq!((key.label(), serde_json::to_string(&key).unwrap().as_str()), ("t1w", old));
    }
}
