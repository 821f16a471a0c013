//! The envelope of every value: a version byte, a checksum and the payload.

use serde::{Serialize, de::DeserializeOwned};

use super::error::StoreError;
use crate::domain::scan::ScanId;

const VERSION: u8 = 1;
/// Bytes before the payload.
pub(super) const HEADER: usize = 5;

/// The payload in its envelope.
pub(super) fn seal(payload: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(HEADER + payload.len());
    value.push(VERSION);
    value.extend(crc32fast::hash(payload).to_be_bytes());
    value.extend(payload);
    value
}

/// The payload of a value; an error if version or checksum is wrong.
pub(super) fn unseal<'v>(
    value: &'v [u8],
    what: &'static str,
    key: &[u8],
) -> Result<&'v [u8], StoreError> {
    let whole = value.len() >= HEADER && value[0] == VERSION && {
        let sum = crc32fast::hash(&value[HEADER..]);
        value[1..HEADER] == sum.to_be_bytes()
    };
    whole.then(|| &value[HEADER..]).ok_or_else(|| damaged(what, key))
}

/// A value as JSON in its envelope.
pub(super) fn seal_json(value: &impl Serialize) -> Vec<u8> {
    seal(&serde_json::to_vec(value).expect("our own types become JSON"))
}

/// The reverse of [`seal_json`].
pub(super) fn open_json<T: DeserializeOwned>(
    value: &[u8],
    what: &'static str,
    key: &[u8],
) -> Result<T, StoreError> {
    serde_json::from_slice(unseal(value, what, key)?).map_err(|_| damaged(what, key))
}

/// The error for a value that is missing or not as it was written.
pub(super) fn damaged(what: &'static str, key: &[u8]) -> StoreError {
    StoreError::Damaged { what, scan: key.first_chunk().map(|&id| ScanId(id)) }
}
