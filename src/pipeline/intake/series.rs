//! DICOM files in the incoming folder: decides when a series is complete, and what happens to it.
//!
//! The files directly in one folder, or one zip, are converted together in a process of their own
//! ([`convert`]). Each volume is then read like a NIfTI file. The store remembers each DICOM file,
//! so a folder that grows later gives only its new series. A kill at any line costs only a second
//! conversion, because volumes are recognised by their content.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    mem,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use super::{
    super::{MAX_CRASHES, board::StageName, now_secs},
    Companions, Intake, MAX_PAUSE, Whole, below,
    bundles::Pause,
    poison,
    refuse::decision_about,
    seen_key,
};
use crate::{
    domain::{
        error::{QuarantineReason, Refusal, ScanError},
        left_alone::LeftAlone,
        patient::Patient,
        scan::DicomFacts,
    },
    files::{are_open_for_writing, fresh_folder},
    ingest::{self, Bundle, Candidate, Patterns, Settled},
    metrics::{IngestResult, SeenBy, Stage},
    process::convert::{self, Event, FileState},
    quarantine,
    store::SeenOutcome,
};

/// Unreadable files are tried this many times. That takes about three quarters of an hour.
const MAX_FAILURES: u32 = 10;

/// A file of a bundle before a conversion.
struct BundleFile<'a> {
    file: &'a Candidate,
    standing: FileState,
    /// Time since it was first seen.
    waited: Duration,
}

impl Intake {
    /// Lists the DICOM files in the incoming folder. A folder that cannot be listed is reported
    /// elsewhere.
    pub(super) fn list_bundles(&mut self, incoming: &Path, patterns: &Patterns) -> Vec<Bundle> {
        let shared = &self.shared;
        let known = mem::take(&mut self.bundles.marked);
        let marked = &mut self.bundles.marked;
        let has_mark = |file: &Candidate| {
            let known = known.get(&file.path).filter(|(look, _)| *look == file.look);
            let is_marked = known
                .map_or_else(|| ingest::has_dicom_mark(&file.path), |(_, is_marked)| *is_marked);
            marked.insert(file.path.clone(), (file.look, is_marked));
            is_marked
        };

        let heartbeat = || shared.board.heartbeat(StageName::Intake);
        let bundles =
            ingest::list_bundles(incoming, patterns, has_mark, heartbeat).unwrap_or_default();

        let files = bundles.iter().flat_map(|bundle| &bundle.files);
        let there: HashSet<&Path> = files.map(|file| file.path.as_path()).collect();
        self.bundles.settling.keep_only(|path| there.contains(path));
        let there: HashSet<&Path> = bundles.iter().map(|bundle| bundle.path.as_path()).collect();
        self.bundles.pauses.retain(|path, _| there.contains(path.as_path()));
        bundles
    }

    pub(super) fn consider_bundles(
        &mut self,
        bundles: &[Bundle],
        incoming: &Path,
        by: SeenBy,
    ) -> Result<(), ScanError> {
        self.bundles.waiting.clear();
        for bundle in bundles {
            if self.shared.stopping() {
                break;
            }
            self.shared.board.heartbeat(StageName::Intake);

            let members = self.members(bundle, incoming, by)?;
            let undecided = || members.iter().filter(|member| member.standing != FileState::Known);
            let Some(age) = undecided().map(|member| member.waited).max() else { continue };
            let is_whole = undecided().any(|member| member.standing == FileState::New);

            let pause = self.bundles.pauses.get(&bundle.path);
            if pause.is_some_and(|pause| pause.until > Instant::now()) {
                continue;
            }
            // While the encoder's queue is full, no further file is read: the folder is the queue.
            if !is_whole || self.is_paused || !self.pending.is_empty() {
                self.bundles.waiting.push((is_whole, age));
                continue;
            }
            self.convert_bundle(bundle, &members, incoming)?;
        }
        Ok(())
    }

