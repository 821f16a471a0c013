//! Conversion of DICOM files in a separate process: `oddscan dicom`, the same executable.
//!
//! A file can make parsers and codecs panic, recurse and allocate. In the other process, panics are
//! caught, memory and file sizes have hard limits, and a process that hangs is killed. A fault
//! costs only the files that were being converted, never the daemon. The process names these files
//! before it starts on them ([`Event::InHand`]). So after its death, the other files can be
//! converted without them.

use std::{
    collections::BTreeSet,
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
        series_key::SeriesKey,
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
    /// The headers of one file, or of all members of one zip, were read.
    Belongs {
        /// The series that they name; none if no header can be read. A list of
        /// [`MAX_KEYS`] may lack some.
        series: Vec<SeriesKey>,
        /// Position of the file.
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
        /// Positions of other files of the series that belong to no volume ([`LeftAlone::Stray`]).
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        left_out: Vec<usize>,
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
    /// This run has done as much as one may do. The next one takes up these files.
    Postponed {
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
    /// Its series was tried a short while ago and is not tried again yet, even if new files joined.
    Paused,
}

impl FileState {
    fn letter(self) -> u8 {
        match self {
            Self::Known => b'k',
            Self::New => b'n',
            Self::Growing => b'g',
            Self::Paused => b'p',
        }
    }
}

/// A file for a conversion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The file or zip.
    pub path: PathBuf,
    /// Its state.
    pub state: FileState,
    /// The series that it belongs to, if an earlier run has read its headers.
    pub series: Option<Vec<SeriesKey>>,
}

impl Listed {
    /// A new file of which nothing is known.
    pub fn new(path: PathBuf) -> Self {
        Self { path, state: FileState::New, series: None }
    }
}

/// Keys that are kept for a file. A zip with more series is complete in itself: slices that come
/// later for the series beyond do not join them.
pub const MAX_KEYS: usize = 1000;

/// Writes a list of files for the command. An entry is a letter, the keys of the series or `?` if
/// they are not known, a space, the path and a zero byte.
fn encode_list<'f>(files: impl IntoIterator<Item = &'f Listed>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Listed { path, state, series } in files {
        bytes.push(state.letter());
        match series {
            Some(series) => {
                series.iter().for_each(|key| bytes.extend_from_slice(key.to_string().as_bytes()))
            }
            None => bytes.push(b'?'),
        }
        bytes.push(b' ');
        bytes.extend_from_slice(path.as_os_str().as_bytes());
        bytes.push(0);
    }
    bytes
}

/// Reads the daemon's list of files, as `encode_list` writes it. `None` if it has another form.
pub fn decode_list(bytes: &[u8]) -> Option<Vec<Listed>> {
    let entries = bytes.split(|&byte| byte == 0).filter(|entry| !entry.is_empty());
    entries.map(decode_entry).collect()
}

fn decode_entry(entry: &[u8]) -> Option<Listed> {
    let (letter, rest) = entry.split_first()?;
    let all = [FileState::Known, FileState::New, FileState::Growing, FileState::Paused];
    let state = all.into_iter().find(|state| state.letter() == *letter)?;

    let space = rest.iter().position(|&byte| byte == b' ')?;
    let (keys, path) = (&rest[..space], &rest[space + 1..]);
    let key = |text: &[u8]| SeriesKey::of_text(std::str::from_utf8(text).ok()?);
    let series = match keys {
        b"?" => None,
        keys => Some(keys.chunks(SeriesKey::TEXT_LEN).map(key).collect::<Option<Vec<_>>>()?),
    };
    Some(Listed { path: PathBuf::from(OsStr::from_bytes(path)), state, series })
}

/// How much one run does. The rest is [`Event::Postponed`].
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Volumes that are converted. The series and the zip in hand are finished first.
    pub max_volumes: u64,
    /// Bytes of the volumes as written.
    pub max_bytes: u64,
    /// Files of unknown series that are read.
    pub max_unknown: u64,
}

impl Bounds {
    /// No bounds: for files that a person names.
    pub const NONE: Self =
        Self { max_volumes: u64::MAX, max_bytes: u64::MAX, max_unknown: u64::MAX };
    /// For the daemon: other files wait for the end of a run, and a death costs the whole run.
    pub const ONE_RUN: Self = Self { max_volumes: 16, max_bytes: 1 << 30, max_unknown: 20_000 };

