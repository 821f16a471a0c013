//! `oddscan dicom`: converts DICOM series to NIfTI. The daemon runs it as a separate process.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read, Write},
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{Failure, INTERNAL, IO, REFUSED, USAGE};
use crate::{
    config::Config,
    dicom::{
        self, Converted, Head, NoVolume,
        unzip::{ZipLimits, unzip},
    },
    domain::{
        error::{
            QuarantineReason::{Io, Poison, TooLarge, Truncated},
            Refusal, panic_text,
        },
        left_alone::LeftAlone,
    },
    files,
    ingest::{self, Patterns},
    nifti::{self, Limits},
    process::{
        child::{self, Confines, Memory},
        convert::{Event, FileState, decode_list, max_unpacked_bytes},
    },
};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// DICOM files, folders of them, or zips. Their headers say which files belong together.
    #[arg(required_unless_present = "listed")]
    inputs: Vec<PathBuf>,
    /// Folder for `<number>_<description>_<suffix>.nii.gz` and a `.json` for each.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Read the list of files from standard input, in the form that the daemon writes.
    #[arg(long, hide = true)]
    listed: bool,
    #[arg(long, hide = true, default_value_t = u64::MAX)]
    max_voxels: u64,
    #[arg(long, hide = true, default_value_t = u64::MAX)]
    max_file_bytes: u64,
    /// Largest address space of this process.
    #[arg(long, hide = true)]
    memory_bytes: Option<u64>,
}

/// A file to convert.
struct Input {
    path: PathBuf,
    /// Its number in the caller's list. A file from a zip has the number of the zip.
    number: usize,
    standing: FileState,
}

/// Largest number of files in a zip.
const MAX_MEMBERS: usize = 100_000;

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let limits =
        Limits { max_file_bytes: arguments.max_file_bytes, max_voxels: arguments.max_voxels };
    if arguments.listed {
        confine(arguments, &limits).map_err(|error| Failure::new(INTERNAL, error))?;
    }

    let listed = if arguments.listed { listed()? } else { expand(&arguments.inputs)? };
    fs::create_dir_all(&arguments.out).map_err(|error| cannot_write(&arguments.out, &error))?;
    let unpacked = tempfile::Builder::new().prefix(".unpacked").tempdir_in(&arguments.out);
    let unpacked = unpacked.map_err(|error| cannot_write(&arguments.out, &error))?;

    let mut session = Session {
        out: &arguments.out,
        unpacked: unpacked.path(),
        limits,
        names: (!arguments.listed).then(|| listed.iter().map(|(_, path)| path.clone()).collect()),
        stems: BTreeSet::new(),
        n_converted: 0,
        n_refused: 0,
    };
    session.convert_all(&listed).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::of_output(error),
        _ => cannot_write(&arguments.out, &error),
    })?;

    match (arguments.listed, session.n_refused, session.n_converted) {
        (true, ..) | (false, 0, 1..) => Ok(()),
        (false, 0, 0) => Err(Failure::new(REFUSED, "nothing to convert")),
        (false, n, _) => Err(Failure::new(REFUSED, format!("{n} series or files were refused"))),
    }
}

fn cannot_write(folder: &Path, error: &io::Error) -> Failure {
    Failure::new(IO, format!("cannot write to {}: {error}", folder.display()))
}

/// Drops rights, so that a malicious or damaged file can do little harm.
fn confine(arguments: &Arguments, limits: &Limits) -> io::Result<()> {
    let of_volume = limits.max_voxels.saturating_mul(5).saturating_add(1 << 20);
    child::confine(&Confines {
        memory: arguments.memory_bytes.map_or(Memory::Unlimited, Memory::AddressSpace),
        max_file_bytes: limits.max_file_bytes.max(of_volume),
    })
}

fn listed() -> Result<Vec<(FileState, PathBuf)>, Failure> {
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes).map_err(|error| Failure::new(IO, error))?;
    decode_list(&bytes).ok_or_else(|| Failure::new(USAGE, "a list in the daemon's form is needed"))
}

/// The named DICOM files and zips, and those in named folders.
fn expand(named: &[PathBuf]) -> Result<Vec<(FileState, PathBuf)>, Failure> {
    let config = Config::parse("").map_err(|error| Failure::new(INTERNAL, error))?;
    let patterns = Patterns::new(&config.intake.accept, &config.intake.ignore)
        .map_err(|error| Failure::new(INTERNAL, error))?;

    let mut files = Vec::new();
    for path in named {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let has_mark = |file: &ingest::Candidate| ingest::has_dicom_mark(&file.path);
        let bundles = ingest::list_bundles(path, &patterns, has_mark, || {})
            .map_err(|e| Failure::new(IO, format!("cannot list {}: {e}", path.display())))?;
        files.extend(bundles.into_iter().flat_map(|bundle| bundle.files).map(|file| file.path));
    }
    Ok(files.into_iter().map(|path| (FileState::New, path)).collect())
}

