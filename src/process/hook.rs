//! The site's own preprocessing ([`PreprocessSettings`]): a program that makes a brain mask or a
//! scan with other intensities, for example HD-BET, SynthStrip or N4. docs/preprocessing.md has the
//! contract.
//!
//! Its output must be on the scan's own grid. Maps are written there, and oddscan does the
//! alignment itself: it stores one matrix per scan and could not know of another.
//!
//! The program sees a copy of the scan in an empty folder, under a neutral name, and little else.
//! It runs once per scan. Its output is stored with the archived source.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    ops::ControlFlow,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use flate2::{Compression, write::GzEncoder};
use rustix::process::Signal;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tracing::{debug, warn};

use super::child::{self, Ended};
use crate::{
    domain::{
        error::{QuarantineReason::PreprocessFailed, Refusal, ScanError},
        scan::{Limits, PreprocessFacts, ScanRecord},
    },
    files::{fresh_folder, open_regular},
    numeric::{
        geometry::{Affine, Shape3},
        volume::RawVolume,
    },
};

/// Grows when oddscan starts to use the same output of a program in another way.
const CONTRACT: u32 = 1;

/// Time limit for the command that prints the version. Some programs load a whole framework first.
const VERSION_TIMEOUT: Duration = Duration::from_secs(120);
const MAX_VERSION_CHARS: usize = 200;

/// Limit on the program's own messages, bytes. The rest is dropped.
const MAX_SAID_BYTES: u64 = 64 << 10;
const MAX_WARNED_LINES: usize = 5;
const MAX_WARNED_CHARS: usize = 400;

/// Time between two measurements of the work folder's size.
const MEASURED: Duration = Duration::from_millis(500);

/// A service manager ends all processes of a service at once. After the death of a program, the
/// daemon waits this long to see whether it is being stopped, too.
const STOP_SHOWS: Duration = Duration::from_millis(300);

/// Largest distance between the corners of two equal grids, in voxels. It is not 0, because formats
/// store numbers in single precision.
const SAME_PLACE: f64 = 0.05;

/// Exit code of `oddscan confine`, shells and `env` for a program that may not be executed.
pub const CANNOT_EXECUTE: u8 = 126;
/// Exit code of the same for a program that does not exist.
pub const NOT_FOUND: u8 = 127;

/// The failing step in the error of a program that cannot be started.
pub const STARTING: &str = "starting the preprocessing program";

/// Which scans go through the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreprocessChoice {
    /// Scans without skull stripping.
    Heads,
    /// All scans, skull-stripped ones included.
    All,
}

/// The command and its limits: the section `[preprocess]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreprocessSettings {
    /// The program's full path, and its arguments. `{scan}`, `{out}` and `{mask}` stand for files.
    pub command: Vec<String>,
    /// Name of the program in sidecars.
    pub name: String,
    /// Program and arguments that print its version. If empty, the hash of the program's file is
    /// the version.
    pub version_command: Vec<String>,
    /// Which scans go through it.
    pub scans: PreprocessChoice,
    /// Time limit for one scan.
    pub timeout: Duration,
    /// Memory limit of each of its processes, bytes, if there is one.
    pub memory_bytes: Option<u64>,
    /// Limit on the size of all files that it writes, bytes.
    pub max_output_bytes: u64,
}

/// Why the preprocessing that the settings ask for cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The program does not exist or may not be executed.
    #[error("{} (preprocess.command) is no file that may be executed; install it or correct the path", .0.display())]
    Missing(PathBuf),
    /// The command for the version failed.
    #[error("preprocess.version_command failed: {0}")]
    Version(String),
    /// A file cannot be read or written.
    #[error("cannot read the preprocessing program")]
    Io(#[from] io::Error),
}

/// Reads a volume that the program wrote.
pub type ReadVolume = fn(&Path, &Limits) -> Result<RawVolume, ScanError>;

/// The program, its version and its settings.
#[derive(Debug)]
pub struct Hook {
    settings: PreprocessSettings,
    read: ReadVolume,
    version: String,
    identity: String,
}

/// Output of the program for one scan, on the scan's own grid.
pub struct HookOutput {
    /// The intensities of `{out}`, if it wrote that file.
    pub voxels: Option<Vec<f32>>,
    /// The brain of `{mask}`, if it wrote that file.
    pub mask: Option<Vec<bool>>,
    /// Facts about the run, for the ledger and the sidecar.
    pub facts: PreprocessFacts,
}

