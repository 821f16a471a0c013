//! Every Prometheus metric, with one function per event.
//!
//! The names are in `families.rs`, the values of their labels in `label.rs`. `docs/operations.md`
//! has a table of both, and a test compares it with them.
//!
//! Invariants: no label can name a scan, patient, file or user. Every label has a fixed set of
//! values or, like `cohort`, a cap. A counter whose labels are known starts at 0, because
//! `increase()` does not see the first step of a series that appears with it. Times are arguments.

mod families;
mod label;

use std::{sync::Arc, time::Duration};

use prometheus::{GaugeVec, TextEncoder};

pub use self::label::{
    DirectoryKind, EvictionReason, Fallback, IngestResult, MemoryState, OutputKind, RescanTrigger,
    ScoreResult, SeenBy, Stage, Trigger, Verdict,
};
use self::{
    families::{Families, set_info},
    label::{INTERNAL, OTHER_COHORTS},
};
use crate::domain::{
    DeviceMemory,
    damage::Damage,
    error::{QuarantineReason, ScanError},
    left_alone::LeftAlone,
    not_ready::NotReady,
    repair::Repair,
};

/// Content type of [`Metrics::render`], for the HTTP answer.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Number of cohorts that get their own label, unless [`Metrics::with_max_cohorts`] sets another.
pub const MAX_COHORTS: usize = 32;

/// All metrics of one daemon. Clones share the same numbers.
#[derive(Clone)]
pub struct Metrics(Arc<Families>);

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Registers all metrics in a new registry, with [`MAX_COHORTS`].
    pub fn new() -> Self {
        Self::with_max_cohorts(MAX_COHORTS)
    }

    /// As [`Metrics::new`], but only the first `max_cohorts` cohorts get their own label. All later
    /// ones share the label `other`.
    pub fn with_max_cohorts(max_cohorts: usize) -> Self {
        let families = Families::register(max_cohorts);
        families.start_at_zero();
        Self(Arc::new(families))
    }

    /// The page that Prometheus reads: text format 0.0.4, type [`CONTENT_TYPE`].
    pub fn render(&self) -> String {
        TextEncoder::new()
            .encode_to_string(&self.0.registry.gather())
            .expect("gather leaves out families without a series, the only fault the encoder knows")
    }
}

/// The daemon as a whole.
impl Metrics {
    /// Reports the running build, once at the start. `revision` is the commit, `backend` the device
    /// it was built for, `store_format` the number of the format that it writes.
    pub fn build_info(&self, version: &str, revision: &str, backend: &str, store_format: &str) {
        set_info(&self.0.build_info, &[version, revision, backend, store_format]);
    }

    /// Reports the model in use, with the first hex digits of the hashes of its weights and of the
    /// configuration. It replaces an earlier report.
    pub fn model_info(&self, model: &str, weights_sha256_prefix: &str, config_sha256_prefix: &str) {
        set_info(&self.0.model_info, &[model, weights_sha256_prefix, config_sha256_prefix]);
    }

    /// Whether the daemon accepts and processes scans, as `/readyz` answers.
    pub fn ready(&self, is_ready: bool) {
        self.0.ready.set(is_ready.into());
    }

    /// Whether the daemon is not ready for this reason, as `/readyz` says.
    pub fn not_ready(&self, reason: NotReady, holds: bool) {
        self.0.not_ready.with_label_values(&[reason.name()]).set(holds.into());
    }

    /// A configuration was applied at `now_secs` (seconds since 1970), or refused.
    ///
    /// Also called at the start. Until then the configuration counts as applied, because no daemon
    /// starts without a valid one.
    pub fn reload(&self, is_applied: bool, now_secs: u64) {
        self.0.reload_successful.set(is_applied.into());
        if is_applied {
            self.0.reload_success_time.set(now_secs as f64);
        }
    }

    /// The daemon told the service manager that it still works.
    pub fn watchdog_notified(&self) {
        self.0.watchdog_notifications.inc();
    }
}

/// Intake.
impl Metrics {
    /// A file was noticed for the first time.
    pub fn file_seen(&self, by: SeenBy) {
        self.0.files_seen.with_label_values(&[by.name()]).inc();
    }

