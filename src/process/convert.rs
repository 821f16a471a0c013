//! Conversion of DICOM files in a separate process: `oddscan dicom`, the same executable.
//!
//! A file can make parsers and codecs panic, recurse and allocate. In the other process, panics are
//! caught, memory and file sizes have hard limits, and a process that hangs is killed. A fault
//! costs only the files that were being converted, never the daemon. The process names these files
//! before it starts on them ([`Event::InHand`]). So after its death, the other files can be
//! converted without them.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write},
    ops::ControlFlow,
    os::unix::{ffi::OsStrExt, process::CommandExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use super::child::{self, Ended};
use crate::{
    domain::{
        error::{
            QuarantineReason::{Bomb, Poison, TooLarge},
            Refusal, ScanError,
        },
        left_alone::LeftAlone,
        patient::Patient,
        scan::{DicomFacts, Limits},
    },
    files::fresh_folder,
};

/// A line that `oddscan dicom` writes. `inputs` are positions in the list of files that it got.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The process starts on these files.
    InHand {
        /// Positions of the files.
        inputs: Vec<usize>,
    },
    /// A volume was written to `<name>.nii.gz`, and the facts of its header to `<name>.json`.
    Converted {
        /// Stem of the two files.
        name: String,
        /// The patient. Only the daemon gets this.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        patient: Option<Patient>,
        /// UIDs and time of the series. Only the daemon gets this.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        dicom: Option<DicomFacts>,
        /// Positions of the files.
        inputs: Vec<usize>,
    },
    /// The files make no volume because of a fault.
    Refused {
        /// What it would have been called.
        name: String,
        /// The fault, and what to do.
        refusal: Refusal,
        /// Whether slices that may still arrive could remove the fault.
        may_grow: bool,
        /// Positions of the files.
        inputs: Vec<usize>,
    },
    /// The files are sound, but oddscan does not use such images.
    Skipped {
        /// What it would have been called.
        name: String,
        /// Why oddscan does not use them.
        reason: LeftAlone,
        /// The same in words, with what was found.
        why: String,
        /// Positions of the files.
        inputs: Vec<usize>,
    },
    /// Some files of the series may still change.
    Waiting {
        /// Positions of the files.
        inputs: Vec<usize>,
    },
}

/// The state of a file before the conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileState {
    /// An earlier conversion has handled it. Its series is converted again only if new files
    /// joined.
    Known,
    /// The file is new and whole.
    New,
    /// The sender may still write to it. Its series waits.
    Growing,
}

impl FileState {
    fn letter(self) -> u8 {
        match self {
            Self::Known => b'k',
            Self::New => b'n',
            Self::Growing => b'g',
        }
    }
}

/// Writes a list of files for the command: for each file a letter, the path and a zero byte.
fn encode_list(files: &[(FileState, PathBuf)]) -> Vec<u8> {
    let entry = |(standing, path): &(FileState, PathBuf)| {
        [&[standing.letter()], path.as_os_str().as_bytes(), &[0]].concat()
    };
    files.iter().flat_map(entry).collect()
}

/// Reads the daemon's list of files: for each file a letter, the path and a zero byte. `None` if a
/// letter is unknown.
pub fn decode_list(bytes: &[u8]) -> Option<Vec<(FileState, PathBuf)>> {
    let entries = bytes.strip_suffix(&[0]).unwrap_or(bytes).split(|&byte| byte == 0);
    let entry = |entry: &[u8]| {
        let (letter, path) = entry.split_first()?;
        let all = [FileState::Known, FileState::New, FileState::Growing];
        let standing = all.into_iter().find(|standing| standing.letter() == *letter)?;
        Some((standing, PathBuf::from(OsStr::from_bytes(path))))
    };
    entries.filter(|entry| !entry.is_empty()).map(entry).collect()
}

/// A process that writes no line for this long counts as hanging.
const MAX_SILENCE: Duration = Duration::from_secs(300);

/// After this many deaths, the remaining files wait for the next conversion, because each death
/// costs another reading of all headers.
const MAX_DEATHS: usize = 16;

/// Memory limit of a process. It covers the process itself, the largest file with its codec, and
/// the largest volume as numbers, as bytes and compressed.
fn memory_bytes(limits: &Limits) -> u64 {
    let of_files = limits.max_file_bytes.saturating_mul(4);
    (1_u64 << 30).saturating_add(of_files).saturating_add(limits.max_voxels.saturating_mul(16))
}

