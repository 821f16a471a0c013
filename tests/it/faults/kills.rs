//! The daemon is killed before, within and after each step that changes the disk, and again while
//! it recovers.

use super::{
    Extent, Faults, Random, extent, look, n_at_once, seeds, shim, side_by_side,
    site::{End, Site},
    spread,
    story::{
        self, MAX_SCANS, Outcome, Reference, Variables, drop_files, phases, reference, settle,
        stop_and_look, variable,
    },
};

/// One start of the daemon with a fault; an empty text is none.
type Start = String;

/// How faults are put into the daemon.
pub struct Way {
    pub name: &'static str,
    /// Whether the quarantine lies on another file system.
    pub is_apart: bool,
    pub watch: fn(&std::path::Path) -> Variables,
    pub inject: fn(&str) -> Variables,
}

/// Steps of oddscan itself.
pub const STEPS: Way = Way {
    name: "kills at steps",
    is_apart: false,
    watch: |log| vec![variable("ODDSCAN_FAULT_LOG", log)],
    inject: |fault| vec![variable("ODDSCAN_FAULT", fault)],
};

/// The kills of one run: for each phase the starts with a fault, one after the other.
type Plan = Vec<Vec<Start>>;

/// All kills in a phase: before and after each step, and within those that write.
pub fn kills(steps: &[String]) -> Vec<String> {
    let kinds = |(index, line): (usize, &String)| {
        let is_write = line.split(' ').nth(1).is_some_and(|call| call.contains("write"));
        let number = index + 1;
        let half = is_write.then(|| format!("kill_half {number}"));
        [Some(format!("kill_before {number}")), half, Some(format!("kill_after {number}"))]
    };
    steps.iter().enumerate().flat_map(kinds).flatten().collect()
}

/// Runs with a kill in every phase. `n_runs` runs sample the kills; without it, every kill has its
/// run. Every second run has another kill in its recovery.
fn plans(reference: &Reference, n_runs: Option<usize>, seed: u64) -> Vec<Plan> {
    let all: Vec<Vec<String>> = reference.steps.iter().map(|steps| kills(steps)).collect();
    let n_runs = n_runs.unwrap_or_else(|| all.iter().map(Vec::len).max().unwrap_or(0));
    let sampled: Vec<Vec<String>> = all.iter().map(|kills| spread(kills, n_runs, seed)).collect();

    let mut random = Random(seed);
    let plan = |run: usize| {
        let mut plan = Vec::new();
        for kills in &sampled {
            let mut starts: Vec<Start> = Vec::new();
            if !kills.is_empty() {
                // Other phases are at other places of their list.
                starts.push(kills[(run + plan.len() * 7) % kills.len()].clone());
            }
            if run % 2 == 1 {
                let what = ["kill_before", "kill_half", "kill_after"][random.below(3)];
                starts.push(format!("{what} {}", 1 + random.below(40)));
            }
            plan.push(starts);
        }
        plan
    };
    (0..n_runs).map(plan).collect()
}

/// Runs a story with its kills. It ends early if a phase does not.
fn run(way: &Way, reference: &Reference, plan: &Plan, faults: &Faults, name: &str) {
    let mut site = Site::new(MAX_SCANS, way.is_apart);
    for (number, starts) in plan.iter().enumerate() {
        drop_files(&site, number);
        faults.count(starts.len().min(1));
        let run = format!("{}, {name}, phase {number}, {starts:?}", way.name);
        let mut note = |what: &str| faults.add(&run, what);
        match phase(&mut site, way, reference, number, starts, &mut note) {
            Ok(0) if !starts.is_empty() => faults.count_unreached(),
            Ok(_) => {}
            Err(what) => {
                faults.add(&run, format!("{what}\n    | {}", site.last_words()));
                return;
            }
        }
    }
}

/// Lets the daemon do a phase, and returns how often it was killed. `note` takes what is wrong
/// although the daemon can go on.
fn phase(
    site: &mut Site,
    way: &Way,
    reference: &Reference,
    number: usize,
    starts: &[Start],
    note: &mut dyn FnMut(&str),
) -> Result<usize, String> {
    let (expected, phase) = (&reference.seen[number], &phases()[number]);
    let mut n_killed = 0;
    let faulty = starts.iter().map(|fault| (way.inject)(fault));
    for (index, variables) in faulty.chain([Variables::new()]).enumerate() {
        site.start(&variables);
        let end = match settle(site, expected, &phase.any)? {
            Outcome::Settled => stop_and_look(site, expected, note)?,
            Outcome::Ended(end) => Some(end),
        };
        match end {
            // A fault that was not reached: all is done.
            None => break,
            Some(End::Killed) if index < starts.len() => {
                n_killed += 1;
                let fits = look::results_fit(&site.path("results"));
                let all = [fits, look::still_there(site, number)];
                for what in all.into_iter().filter_map(Result::err) {
                    note(&format!("right after the kill {what}"));
                }
            }
            Some(end) => return Err(format!("it ended with {end:?}")),
        }
    }
    Ok(n_killed)
}

/// Runs the matrix of a way; `n_runs` is the size of the sample.
pub fn matrix(way: &Way, n_runs: usize) {
    let Some(extent) = extent() else { return };
    let reference = reference(way.is_apart, way.watch);
    let n_steps: Vec<usize> = reference.steps.iter().map(Vec::len).collect();
    eprintln!("{}: steps of the phases {n_steps:?}, {} at once", way.name, n_at_once());
    assert!(n_steps.iter().all(|&n| n > 0), "the steps are logged");

    let faults = Faults::default();
    for seed in seeds(extent) {
        let n_runs = (extent != Extent::All).then_some(n_runs);
        let plans = plans(&reference, n_runs, seed);
        side_by_side(&plans, |index, plan| {
            run(way, &reference, plan, &faults, &format!("seed {seed}, run {index}"));
        });
    }
    faults.assert_none(way.name);
}

#[test]
fn a_kill_at_any_step_loses_nothing() {
    matrix(&STEPS, 24);
}

#[test]
fn a_kill_at_any_step_loses_nothing_with_a_quarantine_on_another_file_system() {
    if story::is_one_file_system() {
        return;
    }
    matrix(&Way { name: "kills, quarantine elsewhere", is_apart: true, ..STEPS }, 8);
}

#[test]
fn a_kill_within_the_store_loses_nothing() {
    let Some(_) = shim::library() else { return };
    matrix(&shim::STORE, 16);
}
