//! Why intake pauses: no disk space, or no program for the preprocessing.

use super::Intake;
use crate::{
    metrics::{DirectoryKind, PauseReason},
    pipeline::Shared,
    process::hook,
};

impl Intake {
    /// Whether the site's preprocessing is missing. Files then stay where they are.
    pub(super) fn is_hook_gone(&self) -> bool {
        let gone = self.shared.method.hook.as_ref().is_some_and(|hook| !hook.is_there());
        self.shared.metrics.paused(PauseReason::PreprocessGone, gone);
        self.shared.board.set_reason(hook::GONE, gone);
        gone
    }

    /// Measures the free space of every folder. If it is too low, intake pauses and files stay
    /// where they are.
    pub(super) fn is_disk_low(&self) -> bool {
        let config = self.shared.config();
        let Shared { board, metrics, .. } = &*self.shared;
        let folders = &config.directories;
        let mut low = false;
        for (kind, key, folder) in [
            (DirectoryKind::Incoming, "incoming", &folders.incoming),
            (DirectoryKind::Output, "results", &folders.results),
            (DirectoryKind::Quarantine, "quarantine", &folders.quarantine),
            (DirectoryKind::State, "state", &folders.state),
        ] {
            let space = rustix::fs::statvfs(folder.as_path());
            let free = space.ok().map(|space| space.f_bavail * space.f_frsize);
            metrics.filesystem_avail(kind, free);
            if kind != DirectoryKind::Incoming {
                board.set_reason(&format!("the {key} folder cannot be reached"), free.is_none());
                low |= free.is_some_and(|free| free < config.service.min_free_bytes);
            }
        }
        self.shared.metrics.paused(PauseReason::DiskLow, low);
        self.shared.board.set_reason("paused: disk low (service.min_free_mib)", low);
        low
    }
}
