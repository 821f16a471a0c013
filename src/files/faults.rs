//! Faults at a step, for tests: `ODDSCAN_FAULT="<what> <nth> [<part of the path>]"`.
//!
//! `kill_before`, `kill_half` (only a write has a half) and `kill_after` kill the process at the
//! nth step, counted from 1. `eio` lets the nth step and all later ones fail, `enospc` and `edquot`
//! those of them that need space, `sync_eio` only syncs. Steps on paths without the part do not
//! count.
//!
//! `ODDSCAN_FAULT_LOG=<file>` gets a line per step: number, call, path.

use std::{
    env, fs,
    io::{self, Write},
    path::Path,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::{
    io::Errno,
    process::{Signal, getpid, kill_process},
};

struct Fault {
    what: What,
    nth: u64,
    part: String,
}

#[derive(PartialEq)]
enum What {
    KillBefore,
    KillHalf,
    KillAfter,
    Fail(Errno),
    FailSync,
}

static FAULT: LazyLock<Option<Fault>> = LazyLock::new(|| {
    let text = env::var("ODDSCAN_FAULT").ok()?;
    let mut words = text.splitn(3, ' ');
    let what = match words.next()? {
        "kill_before" => What::KillBefore,
        "kill_half" => What::KillHalf,
        "kill_after" => What::KillAfter,
        "enospc" => What::Fail(Errno::NOSPC),
        "edquot" => What::Fail(Errno::DQUOT),
        "eio" => What::Fail(Errno::IO),
        "sync_eio" => What::FailSync,
        other => panic!("ODDSCAN_FAULT: no such fault: {other}"),
    };
    let nth = words.next().and_then(|nth| nth.parse().ok()).expect("ODDSCAN_FAULT needs a number");
    Some(Fault { what, nth, part: words.next().unwrap_or_default().to_owned() })
});

static LOG: LazyLock<Option<fs::File>> = LazyLock::new(|| {
    let path = env::var_os("ODDSCAN_FAULT_LOG")?;
    fs::OpenOptions::new().append(true).create(true).open(path).ok()
});

static COUNT: AtomicU64 = AtomicU64::new(0);

/// Number of this step among those that count; 0 for others.
fn count(path: &Path) -> u64 {
    let part = FAULT.as_ref().map_or("", |fault| &fault.part);
    let counts = path.to_string_lossy().contains(part);
    if counts { COUNT.fetch_add(1, Ordering::SeqCst) + 1 } else { 0 }
}

/// Whether a full disk lets such a call fail.
fn needs_space(call: &str) -> bool {
    !["remove", "sync"].contains(&call)
}

fn die() -> ! {
    kill_process(getpid(), Signal::KILL).ok();
    unreachable!("the process was killed")
}

pub(super) fn step<T>(
    call: &str,
    path: &Path,
    run: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let number = count(path);
    if let Some(mut log) = LOG.as_ref() {
        // One call, so that lines of several threads do not mix.
        log.write_all(format!("{number} {call} {}\n", path.display()).as_bytes()).ok();
    }

    let fault = FAULT.as_ref().filter(|fault| number > 0 && number >= fault.nth);
    match fault {
        Some(Fault { what: What::KillBefore, nth, .. }) if number == *nth => die(),
        Some(Fault { what: What::Fail(errno), .. }) if *errno == Errno::IO || needs_space(call) => {
            return Err((*errno).into());
        }
        Some(Fault { what: What::FailSync, .. }) if call == "sync" => return Err(Errno::IO.into()),
        _ => {}
    }
    let done = run();
    if fault.is_some_and(|fault| fault.what == What::KillAfter && number == fault.nth) {
        die();
    }
    done
}

/// Writes the first half and dies, if the step that follows is the one to be killed within.
pub(super) fn write_half(file: &mut impl Write, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let Some(Fault { what: What::KillHalf, nth, part }) = FAULT.as_ref() else { return Ok(()) };
    let counts = path.to_string_lossy().contains(part.as_str());
    if counts && COUNT.load(Ordering::SeqCst) + 1 == *nth {
        file.write_all(&bytes[..bytes.len() / 2])?;
        file.flush()?;
        die();
    }
    Ok(())
}
