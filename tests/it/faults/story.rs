//! A fixed series of arrivals, and what the folders hold after each of its phases.
//!
//! The phases are small, so that every result depends only on what has arrived: each ends when the
//! daemon has nothing left to do.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use super::{
    look::{self, Seen},
    site::{End, PATIENCE, POLL, Site},
};
use crate::support::scan_bytes;

/// Members of a full window.
pub const MAX_SCANS: usize = 4;

/// How long a result may differ from what is expected while the daemon says that it is idle. It
/// must list the incoming folder and let files settle in this time, on a busy machine.
const GRACE: Duration = Duration::from_secs(20);

/// Files that arrive together.
pub struct Phase {
    pub drops: Vec<(String, Vec<u8>)>,
    /// Those of the files that are refused.
    pub refused: Vec<(String, Vec<u8>)>,
    /// Stems whose last result may be of one or the other window: several scans came at once, and
    /// these left.
    pub any: Vec<String>,
}

fn stem(number: u64) -> String {
    format!("sub-{number}_T1w")
}

fn scan(number: u64) -> (String, Vec<u8>) {
    (format!("{}.nii.gz", stem(number)), scan_bytes(number))
}

fn copy(number: u64) -> (String, Vec<u8>) {
    (format!("copy-{number}_T1w.nii.gz"), scan_bytes(number))
}

/// The brain mask beside a scan.
fn mask(number: u64) -> (String, Vec<u8>) {
    let mut volume = crate::support::brain(number);
    volume.voxels.iter_mut().for_each(|voxel| *voxel = f32::from(*voxel > 60.0));
    (format!("sub-{number}_brain.nii.gz"), oddscan::nifti::encode_volume(&volume))
}

/// A file that is no NIfTI file.
fn noise() -> (String, Vec<u8>) {
    ("noise_T1w.nii.gz".to_owned(), (0..30_000_u32).map(|i| (i * i % 251) as u8).collect())
}

/// A scan without a brain.
fn blank() -> (String, Vec<u8>) {
    let mut volume = crate::support::brain(1);
    volume.voxels.fill(0.0);
    ("blank_T1w.nii.gz".to_owned(), oddscan::nifti::encode_volume(&volume))
}

impl Phase {
    fn of(drops: Vec<(String, Vec<u8>)>) -> Self {
        Self { drops, refused: Vec::new(), any: Vec::new() }
    }

    fn with_refused(mut self, file: (String, Vec<u8>)) -> Self {
        self.drops.push(file.clone());
        self.refused.push(file);
        self
    }
}

/// The phases: scans, two refused files, a copy and a mask. From the fifth scan on, scans leave the
/// window, and three results are refreshed each time. At last three scans wait for a full window.
pub fn phases() -> &'static [Phase] {
    static PHASES: OnceLock<Vec<Phase>> = OnceLock::new();
    PHASES.get_or_init(|| {
        let last = Phase::of(vec![scan(8), scan(9), scan(10)]);
        vec![
            Phase::of(vec![scan(1)]),
            Phase::of(vec![scan(2)]).with_refused(noise()),
            Phase::of(vec![scan(3), scan(4), copy(1)]),
            Phase::of(vec![mask(5), scan(5)]).with_refused(blank()),
            Phase::of(vec![scan(6)]),
            Phase::of(vec![scan(7)]),
            // These leave while others come in.
            Phase { any: [4, 5, 6].map(stem).to_vec(), ..last },
        ]
    })
}

/// What each phase ends with, and the steps that it took.
pub struct Reference {
    pub seen: Vec<Seen>,
    /// Lines of the logs of steps.
    pub steps: Vec<Vec<String>>,
}

/// Variables for the daemon.
pub type Variables = Vec<(String, String)>;

pub fn variable(name: &str, value: impl AsRef<Path>) -> (String, String) {
    (name.to_owned(), value.as_ref().display().to_string())
}

/// Runs the story without faults. `watch` gives the variables that log the steps into a file.
pub fn reference(is_apart: bool, watch: impl Fn(&Path) -> Variables) -> Reference {
    let mut site = Site::new(MAX_SCANS, is_apart);
    let mut reference = Reference { seen: Vec::new(), steps: Vec::new() };
    for number in 0..phases().len() {
        let log = site.path(&format!("steps-{number}"));
        drop_files(&site, number);
        site.start(&watch(&log));
        reference.seen.push(until_done(&mut site, number));
        assert_eq!(site.stop(), Some(End::Code(0)), "{}", site.last_words());
        look::nothing_is_left_over(&site, reference.seen[number].n_members).unwrap();
        let steps = fs::read_to_string(&log).unwrap_or_default();
        reference.steps.push(steps.lines().map(str::to_owned).collect());
    }
    reference
}

