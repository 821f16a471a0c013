//! Long values, stored in chunks, and the search by key prefix that they need.

use super::{error::StoreError, keeper::Value, record, table::Table};

/// Largest value, bytes. A page of sled holds up to 17 values. A page of 128 KiB or more goes to a
/// separate file, which the cache counts as a few bytes. So with larger values the cache has no
/// limit (measured: 1.9 to 4.4 GB for 1.7 GB of data, with a capacity of 1 GiB).
pub(super) const CHUNK: usize = 7424;

/// Writes the bytes under the keys `prefix | chunk`, in chunks of nearly equal size. Each chunk
/// also holds the length of the whole, so that a missing chunk is noticed.
pub(super) fn put_blob(table: &Table, prefix: &[u8], bytes: &[u8]) -> Result<(), StoreError> {
    let n_chunks = bytes.len().div_ceil(CHUNK).max(1);
    let size = bytes.len().div_ceil(n_chunks).max(1);
    let entry = |index: usize| {
        let chunk = &bytes[(index * size).min(bytes.len())..((index + 1) * size).min(bytes.len())];
        let value = [&(bytes.len() as u64).to_be_bytes(), chunk].concat();
        (chunk_key(prefix, index), record::seal(&value))
    };
    let entries: Vec<_> = (0..n_chunks).map(entry).collect();
    if let [(key, value)] = &entries[..] { table.insert(key, value) } else { table.load(&entries) }
}

/// A long value, read chunk by chunk from its start.
///
/// Each chunk is looked up by its key. For a range of keys, sled would copy each page's list of
/// keys, and would report only one of sixteen values to its cache.
pub(super) struct Blob<'a> {
    table: &'a Table,
    prefix: Vec<u8>,
    what: &'static str,
    /// Length of the whole value, bytes.
    pub(super) length: u64,
    next: usize,
    /// The value that holds the current chunk, and where its unread part begins.
    chunk: Value,
    read: usize,
}

impl<'a> Blob<'a> {
    pub(super) fn open(
        table: &'a Table,
        prefix: Vec<u8>,
        what: &'static str,
    ) -> Result<Option<Self>, StoreError> {
        let Some(first) = table.get(chunk_key(&prefix, 0))? else { return Ok(None) };
        let length = open_chunk(&first, what, &prefix)?;
        let read = CHUNK_START;
        Ok(Some(Self { table, prefix, what, length, next: 1, chunk: first, read }))
    }

    /// Fills `room` with the next bytes of the value.
    pub(super) fn fill(&mut self, mut room: &mut [u8]) -> Result<(), StoreError> {
        loop {
            let unread = &self.chunk[self.read..];
            let n_bytes = room.len().min(unread.len());
            let (now, later) = room.split_at_mut(n_bytes);
            now.copy_from_slice(&unread[..n_bytes]);
            self.read += n_bytes;
            if later.is_empty() {
                return Ok(());
            }

            room = later;
            let value = self.table.get(chunk_key(&self.prefix, self.next))?;
            let value = value.ok_or_else(|| record::damaged(self.what, &self.prefix))?;
            let length = open_chunk(&value, self.what, &self.prefix)?;
            if length != self.length {
                return Err(record::damaged(self.what, &self.prefix));
            }
            (self.chunk, self.read) = (value, CHUNK_START);
            self.next += 1;
        }
    }
}

pub(super) fn chunk_key(prefix: &[u8], index: usize) -> Vec<u8> {
    [prefix, &(index as u32).to_be_bytes()].concat()
}

/// Where a stored chunk's own bytes begin: after the envelope and the length of the whole value.
const CHUNK_START: usize = record::HEADER + size_of::<u64>();

/// Checks a stored chunk. Returns the length of the whole value, bytes.
fn open_chunk(value: &[u8], what: &'static str, prefix: &[u8]) -> Result<u64, StoreError> {
    let payload = record::unseal(value, what, prefix)?;
    let length = payload.first_chunk().ok_or_else(|| record::damaged(what, prefix))?;
    Ok(u64::from_be_bytes(*length))
}

/// The ids that the keys of a table begin with. It jumps from one id to the next, because a walk
/// over all keys would read all data.
pub(super) fn first_ids(table: &Table) -> Result<Vec<Vec<u8>>, StoreError> {
    let mut ids: Vec<Vec<u8>> = Vec::new();
    let mut next = table.first_from(b"")?;

    while let Some((key, _)) = next {
        let id = key[..key.len().min(32)].to_vec();
        // After its id, a key has at most a direction, an id, a grid and a chunk: fewer than 48
        // bytes.
        next = table.first_from(&[&id[..], &[0xff; 48]].concat())?;
        ids.push(id);
    }
    Ok(ids)
}

pub(super) fn remove_prefix(table: &Table, prefix: &[u8]) -> Result<(), StoreError> {
    for entry in table.scan_prefix(prefix) {
        table.remove(entry?.0)?;
    }
    Ok(())
}
