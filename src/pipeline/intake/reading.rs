//! From a whole file to a scan that can be encoded: copied, read, checked, identified, prepared.
//! Nothing is written down here, so that several files can be read at once.

use std::{
    fs, io, mem,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use tracing::warn;

use crate::{
    companions,
    domain::{
        error::{QuarantineReason, Refusal, ScanError, panic_text},
        patient::Patient,
        scan::{FileLook, ScanId},
    },
    ingest::{self, Candidate},
    metrics::Stage,
    nifti,
    pipeline::{Shared, archive::Draft, board::StageName, side_by_side, timings::Timings},
    prepare::{Incoming, Prepared, acquisition::read_json, find_brain},
    process::hook::{self, Hook, HookOutput},
};

/// A file that has been still for long enough.
pub(super) struct Whole {
    /// The file.
    pub(super) candidate: Candidate,
    /// What lies beside it.
    pub(super) companions: Companions,
    /// Where it lies below the incoming folder, or what it was made of.
    pub(super) came_from: PathBuf,
    /// By its DICOM header.
    pub(super) patient: Option<Patient>,
    /// Since it was first seen.
    pub(super) waited: Duration,
    /// Times that the process died while it read this file.
    pub(super) n_crashes: u32,
}

/// Files that are read at once: at most so many, and together no larger than one alone may be. What
/// was in hand at a crash is read alone: others would be blamed for the next one, too.
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

    /// Adds a file, and returns the batches that are to be read now.
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

    /// What there is, if there is anything.
    pub(super) fn take(&mut self) -> Option<Vec<Whole>> {
        self.n_bytes = 0;
        Some(mem::take(&mut self.files)).filter(|files| !files.is_empty())
    }
}

/// Memory for what is read at once, in voxels: one file alone may have all of it, and more.
#[derive(Default)]
struct Room {
    n_taken: Mutex<u64>,
    given_back: Condvar,
}

/// Some of it.
struct Taking<'r> {
    room: &'r Room,
    n_voxels: u64,
}

impl Room {
    /// Waits until there is room beside the others.
    fn take(&self, n_voxels: u64, max_voxels: u64) -> Taking<'_> {
        let is_full = |n_taken: &mut u64| *n_taken > 0 && *n_taken + n_voxels > max_voxels;
        let n_taken = self.n_taken.lock().expect("no holder of the lock can panic");
        let waited = self.given_back.wait_while(n_taken, is_full);
        *waited.expect("no holder of the lock can panic") += n_voxels;
        Taking { room: self, n_voxels }
    }
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        *self.room.n_taken.lock().expect("no holder of the lock can panic") -= self.n_voxels;
        self.room.given_back.notify_all();
    }
}

/// What became of a whole file.
pub(super) enum Taken<S> {
    /// A scan that is new.
    Scan(S),
    /// A copy of a known one.
    Duplicate(ScanId),
    /// It changed while it was copied, so that it was not whole after all, or the service was asked
    /// to stop meanwhile.
    Later,
}

/// A scan that was read.
pub(super) struct ReadScan {
    /// Its files in the archive.
    pub(super) draft: Draft,
    /// What was made of it.
    pub(super) prepared: Prepared,
}

