//! The records of all scans: the ledger has them, and the store has a copy of each, from which a
//! damaged file of the ledger is restored.

use std::{collections::HashMap, path::PathBuf};

use tracing::{info, warn};

use crate::{
    domain::{
        error::ScanError,
        scan::{ScanId, ScanRecord},
    },
    ledger::{Entry, Ledger, LedgerError, SeenFile, SeenList},
    store::{OldRecords, Store},
};

/// The ledger with its copies.
pub struct Records {
    ledger: Ledger,
    store: Store,
}

/// The records of a start.
#[derive(Debug, Default)]
pub(super) struct LoadedRecords {
    /// In order of arrival.
    pub(super) records: Vec<ScanRecord>,
    /// Number of records that were damaged, gone or old, and are restored.
    pub(super) n_restored: usize,
    /// Damaged files without a copy.
    pub(super) damaged: Vec<PathBuf>,
}

impl Records {
    pub(super) fn new(ledger: Ledger, store: Store) -> Self {
        Self { ledger, store }
    }

    /// The record of a scan; `None` if oddscan does not know the scan. A damaged record is
    /// restored.
    pub(super) fn get(&self, id: &ScanId) -> Result<Option<ScanRecord>, ScanError> {
        if let Some(record) = self.ledger.record(id)? {
            return Ok(Some(record));
        }
        let copy = self.store.copy(id)?.and_then(|bytes| Entry::parse(&bytes));
        let Some(copy) = copy.filter(|copy| copy.record.id == *id) else { return Ok(None) };
        warn!(scan = %id, "a record of the ledger was damaged; it is restored from its copy");
        self.ledger.restore(&copy)?;
        Ok(Some(copy.record))
    }

    /// Writes a record, which is durable on return.
    pub(super) fn put(&self, record: &ScanRecord) -> Result<(), ScanError> {
        let entry = self.ledger.put(record)?;
        Ok(self.store.put_copy(&record.id, &entry)?)
    }

    /// A number larger than those of all scans before.
    pub(super) fn next_sequence(&self) -> u64 {
        self.ledger.next_sequence()
    }

    /// Reads all records, and makes ledger and copies agree: of two entries the newer one counts.
    pub(super) fn load(&self, seen: &SeenList) -> Result<LoadedRecords, ScanError> {
        self.ledger.tidy_up()?;
        let found = self.ledger.load()?;
        let mut copies: HashMap<ScanId, Entry> = HashMap::new();
        for copy in self.store.copies()?.iter().filter_map(|bytes| Entry::parse(bytes)) {
            self.ledger.continue_after(&copy);
            copies.insert(copy.record.id, copy);
        }

        let mut loaded = LoadedRecords::default();
        for entry in found.entries {
            match copies.remove(&entry.record.id) {
                Some(copy) if copy.number > entry.number => {
                    loaded.n_restored += 1;
                    self.ledger.restore(&copy)?;
                    loaded.records.push(copy.record);
                }
                copy => {
                    if copy.as_ref() != Some(&entry) {
                        self.store.put_copy(&entry.record.id, &entry.to_bytes())?;
                    }
                    loaded.records.push(entry.record);
                }
            }
        }
        for id in found.damaged.iter().filter(|id| !copies.contains_key(id)) {
            loaded.damaged.push(self.ledger.path(id));
        }
        // Their files are damaged or gone.
        for copy in copies.into_values() {
            loaded.n_restored += 1;
            self.ledger.restore(&copy)?;
            loaded.records.push(copy.record);
        }

        if let Some(old) = self.store.old_records()? {
            self.take_over(old, seen, &mut loaded)?;
        }
        loaded.records.sort_by_key(|record| record.sequence);
        Ok(loaded)
    }

    /// Takes records and decisions out of a store of an earlier version. After a kill, the next
    /// start does the rest.
    fn take_over(
        &self,
        old: OldRecords,
        seen: &SeenList,
        loaded: &mut LoadedRecords,
    ) -> Result<(), ScanError> {
        let records = old.records.iter().filter_map(|json| serde_json::from_slice(json).ok());
        let mut records: Vec<ScanRecord> = records.collect();
        records.retain(|record| loaded.records.iter().all(|known| known.id != record.id));
        for record in records {
            self.put(&record)?;
            loaded.records.push(record);
        }

        for (path, json) in &old.seen {
            if let Ok(decision) = serde_json::from_slice::<SeenFile>(json) {
                seen.put(path, &decision)?;
            }
        }
        seen.flush()?;
        self.store.drop_old_records()?;
        let (n_scans, n_files) = (loaded.records.len(), old.seen.len());
        info!(n_scans, n_files, "records of an earlier version were taken over");
        Ok(())
    }
}

impl From<LedgerError> for ScanError {
    fn from(error: LedgerError) -> Self {
        Self::Ledger(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        domain::{cohort::CohortKey, scan::ScanState},
        store::MIN_MEMORY,
    };

    struct Site {
        folder: tempfile::TempDir,
        records: Records,
        seen: SeenList,
    }

    fn site() -> Site {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&folder.path().join("ledger")).unwrap();
        let store = Store::open(&folder.path().join("store"), MIN_MEMORY).unwrap().store;
        let seen = SeenList::open(&folder.path().join("seen")).unwrap().0;
        Site { folder, records: Records::new(ledger, store), seen }
    }

    fn record(n: u8) -> ScanRecord {
        let key = CohortKey { name: "t1w".into(), method: "m".into() };
        ScanRecord { sequence: u64::from(n), ..ScanRecord::new(ScanId([n; 32]), key) }
    }

    #[test]
    fn the_newer_of_record_and_copy_counts_and_both_agree_afterwards() {
        let Site { folder, records, seen } = site();
        let encoded = |n| ScanRecord { state: ScanState::Encoded, ..record(n) };
        let file = |n: u8| folder.path().join("ledger").join(ScanId([n; 32]).to_hex());
        let mut old_files = Vec::new();
        for n in 1..=4 {
            records.put(&record(n)).unwrap();
            old_files.push(fs::read(file(n)).unwrap());
            records.put(&encoded(n)).unwrap();
        }
        // An older file, a damaged one, one that is gone, and a copy that is old.
        fs::write(file(1), &old_files[0]).unwrap();
        fs::write(file(2), "damage").unwrap();
        fs::remove_file(file(3)).unwrap();
        records.store.put_copy(&ScanId([4; 32]), &old_files[3]).unwrap();

        let loaded = records.load(&seen).unwrap();
        assert_eq!(loaded.records, [1, 2, 3, 4].map(encoded));
        assert_eq!((loaded.n_restored, loaded.damaged.len()), (3, 0));
        let again = records.load(&seen).unwrap();
        assert_eq!((again.records.len(), again.n_restored), (4, 0));

        // The store is gone: what a file of the ledger lost is lost.
        fs::write(file(2), "damage").unwrap();
        let store = Store::open(&folder.path().join("new store"), MIN_MEMORY).unwrap().store;
        let records = Records::new(records.ledger, store);
        let loaded = records.load(&seen).unwrap();
        assert_eq!((loaded.records.len(), loaded.damaged), (3, vec![file(2)]));
        fs::write(file(1), "damage").unwrap();
        assert_eq!(records.get(&ScanId([1; 32])).unwrap(), Some(encoded(1)), "by its new copy");
    }
}
