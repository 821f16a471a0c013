//! Tokens and columns in a database of keys and values. It is a cache: all of it can be computed
//! again from the archived sources.
//!
//! `kv.rs` says what the database must do. `sled.rs` is the one in use, and the only place that
//! knows `sled`.
//!
//! Values are small. sled puts pages of large values into separate files, which its cache does not
//! count. It puts values of 128 KiB into files that it never frees (measured: four times the live
//! data on disk after a few turns of the window, and growing).
//!
//! Long values are cut into chunks. Their manifest, which makes them valid, is written after them.

mod blob;
mod columns;
mod compact;
mod copies;
mod db;
mod error;
mod keeper;
mod key;
mod kv;
mod open;
mod place;
mod record;
mod sled;
mod table;
mod tokens;

pub use compact::Compaction;
pub use copies::OldRecords;
pub use db::{MIN_MEMORY, Store};
pub use error::{FORMAT, StoreError};
pub use open::Opened;

/// Makes all threads share one heap. Call it before any thread starts.
///
/// glibc gives each thread its own heap. sled's cache then fills the heap of every thread that
/// reads, while the memory that it frees stays in another heap. Measured with 120 scans and a
/// budget of 256 MiB on two cores: 489 MiB with a heap per thread, 251 MiB with one heap, in about
/// the same processor time.
pub fn share_one_heap() {
    // SAFETY: the call sets one number; it reads and frees nothing.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

#[cfg(test)]
mod tests;
