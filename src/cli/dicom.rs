//! `oddscan dicom`: converts DICOM series to NIfTI. The daemon runs it as a separate process.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs::{self, File},
    io::{self, Read, Write},
    mem,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{Failure, INTERNAL, IO, REFUSED, USAGE};
use crate::{
    config::Config,
    dicom::{
        self, Converted, Head, NoVolume, Series,
        unzip::{Unzipped, ZipLimits, unzip},
    },
    domain::{
        error::{
            QuarantineReason::{Io, Poison, TooLarge, Truncated},
            Refusal, panic_text,
        },
        left_alone::LeftAlone,
        series_key::SeriesKey,
    },
    files,
    ingest::{self, Patterns},
    nifti::{self, Limits},
    process::{
        child::{self, Confines, Memory},
        convert::{Bounds, Event, FileState, Listed, MAX_KEYS, decode_list, max_unpacked_bytes},
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
    #[arg(long, hide = true, default_value_t = u64::MAX)]
    max_volumes: u64,
    #[arg(long, hide = true, default_value_t = u64::MAX)]
    max_bytes: u64,
    #[arg(long, hide = true, default_value_t = u64::MAX)]
    max_unknown: u64,
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

/// A zip whose members were read.
struct Zip {
    /// Its members with a header that can be read, and the series that they name.
    members: Vec<(PathBuf, SeriesKey)>,
    n_bytes: u64,
    /// Whether its members lie unpacked in their folder.
    is_unpacked: bool,
    /// Whether one of its studies was converted in this run.
    is_begun: bool,
}

/// Largest number of files in a zip.
const MAX_MEMBERS: usize = 100_000;

/// The zips of one study may unpack to this many times the limit of one zip.
const MAX_ZIPS_OF_STUDY: u64 = 4;

/// Headers of new files that are kept until their study is converted, so that most are read once.
/// One takes a few KB.
const MAX_KEPT: usize = 4000;

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let limits =
        Limits { max_file_bytes: arguments.max_file_bytes, max_voxels: arguments.max_voxels };
    if arguments.listed {
        confine(arguments, &limits).map_err(|error| Failure::new(INTERNAL, error))?;
    }

    let mut listed = if arguments.listed { listed()? } else { expand(&arguments.inputs)? };
    fs::create_dir_all(&arguments.out).map_err(|error| cannot_write(&arguments.out, &error))?;
    let unpacked = tempfile::Builder::new().prefix(".unpacked").tempdir_in(&arguments.out);
    let unpacked = unpacked.map_err(|error| cannot_write(&arguments.out, &error))?;

    let mut session = Session {
        out: &arguments.out,
        unpacked: unpacked.path(),
        limits,
        bounds: Bounds {
            max_volumes: arguments.max_volumes,
            max_bytes: arguments.max_bytes,
            max_unknown: arguments.max_unknown,
        },
        names: (!arguments.listed).then(|| listed.iter().map(|file| file.path.clone()).collect()),
        zips: BTreeMap::new(),
        shared_studies: SharedStudies::default(),
        kept: HashMap::new(),
        share_fails: false,
        is_quiet: false,
        stems: BTreeSet::new(),
        unreadable: Vec::new(),
        n_converted: 0,
        n_refused: 0,
    };
    session.convert_all(&mut listed).map_err(|error| match error.kind() {
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

fn listed() -> Result<Vec<Listed>, Failure> {
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes).map_err(|error| Failure::new(IO, error))?;
    decode_list(&bytes).ok_or_else(|| Failure::new(USAGE, "a list in the daemon's form is needed"))
}

/// The named DICOM files and zips, and those in named folders.
fn expand(named: &[PathBuf]) -> Result<Vec<Listed>, Failure> {
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
        let found = ingest::list_dicom(path, &patterns, has_mark, || {})
            .map_err(|e| Failure::new(IO, format!("cannot list {}: {e}", path.display())))?;
        files.extend(found.into_iter().map(|file| file.path));
    }
    Ok(files.into_iter().map(Listed::new).collect())
}

/// Studies that share a series, each with another one of them. Careless anonymisers name a study
/// for each slice.
#[derive(Default)]
struct SharedStudies(HashMap<u64, u64>);

impl SharedStudies {
    fn of(listed: &[Listed]) -> Self {
        let mut shared = Self::default();
        let mut first_of_series: HashMap<u64, u64> = HashMap::new();
        for key in listed.iter().flat_map(|file| file.series.iter().flatten()) {
            let first = shared.root(*first_of_series.entry(key.series).or_insert(key.study));
            let study = shared.root(key.study);
            if first != study {
                shared.0.insert(study, first);
            }
        }
        shared
    }

    /// The one study that stands for all that share a series.
    fn root(&self, mut study: u64) -> u64 {
        while let Some(&other) = self.0.get(&study) {
            study = other;
        }
        study
    }
}

/// The series that are not tried in this run.
fn paused(listed: &[Listed]) -> HashSet<SeriesKey> {
    let paused = listed.iter().filter(|file| file.state == FileState::Paused);
    paused.flat_map(|file| file.series.iter().flatten()).copied().collect()
}

/// The studies with a new file of a series that is not paused, each with the positions of its
/// files, in the order of the first such files.
///
/// A zip that was decided earlier is unpacked again only for its own series: archives often send
/// one zip for each series of a study.
fn studies(listed: &[Listed], paused: &HashSet<SeriesKey>) -> Vec<(u64, Vec<usize>)> {
    let mut order: HashMap<u64, usize> = HashMap::new();
    let mut new_series: HashSet<SeriesKey> = HashSet::new();
    for file in listed.iter().filter(|file| file.state == FileState::New) {
        for &key in file.series.iter().flatten().filter(|key| !paused.contains(key)) {
            let n_studies = order.len();
            order.entry(key.study).or_insert(n_studies);
            new_series.insert(key);
        }
    }

    let mut studies: Vec<(u64, Vec<usize>)> = vec![(0, Vec::new()); order.len()];
    for (&study, &index) in &order {
        studies[index].0 = study;
    }
    for (number, file) in listed.iter().enumerate() {
        let is_old_zip = file.state == FileState::Known && ingest::is_zip(&file.path);
        for key in file.series.iter().flatten() {
            let Some(&index) = order.get(&key.study) else { continue };
            let files = &mut studies[index].1;
            if files.last() != Some(&number) && (!is_old_zip || new_series.contains(key)) {
                files.push(number);
            }
        }
    }
    studies
}

fn key_of(head: &Head) -> SeriesKey {
    SeriesKey::new(head.study_uid(), &head.series_uid)
}

/// A file whose header cannot be read.
struct Unreadable {
    path: PathBuf,
    /// Its number in the caller's list, or that of its zip.
    number: usize,
    refusal: Refusal,
}

struct Session<'a> {
    out: &'a Path,
    unpacked: &'a Path,
    limits: Limits,
    bounds: Bounds,
    /// Names of the inputs, if a person reads the lines.
    names: Option<Vec<PathBuf>>,
    /// The zips that were read, by their positions in the list.
    zips: BTreeMap<usize, Zip>,
    shared_studies: SharedStudies,
    /// Headers of new files whose study is not converted yet.
    kept: HashMap<PathBuf, Head>,
    /// Whether a file that was read earlier could not be opened now.
    share_fails: bool,
    /// Whether faults remain unsaid: an earlier run has said them, or the file is not whole yet.
    is_quiet: bool,
    stems: BTreeSet<String>,
    /// Files whose header cannot be read, until they are refused together.
    unreadable: Vec<Unreadable>,
    n_converted: usize,
    n_refused: usize,
}

impl Session<'_> {
    /// Converts the series that new files belong to. It reads the headers of unknown files first,
    /// and then works on one study after the other, so that memory and disk hold no more than one.
    fn convert_all(&mut self, listed: &mut [Listed]) -> io::Result<()> {
        let is_complete = self.learn(listed)?;
        for number in self.refuse_unreadable(listed)? {
            // Nothing of a refused zip is converted.
            listed[number].series = Some(Vec::new());
        }
        if !is_complete {
            // A series may still lack files that are not read yet. Refused files have no series.
            let is_open = |file: &Listed| {
                let has_series = file.series.as_ref().is_none_or(|keys| !keys.is_empty());
                file.state == FileState::New && has_series
            };
            let inputs = (0..listed.len()).filter(|&number| is_open(&listed[number])).collect();
            return self.say(&Event::Postponed { inputs });
        }

        self.shared_studies = SharedStudies::of(listed);
        for key in listed.iter_mut().flat_map(|file| file.series.iter_mut().flatten()) {
            key.study = self.shared_studies.root(key.study);
        }

        let paused = paused(listed);
        for (number, file) in listed.iter().enumerate() {
            let mut keys = file.series.iter().flatten().peekable();
            let is_new = file.state == FileState::New && keys.peek().is_some();
            if is_new && keys.all(|key| paused.contains(key)) {
                self.say(&Event::Waiting { inputs: vec![number] })?;
            }
        }
        for (study, numbers) in studies(listed, &paused) {
            self.convert_study(study, &numbers, listed)?;
        }
        self.refuse_unreadable(listed)?;
        Ok(())
    }

    /// Reads which series the files belong to, as far as nobody knows it. False if the run ends
    /// before everything is known that new files need.
    fn learn(&mut self, listed: &mut [Listed]) -> io::Result<bool> {
        let is_unknown = |file: &Listed| match &file.series {
            None => true,
            // A new file has to say what is wrong with it, or all of its series.
            Some(series) if file.state == FileState::New => {
                series.is_empty() || series.len() >= MAX_KEYS
            }
            Some(_) => false,
        };
        let new = listed.iter().filter(|file| file.state == FileState::New);
        let folders: HashSet<PathBuf> =
            new.filter_map(|file| file.path.parent()).map(Path::to_owned).collect();
        let is_beside_new =
            |file: &Listed| file.path.parent().is_some_and(|folder| folders.contains(folder));

        // Files that were decided by an earlier version have no series yet. Those beside a new file
        // may well be of its series. The others are read little by little.
        let urgency = |file: &Listed| match file.state {
            FileState::New => 0,
            FileState::Paused => 1,
            FileState::Known if is_beside_new(file) => 1,
            FileState::Growing => 2,
            FileState::Known => 3,
        };
        let mut unknown: Vec<(u8, usize)> = (0..listed.len())
            .filter(|&number| is_unknown(&listed[number]))
            .map(|number| (urgency(&listed[number]), number))
            .collect();
        unknown.sort_unstable();

        let mut n_left = self.bounds.max_unknown;
        for (urgency, number) in unknown {
            if n_left == 0 {
                return Ok(urgency > 1);
            }
            let keys = self.learn_file(number, &listed[number])?;
            let n_members = self.zips.get(&number).map_or(0, |zip| zip.members.len());
            n_left = n_left.saturating_sub(1 + n_members as u64);

            // A file that cannot be read is not read again for the sake of others.
            let is_tried = matches!(listed[number].state, FileState::Known | FileState::Paused);
            if !keys.is_empty() || is_tried {
                let series = keys.iter().copied().take(MAX_KEYS).collect();
                self.say(&Event::Belongs { series, inputs: vec![number] })?;
            }
            listed[number].series = Some(keys);
        }
        Ok(true)
    }

    /// The series of a file, or of all members of a zip; none if no header can be read.
    fn learn_file(&mut self, number: usize, file: &Listed) -> io::Result<Vec<SeriesKey>> {
        if ingest::is_zip(&file.path) {
            self.make_room(&[number])?;
            self.learn_zip(number, file)?;
            let zip = self.zips.get(&number).map(|zip| zip.members.as_slice());
            let keys: BTreeSet<SeriesKey> =
                zip.unwrap_or_default().iter().map(|(_, key)| *key).collect();
            return Ok(keys.into_iter().collect());
        }

        let input = Input { path: file.path.clone(), number, standing: file.state };
        Ok(self.learn_head(input)?.into_iter().map(|(_, key)| key).collect())
    }

    fn learn_zip(&mut self, number: usize, file: &Listed) -> io::Result<()> {
        let paths = self.unpack_as(file.state, number, &file.path)?;
        let sizes = paths.iter().map(|path| fs::metadata(path).map_or(0, |meta| meta.len()));
        let n_bytes = sizes.sum();

        let mut members = Vec::new();
        for path in paths {
            let input = Input { path, number, standing: file.state };
            members.extend(self.learn_head(input)?);
        }
        let zip = Zip { members, n_bytes, is_unpacked: true, is_begun: false };
        self.zips.insert(number, zip);
        Ok(())
    }

    /// Reads the series of one file. Keeps the header if the file is soon converted.
    fn learn_head(&mut self, input: Input) -> io::Result<Option<(PathBuf, SeriesKey)>> {
        let Some(head) = self.read_head(&input)? else { return Ok(None) };
        let key = key_of(&head);
        if input.standing != FileState::Known && self.kept.len() < MAX_KEPT {
            self.kept.insert(input.path.clone(), head);
        }
        Ok(Some((input.path, key)))
    }

    /// Unpacks a zip. Only a new one says what is wrong with it.
    fn unpack_as(
        &mut self,
        state: FileState,
        number: usize,
        path: &Path,
    ) -> io::Result<Vec<PathBuf>> {
        self.is_quiet = state != FileState::New;
        let paths = self.unpack(number, path);
        self.is_quiet = false;
        paths
    }

    /// Converts the series of one study.
    fn convert_study(
        &mut self,
        study: u64,
        numbers: &[usize],
        listed: &[Listed],
    ) -> io::Result<()> {
        let is_new = |number: &usize| listed[*number].state == FileState::New;
        // A new zip is finished in the run that has begun it. Otherwise the next run would begin
        // with the same volumes.
        let is_begun = |number: &usize| {
            is_new(number) && self.zips.get(number).is_some_and(|zip| zip.is_begun)
        };
        if self.is_spent()? && !numbers.iter().any(is_begun) {
            let inputs = numbers.iter().copied().filter(is_new).collect();
            return self.say(&Event::Postponed { inputs });
        }

        self.share_fails = false;
        let inputs = self.inputs_of(study, numbers, listed)?;
        let mut heads: Vec<(usize, Head)> = Vec::new();
        for (index, input) in inputs.iter().enumerate() {
            let head = match self.kept.remove(&input.path) {
                Some(head) => Some(head),
                None => self.read_head(input)?,
            };
            heads.extend(head.map(|head| (index, head)));
        }

        if self.share_fails {
            let inputs = numbers.iter().copied().filter(is_new).collect();
            let found = "other files of the study that cannot be opened now";
            let needed = "all files of the study";
            let refusal = Refusal::new(Io, found, needed, "check the share and the permissions");
            return self.refuse_as("study".to_owned(), refusal, false, inputs);
        }

        let heads: Vec<(usize, &Head)> = heads.iter().map(|(index, head)| (*index, head)).collect();
        for series in dicom::series(&heads) {
            if self.is_due(&series.files, &inputs)? {
                self.convert_series(&series, &inputs)?;
            }
        }
        Ok(())
    }

    /// Whether this run converts a series. If the series waits, an event says so.
    fn is_due(&self, files: &[(usize, &Head)], inputs: &[Input]) -> io::Result<bool> {
        let numbers = |standing: FileState| -> Vec<usize> {
            let files = files.iter().map(|(index, _)| &inputs[*index]);
            let alike = files.filter(|input| input.standing == standing);
            alike.map(|input| input.number).collect::<BTreeSet<_>>().into_iter().collect()
        };
        let new = numbers(FileState::New);
        if new.is_empty() {
            return Ok(false);
        }
        if !numbers(FileState::Paused).is_empty() {
            self.say(&Event::Waiting { inputs: new })?;
            return Ok(false);
        }

        // As with studies, a new zip is finished.
        let is_in_zip = new.iter().any(|number| self.zips.contains_key(number));
        if self.is_spent()? && !is_in_zip {
            self.say(&Event::Postponed { inputs: new })?;
            return Ok(false);
        }
        Ok(true)
    }

    /// Whether the run has done as much as one may do.
    fn is_spent(&self) -> io::Result<bool> {
        if self.n_converted as u64 >= self.bounds.max_volumes {
            return Ok(true);
        }
        if self.bounds.max_bytes == u64::MAX {
            return Ok(false);
        }
        let mut n_bytes = 0;
        for entry in fs::read_dir(self.out)? {
            n_bytes += entry?.metadata()?.len();
        }
        Ok(n_bytes >= self.bounds.max_bytes)
    }

    /// The files of one study, and the members of zips.
    fn inputs_of(
        &mut self,
        study: u64,
        numbers: &[usize],
        listed: &[Listed],
    ) -> io::Result<Vec<Input>> {
        let most = max_unpacked_bytes(&self.limits).saturating_mul(MAX_ZIPS_OF_STUDY);
        let mut inputs = Vec::new();
        let mut n_bytes = 0;
        for &number in numbers {
            let file = &listed[number];
            if !ingest::is_zip(&file.path) {
                inputs.push(Input { path: file.path.clone(), number, standing: file.state });
                continue;
            }

            self.make_room(numbers)?;
            if !self.unpack_again(number, listed)? {
                continue;
            }
            let zip = self.zips.get_mut(&number).expect("it was unpacked");
            zip.is_begun = true;
            n_bytes += zip.n_bytes;
            if n_bytes > most {
                let found = format!("zips of one examination that unpack to {n_bytes} bytes");
                let needed = format!("at most {most} bytes (64 times intake.max_file_mib)");
                let action = "export the examination in one zip, or as files";
                let refusal = Refusal::new(TooLarge, found, needed, action);
                self.refuse(&file.path, refusal, false, vec![number])?;
                continue;
            }

            let shared = &self.shared_studies;
            let of_study = zip.members.iter().filter(|(_, key)| shared.root(key.study) == study);
            inputs.extend(of_study.map(|(path, _)| Input {
                path: path.clone(),
                number,
                standing: file.state,
            }));
        }
        Ok(inputs)
    }

    /// Makes sure that the members of a zip are unpacked. False if this is not possible.
    fn unpack_again(&mut self, number: usize, listed: &[Listed]) -> io::Result<bool> {
        let file = &listed[number];
        match self.zips.get(&number) {
            Some(zip) if zip.is_unpacked => return Ok(true),
            Some(_) => {
                let is_there = !self.unpack_as(file.state, number, &file.path)?.is_empty();
                let zip = self.zips.get_mut(&number).expect("it was there");
                zip.is_unpacked = is_there;
                return Ok(is_there);
            }
            None => {
                self.learn_zip(number, file)?;
                self.refuse_unreadable(listed)?;
            }
        }
        Ok(true)
    }

    /// Removes unpacked zips, except for the needed ones, until all together are no larger than one
    /// may be.
    fn make_room(&mut self, needed: &[usize]) -> io::Result<()> {
        let most = max_unpacked_bytes(&self.limits);
        let unpacked = self.zips.values().filter(|zip| zip.is_unpacked);
        let mut n_bytes: u64 = unpacked.map(|zip| zip.n_bytes).sum();
        for (number, zip) in &mut self.zips {
            if n_bytes <= most {
                break;
            }
            if zip.is_unpacked && !needed.contains(number) {
                fs::remove_dir_all(self.unpacked.join(number.to_string()))?;
                zip.is_unpacked = false;
                n_bytes -= zip.n_bytes;
            }
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
            Ok(Ok(Ok(unzipped))) => {
                self.tell_content(number, &unzipped)?;
                return Ok(unzipped.files);
            }
            Ok(Ok(Err(refusal))) | Err(refusal) => refusal,
            Ok(Err(error)) => return Err(error),
        };
        // The zip itself may still be written.
        let may_grow = refusal.reason == Truncated;
        self.refuse(path, refusal, may_grow, vec![number])?;
        Ok(Vec::new())
    }

    /// Says what stays in a zip. Scans among it would otherwise be lost without a word.
    fn tell_content(&self, number: usize, unzipped: &Unzipped) -> io::Result<()> {
        let has_scans = unzipped.n_nifti + unzipped.n_zips > 0;
        let reason = match unzipped.files.is_empty() {
            true => LeftAlone::EmptyZip,
            false if has_scans => LeftAlone::NotAScan,
            false => {
                // The daemon logs this at the level `debug`.
                if self.names.is_none() && unzipped.n_others > 0 {
                    eprintln!("{} files in a zip are not DICOM", unzipped.n_others);
                }
                return Ok(());
            }
        };

        let rest = if unzipped.files.is_empty() { reason.to_string() } else { "a zip".to_owned() };
        let action = if has_scans { "; unpack it to have these scans taken" } else { "" };
        let why = format!("{rest} with {unzipped}{action}");
        self.say(&Event::Skipped { name: String::new(), reason, why, inputs: vec![number] })
    }

    fn read_head(&mut self, input: &Input) -> io::Result<Option<Head>> {
        self.say(&Event::InHand { inputs: vec![input.number] })?;
        let head = open(&input.path, self.limits.max_file_bytes)
            .and_then(|(file, _)| guarded(|| dicom::read_head(file))?);
        match head {
            Ok(head) => Ok(Some(head)),
            Err(refusal) if input.standing != FileState::New => {
                // The file was decided earlier, or is not whole yet. If a share fails for a moment,
                // its series must not be taken without it.
                self.share_fails |= refusal.reason == Io && input.standing != FileState::Growing;
                Ok(None)
            }
            Err(refusal) => {
                let Input { path, number, .. } = input;
                let (path, number) = (path.clone(), *number);
                self.unreadable.push(Unreadable { path, number, refusal });
                Ok(None)
            }
        }
    }

    /// Whether the file may still be written. A file in a whole zip does not change any more.
    fn may_lack_its_end(&self, refusal: &Refusal, input: &Input) -> bool {
        refusal.reason == Truncated && !input.path.starts_with(self.unpacked)
    }

    /// Refuses the files whose headers could not be read: once for each folder and cause, and once
    /// for each zip. Such a zip is refused as a whole, because its other files may be a part of a
    /// series only. Returns the numbers of all refused files.
    fn refuse_unreadable(&mut self, listed: &[Listed]) -> io::Result<BTreeSet<usize>> {
        let unreadable = mem::take(&mut self.unreadable);
        let mut of_folders: BTreeMap<_, Vec<(usize, &Refusal)>> = BTreeMap::new();
        let mut of_zips: BTreeMap<usize, Vec<&Refusal>> = BTreeMap::new();
        for Unreadable { path, number, refusal } in &unreadable {
            if path.starts_with(self.unpacked) {
                of_zips.entry(*number).or_default().push(refusal);
            } else {
                let same = of_folders.entry((path.parent(), cause(refusal))).or_default();
                same.push((*number, refusal));
            }
        }

        for files in of_folders.into_values() {
            let numbers: Vec<usize> = files.iter().map(|(number, _)| *number).collect();
            // Several files have no name in common.
            let path = match numbers[..] {
                [number] => listed[number].path.as_path(),
                _ => Path::new("unreadable"),
            };
            let refusal = refusal_of_folder(&files);
            let may_grow = refusal.reason == Truncated;
            self.refuse(path, refusal, may_grow, numbers)?;
        }
        for (number, refusals) in of_zips {
            let members = self.zips.get_mut(&number).map(|zip| mem::take(&mut zip.members));
            let n_files = refusals.len() + members.map_or(0, |members| members.len());
            let refusal = refusal_of_zip(&refusals, n_files);
            self.refuse(&listed[number].path, refusal, false, vec![number])?;
        }
        Ok(unreadable.into_iter().map(|file| file.number).collect())
    }

    fn convert_series(&mut self, series: &Series<'_>, inputs: &[Input]) -> io::Result<()> {
        let files = &series.files;
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
        if let Some(reason) = series.unwanted {
            return self.skip(name(), reason, all);
        }
        if let Some(refusal) = fault_of(files) {
            return self.refuse_as(name(), refusal, false, all);
        }

        self.say(&Event::InHand { inputs: all.clone() })?;
        let open = |index: usize| files::open_regular(&inputs[index].path).map(io::BufReader::new);
        let stacks = match guarded(|| dicom::stacks(series, open)).flatten() {
            Ok(stacks) => stacks,
            Err(refusal) => return self.refuse_as(name(), refusal, false, all),
        };

        for stack in stacks {
            let mut of_stack = numbers(&mut stack.inputs.iter().copied());
            let mut left_out = numbers(&mut stack.left_out.iter().copied());
            // All files of a zip have one number.
            left_out.retain(|number| !of_stack.contains(number));
            let name = self.free_name(&stack.name());
            let converted = guarded(|| stack.convert(self.limits.max_voxels, open));
            let fault = match converted.unwrap_or_else(|refusal| Err(refusal.into())) {
                Ok(converted) => {
                    self.write(&name, &converted)?;
                    // The patient stays out of lines for people, because they may pass the lines
                    // on.
                    let patient = stack.head.patient.clone().filter(|_| self.names.is_none());
                    let dicom = self.names.is_none().then(|| stack.head.identifiers.clone());
                    let inputs = of_stack;
                    self.say(&Event::Converted { name, patient, dicom, inputs, left_out })?;
                    self.n_converted += 1;
                    continue;
                }
                Err(fault) => fault,
            };

            // Slices that belong to no stack share the fate of this one.
            of_stack.extend(left_out);
            of_stack.sort_unstable();
            match fault {
                NoVolume::Unwanted { reason, why } => {
                    self.say(&Event::Skipped { name, reason, why, inputs: of_stack })?;
                }
                NoVolume::Refused { refusal, may_grow } => {
                    let mut files = stack.inputs.iter().map(|&index| &inputs[index]);
                    let may_grow =
                        may_grow || files.all(|file| self.may_lack_its_end(&refusal, file));
                    self.refuse_as(name, refusal, may_grow, of_stack)?;
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
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.refuse_as(name, refusal, may_grow, inputs)
    }

    fn refuse_as(
        &mut self,
        name: String,
        refusal: Refusal,
        may_grow: bool,
        inputs: Vec<usize>,
    ) -> io::Result<()> {
        self.n_refused += 1;
        self.say(&Event::Refused { name, refusal, may_grow, inputs })
    }

    /// Prints one line per event. Lines for people have the names of the files instead of their
    /// numbers.
    fn say(&self, event: &Event) -> io::Result<()> {
        if self.is_quiet && !matches!(event, Event::InHand { .. }) {
            return Ok(());
        }
        let mut line = serde_json::to_value(event).map_err(io::Error::other)?;
        if let Some(names) = &self.names {
            if matches!(event, Event::InHand { .. } | Event::Belongs { .. }) {
                return Ok(());
            }
            let named = |inputs: &[usize]| -> Value {
                inputs.iter().map(|&input| json!(names[input].to_string_lossy())).collect()
            };
            if let Some(line) = line.as_object_mut() {
                line.remove("inputs");
                line.insert("files".to_owned(), named(event.inputs()));
                if line.contains_key("left_out") {
                    line.insert("left_out".to_owned(), named(event.left_out()));
                }
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

/// The cause of a refusal: its class and its text, without the numbers that differ from file to
/// file. Files that lack their end have one cause, wherever they end.
fn cause(refusal: &Refusal) -> (&'static str, String) {
    let is_cut = refusal.reason == Truncated;
    let text = refusal.found.chars().filter(|c| !is_cut && !c.is_ascii_hexdigit()).collect();
    (refusal.reason.name(), text)
}

/// One refusal for all files of a folder that cannot be read for one cause.
fn refusal_of_folder(files: &[(usize, &Refusal)]) -> Refusal {
    let (_, first) = files[0];
    match files.len() {
        1 => first.clone(),
        n_files => {
            let found = format!("{n_files} files, the first: {}", first.found);
            Refusal { found, ..first.clone() }
        }
    }
}

/// One refusal for the files of a zip that cannot be read, of `n_files` DICOM files in it.
fn refusal_of_zip(refusals: &[&Refusal], n_files: usize) -> Refusal {
    let mut causes = BTreeMap::<_, (usize, &str)>::new();
    for refusal in refusals {
        causes.entry(cause(refusal)).or_insert((0, &refusal.found)).0 += 1;
    }
    // The texts of many causes would make an endless line.
    let causes: Vec<String> = causes
        .into_values()
        .take(MAX_CAUSES)
        .map(|(n_files, found)| format!("{n_files} x {found}"))
        .collect();

    let n_unreadable = refusals.len();
    let found = format!(
        "{n_unreadable} of {n_files} DICOM files in a zip cannot be read: {}",
        causes.join("; ")
    );
    let action = "export the series again, or pack the zip without these files";
    Refusal::new(refusals[0].reason, found, refusals[0].needed.as_str(), action)
}

/// How many causes the refusal of a zip names.
const MAX_CAUSES: usize = 4;

/// The fault of a series, with the number of its files that have it.
fn fault_of(files: &[(usize, &Head)]) -> Option<Refusal> {
    let mut faults = files.iter().filter_map(|(_, head)| head.fault.as_ref());
    let first = faults.next()?;
    let n_faults = 1 + faults.filter(|fault| cause(fault) == cause(first)).count();
    let found = match files.len() {
        1 => first.found.clone(),
        n_files => format!("{n_faults} of {n_files} files: {}", first.found),
    };
    Some(Refusal { found, ..first.clone() })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_studies_of_new_files_are_read_and_known_zips_only_for_their_own_series() {
        let key = |study, series| SeriesKey { study, series };
        let file = |state, path: &str, series: &[SeriesKey]| Listed {
            path: path.into(),
            state,
            series: Some(series.to_vec()),
        };
        use FileState::{Growing, Known, New, Paused};
        let listed = [
            file(Known, "0", &[key(1, 10)]),
            file(Known, "1.zip", &[key(1, 10), key(3, 30)]),
            file(Known, "2.zip", &[key(1, 11), key(2, 20)]),
            file(Growing, "3", &[key(2, 21)]),
            file(New, "4", &[key(2, 20)]),
            file(New, "5", &[key(1, 11)]),
            file(Known, "6", &[key(3, 30)]),
            file(Paused, "7", &[key(4, 40)]),
            file(New, "8", &[key(4, 40)]),
            file(New, "9", &[]),
        ];
        let paused = paused(&listed);
        assert_eq!(paused, [key(4, 40)].into());
        assert_eq!(studies(&listed, &paused), [(2, vec![2, 3, 4]), (1, vec![0, 2, 5])]);
    }
}