    /// The options of the command, and their values.
    fn options(self) -> [(&'static str, u64); 3] {
        [
            ("--max-volumes", self.max_volumes),
            ("--max-bytes", self.max_bytes),
            ("--max-unknown", self.max_unknown),
        ]
    }
}

/// A process that writes no line for this long counts as hanging.
const MAX_SILENCE: Duration = Duration::from_secs(300);

/// After this many deaths, the remaining files wait for the next conversion, because each death
/// costs another reading of all headers.
const MAX_DEATHS: usize = 16;

/// Memory limit of a process that reads `n_bytes` of files, bytes of address space.
///
/// It follows from the files, so that a small one cannot ask for the memory of a large one. A pixel
/// takes up to fifteen bytes: in the file, as decoded, in its slice, in the volume and as written.
/// Compressed, a pixel has an eighth of a byte or more. The settings limit the memory, too: to the
/// largest file with its codec, and to the largest volume.
fn memory_bytes(n_bytes: u64, limits: &Limits) -> u64 {
    let of_files = OWN_MEMORY_BYTES.saturating_add(n_bytes.saturating_mul(MEMORY_PER_BYTE));
    let of_largest_file = limits.max_file_bytes.saturating_mul(4);
    let allowed = (1_u64 << 30)
        .saturating_add(of_largest_file)
        .saturating_add(limits.max_voxels.saturating_mul(16));
    of_files.min(allowed)
}

/// Address space of a process for itself. It needs 40 MB; the rest is for the few pixels that
/// compress to almost nothing.
const OWN_MEMORY_BYTES: u64 = 128 << 20;

/// Memory for each byte of a file.
const MEMORY_PER_BYTE: u64 = 128;

/// Limit on the unpacked size of all files of a zip, bytes.
pub fn max_unpacked_bytes(limits: &Limits) -> u64 {
    limits.max_file_bytes.saturating_mul(16)
}

fn own(source: io::Error) -> ScanError {
    ScanError::Internal { doing: "converting DICOM files in the state folder", source }
}

/// Converts files into the folder `out` within `work`, which is emptied first. Returns the outcome
/// of each series, and which series the files belong to. Files that no other event names made no
/// volume. `n_bytes` is the size of all files that the conversion may read. `alive` is called
/// during the conversion. If it returns false, the conversion stops, and the result is `None`.
pub fn convert(
    mut files: Vec<Listed>,
    n_bytes: u64,
    work: &Path,
    limits: &Limits,
    bounds: Bounds,
    mut alive: impl FnMut() -> bool,
) -> Result<Option<Vec<Event>>, ScanError> {
    let mut outcomes: Vec<Event> = Vec::new();
    let mut blamed: BTreeSet<usize> = BTreeSet::new();
    let mut killed: Vec<Vec<usize>> = Vec::new();
    let mut n_deaths = 0;
    let memory_bytes = memory_bytes(n_bytes, limits);
    loop {
        let left: Vec<usize> = (0..files.len()).filter(|input| !blamed.contains(input)).collect();
        if left.is_empty() {
            return Ok(Some(outcomes));
        }
        if n_deaths >= MAX_DEATHS {
            let is_new = |input: &usize| files[*input].state == FileState::New;
            let inputs = left.into_iter().filter(is_new).collect();
            outcomes.push(Event::Postponed { inputs });
            return Ok(Some(outcomes));
        }

        let list = encode_list(left.iter().map(|&input| &files[input]));
        fresh_folder(work).map_err(own)?;
        let Some(end) =
            run_once(&list, work, limits, memory_bytes, bounds, &mut alive).map_err(own)?
        else {
            return Ok(None);
        };

        let Events { in_hand, others } = read_events(work, &left);
        let Some(refusal) = end.fault()? else {
            outcomes.extend(others);
            return Ok(Some(outcomes));
        };
        let Some(inputs) = in_hand else {
            return Err(own(io::Error::other("the process died before it read a file")));
        };

        // The next process need not read these headers again.
        for event in others {
            if let Event::Belongs { series, inputs } = &event {
                inputs.iter().for_each(|&input| files[input].series = Some(series.clone()));
                outcomes.push(event);
            }
        }

        warn!(%refusal, n_files = inputs.len(), "the conversion of DICOM files died");
        // A person or a system short of memory may have killed it, so one death proves nothing.
        if end.was_killed() && !killed.contains(&inputs) {
            killed.push(inputs);
            continue;
        }

        n_deaths += 1;
        blamed.extend(&inputs);
        if let [input] = inputs[..]
            && files[input].series.is_none()
        {
            // Its header is deadly. Nobody reads it again for the sake of another file.
            outcomes.push(Event::Belongs { series: Vec::new(), inputs: vec![input] });
        }
        outcomes.push(Event::Refused { name: String::new(), refusal, may_grow: false, inputs });
    }
}

impl Event {
    /// The files that the event is about.
    pub fn inputs(&self) -> &[usize] {
        match self {
            Self::InHand { inputs }
            | Self::Belongs { inputs, .. }
            | Self::Converted { inputs, .. }
            | Self::Refused { inputs, .. }
            | Self::Skipped { inputs, .. }
            | Self::Waiting { inputs }
            | Self::Postponed { inputs } => inputs,
        }
    }

