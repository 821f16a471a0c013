//! oddscan notices unusual brain MRI scans without training anything.
//!
//! It cuts a scan into slices along three axes. A frozen DINOv2 describes each slice, and the
//! features are pooled into localised 3D tokens. A token that finds no close match in other
//! patients' scans is anomalous (CoDeGraph3D, Le-Gia and Ahn, MIDL 2026). Research use only.
//!
//! There are four layers: [`numeric`] <- [`domain`] <- adapters <- daemon. A layer uses only the
//! layers before it in this list; `tests/it/layers.rs` guards that. In reading order:
//!
//! 1. [`numeric`]: values in, values out. No file, clock, thread pool of its own, log, device or
//!    setting.
//! 2. [`domain`]: scan, window and finding, and the decisions about them. No I/O.
//! 3. Adapters, each for one outside thing: [`nifti`] and [`dicom`] (files), [`bids`] (the JSON
//!    beside them), [`model`] (weights and template), [`compute`] (the encoder on a GPU or the
//!    CPU), [`store`] (sled), [`watcher`] and [`ingest`] (the incoming folder), [`quarantine`],
//!    [`report`] (results), [`metrics`] (Prometheus), [`process`] (other programs). All of them may
//!    use [`files`]; otherwise they do not use one another.
//! 4. The daemon: [`config`], [`engine`] (the method prepared on a device), [`pipeline`] (the
//!    stages), [`telemetry`], [`service`] and the commands in [`cli`].

pub mod numeric;

pub mod domain;

pub mod archive;
pub mod bids;
pub mod companions;
pub mod compute;
pub mod dicom;
pub mod files;
pub mod ingest;
pub mod ledger;
pub mod metrics;
pub mod model;
pub mod nifti;
pub mod process;
pub mod quarantine;
pub mod report;
pub mod store;
pub mod watcher;

pub mod cli;
pub mod config;
pub mod engine;
pub mod pipeline;
pub mod prepare;
pub mod refusals;
pub mod results;
pub mod service;
pub mod telemetry;
