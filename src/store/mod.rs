//! Tokens, pair columns and the journal in sled: everything that knows `sled`.
//!
//! Values are small, because sled puts pages of large ones into files of their own, which its cache
//! does not count, and values of 128 KiB into files that it never frees (measured: four times the
//! live data on disk after a few turns of the window, and growing). Long values are cut into
//! chunks; the manifest that makes them count is written after them, in one transaction with the
//! journal entry, and flushed before anyone acts on it.

mod blob;
mod columns;
mod db;
mod error;
mod journal;
mod key;
mod record;
mod seen;
mod tokens;

pub use db::{MIN_MEMORY, Store};
pub use error::{FORMAT, StoreError};
pub use seen::{SeenFile, SeenOutcome};

/// Makes all threads share one heap; to be called before there are any.
///
/// glibc gives threads heaps of their own, and sled's cache wanders from one to the next: whatever
/// thread reads fills its heap, and what is let go stays in another. Measured with 120 scans and a
/// budget of 256 MiB on two cores: 489 MiB with heaps per thread, 251 with one, in about the same
/// processor time.
pub fn share_one_heap() {
    // SAFETY: one number is set; nothing is read or freed.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

#[cfg(test)]
mod tests;
