//! Joins libFuzzer with the targets, and limits the memory that a target may take.

mod memory;
pub mod targets;

pub use libfuzzer_sys::fuzz_target;
pub use memory::within_limit;

/// The entry of a target's program.
#[macro_export]
macro_rules! target {
    ($name:ident) => {
        $crate::fuzz_target!(|data: &[u8]| {
            $crate::targets::abort_on_own_panics();
            $crate::within_limit(data, $crate::targets::$name);
        });
    };
}
