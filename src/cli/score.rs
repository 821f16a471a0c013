//! `oddscan score`: the files are the window; no daemon, no store.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::{CONFIG, Failure, INTERNAL, IO, REFUSED, USAGE, engine_code};
use crate::{
    config::Config,
    domain::{
        GridName, PairDistances,
        cohort::CohortKey,
        error::{QuarantineReason, Refusal, RefusalPicture, ScanError},
        finding::{Finding, WindowIdentity},
        patient::Patient,
        scan::{EncodedFacts, ScanId, ScanRecord, ScanState},
        tokenise::TokeniseError,
        window::Window,
    },
    engine::Engine,
    ingest::{self, Links, Patterns},
    nifti,
    numeric::{
        scoring::{PairColumns, SearchReach},
        token::TokenGrid,
    },
    pipeline::{
        ReportInput,
        acquisition::{acquisition, read_json},
        build_results,
        convert::{self, Event, Standing},
        nearest_of_each,
        steps::{self, Encodable, Source},
    },
    report, telemetry,
};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Settings; see `config/default.toml`. Folders and the daemon's own settings are not used.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where maps, masks, pictures and sidecars are written. There,
    /// `refused/<stem>_registration.png` shows a scan that cannot be aligned.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// Scans (.nii, .nii.gz), DICOM files or zips of them, or folders. Compared are those of one
    /// cohort: of one file name ending (`_FLAIR`, `_T1w`), thick slices apart, or of one [[cohort]]
    /// rule of the settings. `<subject>_brain.nii.gz` beside a scan is its brain mask,
    /// `<stem>.json` says how it was acquired.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// A scan with its tokens. The voxels are read again for the report, so that memory does not grow
/// with the number of scans beyond their tokens.
struct Member {
    path: PathBuf,
    again: Again,
    record: ScanRecord,
    tokens: Vec<TokenGrid>,
}

/// Where a scan is read from again: as named, or as it was prepared.
struct Again {
    scan: PathBuf,
    mask: Option<PathBuf>,
}

/// Distances from one grid of tokens of a scan to that of another.
type Columns = BTreeMap<(ScanId, ScanId, usize), Vec<f32>>;

/// A file to be read.
pub(super) struct Named {
    pub(super) path: PathBuf,
    /// Whose scan it is by its DICOM header.
    patient: Option<Patient>,
}

impl From<PathBuf> for Named {
    fn from(path: PathBuf) -> Self {
        Self { path, patient: None }
    }
}

/// A file that was not scored, and why.
pub(super) struct Refused {
    pub(super) path: PathBuf,
    pub(super) error: String,
    /// What shows why, if something does.
    pub(super) picture: Option<PathBuf>,
}

impl Refused {
    pub(super) fn new(path: PathBuf, error: String) -> Self {
        Self { path, error, picture: None }
    }
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let config = Config::load(arguments.config.as_deref()).map_err(|e| Failure::new(CONFIG, e))?;
    telemetry::start_logging("warn");
    let unpacked = tempfile::tempdir().map_err(|error| Failure::new(IO, error))?;
    let (files, unconverted) = expand(&arguments.files, &config, unpacked.path())?;
    fs::create_dir_all(&arguments.out).map_err(|error| {
        Failure::new(IO, format!("cannot make {}: {error}", arguments.out.display()))
    })?;
    let engine = Engine::start(&config).map_err(|e| Failure::new(engine_code(&e), e))?;
    let n_files = files.len() + unconverted.len();
    let prepared = unpacked.path().join("prepared");
    fs::create_dir(&prepared).map_err(|error| Failure::new(IO, error))?;
    let mut run = Run {
        config,
        engine,
        refused: unconverted,
        warnings: BTreeMap::new(),
        stems: BTreeSet::new(),
        pictures: BTreeSet::new(),
        prepared: &prepared,
        out: &arguments.out,
    };
    let members = run.encode_all(&files)?;
    let mut cohorts: BTreeMap<CohortKey, Vec<Member>> = BTreeMap::new();
    for member in members {
        cohorts.entry(member.record.cohort.clone()).or_default().push(member);
    }
    let mut scored = Vec::new();
    for (key, members) in cohorts {
        let window = run.window(key, &members);
        if let Some(error) = too_few(&window.identity()) {
            let all = members.into_iter().map(|member| (member.path, error.clone()));
            run.refused.extend(all.map(|(path, error)| Refused::new(path, error)));
            continue;
        }
        scored.extend(run.score(&window, members, &arguments.out)?);
    }
    print_table(&scored, &run.refused, &arguments);
    for (warning, stems) in &run.warnings {
        let whose =
            if stems.len() == 1 { stems[0].clone() } else { format!("{} scans", stems.len()) };
        eprintln!("warning ({whose}): {warning}");
    }
    if run.refused.is_empty() {
        return Ok(());
    }
    let n_refused = run.refused.len();
    Err(Failure::new(REFUSED, format!("{n_refused} of {n_files} files were not scored")))
}

