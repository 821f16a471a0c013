//! Processes that do for the daemon what must not happen within it: their limits, and waiting for
//! them.
//!
//! A child leads a process group of its own. When it ends, by itself or not, the whole group is
//! ended: nothing that it has started goes on. Only a process that leaves the group on purpose
//! escapes that; under systemd it ends with the service.

use std::{
    fs, io,
    ops::ControlFlow,
    os::unix::process::ExitStatusExt,
    process::{Child, ExitStatus},
    thread,
    time::Duration,
};

use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions, kill_process_group, waitid,
};

/// The signal by which somebody else ended a process: a person, the service manager, a system short
/// of memory.
pub fn ended_from_outside(status: ExitStatus) -> Option<Signal> {
    let all = [Signal::KILL, Signal::TERM, Signal::INT, Signal::HUP];
    all.into_iter().find(|from| status.signal() == Some(from.as_raw()))
}

/// How often a child is looked at.
const POLL: Duration = Duration::from_millis(20);

/// What a process may use at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confines {
    /// Memory that it may ask for.
    pub memory: Memory,
    /// Size of each file that it writes, bytes.
    pub max_file_bytes: u64,
}

/// A limit on memory, bytes, of each process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// None.
    Unlimited,
    /// Everything that it maps: for programs that are known.
    AddressSpace(u64),
    /// What it can write to and shares with nobody. Libraries of neural networks map many times of
    /// what they use, which this does not count.
    Data(u64),
}

/// Gives up, in this process and all that it becomes or starts, what could do harm.
pub fn confine(confines: &Confines) -> io::Result<()> {
    let limit = |resource, most: u64| {
        let both = Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(resource, both)
    };
    // A core dump would hold scans.
    limit(Resource::Core, 0)?;
    limit(Resource::Fsize, confines.max_file_bytes)?;
    match confines.memory {
        Memory::Unlimited => {}
        Memory::AddressSpace(most) => limit(Resource::As, most)?,
        Memory::Data(most) => limit(Resource::Data, most)?,
    }
    // Where memory runs out all the same, this process is the one to go. Not every system allows
    // it.
    fs::write("/proc/self/oom_score_adj", "1000").ok();
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    Ok(())
}

/// How a child ended.
#[derive(Debug)]
pub enum Ended<T> {
    /// By itself, or by somebody else.
    Alone(ExitStatus),
    /// It was ended because of this.
    Stopped(ExitStatus, T),
}

/// Waits for the end of a child that leads a process group. `judge` is asked all the time whether
/// to go on; when it breaks, the group is killed.
pub fn wait<T>(
    child: &mut Child,
    mut judge: impl FnMut() -> ControlFlow<T>,
) -> io::Result<Ended<T>> {
    let pid = Pid::from_child(child);
    let end = |child: &mut Child| {
        // Gone is fine as well.
        kill_process_group(pid, Signal::KILL).ok();
        child.wait()
    };
    // Not reaped yet: until then nobody else can be given the number of the group.
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    loop {
        match waitid(WaitId::Pid(pid), options) {
            Ok(Some(_)) => return Ok(Ended::Alone(end(child)?)),
            Ok(None) => {}
            Err(error) => {
                end(child).ok();
                return Err(error.into());
            }
        }
        if let ControlFlow::Break(why) = judge() {
            return Ok(Ended::Stopped(end(child)?, why));
        }
        thread::sleep(POLL);
    }
}
