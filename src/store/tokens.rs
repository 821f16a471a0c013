//! The tokens of each scan: chunks, and a manifest that makes them valid.

use bytemuck::{cast_slice, cast_slice_mut};
use half::f16;
use serde::{Deserialize, Serialize};

use super::{
    blob::{Blob, put_blob},
    db::Store,
    error::StoreError,
    key::grid_key,
    record,
};
use crate::{
    domain::scan::ScanId,
    numeric::{
        fine::FineVolume,
        geometry::Shape3,
        token::{Foreground, TokenGrid},
    },
};

/// The shapes of a scan's grids. The chunks of a scan are valid only with this.
#[derive(Serialize, Deserialize)]
pub(super) struct Manifest {
    /// Fingerprint of the method that made the tokens. Empty for those from before it was kept.
    #[serde(default)]
    method: String,
    grids: Vec<GridShape>,
    /// The intensities. `None` for scans from before they were kept.
    #[serde(default)]
    fine: Option<FineShape>,
}

impl Manifest {
    /// Bytes of all grids and the intensities.
    pub(super) fn n_bytes(&self) -> u64 {
        let grids = self.grids.iter().map(GridShape::n_bytes).sum::<u64>();
        grids + self.fine.as_ref().map_or(0, FineShape::n_bytes)
    }

    /// Bytes of the columns from the scan to one other.
    pub(super) fn column_bytes(&self) -> u64 {
        self.grids.iter().map(|grid| 4 * grid.n_tokens as u64).sum()
    }
}

/// The shape of the intensities of a scan.
#[derive(Serialize, Deserialize)]
struct FineShape {
    shape: [usize; 3],
    cell_mm: f64,
    n_cells: usize,
}

impl FineShape {
    fn n_voxels(&self) -> usize {
        self.shape.iter().product()
    }

    /// A bit per cell of the grid, then a value and a depth per cell of the brain.
    fn n_bytes(&self) -> u64 {
        (self.n_voxels().div_ceil(8) + 3 * self.n_cells) as u64
    }
}

/// The intensities lie beside the token grids, under the number after the last one.
const FINE: usize = u16::MAX as usize;

#[derive(Serialize, Deserialize)]
struct GridShape {
    shape: [usize; 3],
    channels: usize,
    n_tokens: usize,
}

impl GridShape {
    fn n_bytes(&self) -> u64 {
        (self.n_tokens * (4 + 2 * self.channels)) as u64
    }
}

impl Store {
    /// Stores the grids of tokens of a scan, which are durable on return. `method` is the
    /// fingerprint of what made them.
    ///
    /// `fine` are the intensities beside them; tests of tokens alone have none.
    pub fn put_tokens(
        &self,
        id: ScanId,
        method: &str,
        grids: &[TokenGrid],
        fine: Option<&FineVolume>,
    ) -> Result<(), StoreError> {
        let mut shapes = Vec::new();
        for (index, grid) in grids.iter().enumerate() {
            let mut bytes = cast_slice::<u32, u8>(grid.cells()).to_vec();
            bytes.extend_from_slice(cast_slice::<f16, u8>(grid.features()));
            put_blob(&self.chunks, &grid_key(id, index), &bytes)?;
            shapes.push(GridShape {
                shape: grid.shape().0,
                channels: grid.channels(),
                n_tokens: grid.n_tokens(),
            });
        }

        let fine = fine.map(|fine| self.put_fine(id, fine)).transpose()?;
        let manifest = Manifest { method: method.to_owned(), grids: shapes, fine };
        self.manifests.insert(id.0, record::seal_json(&manifest))?;
        self.flush()
    }

    /// Whether the store seems to have `n_grids` grids of tokens of a scan, made by this method:
    /// their shapes are there and whole. A store that lost the end of its log may have tokens of an
    /// earlier method again.
    pub fn has_tokens(
        &self,
        id: &ScanId,
        method: &str,
        n_grids: usize,
    ) -> Result<bool, StoreError> {
        let is_of_method = |found: &Manifest| found.method.is_empty() || found.method == method;
        let is_it = |found: Manifest| is_of_method(&found) && found.grids.len() == n_grids;
        match self.manifest(id) {
            Ok(manifest) => Ok(manifest.is_some_and(is_it)),
            Err(StoreError::Damaged { .. }) => Ok(false),
            Err(error) => Err(error),
        }
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
            .map_err(|_| StoreError::Damaged { what: "tokens", scan: Some(*id) })
    }