/// Why a cohort cannot be scored, if there is nothing to compare its scans with.
fn too_few(cohort: &WindowIdentity) -> Option<String> {
    let label = cohort.cohort.label();
    let (n_scans, n_references) = (cohort.members.len(), cohort.n_references());
    if n_scans < 2 {
        Some(format!("alone in its cohort ({label}): nothing to compare with"))
    } else if n_references < 2 {
        Some(format!(
            "{n_references} of {n_scans} scans of its cohort ({label}) good enough to compare with (quality); \
             2 are needed"
        ))
    } else if cohort.n_patients() < 2 {
        Some(format!(
            "the {n_references} scans of its cohort ({label}) are of one patient: nothing to compare with \
             (window.compare_same_patient)"
        ))
    } else {
        None
    }
}

/// Files as named, and the scans in folders. DICOM series among them are converted into `unpacked`;
/// those that cannot be are given apart.
pub(super) fn expand(
    named: &[PathBuf],
    config: &Config,
    unpacked: &Path,
) -> Result<(Vec<Named>, Vec<Refused>), Failure> {
    let patterns = Patterns::new(&config.intake.accept, &config.intake.ignore)
        .map_err(|error| Failure::new(INTERNAL, error))?;
    let cannot_list =
        |path: &Path, e| Failure::new(IO, format!("cannot list {}: {e}", path.display()));
    let mut files: Vec<Named> = Vec::new();
    let mut dicom = Vec::new();
    for path in named {
        if path.is_dir() && !patterns.is_scan(path) {
            let listed = ingest::list(path, &patterns, Links::ToFiles, || {})
                .map_err(|e| cannot_list(path, e))?;
            files.extend(listed.scans.into_iter().map(|candidate| candidate.path.into()));
            let has_mark = |file: &ingest::Candidate| ingest::has_dicom_mark(&file.path);
            let bundles = ingest::list_bundles(path, &patterns, has_mark, || {})
                .map_err(|e| cannot_list(path, e))?;
            dicom.extend(bundles.into_iter().flat_map(|bundle| bundle.files).map(|file| file.path));
        } else if patterns.is_scan(path) {
            files.push(path.clone().into());
        } else if ingest::has_ending(path, &["zip"]) || ingest::has_dicom_mark(path) {
            dicom.push(path.clone());
        } else {
            eprintln!(
                "{}: no scan by its name (intake.accept, intake.ignore), and no DICOM file",
                path.display()
            );
        }
    }
    // Somebody may name a folder and what lies in it.
    let mut places = BTreeSet::new();
    files.retain(|file| places.insert(place(&file.path)));
    dicom.retain(|path| places.insert(place(path)));
    let refused = convert_series(&dicom, config, unpacked, &mut files)?;
    if files.is_empty() && refused.is_empty() {
        let needed = "no scan among the files; name NIfTI or DICOM files, zips or folders of them";
        return Err(Failure::new(USAGE, needed));
    }
    Ok((files, refused))
}

/// Where a file lies, however it was named. What a link leads to does not matter.
fn place(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    fs::canonicalize(folder).unwrap_or(folder.to_owned()).join(path.file_name().unwrap_or_default())
}