/// Limit on the unpacked size of all files of a zip, bytes.
pub fn max_unpacked_bytes(limits: &Limits) -> u64 {
    limits.max_file_bytes.saturating_mul(16)
}

fn own(source: io::Error) -> ScanError {
    ScanError::Internal { doing: "converting DICOM files in the state folder", source }
}

/// Converts files into the folder `out` within `work`, which is emptied first. Returns the outcome
/// of each series. Files that no event names made no volume. `alive` is called during the
/// conversion. If it returns false, the conversion stops, and the result is `None`.
pub fn convert(
    files: &[(FileState, PathBuf)],
    work: &Path,
    limits: &Limits,
    mut alive: impl FnMut() -> bool,
) -> Result<Option<Vec<Event>>, ScanError> {
    let mut deaths: Vec<Event> = Vec::new();
    let mut killed: Vec<Vec<usize>> = Vec::new();
    loop {
        let blamed: Vec<usize> = deaths.iter().flat_map(Event::inputs).copied().collect();
        let left: Vec<usize> = (0..files.len()).filter(|input| !blamed.contains(input)).collect();
        if left.is_empty() {
            return Ok(Some(deaths));
        }
        if deaths.len() >= MAX_DEATHS {
            deaths.push(Event::Waiting { inputs: left });
            return Ok(Some(deaths));
        }

        let listed: Vec<_> = left.iter().map(|&input| files[input].clone()).collect();
        fresh_folder(work).map_err(own)?;
        let Some(end) = run_once(&listed, work, limits, &mut alive).map_err(own)? else {
            return Ok(None);
        };

        let events: Vec<Event> =
            read_events(work).into_iter().map(|event| event.renumbered(&left)).collect();
        let Some(refusal) = end.fault()? else {
            return Ok(Some(events.into_iter().chain(deaths).collect()));
        };

        let in_hand = events.iter().rev().find_map(|event| match event {
            Event::InHand { inputs } => Some(inputs.clone()),
            _ => None,
        });
        let Some(inputs) = in_hand else {
            return Err(own(io::Error::other("the process died before it read a file")));
        };

        warn!(%refusal, n_files = inputs.len(), "the conversion of DICOM files died");
        // A person or a system short of memory may have killed it, so one death proves nothing.
        if end.was_killed() && !killed.contains(&inputs) {
            killed.push(inputs);
            continue;
        }
        deaths.push(Event::Refused { name: String::new(), refusal, may_grow: false, inputs });
    }
}

impl Event {
    /// The files that the event is about.
    pub fn inputs(&self) -> &[usize] {
        match self {
            Self::InHand { inputs }
            | Self::Converted { inputs, .. }
            | Self::Refused { inputs, .. }
            | Self::Skipped { inputs, .. }
            | Self::Waiting { inputs } => inputs,
        }
    }

    fn renumbered(mut self, left: &[usize]) -> Self {
        let (Self::InHand { inputs }
        | Self::Converted { inputs, .. }
        | Self::Refused { inputs, .. }
        | Self::Skipped { inputs, .. }
        | Self::Waiting { inputs }) = &mut self;
        *inputs = inputs.iter().filter_map(|&input| left.get(input).copied()).collect();
        self
    }
}

/// How the process ended.
struct End {
    status: ExitStatus,
    was_silent: bool,
    stderr: String,
}

impl End {
    /// Whether it was killed from outside.
    fn was_killed(&self) -> bool {
        !self.was_silent && child::ended_from_outside(self.status).is_some()
    }

    /// The fault of the files that were being converted, if they caused the death.
    fn fault(&self) -> Result<Option<Refusal>, ScanError> {
        if self.status.success() {
            return Ok(None);
        }

        let action = "export the series again; report it with the files, if they may be shared";
        let signal = self.status.signal();
        let is_memory = self.stderr.contains("memory allocation of");
        let (reason, found) = if self.was_silent {
            (Poison, format!("a conversion that hung for {} s", MAX_SILENCE.as_secs()))
        } else if is_memory || self.was_killed() {
            (Bomb, "files that ask for more memory than any scan needs".to_owned())
        } else if signal == Some(Signal::XFSZ.as_raw()) {
            (TooLarge, "files that unpack to more than any scan holds".to_owned())
        } else if let Some(signal) = signal {
            (Poison, format!("a conversion that died of signal {signal}"))
        } else {
            let text: String = self.stderr.chars().filter(|c| !c.is_control()).collect();
            let text = text.chars().take(300).collect::<String>();
            return Err(own(io::Error::other(format!("{}: {text}", self.status))));
        };

        let needed = "a series that the converter understands";
        Ok(Some(Refusal::new(reason, found, needed, action)))
    }
}

