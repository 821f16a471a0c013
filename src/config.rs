//! The settings: one TOML tree, raw text in, checked [`Config`] out, all faults reported at once.
//!
//! Defaults stand once, in `config/default.toml`, which is compiled in and documents every key.

mod cohort;
mod preprocess;

use std::{
    fmt,
    net::SocketAddr,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use toml::{Table, Value};

use crate::{
    compute::{Precision, position::PositionResize},
    domain::{cohort::CohortRule, quality::QualityLimits, scan::ScanRecord, window::Membership},
    nifti::Limits,
    numeric::{
        community::CommunitySettings,
        geometry::Axis,
        preprocess::CubeSettings,
        scoring::{Fraction, SearchReach},
        token::TokenSettings,
    },
    store::MIN_MEMORY,
};

pub use preprocess::{PLACEHOLDERS, PreprocessChoice, PreprocessSettings};

/// The defaults with their documentation.
pub const DEFAULT_TOML: &str = include_str!("../config/default.toml");

/// What the other presets change. With `paper`, `layers` stays empty and means all four quarters.
const PRESETS: [(&str, &str); 2] = [
    ("fast", "[tokens]\nviews = [\"axial\", \"sagittal\"]\nslice_stride = 7\n"),
    (
        "paper",
        "[scoring]\nreach_patches = 0\nkeep_fraction = 0.3\nplace_share = 0.0\n[tokens]\n\
         join_views = true\nslices_per_token = 0\nslice_stride = 1\nskip_background = false\n\
         projection = 128\nsmoothing_patches = 0.0\n",
    ),
];

/// Keys that SIGHUP cannot change, because stored tokens, open sockets or folders rest on them.
const NEEDS_RESTART: [&str; 12] = [
    "preset",
    "directories",
    "preprocess",
    "alignment",
    "volume",
    "intensity",
    "encoder",
    "tokens",
    "window.memory_mib",
    "window.max_cohort_labels",
    "scoring.reach_patches",
    "service.listen",
];

/// A set of scoring defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// As [`Preset::Balanced`], from a tenth of the slices that the paper encodes.
    Fast,
    /// One layer at three quarters of the depth, matches sought one patch around.
    Balanced,
    /// Le-Gia and Ahn 2026: four quarter layers, whole-volume search.
    Paper,
}

/// Which device encodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceChoice {
    /// CUDA where it works, else the CPU.
    Auto,
    /// CUDA or nothing.
    Cuda,
    /// The native CPU engine.
    Cpu,
}

/// Which scans are aligned to the template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlignmentChoice {
    /// Those that still have a head around the brain; its brain is extracted then.
    Heads,
    /// All.
    Always,
    /// None: heads are refused.
    Never,
}

/// Alignment to a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AlignmentSettings {
    /// Which scans.
    pub mode: AlignmentChoice,
    /// The template; the fetched one if not named.
    pub template: Option<PathBuf>,
    /// What finds the brain of a head.
    pub brain: BrainChoice,
    /// Weights of the networks for brain extraction; the fetched ones if not named.
    pub brain_weights: Option<PathBuf>,
    /// Whether the brain of a T1 is carried over to other scans of its session.
    pub uses_session_t1: bool,
}

/// What finds the brain of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BrainChoice {
    /// The networks where their weights are there, else the template.
    Auto,
    /// The aligned template and the scan's intensities.
    Template,
    /// The networks.
    Network,
}

/// How intensities are brought to one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standardise {
    /// Divided by the white level.
    None,
    /// By the landmarks of the scan's cohort.
    Nyul,
}

/// Intensity standardisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntensitySettings {
    /// By what.
    pub standardise: Standardise,
    /// File of landmarks; empty unless they are asked for.
    pub landmarks: PathBuf,
}

/// The folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directories {
    /// Watched for scans.
    pub incoming: PathBuf,
    /// Results are written here.
    pub results: PathBuf,
    /// Refused files go here.
    pub quarantine: PathBuf,
    /// Store and archived sources.
    pub state: PathBuf,
}

/// How files are taken in.
#[derive(Debug, Clone, PartialEq)]
pub struct Intake {
    /// Unchanged for so long = whole.
    pub settle: Duration,
    /// A DICOM series unchanged for so long = complete.
    pub series_settle: Duration,
    /// Between listings.
    pub rescan: Duration,
    /// File names never read (shell patterns).
    pub ignore: Vec<String>,
    /// File names that are scans (shell patterns).
    pub accept: Vec<String>,
    /// Largest file and grid.
    pub limits: Limits,
    /// Files that are read at once; 0 = as many as suit the processor.
    pub read_at_once: usize,
}

/// The encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoder {
    /// Weights file, if named.
    pub weights: Option<PathBuf>,
    /// Device.
    pub device: DeviceChoice,
    /// Blocks, counted from 1, ascending; empty = by preset and depth.
    pub layers: Vec<usize>,
    /// Final norm applied to each.
    pub final_norm: bool,
    /// Position embedding.
    pub position_resize: PositionResize,
    /// Number format of the products; `None` leaves it to the device.
    pub precision: Option<Precision>,
    /// Slices per forward pass.
    pub batch_slices: usize,
}

/// The projection of each view's features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProjectionSettings {
    /// Channels afterwards; `None` keeps all.
    pub channels: Option<NonZeroUsize>,
    /// Seed of the matrix.
    pub seed: u64,
}

