//! What the ledger reads back.

use oddscan::{
    domain::scan::ScanRecord,
    ledger::{Entry, SeenFile},
};

/// Any bytes as an entry of the ledger, and as the JSON of a record and of a decision.
pub(super) fn record(data: &[u8]) {
    if let Some(entry) = Entry::parse(data) {
        assert_eq!(Entry::parse(&entry.to_bytes()), Some(entry), "an entry is what was written");
    }
    if let Ok(record) = serde_json::from_slice::<ScanRecord>(data) {
        let json = serde_json::to_vec(&record).expect("JSON");
        let again = serde_json::from_slice::<ScanRecord>(&json);
        assert_eq!(again.ok(), Some(record), "a record is what was written");
    }
    if let Ok(seen) = serde_json::from_slice::<SeenFile>(data) {
        let json = serde_json::to_vec(&seen).expect("JSON");
        let again = serde_json::from_slice::<SeenFile>(&json);
        assert_eq!(again.ok(), Some(seen), "a decision is what was written");
    }
}
