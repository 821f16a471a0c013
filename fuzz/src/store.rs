//! The envelope of the store's values, which the library keeps to itself.

use oddscan::{
    domain::scan::ScanRecord,
    ledger::{Entry, SeenFile},
};

#[allow(dead_code)]
#[path = "../../src/store/record.rs"]
mod record;

mod error {
    use oddscan::domain::scan::ScanId;

    /// The one error that an envelope has.
    #[derive(Debug)]
    pub enum StoreError {
        Damaged { what: &'static str, scan: Option<ScanId> },
    }
}

/// Opens any bytes as an entry of the ledger, and as stored values, as they are and in an envelope.
pub(super) fn record(data: &[u8]) {
    if let Some(entry) = Entry::parse(data) {
        assert_eq!(Entry::parse(&entry.to_bytes()), Some(entry), "an entry is what was written");
    }
    for value in [data, &record::seal(data)] {
        if let Err(error::StoreError::Damaged { what, scan }) = record::unseal(value, "any", b"key")
        {
            assert_eq!((what, scan), ("any", None));
        }
        let scan = record::open_json::<ScanRecord>(value, "record", b"");
        if let Ok(scan) = scan {
            let again = record::open_json(&record::seal_json(&scan), "record", b"");
            assert_eq!(again.ok(), Some(scan), "a record is what was written");
        }
        let seen = record::open_json::<SeenFile>(value, "seen file", b"");
        if let Ok(seen) = seen {
            let again = record::open_json(&record::seal_json(&seen), "seen file", b"");
            assert_eq!(again.ok(), Some(seen), "a decision is what was written");
        }
    }
}