    /// Intake decided about a file: a scan, a DICOM file or a zip.
    pub fn file_decided(&self, result: IngestResult) {
        self.0.files.with_label_values(&[result.name()]).inc();
    }

    /// Intake decided about a volume.
    pub fn volume_ingested(&self, result: IngestResult) {
        self.0.volumes.with_label_values(&[result.name()]).inc();
    }

    /// A file of this size was accepted.
    pub fn bytes_ingested(&self, n_bytes: u64) {
        self.0.ingest_bytes.inc_by(n_bytes);
    }

    /// A file is complete. `waited` is the time since it was first seen.
    pub fn settled(&self, waited: Duration) {
        self.0.settle_duration.observe(waited.as_secs_f64());
    }

    /// A listing of the incoming folder ended at `now_secs` (seconds since 1970).
    pub fn listed(&self, now_secs: u64) {
        self.0.last_scan_time.set(now_secs as f64);
    }

    /// This started a listing. Listings after a file event or for a file that settles do not count.
    pub fn rescan(&self, trigger: RescanTrigger) {
        self.0.rescans.with_label_values(&[trigger.name()]).inc();
    }

    /// A file was moved to quarantine, at intake or later.
    pub fn quarantined(&self, reason: QuarantineReason) {
        self.0.quarantined.with_label_values(&[reason.name()]).inc();
    }

    /// Number of files in the incoming folder that are left alone for this reason.
    pub fn left_alone(&self, reason: LeftAlone, n_files: usize) {
        self.0.left_alone.with_label_values(&[reason.name()]).set(n_files as f64);
    }

    /// A refused file had changed in quarantine and was put back.
    pub fn taken_back(&self) {
        self.0.taken_back.inc();
    }

    /// Number of files now in quarantine.
    pub fn quarantine_files(&self, n_files: usize) {
        self.0.quarantine_files.set(n_files as f64);
    }
}

/// Stages and queues.
impl Metrics {
    /// Number of scans that wait in a stage or are processed by it. The oldest arrived at
    /// `oldest_secs` (seconds since 1970); `None` if the stage is empty.
    pub fn queue(&self, stage: Stage, n_scans: usize, oldest_secs: Option<u64>) {
        let stage = [stage.name()];
        self.0.queue_studies.with_label_values(&stage).set(n_scans as f64);
        self.0.queue_oldest_time.with_label_values(&stage).set(oldest_secs.unwrap_or(0) as f64);
    }

    /// A scan passed a stage in this time.
    pub fn stage_finished(&self, stage: Stage, took: Duration) {
        self.0.stage_duration.with_label_values(&[stage.name()]).observe(took.as_secs_f64());
    }

    /// An attempt to process a scan failed in a stage.
    pub fn stage_failed(&self, stage: Stage, error: &ScanError) {
        self.0.stage_errors.with_label_values(&[stage.name(), error.class()]).inc();
    }

    /// A stage panicked. This counts as class `internal`.
    pub fn stage_panicked(&self, stage: Stage) {
        self.0.stage_errors.with_label_values(&[stage.name(), INTERNAL]).inc();
    }

    /// A failed attempt is started again.
    pub fn stage_retried(&self, stage: Stage) {
        self.0.stage_retries.with_label_values(&[stage.name()]).inc();
    }

    /// A scan's results are written. `took` is the time since its file was first seen.
    pub fn end_to_end(&self, took: Duration) {
        self.0.end_to_end.observe(took.as_secs_f64());
    }
}

/// The encoder's device.
impl Metrics {
    /// Number of slices per forward pass from now on. The first call, at the start, also sets the
    /// counters of the device to 0.
    pub fn encode_batch(&self, device: &str, n_slices: usize) {
        self.0.batch_slices.with_label_values(&[device]).set(n_slices as f64);
        self.0.slices.with_label_values(&[device]);
        self.0.device_busy.with_label_values(&[device]);
    }

    /// This number of slices went through the encoder.
    pub fn slices_encoded(&self, device: &str, n_slices: u64) {
        self.0.slices.with_label_values(&[device]).inc_by(n_slices);
    }

    /// The device worked for this time, or the daemon waited for it.
    pub fn device_busy(&self, device: &str, busy: Duration) {
        self.0.device_busy.with_label_values(&[device]).inc_by(busy.as_secs_f64());
    }

