//! oddscan notices unusual brain MRI scans without training anything.
//!
//! A scan is cut into slices along three axes, a frozen DINOv2 describes each slice, the features
//! are pooled into localised 3D tokens, and a token that finds no close match in other patients'
//! scans is anomalous (CoDeGraph3D, Le-Gia and Ahn, MIDL 2026). Research use only.
//!
//! Four layers, one direction: [`numeric`] <- [`domain`] <- adapters <- daemon. A layer uses only
//! what stands before it in this list; `tests/it/layers.rs` guards that. In reading order:
//!
//! 1. [`numeric`]: values in, values out. No file, clock, thread pool of its own, log, device or
//!    setting.
//! 2. [`domain`]: what a scan, a window and a finding are and may become. No I/O.
//! 3. Adapters, each hiding one outside thing: [`nifti`] and [`dicom`] (files), [`bids`] (the JSON
//!    beside them), [`model`] (weights and template), [`compute`] (the encoder on a GPU or the
//!    CPU), [`store`] (sled), [`watcher`] and [`ingest`] (the incoming folder), [`quarantine`],
//!    [`report`] (results), [`metrics`] (Prometheus), [`process`] (other programs). All of them may
//!    use [`files`]; otherwise they do not use one another.
//! 4. The daemon: [`config`], [`engine`] (the method made ready on a device), [`pipeline`] (the
//!    stages), [`telemetry`], [`service`] and the commands in [`cli`].

pub mod numeric;

pub mod domain;

pub mod bids;
pub mod compute;
pub mod dicom;
pub mod files;
pub mod ingest;
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
pub mod service;
pub mod telemetry;
