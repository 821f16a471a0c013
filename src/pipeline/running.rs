//! Whether the last run of the daemon crashed: a file in the state folder that only an orderly end
//! removes, after an error, too.
//!
//! A scan that was in hand at several crashes is taken for their cause. A full disk also ends the
//! daemon while it has a scan in hand, and then the scan is not to blame.

use std::{fs, path::Path};

use tracing::warn;

const NAME: &str = "running";

/// Notes that the daemon runs. Returns whether the last run crashed.
///
/// These calls are no steps of `files`: what they say is a hint. If the file cannot be made, a
/// crash is not noticed.
pub(super) fn begin(state: &Path) -> bool {
    let file = state.join(NAME);
    let has_crashed = file.exists();
    if let Err(error) = fs::write(&file, "") {
        warn!(error = %error.kind(), "cannot note in the state folder that the daemon runs");
    }
    has_crashed
}

/// Notes an orderly end.
pub(super) fn end(state: &Path) {
    fs::remove_file(state.join(NAME)).ok();
}
