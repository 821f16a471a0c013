//! Processes for work that must not happen within the daemon: their limits, and waiting for their
//! end.
//!
//! A child leads its own process group. When the child ends for any reason, the whole group is
//! killed, so that nothing that it started continues. Only a process that leaves the group on
//! purpose escapes this. Under systemd it ends with the service.

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

/// The signal by which a person, the service manager or a system short of memory ended a process;
/// `None` if the process ended in another way.
pub fn ended_from_outside(status: ExitStatus) -> Option<Signal> {
    let all = [Signal::KILL, Signal::TERM, Signal::INT, Signal::HUP];
    all.into_iter().find(|from| status.signal() == Some(from.as_raw()))
}

/// Time between two checks of a child.
const POLL: Duration = Duration::from_millis(20);

/// Limits on what a process may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confines {
    /// Limit on the memory that it may ask for.
    pub memory: Memory,
    /// Largest size of each file that it writes, bytes.
    pub max_file_bytes: u64,
}

/// A limit on memory, bytes, of each process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// No limit.
    Unlimited,
    /// Everything that the process maps. This is for known programs.
    AddressSpace(u64),
    /// Private memory that the process can write to. Libraries of neural networks map far more
    /// memory than they use; this limit does not count that.
    Data(u64),
}

/// Sets the limits for this process and for all programs that it executes or starts.
pub fn confine(confines: &Confines) -> io::Result<()> {
    let limit = |resource, most: u64| {
        let both = Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(resource, both)
    };

    // A core dump would contain scans.
    limit(Resource::Core, 0)?;
    limit(Resource::Fsize, confines.max_file_bytes)?;
    match confines.memory {
        Memory::Unlimited => {}
        Memory::AddressSpace(most) => limit(Resource::As, most)?,
        Memory::Data(most) => limit(Resource::Data, most)?,
    }

    // If memory runs out nevertheless, the kernel kills this process first. Not every system allows
    // this setting.
    fs::write("/proc/self/oom_score_adj", "1000").ok();
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    Ok(())
}

/// How a child ended.
#[derive(Debug)]
pub enum Ended<T> {
    /// It ended by itself, or somebody else ended it.
    Alone(ExitStatus),
    /// `judge` asked to end it, for this reason.
    Stopped(ExitStatus, T),
}

/// Waits for the end of a child that leads a process group. `judge` is asked again and again
/// whether to continue. When it breaks, the group is killed.
pub fn wait<T>(
    child: &mut Child,
    mut judge: impl FnMut() -> ControlFlow<T>,
) -> io::Result<Ended<T>> {
    let pid = Pid::from_child(child);
    let end = |child: &mut Child| {
        // An error only means that the group has already ended.
        kill_process_group(pid, Signal::KILL).ok();
        child.wait()
    };

    // NOWAIT leaves the child unreaped. Until it is reaped, no other process group can get its
    // number.
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
