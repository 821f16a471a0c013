//! redb behind the store's trait. Every change is a transaction that is not durable before a flush.

use std::{error::Error, fs, ops::Deref, path::{Path, PathBuf}};

use redb::{Database, Durability, ReadableDatabase, TableDefinition, WriteTransaction};

use crate::store::kv::{Entries, KeyValue, KvError, Name};

type Table = TableDefinition<'static, &'static [u8], &'static [u8]>;

const TABLES: [Table; Name::ALL.len()] = [
    TableDefinition::new("facts"),
    TableDefinition::new("copies"),
    TableDefinition::new("manifests"),
    TableDefinition::new("chunks"),
    TableDefinition::new("columns"),
    TableDefinition::new("journal"),
    TableDefinition::new("seen"),
];

pub struct Redb {
    db: Database,
    file: PathBuf,
}

type Any = Box<dyn Error + Send + Sync>;

impl Redb {
    pub fn open(folder: &Path, cache: u64) -> Self {
        let file = folder.join("redb");
        let db = Database::builder().set_cache_size(cache as usize).create(&file).unwrap();
        let transaction = db.begin_write().unwrap();
        TABLES.iter().for_each(|&table| drop(transaction.open_table(table).unwrap()));
        transaction.commit().unwrap();
        Self { db, file }
    }

    fn change(
        &self,
        durability: Durability,
        change: impl FnOnce(&WriteTransaction) -> Result<(), Any>,
    ) -> Result<(), KvError> {
        let run = || {
            let mut transaction = self.db.begin_write()?;
            transaction.set_durability(durability)?;
            change(&transaction)?;
            Ok(transaction.commit()?)
        };
        run().map_err(KvError::Damaged)
    }
}

impl KeyValue for Redb {
    type Value = Vec<u8>;

    fn get(&self, table: Name, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        let run = || -> Result<_, Any> {
            let table = self.db.begin_read()?.open_table(TABLES[table as usize])?;
            Ok(table.get(key)?.map(|value| value.value().to_vec()))
        };
        run().map_err(KvError::Damaged)
    }

    fn entries_from(
        &self,
        table: Name,
        from: &[u8],
        at_most: usize,
    ) -> Result<Entries<Vec<u8>>, KvError> {
        let run = || -> Result<_, Any> {
            let table = self.db.begin_read()?.open_table(TABLES[table as usize])?;
            let mut entries = Vec::new();
            for entry in table.range(from..)?.take(at_most) {
                let (key, value) = entry?;
                entries.push((key.value().to_vec(), value.value().to_vec()));
            }
            Ok(entries)
        };
        run().map_err(KvError::Damaged)
    }

    fn insert(&self, table: Name, key: &[u8], value: &[u8]) -> Result<(), KvError> {
        self.change(Durability::None, |transaction| {
            transaction.open_table(TABLES[table as usize])?.insert(key, value)?;
            Ok(())
        })
    }

    fn load<V: Deref<Target = [u8]>>(
        &self,
        table: Name,
        entries: &[(Vec<u8>, V)],
    ) -> Result<(), KvError> {
        self.change(Durability::None, |transaction| {
            let mut table = transaction.open_table(TABLES[table as usize])?;
            for (key, value) in entries {
                table.insert(&key[..], &value[..])?;
            }
            Ok(())
        })
    }

    fn remove(&self, table: Name, key: &[u8]) -> Result<(), KvError> {
        self.change(Durability::None, |transaction| {
            transaction.open_table(TABLES[table as usize])?.remove(key)?;
            Ok(())
        })
    }

    fn flush(&self) -> Result<(), KvError> {
        self.change(Durability::Immediate, |_| Ok(()))
    }

    fn size_on_disk(&self) -> Result<u64, KvError> {
        Ok(fs::metadata(&self.file).map_err(KvError::Io)?.len())
    }
}
