//! Every name, help text, bucket and label name, and which series exist at 0 from the start.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use prometheus::{
    CounterVec, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    Opts, Registry, core::Collector, process_collector::ProcessCollector,
};

use super::label::{
    ERROR_CLASSES, EvictionReason, Fallback, IngestResult, OTHER_COHORTS, OutputKind,
    RescanTrigger, ScoreResult, SeenBy, Stage, Trigger, Verdict,
};
use crate::domain::{
    damage::Damage, error::QuarantineReason, left_alone::LeftAlone, not_ready::NotReady,
    repair::Repair,
};

const SETTLE_BUCKETS: &[f64] = &[1., 2., 5., 10., 30., 60., 120., 300., 600., 1800.];
const STAGE_BUCKETS: &[f64] = &[0.1, 0.25, 0.5, 1., 2.5, 5., 10., 30., 60., 120., 300., 900.];
const END_TO_END_BUCKETS: &[f64] = &[10., 30., 60., 120., 300., 600., 1800., 3600., 7200., 21600.];
const PERCENTILE_BUCKETS: &[f64] = &[0.5, 0.75, 0.9, 0.95, 0.99, 0.999];

/// All metric families of one daemon, registered with Prometheus.
pub(super) struct Families {
    pub(super) registry: Registry,
    max_cohorts: usize,
    /// Cohorts that have labels of their own.
    cohorts: Mutex<BTreeSet<String>>,

    pub(super) build_info: GaugeVec,
    pub(super) model_info: GaugeVec,
    pub(super) ready: Gauge,
    pub(super) not_ready: GaugeVec,
    pub(super) reload_successful: Gauge,
    pub(super) reload_success_time: Gauge,
    pub(super) watchdog_notifications: IntCounter,

    pub(super) files_seen: IntCounterVec,
    pub(super) ingest_bytes: IntCounter,
    pub(super) volumes: IntCounterVec,
    pub(super) files: IntCounterVec,
    pub(super) settle_duration: Histogram,
    pub(super) rescans: IntCounterVec,
    pub(super) last_scan_time: Gauge,
    pub(super) quarantined: IntCounterVec,
    pub(super) quarantine_files: Gauge,
    pub(super) taken_back: IntCounter,
    pub(super) left_alone: GaugeVec,

    pub(super) queue_studies: GaugeVec,
    pub(super) queue_oldest_time: GaugeVec,
    pub(super) stage_duration: HistogramVec,
    pub(super) stage_errors: IntCounterVec,
    pub(super) stage_retries: IntCounterVec,

    pub(super) slices: IntCounterVec,
    pub(super) batch_slices: GaugeVec,
    pub(super) fallbacks: IntCounterVec,
    pub(super) device_busy: CounterVec,
    pub(super) device_memory: GaugeVec,

    pub(super) window_studies: GaugeVec,
    pub(super) window_min: GaugeVec,
    pub(super) window_capacity: GaugeVec,
    pub(super) window_oldest_time: GaugeVec,
    pub(super) window_heterogeneity: GaugeVec,
    pub(super) window_drift: GaugeVec,
    pub(super) window_contamination: GaugeVec,
    pub(super) window_hidden_follow_ups: GaugeVec,
    pub(super) window_rebuilding: GaugeVec,
    pub(super) score_runs: IntCounterVec,
    pub(super) score_success_time: GaugeVec,
    pub(super) score_pairs: IntCounterVec,
    pub(super) percentile: HistogramVec,
    pub(super) verdicts: IntCounterVec,

    pub(super) end_to_end: Histogram,
    pub(super) outputs: IntCounterVec,
    pub(super) store_size: Gauge,
    pub(super) store_live: Gauge,
    pub(super) damaged: IntCounterVec,
    pub(super) store_repairs: IntCounterVec,
    pub(super) store_compactions: IntCounter,
    pub(super) evictions: IntCounterVec,
    pub(super) filesystem_avail: GaugeVec,
}

