//! What each module of `src` may use. What is not in its row is forbidden.

/// A module directly below `src`, and what its code may use outside of its tests.
pub(super) struct Row {
    pub(super) module: &'static str,
    /// Modules of the crate, besides its own.
    pub(super) modules: &'static str,
    /// Outside crates, the parts of `std` in [`WATCHED`], and macros of `std` that print.
    pub(super) outside: &'static str,
}

const fn row(module: &'static str, modules: &'static str, outside: &'static str) -> Row {
    Row { module, modules, outside }
}

/// What a module may use only if its row allows it. All else in `std` is free.
pub(super) const WATCHED: [&str; 11] = [
    "std::env",
    "std::fs",
    "std::io::stderr",
    "std::io::stdin",
    "std::io::stdout",
    "std::net",
    "std::os",
    "std::process",
    "std::thread",
    "std::time",
    "std::*",
];

/// Parts of these that are only values: the bytes of a name, a time that is an argument. To ask for
/// the current time is not free.
pub(super) const FREE: [&str; 3] =
    ["std::os::unix::ffi", "std::time::Duration", "std::time::Instant"];

pub(super) const ROWS: &[Row] = &[
    // Pure functions of values.
    row("numeric", "", "bobyqa half rayon thiserror"),
    row("domain", "numeric", "globset half hex rayon safetensors serde serde_json sha2 thiserror"),
    // Adapters. They may use `files`, and otherwise do not use one another.
    row("files", "", "std::env std::fs std::os rustix sha2 tempfile"),
    row("nifti", "numeric domain", "std::fs std::os flate2 nifti rustix thiserror"),
    row(
        "dicom",
        "numeric domain",
        "std::fs dicom_core dicom_dictionary_std dicom_object dicom_pixeldata flate2 serde_json zip",
    ),
    row("archive", "domain files", "std::fs std::os hex tempfile"),
    row("bids", "domain", "serde_json"),
    row("companions", "domain", "std::fs"),
    row(
        "compute",
        "numeric domain",
        "std::env std::fs std::thread std::time burn burn_cuda bytemuck cudarc half libc rayon \
         serde thiserror tracing",
    ),
    row(
        "store",
        "numeric domain files",
        "std::fs std::os std::thread std::time bytemuck crc32fast half libc rayon serde \
         serde_json sled thiserror",
    ),
    row("ingest", "domain files", "std::fs std::os globset"),
    row("ledger", "domain files", "std::fs crc32fast hex serde serde_json sha2 thiserror"),
    row("watcher", "", "notify"),
    row("quarantine", "domain files", "std::fs std::os serde serde_json tracing"),
    row(
        "report",
        "numeric domain files",
        "std::fs embedded_graphics hex image rayon serde serde_json sha2",
    ),
    row("metrics", "domain", "prometheus"),
    row(
        "model",
        "domain files",
        "std::env std::fs std::process bytemuck crc32fast half hex prost safetensors serde \
         serde_json sha2 tempfile thiserror ureq zip",
    ),
    row(
        "process",
        "numeric domain files",
        "std::fs std::os std::process std::thread std::time flate2 hex rustix serde serde_json \
         sha2 tempfile thiserror tracing",
    ),
    // The daemon.
    row(
        "config",
        "numeric domain compute store process",
        "std::fs std::net globset serde thiserror toml tracing tracing_subscriber",
    ),
    row(
        "engine",
        "numeric domain nifti compute model process config",
        "std::fs hex rayon serde_json sha2 thiserror tracing",
    ),
    row("refusals", "numeric domain report", "tracing"),
    row(
        "prepare",
        "numeric domain files nifti bids companions process config engine refusals",
        "std::fs bytemuck hex sha2",
    ),
    row(
        "results",
        "numeric domain nifti companions report config engine prepare",
        "hex rayon serde_json sha2",
    ),
    row(
        "pipeline",
        "numeric domain files archive ledger nifti companions compute store ingest watcher \
         quarantine report metrics process config engine prepare results",
        "std::fs std::os std::thread std::time rayon rustix serde serde_json tokio tracing",
    ),
    row(
        "service",
        "domain store watcher metrics config engine pipeline telemetry",
        "std::fs std::net rustix systemd thiserror tokio tracing",
    ),
    row(
        "telemetry",
        "domain metrics pipeline",
        "std::env std::io::stderr std::net axum hyper hyper_util tokio tracing tracing_journald \
         tracing_subscriber",
    ),
    row(
        "cli",
        "numeric domain files nifti dicom companions compute store ingest quarantine report \
         metrics model process config engine refusals prepare results pipeline service \
         telemetry",
        "std::env std::fs std::io::stderr std::io::stdin std::io::stdout std::net std::os \
         std::process std::thread std::time clap half hex indicatif rustix serde serde_json \
         sha2 tempfile toml ureq eprintln! print! println!",
    ),
    row("main", "cli", "std::process"),
];

/// A dependency, and the only parts of `src` that may name it.
pub(super) const HOMES: &[(&str, &[&str])] = &[
    ("axum", &["telemetry"]),
    ("burn", &["compute/burn"]),
    ("burn_cuda", &["compute/burn"]),
    ("clap", &["cli"]),
    ("cudarc", &["compute/cuda", "compute/device"]),
    ("dicom_core", &["dicom"]),
    ("dicom_dictionary_std", &["dicom"]),
    ("dicom_object", &["dicom"]),
    ("dicom_pixeldata", &["dicom"]),
    ("embedded_graphics", &["report"]),
    ("hyper", &["telemetry"]),
    ("hyper_util", &["telemetry"]),
    ("nifti", &["nifti"]),
    ("notify", &["watcher"]),
    ("prometheus", &["metrics"]),
    ("prost", &["model"]),
    ("sled", &["store/sled"]),
    ("systemd", &["service"]),
    ("tracing_journald", &["telemetry"]),
    ("ureq", &["cli/status", "model"]),
];