/// How a run ended.
enum RunEnd {
    Done,
    GivenUp,
    /// A person, the service manager or the system ended it.
    Ended(Signal),
    Unstarted(u8),
    Failed(String),
}

enum Stop {
    GivenUp,
    TooLong,
    TooMuch,
}

impl Hook {
    /// Checks that the program may be executed, and asks for its version.
    pub fn start(settings: &PreprocessSettings, read: ReadVolume) -> Result<Self, HookError> {
        let program = Path::new(&settings.command[0]);
        if !may_execute(program) {
            return Err(HookError::Missing(program.to_owned()));
        }

        let version = if settings.version_command.is_empty() {
            let mut hash = Sha256::new();
            io::copy(&mut File::open(program)?, &mut hash)?;
            format!("sha256:{}", hex::encode(hash.finalize()))
        } else {
            said_version(settings, read)?
        };

        let shaping =
            serde_json::json!([CONTRACT, settings.command, settings.scans as u8, version]);
        let identity = hex::encode(&Sha256::digest(shaping.to_string())[..8]);
        Ok(Self { settings: settings.clone(), read, version, identity })
    }

    /// Hash over everything that shapes its output, hex.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Name of the program in sidecars, from the settings.
    pub fn name(&self) -> &str {
        &self.settings.name
    }

    /// First line of the version command, or `sha256:` and the hash of the program's file.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether the program still exists and may be executed.
    pub fn is_there(&self) -> bool {
        may_execute(Path::new(&self.settings.command[0]))
    }

    /// Whether the program runs on a scan. `is_head` says that the scan is not skull-stripped.
    pub fn takes(&self, is_head: bool) -> bool {
        is_head || self.settings.scans == PreprocessChoice::All
    }

    /// Runs the program on a scan that was read from `file`. The folder `work` is emptied first and
    /// keeps its content afterwards. `alive` is called during the run. If it returns false, the run
    /// stops, and the result is `None`.
    pub fn run(
        &self,
        file: &Path,
        scan: &RawVolume,
        work: &Path,
        limits: &Limits,
        mut alive: impl FnMut() -> bool,
    ) -> Result<Option<HookOutput>, ScanError> {
        let started = Instant::now();
        let own =
            |source| ScanError::Internal { doing: "preprocessing in the state folder", source };

        let mut n_killed = 0;
        loop {
            fresh_folder(work).map_err(own)?;
            let scan = work.join("scan.nii.gz");
            copy_compressed(file, &scan).map_err(own)?;
            match self.run_once(work, &mut alive).map_err(own)? {
                RunEnd::Done => break,
                RunEnd::GivenUp => return Ok(None),
                // A system short of memory may have killed it, so one death proves nothing.
                RunEnd::Ended(Signal::KILL) if n_killed == 0 => n_killed += 1,
                RunEnd::Ended(Signal::KILL) => {
                    return Err(self
                        .failed("was killed twice, perhaps because the system is short of memory")
                        .into());
                }
                RunEnd::Ended(signal) => {
                    let what = format!("ended from outside by signal {}", signal.as_raw());
                    return Err(unstarted("running the preprocessing program", what));
                }
                RunEnd::Unstarted(code) => {
                    let what = if code == NOT_FOUND { "not found" } else { "not executable" };
                    let what =
                        format!("it, or a program that it calls, is {what} (exit code {code})");
                    return Err(unstarted(STARTING, what));
                }
                RunEnd::Failed(how) => return Err(self.failed(how).into()),
            }
        }

        let voxels = self.read_out(&work.join("out.nii.gz"), scan, limits)?;
        let mask = self.read_out(&work.join("mask.nii.gz"), scan, limits)?;
        if voxels.is_none() && mask.is_none() {
            return Err(self
                .failed("ended without an error, but wrote neither {out} nor {mask}")
                .into());
        }

        let facts = PreprocessFacts {
            name: self.settings.name.clone(),
            version: self.version.clone(),
            identity: self.identity.clone(),
            scan_replaced: voxels.is_some(),
            mask_made: mask.is_some(),
            secs: started.elapsed().as_secs_f64(),
        };
        let mask = mask.map(|mask| mask.iter().map(|&value| value > 0.0).collect());
        Ok(Some(HookOutput { voxels, mask, facts }))
    }

