//! The tokens of each scan: chunks, and a manifest that makes them valid.

use bytemuck::{cast_slice, cast_slice_mut};
use half::f16;
use serde::{Deserialize, Serialize};
use sled::Transactional;

use super::{
    blob::{Blob, put_blob},
    db::{Store, storage},
    error::StoreError,
    key::grid_key,
    record,
};
use crate::{
    domain::scan::{ScanId, ScanRecord},
    numeric::{
        geometry::Shape3,
        token::{Foreground, TokenGrid},
    },
};

/// The shapes of a scan's grids. The chunks of a scan are valid only with this.
#[derive(Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) grids: Vec<GridShape>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct GridShape {
    shape: [usize; 3],
    channels: usize,
    pub(super) n_tokens: usize,
}

impl GridShape {
    pub(super) fn n_bytes(&self) -> u64 {
        (self.n_tokens * (4 + 2 * self.channels)) as u64
    }
}

impl Store {
    /// Stores the grids of tokens of a scan with its journal entry. Both are durable on return. A
    /// kill in between leaves the old state.
    pub fn put_encoded(&self, record: &ScanRecord, grids: &[TokenGrid]) -> Result<(), StoreError> {
        let mut shapes = Vec::new();
        for (index, grid) in grids.iter().enumerate() {
            let mut bytes = cast_slice::<u32, u8>(grid.cells()).to_vec();
            bytes.extend_from_slice(cast_slice::<f16, u8>(grid.features()));
            put_blob(&self.chunks, &grid_key(record.id, index), &bytes)?;
            shapes.push(GridShape {
                shape: grid.shape().0,
                channels: grid.channels(),
                n_tokens: grid.n_tokens(),
            });
        }

        let id = record.id.0;
        let manifest = record::seal_json(&Manifest { grids: shapes });
        let entry = record::seal_json(record);

        (&self.manifests, &self.journal)
            .transaction(|(manifests, journal)| {
                manifests.insert(&id, manifest.as_slice())?;
                journal.insert(&id, entry.as_slice())?;
                Ok(())
            })
            .map_err(storage)?;
        self.flush()
    }

    /// One grid of a scan's tokens; `None` if there is no such grid.
    pub fn tokens(&self, id: &ScanId, grid: usize) -> Result<Option<TokenGrid>, StoreError> {
        let Some((found, channels, mut blob)) = self.open_tokens(id, grid)? else {
            return Ok(None);
        };

        let mut features = vec![f16::ZERO; found.cells.len() * channels];
        blob.fill(cast_slice_mut(&mut features))?;
        TokenGrid::new(found.shape, channels, found.cells, features)
            .map(Some)
            .map_err(|_| StoreError::Damaged { what: "tokens", scan: id.short() })
    }

    /// The cells of one grid of a scan's tokens; `None` if there is no such grid. It does not read
    /// the features.
    pub fn foreground(&self, id: &ScanId, grid: usize) -> Result<Option<Foreground>, StoreError> {
        Ok(self.open_tokens(id, grid)?.map(|(found, ..)| found))
    }

    /// The cells and channels of one grid of tokens. The blob is then at the start of the features.
    fn open_tokens(
        &self,
        id: &ScanId,
        grid: usize,
    ) -> Result<Option<(Foreground, usize, Blob<'_>)>, StoreError> {
        let Some(manifest) = self.manifest(id)? else { return Ok(None) };
        let Some(found) = manifest.grids.get(grid) else { return Ok(None) };

        let lost = || StoreError::Damaged { what: "tokens", scan: id.short() };
        let blob = Blob::open(&self.chunks, grid_key(*id, grid), "tokens")?;
        let mut blob = blob.filter(|blob| blob.length == found.n_bytes()).ok_or_else(lost)?;

        let mut cells = vec![0_u32; found.n_tokens];
        blob.fill(cast_slice_mut(&mut cells))?;
        let foreground = Foreground { shape: Shape3(found.shape), cells };
        Ok(Some((foreground, found.channels, blob)))
    }

    fn manifest(&self, id: &ScanId) -> Result<Option<Manifest>, StoreError> {
        let value = self.manifests.get(id.0)?;
        value.map(|value| record::open_json(&value, "token manifest", &id.0)).transpose()
    }
}
