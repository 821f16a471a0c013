//! Turns a window in each database behind the store's trait, and prints a line after some turns:
//! disk and live data, seconds, resident memory. At the end it opens the database again.
//!
//! `stores <sled|sled-copied|fjall|redb> <folder> <scans> <turns>`. `sled-copied` copies the live
//! entries into a new database above 1.6 times the live data, as oddscan does.

#[path = "fjall.rs"]
mod fjall_kv;
#[path = "redb.rs"]
mod redb_kv;
#[path = "../../../src/store"]
mod store {
    pub mod kv;
    pub mod sled;
}

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Instant,
};

use fjall_kv::Fjall;
use redb_kv::Redb;
use store::{
    kv::{KeyValue, Name},
    sled::Sled,
};

/// Memory for pages, bytes.
const CACHE: u64 = 256 << 20;

/// About 1 MB of tokens for a scan, in chunks of the store's size.
const N_CHUNKS: u32 = 140;
const CHUNK: usize = 7424;

/// Bytes of a column: the distances of 1,800 tokens.
const COLUMN: usize = 7200;

fn main() {
    let arguments: Vec<String> = env::args().collect();
    let [_, what, folder, scans, turns] = &arguments[..] else {
        panic!("stores <sled|sled-copied|fjall|redb> <folder> <scans> <turns>")
    };
    let (scans, turns) = (scans.parse().unwrap(), turns.parse().unwrap());
    let run = Run { folder: PathBuf::from(folder).join(what), scans, turns, copies: false };
    match what.as_str() {
        "sled" => run.go(|folder| Sled::open(folder, CACHE).unwrap()),
        "sled-copied" => Run { copies: true, ..run }.go(|folder| Sled::open(folder, CACHE).unwrap()),
        "fjall" => run.go(|folder| Fjall::open(folder, CACHE)),
        "redb" => run.go(|folder| Redb::open(folder, CACHE)),
        other => panic!("no such database: {other}"),
    }
}

struct Run {
    folder: PathBuf,
    scans: u32,
    turns: u32,
    copies: bool,
}

impl Run {
    fn go<K: KeyValue>(&self, open: impl Fn(&Path) -> K) {
        fs::remove_dir_all(&self.folder).ok();
        fs::create_dir_all(&self.folder).unwrap();
        let (mut kv, begun) = (open(&self.folder), Instant::now());
        let (mut worst, mut n_copies) = (0.0_f64, 0);
        for n in 0..self.scans * self.turns {
            join(&kv, n, self.scans);
            if n >= self.scans {
                leave(&kv, n - self.scans, self.scans);
            }

            let live = self.live(n + 1);
            if self.copies && kv.size_on_disk().unwrap() as f64 > 1.6 * live {
                kv = self.copied(kv, &open);
                n_copies += 1;
            }
            let ratio = kv.size_on_disk().unwrap() as f64 / live;
            if n >= 2 * self.scans {
                worst = worst.max(ratio);
            }
            let turn = (n + 1) / self.scans;
            if (n + 1) % self.scans == 0 && [5, 20, 60, 200].contains(&turn) {
                println!(
                    "turn {turn}: {ratio:.2} times {:.0} MB live, worst {worst:.2}, {n_copies} copies, \
                     {:.1} s, {} MiB resident",
                    live / 1e6,
                    begun.elapsed().as_secs_f64(),
                    resident() >> 10,
                );
            }
        }
        kv.flush().unwrap();
        drop(kv);

        let begun = Instant::now();
        let kv = open(&self.folder);
        let key = chunk_key(self.scans * self.turns - 1, N_CHUNKS - 1);
        assert_eq!(&kv.get(Name::Chunks, &key).unwrap().unwrap()[..], &bytes(&key, CHUNK)[..]);
        println!("opened in {:.2} s", begun.elapsed().as_secs_f64());
        drop(kv);
        fs::remove_dir_all(&self.folder).unwrap();
    }

    /// Bytes of values after this many scans: tokens of the members, and two columns for each pair.
    fn live(&self, n_scans: u32) -> f64 {
        let n = f64::from(n_scans.min(self.scans));
        n * f64::from(N_CHUNKS) * CHUNK as f64 + n * (n - 1.0) * COLUMN as f64
    }

    fn copied<K: KeyValue>(&self, kv: K, open: &impl Fn(&Path) -> K) -> K {
        let next = self.folder.with_extension("next");
        fs::create_dir_all(&next).unwrap();
        let copy = open(&next);
        for table in Name::ALL {
            let mut from = Vec::new();
            loop {
                let entries = kv.entries_from(table, &from, 256).unwrap();
                let Some((last, _)) = entries.last() else { break };
                from = [&last[..], &[0]].concat();
                copy.load(table, &entries).unwrap();
            }
        }
        copy.flush().unwrap();
        drop(kv);
        fs::remove_dir_all(&self.folder).unwrap();
        fs::rename(&next, &self.folder).unwrap();
        copy
    }
}

/// A scan joins: its tokens, and two columns to each other member.
fn join(kv: &impl KeyValue, n: u32, scans: u32) {
    let chunk = |index| {
        let key = chunk_key(n, index);
        let value = bytes(&key, CHUNK);
        (key, value)
    };
    let chunks: Vec<_> = (0..N_CHUNKS).map(chunk).collect();
    kv.load(Name::Chunks, &chunks).unwrap();
    kv.insert(Name::Manifests, &id(n), b"a manifest").unwrap();
    kv.flush().unwrap();
    for other in n.saturating_sub(scans)..n {
        for way in [0, 1] {
            let key = column_key(n, way, other);
            kv.insert(Name::Columns, &key, &bytes(&key, COLUMN)).unwrap();
        }
    }
}

/// A scan leaves: its tokens, and all columns from and to it.
fn leave(kv: &impl KeyValue, n: u32, scans: u32) {
    kv.remove(Name::Manifests, &id(n)).unwrap();
    kv.flush().unwrap();
    for index in 0..N_CHUNKS {
        kv.remove(Name::Chunks, &chunk_key(n, index)).unwrap();
    }
    let others = (n.saturating_sub(scans)..n).map(|other| (n, other));
    for (later, earlier) in others.chain((n + 1..=n + scans).map(|other| (other, n))) {
        for way in [0, 1] {
            kv.remove(Name::Columns, &column_key(later, way, earlier)).unwrap();
        }
    }
}

/// An id that is spread like a hash.
fn id(n: u32) -> [u8; 32] {
    let mut id = [7; 32];
    id[..4].copy_from_slice(&n.wrapping_mul(2_654_435_761).to_be_bytes());
    id
}

fn chunk_key(n: u32, index: u32) -> Vec<u8> {
    [&id(n)[..], &index.to_be_bytes()].concat()
}

fn column_key(n: u32, way: u8, other: u32) -> Vec<u8> {
    [&id(n)[..], &[way], &id(other)].concat()
}

/// Bytes that no database can compress.
fn bytes(key: &[u8], n_bytes: usize) -> Vec<u8> {
    let mut state = key.iter().fold(0x9E37_79B9_7F4A_7C15_u64, |state, &byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    let mut bytes = Vec::with_capacity(n_bytes + 8);
    while bytes.len() < n_bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(n_bytes);
    bytes
}

/// Resident memory of this process, KiB.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