    /// Finds the state of every file of a bundle.
    fn members<'a>(
        &mut self,
        bundle: &'a Bundle,
        incoming: &Path,
        by: SeenBy,
    ) -> Result<Vec<BundleFile<'a>>, ScanError> {
        let config = self.shared.config();
        let (intake, now) = (&config.intake, Instant::now());
        let settle = if bundle.is_zip { intake.settle } else { intake.series_settle };
        let mut members = Vec::with_capacity(bundle.files.len());
        for file in &bundle.files {
            let seen = self.shared.store.seen(&seen_key(incoming, &file.path))?;
            let seen = seen.filter(|seen| seen.is_same(&file.look)).map(|seen| seen.outcome);
            if !matches!(seen, None | Some(SeenOutcome::Reading { .. })) {
                let (standing, waited) = (FileState::Known, Duration::ZERO);
                members.push(BundleFile { file, standing, waited });
                continue;
            }

            if !self.bundles.settling.knows(&file.path) {
                self.shared.metrics.file_seen(by);
            }
            let (standing, waited) = match self.bundles.settling.look(file, [None; 2], now, settle)
            {
                Settled::Waiting => (FileState::Growing, Duration::ZERO),
                Settled::Whole(waited) => (FileState::New, waited),
            };
            members.push(BundleFile { file, standing, waited });
        }
        Ok(members)
    }

    fn convert_bundle(
        &mut self,
        bundle: &Bundle,
        members: &[BundleFile<'_>],
        incoming: &Path,
    ) -> Result<(), ScanError> {
        let work = self.shared.config().directories.state.join("dicom");
        let files: Vec<(FileState, PathBuf)> =
            members.iter().map(|member| (member.standing, member.file.path.clone())).collect();
        let shared = &self.shared;
        let alive = || {
            shared.board.heartbeat(StageName::Intake);
            !shared.stopping()
        };

        let started = Instant::now();
        let at_work = shared.board.takes_long("converting DICOM files".to_owned());
        let converted = convert::convert(&files, &work, &shared.limits(), alive);
        drop(at_work);
        shared.metrics.stage_finished(Stage::Decode, started.elapsed());

        let has_failed = match converted {
            Ok(Some(events)) => {
                let unit = Unit { bundle, members, incoming, out: work.join("out") };
                self.take_events(&unit, &events)?
            }
            // Asked to stop. The next start converts the bundle again.
            Ok(None) => false,
            Err(error) => {
                self.shared.metrics.stage_failed(Stage::Decode, &error);
                self.shared.metrics.stage_retried(Stage::Decode);
                warn!(%error, "DICOM files could not be converted; trying again later");
                true
            }
        };

        self.pause(bundle, has_failed);
        if let Err(error) = fresh_folder(&work) {
            warn!(error = %error.kind(), "cannot remove converted files; trying again later");
        }
        Ok(())
    }

    /// Pauses a bundle, so that a growing one is not converted all the time. The pause doubles
    /// after each failure.
    fn pause(&mut self, bundle: &Bundle, has_failed: bool) {
        let settle = self.shared.config().intake.series_settle.max(Duration::from_millis(100));
        let n_failures = if has_failed { self.n_failures(bundle) + 1 } else { 0 };
        let length = settle.saturating_mul(1 << n_failures.min(16)).min(MAX_PAUSE.max(settle));
        let pause = Pause { until: Instant::now() + length, n_failures };
        self.bundles.pauses.insert(bundle.path.clone(), pause);
    }

    /// How many times in a row the bundle failed.
    fn n_failures(&self, bundle: &Bundle) -> u32 {
        self.bundles.pauses.get(&bundle.path).map_or(0, |pause| pause.n_failures)
    }

    /// Deals with the results of a conversion. Returns whether something must be tried again.
    fn take_events(&mut self, unit: &Unit<'_>, events: &[Event]) -> Result<bool, ScanError> {
        let mut decided = Decided::default();
        let mut refused = Vec::new();
        for event in events {
            let Event::Converted { name, patient, dicom, inputs } = event else { continue };
            self.shared.board.heartbeat(StageName::Intake);
            if self.shared.stopping() {
                // The next start converts them again.
                decided.later.extend(inputs);
                continue;
            }
            let header = (patient.clone(), dicom.clone());
            match self.take_series(unit, name, header, inputs, &mut decided)? {
                Series::Taken(outcome) => {
                    decided.outcomes.extend(inputs.iter().map(|&input| (input, outcome)));
                }
                Series::Refused(refusal) => refused.push((name, refusal, inputs)),
                Series::Later => decided.later.extend(inputs),
            }
        }

        let n_failures = self.n_failures(unit.bundle);
        for event in events {
            match event {
                Event::Refused { refusal, inputs, .. }
                    if refusal.reason == QuarantineReason::Io && n_failures < MAX_FAILURES =>
                {
                    warn!(%refusal, "DICOM files cannot be read; trying again");
                    decided.later.extend(inputs);
                }
                Event::Refused { name, refusal, may_grow, inputs } => {
                    if *may_grow && self.may_still_grow(unit, refusal, inputs) {
                        debug!(%refusal, "a series may still be growing");
                    } else {
                        refused.push((name, refusal.clone(), inputs));
                    }
                }
                Event::Skipped { .. }
                | Event::InHand { .. }
                | Event::Converted { .. }
                | Event::Waiting { .. } => {}
            }
        }

        for (name, refusal, inputs) in refused {
            self.refuse_series(unit, name, &refusal, inputs, &mut decided)?;
        }
        for event in events {
            let Event::Skipped { name, reason, why, inputs } = event else { continue };
            debug!(name, folder = %unit.bundle.path.display(), "left alone");
            self.leave_alone(unit, *reason, why, &decided.without(inputs))?;
        }

        let (reason, unmentioned) = (LeftAlone::Unmentioned, unit.unmentioned(events));
        self.leave_alone(unit, reason, &reason.to_string(), &unmentioned)?;
        self.write_down(unit, &decided)?;
        Ok(!decided.later.is_empty() && !self.shared.stopping())
    }

    /// Remembers the decisions about the files, and forgets files that must be considered again.
    fn write_down(&mut self, unit: &Unit<'_>, decided: &Decided) -> Result<(), ScanError> {
        for (input, outcome) in &decided.outcomes {
            self.remember_files(unit, &[*input], *outcome)?;
        }
        for input in &decided.later {
            self.shared.store.forget_seen(&unit.key(*input))?;
        }
        Ok(())
    }

    /// Whether slices may still arrive that fill the gaps, or the end of a file that lacks it.
    fn may_still_grow(&mut self, unit: &Unit<'_>, refusal: &Refusal, inputs: &[usize]) -> bool {
        let is_new = |input: &&usize| unit.members[**input].standing == FileState::New;
        let new = || inputs.iter().filter(is_new).map(|&input| unit.members[input].file);
        // The last file that came or changed counts: slices come one after the other.
        let has_time = new().any(|file| self.is_within_patience(&file.path));
        if refusal.reason == QuarantineReason::Truncated && has_time {
            self.unfinished.extend(new().map(|file| (file.path.clone(), file.look)));
            return true;
        }
        has_time && !unit.bundle.is_zip
    }

    /// Remembers files that are not scans for oddscan, so that they are not converted again.
    fn leave_alone(
        &mut self,
        unit: &Unit<'_>,
        reason: LeftAlone,
        why: &str,
        inputs: &[usize],
    ) -> Result<(), ScanError> {
        if inputs.is_empty() {
            return Ok(());
        }
        self.shared.metrics.volume_ingested(IngestResult::Ignored);
        info!(
            why,
            n_files = inputs.len(),
            "a series is not supported; it stays in the incoming folder"
        );
        self.remember_files(unit, inputs, SeenOutcome::LeftAlone(reason))
    }

    /// Reads one volume like a NIfTI file, and only once.
    fn take_series(
        &mut self,
        unit: &Unit<'_>,
        name: &str,
        (patient, dicom): (Option<Patient>, Option<DicomFacts>),
        inputs: &[usize],
        decided: &mut Decided,
    ) -> Result<Series, ScanError> {
        let path = unit.out.join(format!("{name}.nii.gz"));
        let look = ingest::look_at(&path);
        let (Ok(look), false) = (look, unit.has_changed(inputs)) else {
            // The series was not whole. It is considered again later.
            return Ok(Series::Later);
        };
        let n_crashes = match decided.n_crashes.get(&inputs[0]) {
            Some(&n_crashes) => n_crashes,
            None => self.crashes(unit, inputs)?,
        };
        decided.n_crashes.insert(inputs[0], n_crashes);

        if n_crashes >= MAX_CRASHES {
            let found = format!("{n_crashes} crashes during the reading of this series");
            return Ok(Series::Refused(poison(found)));
        }
        // Written durably before the series is read: after a crash it shows which one was being
        // read.
        let reading = SeenOutcome::Reading { attempts: n_crashes + 1 };
        self.remember_files(unit, &inputs[..1], reading)?;
        self.shared.store.flush()?;

        let companions = Companions::of(&path);
        let came_from = below(unit.incoming, &unit.bundle.path).to_owned();
        let waited = unit.waited(inputs);
        let candidate = Candidate { path, look };
        let whole = Whole { candidate, companions, came_from, patient, dicom, waited, n_crashes };

        let (read, timings) = self.reader.read(&whole);
        match self.admit(&whole, read, timings) {
            Err(error) => self.series_failed(error),
            Ok(None) => Ok(Series::Later),
            Ok(Some(outcome)) => {
                debug!(?outcome, path = %unit.bundle.path.display(), "read");
                self.shared.metrics.settled(whole.waited);
                Ok(Series::Taken(outcome))
            }
        }
    }

    fn series_failed(&self, error: ScanError) -> Result<Series, ScanError> {
        self.shared.metrics.stage_failed(Stage::Decode, &error);
        match error {
            ScanError::Refused(refusal) => Ok(Series::Refused(refusal)),
            ScanError::Device(_) | ScanError::Store(_) => Err(error),
            ScanError::Io { .. } | ScanError::Internal { .. } => {
                self.shared.metrics.stage_retried(Stage::Decode);
                warn!(%error, "a volume of a series could not be read; trying again later");
                Ok(Series::Later)
            }
        }
    }

    /// How often the process crashed while it read this series.
    fn crashes(&self, unit: &Unit<'_>, inputs: &[usize]) -> Result<u32, ScanError> {
        let first = inputs[0];
        let seen = self.shared.store.seen(&unit.key(first))?;
        let seen = seen.filter(|seen| seen.is_same(&unit.members[first].file.look));
        Ok(match seen.map(|seen| seen.outcome) {
            Some(SeenOutcome::Reading { attempts }) => attempts,
            _ => 0,
        })
    }

    fn remember_files(
        &mut self,
        unit: &Unit<'_>,
        inputs: &[usize],
        outcome: SeenOutcome,
    ) -> Result<(), ScanError> {
        let is_decided = !matches!(outcome, SeenOutcome::Reading { .. });
        for &input in inputs {
            let file = unit.members[input].file;
            self.shared.store.put_seen(&unit.key(input), &decision_about(file, outcome))?;
            if is_decided {
                self.bundles.settling.forget(&file.path);
                self.unfinished.remove(&file.path);
            }
        }
        Ok(())
    }

    /// Sends the files of a series to quarantine. Files that also gave another volume stay, and
    /// only the reason goes to quarantine. This waits while some of the files must be considered
    /// again, or while quarantine is not available.
    fn refuse_series(
        &mut self,
        unit: &Unit<'_>,
        name: &str,
        refusal: &Refusal,
        inputs: &[usize],
        decided: &mut Decided,
    ) -> Result<(), ScanError> {
        if self.shared.stopping() || inputs.iter().any(|input| decided.later.contains(input)) {
            decided.later.extend(inputs);
            return Ok(());
        }

        let mut left = decided.without(inputs);
        // Files that have changed or are gone are left out: the refusal does not apply to them.
        left.retain(|input| !unit.has_changed(&[*input]));
        if left.is_empty() && !inputs.iter().any(|input| decided.is_taken(*input)) {
            return Ok(());
        }

        let files: Vec<PathBuf> =
            left.iter().map(|&input| unit.members[input].file.path.clone()).collect();
        let has_writer = are_open_for_writing(&files);
        if has_writer && files.iter().any(|file| self.is_within_patience(file)) {
            decided.later.extend(inputs);
            return Ok(());
        }
        let folder = self.shared.config().directories.quarantine.clone();
        debug!(folder = %unit.bundle.path.display(), "to quarantine");
        let moved = if let [file] = &files[..] {
            let came_from = file.strip_prefix(unit.incoming).unwrap_or(file);
            if has_writer {
                quarantine::refuse_in_place(&folder, file, came_from, refusal, now_secs())
            } else {
                quarantine::quarantine(&folder, file, came_from, refusal, now_secs())
            }
        } else {
            let parent = unit.bundle.path.strip_prefix(unit.incoming).unwrap_or(Path::new(""));
            let parent = if unit.bundle.is_zip { parent.parent() } else { Some(parent) };
            let name = if name.is_empty() { "series" } else { name };
            let came_from = parent.unwrap_or(Path::new("")).join(name);
            // Without files, only the reason is written.
            let files = if has_writer { &[] } else { &files[..] };
            quarantine::quarantine_series(&folder, files, &came_from, refusal, now_secs())
        };
        if let Err(error) = moved {
            warn!(error = %error.kind(), "quarantine is not available; a refused series waits");
            decided.later.extend(inputs);
            return Ok(());
        }

        warn!(%refusal, n_files = left.len(), "a series went to quarantine");
        // This is remembered, too, in case the files could not be moved.
        decided.outcomes.extend(left.into_iter().map(|input| (input, SeenOutcome::Quarantined)));
        self.count_quarantined(refusal);
        Ok(())
    }
}

