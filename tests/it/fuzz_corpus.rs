//! Replays the inputs that the fuzzer has kept: those that reach most code, and those that found a
//! fault.

use std::{
    env, fs,
    path::PathBuf,
    process::{Command, Output},
};

use rustix::process::{Resource, Rlimit, setrlimit};

use crate::{
    fuzz_targets::{ALL, abort_on_own_panics},
    shipped::repository,
};

/// The target that this process replays, if it is a child.
const TARGET: &str = "ODDSCAN_FUZZ_TARGET";

/// Memory that a target may take beside that of the process, bytes.
const MAX_BYTES: u64 = 300 << 20;

/// Each target has a process of its own, because an allocation that is refused ends the process.
#[test]
fn inputs_of_the_fuzzer_end_no_process_and_take_little_memory() {
    if let Ok(name) = env::var(TARGET) {
        return replay(&name);
    }
    for (name, _) in ALL {
        let Output { status, stderr, .. } = child(name);
        let said = String::from_utf8_lossy(&stderr);
        assert!(status.success(), "{name}, {status}, by the last of these files:\n{said}");
    }
}

fn child(name: &str) -> Output {
    let test = "fuzz_corpus::inputs_of_the_fuzzer_end_no_process_and_take_little_memory";
    let mut child = Command::new(env::current_exe().unwrap());
    // The heap of a second thread would count with all the memory that it may ever take.
    child.args(["--exact", test, "--nocapture"]).env(TARGET, name).env("MALLOC_ARENA_MAX", "1");
    child.output().unwrap()
}

fn replay(name: &str) {
    let (_, target) = ALL.into_iter().find(|(known, _)| *known == name).unwrap();
    let inputs = inputs(name);
    abort_on_own_panics();
    limit_memory();
    for path in inputs {
        let data = fs::read(&path).unwrap();
        eprintln!("{}", path.display());
        target(&data);
    }
}

/// The inputs of a target. It has a corpus; findings are there if there were any.
fn inputs(name: &str) -> Vec<PathBuf> {
    let files = |folder: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(repository().join("fuzz").join(folder).join(name));
        entries.into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
    };
    let corpus = files("corpus");
    assert!(!corpus.is_empty(), "{name} has no corpus");
    let mut inputs = [corpus, files("findings")].concat();
    inputs.sort();
    inputs
}

fn limit_memory() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let taken = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let taken_kb: u64 = taken.trim().trim_end_matches(" kB").parse().unwrap();
    let most = Some((taken_kb << 10) + MAX_BYTES);
    setrlimit(Resource::As, Rlimit { current: most, maximum: most }).unwrap();
}