impl Families {
    /// Every name, help text and label, in the order of the struct.
    pub(super) fn register(max_cohorts: usize) -> Self {
        let r = Registrar::new();
        Self {
            max_cohorts,
            cohorts: Mutex::default(),

            build_info: r.gauges(
                "build_info",
                "Build of the running daemon; value is always 1.",
                &["version", "revision", "backend", "store_format"],
            ),
            model_info: r.gauges(
                "model_info",
                "Frozen encoder in use; value is always 1.",
                &["model", "weights_sha256_prefix", "config_sha256_prefix"],
            ),
            ready: r.gauge("ready", "Whether the daemon accepts and processes scans (1 = yes)."),
            not_ready: r.gauges(
                "not_ready",
                "Whether the daemon is not ready for this reason (1 = it holds).",
                &["reason"],
            ),
            reload_successful: r.gauge(
                "config_last_reload_successful",
                "Whether the last configuration reload was applied (1) or refused (0).",
            ),
            reload_success_time: r.gauge(
                "config_last_reload_success_timestamp_seconds",
                "Unix time of the last applied configuration.",
            ),
            watchdog_notifications: r
                .counter("watchdog_notifications_total", "Watchdog notifications sent to systemd."),

            files_seen: r.counters(
                "ingest_files_seen_total",
                "Files first seen in the incoming folder, by how they were noticed.",
                &["source"],
            ),
            ingest_bytes: r.counter("ingest_bytes_total", "Bytes of accepted input."),
            volumes: r.counters(
                "ingest_volumes_total",
                "Volumes that intake has decided on, by outcome.",
                &["result"],
            ),
            files: r.counters(
                "ingest_files_total",
                "Files that intake has decided on, by outcome: scans, DICOM files and zips.",
                &["result"],
            ),
            settle_duration: r.histogram(
                "ingest_settle_duration_seconds",
                "Time from the first sight of a file until it counted as complete.",
                SETTLE_BUCKETS,
            ),
            rescans: r.counters(
                "watch_rescans_total",
                "Listings of the whole incoming folder, by what started them.",
                &["trigger"],
            ),
            last_scan_time: r.gauge(
                "watch_last_scan_timestamp_seconds",
                "Unix time of the last complete listing of the incoming folder.",
            ),
            quarantined: r.counters(
                "quarantined_total",
                "Files moved to quarantine, by reason.",
                &["reason"],
            ),
            quarantine_files: r.gauge("quarantine_files", "Files now in quarantine."),
            taken_back: r.counter(
                "quarantine_taken_back_total",
                "Files in quarantine that somebody had gone on writing, and that oddscan put back.",
            ),
            left_alone: r.gauges(
                "left_alone_files",
                "Files in the incoming folder that make no scan and are not refused, by reason; `oddscan status --names` names them.",
                &["reason"],
            ),

            queue_studies: r.gauges(
                "queue_studies",
                "Scans that wait in a stage or are processed by it.",
                &["stage"],
            ),
            queue_oldest_time: r.gauges(
                "queue_oldest_study_timestamp_seconds",
                "Unix time at which the oldest scan in a stage arrived; 0 when the stage is empty.",
                &["stage"],
            ),
            stage_duration: r.histograms(
                "stage_duration_seconds",
                "Wall time of one scan in one stage.",
                &["stage"],
                STAGE_BUCKETS,
            ),
            stage_errors: r.counters(
                "stage_errors_total",
                "Failed attempts, by stage and error class.",
                &["stage", "class"],
            ),
            stage_retries: r.counters(
                "stage_retries_total",
                "Attempts that were started again after a failure.",
                &["stage"],
            ),

            slices: r.counters(
                "encode_slices_total",
                "Slices that went through the encoder.",
                &["device"],
            ),
            batch_slices: r.gauges(
                "encode_batch_slices",
                "Slices per forward pass at present; lower after an out-of-memory error.",
                &["device"],
            ),
            fallbacks: r.counters(
                "encode_fallbacks_total",
                "Times that the encoder changed to a smaller batch or to the CPU after a failure.",
                &["to"],
            ),
            device_busy: r.seconds(
                "device_busy_seconds_total",
                "Time that the device thread spent in kernels or waited for them.",
                &["device"],
            ),
            device_memory: r.gauges(
                "device_memory_bytes",
                "Used and total memory of a device that has its own, as the driver reports it; other programs' use counts, too.",
                &["device", "state"],
            ),

            window_studies: r.gauges(
                "window_studies",
                "Scans in a cohort's window, by state: active (reference scans, one per patient), same_patient (further reference scans of the same patients), set_aside (guests, which miss a limit of [quality]).",
                &["cohort", "state"],
            ),
            window_min: r.gauges(
                "window_min_studies",
                "Patients that a cohort needs before it is scored (window.min_scans).",
                &["cohort"],
            ),
            window_capacity: r.gauges(
                "window_capacity_studies",
                "Scans that a cohort's window can hold.",
                &["cohort"],
            ),
            window_oldest_time: r.gauges(
                "window_oldest_study_timestamp_seconds",
                "Unix time of the oldest scan in a cohort's window; 0 when the window is empty.",
                &["cohort"],
            ),
            window_heterogeneity: r.gauges(
                "window_heterogeneity_ratio",
                "How much the scans of a window differ as a whole; near 1 for one scanner.",
                &["cohort"],
            ),
            window_drift: r.gauges(
                "window_drift_ratio",
                "How far the newest scan as a whole is from its window; 1 means like the others.",
                &["cohort"],
            ),
            window_contamination: r.gauges(
                "window_contamination_ratio",
                "Fraction of a window's scans that have an anomaly in common with other scans.",
                &["cohort"],
            ),
            window_hidden_follow_ups: r.gauges(
                "window_hidden_follow_ups",
                "Scans of a window that are taken for scans of one person with others, although their names do not say so (scoring.follow_up_ratio).",
                &["cohort"],
            ),
            window_rebuilding: r.gauges(
                "window_rebuilding_studies",
                "Scans of a window that are encoded again, because the store lacks their tokens; the window is scored afterwards.",
                &["cohort"],
            ),
            score_runs: r.counters(
                "score_runs_total",
                "Scoring runs, by result and trigger.",
                &["cohort", "result", "trigger"],
            ),
            score_success_time: r.gauges(
                "score_last_success_timestamp_seconds",
                "Unix time of a cohort's last completed scoring run; 0 before the first.",
                &["cohort"],
            ),
            score_pairs: r.counters(
                "score_pairs_total",
                "Pairs of scans whose token distances were computed; stored distances do not count.",
                &["cohort"],
            ),
            percentile: r.histograms(
                "study_percentile_ratio",
                "Rank of a scan's anomaly score within its window, from 0 to 1.",
                &["cohort"],
                PERCENTILE_BUCKETS,
            ),
            verdicts: r.counters(
                "study_results_total",
                "Results written, by whether anything stands out in the scan.",
                &["cohort", "result"],
            ),

            end_to_end: r.histogram(
                "end_to_end_duration_seconds",
                "Time from the first sight of a scan's file until its result was written.",
                END_TO_END_BUCKETS,
            ),
            outputs: r.counters(
                "outputs_total",
                "Result files written, by kind and result.",
                &["kind", "result"],
            ),
            store_size: r.gauge("store_size_bytes", "Bytes on disk used by the token store."),
            store_live: r.gauge(
                "store_live_bytes",
                "Bytes of the tokens and distances of scans that are in a window.",
            ),
            damaged: r.counters(
                "damage_found_total",
                "Things in the state folder that were found damaged or gone, by kind; docs/reliability.md says what happens then.",
                &["kind"],
            ),
            store_repairs: r.counters(
                "store_repairs_total",
                "Repairs of the store at the start, by what was done.",
                &["repair"],
            ),
            store_compactions: r.counter(
                "store_compactions_total",
                "How often the store was copied into a smaller one.",
            ),
            evictions: r.counters(
                "store_evictions_total",
                "Scans whose tokens were removed, by reason.",
                &["reason"],
            ),
            filesystem_avail: r.gauges(
                "filesystem_avail_bytes",
                "Bytes that the daemon may still write on the file system of each folder that it uses.",
                &["directory"],
            ),

            registry: r.0,
        }
    }

