//! From a whole file to a scan that can be encoded: copies, reads, checks, identifies and prepares
//! it. Nothing here writes to store or ledger, so several files can be read in parallel.

use std::{
    fs, io, mem,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use tracing::warn;

use crate::{
    archive::Draft,
    companions,
    domain::{
        error::{QuarantineReason, Refusal, ScanError, panic_text},
        not_ready::NotReady,
        patient::Patient,
        scan::{DicomFacts, FileStamp, ScanId},
    },
    ingest::{self, Candidate},
    metrics::Stage,
    nifti,
    pipeline::{Shared, board::StageName, side_by_side, timings::Timings},
    prepare::{
        Incoming, Prepared,
        acquisition::{must_be_magnitude, read_json},
        find_brain,
    },
    process::hook::{self, Hook, HookOutput},
};

/// A file that has settled.
pub(super) struct Whole {
    /// Path and size of the file.
    pub(super) candidate: Candidate,
    /// Files beside it that belong to it.
    pub(super) companions: Companions,
    /// Its path relative to the incoming folder, or the DICOM source that it was made from.
    pub(super) came_from: PathBuf,
    /// Patient in the DICOM header. `None` for other files.
    pub(super) patient: Option<Patient>,
    /// Its DICOM series. `None` for other files.
    pub(super) dicom: Option<DicomFacts>,
    /// Scans of fewer slices of the same DICOM series.
    pub(super) earlier: Vec<ScanId>,
    /// Time since the file was first seen.
    pub(super) waited: Duration,
    /// How often the process crashed while it read this file.
    pub(super) n_crashes: u32,
}

/// Files that are read in parallel. Their number is limited, and together they are no larger than
/// one alone may be. A file that was being read at a crash is read alone. Otherwise other files
/// would be blamed for the next crash, too.
pub(super) struct Batch {
    files: Vec<Whole>,
    n_bytes: u64,
    max_files: usize,
    max_bytes: u64,
}

impl Batch {
    pub(super) fn new(max_files: usize, max_bytes: u64) -> Self {
        Self { files: Vec::new(), n_bytes: 0, max_files, max_bytes }
    }

    /// Adds a file and returns the batches that are complete.
    pub(super) fn add(&mut self, whole: Whole) -> impl Iterator<Item = Vec<Whole>> {
        let is_suspect = whole.n_crashes > 0;
        let n_bytes = whole.candidate.look.size;
        let fits = !is_suspect && self.n_bytes.saturating_add(n_bytes) <= self.max_bytes;
        let before = if fits { None } else { self.take() };
        self.files.push(whole);
        self.n_bytes = self.n_bytes.saturating_add(n_bytes);
        let is_full = is_suspect || self.files.len() >= self.max_files;
        let all = if is_full { self.take() } else { None };
        before.into_iter().chain(all)
    }

    /// Takes the current batch, if it has any file.
    pub(super) fn take(&mut self) -> Option<Vec<Whole>> {
        self.n_bytes = 0;
        Some(mem::take(&mut self.files)).filter(|files| !files.is_empty())
    }
}

/// Limits the memory for files that are read in parallel, in voxels. One file alone may use all of
/// it and more.
#[derive(Default)]
struct MemoryLimit {
    n_reserved: Mutex<u64>,
    released: Condvar,
}

/// A reserved part of the memory.
struct Reserved<'r> {
    memory: &'r MemoryLimit,
    n_voxels: u64,
}

impl MemoryLimit {
    /// Waits until the memory is enough beside the other files, and reserves it.
    fn reserve(&self, n_voxels: u64, max_voxels: u64) -> Reserved<'_> {
        let is_full = |n_reserved: &mut u64| *n_reserved > 0 && *n_reserved + n_voxels > max_voxels;
        let n_reserved = self.n_reserved.lock().expect("no holder of the lock can panic");
        let waited = self.released.wait_while(n_reserved, is_full);
        *waited.expect("no holder of the lock can panic") += n_voxels;
        Reserved { memory: self, n_voxels }
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        *self.memory.n_reserved.lock().expect("no holder of the lock can panic") -= self.n_voxels;
        self.memory.released.notify_all();
    }
}

/// The outcome of reading a whole file.
pub(super) enum Taken<S> {
    /// A new scan.
    Scan(S),
    /// A copy of a known scan.
    Duplicate(ScanId),
    /// The file changed while it was copied, so it was not whole, or the service was asked to stop.
    Later,
}

/// A scan that was read.
pub(super) struct ReadScan {
    /// Files of the scan in the archive.
    pub(super) draft: Draft,
    /// The scan, ready for the encoder.
    pub(super) prepared: Prepared,
}

