//! What oddscan knows about scans and files and could not compute again, in plain files of the
//! state folder: [`Ledger`] has a record per scan, [`SeenList`] the decisions about files.
//!
//! Each record is a file that is written whole and synced, folder included. Checksums show damage.
//! Nothing here depends on sled.

mod entry;
mod error;
mod scans;
mod seen;

pub use entry::Entry;
pub use error::LedgerError;
pub use scans::{Ledger, Loaded};
pub use seen::{Decision, Fellows, SeenFile, SeenFiles, SeenList, SeenOutcome};
