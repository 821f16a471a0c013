//! One conversion of DICOM files, in a thread of its own, so that intake goes on with other files.
//!
//! The thread only waits for the process that converts. It touches neither store nor ledger:
//! intake takes the results when the thread has ended.

use std::{
    collections::HashSet,
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::bundles::PauseOf;
use crate::{
    domain::{error::ScanError, scan::ScanId, series_key::SeriesKey},
    ingest::{self, Candidate},
    ledger::SeenOutcome,
    pipeline::{Shared, board::TakesLong},
    process::convert::{self, Bounds, Event, FileState, Listed},
};

/// A file at the start of a conversion.
pub(super) struct Member {
    pub(super) file: Candidate,
    /// The file as the converter gets it.
    pub(super) state: FileState,
    /// The decision about it. `None` if it waits for one.
    pub(super) outcome: Option<SeenOutcome>,
    /// The series in it, if its headers were read.
    pub(super) series: Option<Vec<SeriesKey>>,
    /// Time since it was first seen.
    pub(super) waited: Duration,
}

impl Member {
    /// What pauses if the file waits.
    pub(super) fn pause_of(&self) -> PauseOf {
        match self.series.as_deref() {
            Some([key]) if !ingest::is_zip(&self.file.path) => PauseOf::Series(*key),
            _ => PauseOf::File(self.file.path.clone()),
        }
    }

    pub(super) fn studies(&self) -> impl Iterator<Item = u64> {
        self.series.iter().flatten().map(|key| key.study)
    }

    /// The scan that the file is part of by an earlier decision.
    pub(super) fn scan(&self) -> Option<ScanId> {
        match self.outcome? {
            SeenOutcome::Accepted(id) | SeenOutcome::Duplicate(id) => Some(id),
            _ => None,
        }
    }
}

/// The events of a conversion; `None` if it was stopped.
type Events = Result<Option<Vec<Event>>, ScanError>;

/// A running conversion. Dropping it stops it.
pub(super) struct Conversion {
    members: Vec<Member>,
    incoming: PathBuf,
    /// The folder of the process.
    work: PathBuf,
    job: Job,
    _at_work: TakesLong,
}

/// A conversion that has ended.
pub(super) struct Converted {
    /// The files as they were at the start. Events name them by their positions.
    pub(super) members: Vec<Member>,
    pub(super) incoming: PathBuf,
    /// The folder that holds `out`, the volumes.
    pub(super) work: PathBuf,
    /// How long it took.
    pub(super) elapsed: Duration,
    pub(super) events: Events,
}

impl Conversion {
    /// Starts a conversion of the new files among `members`.
    pub(super) fn start(shared: &Arc<Shared>, members: Vec<Member>, incoming: &Path) -> Self {
        let work = shared.config().directories.state.join("dicom");
        let listed = |member: &Member| Listed {
            path: member.file.path.clone(),
            state: member.state,
            series: member.series.clone(),
        };
        let files: Vec<Listed> = members.iter().map(listed).collect();
        let (n_bytes, limits) = (n_bytes_read(&members), shared.limits());

        let convert = {
            let (shared, work) = (Arc::clone(shared), work.clone());
            move |is_dropped: &AtomicBool| {
                let alive = || !shared.stopping() && !is_dropped.load(Ordering::Relaxed);
                convert::convert(files, n_bytes, &work, &limits, Bounds::ONE_RUN, alive)
            }
        };
        Self {
            members,
            incoming: incoming.to_owned(),
            work,
            job: Job::start(convert),
            _at_work: shared.board.takes_long("converting DICOM files".to_owned()),
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.job.has_ended()
    }

    /// Waits for the end.
    pub(super) fn end(self) -> Converted {
        let Self { members, incoming, work, job, .. } = self;
        let (events, elapsed) = job.end();
        Converted { members, incoming, work, elapsed, events }
    }

    /// Stops the process, and returns its folder.
    pub(super) fn give_up(self) -> PathBuf {
        self.work
    }
}

/// Bytes of the files that a conversion may read: new files, those of their studies and series, and
/// those of which nothing is known.
fn n_bytes_read(members: &[Member]) -> u64 {
    let is_new = |member: &&Member| member.state == FileState::New;
    let keys = || members.iter().filter(is_new).flat_map(|member| member.series.iter().flatten());
    let studies: HashSet<u64> = keys().map(|key| key.study).collect();
    let series: HashSet<u64> = keys().map(|key| key.series).collect();
    let is_read = |member: &&Member| match &member.series {
        None => true,
        Some(keys) => {
            let is_joined =
                |key: &SeriesKey| studies.contains(&key.study) || series.contains(&key.series);
            is_new(member) || keys.iter().any(is_joined)
        }
    };
    members.iter().filter(is_read).map(|member| member.file.look.size).sum()
}

/// A piece of work in a thread of its own. Dropping it asks the work to stop, and waits for that.
struct Job {
    is_dropped: Arc<AtomicBool>,
    thread: Option<JoinHandle<(Events, Duration)>>,
}

impl Job {
    /// `work` gets a flag that says when it must stop.
    fn start(work: impl FnOnce(&AtomicBool) -> Events + Send + 'static) -> Self {
        let is_dropped = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&is_dropped);
        let thread = thread::Builder::new().name("convert".to_owned());
        let timed = move || {
            let started = Instant::now();
            (work(&flag), started.elapsed())
        };
        let thread = thread.spawn(timed).expect("one more thread fits");
        Self { is_dropped, thread: Some(thread) }
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Waits for the end, and returns how long the work took. A panic goes on in the calling
    /// thread.
    fn end(mut self) -> (Events, Duration) {
        let thread = self.thread.take().expect("only the end takes it");
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.is_dropped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // The results are of no interest any more, and neither is a panic.
            thread.join().ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::domain::scan::FileStamp;

    #[test]
    fn the_files_that_a_conversion_may_read_are_those_of_the_studies_and_series_of_new_ones() {
        let member = |state, size, keys: Option<&[[u64; 2]]>| {
            let key = |&[study, series]: &[u64; 2]| SeriesKey { study, series };
            let look = FileStamp { size, modified_ns: 0, changed_ns: 0 };
            let file = Candidate { path: PathBuf::new(), look };
            let series = keys.map(|keys| keys.iter().map(key).collect());
            Member { file, state, outcome: None, series, waited: Duration::ZERO }
        };
        use FileState::{Growing, Known, New};
        let members = [
            member(New, 1, Some(&[[1, 10]])),
            member(Known, 20, Some(&[[1, 11]])),
            member(Known, 300, Some(&[[2, 12], [2, 10]])),
            member(Growing, 4000, None),
            member(Known, 50_000, Some(&[[2, 12]])),
            member(Known, 600_000, Some(&[])),
            member(New, 7_000_000, Some(&[])),
        ];
        assert_eq!(n_bytes_read(&members), 7_004_321);
    }

    #[test]
    fn a_job_runs_beside_its_owner_and_gives_its_events() {
        let (go_on, wait) = mpsc::channel();
        let job = Job::start(move |_| {
            wait.recv().expect("the owner lives");
            Ok(Some(vec![Event::Waiting { inputs: vec![7] }]))
        });
        assert!(!job.has_ended());
        go_on.send(()).unwrap();
        let events = job.end().0.unwrap();
        assert_eq!(events, Some(vec![Event::Waiting { inputs: vec![7] }]));
    }

    #[test]
    fn a_job_that_is_dropped_is_stopped_and_has_ended() {
        let (tell, told) = mpsc::channel();
        let job = Job::start(move |is_dropped| {
            while !is_dropped.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            tell.send("stopped").expect("the owner lives");
            Ok(None)
        });
        drop(job);
        assert_eq!(told.try_recv(), Ok("stopped"));
    }

    #[test]
    #[should_panic(expected = "a bug")]
    fn a_panic_of_a_job_is_not_lost() {
        Job::start(|_| panic!("a bug")).end().0.ok();
    }
}