/// Reads whole files.
pub(super) struct Reader {
    shared: Arc<Shared>,
    memory: MemoryLimit,
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        // A kill may have left a scan in this folder.
        clear(&hook_folder(&shared));
        Self { shared, memory: MemoryLimit::default() }
    }

    /// Reads files in parallel with [`Reader::read`], and passes the results to `take` in input
    /// order.
    pub(super) fn read_all(
        &self,
        files: &[Whole],
        mut take: impl FnMut(&Whole, Result<Taken<ReadScan>, ScanError>, Timings),
    ) {
        let read = |whole: &Whole| self.read(whole);
        side_by_side(files, read, |whole, (read, timings)| take(whole, read, timings));
    }

    /// Reads a file and measures the times. A panic becomes a refusal.
    pub(super) fn read(&self, whole: &Whole) -> (Result<Taken<ReadScan>, ScanError>, Timings) {
        let mut timings = Timings::start(Stage::Decode);
        let read = refused_if_it_panics(&self.shared, || self.read_timed(whole, &mut timings));
        timings.pause();
        (read, timings)
    }

    fn heartbeat(&self) {
        self.shared.board.heartbeat(StageName::Intake);
    }

    fn read_timed(
        &self,
        whole: &Whole,
        timings: &mut Timings,
    ) -> Result<Taken<ReadScan>, ScanError> {
        let Candidate { path, look } = &whole.candidate;
        if path.symlink_metadata().is_ok_and(|about| about.is_dir()) {
            return Err(a_folder().into());
        }

        let Shared { records, archive, method, .. } = &*self.shared;
        let limits = self.shared.limits();
        let Companions { mask, json } = &whole.companions;
        // Before the copy: it would take long, and could fill the disk.
        Incoming::check_sizes(look.size, mask.as_ref().map(|(_, look)| look.size), &limits)?;
        let mask = mask.as_ref().map(|(path, _)| path.as_path());
        let mut draft = archive.draft(path, mask, limits.max_file_bytes, || self.heartbeat())?;

        let json = json.as_ref().map(|(json, _)| read_json(path, json));
        if ingest::look_at(path).ok() != Some(*look) || Companions::of(path) != whole.companions {
            return Ok(Taken::Later);
        }
        must_be_magnitude(path, json.as_ref())?;

        // Volumes of several patients lie beside each other after a conversion.
        let joins_t1 = method.uses_session_t1 && whole.dicom.is_none();
        let t1 = companions::session_t1(path).filter(|_| joins_t1);
        let look_at_t1 = || ingest::look_at(t1.as_deref()?).ok();
        let t1_look = look_at_t1();

        let files = [Some(&*draft.scan), draft.mask.as_deref(), t1.as_deref()];
        // A file that is no scan needs no memory: it is refused.
        let n_voxels = |file: &Path| nifti::n_voxels(file, &limits).unwrap_or(0);
        let n_voxels = files.into_iter().flatten().map(n_voxels).sum();
        timings.pause();
        let _reserved = self.memory.reserve(n_voxels, limits.max_voxels);
        timings.resume(Stage::Decode);
        if self.shared.stopping() {
            return Ok(Taken::Later);
        }

        let scan = Incoming::read(&draft.scan, draft.mask.as_deref(), &limits)?;
        let scan = scan.beside_t1(t1.as_deref(), &limits);
        // The T1 is still being written. Half a T1 must not shape the brain of another scan.
        if look_at_t1() != t1_look {
            return Ok(Taken::Later);
        }
        self.heartbeat();

        let id = scan.id;
        if records.get(&id)?.is_some_and(|known| !known.may_come_again()) {
            return Ok(Taken::Duplicate(id));
        }

        timings.switch(Stage::Preprocess);
        let hook_output = match scan.hook(method) {
            None => None,
            Some(hook) => match self.preprocess(hook, &draft.scan, &scan)? {
                None => return Ok(Taken::Later),
                hook_output => hook_output,
            },
        };
        let source = find_brain(scan, hook_output, method)?;
        self.heartbeat();

        // A scan that cannot be encoded is refused here, while its file is still in the incoming
        // folder.
        let prepared = Prepared::new(id, &source, path, json, &self.shared.config(), method)?;
        timings.switch(Stage::Decode);
        self.heartbeat();

        if let Some(changed) = source.changed_scan() {
            archive.replace_scan(&draft, &changed)?;
        }
        if let Some(brain) = source.found_brain() {
            archive.add_mask(&mut draft, &brain)?;
        }
        Ok(Taken::Scan(ReadScan { draft, prepared }))
    }

    /// Runs the site's own preprocessing on a scan. Returns `None` if asked to stop meanwhile.
    fn preprocess(
        &self,
        hook: &Hook,
        file: &Path,
        scan: &Incoming,
    ) -> Result<Option<HookOutput>, ScanError> {
        let shared = &self.shared;
        let work = hook_folder(shared);
        let _at_work = shared.board.takes_long(format!("preprocessing by {}", hook.name()));
        let hook_output = hook.run(file, &scan.raw, &work, &shared.limits(), || {
            self.heartbeat();
            !shared.stopping()
        });

        let is_unstarted =
            matches!(hook_output, Err(ScanError::Internal { doing: hook::STARTING, .. }));
        shared.board.set_reason(NotReady::PreprocessUnstarted, is_unstarted);
        // The folder contains a patient's scan.
        clear(&work);
        hook_output
    }
}