    /// Memory of a device. It is `None` for a device without its own memory.
    pub fn device_memory(&self, device: &str, memory: Option<DeviceMemory>) {
        let Some(DeviceMemory { used, total }) = memory else { return };
        for (state, bytes) in [(MemoryState::Used, used), (MemoryState::Total, total)] {
            self.0.device_memory.with_label_values(&[device, state.name()]).set(bytes as f64);
        }
    }

    /// The encoder continued with a smaller batch or on the CPU after a failure.
    pub fn encode_fallback(&self, to: Fallback) {
        self.0.fallbacks.with_label_values(&[to.name()]).inc();
    }
}

/// Cohorts. Beyond the cap, counters add up under `other`. Gauges are not set there, because gauges
/// of several cohorts have no common value.
impl Metrics {
    /// State of a cohort's window. The three counts are reference scans (one per patient), guests,
    /// and further reference scans of the same patients. `n_min` is the number of patients that
    /// scoring needs, `capacity` the number of members that the window can hold. The oldest member
    /// arrived at `oldest_secs` (seconds since 1970; `None` when the window is empty).
    pub fn window(
        &self,
        cohort: &str,
        [n_active, n_set_aside, n_same_patient]: [usize; 3],
        n_min: usize,
        capacity: usize,
        oldest_secs: Option<u64>,
    ) {
        let Some(cohort) = self.0.own_label(cohort) else { return };

        for (state, n) in
            [("active", n_active), ("set_aside", n_set_aside), ("same_patient", n_same_patient)]
        {
            self.0.window_studies.with_label_values(&[cohort, state]).set(n as f64);
        }

        self.0.window_min.with_label_values(&[cohort]).set(n_min as f64);
        self.0.window_capacity.with_label_values(&[cohort]).set(capacity as f64);
        let oldest = oldest_secs.unwrap_or(0) as f64;
        self.0.window_oldest_time.with_label_values(&[cohort]).set(oldest);
    }

    /// How much the members of a window differ as a whole, and how far the newest is from the
    /// others. Both are `None` before the window is scored; then nothing changes.
    pub fn window_likeness(&self, cohort: &str, heterogeneity: Option<f64>, drift: Option<f64>) {
        let Some(cohort) = self.0.own_label(cohort) else { return };
        let set = |family: &GaugeVec, ratio: Option<f64>| {
            if let Some(ratio) = ratio {
                family.with_label_values(&[cohort]).set(ratio);
            }
        };
        set(&self.0.window_heterogeneity, heterogeneity);
        set(&self.0.window_drift, drift);
    }

    /// Share of a window's members that have an anomaly in common with others, in [0, 1].
    pub fn window_contamination(&self, cohort: &str, share: f64) {
        let Some(cohort) = self.0.own_label(cohort) else { return };
        self.0.window_contamination.with_label_values(&[cohort]).set(share);
    }

    /// Number of a window's members that only their tokens show to be of one person with others.
    pub fn window_hidden_follow_ups(&self, cohort: &str, n_scans: usize) {
        let Some(cohort) = self.0.own_label(cohort) else { return };
        self.0.window_hidden_follow_ups.with_label_values(&[cohort]).set(n_scans as f64);
    }

    /// Number of members of a window that are encoded again, because the store lacks their tokens.
    pub fn window_rebuilding(&self, cohort: &str, n_scans: usize) {
        let Some(cohort) = self.0.own_label(cohort) else { return };
        self.0.window_rebuilding.with_label_values(&[cohort]).set(n_scans as f64);
    }

    /// Things in the state folder were found damaged or gone.
    pub fn found_damaged(&self, damage: Damage, n_things: usize) {
        self.0.damaged.with_label_values(&[damage.name()]).inc_by(n_things as u64);
    }

    /// A scoring run of a cohort ended at `now_secs` (seconds since 1970).
    pub fn score_run(&self, cohort: &str, result: ScoreResult, trigger: Trigger, now_secs: u64) {
        let own = self.0.own_label(cohort);
        let labels = [own.unwrap_or(OTHER_COHORTS), result.name(), trigger.name()];
        self.0.score_runs.with_label_values(&labels).inc();
        if let (Some(cohort), ScoreResult::Ok) = (own, result) {
            self.0.score_success_time.with_label_values(&[cohort]).set(now_secs as f64);
        }
    }

