//! Counts what is allocated. libFuzzer's own limits see the memory of the whole process, once a
//! second.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    process::abort,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use crate::targets::Target;

/// A target may take this much, whatever the size of its input, bytes. `ODDSCAN_FUZZ_MIB` sets
/// another limit, MiB.
const MAX_BYTES: usize = 300 << 20;

static TAKEN: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What the system's allocator takes for so many bytes.
fn chunk(n_bytes: usize) -> usize {
    (n_bytes + 8).next_multiple_of(16).max(32)
}

fn take(n_bytes: usize) {
    let n_bytes = chunk(n_bytes);
    let taken = TAKEN.fetch_add(n_bytes, Relaxed) + n_bytes;
    let limit = LIMIT.load(Relaxed);
    if taken > limit {
        // The message and the trace need memory, too.
        LIMIT.store(usize::MAX, Relaxed);
        eprintln!("{n_bytes} bytes more make {taken}, at most {limit} are allowed");
        abort();
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size);
        TAKEN.fetch_sub(chunk(layout.size()), Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        TAKEN.fetch_sub(chunk(layout.size()), Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(old, layout) }
    }
}

/// Runs a target, and aborts if it takes too much memory.
pub fn within_limit(data: &[u8], target: Target) {
    let mib = std::env::var("ODDSCAN_FUZZ_MIB").ok().and_then(|mib| mib.parse::<usize>().ok());
    let most = mib.map_or(MAX_BYTES, |mib| mib << 20);
    LIMIT.store(TAKEN.load(Relaxed) + most, Relaxed);
    target(data);
    LIMIT.store(usize::MAX, Relaxed);
}