/// Runs `work`. A panic becomes a refusal.
pub(super) fn refused_if_it_panics<T>(
    shared: &Shared,
    work: impl FnOnce() -> Result<T, ScanError>,
) -> Result<T, ScanError> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        shared.metrics.stage_panicked(Stage::Decode);
        let text = panic_text(panic.as_ref());
        Err(poison(format!("a crash while reading ({text})")).into())
    })
}

/// The refusal of a scan that crashes the reader.
pub(super) fn poison(found: String) -> Refusal {
    let needed = "a scan that the reader understands";
    let action = "see the log of the crash; report it with the files, if they may be shared";
    Refusal::new(QuarantineReason::Poison, found, needed, action)
}

fn a_folder() -> Refusal {
    Refusal::new(
        QuarantineReason::Unsupported,
        "a folder with the name of a scan",
        "a NIfTI file",
        "put files into the incoming folder; give folders a name that does not end like a scan",
    )
}

fn hook_folder(shared: &Shared) -> PathBuf {
    shared.config().directories.state.join("preprocess")
}

/// Removes a folder. A missing folder is no error.
fn clear(folder: &Path) {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(error = %error.kind(), "cannot remove a work folder; trying again later");
        }
        _ => {}
    }
}

/// A file beside a scan, with its size and times.
type Companion = Option<(PathBuf, FileStamp)>;

/// The files beside a scan that are read with it.
#[derive(PartialEq, Eq)]
pub(super) struct Companions {
    mask: Companion,
    json: Companion,
}

impl Companions {
    /// Finds them, with their current size and times.
    pub(super) fn of(scan: &Path) -> Self {
        let look = |path: Option<PathBuf>| {
            let path = path?;
            let look = ingest::look_at(&path).ok()?;
            Some((path, look))
        };
        Self {
            mask: look(companions::companion_mask(scan)),
            json: look(companions::companion_json(scan)),
        }
    }

    pub(super) fn looks(&self) -> ingest::CompanionStamps {
        [&self.mask, &self.json].map(|companion| companion.as_ref().map(|(_, look)| *look))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering::Relaxed},
        thread,
    };

    use super::*;

    #[test]
    fn files_that_are_read_at_once_are_few_and_small_and_no_suspects() {
        let whole = |(size, n_crashes): (u64, u32)| Whole {
            candidate: Candidate {
                path: PathBuf::new(),
                look: FileStamp { size, modified_ns: 0, changed_ns: 0 },
            },
            companions: Companions { mask: None, json: None },
            came_from: PathBuf::new(),
            patient: None,
            dicom: None,
            earlier: Vec::new(),
            waited: Duration::ZERO,
            n_crashes,
        };
        let batches = |max_files: usize, files: &[(u64, u32)]| -> Vec<usize> {
            let mut batch = Batch::new(max_files, 20);
            let mut due = Vec::new();
            files.iter().for_each(|&file| due.extend(batch.add(whole(file))));
            due.extend(batch.take());
            due.iter().map(Vec::len).collect()
        };
        let small = [(1, 0); 5];
        assert_eq!(batches(2, &small), [2, 2, 1]);
        assert_eq!(batches(1, &small), [1; 5]);
        assert_eq!(batches(9, &[(10, 0), (10, 0), (10, 0), (0, 0), (9, 0), (10, 0)]), [2, 3, 1]);
        assert_eq!(batches(9, &[(1, 0), (1, 1), (1, 0), (1, 0), (1, 2)]), [1, 1, 2, 1]);
        assert_eq!(batches(9, &[(u64::MAX, 0), (1, 0)]), [1, 1]);
        assert!(batches(9, &[]).is_empty());
    }

    #[test]
    fn files_in_parallel_need_no_more_memory_than_one_file_may() {
        let (memory, now, most) = (MemoryLimit::default(), AtomicU64::new(0), AtomicU64::new(0));
        let sizes = [60, 60, 30, 1, 0, 40, 100, 5, 300, 20];
        thread::scope(|scope| {
            for size in sizes {
                let (memory, now, most) = (&memory, &now, &most);
                scope.spawn(move || {
                    let _reserved = memory.reserve(size, 100);
                    let together = now.fetch_add(size, Relaxed) + size;
                    most.fetch_max(together, Relaxed);
                    assert!(together <= 100.max(size), "{together} with one of {size}");
                    thread::sleep(Duration::from_millis(5));
                    now.fetch_sub(size, Relaxed);
                });
            }
        });
        assert_eq!(most.into_inner(), 300, "a larger file is read alone");
        assert_eq!(*memory.n_reserved.lock().unwrap(), 0);
    }
}
