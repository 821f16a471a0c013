//! One record as bytes: a line with a number and a checksum, then the record as JSON.
//!
//! `oddscan/ledger/1 <number> <SHA-256 of number, space and JSON, hex>`

use sha2::{Digest, Sha256};

use crate::domain::scan::ScanRecord;

const SCHEMA: &str = "oddscan/ledger/1";

/// A record, and how many records the ledger had written before. Of two whole entries of one scan
/// the one with the larger number is the newer.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Grows with every record that the ledger writes.
    pub number: u64,
    /// The record.
    pub record: ScanRecord,
}

impl Entry {
    /// The entry as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let json = serde_json::to_vec_pretty(&self.record).expect("our own types become JSON");
        let head = format!("{SCHEMA} {} {}\n", self.number, checksum(self.number, &json));
        [head.as_bytes(), &json, b"\n"].concat()
    }

    /// Reads what [`Entry::to_bytes`] wrote; `None` if a byte of it has changed.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let end = bytes.iter().position(|&byte| byte == b'\n')?;
        let head = std::str::from_utf8(&bytes[..end]).ok()?;
        let json = bytes[end + 1..].strip_suffix(b"\n")?;

        let [schema, number, sum] = head.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let number: u64 = number.parse().ok()?;
        let is_whole = schema == SCHEMA && sum == checksum(number, json);
        let record = is_whole.then(|| serde_json::from_slice(json))?.ok()?;
        Some(Self { number, record })
    }
}

fn checksum(number: u64, json: &[u8]) -> String {
    hex::encode(Sha256::new().chain_update(format!("{number} ")).chain_update(json).finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{cohort::CohortKey, scan::ScanId};

    #[test]
    fn an_entry_comes_back_and_a_changed_byte_shows() {
        let key = CohortKey { name: "t1w".into(), method: "m".into() };
        let entry = Entry { number: 12, record: ScanRecord::new(ScanId([7; 32]), key) };
        let bytes = entry.to_bytes();
        assert_eq!(Entry::parse(&bytes), Some(entry));
        for position in 0..bytes.len() {
            for bit in [1, 0x20] {
                let mut changed = bytes.clone();
                changed[position] ^= bit;
                assert_eq!(Entry::parse(&changed), None, "bit {bit} of byte {position}");
            }
            assert_eq!(Entry::parse(&bytes[..position]), None, "cut at {position}");
        }
    }
}