struct Session<'a> {
    out: &'a Path,
    unpacked: &'a Path,
    limits: Limits,
    /// Names of the inputs, if a person reads the lines.
    names: Option<Vec<PathBuf>>,
    stems: BTreeSet<String>,
    n_converted: usize,
    n_refused: usize,
}

impl Session<'_> {
    fn convert_all(&mut self, listed: &[(FileState, PathBuf)]) -> io::Result<()> {
        let mut inputs = Vec::new();
        for (number, (standing, path)) in listed.iter().enumerate() {
            if ingest::has_ending(path, &["zip"]) {
                let files = self.unpack(number, path)?;
                inputs.extend(files.into_iter().map(|path| Input {
                    path,
                    number,
                    standing: *standing,
                }));
            } else {
                inputs.push(Input { path: path.clone(), number, standing: *standing });
            }
        }

        let mut heads: Vec<(usize, Head)> = Vec::new();
        for (index, input) in inputs.iter().enumerate() {
            if let Some(head) = self.read_head(input)? {
                heads.push((index, head));
            }
        }

        // Files that oddscan does not want are separated from the others, also within one series.
        let mut series: BTreeMap<_, Vec<(usize, &Head)>> = BTreeMap::new();
        for (index, head) in &heads {
            series
                .entry((head.series_uid.as_str(), head.unwanted))
                .or_default()
                .push((*index, head));
        }
        for ((_, unwanted), files) in series {
            self.convert_series(unwanted, &files, &inputs)?;
        }
        Ok(())
    }

    fn unpack(&mut self, number: usize, path: &Path) -> io::Result<Vec<PathBuf>> {
        self.say(&Event::InHand { inputs: vec![number] })?;
        let folder = self.unpacked.join(number.to_string());
        fs::create_dir(&folder)?;
        let max_bytes = max_unpacked_bytes(&self.limits);
        let limits = ZipLimits {
            max_members: MAX_MEMBERS,
            max_member_bytes: self.limits.max_file_bytes,
            max_bytes,
        };

        let opened = open(path, max_bytes);
        let unpacked = match opened {
            Ok((file, n_bytes)) => guarded(|| unzip(file, n_bytes, &folder, &limits)),
            Err(refusal) => Ok(Ok(Err(refusal))),
        };

        let refusal = match unpacked {
            Ok(Ok(Ok(files))) if files.is_empty() => {
                self.skip(String::new(), LeftAlone::EmptyZip, vec![number])?;
                return Ok(files);
            }
            Ok(Ok(Ok(files))) => return Ok(files),
            Ok(Ok(Err(refusal))) | Err(refusal) => refusal,
            Ok(Err(error)) => return Err(error),
        };
        // The zip itself may still be written.
        let may_grow = refusal.reason == Truncated;
        self.refuse(path, refusal, may_grow, vec![number])?;
        Ok(Vec::new())
    }

    fn read_head(&mut self, input: &Input) -> io::Result<Option<Head>> {
        self.say(&Event::InHand { inputs: vec![input.number] })?;
        let head = open(&input.path, self.limits.max_file_bytes)
            .and_then(|(file, _)| guarded(|| dicom::read_head(file))?);
        match head {
            Ok(head) => Ok(Some(head)),
            Err(_) if input.standing != FileState::New => {
                // The file was decided earlier, or is not whole yet.
                Ok(None)
            }
            Err(refusal) => {
                let may_grow = self.may_lack_its_end(&refusal, input);
                self.refuse(&input.path, refusal, may_grow, vec![input.number])?;
                Ok(None)
            }
        }
    }

    /// Whether the file may still be written. A file in a whole zip does not change any more.
    fn may_lack_its_end(&self, refusal: &Refusal, input: &Input) -> bool {
        refusal.reason == Truncated && !input.path.starts_with(self.unpacked)
    }

    fn convert_series(
        &mut self,
        unwanted: Option<LeftAlone>,
        files: &[(usize, &Head)],
        inputs: &[Input],
    ) -> io::Result<()> {
        let numbers = |indices: &mut dyn Iterator<Item = usize>| {
            let numbers: BTreeSet<usize> = indices.map(|index| inputs[index].number).collect();
            numbers.into_iter().collect::<Vec<_>>()
        };
        let all = numbers(&mut files.iter().map(|(index, _)| *index));
        let stands = |standing| files.iter().any(|&(index, _)| inputs[index].standing == standing);

        if stands(FileState::Growing) {
            return self.say(&Event::Waiting { inputs: all });
        }
        if !stands(FileState::New) {
            return Ok(());
        }

        let name = || files[0].1.name("unknown");
        if let Some(reason) = unwanted {
            return self.skip(name(), reason, all);
        }
        if let Some(refusal) = files.iter().find_map(|(_, head)| head.fault.clone()) {
            self.n_refused += 1;
            let name = name();
            return self.say(&Event::Refused { name, refusal, may_grow: false, inputs: all });
        }

        self.say(&Event::InHand { inputs: all })?;
        for stack in dicom::stacks(files) {
            let inputs_of = numbers(&mut stack.inputs.iter().copied());
            let name = self.free_name(&stack.name());
            let converted = guarded(|| {
                stack.convert(self.limits.max_voxels, |index| {
                    files::open_regular(&inputs[index].path).map(io::BufReader::new)
                })
            });
            match converted.unwrap_or_else(|refusal| Err(refusal.into())) {
                Ok(converted) => {
                    self.write(&name, &converted)?;
                    // The patient stays out of lines for people, because they may pass the lines
                    // on.
                    let patient = stack.head.patient.clone().filter(|_| self.names.is_none());
                    let dicom = self.names.is_none().then(|| stack.head.identifiers.clone());
                    self.say(&Event::Converted { name, patient, dicom, inputs: inputs_of })?;
                    self.n_converted += 1;
                }
                Err(NoVolume::Unwanted { reason, why }) => {
                    self.say(&Event::Skipped { name, reason, why, inputs: inputs_of })?;
                }
                Err(NoVolume::Refused { refusal, may_grow }) => {
                    let mut files = stack.inputs.iter().map(|&index| &inputs[index]);
                    let may_grow =
                        may_grow || files.all(|file| self.may_lack_its_end(&refusal, file));
                    self.n_refused += 1;
                    self.say(&Event::Refused { name, refusal, may_grow, inputs: inputs_of })?;
                }
            }
        }
        Ok(())
    }

    /// The name, with a number after the description if it is taken.
    fn free_name(&mut self, name: &str) -> String {
        let (start, suffix) = name.rsplit_once('_').unwrap_or((name, ""));
        let numbered = |count: u32| match count {
            1 => name.to_owned(),
            count => format!("{start}-{count}_{suffix}"),
        };
        let is_free = |name: &String| !self.stems.contains(name);
        let name = (1..).map(numbered).find(is_free).expect("there are enough numbers");
        self.stems.insert(name.clone());
        name
    }

    fn write(&self, name: &str, converted: &Converted) -> io::Result<()> {
        let facts = serde_json::to_string_pretty(&converted.facts).map_err(io::Error::other)?;
        fs::write(self.out.join(format!("{name}.json")), facts + "\n")?;
        let bytes = nifti::encode_volume(&converted.volume);
        fs::write(self.out.join(format!("{name}.nii.gz")), bytes)
    }

    fn skip(&self, name: String, reason: LeftAlone, inputs: Vec<usize>) -> io::Result<()> {
        self.say(&Event::Skipped { name, reason, why: reason.to_string(), inputs })
    }

    fn refuse(
        &mut self,
        path: &Path,
        refusal: Refusal,
        may_grow: bool,
        inputs: Vec<usize>,
    ) -> io::Result<()> {
        self.n_refused += 1;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.say(&Event::Refused { name, refusal, may_grow, inputs })
    }

    /// Prints one line per event. Lines for people have the names of the files instead of their
    /// numbers.
    fn say(&self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_value(event).map_err(io::Error::other)?;
        if let Some(names) = &self.names {
            if matches!(event, Event::InHand { .. }) {
                return Ok(());
            }
            let files: Vec<Value> =
                event.inputs().iter().map(|&input| json!(names[input].to_string_lossy())).collect();
            if let Some(line) = line.as_object_mut() {
                line.remove("inputs");
                line.insert("files".to_owned(), files.into());
            }
        }
        // Written at once: after a crash the last line shows which files were being converted.
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{line}")?;
        stdout.flush()
    }
}

/// Opens a file that is no link and not too large.
fn open(path: &Path, max_bytes: u64) -> Result<(File, u64), Refusal> {
    let opened =
        files::open_regular(path).and_then(|file| file.metadata().map(|meta| (file, meta.len())));
    let (file, n_bytes) = opened.map_err(|error| {
        let found = format!("a file that cannot be opened ({error})");
        Refusal::new(Io, found, "a file that can be read", "check its owner and permissions")
    })?;
    if n_bytes > max_bytes {
        let found = format!("{n_bytes} bytes");
        let needed = format!(
            "at most {max_bytes} bytes (intake.max_file_mib; sixteen times that for a zip)"
        );
        let action = "raise intake.max_file_mib if such files are expected";
        return Err(Refusal::new(TooLarge, found, needed, action));
    }
    Ok((file, n_bytes))
}

/// Runs `work`. A panic becomes a refusal.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, Refusal> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text: String =
            panic_text(panic.as_ref()).chars().filter(|c| !c.is_control()).take(200).collect();
        Refusal::new(
            Poison,
            format!("a crash while converting ({text})"),
            "a series that the converter understands",
            "export the series again; report it with the files, if they may be shared",
        )
    })
}