/// Converts DICOM files as the daemon does and adds the volumes to `files`.
fn convert_series(
    dicom: &[PathBuf],
    config: &Config,
    unpacked: &Path,
    files: &mut Vec<Named>,
) -> Result<Vec<Refused>, Failure> {
    if dicom.is_empty() {
        return Ok(Vec::new());
    }
    // The process works in a folder of its own.
    let absolute = |path: &PathBuf| std::path::absolute(path).map(|path| (Standing::New, path));
    let listed: Result<Vec<_>, _> = dicom.iter().map(absolute).collect();
    let listed = listed.map_err(|error| Failure::new(IO, error))?;
    let work = unpacked.join("dicom");
    let events = convert::convert(&listed, &work, &config.intake.limits, || true)
        .map_err(|error| Failure::new(IO, error))?;
    let first = |inputs: &[usize]| inputs.first().map_or(PathBuf::new(), |&i| dicom[i].clone());
    let mut refused = Vec::new();
    for event in events.unwrap_or_default() {
        match event {
            Event::Converted { name, patient, .. } => {
                let path = work.join("out").join(format!("{name}.nii.gz"));
                files.push(Named { path, patient });
            }
            Event::Refused { refusal, inputs, .. } => {
                refused.push(Refused::new(first(&inputs), refusal.to_string()));
            }
            Event::Skipped { why, inputs, .. } => {
                eprintln!("left out: {} and its series: {why}", first(&inputs).display());
            }
            Event::Waiting { inputs } => {
                let error = "not reached: too many files before it kill the converter".to_owned();
                refused.push(Refused::new(first(&inputs), error));
            }
            Event::InHand { .. } => {}
        }
    }
    Ok(refused)
}

struct Run<'a> {
    config: Config,
    engine: Engine,
    refused: Vec<Refused>,
    /// What a reader of the results should know, and of which scans.
    warnings: BTreeMap<String, Vec<String>>,
    stems: BTreeSet<String>,
    /// Names of the pictures of refused scans.
    pictures: BTreeSet<String>,
    /// What scans were made into.
    prepared: &'a Path,
    /// Where results are written.
    out: &'a Path,
}