    /// Creates the series of every label whose values are known.
    pub(super) fn start_at_zero(&self) {
        self.reload_successful.set(1.0);
        for reason in NotReady::ALL {
            self.not_ready.with_label_values(&[reason.name()]);
        }
        for repair in Repair::ALL {
            self.store_repairs.with_label_values(&[repair.name()]);
        }
        for by in SeenBy::ALL {
            self.files_seen.with_label_values(&[by.name()]);
        }
        for result in IngestResult::ALL {
            self.volumes.with_label_values(&[result.name()]);
            self.files.with_label_values(&[result.name()]);
        }
        for trigger in RescanTrigger::ALL {
            self.rescans.with_label_values(&[trigger.name()]);
        }
        for reason in QuarantineReason::ALL {
            self.quarantined.with_label_values(&[reason.name()]);
        }
        for kind in Damage::ALL {
            self.damaged.with_label_values(&[kind.name()]);
        }
        for reason in LeftAlone::ALL {
            self.left_alone.with_label_values(&[reason.name()]);
        }

        for stage in Stage::ALL {
            self.start_stage(stage.name());
        }
        for to in Fallback::ALL {
            self.fallbacks.with_label_values(&[to.name()]);
        }
        for kind in OutputKind::ALL {
            self.outputs.with_label_values(&[kind.name(), "ok"]);
            self.outputs.with_label_values(&[kind.name(), "failed"]);
        }
        for reason in EvictionReason::ALL {
            self.evictions.with_label_values(&[reason.name()]);
        }
        self.start_counters_of_cohort(OTHER_COHORTS);
    }

