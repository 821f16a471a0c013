//! Tests of the crate from outside: real files, real store, real binary.

mod shipped;
mod systemd;