/// The decisions about the files of a bundle. They are written after all its volumes: one file may
/// contain several volumes, and all of them must be decided first.
#[derive(Default)]
struct Decided {
    outcomes: BTreeMap<usize, SeenOutcome>,
    /// Files with a volume that must be considered again.
    later: BTreeSet<usize>,
    /// Crashes before this conversion. The key is the first file of a volume.
    n_crashes: BTreeMap<usize, u32>,
}

impl Decided {
    /// Whether the file gave a volume.
    fn is_taken(&self, input: usize) -> bool {
        let outcome = self.outcomes.get(&input);
        matches!(outcome, Some(SeenOutcome::Accepted(_) | SeenOutcome::Duplicate(_)))
    }

    /// Those of the files without a decision.
    fn without(&self, inputs: &[usize]) -> Vec<usize> {
        let is_open =
            |input: &usize| !self.outcomes.contains_key(input) && !self.later.contains(input);
        inputs.iter().copied().filter(is_open).collect()
    }
}

/// The outcome for a converted series.
enum Series {
    /// It is accepted or a duplicate.
    Taken(SeenOutcome),
    /// It must be considered again.
    Later,
    /// It can never work.
    Refused(Refusal),
}

/// One conversion.
struct Unit<'a> {
    bundle: &'a Bundle,
    members: &'a [BundleFile<'a>],
    incoming: &'a Path,
    /// Folder of the converted volumes.
    out: PathBuf,
}

impl Unit<'_> {
    fn key(&self, input: usize) -> Vec<u8> {
        seen_key(self.incoming, &self.members[input].file.path)
    }

    /// Whether one of the files has changed or is gone.
    fn has_changed(&self, inputs: &[usize]) -> bool {
        let is_same = |file: &Candidate| ingest::look_at(&file.path).ok() == Some(file.look);
        !inputs.iter().all(|&input| is_same(self.members[input].file))
    }

    /// Time since the first of the files was seen.
    fn waited(&self, inputs: &[usize]) -> Duration {
        inputs.iter().map(|&input| self.members[input].waited).max().unwrap_or_default()
    }

    /// New files without an event. There are none unless the converter has a fault. In that case
    /// they must not be converted again and again.
    fn unmentioned(&self, events: &[Event]) -> Vec<usize> {
        let events = events.iter().filter(|event| !matches!(event, Event::InHand { .. }));
        let mentioned: BTreeSet<usize> = events.flat_map(Event::inputs).copied().collect();
        let is_new = |input: &usize| self.members[*input].standing == FileState::New;
        let new = (0..self.members.len()).filter(is_new);
        new.filter(|input| !mentioned.contains(input)).collect()
    }
}
