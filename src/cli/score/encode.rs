//! From the named files to members of a window, with their tokens.

use std::{
    collections::BTreeSet,
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::named::{Named, Refused};
use crate::{
    cli::{Failure, INTERNAL},
    companions,
    compute::tokenise::{TokeniseError, tokens_per_layer},
    config::Config,
    domain::{
        error::{QuarantineReason, Refusal, RefusalPicture, ScanError},
        identity::Pseudonyms,
        scan::{EncodedFacts, ScanRecord, ScanState},
    },
    engine::Engine,
    files,
    numeric::{fine::FineVolume, token::TokenGrid},
    pipeline::now_secs,
    prepare::{
        Prepared, Source,
        acquisition::{must_be_magnitude, read_json},
        read_and_find_brain,
    },
};

/// A scan with its tokens. The voxels are read again for the results, so that only the tokens of
/// all scans are in memory together.
pub(super) struct EncodedScan {
    pub(super) path: PathBuf,
    /// Start of the names of its results.
    pub(super) stem: String,
    pub(super) again: Again,
    pub(super) record: ScanRecord,
    pub(super) tokens: Vec<TokenGrid>,
    pub(super) fine: FineVolume,
}

/// Files from which a scan is read again: the named ones, or prepared copies.
pub(super) struct Again {
    pub(super) scan: PathBuf,
    pub(super) mask: Option<PathBuf>,
}

/// Encodes scans one after another.
pub(super) struct Encoding<'a> {
    pub(super) config: &'a Config,
    pub(super) engine: &'a mut Engine,
    /// Folder for prepared copies.
    pub(super) prepared: &'a Path,
    /// Folder for results.
    pub(super) out: &'a Path,
    pub(super) refused: &'a mut Vec<Refused>,
    /// What results say instead of names.
    pub(super) pseudonyms: &'a Pseudonyms,
    /// Stems of results so far, in clear.
    pub(super) stems: BTreeSet<String>,
    /// Names of the pictures of refused scans.
    pub(super) pictures: BTreeSet<String>,
}

impl Encoding<'_> {
    pub(super) fn encode_all(&mut self, files: &[Named]) -> Result<Vec<EncodedScan>, Failure> {
        let bar = progress_bar(files.len());
        let mut members: Vec<EncodedScan> = Vec::new();
        for file in files {
            let path = &file.path;
            bar.set_message(companions::stem_of(path));
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
                    let picture = self.write_picture(file, &error);
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
    ) -> Result<EncodedScan, ScanError> {
        let first_seen_secs = now_secs();
        let path = file.path.as_path();
        let mask = companions::companion_mask(path);
        let limits = self.config.intake.limits;
        let (work, method) = (self.prepared.join("work"), &self.engine.method);
        let tick = || bar.tick();

        let json = companions::companion_json(path).map(|json| read_json(path, &json));
        must_be_magnitude(path, json.as_ref())?;
        let (id, source) =
            read_and_find_brain(path, mask.as_deref(), &limits, method, &work, tick)?;
        let again = self.keep(path, mask, &source, sequence)?;
        let prepared = Prepared::new(id, &source, path, json, self.config, method)?;
        drop(source);

        let (record, scan) = prepared.into_record(path);
        let started = Instant::now();
        let tokens = self.engine.tokeniser.tokens(&scan.canonical.volume, |_| {
            bar.tick();
            ControlFlow::Continue(())
        });
        let tokens = tokens.map_err(no_tokens)?;
        let timings_secs = [("encode".to_owned(), started.elapsed().as_secs_f64())].into();
        let n_tokens = tokens_per_layer(&tokens, self.engine.method.n_parts);

        let is_taken = |stem: &str| self.stems.contains(stem);
        let output_stem = companions::output_stem_among(path, id, is_taken);
        self.stems.insert(output_stem.clone());

        let record = ScanRecord {
            state: ScanState::Encoded,
            header_patient: file.patient.clone(),
            dicom: file.dicom.clone(),
            output_stem,
            sequence,
            first_seen_secs,
            encoded: Some(EncodedFacts {
                n_tokens,
                encoded_secs: now_secs(),
                timings_secs,
                ..scan.facts()
            }),
            ..record
        };
        let (path, stem) = (path.to_owned(), self.pseudonyms.stem(&record));
        Ok(EncodedScan { path, stem, again, record, tokens, fine: scan.canonical.fine })
    }

    /// Keeps changed voxels and the found brain, like the daemon's archive, so that nothing runs
    /// twice.
    fn keep(
        &self,
        path: &Path,
        mask: Option<PathBuf>,
        source: &Source,
        sequence: u64,
    ) -> Result<Again, ScanError> {
        let write = |ending: &str, bytes: &[u8]| {
            let path = self.prepared.join(format!("{sequence}{ending}"));
            fs::write(&path, bytes)
                .map(|()| path)
                .map_err(|source| ScanError::Internal { doing: "writing a prepared scan", source })
        };

        let mut again = Again { scan: path.to_owned(), mask };
        if let Some(changed) = source.changed_scan() {
            again.scan = write(".nii.gz", &changed)?;
        }
        if let Some(brain) = source.found_brain() {
            again.mask = Some(write("_brain.nii.gz", &brain)?);
        }
        Ok(again)
    }

    /// Writes the picture of a refusal, if it has one. A failure to write is only reported.
    fn write_picture(&mut self, scan: &Named, error: &ScanError) -> Option<PathBuf> {
        let ScanError::Refused(Refusal { picture: Some(RefusalPicture(png)), .. }) = error else {
            return None;
        };

        let stem = companions::output_stem(&companions::stem_of(&scan.path));
        let stem = self.pseudonyms.name(&stem, scan.dicom.is_some());
        let stem = stem.unwrap_or_else(|| "scan".to_owned());
        let name = |count: usize| match count {
            1 => format!("{stem}_registration.png"),
            _ => format!("{stem}-{count}_registration.png"),
        };
        let name = (1..).map(name).find(|name| !self.pictures.contains(name))?;

        let folder = self.out.join("refused");
        let path = folder.join(&name);
        let written = fs::create_dir_all(&folder).and_then(|()| files::write_atomic(&path, png));
        if let Err(error) = written {
            eprintln!("cannot write {}: {error}", path.display());
            return None;
        }
        self.pictures.insert(name);
        Some(path)
    }
}

fn no_tokens(error: TokeniseError) -> ScanError {
    match error {
        TokeniseError::Device(error) => ScanError::Device(error),
        other => Refusal::new(
            QuarantineReason::Poison,
            other.to_string(),
            "features that are numbers",
            "try encoder.device = \"cpu\"; report the scan if it may be shared",
        )
        .into(),
    }
}

fn progress_bar(n_files: usize) -> ProgressBar {
    // indicatif shows nothing if stderr is not a terminal.
    let bar = ProgressBar::with_draw_target(Some(n_files as u64), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} (left {eta}) {msg}");
    bar.set_style(style.expect("a template without faults"));
    bar
}