    /// Files of the series that the event leaves out of a volume.
    pub fn left_out(&self) -> &[usize] {
        match self {
            Self::Converted { left_out, .. } => left_out,
            _ => &[],
        }
    }

    fn renumbered(mut self, left: &[usize]) -> Self {
        let renumber = |inputs: &mut Vec<usize>| {
            *inputs = inputs.iter().filter_map(|&input| left.get(input).copied()).collect();
        };
        if let Self::Converted { left_out, .. } = &mut self {
            renumber(left_out);
        }
        let (Self::InHand { inputs }
        | Self::Belongs { inputs, .. }
        | Self::Converted { inputs, .. }
        | Self::Refused { inputs, .. }
        | Self::Skipped { inputs, .. }
        | Self::Waiting { inputs }
        | Self::Postponed { inputs }) = &mut self;
        renumber(inputs);
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

/// What a process has said.
struct Events {
    /// The files that it started on last.
    in_hand: Option<Vec<usize>>,
    others: Vec<Event>,
}

/// Reads what a process has said. `left` are the positions of its files in the whole list.
fn read_events(work: &Path, left: &[usize]) -> Events {
    let text = fs::read(work.join("events")).unwrap_or_default();
    // The file names the patients, so it must not remain.
    fs::remove_file(work.join("events")).ok();

    let mut events = Events { in_hand: None, others: Vec::new() };
    for line in text.split(|&byte| byte == b'\n') {
        // The last line may be incomplete; it is then skipped.
        let Ok(event) = serde_json::from_slice::<Event>(line) else { continue };
        match event.renumbered(left) {
            Event::InHand { inputs } => events.in_hand = Some(inputs),
            event => events.others.push(event),
        }
    }
    events
}

fn run_once(
    list: &[u8],
    work: &Path,
    limits: &Limits,
    memory_bytes: u64,
    bounds: Bounds,
    alive: &mut dyn FnMut() -> bool,
) -> io::Result<Option<End>> {
    let at = |name: &str| work.join(name);
    File::create(at("list"))?.write_all(list)?;

    let out = at("out");
    // This is the running executable, even if an upgrade has replaced its file.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("oddscan").args(["dicom", "--listed", "--out"]).arg(&out);
    for (option, value) in [
        ("--max-voxels", limits.max_voxels),
        ("--max-file-bytes", limits.max_file_bytes),
        ("--memory-bytes", memory_bytes),
    ]
    .into_iter()
    .chain(bounds.options())
    {
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
    fn memory_follows_from_the_files_up_to_what_the_settings_allow() {
        let limits = Limits { max_file_bytes: 512 << 20, max_voxels: 200 << 20 };
        let mib = |n_bytes: u64| memory_bytes(n_bytes, &limits) >> 20;
        assert_eq!(mib(0), 128);
        assert!(memory_bytes(1_000_000, &limits) <= 300_000_000);
        assert_eq!(mib(20 << 20), 128 + 128 * 20);
        assert_eq!(mib(u64::MAX), 1024 + 4 * 512 + 16 * 200);
        assert_eq!(memory_bytes(u64::MAX, &Limits::NONE), u64::MAX);
    }

    #[test]
    fn a_list_of_files_survives_any_name() {
        let key = SeriesKey { study: 1, series: 2 };
        let other = SeriesKey { study: 1, series: u64::MAX };
        let files = [
            Listed::new(PathBuf::from("a\nb")),
            Listed {
                path: PathBuf::from(OsStr::from_bytes(b"\xff \"'")),
                state: FileState::Known,
                series: Some(vec![key, other]),
            },
            Listed { path: "/c".into(), state: FileState::Growing, series: Some(Vec::new()) },
        ];
        assert_eq!(decode_list(&encode_list(&files)).unwrap(), files);
        assert_eq!(decode_list(b"").unwrap(), []);
        for wrong in [&b"x? /a\0"[..], b"n/a\0", b"n12 /a\0", b"n", b"n?"] {
            assert_eq!(decode_list(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn events_keep_the_numbers_of_the_whole_list_and_the_last_files_in_hand() {
        let work = tempfile::tempdir().unwrap();
        let said = "{\"event\":\"in_hand\",\"inputs\":[0]}\n\
                    {\"event\":\"belongs\",\"series\":[],\"inputs\":[0]}\n\
                    {\"event\":\"in_hand\",\"inputs\":[1,9]}\n{\"event\":\"wai";
        fs::write(work.path().join("events"), said).unwrap();
        let Events { in_hand, others } = read_events(work.path(), &[4, 7]);
        assert_eq!(in_hand, Some(vec![7]));
        assert_eq!(others, [Event::Belongs { series: Vec::new(), inputs: vec![4] }]);
        assert!(!work.path().join("events").exists());
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
