//! Tests of the crate from outside: real files, real store, real binary.

#![expect(clippy::unwrap_used, reason = "helpers of tests stand outside of test functions")]

mod alignment;
mod apart;
mod arrivals;
mod brain_network;
mod cli;
mod cohorts;
mod community;
mod daemon;
mod dicom;
mod durable;
mod evaluation;
mod faults;
mod fuzz_corpus;
#[path = "../../fuzz/src/targets.rs"]
mod fuzz_targets;
#[path = "../reference/goldens.rs"]
mod goldens;
mod hostile;
mod identity;
mod intensity;
mod kernels;
mod layers;
#[path = "../reference/linknet.rs"]
mod linknet;
mod model;
mod nibabel;
mod nifti;
mod optional_results;
mod pages;
mod parts;
mod patients;
mod preprocess;
mod quality;
mod readiness;
mod reference;
mod shipped;
mod support;
mod systemd;
#[path = "../burn/tiny.rs"]
#[expect(dead_code, reason = "the network is shared with the tests of the burn engine")]
mod tiny;
mod unchanged;
