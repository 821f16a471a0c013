//! One entry per scan: its facts, its state and its last result.

use std::collections::BTreeMap;

use sled::Transactional;

use super::{
    db::{Store, storage},
    error::StoreError,
    record,
    tokens::{GridShape, Manifest},
};
use crate::domain::{
    cohort::CohortKey,
    scan::{ScanId, ScanRecord, ScanState},
};

impl Store {
    /// Writes a journal entry, which is durable on return.
    pub fn put_record(&self, record: &ScanRecord) -> Result<(), StoreError> {
        self.journal.insert(record.id.0, record::seal_json(record))?;
        self.flush()
    }

    /// The journal entry of a scan; `None` if the store never saw the scan.
    pub fn record(&self, id: &ScanId) -> Result<Option<ScanRecord>, StoreError> {
        let value = self.journal.get(id.0)?;
        value.map(|value| record::open_json(&value, "journal", &id.0)).transpose()
    }

    /// All journal entries, evicted scans included, in order of arrival.
    pub fn records(&self) -> Result<Vec<ScanRecord>, StoreError> {
        let mut records = Vec::new();
        for entry in self.journal.iter() {
            let (key, value) = entry?;
            records.push(record::open_json::<ScanRecord>(&value, "journal", &key)?);
        }
        records.sort_by_key(|record| record.sequence);
        Ok(records)
    }

    /// A number larger than all earlier ones, even after a restart.
    pub fn next_sequence(&self) -> Result<u64, StoreError> {
        Ok(self.db.generate_id()?)
    }

    /// Removes a scan from its window. Its entry becomes *evicted*, and its tokens and all columns
    /// from or to it are removed. A second call changes nothing.
    pub fn evict(&self, record: &ScanRecord) -> Result<(), StoreError> {
        let evicted = ScanRecord { state: ScanState::Evicted, ..record.clone() };
        self.drop_tokens(&evicted)
    }

    /// Removes the tokens of a scan. The scan then waits for the encoder again.
    pub fn forget_tokens(&self, record: &ScanRecord) -> Result<(), StoreError> {
        let waiting = ScanRecord { state: ScanState::Ingested, ..record.clone() };
        self.drop_tokens(&waiting)
    }

    fn drop_tokens(&self, record: &ScanRecord) -> Result<(), StoreError> {
        let id = record.id.0;
        let entry = record::seal_json(record);

        (&self.manifests, &self.journal)
            .transaction(|(manifests, journal)| {
                manifests.remove(&id)?;
                journal.insert(&id, entry.as_slice())?;
                Ok(())
            })
            .map_err(storage)?;

        self.flush()?;
        self.remove_all_of(&id)
    }

    /// Bytes of the tokens and columns of all members of windows.
    pub fn live_bytes(&self) -> Result<u64, StoreError> {
        let mut tokens = 0;
        // For each cohort, the number of members and the bytes of one column of each. Every member
        // has a column to each other member.
        let mut cohorts: BTreeMap<CohortKey, (u64, u64)> = BTreeMap::new();

        for entry in self.manifests.iter() {
            let (key, value) = entry?;
            let manifest: Manifest = record::open_json(&value, "token manifest", &key)?;
            tokens += manifest.grids.iter().map(GridShape::n_bytes).sum::<u64>();

            let Some(entry) = self.journal.get(&key)? else { continue };
            let record: ScanRecord = record::open_json(&entry, "journal", &key)?;
            let (n_members, column) = cohorts.entry(record.cohort).or_default();
            *n_members += 1;
            *column += manifest.grids.iter().map(|l| 4 * l.n_tokens as u64).sum::<u64>();
        }

        let columns = cohorts.values().map(|(n_members, column)| column * (n_members - 1));
        Ok(tokens + columns.sum::<u64>())
    }
}