    fn run_once(&self, work: &Path, alive: &mut dyn FnMut() -> bool) -> io::Result<RunEnd> {
        let at = |name: &str| work.join(name).to_string_lossy().into_owned();
        let files = [
            ("{scan}", at("scan.nii.gz")),
            ("{out}", at("out.nii.gz")),
            ("{mask}", at("mask.nii.gz")),
        ];
        let word = |word: &String| {
            files.iter().fold(word.clone(), |word, (name, path)| word.replace(name, path))
        };

        let command: Vec<String> = self.settings.command.iter().map(word).collect();

        let timeout = self.settings.timeout;
        let (started, mut measured) = (Instant::now(), Instant::now());
        let max_bytes = self.settings.max_output_bytes;
        let (ended, said) = self.run_confined(&command, work, || {
            if !alive() {
                return ControlFlow::Break(Stop::GivenUp);
            }
            if started.elapsed() >= timeout {
                return ControlFlow::Break(Stop::TooLong);
            }
            if measured.elapsed() >= MEASURED {
                measured = Instant::now();
                if bytes_below(work) > max_bytes {
                    return ControlFlow::Break(Stop::TooMuch);
                }
            }
            ControlFlow::Continue(())
        })?;

        debug!(said, name = self.settings.name, "the preprocessing program said");
        let status = match ended {
            Ended::Alone(status) => status,
            Ended::Stopped(_, Stop::GivenUp) => return Ok(RunEnd::GivenUp),
            Ended::Stopped(_, Stop::TooLong) => {
                warn_said(&said);
                let secs = timeout.as_secs_f64();
                return Ok(RunEnd::Failed(format!(
                    "took more than {secs} s (preprocess.timeout_secs)"
                )));
            }
            Ended::Stopped(_, Stop::TooMuch) => {
                warn_said(&said);
                return Ok(RunEnd::Failed(too_much(max_bytes)));
            }
        };

        if status.success() {
            return Ok(RunEnd::Done);
        }
        thread::sleep(STOP_SHOWS);
        if !alive() {
            return Ok(RunEnd::GivenUp);
        }
        warn_said(&said);
        Ok(judged(status, max_bytes))
    }

