//! Why intake pauses: no disk space, a state folder that takes no files, or no program for the
//! preprocessing.

use super::Intake;
use crate::{domain::not_ready::NotReady, metrics::DirectoryKind, pipeline::Shared};

impl Intake {
    /// Whether files have to stay where they are for now. `is_full_listing` says whether the whole
    /// folder is listed because it is time.
    pub(super) fn must_pause(&mut self, is_full_listing: bool) -> bool {
        let takes_files = self.look_at_folders(is_full_listing);
        self.is_disk_low() | self.is_hook_gone() | !takes_files
    }

    /// Whether the site's preprocessing is missing.
    fn is_hook_gone(&self) -> bool {
        let gone = self.shared.method.hook.as_ref().is_some_and(|hook| !hook.is_there());
        self.shared.board.set_reason(NotReady::PreprocessGone, gone);
        gone
    }

    /// Tries the folders that oddscan writes to. Returns whether the state folder takes files.
    /// Results and refused files can wait for theirs.
    fn look_at_folders(&mut self, is_full_listing: bool) -> bool {
        let config = self.shared.config();
        let (folders, board) = (&config.directories, &self.shared.board);
        self.results.takes_files(&folders.results, is_full_listing, board);
        self.quarantine.takes_files(&folders.quarantine, is_full_listing, board);
        self.state.takes_files(&folders.state, is_full_listing, board)
    }

    /// Measures the free space of every folder. The incoming folder does not count, because oddscan
    /// only reads it.
    fn is_disk_low(&self) -> bool {
        let config = self.shared.config();
        let Shared { board, metrics, .. } = &*self.shared;
        let folders = &config.directories;
        let mut low = false;
        for (kind, folder) in [
            (DirectoryKind::Incoming, &folders.incoming),
            (DirectoryKind::Output, &folders.results),
            (DirectoryKind::Quarantine, &folders.quarantine),
            (DirectoryKind::State, &folders.state),
        ] {
            let space = rustix::fs::statvfs(folder.as_path());
            let free = space.ok().map(|space| space.f_bavail * space.f_frsize);
            metrics.filesystem_avail(kind, free);
            if kind != DirectoryKind::Incoming {
                low |= free.is_some_and(|free| free < config.service.min_free_bytes);
            }
        }
        board.set_reason(NotReady::DiskLow, low);
        low
    }
}