    fn start_stage(&self, stage: &str) {
        self.queue_studies.with_label_values(&[stage]);
        self.queue_oldest_time.with_label_values(&[stage]);
        self.stage_duration.with_label_values(&[stage]);
        self.stage_retries.with_label_values(&[stage]);
        for class in ERROR_CLASSES {
            self.stage_errors.with_label_values(&[stage, class]);
        }
    }

    fn start_counters_of_cohort(&self, cohort: &str) {
        for result in ScoreResult::ALL {
            for trigger in Trigger::ALL {
                self.score_runs.with_label_values(&[cohort, result.name(), trigger.name()]);
            }
        }
        self.score_pairs.with_label_values(&[cohort]);
        self.percentile.with_label_values(&[cohort]);
        for verdict in Verdict::ALL {
            self.verdicts.with_label_values(&[cohort, verdict.name()]);
        }
    }

    /// The cohort's own label, or `None` beyond the cap. A new cohort's counters start at 0.
    pub(super) fn own_label<'a>(&self, cohort: &'a str) -> Option<&'a str> {
        // A panic cannot leave a set of words half changed, so a poisoned lock does no harm.
        let mut cohorts = self.cohorts.lock().unwrap_or_else(PoisonError::into_inner);
        if cohorts.contains(cohort) {
            return Some(cohort);
        }
        if cohorts.len() == self.max_cohorts || cohort == OTHER_COHORTS {
            return None;
        }
        cohorts.insert(cohort.to_owned());
        self.start_counters_of_cohort(cohort);
        self.score_success_time.with_label_values(&[cohort]);
        Some(cohort)
    }
}

/// Makes the one series of an `_info` family, and removes an older one with other labels.
pub(super) fn set_info(family: &GaugeVec, labels: &[&str]) {
    family.reset();
    family.with_label_values(labels).set(1.0);
}

/// Makes families with the common prefix and registers them.
struct Registrar(Registry);

impl Registrar {
    fn new() -> Self {
        let registry = Registry::new();
        registry
            .register(Box::new(ProcessCollector::for_self()))
            .expect("the registry is empty, so no name is taken");
        Self(registry)
    }

    /// Panics only on a malformed or repeated name. Every test that makes metrics would show that.
    fn add<C: Collector + Clone + 'static>(&self, family: prometheus::Result<C>) -> C {
        let family = family.expect("names, labels and buckets are constants and valid");
        self.0.register(Box::new(family.clone())).expect("each name is registered once");
        family
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::with_opts(opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(opts(name, help), labels))
    }

    fn seconds(&self, name: &str, help: &str, labels: &[&str]) -> CounterVec {
        self.add(CounterVec::new(opts(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::with_opts(opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.add(GaugeVec::new(opts(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.add(Histogram::with_opts(with_buckets(name, help, buckets)))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        self.add(HistogramVec::new(with_buckets(name, help, buckets), labels))
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("oddscan")
}

fn with_buckets(name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
    HistogramOpts::from(opts(name, help)).buckets(buckets.to_vec())
}
