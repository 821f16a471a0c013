//! The distances between the tokens of two scans, stored under the scan that arrived later.

use bytemuck::{cast_slice, cast_slice_mut};
use rayon::prelude::*;

use super::{
    blob::{Blob, chunk_key, put_blob},
    db::Store,
    error::StoreError,
    key::{Way, column_key},
};
use crate::{domain::scan::ScanId, numeric::scoring::PairColumns};

/// How columns are stored. A change of this text drops all columns and nothing else, because they
/// can be computed again.
const COLUMNS: &str = "each pair under the scan that came later";

impl Store {
    /// Stores both columns of a pair for one grid of tokens. It does not flush, because columns can
    /// be computed again.
    pub fn put_columns(
        &self,
        first: ScanId,
        second: ScanId,
        grid: usize,
        columns: &PairColumns,
    ) -> Result<(), StoreError> {
        let PairColumns { first_to_second, second_to_first } = columns;
        for (way, column) in [(Way::There, first_to_second), (Way::Back, second_to_first)] {
            put_blob(&self.columns, &column_key(first, way, second, grid), cast_slice(column))?;
        }
        Ok(())
    }

    /// The distances from the `n_tokens` tokens of one scan to another scan, if they are stored. A
    /// damaged column counts as missing, because it can be computed again.
    pub fn column(
        &self,
        of: ScanId,
        other: ScanId,
        grid: usize,
        n_tokens: usize,
    ) -> Result<Option<Vec<f32>>, StoreError> {
        // A pair is usually stored under the scan that arrived later, but may be under either.
        let under_of = column_key(of, Way::There, other, grid);
        let under_other = column_key(other, Way::Back, of, grid);
        for key in [under_of, under_other] {
            match self.read_column(key, n_tokens) {
                Ok(None) | Err(StoreError::Damaged { .. }) => {}
                found => return found,
            }
        }
        Ok(None)
    }

    fn read_column(&self, key: Vec<u8>, n_tokens: usize) -> Result<Option<Vec<f32>>, StoreError> {
        let blob = Blob::open(&self.columns, key, "distances")?;
        let Some(mut blob) = blob.filter(|blob| blob.length == 4 * n_tokens as u64) else {
            return Ok(None);
        };

        let mut column = vec![0.0; n_tokens];
        blob.fill(cast_slice_mut(&mut column))?;
        Ok(Some(column))
    }

    /// As [`Store::column`] for several other scans, in parallel on all cores.
    pub fn columns(
        &self,
        of: ScanId,
        others: &[ScanId],
        grid: usize,
        n_tokens: usize,
    ) -> Result<Vec<Option<Vec<f32>>>, StoreError> {
        others.par_iter().map(|&other| self.column(of, other, grid, n_tokens)).collect()
    }

    /// Whether both columns of a pair are stored under `joined`. It does not search under `other`.
    pub fn has_columns(
        &self,
        joined: ScanId,
        other: ScanId,
        grid: usize,
    ) -> Result<bool, StoreError> {
        // A kill can leave an empty value, which is none.
        let is_kept = |way| {
            let value = self.columns.get(chunk_key(&column_key(joined, way, other, grid), 0))?;
            Ok::<_, StoreError>(value.is_some_and(|value| !value.is_empty()))
        };
        Ok(is_kept(Way::There)? && is_kept(Way::Back)?)
    }

    /// Drops all columns if they were computed in another way than `how`, or stored in another
    /// order. `alive` is called for every column.
    pub fn keep_columns_made_by(&self, how: &str, alive: impl Fn()) -> Result<(), StoreError> {
        let how = format!("{how}, {COLUMNS}");
        if self.facts.get("columns")?.is_none_or(|stored| stored != how.as_bytes()) {
            for entry in self.columns.iter() {
                alive();
                self.columns.remove(entry?.0)?;
            }
            self.facts.insert("columns", how.as_bytes())?;
            self.flush()?;
        }
        Ok(())
    }
}
