//! Calls fail, with restarts while they do: a full disk, a used-up quota, a disk with errors, and
//! syncs that fail.

use std::{thread, time::Duration};

use super::{
    Extent, Faults, Random, extent,
    kills::{STEPS, Way},
    look, seeds, shim, side_by_side,
    site::{End, Site},
    story::{
        MAX_SCANS, Outcome, Reference, Variables, drop_files, phases, reference, settle,
        stop_and_look,
    },
};

const ERRORS: [&str; 4] = ["enospc", "edquot", "eio", "sync_eio"];

/// How long the daemon runs with a fault before it is restarted.
const ROUND: Duration = Duration::from_millis(1300);

/// As many as the crashes that make a scan `poison`: a failing disk must not count as one.
const N_ROUNDS: usize = 3;

/// For each phase the error and the first step that fails. A phase without one runs undisturbed.
type Plan = Vec<Option<(&'static str, usize)>>;

/// Errors come with a refused file, with a window that gets full, and with several scans that wait
/// for a full window.
const PHASES: [usize; 3] = [1, 3, 6];

fn plan(reference: &Reference, run: usize, seed: u64) -> Plan {
    let mut random = Random(seed * 1000 + run as u64);
    let error = |phase: usize| {
        let n_steps = reference.steps[phase].len();
        let is_faulty = PHASES.contains(&phase) && n_steps > 0;
        is_faulty.then(|| (ERRORS[(run + phase) % ERRORS.len()], 1 + random.below(n_steps)))
    };
    (0..phases().len()).map(error).collect()
}

fn phase(
    site: &mut Site,
    way: &Way,
    reference: &Reference,
    number: usize,
    fault: Option<(&str, usize)>,
    note: &mut dyn FnMut(&str),
) -> Result<(), String> {
    let (expected, phase) = (&reference.seen[number], &phases()[number]);
    if let Some((error, step)) = fault {
        for round in 0..N_ROUNDS {
            // A restart finds the disk as it was: the same step, or the first one, fails.
            let step = if round == 0 { step } else { 1 + step % (10 * round) };
            site.start(&(way.inject)(&format!("{error} {step}")));
            thread::sleep(ROUND);
            if site.ended().is_none() {
                match site.stop() {
                    None => return Err(format!("round {round}: it does not stop")),
                    Some(End::Killed) => return Err(format!("round {round}: it was killed")),
                    Some(End::Code(_)) => {}
                }
            }
            let fits = look::results_fit(&site.path("results"));
            let all = [fits, look::still_there(site, number)];
            for what in all.into_iter().filter_map(Result::err) {
                note(&format!("round {round}: {what}"));
            }
        }
    }

    site.start(&Variables::new());
    let end = match settle(site, expected, &phase.any)? {
        Outcome::Settled => stop_and_look(site, expected, note)?,
        Outcome::Ended(end) => Some(end),
    };
    end.map_or(Ok(()), |end| Err(format!("afterwards it ended with {end:?}")))
}

fn run(way: &Way, reference: &Reference, plan: &Plan, faults: &Faults, name: &str) {
    let mut site = Site::new(MAX_SCANS, way.is_apart);
    for (number, fault) in plan.iter().enumerate() {
        drop_files(&site, number);
        faults.count(usize::from(fault.is_some()));
        let run = format!("{name}, phase {number}, {fault:?}");
        let mut note = |what: &str| faults.add(&run, what);
        if let Err(what) = phase(&mut site, way, reference, number, *fault, &mut note) {
            faults.add(&run, format!("{what}\n    | {}", site.last_words()));
            return;
        }
    }
}

fn sweep(way: &Way, name: &str, n_runs: usize) {
    let Some(extent) = extent() else { return };
    let reference = reference(way.is_apart, way.watch);
    let faults = Faults::default();
    for seed in seeds(extent) {
        let n_runs = if extent == Extent::All { 20 * n_runs } else { n_runs };
        let plans: Vec<Plan> = (0..n_runs).map(|run| plan(&reference, run, seed)).collect();
        side_by_side(&plans, |index, plan| {
            run(way, &reference, plan, &faults, &format!("{name}, seed {seed}, run {index}"));
        });
    }
    faults.assert_none(name);
}

#[test]
fn a_disk_that_fails_for_a_time_loses_nothing() {
    sweep(&STEPS, "errors at steps", 8);
}

#[test]
fn a_disk_that_fails_below_the_store_for_a_time_loses_nothing() {
    let Some(_) = shim::library() else { return };
    sweep(&shim::STORE, "errors within the store", 8);
}