impl Run<'_> {
    fn encode_all(&mut self, files: &[Named]) -> Result<Vec<Member>, Failure> {
        let bar = progress_bar(files.len());
        let mut members: Vec<Member> = Vec::new();
        for file in files {
            let path = &file.path;
            bar.set_message(steps::stem_of(path));
            let encoded = self.encode(file, members.len() as u64, &bar);
            bar.inc(1);
            match encoded {
                Ok(member) => match members.iter().find(|m| m.record.id == member.record.id) {
                    None => members.push(member),
                    Some(twin) => {
                        let error = format!("a copy of {}", twin.path.display());
                        self.refused.push(Refused::new(path.clone(), error));
                    }
                },
                Err(ScanError::Device(error)) => return Err(Failure::new(INTERNAL, error)),
                Err(error) => {
                    let cause = std::error::Error::source(&error);
                    let cause = cause.map_or(String::new(), |cause| format!(": {cause}"));
                    let picture = self.write_picture(path, &error);
                    let error = format!("{error}{cause}");
                    self.refused.push(Refused { path: path.clone(), error, picture });
                }
            }
        }
        bar.finish_and_clear();
        Ok(members)
    }

    fn encode(
        &mut self,
        file: &Named,
        sequence: u64,
        bar: &ProgressBar,
    ) -> Result<Member, ScanError> {
        let path = file.path.as_path();
        let mask = steps::companion_mask(path);
        let limits = self.config.intake.limits;
        let (work, method) = (self.prepared.join("work"), &self.engine.method);
        let (id, source) =
            steps::read_and_prepare(path, mask.as_deref(), &limits, method, &work, || bar.tick())?;
        let again = self.keep(path, mask, &source, sequence)?;
        let alignment = steps::alignment_facts(&source);
        let brain = Some(steps::brain_facts(&source));
        let preprocess = source.preprocess.clone();
        let spacing_mm = source.raw.affine.spacing_mm();
        let json = steps::companion_json(path).map(|json| read_json(path, &json));
        let placed = acquisition(path, json, spacing_mm, &self.config, &self.engine.method);
        let scan = Encodable::new(&source, &self.engine.method, &placed.cohort)?;
        drop(source);
        let started = Instant::now();
        let tokens = self.engine.tokeniser.tokens(&scan.canonical.volume, |_| {
            bar.tick();
            ControlFlow::Continue(())
        });
        let tokens = tokens.map_err(|error| match error {
            TokeniseError::Device(error) => ScanError::Device(error),
            other => Refusal::new(
                QuarantineReason::Poison,
                other.to_string(),
                "features that are numbers",
                "score it alone, and with encoder.device = \"cpu\"; report it if it may be shared",
            )
            .into(),
        })?;
        let timings_secs = [("encode".to_owned(), started.elapsed().as_secs_f64())].into();
        let stem = steps::stem_of(path);
        let mut output_stem = steps::output_stem(&stem);
        if !self.stems.insert(output_stem.clone()) {
            output_stem = format!("{output_stem}-{}", id.short());
        }
        let n_tokens = steps::tokens_per_layer(&tokens, self.engine.method.n_parts);
        let record = ScanRecord {
            state: ScanState::Encoded,
            source_name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            header_patient: file.patient.clone(),
            output_stem,
            acquisition: placed.facts,
            notes: placed.notes,
            sequence,
            brain,
            alignment,
            preprocess,
            encoded: Some(EncodedFacts { n_tokens, timings_secs, ..scan.facts() }),
            ..ScanRecord::new(id, placed.cohort)
        };
        Ok(Member { path: path.to_owned(), again, record, tokens })
    }

    /// Writes the picture of a refusal, if it has one. The refusal stands without it.
    fn write_picture(&mut self, scan: &Path, error: &ScanError) -> Option<PathBuf> {
        let ScanError::Refused(Refusal { picture: Some(RefusalPicture(png)), .. }) = error else {
            return None;
        };
        let stem = steps::output_stem(&steps::stem_of(scan));
        let name = |count: usize| match count {
            1 => format!("{stem}_registration.png"),
            _ => format!("{stem}-{count}_registration.png"),
        };
        let name = (1..).map(name).find(|name| !self.pictures.contains(name))?;
        let folder = self.out.join("refused");
        let path = folder.join(&name);
        let written = fs::create_dir_all(&folder).and_then(|()| report::write_atomic(&path, png));
        if let Err(error) = written {
            eprintln!("cannot write {}: {error}", path.display());
            return None;
        }
        self.pictures.insert(name);
        Some(path)
    }

    /// Keeps what was found in a scan, as the daemon's archive does, so that it is found once.
    fn keep(
        &self,
        path: &Path,
        mask: Option<PathBuf>,
        source: &Source,
        sequence: u64,
    ) -> Result<Again, ScanError> {
        let write = |ending: &str, bytes: &[u8]| {
            let path = self.prepared.join(format!("{sequence}{ending}"));
            fs::write(&path, bytes).map(|()| path).map_err(|source| ScanError::Own {
                doing: "keeping what was found in a scan",
                source,
            })
        };
        let mut again = Again { scan: path.to_owned(), mask };
        let done = source.preprocess.as_ref();
        if done.is_some_and(|done| done.scan_replaced) {
            let bytes = nifti::encode_scan(&source.grid, &source.raw.voxels);
            again.scan = write(".nii.gz", &bytes)?;
        }
        if source.brain_from.is_found() {
            let bytes = nifti::encode_mask(&source.grid, &source.brain.inside, "brain mask");
            again.mask = Some(write("_brain.nii.gz", &bytes)?);
        }
        Ok(again)
    }

    /// One cohort as one window, which holds all of it.
    fn window(&self, key: CohortKey, members: &[Member]) -> Window {
        let capacity = self.config.window.max_scans.max(members.len().try_into().expect("not 0"));
        let mut window = Window::new(key, capacity);
        for member in members {
            window.admit(member.record.id, self.config.membership(&member.record));
        }
        window
    }

    /// Scores a window and writes its results.
    fn score(
        &mut self,
        window: &Window,
        members: Vec<Member>,
        out: &Path,
    ) -> Result<Vec<(Member, Finding)>, Failure> {
        let internal = |error: ScanError| Failure::new(INTERNAL, error);
        let columns = self.columns(&members).map_err(internal)?;
        let n_parts = self.engine.method.n_parts;
        let scored_members: Vec<steps::Member> = members
            .iter()
            .map(|m| steps::Member {
                id: m.record.id,
                parts: steps::parts_of(&m.tokens, n_parts),
                is_reference: window.membership(m.record.id).is_reference,
                patient: window.membership(m.record.id).patient.clone(),
            })
            .collect();
        let mut computed = Computed {
            columns: &columns,
            members: &members,
            distances: self.engine.distances.as_mut(),
            reach: self.config.scoring.reach,
        };
        let method = &self.engine.method;
        let scores = steps::score_members(
            &scored_members,
            &method.layers,
            &self.config.scoring,
            &mut computed,
        )
        .map_err(internal)?;
        let identity = window.identity();
        let mut scored = Vec::new();
        for (index, member) in members.into_iter().enumerate() {
            let Again { scan, mask } = &member.again;
            let alignment = steps::alignment(member.record.alignment).map_err(internal)?;
            let source =
                steps::read_source(scan, mask.as_deref(), alignment, &self.config.intake.limits)
                    .map_err(internal)?;
            let (results, finding) = build_results(&ReportInput {
                record: &member.record,
                source: &source,
                scores: &scores,
                index,
                window: &identity,
                method: &self.engine.method,
                config: &self.config,
            })
            .map_err(internal)?;
            let stem = &member.record.output_stem;
            for warning in &results.sidecar.warnings {
                self.warnings.entry(warning.clone()).or_default().push(stem.clone());
            }
            report::write_results(out, stem, &results).map_err(|error| Failure::new(IO, error))?;
            scored.push((member, finding));
        }
        Ok(scored)
    }

    /// All columns of a window.
    fn columns(&mut self, members: &[Member]) -> Result<Columns, ScanError> {
        let (reach, distances) = (self.config.scoring.reach, self.engine.distances.as_mut());
        let mut columns = BTreeMap::new();
        let n_grids = members.first().map_or(0, |member| member.tokens.len());
        for grid in 0..n_grids {
            let grids: Vec<(GridName, &TokenGrid)> = members
                .iter()
                .map(|member| (GridName { scan: member.record.id, grid }, &member.tokens[grid]))
                .collect();
            for (index, &one) in grids.iter().enumerate() {
                let others = &grids[..index];
                let found = nearest_of_each(distances, reach, one, others)?;
                for ((other, _), of_pair) in others.iter().zip(found) {
                    let PairColumns { first_to_second, second_to_first } = of_pair;
                    columns.insert((one.0.scan, other.scan, grid), first_to_second);
                    columns.insert((other.scan, one.0.scan, grid), second_to_first);
                }
            }
        }
        Ok(columns)
    }
}

