//! The settings: reads one TOML tree, checks it, and reports all faults at once.
//!
//! `config/default.toml` has all defaults and documents every key. The binary contains it. Each
//! section has a file here with its checked type, its ranges and its tests.

mod alignment;
mod check;
mod cohort;
mod community;
mod directories;
mod encoder;
mod evidence;
mod intake;
mod intensity;
mod preprocess;
mod quality;
mod reload;
mod results;
mod scoring;
mod service;
mod tokens;
mod volume;
mod window;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use self::check::{Checker, merge};
use crate::{
    domain::{cohort::CohortRule, quality::QualityLimits, scan::ScanRecord, window::Membership},
    numeric::{preprocess::CubeSettings, token::TokenSettings},
};

pub use self::{
    alignment::{AlignmentChoice, AlignmentSettings, BrainChoice},
    check::Fault,
    directories::Directories,
    encoder::{DeviceChoice, Encoder},
    evidence::{EvidenceSettings, SequenceWeights},
    intake::Intake,
    intensity::{IntensitySettings, Standardise},
    preprocess::{PLACEHOLDERS, PreprocessChoice, PreprocessSettings},
    results::ResultSettings,
    scoring::Scoring,
    service::ServiceSettings,
    tokens::ProjectionSettings,
    window::WindowSettings,
};

/// The defaults with their documentation.
pub const DEFAULT_TOML: &str = include_str!("../../config/default.toml");

/// What the other presets change. In `paper`, `layers` stays empty: the blocks at all four quarters
/// of the depth.
const PRESETS: [(&str, &str); 2] = [
    ("fast", "[tokens]\nviews = [\"axial\", \"sagittal\"]\nslice_stride = 7\n"),
    (
        "paper",
        "[scoring]\nreach_patches = 0\nkeep_fraction = 0.3\npositional_correction = 0.0\n\
         follow_up_ratio = 0.0\nmask = \"always\"\n[evidence]\nflair_brightness = 0.0\n\
         flair_range = 0.0\nt1w_range = 0.0\nt2w_brightness = 0.0\nother_range = 0.0\n\
         rim_mm = 0.0\n[tokens]\njoin_views = true\nslices_per_token = 0\nslice_stride = 1\n\
         skip_background = false\n\
         projection = 128\nsmoothing_patches = 0.0\n",
    ),
];

/// A set of defaults for tokens, layers and scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// Like [`Preset::Balanced`], but from two views and every seventh slice.
    Fast,
    /// What `config/default.toml` says: one layer at three quarters of the depth, three views and
    /// every second slice. The search reaches one patch.
    Balanced,
    /// Le-Gia and Ahn 2026: four layers, every slice, joined and projected tokens. The search
    /// covers the whole volume.
    Paper,
}

/// All settings after their check.
#[expect(missing_docs, reason = "the type of a section says what it is")]
#[derive(Debug, Clone)]
pub struct Config {
    pub preset: Preset,
    pub directories: Directories,
    pub intake: Intake,
    /// A program of the site that processes scans first. `None` if there is none.
    pub preprocess: Option<PreprocessSettings>,
    pub volume: CubeSettings,
    pub alignment: AlignmentSettings,
    pub intensity: IntensitySettings,
    pub encoder: Encoder,
    pub tokens: TokenSettings,
    pub projection: ProjectionSettings,
    /// Rules that choose the cohort of a scan. The first match decides.
    pub cohorts: Vec<CohortRule>,
    /// Which scans are good enough to be compared with.
    pub quality: QualityLimits,
    pub window: WindowSettings,
    pub scoring: Scoring,
    /// How much intensities count beside tokens.
    pub evidence: EvidenceSettings,
    /// Optional files beside the results.
    pub results: ResultSettings,
    pub service: ServiceSettings,
    /// The complete tree: defaults, preset and site file. Sidecars quote it.
    pub tree: Table,
}

/// Why settings are refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}; check the path and its permissions", path.display())]
    Unreadable {
        /// File that was to be read.
        path: PathBuf,
        /// Error of the file system.
        source: std::io::Error,
    },
    /// The text is not TOML.
    #[error("the configuration is not valid TOML")]
    Syntax(#[from] Box<toml::de::Error>),
    /// Keys or values have faults.
    #[error("{} wrong in the configuration:{}", count(faults.len()), listing(faults))]
    Faults {
        /// All faults, in the order of their discovery.
        faults: Vec<Fault>,
    },
}

fn count(n: usize) -> String {
    if n == 1 { "1 setting is".to_owned() } else { format!("{n} settings are") }
}

fn listing(faults: &[Fault]) -> String {
    faults.iter().map(|fault| format!("\n  {fault}")).collect()
}

impl Config {
    /// How a scan stands to the others of its window.
    pub fn membership(&self, record: &ScanRecord) -> Membership {
        let patient = (!self.window.compare_same_patient).then(|| record.patient()).flatten();
        Membership { patient, is_reference: self.quality.allow(record) }
    }

    /// The address in a site's file, or the default. Other faults in the file do not matter.
    pub fn listen_in(path: &Path) -> Option<SocketAddr> {
        let site: Table = std::fs::read_to_string(path).ok()?.parse().ok()?;
        let named = |tree: &Table| Some(tree.get("service")?.get("listen")?.as_str()?.parse());
        named(&site).or_else(|| named(&defaults()))?.ok()
    }

