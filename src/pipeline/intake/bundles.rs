//! DICOM files that are watched until their series are complete.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{
    domain::{scan::FileStamp, series_key::SeriesKey},
    ingest::{Candidate, Settling},
};

/// DICOM files and zips that are not converted yet.
#[derive(Default)]
pub(super) struct Bundles {
    pub(super) settling: Settling,
    /// Whether files with undecided names have DICOM's mark, and their size and times at that
    /// check.
    pub(super) marked: HashMap<PathBuf, (FileStamp, bool)>,
    /// Series of the files without a decision, and their size and times at the reading. The store
    /// has those of the others.
    series: HashMap<PathBuf, (FileStamp, Vec<SeriesKey>)>,
    /// Series and files that wait before their next conversion.
    pauses: HashMap<PauseOf, Pause>,
    /// Files without a decision: whether each is whole, and since when it has been known.
    waiting: Vec<(bool, Duration)>,
    /// How many of these wait for nothing but the next listing.
    n_soon: usize,
}

/// What pauses: all files of a series together, so that their pauses end together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum PauseOf {
    Series(SeriesKey),
    /// A zip, or a file of an unknown series.
    File(PathBuf),
}

/// A pause between two conversions.
#[derive(Clone, Copy)]
pub(super) struct Pause {
    pub(super) until: Instant,
    pub(super) n_failures: u32,
}

impl Bundles {
    /// Forgets the files that are gone.
    pub(super) fn keep_only(&mut self, is_there: impl Fn(&Path) -> bool) {
        self.settling.keep_only(&is_there);
        self.series.retain(|path, _| is_there(path));
    }

    /// Forgets a file that has a decision.
    pub(super) fn forget(&mut self, path: &Path) {
        self.settling.forget(path);
        self.series.remove(path);
    }

    /// The series of a file without a decision, if it was read and has not changed since.
    pub(super) fn series_of(&self, file: &Candidate) -> Option<Vec<SeriesKey>> {
        let (look, series) = self.series.get(&file.path)?;
        (*look == file.look).then(|| series.clone())
    }

    pub(super) fn learn(&mut self, file: &Candidate, series: Vec<SeriesKey>) {
        self.series.insert(file.path.clone(), (file.look, series));
    }

    pub(super) fn pause(&mut self, what: PauseOf, pause: Pause) {
        self.pauses.insert(what, pause);
    }

    pub(super) fn wake(&mut self, what: &PauseOf) {
        self.pauses.remove(what);
    }

    /// Forgets the pauses of all others.
    pub(super) fn keep_pauses(&mut self, of: &HashSet<PauseOf>) {
        self.pauses.retain(|what, _| of.contains(what));
    }

    pub(super) fn is_paused(&self, what: &PauseOf, now: Instant) -> bool {
        self.pauses.get(what).is_some_and(|pause| pause.until > now)
    }

    pub(super) fn until(&self, what: &PauseOf) -> Option<Instant> {
        self.pauses.get(what).map(|pause| pause.until)
    }

    /// How many times in a row the conversion failed.
    pub(super) fn n_failures(&self, what: &PauseOf) -> u32 {
        self.pauses.get(what).map_or(0, |pause| pause.n_failures)
    }

    /// Replaces the list of files without a decision. While a conversion runs, whole files wait for
    /// its end.
    pub(super) fn wait(
        &mut self,
        files: impl Iterator<Item = (PauseOf, bool, Duration)>,
        is_converting: bool,
        now: Instant,
    ) {
        self.waiting.clear();
        self.n_soon = 0;
        for (what, is_whole, age) in files {
            self.waiting.push((is_whole, age));
            let waits = is_converting || self.is_paused(&what, now);
            self.n_soon += usize::from(!is_whole || !waits);
        }
    }

    /// Number of files that wait.
    pub(super) fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Number of files that the next listing may take. A paused file waits for a regular one.
    pub(super) fn n_soon(&self) -> usize {
        self.n_soon
    }

    /// Files that are neither NIfTI by their names nor DICOM.
    pub(super) fn unmarked(&self) -> impl Iterator<Item = &PathBuf> {
        let unmarked = self.marked.iter().filter(|(_, (_, is_marked))| !is_marked);
        unmarked.map(|(path, _)| path)
    }

    /// Whether the conversion of a file failed and is tried again.
    pub(super) fn has_failed(&self) -> bool {
        self.pauses.values().any(|pause| pause.n_failures > 0)
    }

    /// Like [`Settling::waiting`].
    pub(super) fn waiting(&self, are_whole: bool) -> (usize, Option<Duration>) {
        let alike = self.waiting.iter().filter(|(is_whole, _)| *is_whole == are_whole);
        (alike.clone().count(), alike.map(|(_, age)| *age).max())
    }
}