/// Reads whole files.
pub(super) struct Reader {
    shared: Arc<Shared>,
    room: Room,
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        // A kill may have left a scan there.
        clear(&hook_folder(&shared));
        Self { shared, room: Room::default() }
    }

    /// Reads files at once, and hands them over in their order, as [`Reader::read`] does one.
    pub(super) fn read_all(
        &self,
        files: &[Whole],
        mut take: impl FnMut(&Whole, Result<Taken<ReadScan>, ScanError>, Timings),
    ) {
        let read = |whole: &Whole| self.read(whole);
        side_by_side(files, read, |whole, (read, timings)| take(whole, read, timings));
    }

    /// Reads a file, with the times that it took; a crash is a refusal.
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
        if path.is_dir() {
            return Err(a_folder().into());
        }
        let Shared { store, archive, method, .. } = &*self.shared;
        let limits = self.shared.limits();
        let Companions { mask, json } = &whole.companions;
        let mask = mask.as_ref().map(|(path, _)| path.as_path());
        let mut draft = archive.draft(path, mask, limits.max_file_bytes, || self.heartbeat())?;
        let json = json.as_ref().map(|(json, _)| read_json(path, json));
        if ingest::look_at(path).ok() != Some(*look) || Companions::of(path) != whole.companions {
            return Ok(Taken::Later);
        }
        let t1 = companions::session_t1(path).filter(|_| method.uses_session_t1);
        let look_at_t1 = || ingest::look_at(t1.as_deref()?).ok();
        let t1_look = look_at_t1();
        let files = [Some(&*draft.scan), draft.mask.as_deref(), t1.as_deref()];
        // What is no scan takes no room, and is refused.
        let n_voxels = |file: &Path| nifti::n_voxels(file, &limits).unwrap_or(0);
        let n_voxels = files.into_iter().flatten().map(n_voxels).sum();
        timings.pause();
        let _room = self.room.take(n_voxels, limits.max_voxels);
        timings.resume(Stage::Decode);
        if self.shared.stopping() {
            return Ok(Taken::Later);
        }
        let scan = Incoming::read(&draft.scan, draft.mask.as_deref(), &limits)?;
        let scan = scan.beside_t1(t1.as_deref(), &limits);
        // It is still being written: half a T1 must not shape the brain of another scan.
        if look_at_t1() != t1_look {
            return Ok(Taken::Later);
        }
        self.heartbeat();
        let id = scan.id;
        if store.record(&id)?.is_some_and(|known| !known.may_come_again()) {
            return Ok(Taken::Duplicate(id));
        }
        timings.switch(Stage::Preprocess);
        let hook = method.hook.as_ref().filter(|hook| hook.takes(scan.is_head()));
        let handed = match hook {
            None => None,
            Some(hook) => match self.preprocess(hook, &draft.scan, &scan)? {
                None => return Ok(Taken::Later),
                handed => handed,
            },
        };
        let source = find_brain(scan, handed, method)?;
        self.heartbeat();

        // What cannot be encoded is refused while the file is at hand.
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

    /// Lets the site's own preprocessing work on a scan; nothing when asked to stop meanwhile.
    fn preprocess(
        &self,
        hook: &Hook,
        file: &Path,
        scan: &Incoming,
    ) -> Result<Option<HookOutput>, ScanError> {
        let shared = &self.shared;
        let work = hook_folder(shared);
        let _at_work = shared.board.takes_long(format!("preprocessing by {}", hook.name()));
        let handed = hook.run(file, &scan.raw, &work, &shared.limits(), || {
            self.heartbeat();
            !shared.stopping()
        });
        let is_unstarted = matches!(handed, Err(ScanError::Internal { doing: hook::STARTING, .. }));
        shared.board.set_reason(hook::UNSTARTED, is_unstarted);
        // It holds a patient's scan.
        clear(&work);
        handed
    }
}

/// Does something with a scan; a panic is a refusal.
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

/// A scan that crashes the reader.
pub(super) fn poison(found: String) -> Refusal {
    let needed = "a scan that the reader understands";
    let action = "see the log of that time; report it with its files, if they may be shared";
    Refusal::new(QuarantineReason::Poison, found, needed, action)
}

fn a_folder() -> Refusal {
    Refusal::new(
        QuarantineReason::Unsupported,
        "a folder with the name of a scan",
        "a NIfTI file",
        "put files into the incoming folder; folders of files may have any other name",
    )
}

fn hook_folder(shared: &Shared) -> PathBuf {
    shared.config().directories.state.join("preprocess")
}

/// Removes a folder, if it is there.
fn clear(folder: &Path) {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(error = %error.kind(), "a work folder stays until the next time");
        }
        _ => {}
    }
}

/// A file beside a scan and what it looked like.
type Companion = Option<(PathBuf, FileLook)>;

/// What lies beside a scan and is read with it.
#[derive(PartialEq, Eq)]
pub(super) struct Companions {
    mask: Companion,
    json: Companion,
}

impl Companions {
    /// As they look now.
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

    pub(super) fn looks(&self) -> ingest::Beside {
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
                look: FileLook { size, modified_ns: 0, changed_ns: 0 },
            },
            companions: Companions { mask: None, json: None },
            came_from: PathBuf::new(),
            patient: None,
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
    fn what_is_read_at_once_takes_no_more_room_than_one_file_may() {
        let (room, now, most) = (Room::default(), AtomicU64::new(0), AtomicU64::new(0));
        let sizes = [60, 60, 30, 1, 0, 40, 100, 5, 300, 20];
        thread::scope(|scope| {
            for size in sizes {
                let (room, now, most) = (&room, &now, &most);
                scope.spawn(move || {
                    let _taking = room.take(size, 100);
                    let together = now.fetch_add(size, Relaxed) + size;
                    most.fetch_max(together, Relaxed);
                    assert!(together <= 100.max(size), "{together} with one of {size}");
                    thread::sleep(Duration::from_millis(5));
                    now.fetch_sub(size, Relaxed);
                });
            }
        });
        assert_eq!(most.into_inner(), 300, "one that is larger has it alone");
        assert_eq!(*room.n_taken.lock().unwrap(), 0);
    }
}