    /// The distances of this number of pairs of scans were computed. Stored pairs do not count.
    pub fn pairs_computed(&self, cohort: &str, n_pairs: u64) {
        let label = self.0.own_label(cohort).unwrap_or(OTHER_COHORTS);
        self.0.score_pairs.with_label_values(&[label]).inc_by(n_pairs);
    }

    /// Rank of a scan within its window, in [0, 1].
    pub fn scan_percentile(&self, cohort: &str, percentile: f64) {
        let label = self.0.own_label(cohort).unwrap_or(OTHER_COHORTS);
        self.0.percentile.with_label_values(&[label]).observe(percentile);
    }
}

/// Verdicts on scans.
impl Metrics {
    /// A result was written that says whether anything stands out.
    pub fn verdict(&self, cohort: &str, verdict: Verdict) {
        let label = self.0.own_label(cohort).unwrap_or(OTHER_COHORTS);
        self.0.verdicts.with_label_values(&[label, verdict.name()]).inc();
    }
}

/// Results and disk space.
impl Metrics {
    /// A result file was written, or writing it failed.
    pub fn output_written(&self, kind: OutputKind, is_ok: bool) {
        let result = if is_ok { "ok" } else { "failed" };
        self.0.outputs.with_label_values(&[kind.name(), result]).inc();
    }

    /// Size of the token store: bytes on disk, and bytes of scans that are in a window.
    pub fn store_size(&self, on_disk_bytes: u64, live_bytes: u64) {
        self.0.store_size.set(on_disk_bytes as f64);
        self.0.store_live.set(live_bytes as f64);
    }

    /// The start has repaired the store.
    pub fn store_repaired(&self, repair: Repair) {
        self.0.store_repairs.with_label_values(&[repair.name()]).inc();
    }

    /// The store was copied into a smaller one.
    pub fn store_compacted(&self) {
        self.0.store_compactions.inc();
    }

    /// The tokens of one scan were removed.
    pub fn evicted(&self, reason: EvictionReason) {
        self.0.evictions.with_label_values(&[reason.name()]).inc();
    }

