//! Printing that survives a reader who goes away, as in `oddscan eval --json | head`.
//!
//! The commands print with these macros. Those of the standard library panic there.

use std::{
    error::Error,
    fmt,
    io::{self, Write},
    panic::{self, AssertUnwindSafe},
};

use super::failure::Failure;

/// Prints to stdout; ends the command when that fails.
macro_rules! print {
    ($($text:tt)*) => { $crate::cli::print::print(format_args!($($text)*)) };
}

/// Prints a line to stdout; ends the command when that fails.
macro_rules! println {
    ($($text:tt)*) => { print!("{}\n", format_args!($($text)*)) };
}

/// Writes a line to stderr. A message that nobody can read is no reason to stop.
macro_rules! eprintln {
    ($($text:tt)*) => { $crate::cli::print::eprint(format_args!("{}\n", format_args!($($text)*))) };
}

/// Unwinds on failure, so that temporary folders are removed and the daemon of a demo ends. The
/// default of SIGPIPE would leave both.
pub(super) fn print(text: fmt::Arguments<'_>) {
    if let Err(error) = io::stdout().write_fmt(text) {
        panic::resume_unwind(Box::new(Failure::of_output(error)));
    }
}

pub(super) fn eprint(text: fmt::Arguments<'_>) {
    io::stderr().write_fmt(text).ok();
}

/// Runs `work`. Returns its result, or the failure to print that ended it.
pub(super) fn until_print_fails(work: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let failure = payload.downcast::<Failure>();
        Err(*failure.unwrap_or_else(|panic| panic::resume_unwind(panic)))
    })
}

/// Says what went wrong, and why.
pub(super) fn say(error: &dyn Error) {
    eprintln!("oddscan: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  because: {error}");
        cause = error.source();
    }
}
