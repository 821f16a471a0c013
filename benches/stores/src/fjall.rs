//! fjall behind the store's trait.

use std::{ops::Deref, path::Path};

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode, Slice};

use crate::store::kv::{Entries, KeyValue, KvError, Name};

pub struct Fjall {
    db: Database,
    tables: Vec<Keyspace>,
}

impl Fjall {
    pub fn open(folder: &Path, cache: u64) -> Self {
        let db = Database::builder(folder).cache_size(cache).open().unwrap();
        let open = |name: &Name| {
            db.keyspace(&format!("{name:?}"), KeyspaceCreateOptions::default).unwrap()
        };
        Self { tables: Name::ALL.iter().map(open).collect(), db }
    }

    fn table(&self, name: Name) -> &Keyspace {
        &self.tables[name as usize]
    }
}

fn failed(error: fjall::Error) -> KvError {
    KvError::Damaged(error.into())
}

impl KeyValue for Fjall {
    type Value = Slice;

    fn get(&self, table: Name, key: &[u8]) -> Result<Option<Slice>, KvError> {
        self.table(table).get(key).map_err(failed)
    }

    fn entries_from(
        &self,
        table: Name,
        from: &[u8],
        at_most: usize,
    ) -> Result<Entries<Slice>, KvError> {
        let entries = self.table(table).range(from..).take(at_most);
        entries
            .map(|entry| entry.into_inner().map(|(key, value)| (key.to_vec(), value)))
            .collect::<Result<_, _>>()
            .map_err(failed)
    }

    fn insert(&self, table: Name, key: &[u8], value: &[u8]) -> Result<(), KvError> {
        self.table(table).insert(key, value).map_err(failed)
    }

    fn load<V: Deref<Target = [u8]>>(
        &self,
        table: Name,
        entries: &[(Vec<u8>, V)],
    ) -> Result<(), KvError> {
        let mut batch = self.db.batch();
        for (key, value) in entries {
            batch.insert(self.table(table), &key[..], &value[..]);
        }
        batch.commit().map_err(failed)
    }

    fn remove(&self, table: Name, key: &[u8]) -> Result<(), KvError> {
        self.table(table).remove(key).map_err(failed)
    }

    fn flush(&self) -> Result<(), KvError> {
        self.db.persist(PersistMode::SyncData).map_err(failed)
    }

    fn size_on_disk(&self) -> Result<u64, KvError> {
        self.db.disk_space().map_err(failed)
    }
}
