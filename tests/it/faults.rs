//! Nothing is lost, whatever stops the daemon or lets its calls fail.
//!
//! A story is a fixed series of arrivals in a small window ([`story`]). An undisturbed run of it
//! says what the folders must hold after each of its phases. Every other run must end with the same
//! results, byte for byte, also if the daemon was killed ([`kills`]), if calls failed ([`errors`]),
//! if files of the state folder were damaged ([`damage`]), or if the power was cut ([`power`]).
//! Checks read only folders and pages that users may read, so that they hold for any store.
//!
//! A test samples the faults. `ODDSCAN_FAULTS=all` takes all of them; `ODDSCAN_FAULTS=<minutes>`
//! goes on for so long with one seed after the other. docs/reliability.md has the commands.

mod damage;
mod day;
mod errors;
mod kills;
mod look;
mod power;
mod replay;
mod shim;
mod site;
mod story;

use std::{
    env,
    fmt::Display,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::support::skip;

/// How much a test does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// A sample that is the same in every run.
    Sample,
    /// Every fault once.
    All,
    /// Samples of different seeds, for this long.
    For(Duration),
}

/// What `ODDSCAN_FAULTS` asks for. `None` without the feature `faults`; this prints why.
fn extent() -> Option<Extent> {
    if !cfg!(feature = "faults") {
        skip("the binary has no faults, build it with --features faults");
        return None;
    }
    Some(match env::var("ODDSCAN_FAULTS").ok().as_deref() {
        None | Some("") => Extent::Sample,
        Some("all") => Extent::All,
        Some(minutes) => {
            let minutes: f64 = minutes.parse().expect("ODDSCAN_FAULTS is \"all\" or minutes");
            Extent::For(Duration::from_secs_f64(60.0 * minutes))
        }
    })
}

/// Seeds for the runs of a test: one, or one after the other until the time is over.
fn seeds(extent: Extent) -> impl Iterator<Item = u64> {
    let started = Instant::now();
    let goes_on = move |seed: &u64| match extent {
        Extent::For(time) => started.elapsed() < time,
        _ => *seed == 0,
    };
    (0..).take_while(goes_on)
}

/// What runs of a test have found to be wrong.
#[derive(Default)]
struct Faults {
    found: Mutex<Vec<String>>,
    n_runs: AtomicUsize,
    n_unreached: AtomicUsize,
}

impl Faults {
    fn add(&self, run: impl Display, what: impl Display) {
        let line = format!("{run}: {what}");
        eprintln!("FAULT {line}");
        self.found.lock().unwrap().push(line);
    }

    fn count(&self, n_runs: usize) {
        self.n_runs.fetch_add(n_runs, Ordering::Relaxed);
    }

    fn count_unreached(&self) {
        self.n_unreached.fetch_add(1, Ordering::Relaxed);
    }

    /// Fails the test if anything was wrong.
    fn assert_none(&self, what: &str) {
        let found = self.found.lock().unwrap();
        let n_runs = self.n_runs.load(Ordering::Relaxed);
        let n_unreached = self.n_unreached.load(Ordering::Relaxed);
        eprintln!("{what}: {n_runs} faults, {n_unreached} of them not reached");
        assert!(found.is_empty(), "{} of {n_runs} {what}:\n{}", found.len(), found.join("\n"));
        assert!(n_unreached * 4 <= n_runs, "most faults must be reached");
    }
}

/// Sites that run side by side. They mostly wait, so that there may be more of them than cores.
fn n_at_once() -> usize {
    let n_cores = thread::available_parallelism().map_or(2, usize::from);
    env::var("ODDSCAN_FAULTS_AT_ONCE").ok().and_then(|n| n.parse().ok()).unwrap_or(2 * n_cores)
}

/// Does jobs side by side.
fn side_by_side<J: Sync>(jobs: &[J], run: impl Fn(usize, &J) + Sync) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..n_at_once().min(jobs.len()) {
            scope.spawn(|| {
                while let Some((index, job)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, jobs.get(i)?)))
                {
                    run(index, job);
                }
            });
        }
    });
}

/// At most `n` of the items, evenly spread. The seed moves the sample along.
fn spread<T: Clone>(items: &[T], n: usize, seed: u64) -> Vec<T> {
    if items.len() <= n {
        return items.to_vec();
    }
    let stride = items.len() as f64 / n as f64;
    let shift = (seed as f64 * 0.618).fract() * stride;
    let pick = |index: usize| ((index as f64 * stride + shift) as usize) % items.len();
    (0..n).map(|index| items[pick(index)].clone()).collect()
}

/// Numbers that look random: SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}
