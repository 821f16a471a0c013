//! Turns burn's panics after a failure of the device into errors.
//!
//! burn 0.21 panics. A failed allocation panics in the thread that serves the device, and cubecl
//! catches that panic. The caller then finds a missing buffer or a closed channel, without a word
//! about memory. So a hook records the panics of those threads.

use std::{
    any::Any,
    fmt::Display,
    panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook},
    sync::{Mutex, MutexGuard, Once, PoisonError},
    thread,
};

use crate::domain::error::DeviceError;

/// Runs `work` for a batch of `batch` images on `device`. A panic or an error becomes a
/// [`DeviceError`].
///
/// After a panic, values that `work` borrows mutably must be valid, or must not be used again.
pub(in crate::compute) fn guarded<T, E: Display>(
    device: &str,
    batch: usize,
    work: impl FnOnce() -> Result<T, E>,
) -> Result<T, DeviceError> {
    listen_to_device_threads();
    let before = overheard().counts();
    let message = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic_text(&*panic),
    };
    let after = overheard();
    let (n_panics, n_of_memory) = after.counts();
    if n_of_memory > before.1 || speaks_of_memory(&message) {
        return Err(DeviceError::OutOfMemory { batch });
    }
    let cause = if n_panics > before.0 { &after.last } else { &message };
    Err(DeviceError::Failed { device: device.to_owned(), message: shortened(cause) })
}

/// Panics of the threads that serve devices. If two threads use a device at the same time, a
/// failure of one can count for the other, too. Both then try a smaller batch.
#[derive(Default)]
struct Overheard {
    n_panics: u64,
    n_of_memory: u64,
    last: String,
}

impl Overheard {
    fn counts(&self) -> (u64, u64) {
        (self.n_panics, self.n_of_memory)
    }

    fn note(&mut self, text: String) {
        self.n_panics += 1;
        self.n_of_memory += u64::from(speaks_of_memory(&text));
        self.last = text;
    }
}

fn overheard() -> MutexGuard<'static, Overheard> {
    static OVERHEARD: Mutex<Overheard> =
        Mutex::new(Overheard { n_panics: 0, n_of_memory: 0, last: String::new() });
    OVERHEARD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Installs a panic hook that also calls the present one.
fn listen_to_device_threads() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let next = take_hook();
        set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            if thread::current().name().is_some_and(serves_a_device) {
                overheard().note(panic_text(info.payload()));
            }
            next(info);
        }));
    });
}

/// Whether a thread serves a device. cubecl 0.10 names such threads `DSU-<type>-<index>` and
/// `DSD-<type>-<index>`.
fn serves_a_device(thread: &str) -> bool {
    thread.starts_with("DSU-") || thread.starts_with("DSD-")
}

/// Whether an error is about memory: cubecl's `BufferTooBig` ("can't allocate buffer of size") and
/// `OutOfMemory`, CUDA's `CUDA_ERROR_OUT_OF_MEMORY`, or "out of memory" in words.
fn speaks_of_memory(text: &str) -> bool {
    let text = text.to_lowercase().replace(['_', '-'], " ");
    ["out of memory", "outofmemory", "allocate buffer", "buffertoobig", "allocation error"]
        .iter()
        .any(|words| text.contains(words))
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without a text")
        .to_owned()
}

/// The text in one line, without cubecl's backtrace.
fn shortened(text: &str) -> String {
    const LIMIT: usize = 300;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let kept = lines.take_while(|line| !line.to_lowercase().starts_with("backtrace"));
    let line = kept.collect::<Vec<_>>().join(" ");
    line.chars().take(LIMIT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(work: impl FnOnce() -> Result<(), String>) -> DeviceError {
        guarded("cuda:0", 32, work).unwrap_err()
    }

    #[test]
    fn a_panic_that_speaks_of_memory_is_out_of_memory_with_its_batch() {
        for text in [
            "called `Result::unwrap()` on an `Err` value: can't allocate buffer of size: 9000",
            "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
            "An out-of-memory error happened during launch",
        ] {
            let panicked = failure(|| panic!("{text}"));
            assert!(matches!(panicked, DeviceError::OutOfMemory { batch: 32 }), "{text}");
            let returned = failure(|| Err(text.to_owned()));
            assert!(matches!(returned, DeviceError::OutOfMemory { batch: 32 }), "{text}");
        }
    }

    #[test]
    fn any_other_panic_names_the_device_and_what_was_said() {
        let error = failure(|| panic!("illegal address\nBacktrace:\n  0: main"));
        assert_eq!(error.to_string(), "the device cuda:0 failed: illegal address");
    }

    #[test]
    fn memory_that_ran_out_in_the_device_thread_is_not_taken_for_a_lost_buffer() {
        let error = failure(|| {
            let server = thread::Builder::new().name("DSU-0-0".into());
            let server = server.spawn(|| panic!("can't allocate buffer of size: 9000")).unwrap();
            server.join().unwrap_err();
            Err("couldn't find resource for that handle".into())
        });
        assert!(matches!(error, DeviceError::OutOfMemory { batch: 32 }), "{error}");
    }
}
