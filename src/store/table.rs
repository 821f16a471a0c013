//! A table of the store, as its other files use it.

use std::{collections::VecDeque, sync::Arc};

use super::{
    error::StoreError,
    keeper::{Keeper, Value},
    kv::Name,
};

/// A table. Clones share it.
#[derive(Clone)]
pub(super) struct Table {
    name: Name,
    keeper: Arc<Keeper>,
}

impl Table {
    pub(super) fn new(name: Name, keeper: &Arc<Keeper>) -> Self {
        Self { name, keeper: Arc::clone(keeper) }
    }

    pub(super) fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Value>, StoreError> {
        self.keeper.get(self.name, key.as_ref())
    }

    pub(super) fn contains_key(&self, key: impl AsRef<[u8]>) -> Result<bool, StoreError> {
        Ok(self.get(key)?.is_some())
    }

    pub(super) fn insert(
        &self,
        key: impl AsRef<[u8]>,
        value: impl AsRef<[u8]>,
    ) -> Result<(), StoreError> {
        self.keeper.insert(self.name, key.as_ref(), value.as_ref())
    }

    /// Sets many values, in the order of their keys.
    pub(super) fn load(&self, entries: &[(Vec<u8>, Vec<u8>)]) -> Result<(), StoreError> {
        self.keeper.load(self.name, entries)
    }

    pub(super) fn remove(&self, key: impl AsRef<[u8]>) -> Result<(), StoreError> {
        self.keeper.remove(self.name, key.as_ref())
    }

    /// The first entry whose key is the given one or comes after it.
    pub(super) fn first_from(&self, from: &[u8]) -> Result<Option<(Vec<u8>, Value)>, StoreError> {
        Ok(self.keeper.entries_from(self.name, from, 1)?.pop())
    }

    /// All entries in the order of their keys. Entries may change meanwhile.
    pub(super) fn iter(&self) -> Entries<'_> {
        self.scan_prefix(b"")
    }

    /// As [`Table::iter`], of the keys that begin with the prefix.
    pub(super) fn scan_prefix(&self, prefix: impl AsRef<[u8]>) -> Entries<'_> {
        let prefix = prefix.as_ref().to_vec();
        Entries { table: self, read: VecDeque::new(), next: Some(prefix.clone()), prefix }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }
}

/// Number of entries that are read together.
const TOGETHER: usize = 16;

/// Entries of a table. It ends after an error.
pub(super) struct Entries<'t> {
    table: &'t Table,
    prefix: Vec<u8>,
    read: VecDeque<(Vec<u8>, Value)>,
    /// Where to read on, unless this was the end.
    next: Option<Vec<u8>>,
}

impl Iterator for Entries<'_> {
    type Item = Result<(Vec<u8>, Value), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.read.is_empty() {
            let from = self.next.take()?;
            match self.table.keeper.entries_from(self.table.name, &from, TOGETHER) {
                Ok(read) => self.read = read.into(),
                Err(error) => return Some(Err(error)),
            }
            // The next key after the last one in the order of bytes.
            let after = |(key, _): &(Vec<u8>, Value)| [&key[..], &[0]].concat();
            self.next = self.read.back().map(after);
        }
        let entry = self.read.pop_front()?;
        entry.0.starts_with(&self.prefix).then_some(Ok(entry))
    }
}