    /// Runs a command within its limits. Returns how it ended, and its messages.
    fn run_confined<T>(
        &self,
        command: &[String],
        work: &Path,
        judge: impl FnMut() -> ControlFlow<T>,
    ) -> io::Result<(Ended<T>, String)> {
        let said = work.join(".said");
        let (out, errors) = {
            let file = File::options().create(true).append(true).open(&said)?;
            (file.try_clone()?, file)
        };

        // This is the running executable, even if an upgrade has replaced its file.
        let mut confined = Command::new("/proc/self/exe");
        confined.arg0("oddscan").arg("confine");
        confined.arg("--file-bytes").arg(self.settings.max_output_bytes.to_string());
        if let Some(most) = self.settings.memory_bytes {
            confined.arg("--data-bytes").arg(most.to_string());
        }
        confined.arg("--").args(command);
        confined.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LANG", "C.UTF-8");
        confined.env("HOME", work).env("TMPDIR", work);
        confined.current_dir(work).process_group(0);
        confined.stdin(Stdio::null()).stdout(out).stderr(errors);

        let mut child = confined.spawn()?;
        let ended = child::wait(&mut child, judge)?;

        let mut bytes = Vec::new();
        File::open(&said)?.take(MAX_SAID_BYTES).read_to_end(&mut bytes)?;
        Ok((ended, String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The voxels of a file, or `None` if the program did not write it.
    fn read_out(
        &self,
        path: &Path,
        scan: &RawVolume,
        limits: &Limits,
    ) -> Result<Option<Vec<f32>>, ScanError> {
        let what = if path.ends_with("mask.nii.gz") { "{mask}" } else { "{out}" };

        match fs::symlink_metadata(path) {
            Err(_) => return Ok(None),
            Ok(meta) if !meta.is_file() => {
                return Err(self.failed(format!("wrote a {what} that is no regular file")).into());
            }
            Ok(_) => {}
        }

        // The limit is not `intake.max_file_mib`, because files of 64-bit numbers are twice as
        // large as those that scanners write.
        let limits = Limits { max_file_bytes: self.settings.max_output_bytes, ..*limits };
        let volume = (self.read)(path, &limits).map_err(|error| match error {
            ScanError::Refused(refusal) => ScanError::Refused(
                self.failed(format!("wrote a {what} that is no scan: {}", refusal.found)),
            ),
            other => other,
        })?;

        if let Some(difference) = difference(scan, volume.shape, &volume.affine) {
            return Err(self
                .failed(format!("wrote a {what} on another grid: {difference}"))
                .into());
        }
        Ok(Some(volume.voxels))
    }

    fn failed(&self, how: impl std::fmt::Display) -> Refusal {
        Refusal::new(
            PreprocessFailed,
            format!("that {} {how}", self.settings.name),
            "{out} or {mask} on the scan's own grid, within the limits (preprocess)",
            "read its messages in the log, then look at the scan; when the program works again, put \
             the scan back with `oddscan quarantine requeue`",
        )
    }
}

/// Whether a scan of the ledger was preprocessed as the present settings ask for.
pub fn is_prepared_alike(record: &ScanRecord, hook: Option<&Hook>) -> bool {
    match (&record.preprocess, hook) {
        (Some(facts), hook) => hook.is_some_and(|hook| hook.identity == facts.identity),
        (None, None) => true,
        // The scan was not preprocessed: oddscan stripped its skull, or it arrived stripped.
        (None, Some(hook)) => {
            !hook.takes(record.alignment.is_some_and(|found| found.brain_extracted))
        }
    }
}

fn unstarted(doing: &'static str, what: String) -> ScanError {
    ScanError::Internal { doing, source: io::Error::other(what) }
}

fn too_much(max_bytes: u64) -> String {
    format!("wrote more than {} MiB (preprocess.max_output_mib)", max_bytes >> 20)
}

fn judged(status: ExitStatus, max_bytes: u64) -> RunEnd {
    if let Some(signal) = child::ended_from_outside(status) {
        return RunEnd::Ended(signal);
    }
    let signal = status.signal();
    // A shell reports the signal of a program that it ran as exit code 128 + signal.
    let code = status.code().unwrap_or_default();
    let fsize = Signal::XFSZ.as_raw();

    match signal {
        Some(signal) if signal == fsize => RunEnd::Failed(too_much(max_bytes)),
        Some(signal) => RunEnd::Failed(format!("died of signal {signal}")),
        None if code == 128 + fsize => RunEnd::Failed(too_much(max_bytes)),
        None if code == i32::from(NOT_FOUND) || code == i32::from(CANNOT_EXECUTE) => {
            RunEnd::Unstarted(code as u8)
        }
        None => RunEnd::Failed(format!("ended with exit code {code}")),
    }
}

/// How a grid differs from the scan's grid; `None` if they are equal.
fn difference(scan: &RawVolume, shape: Shape3, affine: &Affine) -> Option<String> {
    if shape != scan.shape {
        return Some(format!("{:?} voxels, the scan has {:?}", shape.0, scan.shape.0));
    }

    let far = scan.shape.0.map(|extent| (extent - 1) as f64);
    let corner = |index: usize| {
        std::array::from_fn(|axis| if index >> axis & 1 == 1 { far[axis] } else { 0.0 })
    };
    let apart = |index: usize| -> f64 {
        let (one, other) = (scan.affine.apply(corner(index)), affine.apply(corner(index)));
        one.iter().zip(other).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
    };

    let apart_mm = (0..8).map(apart).fold(0.0, f64::max);
    let spacing = scan.affine.spacing_mm().into_iter().fold(f64::INFINITY, f64::min);
    (apart_mm > SAME_PLACE * spacing).then(|| format!("its corners lie up to {apart_mm:.2} mm off"))
}

/// Copies a scan, and compresses it if it is not compressed. So one name, `.nii.gz`, suits all
/// scans; programs judge a file by its name.
fn copy_compressed(from: &Path, to: &Path) -> io::Result<()> {
    // The scan may be a link that a person has named.
    let from = &from.canonicalize()?;
    let mut start = [0; 2];
    let is_compressed = open_regular(from)?.read_exact(&mut start).is_ok() && start == [0x1f, 0x8b];
    let mut source = open_regular(from)?;
    if is_compressed {
        io::copy(&mut source, &mut File::create(to)?)?;
        return Ok(());
    }
    let mut gzip = GzEncoder::new(File::create(to)?, Compression::fast());
    io::copy(&mut source, &mut gzip)?;
    gzip.finish()?.flush()
}

fn may_execute(program: &Path) -> bool {
    program.is_file() && rustix::fs::access(program, rustix::fs::Access::EXEC_OK).is_ok()
}

fn said_version(settings: &PreprocessSettings, read: ReadVolume) -> Result<String, HookError> {
    let work = tempfile::tempdir()?;
    let (settings, version, identity) = (settings.clone(), String::new(), String::new());
    let hook = Hook { settings, read, version, identity };
    let started = Instant::now();
    let (ended, said) = hook.run_confined(&hook.settings.version_command, work.path(), || {
        if started.elapsed() < VERSION_TIMEOUT {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })?;

    let first = said.lines().map(str::trim).find(|line| !line.is_empty());
    let clean =
        |line: &str| line.chars().filter(|c| !c.is_control()).take(MAX_VERSION_CHARS).collect();

    match (ended, first) {
        (Ended::Stopped(..), _) => {
            Err(HookError::Version(format!("no answer within {} s", VERSION_TIMEOUT.as_secs())))
        }
        (Ended::Alone(status), first) if !status.success() => {
            let said: String = first.map(clean).unwrap_or_default();
            Err(HookError::Version(format!("{status}: {said}")))
        }
        (Ended::Alone(_), None) => Err(HookError::Version("it printed nothing".to_owned())),
        (Ended::Alone(_), Some(line)) => Ok(clean(line)),
    }
}

/// Logs the last lines of a program that failed. The program can know a patient's name only from
/// the header.
fn warn_said(said: &str) {
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines[lines.len().saturating_sub(MAX_WARNED_LINES)..].join(" | ");
    let last: Vec<char> = last.chars().filter(|c| !c.is_control()).collect();
    let said: String = last[last.len().saturating_sub(MAX_WARNED_CHARS)..].iter().collect();
    warn!(said, "the preprocessing program failed");
}

/// Size of all files in a folder, bytes. Files may change during the count.
fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes_below(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    entries.flatten().map(bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_is_told_by_its_signal_or_exit_code() {
        let told = |raw: i32| match judged(ExitStatus::from_raw(raw), 3 << 20) {
            RunEnd::Failed(how) => how,
            RunEnd::Ended(signal) => format!("signal {}", signal.as_raw()),
            RunEnd::Unstarted(code) => format!("unstarted {code}"),
            RunEnd::Done | RunEnd::GivenUp => String::new(),
        };
        assert_eq!(told(3 << 8), "ended with exit code 3");
        assert_eq!(told(127 << 8), "unstarted 127");
        assert_eq!((told(9), told(15)), ("signal 9".to_owned(), "signal 15".to_owned()));
        assert_eq!(told(11), "died of signal 11");
        let too_much = "wrote more than 3 MiB (preprocess.max_output_mib)";
        assert_eq!((told(25), told(153 << 8)), (too_much.to_owned(), too_much.to_owned()));
    }

    #[test]
    fn grids_that_differ_by_rounding_are_the_same_and_others_are_not() {
        let rows = [[1.1, 0.02, 0.0, -80.0], [-0.02, 1.0, 0.1, -90.0], [0.0, -0.1, 2.0, -70.0]];
        let affine = Affine::new(rows).unwrap();
        let shape = Shape3([5, 7, 11]);
        let scan = RawVolume { shape, voxels: vec![0.0; shape.n_voxels()], affine };
        let rounded =
            Affine::new(rows.map(|row| row.map(|entry| f64::from(entry as f32)))).unwrap();
        assert_eq!(difference(&scan, shape, &rounded), None);
        let mut moved = rows;
        moved[1][3] += 0.2;
        let moved = difference(&scan, shape, &Affine::new(moved).unwrap()).unwrap();
        assert_eq!(moved, "its corners lie up to 0.20 mm off");
        let other = difference(&scan, Shape3([5, 11, 7]), &affine).unwrap();
        assert_eq!(other, "[5, 11, 7] voxels, the scan has [5, 7, 11]");
    }
}