fn read_events(work: &Path) -> Vec<Event> {
    // The last line may be incomplete; it is then skipped.
    let text = fs::read(work.join("events")).unwrap_or_default();
    // The file names the patients, so it must not remain.
    fs::remove_file(work.join("events")).ok();
    text.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

fn run_once(
    files: &[(FileState, PathBuf)],
    work: &Path,
    limits: &Limits,
    alive: &mut dyn FnMut() -> bool,
) -> io::Result<Option<End>> {
    let at = |name: &str| work.join(name);
    File::create(at("list"))?.write_all(&encode_list(files))?;

    let out = at("out");
    // This is the running executable, even if an upgrade has replaced its file.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("oddscan").args(["dicom", "--listed", "--out"]).arg(&out);
    for (option, value) in [
        ("--max-voxels", limits.max_voxels),
        ("--max-file-bytes", limits.max_file_bytes),
        ("--memory-bytes", memory_bytes(limits)),
    ] {
        command.arg(option).arg(value.to_string());
    }

    // One thread, because the stacks and arenas of threads count as memory.
    command.env_clear().env("RAYON_NUM_THREADS", "1").current_dir(work).process_group(0);
    let errors = File::create(at("stderr"))?;
    command.stdin(File::open(at("list"))?).stdout(File::create(at("events"))?).stderr(errors);
    let mut child = command.spawn()?;
    let watched = watch(&mut child, &at("events"), alive);

    let stderr = String::from_utf8_lossy(&fs::read(at("stderr")).unwrap_or_default())
        .chars()
        .take(2000)
        .collect::<String>();
    if !stderr.is_empty() {
        debug!(stderr, "the conversion of DICOM files said");
    }
    Ok(watched?.map(|(status, was_silent)| End { status, was_silent, stderr }))
}

/// Waits for the end of a process. If it hangs, it is killed together with all processes that it
/// started.
fn watch(
    child: &mut Child,
    events: &Path,
    alive: &mut dyn FnMut() -> bool,
) -> io::Result<Option<(ExitStatus, bool)>> {
    enum Stop {
        GivenUp,
        Silent,
    }
    let (mut n_bytes, mut since) = (0, Instant::now());
    let ended = child::wait(child, || {
        if !alive() {
            return ControlFlow::Break(Stop::GivenUp);
        }
        let now_bytes = fs::metadata(events).map_or(0, |meta| meta.len());
        if now_bytes != n_bytes {
            (n_bytes, since) = (now_bytes, Instant::now());
        } else if since.elapsed() >= MAX_SILENCE {
            return ControlFlow::Break(Stop::Silent);
        }
        ControlFlow::Continue(())
    })?;

    Ok(match ended {
        Ended::Alone(status) => Some((status, false)),
        Ended::Stopped(status, Stop::Silent) => Some((status, true)),
        Ended::Stopped(_, Stop::GivenUp) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_files_survives_any_name() {
        let files = vec![
            (FileState::New, PathBuf::from("a\nb")),
            (FileState::Known, PathBuf::from(OsStr::from_bytes(b"\xff \"'"))),
            (FileState::Growing, PathBuf::from("/c")),
        ];
        assert_eq!(decode_list(&encode_list(&files)).unwrap(), files);
        assert_eq!(decode_list(b"").unwrap(), []);
        assert_eq!(decode_list(b"x/a\0"), None);
    }

    #[test]
    fn a_death_is_told_by_its_signal_and_its_last_words() {
        let end = |raw, stderr: &str, was_silent| End {
            status: ExitStatus::from_raw(raw),
            was_silent,
            stderr: stderr.to_owned(),
        };
        let reason = |end: End| end.fault().unwrap().map(|refusal| refusal.reason);
        assert_eq!(reason(end(0, "", false)), None);
        assert_eq!(reason(end(6, "memory allocation of 9 bytes failed", false)), Some(Bomb));
        assert_eq!(reason(end(25, "", false)), Some(TooLarge));
        assert_eq!(reason(end(11, "", false)), Some(Poison));
        assert_eq!(reason(end(9, "", true)), Some(Poison));
        assert_eq!(reason(end(9, "", false)), Some(Bomb));
        assert!(end(9, "", false).was_killed() && !end(9, "", true).was_killed());
        assert!(end(74 << 8, "no space", false).fault().is_err(), "no file is to blame");
    }
}
