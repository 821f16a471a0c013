//! DICOM files that are watched until their series are complete.

use std::{
    collections::HashMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use crate::{domain::scan::FileStamp, ingest::Settling};

/// DICOM files that are not converted yet.
#[derive(Default)]
pub(super) struct Bundles {
    pub(super) settling: Settling,
    /// Whether files with undecided names have DICOM's mark, and their size and times at that
    /// check.
    pub(super) marked: HashMap<PathBuf, (FileStamp, bool)>,
    /// Bundles that pause before their next conversion.
    pub(super) pauses: HashMap<PathBuf, Pause>,
    /// Bundles that wait: whether each is whole, and since when it has been known.
    pub(super) waiting: Vec<(bool, Duration)>,
}

/// A pause between two conversions of one bundle.
#[derive(Clone, Copy)]
pub(super) struct Pause {
    pub(super) until: Instant,
    pub(super) n_failures: u32,
}

impl Bundles {
    /// Number of bundles that wait.
    pub(super) fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Files that are neither NIfTI by their names nor DICOM.
    pub(super) fn unmarked(&self) -> impl Iterator<Item = &PathBuf> {
        let unmarked = self.marked.iter().filter(|(_, (_, is_marked))| !is_marked);
        unmarked.map(|(path, _)| path)
    }

    /// Whether a bundle failed and is tried again.
    pub(super) fn has_failed(&self) -> bool {
        self.pauses.values().any(|pause| pause.n_failures > 0)
    }

    /// Like [`Settling::waiting`], counted in bundles.
    pub(super) fn waiting(&self, are_whole: bool) -> (usize, Option<Duration>) {
        let alike = self.waiting.iter().filter(|(is_whole, _)| *is_whole == are_whole);
        (alike.clone().count(), alike.map(|(_, age)| *age).max())
    }
}