/// The rolling window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WindowSettings {
    /// Scans before anything is scored.
    pub min_scans: usize,
    /// Scans held.
    pub max_scans: NonZeroUsize,
    /// Memory for the tokens and distances of all windows, bytes.
    pub memory_bytes: u64,
    /// Cohorts with a metric label of their own.
    pub max_cohort_labels: usize,
    /// Whether scans of one patient are compared with each other like all others.
    pub compare_same_patient: bool,
    /// Without a cohort rule, scans with longer voxels are a cohort of their own; 0 = none are.
    pub thick_slice_mm: f64,
}

/// The scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    /// Where a token looks for matches.
    pub reach: SearchReach,
    /// Share of the other scans averaged over.
    pub keep: Fraction,
    /// Share of what its place scores in the other scans that is taken from a score.
    pub place_share: f64,
    /// Share of healthy voxels above the threshold, at most a quarter.
    pub false_positives: Fraction,
    /// Share of the scans whose lesions are taken to be smaller than that.
    pub clean_scans: Fraction,
    /// Smallest region of the mask, mm^3.
    pub min_cluster_mm3: f64,
    /// Whether anomalies that several scans share are looked for.
    pub filter_shared: bool,
    /// How they are looked for.
    pub community: CommunitySettings,
}

/// Files that are written beside each result where a site asks for them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResultSettings {
    /// The brain that the scan was scored within.
    pub brain_mask: bool,
    /// Where the template lies, of scans that were aligned: a picture and a transform.
    pub alignment: bool,
}

/// The daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceSettings {
    /// Loopback address of the HTTP pages.
    pub listen: SocketAddr,
    /// Filter directive.
    pub log: String,
    /// Intake pauses below, bytes.
    pub min_free_bytes: u64,
}

/// Checked settings.
#[derive(Debug, Clone)]
pub struct Config {
    /// Set of defaults.
    pub preset: Preset,
    /// Folders.
    pub directories: Directories,
    /// Intake.
    pub intake: Intake,
    /// A program of the site that scans go through first, if there is one.
    pub preprocess: Option<PreprocessSettings>,
    /// Canonical cube.
    pub volume: CubeSettings,
    /// Alignment.
    pub alignment: AlignmentSettings,
    /// Intensity standardisation.
    pub intensity: IntensitySettings,
    /// Encoder.
    pub encoder: Encoder,
    /// Tokens.
    pub tokens: TokenSettings,
    /// Projection.
    pub projection: ProjectionSettings,
    /// Rules that put scans into cohorts, first one first.
    pub cohorts: Vec<CohortRule>,
    /// Which scans are good enough to be compared with.
    pub quality: QualityLimits,
    /// Window.
    pub window: WindowSettings,
    /// Scoring.
    pub scoring: Scoring,
    /// Files beside the results.
    pub results: ResultSettings,
    /// Service.
    pub service: ServiceSettings,
    /// The complete tree after defaults, preset and site file: what sidecars quote.
    pub tree: Table,
}

/// One thing wrong with a setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Dotted key.
    pub key: String,
    /// Value found.
    pub found: String,
    /// What was needed.
    pub needed: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, found, needed } = self;
        write!(f, "{key} = {found}: {needed}")
    }
}

