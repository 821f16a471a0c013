//! Tests of the crate from outside: real files, real store, real binary.

mod cli;
mod daemon;
#[path = "../reference/goldens.rs"]
mod goldens;
mod hostile;
mod layers;
mod nibabel;
mod reference;
mod shipped;
mod support;
mod systemd;
#[path = "../burn/tiny.rs"]
#[expect(dead_code, reason = "the network is shared with the tests of the burn engine")]
mod tiny;
