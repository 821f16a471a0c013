//! A file per known scan: `<folder>/<scan id>`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    entry::Entry,
    error::{LedgerError, failed},
};
use crate::{
    domain::scan::{ScanId, ScanRecord},
    files::{self, steps},
};

/// Largest record, bytes. A usual one has 3 kB.
const MAX_BYTES: u64 = 16 << 20;

/// The records of all scans that oddscan knows.
#[derive(Debug)]
pub struct Ledger {
    folder: PathBuf,
    /// Number of the next entry.
    next_number: AtomicU64,
    /// Place of the next scan in the order of arrival.
    next_sequence: AtomicU64,
}

/// What a folder of records holds.
#[derive(Debug, Default, PartialEq)]
pub struct Loaded {
    /// Whole entries, in no order.
    pub entries: Vec<Entry>,
    /// Scans whose entry is damaged.
    pub damaged: Vec<ScanId>,
}

impl Ledger {
    /// Opens the ledger in `folder`. A missing folder is made with mode 0700.
    pub fn open(folder: &Path) -> Result<Self, LedgerError> {
        steps::make_private_folder(folder).map_err(failed("making the ledger's folder"))?;
        Ok(Self {
            folder: folder.to_owned(),
            next_number: AtomicU64::new(0),
            next_sequence: AtomicU64::new(0),
        })
    }

    /// Removes files that a kill left half-written. No other process may use the ledger.
    pub fn tidy_up(&self) -> Result<(), LedgerError> {
        files::remove_leftovers(&self.folder, |_| ()).map_err(failed("tidying up the ledger"))
    }

    /// Reads all entries. Call it before the first [`Ledger::put`], so that numbers continue.
    pub fn load(&self) -> Result<Loaded, LedgerError> {
        let mut loaded = Loaded::default();
        for entry in fs::read_dir(&self.folder).map_err(failed("listing the ledger"))? {
            let entry = entry.map_err(failed("listing the ledger"))?;
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(ScanId::from_hex) else { continue };
            match read(&entry.path())? {
                Some(found) if found.record.id == id => loaded.entries.push(found),
                _ => loaded.damaged.push(id),
            }
        }
        loaded.entries.iter().for_each(|entry| self.continue_after(entry));
        Ok(loaded)
    }

    /// Makes all later numbers larger than those of an entry.
    pub fn continue_after(&self, Entry { number, record }: &Entry) {
        self.next_number.fetch_max(number + 1, Ordering::Relaxed);
        self.next_sequence.fetch_max(record.sequence + 1, Ordering::Relaxed);
    }

    /// The record of a scan; `None` if there is none, or if it is damaged.
    pub fn record(&self, id: &ScanId) -> Result<Option<ScanRecord>, LedgerError> {
        let entry = read(&self.path(id))?.filter(|entry| entry.record.id == *id);
        Ok(entry.map(|entry| entry.record))
    }

    /// Writes a record, which is durable on return. Returns its entry as bytes, for a copy
    /// elsewhere.
    pub fn put(&self, record: &ScanRecord) -> Result<Vec<u8>, LedgerError> {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        self.restore(&Entry { number, record: record.clone() })
    }

    /// Writes an entry that a copy has kept. Returns its bytes.
    pub fn restore(&self, entry: &Entry) -> Result<Vec<u8>, LedgerError> {
        self.continue_after(entry);
        let bytes = entry.to_bytes();
        files::write_atomic(&self.path(&entry.record.id), &bytes)
            .map_err(failed("writing a record into the ledger"))?;
        Ok(bytes)
    }

    /// A number larger than those of all scans before.
    pub fn next_sequence(&self) -> u64 {
        self.next_sequence.fetch_add(1, Ordering::Relaxed)
    }

    /// The file of a scan's record.
    pub fn path(&self, id: &ScanId) -> PathBuf {
        self.folder.join(id.to_hex())
    }
}

/// An entry; `None` if there is none, or if it is damaged.
fn read(path: &Path) -> Result<Option<Entry>, LedgerError> {
    match files::read_small(path, MAX_BYTES) {
        Ok(bytes) => Ok(Entry::parse(&bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("reading a record of the ledger")(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::cohort::CohortKey;

    fn record(n: u8, sequence: u64) -> ScanRecord {
        let key = CohortKey { name: "t1w".into(), method: "m".into() };
        ScanRecord { sequence, ..ScanRecord::new(ScanId([n; 32]), key) }
    }

    fn put(ledger: &Ledger, record: &ScanRecord) -> Entry {
        Entry::parse(&ledger.put(record).unwrap()).unwrap()
    }

    #[test]
    fn records_come_back_and_numbers_continue_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("ledger");
        let ledger = Ledger::open(&at).unwrap();
        assert_eq!(ledger.load().unwrap(), Loaded::default());
        let first = put(&ledger, &record(1, ledger.next_sequence()));
        let second = put(&ledger, &record(2, ledger.next_sequence()));
        assert!(second.number > first.number && second.record.sequence > first.record.sequence);

        let ledger = Ledger::open(&at).unwrap();
        let mut loaded = ledger.load().unwrap();
        loaded.entries.sort_by_key(|entry| entry.number);
        assert_eq!(loaded.entries, [first.clone(), second.clone()]);
        assert_eq!(ledger.record(&ScanId([2; 32])).unwrap(), Some(second.record.clone()));
        assert_eq!(ledger.record(&ScanId([3; 32])).unwrap(), None);
        assert!(ledger.next_sequence() > second.record.sequence);
        assert!(put(&ledger, &first.record).number > second.number);
    }

    #[test]
    fn a_damaged_record_is_named_and_can_be_restored() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let entry = put(&ledger, &record(1, 0));
        let id = entry.record.id;
        fs::write(ledger.path(&id), &entry.to_bytes()[..50]).unwrap();

        let loaded = ledger.load().unwrap();
        assert_eq!((loaded.entries.len(), loaded.damaged), (0, vec![id]));
        assert_eq!(ledger.record(&id).unwrap(), None);
        ledger.restore(&entry).unwrap();
        assert_eq!(ledger.record(&id).unwrap(), Some(entry.record));
    }
}
