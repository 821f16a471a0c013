//! Reads the intensities of the members of a window from the store.

use crate::{
    domain::{error::ScanError, evidence::FineVolumes, scan::ScanId},
    numeric::fine::FineVolume,
    pipeline::{Shared, board::StageName},
    store::StoreError,
};

/// The fine volumes of all members in the store.
pub(super) struct StoredVolumes<'a> {
    pub(super) shared: &'a Shared,
}

impl FineVolumes for StoredVolumes<'_> {
    fn fine(&self, scan: ScanId) -> Result<FineVolume, ScanError> {
        self.shared.board.heartbeat(StageName::Score);
        let lost = || StoreError::Damaged { what: "intensities", scan: Some(scan) };
        Ok(self.shared.store.fine(&scan)?.ok_or_else(lost)?)
    }
}