/// The columns of a window in memory.
struct Computed<'a> {
    columns: &'a Columns,
    members: &'a [Member],
    distances: &'a mut dyn PairDistances,
    reach: SearchReach,
}

impl steps::Distances for Computed<'_> {
    fn column(&mut self, of: ScanId, other: ScanId, grid: usize) -> Result<Vec<f32>, ScanError> {
        Ok(self.columns[&(of, other, grid)].clone())
    }

    fn column_without(
        &mut self,
        of: ScanId,
        other: ScanId,
        grid: usize,
        excluded: &[usize],
    ) -> Result<Vec<f32>, ScanError> {
        let tokens = |id: ScanId| {
            let member = self.members.iter().find(|member| member.record.id == id);
            &member.expect("distances are between members").tokens[grid]
        };
        let theirs = tokens(other).without(excluded);
        Ok(self.distances.nearest(tokens(of), &theirs, self.reach)?.first_to_second)
    }
}

fn progress_bar(n_files: usize) -> ProgressBar {
    // indicatif shows nothing where stderr is no terminal.
    let bar = ProgressBar::with_draw_target(Some(n_files as u64), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} (left {eta}) {msg}");
    bar.set_style(style.expect("a template without faults"));
    bar
}

fn print_table(scored: &[(Member, Finding)], refused: &[Refused], arguments: &Arguments) {
    if arguments.json {
        let scans: Vec<_> = scored
            .iter()
            .map(|(member, finding)| {
                json!({
                    "file": member.path,
                    "stem": member.record.output_stem,
                    "cohort": member.record.cohort.label(),
                    "score_max": finding.score_max,
                    "score_top1_mean": finding.score_top1_mean,
                    "percentile": finding.percentile,
                    "mask_ml": finding.mask_ml(),
                })
            })
            .collect();
        let refused: Vec<_> = refused.iter().map(refused_json).collect();
        println!("{}", json!({ "scored": scans, "refused": refused, "out": arguments.out }));
        return;
    }
    if !scored.is_empty() {
        println!(
            "{:<36} {:>8} {:>8} {:>11} {:>9}",
            "scan", "score", "max", "percentile", "mask ml"
        );
    }
    for (member, finding) in scored {
        println!(
            "{:<36} {:>8.3} {:>8.3} {:>10.0}% {:>9.1}",
            member.record.output_stem,
            finding.score_top1_mean,
            finding.score_max,
            100.0 * finding.percentile,
            finding.mask_ml()
        );
    }
    for Refused { path, error, picture } in refused {
        eprintln!("not scored: {}: {error}", path.display());
        if let Some(picture) = picture {
            eprintln!("  look at {}", picture.display());
        }
    }
    println!("results in {}   (research use only)", arguments.out.display());
}

fn refused_json(refused: &Refused) -> serde_json::Value {
    let mut said = json!({ "file": refused.path, "reason": refused.error });
    if let Some(picture) = &refused.picture {
        said["picture"] = json!(picture);
    }
    said
}