/// Why settings were refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}; check the path and its permissions", path.display())]
    Unreadable {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The text is no TOML.
    #[error("the configuration is not valid TOML")]
    Syntax(#[from] Box<toml::de::Error>),
    /// A value is of another type, within a list or a table.
    #[error("a value in the configuration is of the wrong type")]
    Type(#[source] Box<toml::de::Error>),
    /// Keys or values are wrong.
    #[error("{} wrong in the configuration:{}", count(faults.len()), listing(faults))]
    Faults {
        /// All of them.
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

    /// Reads a site's file over the defaults; without a file the defaults alone.
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

    /// The address that a site's file names, or leaves at its default, whatever else is wrong with
    /// it.
    pub fn listen_in(path: &Path) -> Option<SocketAddr> {
        let site: Table = std::fs::read_to_string(path).ok()?.parse().ok()?;
        let default: Table = DEFAULT_TOML.parse().expect("a test parses the defaults");
        let named = |tree: &Table| Some(tree.get("service")?.get("listen")?.as_str()?.parse());
        named(&site).or_else(|| named(&default))?.ok()
    }

    /// Checks a site's text over the defaults.
    pub fn parse(site: &str) -> Result<Self, ConfigError> {
        let site: Table = site.parse().map_err(Box::new)?;
        let mut tree: Table = DEFAULT_TOML.parse().expect("a test parses the defaults");
        let mut faults = Vec::new();
        let named = site.get("preset").and_then(Value::as_str);
        if let Some((_, changes)) = PRESETS.iter().find(|(name, _)| Some(*name) == named) {
            let changes = changes.parse().expect("a test parses every preset");
            merge(&mut tree, changes, "", &mut faults);
        }
        merge(&mut tree, site, "", &mut faults);
        let raw = Value::Table(tree.clone()).try_into();
        let raw: Raw = raw.map_err(|error| ConfigError::Type(Box::new(error)))?;
        raw.check(tree, Checker { faults })
    }

    /// Keys of `newer` that differ from `self` and that a reload cannot take over.
    pub fn restart_needed_for(&self, newer: &Config) -> Vec<String> {
        let needs_restart = |changed: &String| {
            let is_in = |key: &str| changed == key || changed.starts_with(&format!("{key}."));
            NEEDS_RESTART.into_iter().any(is_in)
        };
        self.changed_to(newer).into_iter().filter(needs_restart).collect()
    }

    /// Keys of `newer` that differ from `self`.
    pub fn changed_to(&self, newer: &Config) -> Vec<String> {
        let mut changed = Vec::new();
        differences(&self.tree, &newer.tree, "", &mut changed);
        changed
    }

    /// These settings with everything from `newer` that a reload can change.
    pub fn with_reloadable_of(&self, newer: Config) -> Config {
        let mut tree = newer.tree;
        for key in NEEDS_RESTART {
            let (section, rest) = key.split_once('.').unwrap_or((key, ""));
            let old = self.tree.get(section).cloned();
            match (old, rest) {
                (Some(old), "") => drop(tree.insert(section.to_owned(), old)),
                (Some(Value::Table(mut old)), rest) => {
                    let slot = tree.get_mut(section).and_then(Value::as_table_mut);
                    if let (Some(slot), Some(value)) = (slot, old.remove(rest)) {
                        slot.insert(rest.to_owned(), value);
                    }
                }
                _ => {}
            }
        }
        // A preset, which needs a restart, also sets keys that do not: all or nothing.
        let mut scoring = Scoring { reach: self.scoring.reach, ..newer.scoring };
        if newer.preset != self.preset {
            let Scoring { filter_shared, community, .. } = scoring;
            scoring = Scoring { filter_shared, community, ..self.scoring };
            tree.extend(self.tree.get("scoring").map(|old| ("scoring".to_owned(), old.clone())));
        }
        Config {
            intake: newer.intake,
            cohorts: newer.cohorts,
            quality: newer.quality,
            window: WindowSettings {
                memory_bytes: self.window.memory_bytes,
                max_cohort_labels: self.window.max_cohort_labels,
                ..newer.window
            },
            scoring,
            results: newer.results,
            service: ServiceSettings { listen: self.service.listen, ..newer.service },
            tree,
            ..self.clone()
        }
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

/// Full names of the keys whose values differ.
fn differences(one: &Table, other: &Table, prefix: &str, found: &mut Vec<String>) {
    for (key, value) in one {
        let path = format!("{prefix}{key}");
        match (value, other.get(key)) {
            (Value::Table(one), Some(Value::Table(other))) => {
                differences(one, other, &format!("{path}."), found);
            }
            (value, other) if other != Some(value) => found.push(path),
            _ => {}
        }
    }
}

/// Lays `over` on `base`, which names every key that exists, and notes what does not fit.
fn merge(base: &mut Table, over: Table, prefix: &str, faults: &mut Vec<Fault>) {
    for (key, value) in over {
        let path = format!("{prefix}{key}");
        match (base.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(value)) => {
                merge(inner, value, &format!("{path}."), faults);
            }
            (Some(Value::Float(slot)), Value::Integer(number)) => *slot = number as f64,
            (Some(slot), value) if slot.same_type(&value) => *slot = value,
            (Some(slot), value) => faults.push(Fault {
                key: path,
                found: value.to_string(),
                needed: format!("a value of type {} is needed", slot.type_str()),
            }),
            (None, value) => faults.push(Fault {
                key: path,
                found: value.to_string(),
                needed: "there is no such key; see config/default.toml for all of them".into(),
            }),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    preset: String,
    cohort: Vec<Value>,
    directories: RawDirectories,
    intake: RawIntake,
    preprocess: preprocess::RawPreprocess,
    alignment: RawAlignment,
    volume: RawVolume,
    intensity: RawIntensity,
    encoder: RawEncoder,
    tokens: RawTokens,
    quality: RawQuality,
    window: RawWindow,
    scoring: RawScoring,
    community: RawCommunity,
    results: ResultSettings,
    service: RawService,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDirectories {
    incoming: PathBuf,
    results: PathBuf,
    quarantine: PathBuf,
    state: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAlignment {
    mode: String,
    template: PathBuf,
    brain: String,
    brain_weights: PathBuf,
    use_session_t1: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawIntake {
    settle_secs: f64,
    series_settle_secs: f64,
    rescan_secs: f64,
    ignore: Vec<String>,
    accept: Vec<String>,
    max_file_mib: i64,
    max_megavoxels: i64,
    read_at_once: i64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVolume {
    side: i64,
    field_of_view_mm: f64,
    min_brain_ml: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawIntensity {
    standardise: String,
    landmarks: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEncoder {
    weights: PathBuf,
    device: String,
    layers: Vec<i64>,
    final_norm: bool,
    position_resize: String,
    precision: String,
    batch_slices: i64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTokens {
    views: Vec<String>,
    join_views: bool,
    slices_per_token: i64,
    slice_stride: i64,
    skip_background: bool,
    projection: i64,
    projection_seed: i64,
    min_brain_fraction: f64,
    smoothing_patches: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawQuality {
    max_noise: f64,
    max_cut_fraction: f64,
    min_explained: f64,
    min_distinctness: f64,
    min_brain_agreement: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWindow {
    min_scans: i64,
    max_scans: i64,
    memory_mib: i64,
    max_cohort_labels: i64,
    compare_same_patient: bool,
    thick_slice_mm: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawScoring {
    reach_patches: i64,
    keep_fraction: f64,
    place_share: f64,
    false_positive_fraction: f64,
    clean_scan_fraction: f64,
    min_cluster_mm3: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCommunity {
    enabled: bool,
    reference_rank: f64,
    rare_quantile: f64,
    link_coverage: f64,
    max_pair_share: f64,
    level_pairs: bool,
    resolution_quantile: f64,
    min_resolution: f64,
    min_scans: i64,
    max_scan_share: f64,
    iqr_factor: f64,
    min_iqr: f64,
    exclusion_quantile: f64,
    max_excluded_share: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawService {
    listen: String,
    log: String,
    min_free_mib: i64,
}

impl Raw {
    fn check(self, tree: Table, mut check: Checker) -> Result<Config, ConfigError> {
        let config = Config {
            preset: check.word(
                "preset",
                &self.preset,
                "\"fast\", \"balanced\" or \"paper\"",
                Preset::Balanced,
            ),
            directories: check.directories(self.directories),
            intake: check.intake(self.intake),
            preprocess: check.preprocess(self.preprocess),
            volume: check.volume(&self.volume),
            alignment: check.alignment(self.alignment),
            intensity: check.intensity(self.intensity),
            encoder: check.encoder(self.encoder),
            projection: ProjectionSettings {
                channels: NonZeroUsize::new(check.whole(
                    "tokens.projection",
                    self.tokens.projection,
                    0,
                    4096,
                )),
                seed: self.tokens.projection_seed as u64,
            },
            tokens: check.tokens(&self.tokens),
            cohorts: check.cohorts(self.cohort),
            quality: check.quality(&self.quality),
            window: check.window(&self.window),
            scoring: check.scoring(&self.scoring, &self.community),
            results: self.results,
            service: check.service(self.service),
            tree,
        };
        if check.faults.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Faults { faults: check.faults })
        }
    }
}

/// Checks values against their ranges; notes a fault, beside those found before, and goes on with a
/// stand-in.
struct Checker {
    faults: Vec<Fault>,
}

impl Checker {
    fn fault(&mut self, key: &str, found: impl fmt::Display, needed: impl Into<String>) {
        self.faults.push(Fault {
            key: key.into(),
            found: found.to_string(),
            needed: needed.into(),
        });
    }

    fn has_fault(&self, key: &str) -> bool {
        self.faults.iter().any(|fault| fault.key == key)
    }

    fn whole(&mut self, key: &str, value: i64, low: i64, high: i64) -> usize {
        if !(low..=high).contains(&value) {
            self.fault(key, value, format!("a whole number from {low} to {high} is needed"));
        }
        value.clamp(low, high) as usize
    }

    fn positive(&mut self, key: &str, value: i64, high: i64) -> NonZeroUsize {
        NonZeroUsize::new(self.whole(key, value, 1, high)).unwrap_or(NonZeroUsize::MIN)
    }

    fn number(&mut self, key: &str, value: f64, low: f64, high: f64) -> f64 {
        if !(low..=high).contains(&value) {
            self.fault(key, value, format!("a number from {low} to {high} is needed"));
            return low;
        }
        value
    }

    fn fraction(&mut self, key: &str, value: f64) -> Fraction {
        Fraction::new(value).unwrap_or_else(|| {
            self.fault(key, value, "a share above 0 and at most 1 is needed");
            Fraction::new(1.0).expect("1 is in range")
        })
    }

    /// Beyond a quarter a mask would outline nothing.
    fn false_positives(&mut self, value: f64) -> Fraction {
        Fraction::new(value).filter(|share| share.get() <= 0.25).unwrap_or_else(|| {
            let key = "scoring.false_positive_fraction";
            self.fault(key, value, "a share above 0 and at most 0.25 is needed");
            Fraction::new(0.25).expect("it is in range")
        })
    }

    fn word<T: for<'de> Deserialize<'de>>(
        &mut self,
        key: &str,
        found: &str,
        needed: &str,
        stand_in: T,
    ) -> T {
        T::deserialize(Value::String(found.to_owned())).unwrap_or_else(|_| {
            self.fault(key, format!("{found:?}"), format!("{needed} is needed"));
            stand_in
        })
    }

    fn patterns(&mut self, key: &str, patterns: Vec<String>) -> Vec<String> {
        for pattern in &patterns {
            if let Err(error) = globset::Glob::new(pattern) {
                self.fault(
                    key,
                    format!("{pattern:?}"),
                    format!("a shell pattern is needed ({})", error.kind()),
                );
            }
        }
        patterns
    }

    fn directories(&mut self, raw: RawDirectories) -> Directories {
        let RawDirectories { incoming, results, quarantine, state } = raw;
        for (key, folder) in [
            ("directories.results", &results),
            ("directories.quarantine", &quarantine),
            ("directories.state", &state),
        ] {
            if folder.starts_with(&incoming) {
                self.fault(
                    key,
                    format!("{:?}", folder.display().to_string()),
                    "a folder outside directories.incoming is needed, or own files would be taken for scans",
                );
            }
        }
        for (key, folder) in [
            ("directories.incoming", &incoming),
            ("directories.results", &results),
            ("directories.quarantine", &quarantine),
            ("directories.state", &state),
        ] {
            if !folder.is_absolute() {
                self.fault(
                    key,
                    format!("{:?}", folder.display().to_string()),
                    "an absolute path is needed",
                );
            }
        }
        Directories { incoming, results, quarantine, state }
    }

    fn intake(&mut self, raw: RawIntake) -> Intake {
        let seconds = |value| Duration::from_secs_f64(value);
        let key = "intake.series_settle_secs";
        let mib = self.whole("intake.max_file_mib", raw.max_file_mib, 1, 65_536) as u64;
        let megavoxels = self.whole("intake.max_megavoxels", raw.max_megavoxels, 1, 2_000) as u64;
        Intake {
            series_settle: seconds(self.number(key, raw.series_settle_secs, 0.0, 86_400.0)),
            settle: seconds(self.number("intake.settle_secs", raw.settle_secs, 0.0, 86_400.0)),
            rescan: seconds(self.number("intake.rescan_secs", raw.rescan_secs, 0.1, 86_400.0)),
            ignore: self.patterns("intake.ignore", raw.ignore),
            accept: self.patterns("intake.accept", raw.accept),
            limits: Limits { max_file_bytes: mib << 20, max_voxels: 1_000_000 * megavoxels },
            read_at_once: self.whole("intake.read_at_once", raw.read_at_once, 0, 64),
        }
    }

    fn alignment(&mut self, raw: RawAlignment) -> AlignmentSettings {
        AlignmentSettings {
            mode: self.word(
                "alignment.mode",
                &raw.mode,
                "\"heads\", \"always\" or \"never\"",
                AlignmentChoice::Heads,
            ),
            template: (!raw.template.as_os_str().is_empty()).then_some(raw.template),
            brain: self.word(
                "alignment.brain",
                &raw.brain,
                "\"auto\", \"template\" or \"network\"",
                BrainChoice::Auto,
            ),
            brain_weights: (!raw.brain_weights.as_os_str().is_empty()).then_some(raw.brain_weights),
            uses_session_t1: raw.use_session_t1,
        }
    }

    fn volume(&mut self, raw: &RawVolume) -> CubeSettings {
        let key = "volume.field_of_view_mm";
        CubeSettings {
            side: self.whole("volume.side", raw.side, 28, 1024),
            field_of_view_mm: self.number(key, raw.field_of_view_mm, 10.0, 400.0),
            min_brain_ml: self.number("volume.min_brain_ml", raw.min_brain_ml, 0.0, 3000.0),
        }
    }

    fn intensity(&mut self, raw: RawIntensity) -> IntensitySettings {
        let standardise = self.word(
            "intensity.standardise",
            &raw.standardise,
            "\"none\" or \"nyul\"",
            Standardise::None,
        );
        if standardise == Standardise::Nyul && raw.landmarks.as_os_str().is_empty() {
            let needed = "a file is needed with intensity.standardise = \"nyul\"; `oddscan intensity \
                          learn` makes one";
            self.fault("intensity.landmarks", "\"\"", needed);
        }
        IntensitySettings { standardise, landmarks: raw.landmarks }
    }

    fn encoder(&mut self, raw: RawEncoder) -> Encoder {
        let mut layers: Vec<usize> =
            raw.layers.iter().map(|&layer| self.whole("encoder.layers", layer, 1, 64)).collect();
        layers.sort_unstable();
        layers.dedup();
        if layers.len() != raw.layers.len() {
            self.fault("encoder.layers", format!("{:?}", raw.layers), "each block once is needed");
        }
        let weights = (!raw.weights.as_os_str().is_empty()).then_some(raw.weights);
        Encoder {
            weights,
            device: self.word(
                "encoder.device",
                &raw.device,
                "\"auto\", \"cuda\" or \"cpu\"",
                DeviceChoice::Auto,
            ),
            layers,
            final_norm: raw.final_norm,
            position_resize: self.word(
                "encoder.position_resize",
                &raw.position_resize,
                "\"offset\" or \"size\"",
                PositionResize::Offset,
            ),
            precision: (raw.precision != "auto").then(|| {
                self.word(
                    "encoder.precision",
                    &raw.precision,
                    "\"auto\", \"f32\", \"bf16\" or \"f16\"",
                    Precision::F32,
                )
            }),
            batch_slices: self.whole("encoder.batch_slices", raw.batch_slices, 1, 4096),
        }
    }

    fn tokens(&mut self, raw: &RawTokens) -> TokenSettings {
        let mut views = Vec::new();
        for name in &raw.views {
            match Axis::VIEWS.into_iter().find(|axis| axis.name() == name) {
                Some(axis) if !views.contains(&axis) => views.push(axis),
                _ => self.fault(
                    "tokens.views",
                    format!("{name:?}"),
                    "\"axial\", \"coronal\" and \"sagittal\", each at most once, are needed",
                ),
            }
        }
        if views.is_empty() {
            self.fault("tokens.views", "[]", "at least one view is needed");
        }
        let slices_per_token = self.whole("tokens.slices_per_token", raw.slices_per_token, 0, 64);
        let slice_stride = self.whole("tokens.slice_stride", raw.slice_stride, 1, 64);
        if slices_per_token > 0 && slice_stride > slices_per_token {
            let needed = format!("at most tokens.slices_per_token ({slices_per_token}) is needed");
            self.fault("tokens.slice_stride", slice_stride, needed);
        }
        let key = "tokens.min_brain_fraction";
        TokenSettings {
            views,
            join_views: raw.join_views,
            slices_per_token,
            slice_stride,
            skip_background: raw.skip_background,
            min_brain_fraction: self.number(key, raw.min_brain_fraction, 0.0, 1.0),
            smoothing_patches: self.number(
                "tokens.smoothing_patches",
                raw.smoothing_patches,
                0.0,
                3.0,
            ),
        }
    }

    fn quality(&mut self, raw: &RawQuality) -> QualityLimits {
        let mut share =
            |key: &str, value, high| self.number(&format!("quality.{key}"), value, 0.0, high);
        QualityLimits {
            max_noise: share("max_noise", raw.max_noise, 10.0),
            max_cut_fraction: share("max_cut_fraction", raw.max_cut_fraction, 1.0),
            min_explained: share("min_explained", raw.min_explained, 1.0),
            min_distinctness: share("min_distinctness", raw.min_distinctness, 1.0),
            min_brain_agreement: share("min_brain_agreement", raw.min_brain_agreement, 1.0),
        }
    }

    fn window(&mut self, raw: &RawWindow) -> WindowSettings {
        let max_scans = self.positive("window.max_scans", raw.max_scans, 100_000);
        let min_scans = self.whole("window.min_scans", raw.min_scans, 2, 100_000);
        // In place of one with a fault of its own stands a number that nobody wrote.
        let are_meant =
            !["window.min_scans", "window.max_scans"].iter().any(|key| self.has_fault(key));
        if are_meant && min_scans > max_scans.get() {
            let needed = format!("at most window.max_scans ({max_scans}) is needed");
            self.fault("window.min_scans", min_scans, needed);
        }
        let labels = self.whole("window.max_cohort_labels", raw.max_cohort_labels, 1, 1000);
        let least = (MIN_MEMORY >> 20) as i64;
        let memory = self.whole("window.memory_mib", raw.memory_mib, least, 1 << 20) as u64;
        WindowSettings {
            min_scans,
            max_scans,
            memory_bytes: memory << 20,
            max_cohort_labels: labels,
            compare_same_patient: raw.compare_same_patient,
            thick_slice_mm: self.number("window.thick_slice_mm", raw.thick_slice_mm, 0.0, 100.0),
        }
    }

    fn scoring(&mut self, raw: &RawScoring, community: &RawCommunity) -> Scoring {
        let cells = self.whole("scoring.reach_patches", raw.reach_patches, 0, 64);
        let key = "scoring.min_cluster_mm3";
        Scoring {
            reach: NonZeroUsize::new(cells).map_or(SearchReach::WholeVolume, SearchReach::Patches),
            keep: self.fraction("scoring.keep_fraction", raw.keep_fraction),
            place_share: self.number("scoring.place_share", raw.place_share, 0.0, 1.0),
            false_positives: self.false_positives(raw.false_positive_fraction),
            clean_scans: self.fraction("scoring.clean_scan_fraction", raw.clean_scan_fraction),
            min_cluster_mm3: self.number(key, raw.min_cluster_mm3, 0.0, 1e6),
            filter_shared: community.enabled,
            community: self.community(community),
        }
    }

    fn community(&mut self, raw: &RawCommunity) -> CommunitySettings {
        let mut share = |key: &str, value| self.fraction(&format!("community.{key}"), value);
        CommunitySettings {
            reference_rank: share("reference_rank", raw.reference_rank),
            rare_quantile: share("rare_quantile", raw.rare_quantile),
            link_coverage: share("link_coverage", raw.link_coverage),
            max_pair_share: share("max_pair_share", raw.max_pair_share),
            level_pairs: raw.level_pairs,
            resolution_quantile: share("resolution_quantile", raw.resolution_quantile),
            max_scan_share: share("max_scan_share", raw.max_scan_share),
            exclusion_quantile: share("exclusion_quantile", raw.exclusion_quantile),
            max_excluded_share: share("max_excluded_share", raw.max_excluded_share),
            min_resolution: self.number("community.min_resolution", raw.min_resolution, 0.0, 1e6),
            min_scans: self.whole("community.min_scans", raw.min_scans, 2, 100_000),
            iqr_factor: self.number("community.iqr_factor", raw.iqr_factor, 0.0, 1e3),
            min_iqr: self.number("community.min_iqr", raw.min_iqr, 0.0, 1e6),
        }
    }

    fn service(&mut self, raw: RawService) -> ServiceSettings {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 9464));
        let listen = raw.listen.parse::<SocketAddr>().ok().filter(|a| a.ip().is_loopback());
        if listen.is_none() {
            let needed = "a loopback address with a port is needed, like \"127.0.0.1:9464\"";
            self.fault("service.listen", format!("{:?}", raw.listen), needed);
        }
        // A word that is no level would be taken for the name of a module, and silence all others.
        let says_level = |word: &str| {
            word.contains(['=', '[']) || word.parse::<tracing::level_filters::LevelFilter>().is_ok()
        };
        let says_levels = raw.log.split(',').map(str::trim).all(says_level);
        if !says_levels || tracing_subscriber::EnvFilter::try_new(&raw.log).is_err() {
            let needed = "error, warn, info, debug, trace or a tracing filter is needed";
            self.fault("service.log", format!("{:?}", raw.log), needed);
        }
        let free = self.whole("service.min_free_mib", raw.min_free_mib, 0, 1 << 40) as u64;
        ServiceSettings {
            listen: listen.unwrap_or(loopback),
            log: raw.log,
            min_free_bytes: free * 1_048_576,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_for_the_log_says_levels() {
        for good in ["info", "WARN", "off", "info,sled=warn", "oddscan=debug"] {
            assert!(Config::parse(&format!("service.log = \"{good}\"")).is_ok(), "{good}");
        }
        for bad in ["loud", "info,loud", "oddscan=loud"] {
            assert_eq!(faults(&format!("service.log = \"{bad}\"")).len(), 1, "{bad}");
        }
    }

    fn faults(site: &str) -> Vec<String> {
        match Config::parse(site) {
            Err(ConfigError::Faults { faults }) => faults.iter().map(ToString::to_string).collect(),
            other => panic!("faults expected, got {other:?}"),
        }
    }

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
        assert_eq!((paper.scoring.keep.get(), paper.scoring.place_share), (0.3, 0.0));
    }

    #[test]
    fn the_filter_is_off_and_its_constants_are_those_of_the_code() {
        let scoring = Config::parse("").unwrap().scoring;
        assert!(!scoring.filter_shared);
        assert_eq!(scoring.community, CommunitySettings::default());
    }

    #[test]
    fn the_example_of_a_site_is_valid() {
        let config = Config::parse(include_str!("../config/site.toml")).unwrap();
        assert_eq!(config.window.min_scans, 12);
    }

    #[test]
    fn limits_of_quality_are_checked_and_taken_over_on_reload() {
        let old = Config::parse("").unwrap();
        assert_eq!((old.quality.max_noise, old.quality.max_cut_fraction), (0.2, 0.1));
        let found = faults("[quality]\nmax_noise = -1.0\nmin_explained = 2");
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("quality.max_noise = -1: a number from 0 to 10"), "{found:?}");
        let new = Config::parse("quality.max_noise = 0.3").unwrap();
        assert!(old.restart_needed_for(&new).is_empty());
        assert_eq!(old.with_reloadable_of(new).quality.max_noise, 0.3);
    }

    #[test]
    fn what_finds_brains_needs_a_restart_and_what_keeps_scans_apart_does_not() {
        let old = Config::parse("").unwrap();
        assert_eq!((old.alignment.brain, old.window.thick_slice_mm), (BrainChoice::Auto, 4.0));
        let new = Config::parse(
            "[alignment]\nbrain = \"network\"\nbrain_weights = \"/w\"\nuse_session_t1 = true\n\
             [window]\nthick_slice_mm = 5\n[quality]\nmin_distinctness = 0.4\n\
             min_brain_agreement = 0.8",
        )
        .unwrap();
        assert_eq!(new.alignment.brain, BrainChoice::Network);
        assert_eq!(new.alignment.brain_weights.as_deref(), Some(Path::new("/w")));
        assert_eq!(
            old.restart_needed_for(&new),
            ["alignment.brain", "alignment.brain_weights", "alignment.use_session_t1"]
        );
        let reloaded = old.with_reloadable_of(new);
        assert_eq!(reloaded.alignment, old.alignment);
        assert_eq!(reloaded.window.thick_slice_mm, 5.0);
        let QualityLimits { min_distinctness, min_brain_agreement, .. } = reloaded.quality;
        assert_eq!((min_distinctness, min_brain_agreement), (0.4, 0.8));

        let found = faults("[alignment]\nbrain = \"bet\"\n[window]\nthick_slice_mm = -1\n");
        assert!(found[0].contains("\"auto\", \"template\" or \"network\""), "{found:?}");
        assert!(found[1].starts_with("window.thick_slice_mm = -1: "), "{found:?}");
        let found = faults("[[cohort]]\nname = \"flair-thick\"\nsuffix = \"FLAIR\"");
        assert!(found[0].contains("a name of its own is needed"), "{found:?}");
    }

    #[test]
    fn files_beside_the_results_are_off_and_taken_over_on_reload() {
        let old = Config::parse("").unwrap();
        assert_eq!(old.results, ResultSettings { brain_mask: false, alignment: false });
        let new = Config::parse("[results]\nbrain_mask = true\nalignment = true").unwrap();
        assert!(old.restart_needed_for(&new).is_empty());
        let merged = old.with_reloadable_of(new);
        assert_eq!(merged.results, ResultSettings { brain_mask: true, alignment: true });
        let found = faults("[results]\nbrain_mask = 1\nmap = true");
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("results.brain_mask = 1: a value of type boolean"));
    }

    #[test]
    fn the_memory_of_the_windows_is_checked_and_needs_a_restart() {
        let old = Config::parse("").unwrap();
        assert_eq!(old.window.memory_bytes, 256 << 20);
        let found = faults("window.memory_mib = 64");
        assert_eq!(found, ["window.memory_mib = 64: a whole number from 128 to 1048576 is needed"]);
        let new = Config::parse("window.memory_mib = 512").unwrap();
        assert_eq!(old.restart_needed_for(&new), ["window.memory_mib"]);
        let merged = old.with_reloadable_of(new);
        assert_eq!(merged.window, old.window);
        assert_eq!(merged.tree["window"], old.tree["window"]);
    }

    #[test]
    fn the_number_format_is_left_to_the_device_unless_a_site_names_one() {
        assert_eq!(Config::parse("").unwrap().encoder.precision, None);
        let named = |word: &str| format!("[encoder]\nprecision = \"{word}\"");
        let config = Config::parse(&named("f32")).unwrap();
        assert_eq!(config.encoder.precision, Some(Precision::F32));
        let faults = faults(&named("f8"));
        assert!(
            faults[0].contains("encoder.precision") && faults[0].contains("auto"),
            "{faults:?}"
        );
    }

    #[test]
    fn standardisation_is_off_and_needs_a_file_and_a_restart() {
        let old = Config::parse("").unwrap();
        assert_eq!(old.intensity.standardise, Standardise::None);
        let found = faults("intensity.standardise = \"nyul\"");
        assert!(found[0].starts_with("intensity.landmarks = \"\": a file is needed"), "{found:?}");
        let found = faults("intensity.standardise = \"nyúl\"");
        assert!(found[0].ends_with("\"none\" or \"nyul\" is needed"), "{found:?}");
        let site = "intensity.standardise = \"nyul\"\nintensity.landmarks = \"/l.json\"";
        let new = Config::parse(site).unwrap();
        assert_eq!(new.intensity.landmarks, Path::new("/l.json"));
        let needed = old.restart_needed_for(&new);
        assert_eq!(needed, ["intensity.landmarks", "intensity.standardise"]);
        assert_eq!(old.with_reloadable_of(new).intensity, old.intensity);
    }

    #[test]
    fn a_site_key_wins_over_the_preset() {
        let config = Config::parse("preset = \"paper\"\n[scoring]\nreach_patches = 2").unwrap();
        assert_eq!(config.scoring.reach, SearchReach::Patches(NonZeroUsize::new(2).unwrap()));
    }

    #[test]
    fn all_faults_are_listed_at_once_with_key_value_and_need() {
        let found = faults("tokens.slice_stride = 8");
        assert_eq!(
            found,
            ["tokens.slice_stride = 8: at most tokens.slices_per_token (7) is needed"]
        );
        let found = faults(
            "[scoring]\nkeep_fraction = 0.0\n[window]\nmin_scans = 500\nmax_scans = 100\n\
             [service]\nlisten = \"0.0.0.0:9464\"\n[tokens]\nviews = [\"axial\", \"oblique\"]",
        );
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(found.iter().any(|f| f.starts_with("scoring.keep_fraction = 0: a share above 0")));
        assert!(found.iter().any(|f| f.contains("at most window.max_scans (100)")));
        assert!(found.iter().any(|f| f.contains("\"0.0.0.0:9464\": a loopback address")));
        assert!(found.iter().any(|f| f.contains("\"oblique\"")));
    }

    #[test]
    fn a_series_settles_for_a_minute_or_as_long_as_a_site_says_and_reloads() {
        let old = Config::parse("").unwrap();
        assert_eq!(old.intake.series_settle, Duration::from_secs(60));
        let new = Config::parse("intake.series_settle_secs = 5").unwrap();
        assert!(old.restart_needed_for(&new).is_empty());
        assert_eq!(old.with_reloadable_of(new).intake.series_settle, Duration::from_secs(5));
        let found = faults("intake.series_settle_secs = -1.0");
        assert_eq!(found, ["intake.series_settle_secs = -1: a number from 0 to 86400 is needed"]);
    }

    #[test]
    fn unknown_keys_and_wrong_types_are_named_with_their_path() {
        let found =
            faults("[scoring]\nkepp_fraction = 0.3\n[window]\nmin_scans = \"8\"\n[extra]\n");
        assert_eq!(found.len(), 3, "{found:?}");
        let named = |start: &str| found.iter().any(|fault| fault.starts_with(start));
        assert!(named("scoring.kepp_fraction = 0.3: there is no such key"), "{found:?}");
        assert!(named("window.min_scans = \"8\": a value of type integer"), "{found:?}");
        let found = faults("[window]\nmin_scans = \"4\"\nmax_scans = 5\n");
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn results_inside_the_incoming_folder_are_refused() {
        let found = faults("[directories]\nincoming = \"/data\"\nresults = \"/data/results\"");
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("outside directories.incoming"), "{found:?}");
    }

    #[test]
    fn a_reload_names_the_keys_that_need_a_restart() {
        let old = Config::parse("").unwrap();
        let new = Config::parse("[volume]\nside = 252\n[scoring]\nkeep_fraction = 0.2").unwrap();
        assert_eq!(old.restart_needed_for(&new), ["volume.side"]);
        let merged = old.with_reloadable_of(new);
        assert_eq!((merged.volume.side, merged.scoring.keep.get()), (224, 0.2));
        assert_eq!(merged.tree["volume"]["side"].as_integer(), Some(224));
        assert_eq!(merged.tree["scoring"]["keep_fraction"].as_float(), Some(0.2));

        // A preset waits for the restart as a whole.
        let paper = Config::parse("preset = \"paper\"").unwrap();
        assert!(old.restart_needed_for(&paper).contains(&"preset".to_owned()));
        let merged = old.with_reloadable_of(paper);
        assert_eq!(merged.scoring, old.scoring);
        assert_eq!(merged.tree["scoring"], old.tree["scoring"]);
    }
}
