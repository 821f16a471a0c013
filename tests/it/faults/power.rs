//! The power is cut: what was not synced may be gone. A story runs once with all its calls
//! recorded. Then its disk is put into the state after a cut at one moment after the other, and the
//! daemon must go on from there.

use std::{fs, path::Path};

use super::{
    Extent, Faults, extent, look,
    replay::{Call, Disk, Unsynced, read_trace, restore},
    seeds, shim, side_by_side,
    site::{End, FOLDERS, Site},
    spread,
    story::{
        MAX_SCANS, Outcome, Reference, Variables, drop_files, phases, reference, settle,
        stop_and_look,
    },
};

/// A cut after so many calls, in a phase.
#[derive(Debug, Clone, Copy)]
struct Cut {
    n_calls: usize,
    phase: usize,
    unsynced: Unsynced,
}

/// A story with its trace. `ends` has the number of calls at the end of each phase.
struct Traced {
    site: Site,
    calls: Vec<Call>,
    ends: Vec<usize>,
}

fn traced(reference: &Reference) -> Traced {
    let mut site = Site::new(MAX_SCANS, false);
    let file = site.path("trace");
    let variables = shim::trace(site.root(), &file);
    let (mut calls, mut ends) = (Vec::new(), Vec::new());
    for number in 0..phases().len() {
        drop_files(&site, number);
        site.start(&variables);
        let settled = settle(&mut site, &reference.seen[number], &phases()[number].any);
        assert!(matches!(settled, Ok(Outcome::Settled)), "{}", site.last_words());
        assert_eq!(site.stop(), Some(End::Code(0)));
        calls = calls_in_folders(&site, &file);
        ends.push(calls.len());
    }
    assert!(calls.iter().any(|call| call.op == b'R'), "renames are recorded");
    Traced { site, calls, ends }
}

/// The calls that concern the folders: the log of the daemon lies beside them.
fn calls_in_folders(site: &Site, trace: &Path) -> Vec<Call> {
    let folders = FOLDERS.map(|name| site.path(name));
    let mut calls = read_trace(&fs::read(trace).unwrap());
    calls.retain(|call| folders.iter().any(|folder| call.path.starts_with(folder)));
    calls
}

/// Cuts after each of the calls, or after a sample of them. In a sample each cut leaves something
/// else of what was not synced.
fn cuts(traced: &Traced, n_cuts: Option<usize>, seed: u64) -> Vec<Cut> {
    let all: Vec<usize> = (1..=traced.calls.len()).collect();
    let kinds = |n_calls: usize| {
        let some = Unsynced::Some(seed * 1_000_003 + n_calls as u64);
        [Unsynced::Nothing, Unsynced::Names, some, Unsynced::Data]
    };
    let cut = |n_calls: usize, unsynced| {
        let phase = traced.ends.iter().position(|&end| n_calls <= end).expect("within the story");
        Cut { n_calls, phase, unsynced }
    };
    let Some(n_cuts) = n_cuts else {
        let of = |n_calls| kinds(n_calls).map(|unsynced| cut(n_calls, unsynced));
        return all.into_iter().flat_map(of).collect();
    };
    let sample = spread(&all, n_cuts, seed).into_iter().enumerate();
    sample.map(|(index, n_calls)| cut(n_calls, kinds(n_calls)[index % 4])).collect()
}

/// The disk after a cut. Files that arrived are safe: the sender still has them.
fn disk_after(traced: &Traced, cut: Cut) -> Disk {
    let mut disk = Disk::new(traced.site.root());
    for name in FOLDERS {
        disk.add(&traced.site.path(name), None);
    }
    let mut done = 0;
    for phase in 0..=cut.phase {
        for (name, bytes) in &phases()[phase].drops {
            disk.add(&traced.site.path("incoming").join(name), Some(bytes));
        }
        let end = traced.ends[phase].min(cut.n_calls);
        traced.calls[done..end].iter().for_each(|call| disk.follow(call));
        done = end;
    }
    disk
}

fn try_cut(
    traced: &mut Traced,
    reference: &Reference,
    cut: Cut,
    note: &mut dyn FnMut(&str),
) -> Result<(), String> {
    let mut wanted = disk_after(traced, cut).after_cut(cut.unsynced);
    wanted.retain(|path, _| FOLDERS.iter().any(|name| path.starts_with(name)));
    restore(traced.site.root(), &FOLDERS, &wanted);

    let site = &mut traced.site;
    let (expected, any) = (&reference.seen[cut.phase], &phases()[cut.phase].any);
    if let Err(what) = look::still_there(site, cut.phase) {
        note(&what);
    }
    site.start(&Variables::new());
    let end = match settle(site, expected, any)? {
        Outcome::Settled => stop_and_look(site, expected, note)?,
        Outcome::Ended(end) => Some(end),
    };
    end.map_or(Ok(()), |end| Err(format!("it ended with {end:?}")))
}

/// The cuts of one traced story, the last first: files that arrived later are removed, and the
/// others stay what they were.
fn run(reference: &Reference, n_cuts: Option<usize>, seed: u64, faults: &Faults) {
    let mut traced = traced(reference);
    for cut in cuts(&traced, n_cuts, seed).into_iter().rev() {
        faults.count(1);
        let call = &traced.calls[cut.n_calls - 1];
        let below = call.path.strip_prefix(traced.site.root()).unwrap_or(&call.path);
        let run = format!("seed {seed}, {cut:?} after {} {below:?}", call.op as char);
        let result = try_cut(&mut traced, reference, cut, &mut |what| faults.add(&run, what));
        traced.site.kill();
        if let Err(what) = result {
            faults.add(&run, format!("{what}\n    | {}", traced.site.last_words()));
        }
        fs::remove_file(traced.site.path("log")).ok();
    }
}

#[test]
fn a_power_cut_loses_nothing_that_was_accepted() {
    let Some(extent) = extent() else { return };
    let Some(_) = shim::library() else { return };
    let reference = reference(false, |_| Variables::new());
    let faults = Faults::default();
    for seed in seeds(extent) {
        let (n_sites, n_cuts) = match extent {
            Extent::All => (1, None),
            _ => (4, Some(24)),
        };
        let seeds: Vec<u64> = (0..n_sites).map(|site| seed * n_sites + site).collect();
        side_by_side(&seeds, |_, &seed| run(&reference, n_cuts, seed, &faults));
    }
    faults.assert_none("power cuts");
}
