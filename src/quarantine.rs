//! The quarantine: it holds refused files, each with its reason, until a person takes them out.
//!
//! Only [`drop_entry`] deletes a scan here. Links are never followed and never moved.
//!
//! An entry is built under a hidden name, and gets its visible name when it is whole. Its list of
//! files that leave their place (`leaving.rs`) is written before the first of them is touched. So
//! a kill at any step leaves one of two things: an entry that [`finish`] completes, or a file in
//! its old place.

mod draft;
mod entries;
mod finish;
mod index;
mod leaving;
mod reason;
mod refuse;
mod requeue;
#[cfg(test)]
mod tests;

pub use self::{
    entries::{Entry, drop_entry, entries},
    finish::finish,
    index::Index,
    reason::{Content, ReasonFile},
    refuse::{Refused, Source, quarantine, quarantine_series, refuse_in_place},
    requeue::requeue,
};
