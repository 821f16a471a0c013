//! Reports files in the incoming folder that are not scans. Somebody may wait for their results.

use std::{collections::HashMap, mem, path::PathBuf};

use tracing::{debug, info};

use crate::pipeline::board::PASSED_OVER;

/// Files that are passed over, and whether the log has named them.
#[derive(Default)]
pub(super) struct PassedOver(HashMap<PathBuf, bool>);

impl PassedOver {
    /// Records the files of this listing. Returns how many were there at the last listing, too: the
    /// others may still get another name.
    pub(super) fn look(&mut self, now: impl Iterator<Item = PathBuf>) -> usize {
        let known = mem::take(&mut self.0);
        let mut n_unnamed = 0;
        for path in now {
            let was_said = known.get(&path).copied();
            if was_said == Some(false) {
                debug!(path = %path.display(), "passed over");
                n_unnamed += 1;
            }
            self.0.insert(path, was_said.is_some());
        }
        if n_unnamed > 0 {
            info!(
                files = n_unnamed,
                "passed over in the incoming folder: {PASSED_OVER}; service.log = \"debug\" names them"
            );
        }
        self.0.values().filter(|&&was_said| was_said).count()
    }
}