    /// The cells of one grid of a scan's tokens; `None` if there is no such grid. It does not read
    /// the features.
    pub fn foreground(&self, id: &ScanId, grid: usize) -> Result<Option<Foreground>, StoreError> {
        Ok(self.open_tokens(id, grid)?.map(|(found, ..)| found))
    }

    fn put_fine(&self, id: ScanId, fine: &FineVolume) -> Result<FineShape, StoreError> {
        let FineVolume { foreground, values, depths, cell_mm } = fine;
        let mut bytes = vec![0_u8; foreground.shape.n_voxels().div_ceil(8)];
        for &cell in &foreground.cells {
            bytes[cell as usize / 8] |= 1 << (cell % 8);
        }
        bytes.extend_from_slice(cast_slice::<f16, u8>(values));
        bytes.extend_from_slice(depths);
        put_blob(&self.chunks, &grid_key(id, FINE), &bytes)?;
        let (shape, n_cells) = (foreground.shape.0, foreground.cells.len());
        Ok(FineShape { shape, cell_mm: *cell_mm, n_cells })
    }

    /// The intensities of a scan; `None` if the scan has none.
    pub fn fine(&self, id: &ScanId) -> Result<Option<FineVolume>, StoreError> {
        let Some(found) = self.manifest(id)?.and_then(|manifest| manifest.fine) else {
            return Ok(None);
        };
        let lost = || StoreError::Damaged { what: "intensities", scan: Some(*id) };
        let blob = Blob::open(&self.chunks, grid_key(*id, FINE), "intensities")?;
        let mut blob = blob.filter(|blob| blob.length == found.n_bytes()).ok_or_else(lost)?;

        let mut bits = vec![0_u8; found.n_voxels().div_ceil(8)];
        let mut values = vec![f16::ZERO; found.n_cells];
        let mut depths = vec![0_u8; found.n_cells];
        blob.fill(&mut bits)?;
        blob.fill(cast_slice_mut(&mut values))?;
        blob.fill(&mut depths)?;

        let is_set = |&cell: &u32| bits[cell as usize / 8] & (1 << (cell % 8)) != 0;
        let cells: Vec<u32> = (0..found.n_voxels() as u32).filter(is_set).collect();
        if cells.len() != found.n_cells {
            return Err(lost());
        }
        let foreground = Foreground { shape: Shape3(found.shape), cells };
        Ok(Some(FineVolume { foreground, values, depths, cell_mm: found.cell_mm }))
    }

    /// The cells and channels of one grid of tokens. The blob is then at the start of the features.
    fn open_tokens(
        &self,
        id: &ScanId,
        grid: usize,
    ) -> Result<Option<(Foreground, usize, Blob<'_>)>, StoreError> {
        let Some(manifest) = self.manifest(id)? else { return Ok(None) };
        let Some(found) = manifest.grids.get(grid) else { return Ok(None) };

        let lost = || StoreError::Damaged { what: "tokens", scan: Some(*id) };
        let blob = Blob::open(&self.chunks, grid_key(*id, grid), "tokens")?;
        let mut blob = blob.filter(|blob| blob.length == found.n_bytes()).ok_or_else(lost)?;

        let mut cells = vec![0_u32; found.n_tokens];
        blob.fill(cast_slice_mut(&mut cells))?;
        let foreground = Foreground { shape: Shape3(found.shape), cells };
        Ok(Some((foreground, found.channels, blob)))
    }

    pub(super) fn manifest(&self, id: &ScanId) -> Result<Option<Manifest>, StoreError> {
        let value = self.manifests.get(id.0)?;
        value.map(|value| record::open_json(&value, "token manifest", &id.0)).transpose()
    }
}