/// The files that are refused up to the end of a phase.
pub fn refused_until(phase: usize) -> impl Iterator<Item = &'static (String, Vec<u8>)> {
    phases()[..=phase].iter().flat_map(|phase| &phase.refused)
}

pub fn drop_files(site: &Site, phase: usize) {
    for (name, bytes) in &phases()[phase].drops {
        site.drop_in(name, bytes);
    }
}

/// Waits until an undisturbed daemon has done all that a phase brings.
fn until_done(site: &mut Site, phase: usize) -> Seen {
    let dropped = || phases()[..=phase].iter().flat_map(|phase| &phase.drops);
    let is_scan = |(name, _): &&(String, Vec<u8>)| name.starts_with("sub-") && name.contains("T1w");
    let n_results = dropped().filter(is_scan).count();
    let n_refused: usize = phases()[..=phase].iter().map(|phase| phase.refused.len()).sum();

    let started = Instant::now();
    loop {
        assert!(site.ended().is_none() && started.elapsed() < PATIENCE, "{}", site.last_words());
        thread::sleep(POLL);
        if !site.status().is_some_and(|status| look::is_idle(&status)) {
            continue;
        }
        let sidecars = look::sidecars(&site.path("results")).unwrap();
        let entries = look::files_below(&site.path("quarantine"));
        let is_reason = |path: &&PathBuf| path.ends_with("reason.json");
        let is_done = sidecars.len() == n_results
            && entries.iter().filter(is_reason).count() == n_refused
            && (phase != 2 || site.status().is_some_and(|status| status["n_duplicates"] == 1));
        // Files may have come between the question and the look.
        if is_done && site.status().is_some_and(|status| look::is_idle(&status)) {
            return Seen::of(site).unwrap();
        }
    }
}

/// What may have become of a daemon.
pub enum Outcome {
    /// It has done everything, and still runs.
    Settled,
    Ended(End),
}

/// Waits until the folders hold what the phase must end with, or the daemon ends.
///
/// # Errors
/// What is different, when the daemon has nothing left to do or hangs.
pub fn settle(site: &mut Site, expected: &Seen, any: &[String]) -> Result<Outcome, String> {
    let (mut last, mut changed) = (None, Instant::now());
    let mut idle_since = None;
    loop {
        if let Some(end) = site.ended() {
            return Ok(Outcome::Ended(end));
        }
        let status = site.status();
        if status != last {
            (last, changed) = (status.clone(), Instant::now());
        }
        let is_idle = status.as_ref().is_some_and(look::is_idle);
        if !is_idle {
            idle_since = None;
        } else {
            let since: Instant = *idle_since.get_or_insert_with(Instant::now);
            let difference = match Seen::of(site) {
                Ok(seen) => seen.differs(expected, any),
                Err(error) => Some(error),
            };
            match difference {
                None => return Ok(Outcome::Settled),
                Some(difference) if since.elapsed() > GRACE => {
                    return Err(format!("idle, but {difference}"));
                }
                Some(_) => thread::sleep(2 * POLL),
            }
        }
        if changed.elapsed() > PATIENCE {
            let line = status.map_or("it does not answer".to_owned(), |status| status.to_string());
            return Err(format!("no progress for {PATIENCE:?}: {line}"));
        }
        thread::sleep(POLL);
    }
}

/// Stops a settled daemon and looks at what must hold then. Returns how the daemon ended, unless it
/// ended well.
pub fn stop_and_look(
    site: &mut Site,
    expected: &Seen,
    note: &mut dyn FnMut(&str),
) -> Result<Option<End>, String> {
    match site.stop() {
        Some(End::Code(0)) => {
            look::results_fit(&site.path("results"))?;
            if let Err(what) = look::nothing_is_left_over(site, expected.n_members) {
                note(&what);
            }
            Ok(None)
        }
        Some(end) => Ok(Some(end)),
        None => Err("it does not stop".to_owned()),
    }
}

/// Whether this machine cannot test folders on different file systems. Prints why.
pub fn is_one_file_system() -> bool {
    let device = |path: &Path| fs::metadata(path).map(|about| about.dev()).ok();
    let shared = Path::new("/dev/shm");
    let is_one = device(shared).is_none() || device(shared) == device(&std::env::temp_dir());
    if is_one {
        crate::support::skip("/dev/shm is no other file system than the temporary folder");
    }
    is_one
}
