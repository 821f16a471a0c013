//! What the store needs of a database: named tables of keys and values, in the order of the keys.
//!
//! sled is the one in use. `benches/stores` measures others through the same trait, so that the
//! choice can be made again with figures.

use std::{error::Error, io, ops::Deref};

/// A table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// Facts about the store itself: its format, how its columns were made.
    Facts,
    /// Copies of the ledger's entries.
    Copies,
    /// What makes the tokens of a scan valid.
    Manifests,
    /// Tokens, in chunks.
    Chunks,
    /// Distances, in chunks.
    Columns,
    /// One record per scan, in stores of format 2.
    Journal,
    /// Decisions about files, in stores of format 2.
    Seen,
}

impl Name {
    /// All tables, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::Facts,
        Self::Copies,
        Self::Manifests,
        Self::Chunks,
        Self::Columns,
        Self::Journal,
        Self::Seen,
    ];
}

/// Entries of a table: keys and values, in the order of the keys.
pub type Entries<V> = Vec<(Vec<u8>, V)>;

/// Why a database failed.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// Its files are not as they were written.
    #[error("the files of the store are damaged")]
    Damaged(#[source] Box<dyn Error + Send + Sync>),
    /// Another process has it open.
    #[error("another process has the store open")]
    InUse(#[source] io::Error),
    /// The system refuses to read or write.
    #[error("the system refuses to read or write the files of the store")]
    Io(#[source] io::Error),
    /// Another version of the database wrote the files.
    #[error("the files of the store are of another version")]
    Version(#[source] Box<dyn Error + Send + Sync>),
}

/// A database. Keys are ordered by their bytes.
///
/// # Errors
/// Every call fails with [`KvError`]. A damaged value is an error, never a missing value.
pub trait KeyValue: Send + Sync + Sized {
    /// The bytes of a value, without a copy if the database can.
    type Value: Deref<Target = [u8]> + Clone + Send + Sync;

    /// The value of a key.
    fn get(&self, table: Name, key: &[u8]) -> Result<Option<Self::Value>, KvError>;

    /// The first entries, at most this many, whose keys are the given one or come after it.
    fn entries_from(
        &self,
        table: Name,
        from: &[u8],
        at_most: usize,
    ) -> Result<Entries<Self::Value>, KvError>;

    /// Sets the value of a key.
    fn insert(&self, table: Name, key: &[u8], value: &[u8]) -> Result<(), KvError>;

    /// Inserts many entries, in the order of their keys. Until it returns, they may have
    /// empty values.
    fn load<V: Deref<Target = [u8]>>(
        &self,
        table: Name,
        entries: &[(Vec<u8>, V)],
    ) -> Result<(), KvError>;

    /// Removes a key, which may be missing.
    fn remove(&self, table: Name, key: &[u8]) -> Result<(), KvError>;

    /// Makes everything durable that was written before.
    fn flush(&self) -> Result<(), KvError>;

    /// Bytes on disk.
    fn size_on_disk(&self) -> Result<u64, KvError>;
}
