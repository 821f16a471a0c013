//! Long values, stored in chunks, and the search by key prefix that they need.

use sled::{IVec, Tree};

use super::{error::StoreError, record};

/// Largest value, bytes. A page of sled holds up to 17 values. A page of 128 KiB or more goes to a
/// separate file, which the cache counts as a few bytes. So with larger values the cache has no
/// limit (measured: 1.9 to 4.4 GB for 1.7 GB of data, with a capacity of 1 GiB).
pub(super) const CHUNK: usize = 7424;

/// Writes the bytes under the keys `prefix | chunk`, in chunks of nearly equal size. Each chunk
/// also holds the length of the whole, so that a missing chunk is noticed.
pub(super) fn put_blob(tree: &Tree, prefix: &[u8], bytes: &[u8]) -> Result<(), StoreError> {
    let n_chunks = bytes.len().div_ceil(CHUNK).max(1);
    let size = bytes.len().div_ceil(n_chunks).max(1);
    for index in 0..n_chunks {
        let chunk = &bytes[(index * size).min(bytes.len())..((index + 1) * size).min(bytes.len())];
        let value = [&(bytes.len() as u64).to_be_bytes(), chunk].concat();
        tree.insert(chunk_key(prefix, index), record::seal(&value))?;
    }
    Ok(())
}

/// A long value, read chunk by chunk from its start.
///
/// Each chunk is looked up by its key. For a range of keys, sled would copy each page's list of
/// keys, and would report only one of sixteen values to its cache.
pub(super) struct Blob<'a> {
    tree: &'a Tree,
    prefix: Vec<u8>,
    what: &'static str,
    /// Length of the whole value, bytes.
    pub(super) length: u64,
    next: usize,
    /// The unread part of the current chunk.
    chunk: IVec,
}

impl<'a> Blob<'a> {
    pub(super) fn open(
        tree: &'a Tree,
        prefix: Vec<u8>,
        what: &'static str,
    ) -> Result<Option<Self>, StoreError> {
        let Some(first) = tree.get(chunk_key(&prefix, 0))? else { return Ok(None) };
        let (length, chunk) = open_chunk(&first, what, &prefix)?;
        Ok(Some(Self { tree, prefix, what, length, next: 1, chunk }))
    }

    /// Fills `room` with the next bytes of the value.
    pub(super) fn fill(&mut self, mut room: &mut [u8]) -> Result<(), StoreError> {
        loop {
            let n_bytes = room.len().min(self.chunk.len());
            let (now, later) = room.split_at_mut(n_bytes);
            now.copy_from_slice(&self.chunk[..n_bytes]);
            self.chunk = self.chunk.subslice(n_bytes, self.chunk.len() - n_bytes);
            if later.is_empty() {
                return Ok(());
            }

            room = later;
            let value = self.tree.get(chunk_key(&self.prefix, self.next))?;
            let value = value.ok_or_else(|| record::damaged(self.what, &self.prefix))?;
            self.chunk = open_chunk(&value, self.what, &self.prefix)?.1;
            self.next += 1;
        }
    }
}

pub(super) fn chunk_key(prefix: &[u8], index: usize) -> Vec<u8> {
    [prefix, &(index as u32).to_be_bytes()].concat()
}

/// Splits a stored chunk into the length of the whole value and the chunk's own bytes.
pub(super) fn open_chunk(
    value: &IVec,
    what: &'static str,
    prefix: &[u8],
) -> Result<(u64, IVec), StoreError> {
    let payload = record::unseal(value, what, prefix)?;
    let (length, chunk) =
        payload.split_first_chunk().ok_or_else(|| record::damaged(what, prefix))?;
    let chunk = value.subslice(value.len() - chunk.len(), chunk.len());
    Ok((u64::from_be_bytes(*length), chunk))
}

/// The ids that the keys of a tree begin with. It jumps from one id to the next, because a walk
/// over all keys would read all data.
pub(super) fn first_ids(tree: &Tree) -> Result<Vec<IVec>, StoreError> {
    let mut ids: Vec<IVec> = Vec::new();
    let mut next = tree.first()?;

    while let Some((key, _)) = next {
        let id = key.subslice(0, 32);
        // After its id, a key has at most a direction, an id, a grid and a chunk: fewer than 48
        // bytes.
        next = tree.get_gt([&id[..], &[0xff; 48]].concat())?;
        ids.push(id);
    }
    Ok(ids)
}

pub(super) fn remove_prefix(tree: &Tree, prefix: &[u8]) -> Result<(), StoreError> {
    for key in tree.scan_prefix(prefix).keys() {
        tree.remove(key?)?;
    }
    Ok(())
}
