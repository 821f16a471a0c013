//! Copies of the ledger's entries, from which a damaged file of the ledger is restored. What they
//! say is not known here.

use super::{blob::remove_prefix, db::Store, error::StoreError, record};
use crate::domain::scan::ScanId;

/// What a store of format 2 knew beside tokens and columns, as JSON.
#[derive(Debug, Default)]
pub struct OldRecords {
    /// A record per scan.
    pub records: Vec<Vec<u8>>,
    /// Decisions about files, by their path below the incoming folder.
    pub seen: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Store {
    /// Keeps a copy of a scan's entry. It is not flushed: the entry itself is durable.
    pub fn put_copy(&self, id: &ScanId, entry: &[u8]) -> Result<(), StoreError> {
        self.copies.insert(id.0, record::seal(entry))?;
        Ok(())
    }

    /// The copy of a scan's entry; `None` if there is none or it is damaged.
    pub fn copy(&self, id: &ScanId) -> Result<Option<Vec<u8>>, StoreError> {
        let value = self.copies.get(id.0)?;
        Ok(value.and_then(|value| Some(record::unseal(&value, "copy", &id.0).ok()?.to_vec())))
    }

    /// All copies that are whole.
    pub fn copies(&self) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut copies = Vec::new();
        for entry in self.copies.iter() {
            let (key, value) = entry?;
            copies.extend(record::unseal(&value, "copy", &key).ok().map(<[u8]>::to_vec));
        }
        Ok(copies)
    }

    /// What a store of format 2 knew, if this is one. Damaged entries are left out.
    pub fn old_records(&self) -> Result<Option<OldRecords>, StoreError> {
        if !self.is_old()? {
            return Ok(None);
        }
        let mut old = OldRecords::default();
        for entry in self.old_journal.iter() {
            let (key, value) = entry?;
            old.records.extend(record::unseal(&value, "journal", &key).ok().map(<[u8]>::to_vec));
        }
        for entry in self.old_seen.iter() {
            let (path, value) = entry?;
            let seen = record::unseal(&value, "seen file", &path).ok().map(<[u8]>::to_vec);
            old.seen.extend(seen.map(|seen| (path, seen)));
        }
        Ok(Some(old))
    }

    /// Makes a store of format 2 one of the current format, once its records are elsewhere.
    pub fn drop_old_records(&self) -> Result<(), StoreError> {
        self.note_format()?;
        for table in [&self.old_journal, &self.old_seen] {
            remove_prefix(table, b"")?;
        }
        self.flush()
    }
}