    /// Whether a site's file itself has a key of this section.
    pub fn states(path: &Path, section: &str, key: &str) -> bool {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let site: Table = text.parse().unwrap_or_default();
        site.get(section).is_some_and(|section| section.get(key).is_some())
    }

    /// Reads a site's file and applies it to the defaults. Without a file the defaults alone count.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        match path {
            None => Self::parse(""),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
                Self::parse(&text)
            }
        }
    }

    /// Applies a site's text to the defaults and checks the result.
    pub fn parse(site: &str) -> Result<Self, ConfigError> {
        let mut site: Table = site.parse().map_err(Box::new)?;
        let mut tree = defaults();
        let mut faults = Vec::new();
        scoring::rename_old(&mut site, &mut faults);

        let named = site.get("preset").and_then(Value::as_str);
        if let Some((_, changes)) = PRESETS.iter().find(|(name, _)| Some(*name) == named) {
            let changes = changes.parse().expect("a test parses every preset");
            merge(&mut tree, changes, "", &mut faults);
        }
        merge(&mut tree, site, "", &mut faults);

        check(tree, faults)
    }

    /// The encoder blocks to score for a network of this depth, counted from 1.
    pub fn layers(&self, depth: usize) -> Vec<usize> {
        let quarter = |q: usize| (q * depth).div_ceil(4);
        match (&self.encoder.layers[..], self.preset) {
            ([], Preset::Fast | Preset::Balanced) => vec![quarter(3)],
            ([], Preset::Paper) => (1..=4).map(quarter).collect(),
            (layers, _) => layers.to_vec(),
        }
    }
}

/// The tree of `config/default.toml`: every key, with a value of its type.
fn defaults() -> Table {
    DEFAULT_TOML.parse().expect("a test parses the defaults")
}

/// Checks a complete tree. `faults` are those found so far.
fn check(tree: Table, faults: Vec<Fault>) -> Result<Config, ConfigError> {
    let check = &mut Checker::new(tree.clone(), faults);
    let presets =
        [("fast", Preset::Fast), ("balanced", Preset::Balanced), ("paper", Preset::Paper)];
    let mut config = Config {
        preset: check.word("preset", &presets),
        directories: directories::read(check),
        intake: intake::read(check),
        preprocess: preprocess::read(check),
        volume: volume::read(check),
        alignment: alignment::read(check),
        intensity: intensity::read(check),
        encoder: encoder::read(check),
        projection: tokens::read_projection(check),
        tokens: tokens::read(check),
        cohorts: check.cohorts(),
        quality: quality::read(check),
        window: window::read(check),
        scoring: scoring::read(check),
        evidence: evidence::read(check),
        results: results::read(check),
        service: service::read(check),
        tree,
    };
    if config.window.compare_same_patient {
        // Scans of one patient are to be compared, whatever shows that they are of one.
        config.scoring.follow_up_ratio = 0.0;
    }

    match check.finish() {
        faults if faults.is_empty() => Ok(config),
        faults => Err(ConfigError::Faults { faults }),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::numeric::scoring::SearchReach;

    #[test]
    fn the_defaults_are_valid_and_every_preset_is_too() {
        let config = Config::parse("").unwrap();
        assert_eq!(config.layers(12), [9]);
        assert_eq!(config.scoring.reach, SearchReach::Patches(NonZeroUsize::MIN));
        let fast = Config::parse("preset = \"fast\"").unwrap();
        assert_eq!((fast.layers(12), fast.tokens.views.len()), (vec![9], 2));
        assert_eq!((fast.tokens.slice_stride, config.tokens.slice_stride), (7, 2));
        let paper = Config::parse("preset = \"paper\"").unwrap();
        assert_eq!((paper.preset, paper.tokens.slice_stride), (Preset::Paper, 1));
        assert!(config.tokens.skip_background && !paper.tokens.skip_background);
        assert_eq!(paper.layers(12), [3, 6, 9, 12]);
        assert_eq!(paper.layers(24), [6, 12, 18, 24]);
        assert_eq!(paper.scoring.reach, SearchReach::WholeVolume);
        assert_eq!(paper.projection.channels, NonZeroUsize::new(128));
        assert_eq!(paper.tokens.smoothing_patches, 0.0);
        assert!(paper.tokens.join_views && !config.tokens.join_views);
        assert_eq!((paper.tokens.depth(14), config.tokens.depth(14)), (14, 7));
        assert_eq!((paper.scoring.keep.get(), paper.scoring.positional_correction), (0.3, 0.0));
        assert_eq!((paper.scoring.follow_up_ratio, config.scoring.follow_up_ratio), (0.0, 0.6));
    }

    #[test]
    fn the_example_of_a_site_is_valid() {
        let config = Config::parse(include_str!("../../config/site.toml")).unwrap();
        assert_eq!(config.window.min_scans, 12);
    }

    #[test]
    fn a_site_states_a_key_only_if_its_own_file_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("site.toml");
        let states = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Config::states(&path, "results", "identity")
        };
        assert!(states("results.identity = \"hash\""));
        assert!(!states("results.parts = true") && !states("no TOML at all"));
        assert!(!Config::states(&folder.path().join("missing"), "results", "identity"));
    }

    #[test]
    fn a_site_key_wins_over_the_preset() {
        let config = Config::parse("preset = \"paper\"\n[scoring]\nreach_patches = 2").unwrap();
        assert_eq!(config.scoring.reach, SearchReach::Patches(NonZeroUsize::new(2).unwrap()));
    }
}