    /// Bytes that the daemon may still write on the folder's file system. While the figure is
    /// unknown, the series is absent: 0 would mean a full disk, and the last figure might hide one.
    pub fn filesystem_avail(&self, directory: DirectoryKind, n_bytes: Option<u64>) {
        let (family, label) = (&self.0.filesystem_avail, [directory.name()]);
        match n_bytes {
            Some(n_bytes) => family.with_label_values(&label).set(n_bytes as f64),
            // An error only means that the series did not exist.
            None => drop(family.remove_label_values(&label)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::{label::ERROR_CLASSES, *};
    use crate::domain::error::{DeviceError, Refusal};

    /// The value of one series on the page.
    fn value(metrics: &Metrics, series: &str) -> Option<f64> {
        let page = metrics.render();
        let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
        Some(line.parse().expect("a value is a number"))
    }

    #[test]
    fn every_known_label_stands_at_zero_from_the_start() {
        let metrics = Metrics::new();
        for reason in QuarantineReason::ALL {
            let series = format!("oddscan_quarantined_total{{reason=\"{}\"}}", reason.name());
            assert_eq!(value(&metrics, &series), Some(0.0), "{series}");
        }
        for reason in NotReady::ALL {
            let series = format!("oddscan_not_ready{{reason=\"{}\"}}", reason.name());
            assert_eq!(value(&metrics, &series), Some(0.0), "{series}");
        }
        for reason in LeftAlone::ALL {
            let series = format!("oddscan_left_alone_files{{reason=\"{}\"}}", reason.name());
            assert_eq!(value(&metrics, &series), Some(0.0), "{series}");
        }
        for stage in Stage::ALL {
            for class in ERROR_CLASSES {
                let stage = stage.name();
                let series =
                    format!("oddscan_stage_errors_total{{class=\"{class}\",stage=\"{stage}\"}}");
                assert_eq!(value(&metrics, &series), Some(0.0), "{series}");
            }
        }
        assert_eq!(value(&metrics, "oddscan_config_last_reload_successful"), Some(1.0));
        assert_eq!(value(&metrics, "oddscan_filesystem_avail_bytes{directory=\"state\"}"), None);
    }

    #[test]
    fn every_class_of_an_error_is_a_known_label() {
        let source = io::Error::other("x");
        let device = "cuda:0".to_owned();
        let errors: [ScanError; 5] = [
            Refusal::new(QuarantineReason::Io, "a", "b", "c").into(),
            ScanError::Io { doing: "reading", source },
            DeviceError::OutOfMemory { batch: 1 }.into(),
            DeviceError::Failed { device, message: "x".to_owned() }.into(),
            ScanError::Store("x".into()),
        ];
        for error in errors {
            assert!(ERROR_CLASSES.contains(&error.class()), "{}", error.class());
        }
    }

    #[test]
    fn a_counter_of_a_cohort_starts_at_zero_when_the_cohort_is_met() {
        let metrics = Metrics::new();
        metrics.window("flair", [3, 1, 0], 8, 40, Some(17));
        let runs = "oddscan_score_runs_total{cohort=\"flair\",result=\"ok\",trigger=\"new_study\"}";
        let success = "oddscan_score_last_success_timestamp_seconds{cohort=\"flair\"}";
        assert_eq!((value(&metrics, runs), value(&metrics, success)), (Some(0.0), Some(0.0)));

        metrics.score_run("flair", ScoreResult::SkippedTooFew, Trigger::NewScan, 1_700_000_000);
        assert_eq!((value(&metrics, runs), value(&metrics, success)), (Some(0.0), Some(0.0)));

        metrics.score_run("flair", ScoreResult::Ok, Trigger::NewScan, 1_700_000_000);
        assert_eq!((value(&metrics, runs), value(&metrics, success)), (Some(1.0), Some(1.7e9)));
    }

    #[test]
    fn cohorts_beyond_the_cap_are_counted_together_and_have_no_gauges() {
        let metrics = Metrics::with_max_cohorts(2);
        for cohort in ["a", "b", "c", "d"] {
            metrics.window(cohort, [1, 0, 0], 2, 3, None);
            metrics.pairs_computed(cohort, 5);
        }
        let pairs = |c| value(&metrics, &format!("oddscan_score_pairs_total{{cohort=\"{c}\"}}"));
        assert_eq!(["a", "b", "c", "other"].map(pairs), [Some(5.), Some(5.), None, Some(10.)]);
        let min = |c| value(&metrics, &format!("oddscan_window_min_studies{{cohort=\"{c}\"}}"));
        assert_eq!(["b", "c", "other"].map(min), [Some(2.0), None, None]);
    }

    #[test]
    fn an_info_metric_has_one_series_whatever_is_loaded_later() {
        let metrics = Metrics::new();
        metrics.model_info("dinov2_vits14", "0123", "aaaa");
        metrics.model_info("dinov2_vits14", "0123", "bbbb");
        let page = metrics.render();
        let series = page.lines().filter(|line| line.starts_with("oddscan_model_info{"));
        assert_eq!(series.count(), 1);
        assert!(page.contains("config_sha256_prefix=\"bbbb\""));
    }

    #[test]
    fn an_empty_queue_has_no_oldest_scan() {
        let metrics = Metrics::new();
        let oldest = "oddscan_queue_oldest_study_timestamp_seconds{stage=\"encode\"}";
        metrics.queue(Stage::Encode, 2, Some(1_700_000_000));
        assert_eq!(value(&metrics, oldest), Some(1.7e9));
        metrics.queue(Stage::Encode, 0, None);
        assert_eq!(value(&metrics, oldest), Some(0.0));
    }

    #[test]
    fn a_clone_counts_into_the_same_page() {
        let metrics = Metrics::new();
        metrics.clone().bytes_ingested(7);
        assert_eq!(value(&metrics, "oddscan_ingest_bytes_total"), Some(7.0));
    }

    #[test]
    fn a_refused_reload_keeps_the_time_of_the_last_applied_one() {
        let metrics = Metrics::new();
        metrics.reload(true, 100);
        metrics.reload(false, 200);
        assert_eq!(value(&metrics, "oddscan_config_last_reload_successful"), Some(0.0));
        let time = "oddscan_config_last_reload_success_timestamp_seconds";
        assert_eq!(value(&metrics, time), Some(100.0));
    }
}
