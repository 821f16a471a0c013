//! DICOM files in the incoming folder: decides when a series is complete, and what happens to it.
//!
//! All DICOM files and zips of the folder are one list. Their headers say what belongs together,
//! wherever the files lie. A process of its own reads and converts them ([`Conversion`]). It gets
//! the whole list, and reads only the series of new files: the list of seen files keeps the series
//! of each file. Each volume is then read like a NIfTI file. A kill at any line costs only a second
//! conversion, because volumes are recognised by their content.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    mem,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use super::{
    super::{MAX_CRASHES, board::StageName, now_secs},
    Companions, Intake, MAX_PAUSE, Whole, below,
    bundles::{Pause, PauseOf},
    conversion::{Conversion, Converted, Member},
    poison,
    refuse::decision_about,
    seen_key,
};
use crate::{
    domain::{
        error::{QuarantineReason, Refusal, ScanError},
        left_alone::LeftAlone,
        patient::Patient,
        scan::{DicomFacts, ScanId},
    },
    files::{are_open_for_writing, common_folder, fresh_folder},
    ingest::{self, Candidate, Patterns, Settled},
    ledger::{SeenFile, SeenOutcome},
    metrics::{IngestResult, SeenBy, Stage},
    process::convert::{Event, FileState},
    quarantine::{self, Refused, Source},
};

/// Unreadable files are tried this many times. That takes about three quarters of an hour.
const MAX_FAILURES: u32 = 10;

impl Intake {
    /// Lists the DICOM files in the incoming folder. A folder that cannot be listed is reported
    /// elsewhere.
    pub(super) fn list_dicom(&mut self, incoming: &Path, patterns: &Patterns) -> Vec<Candidate> {
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
        let files = ingest::list_dicom(incoming, patterns, has_mark, heartbeat).unwrap_or_default();
        let there: HashSet<&Path> = files.iter().map(|file| file.path.as_path()).collect();
        self.bundles.keep_only(|path| there.contains(path));
        files
    }

    /// Starts to convert the series of whole new files, if there are any. The conversion has a
    /// thread of its own, so that intake does not wait for it. One runs at a time.
    pub(super) fn consider_dicom(
        &mut self,
        files: &[Candidate],
        incoming: &Path,
        by: SeenBy,
    ) -> Result<(), ScanError> {
        let members = self.members(files, incoming, by)?;
        let open: Vec<(PauseOf, bool, Duration)> = members
            .iter()
            .filter(|member| member.outcome.is_none())
            .map(|member| (member.pause_of(), member.state != FileState::Growing, member.waited))
            .collect();

        let is_due = members.iter().any(|member| member.state == FileState::New);
        // While the encoder's queue is full, no further file is read: the folder is the queue.
        let is_free = !self.is_paused && self.pending.is_empty() && !self.shared.stopping();
        if is_due && is_free && self.conversion.is_none() {
            self.conversion = Some(Conversion::start(&self.shared, members, incoming));
        }
        self.bundles.wait(open.into_iter(), self.conversion.is_some(), Instant::now());
        Ok(())
    }

    /// Finds the state of every file.
    fn members(
        &mut self,
        files: &[Candidate],
        incoming: &Path,
        by: SeenBy,
    ) -> Result<Vec<Member>, ScanError> {
        let config = self.shared.config();
        let (intake, now) = (&config.intake, Instant::now());
        let mut members = Vec::with_capacity(files.len());
        for file in files {
            self.shared.board.heartbeat(StageName::Intake);
            let seen = self.shared.seen.get(&seen_key(incoming, &file.path));
            let seen = seen.filter(|seen| seen.is_same(&file.look));
            if let Some(SeenFile { outcome, series, .. }) = seen
                && !matches!(outcome, SeenOutcome::Reading { .. })
            {
                let (state, outcome, waited) = (FileState::Known, Some(outcome), Duration::ZERO);
                let file = file.clone();
                members.push(Member { file, state, outcome, series, waited });
                continue;
            }

            let bundles = &mut self.bundles;
            if !bundles.settling.knows(&file.path) {
                self.shared.metrics.file_seen(by);
            }
            let is_zip = ingest::is_zip(&file.path);
            let settle = if is_zip { intake.settle } else { intake.series_settle };
            let (state, waited) = match bundles.settling.look(file, [None; 2], now, settle) {
                Settled::Waiting => (FileState::Growing, Duration::ZERO),
                Settled::Whole(waited) => (FileState::New, waited),
            };
            let series = bundles.series_of(file);
            let file = file.clone();
            let mut member = Member { file, state, outcome: None, series, waited };
            if state == FileState::New && bundles.is_paused(&member.pause_of(), now) {
                member.state = FileState::Paused;
            }
            members.push(member);
        }

        let open = members.iter().filter(|member| member.outcome.is_none());
        self.bundles.keep_pauses(&open.map(Member::pause_of).collect());
        Ok(members)
    }

    /// Takes the results of a conversion that has ended. While scans wait for the encoder, the
    /// results wait, too.
    pub(super) fn take_converted(&mut self) -> Result<(), ScanError> {
        if !self.has_converted() {
            return Ok(());
        }
        let Some(conversion) = self.conversion.take() else { return Ok(()) };
        let Converted { mut members, incoming, work, elapsed, events } = conversion.end();
        self.shared.metrics.stage_finished(Stage::Decode, elapsed);
        self.look_up_decisions(&mut members, &incoming)?;

        match events {
            Ok(Some(events)) => {
                self.learn(&mut members, &events, &incoming)?;
                let unit = Unit { members: &members, incoming: &incoming, out: work.join("out") };
                let failed = self.take_events(&unit, &events)?;
                self.pause(&unit, &events, |input| failed.contains(&input));
            }
            // Asked to stop. The next start converts the files again.
            Ok(None) => {}
            Err(error) => {
                self.shared.metrics.stage_failed(Stage::Decode, &error);
                self.shared.metrics.stage_retried(Stage::Decode);
                warn!(%error, "DICOM files could not be converted; trying again later");
                let unit = Unit { members: &members, incoming: &incoming, out: work.join("out") };
                self.pause(&unit, &[], |_| true);
            }
        }

        empty(&work);
        Ok(())
    }

    /// Stops a conversion that runs. The next start converts its files again.
    pub(super) fn give_up_conversion(&mut self) {
        if let Some(conversion) = self.conversion.take() {
            empty(&conversion.give_up());
        }
    }

    /// Whether the results of a conversion can be taken.
    pub(super) fn has_converted(&self) -> bool {
        self.pending.is_empty() && self.conversion.as_ref().is_some_and(Conversion::has_ended)
    }

    /// Reads the decisions about the files again. Listings during the conversion may have dropped
    /// some of them, and these must not come back.
    fn look_up_decisions(&self, members: &mut [Member], incoming: &Path) -> Result<(), ScanError> {
        for member in members.iter_mut().filter(|member| member.outcome.is_some()) {
            self.shared.board.heartbeat(StageName::Intake);
            let seen = self.shared.seen.get(&seen_key(incoming, &member.file.path));
            let seen = seen.filter(|seen| seen.is_same(&member.file.look));
            member.outcome = seen.map(|seen| seen.outcome);
        }
        Ok(())
    }

    /// Remembers which series the files belong to.
    fn learn(
        &mut self,
        members: &mut [Member],
        events: &[Event],
        incoming: &Path,
    ) -> Result<(), ScanError> {
        for event in events {
            let Event::Belongs { series, inputs } = event else { continue };
            for &input in inputs {
                self.shared.board.heartbeat(StageName::Intake);
                let member = &mut members[input];
                member.series = Some(series.clone());
                match member.outcome {
                    Some(outcome) => {
                        let seen = SeenFile::new(member.file.look, outcome);
                        let seen = seen.of_series(member.series.clone());
                        let key = seen_key(incoming, &member.file.path);
                        self.shared.seen.put(&key, &seen)?;
                    }
                    None => self.bundles.learn(&member.file, series.clone()),
                }
            }
        }
        Ok(())
    }

    /// Pauses what was tried and still has no decision, so that a growing series is not converted
    /// all the time. The pause doubles after each failure.
    fn pause(&mut self, unit: &Unit<'_>, events: &[Event], has_failed: impl Fn(usize) -> bool) {
        let settle = self.shared.config().intake.series_settle.max(Duration::from_millis(100));
        let now = Instant::now();
        let inputs_of = |is_wanted: fn(&Event) -> bool| -> HashSet<usize> {
            let wanted = events.iter().filter(|event| is_wanted(event));
            wanted.flat_map(Event::inputs).copied().collect()
        };
        let postponed = inputs_of(|event| matches!(event, Event::Postponed { .. }));
        let waiting = inputs_of(|event| matches!(event, Event::Waiting { .. }));
        let paused_studies = self.paused_studies(unit);

        let mut failed: HashMap<PauseOf, bool> = HashMap::new();
        for (input, member) in unit.members.iter().enumerate() {
            if member.state != FileState::New || !self.bundles.settling.knows(&member.file.path) {
                continue;
            }
            if postponed.contains(&input) && !has_failed(input) {
                self.bundles.wake(&member.pause_of());
                continue;
            }
            let until = member.studies().filter_map(|study| paused_studies.get(&study)).max();
            if let Some(&until) = until.filter(|_| waiting.contains(&input)) {
                self.bundles.pause(member.pause_of(), Pause { until, n_failures: 0 });
                continue;
            }
            *failed.entry(member.pause_of()).or_default() |= has_failed(input);
        }

        for (what, has_failed) in failed {
            let n_failures = if has_failed { self.bundles.n_failures(&what) + 1 } else { 0 };
            let length = settle.saturating_mul(1 << n_failures.min(16)).min(MAX_PAUSE.max(settle));
            // A file that joins a paused series does not prolong the pause.
            if has_failed || !self.bundles.is_paused(&what, now) {
                self.bundles.pause(what, Pause { until: now + length, n_failures });
            }
        }
    }

    /// Until when the paused files of each study pause. A file that waits for them pauses as long:
    /// with ends of their own, one of them would always find another one paused.
    fn paused_studies(&self, unit: &Unit<'_>) -> HashMap<u64, Instant> {
        let mut ends: HashMap<u64, Instant> = HashMap::new();
        for member in unit.members.iter().filter(|member| member.state == FileState::Paused) {
            let Some(until) = self.bundles.until(&member.pause_of()) else { continue };
            for study in member.studies() {
                let end = ends.entry(study).or_insert(until);
                *end = until.max(*end);
            }
        }
        ends
    }

    /// Deals with the results of a conversion. Returns the files that failed and are tried again.
    fn take_events(
        &mut self,
        unit: &Unit<'_>,
        events: &[Event],
    ) -> Result<BTreeSet<usize>, ScanError> {
        let mut decided = Decided::default();
        let mut refused = Vec::new();
        for event in events {
            let Event::Converted { name, patient, dicom, inputs, left_out } = event else {
                continue;
            };
            self.shared.board.heartbeat(StageName::Intake);
            if self.shared.stopping() {
                // The next start converts them again.
                decided.later.extend(inputs.iter().chain(left_out));
                continue;
            }
            let header = (patient.clone(), dicom.clone());
            match self.take_series(unit, name, header, inputs, &mut decided)? {
                Series::Taken(outcome) => {
                    decided.outcomes.extend(inputs.iter().map(|&input| (input, outcome)));
                }
                // A volume of files that were all decided earlier says nothing new.
                Series::Refused(_) if !unit.has_new(inputs) => {}
                Series::Refused(refusal) => {
                    let all = inputs.iter().chain(left_out).copied().collect();
                    refused.push((name, refusal, all));
                }
                Series::Later => {
                    decided.fail(inputs);
                    decided.later.extend(left_out);
                }
            }
        }

        for event in events {
            match event {
                // The fault of a file that is not whole, or was decided earlier, is no news.
                Event::Refused { inputs, .. } if !unit.has_new(inputs) => {}
                Event::Refused { refusal, inputs, .. }
                    if refusal.reason == QuarantineReason::Io
                        && self.n_failures(unit, inputs) < MAX_FAILURES =>
                {
                    warn!(%refusal, "DICOM files cannot be read; trying again");
                    decided.fail(inputs);
                }
                Event::Refused { name, refusal, may_grow, inputs } => {
                    if *may_grow && self.may_still_grow(unit, refusal, inputs) {
                        debug!(%refusal, "a series may still be growing");
                        decided.later.extend(inputs);
                    } else {
                        refused.push((name, refusal.clone(), inputs.clone()));
                    }
                }
                // A zip may also hold a series that is decided now.
                Event::Waiting { inputs } | Event::Postponed { inputs } => {
                    decided.later.extend(inputs);
                }
                Event::Skipped { .. }
                | Event::InHand { .. }
                | Event::Belongs { .. }
                | Event::Converted { .. } => {}
            }
        }

        for (name, refusal, inputs) in refused {
            self.refuse_series(unit, name, &refusal, &inputs, &mut decided)?;
        }
        for event in events {
            let Event::Skipped { name, reason, why, inputs } = event else { continue };
            debug!(name, place = %unit.place(inputs).display(), "left alone");
            let left = decided.without(&unit.in_no_scan(inputs));
            if inputs.iter().all(|&input| decided.is_taken(input)) {
                // A zip that gave a scan holds something else, too.
                info!(why, "a part of a zip is left out");
            }
            self.leave_alone(unit, *reason, why, &left)?;
        }

        for event in events.iter().filter(|event| !event.left_out().is_empty()) {
            let stray = decided.without(&unit.in_no_scan(event.left_out()));
            self.leave_alone(unit, LeftAlone::Stray, &LeftAlone::Stray.to_string(), &stray)?;
        }

        let (reason, unmentioned) = (LeftAlone::Unmentioned, unit.unmentioned(events));
        self.leave_alone(unit, reason, &reason.to_string(), &unmentioned)?;
        self.write_down(unit, &decided)?;
        Ok(if self.shared.stopping() { BTreeSet::new() } else { decided.failed })
    }

    /// Remembers the decisions about the files, and forgets that files were read that must be
    /// considered again.
    fn write_down(&mut self, unit: &Unit<'_>, decided: &Decided) -> Result<(), ScanError> {
        for (input, outcome) in &decided.outcomes {
            if !decided.later.contains(input) {
                self.remember_files(unit, &[*input], *outcome)?;
            }
        }
        for &input in &decided.later {
            match unit.members[input].outcome {
                None => self.shared.seen.forget(&unit.key(input))?,
                // It may have been marked as being read.
                Some(outcome) => self.remember_files(unit, &[input], outcome)?,
            }
        }
        Ok(())
    }

    /// How many times in a row the conversion of one of the files failed.
    fn n_failures(&self, unit: &Unit<'_>, inputs: &[usize]) -> u32 {
        let n_failures = |&input: &usize| self.bundles.n_failures(&unit.members[input].pause_of());
        inputs.iter().map(n_failures).max().unwrap_or(0)
    }

    /// Whether slices may still arrive that fill the gaps, or the end of a file that lacks it.
    fn may_still_grow(&mut self, unit: &Unit<'_>, refusal: &Refusal, inputs: &[usize]) -> bool {
        let is_new = |input: &&usize| unit.members[**input].outcome.is_none();
        let new = || inputs.iter().filter(is_new).map(|&input| &unit.members[input].file);
        // The last file that came or changed counts: slices come one after the other.
        let has_time = new().any(|file| self.is_within_patience(&file.path));
        if refusal.reason == QuarantineReason::Truncated && has_time {
            self.unfinished.extend(new().map(|file| (file.path.clone(), file.look)));
            return true;
        }
        has_time && unit.zip(inputs).is_none()
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
        let mark = unit.mark(inputs);
        let n_crashes = match decided.n_crashes.get(&mark) {
            Some(&n_crashes) => n_crashes,
            None => self.crashes(unit, mark)?,
        };
        decided.n_crashes.insert(mark, n_crashes);

        if n_crashes >= MAX_CRASHES {
            let found = format!("{n_crashes} crashes during the reading of this series");
            return Ok(Series::Refused(poison(found)));
        }
        // Written durably before the series is read: after a crash it shows which one was being
        // read.
        let reading = SeenOutcome::Reading { attempts: n_crashes + 1 };
        self.remember_files(unit, &[mark], reading)?;
        self.shared.seen.flush()?;

        let companions = Companions::of(&path);
        let came_from = below(unit.incoming, unit.place(inputs)).to_owned();
        let (waited, earlier) = (unit.waited(inputs), unit.earlier(inputs));
        let candidate = Candidate { path, look };
        let whole =
            Whole { candidate, companions, came_from, patient, dicom, earlier, waited, n_crashes };

        let (read, timings) = self.reader.read(&whole);
        match self.admit(&whole, read, timings) {
            Err(error) => self.series_failed(error),
            Ok(None) => Ok(Series::Later),
            Ok(Some(outcome)) => {
                debug!(?outcome, place = %unit.place(inputs).display(), "read");
                if let SeenOutcome::Accepted(id) = outcome
                    && whole.earlier.iter().any(|earlier| *earlier != id)
                {
                    info!(scan = %id, "an earlier scan of this series had fewer slices");
                }
                self.shared.metrics.settled(whole.waited);
                Ok(Series::Taken(outcome))
            }
        }
    }

    fn series_failed(&self, error: ScanError) -> Result<Series, ScanError> {
        self.shared.metrics.stage_failed(Stage::Decode, &error);
        match error {
            ScanError::Refused(refusal) => Ok(Series::Refused(refusal)),
            ScanError::Device(_)
            | ScanError::Store(_)
            | ScanError::Ledger(_)
            | ScanError::Lost { .. } => Err(error),
            ScanError::Io { .. } | ScanError::Internal { .. } => {
                self.shared.metrics.stage_retried(Stage::Decode);
                warn!(%error, "a volume of a series could not be read; trying again later");
                Ok(Series::Later)
            }
        }
    }

    /// How often the process crashed while it read this series.
    fn crashes(&self, unit: &Unit<'_>, mark: usize) -> Result<u32, ScanError> {
        let seen = self.shared.seen.get(&unit.key(mark));
        let seen = seen.filter(|seen| seen.is_same(&unit.members[mark].file.look));
        Ok(match seen.map(|seen| seen.outcome) {
            Some(SeenOutcome::Reading { attempts }) if self.shared.after_crash => attempts,
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
            let Member { file, series, outcome: earlier, .. } = &unit.members[input];
            if earlier.is_none() {
                self.count_file(outcome);
            }
            let seen = decision_about(file, outcome).of_series(series.clone());
            self.shared.seen.put(&unit.key(input), &seen)?;
            if is_decided {
                self.bundles.forget(&file.path);
                self.unfinished.remove(&file.path);
            }
        }
        Ok(())
    }

    /// Sends the files of a series to quarantine. Files that also gave another volume, now or
    /// earlier, stay; if there is no other, only the reason goes to quarantine. This waits while
    /// some of the files must be considered again, or while quarantine is not available.
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

        let mut left = decided.without(&unit.in_no_scan(inputs));
        // Files that have changed or are gone are left out: the refusal does not apply to them.
        left.retain(|input| !unit.has_changed(&[*input]));
        let is_taken =
            |input: &usize| decided.is_taken(*input) || unit.members[*input].scan().is_some();
        if left.is_empty() && !inputs.iter().any(is_taken) {
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
        debug!(place = %unit.place(inputs).display(), "to quarantine");
        let source = |&input: &usize| {
            let Candidate { path, look } = &unit.members[input].file;
            Source { path, look: Some(*look) }
        };
        let sources: Vec<Source<'_>> = left.iter().map(source).collect();
        let refused = if let [file] = sources[..] {
            let came_from = file.path.strip_prefix(unit.incoming).unwrap_or(file.path);
            if has_writer {
                quarantine::refuse_in_place(&folder, file, came_from, refusal, now_secs())
            } else {
                quarantine::quarantine(&folder, file, came_from, refusal, now_secs())
            }
        } else {
            let folder_of_all = unit.folder(if left.is_empty() { inputs } else { &left });
            let folder_of_all = folder_of_all.strip_prefix(unit.incoming).unwrap_or(Path::new(""));
            let name = if name.is_empty() { "series" } else { name };
            // A series that came back from quarantine lies in a folder of its name already.
            let is_own = folder_of_all.file_name().is_some_and(|folder| folder == name);
            let came_from =
                if is_own { folder_of_all.to_owned() } else { folder_of_all.join(name) };
            // Without files, only the reason is written.
            let sources = if has_writer { &[] } else { &sources[..] };
            quarantine::quarantine_series(&folder, sources, &came_from, refusal, now_secs())
        };
        let entry = match refused {
            Ok(Refused::Entry(entry)) => entry,
            Ok(Refused::Changed) => {
                decided.later.extend(inputs);
                return Ok(());
            }
            Err(error) => {
                warn!(error = %error.kind(), "quarantine is not available; a refused series waits");
                self.quarantine.suspect();
                decided.fail(inputs);
                return Ok(());
            }
        };

        warn!(%refusal, n_files = left.len(), "a series went to quarantine");
        // This is remembered, too, in case the files could not be moved.
        decided.outcomes.extend(left.into_iter().map(|input| (input, SeenOutcome::Quarantined)));
        self.count_quarantined(refusal, &entry);
        Ok(())
    }
}

/// Removes the scans in the folder of a conversion.
fn empty(work: &Path) {
    if let Err(error) = fresh_folder(work) {
        warn!(error = %error.kind(), "cannot remove converted files; trying again later");
    }
}

/// The decisions about the files of a conversion. They are written after all its volumes: one file
/// may contain several volumes, and all of them must be decided first.
#[derive(Default)]
struct Decided {
    outcomes: BTreeMap<usize, SeenOutcome>,
    /// Files with a volume that must be considered again.
    later: BTreeSet<usize>,
    /// Those of them that failed.
    failed: BTreeSet<usize>,
    /// Crashes before this conversion. The key is [`Unit::mark`] of a volume.
    n_crashes: BTreeMap<usize, u32>,
}

impl Decided {
    /// Has files considered again because something failed.
    fn fail(&mut self, inputs: &[usize]) {
        self.later.extend(inputs);
        self.failed.extend(inputs);
    }

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
    members: &'a [Member],
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
        !inputs.iter().all(|&input| is_same(&self.members[input].file))
    }

    fn paths<'u>(&'u self, inputs: &'u [usize]) -> impl Iterator<Item = &'u Path> {
        inputs.iter().map(|&input| self.members[input].file.path.as_path())
    }

    /// The deepest folder that holds all of the files.
    fn folder<'u>(&'u self, inputs: &'u [usize]) -> &'u Path {
        common_folder(self.paths(inputs))
    }

    /// The zip that holds the whole series, if one does.
    fn zip(&self, inputs: &[usize]) -> Option<&Path> {
        let [input] = inputs else { return None };
        let path = self.members[*input].file.path.as_path();
        ingest::is_zip(path).then_some(path)
    }

    /// Where a series lies: its zip, or the deepest folder that holds all of it.
    fn place<'u>(&'u self, inputs: &'u [usize]) -> &'u Path {
        self.zip(inputs).unwrap_or_else(|| self.folder(inputs))
    }

    /// The file of a volume that the store marks while the volume is read: the first one without a
    /// decision, because the mark replaces it.
    fn mark(&self, inputs: &[usize]) -> usize {
        let open = inputs.iter().find(|input| self.members[**input].outcome.is_none());
        *open.unwrap_or(&inputs[0])
    }

    /// Whether one of the files was to be converted.
    fn has_new(&self, inputs: &[usize]) -> bool {
        inputs.iter().any(|&input| self.members[input].state == FileState::New)
    }

    /// Those of the files that are part of no scan yet.
    fn in_no_scan(&self, inputs: &[usize]) -> Vec<usize> {
        let is_in_none = |input: &usize| self.members[*input].scan().is_none();
        inputs.iter().copied().filter(is_in_none).collect()
    }

    /// The scans that some of the files were part of earlier. A zip of several series does not
    /// count: the store has one scan for it, which may be of another series.
    fn earlier(&self, inputs: &[usize]) -> Vec<ScanId> {
        let members = inputs.iter().map(|&input| &self.members[input]);
        let of_one = members.filter(|member| matches!(member.series.as_deref(), Some([_])));
        let scans = of_one.filter_map(Member::scan);
        scans.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Time since the first of the files was seen.
    fn waited(&self, inputs: &[usize]) -> Duration {
        inputs.iter().map(|&input| self.members[input].waited).max().unwrap_or_default()
    }

    /// New files without an event. There are none unless the converter has a fault. In that case
    /// they must not be converted again and again.
    fn unmentioned(&self, events: &[Event]) -> Vec<usize> {
        let says_outcome =
            |event: &&Event| !matches!(event, Event::InHand { .. } | Event::Belongs { .. });
        let mentioned: BTreeSet<usize> = events
            .iter()
            .filter(says_outcome)
            .flat_map(|event| event.inputs().iter().chain(event.left_out()))
            .copied()
            .collect();
        let is_new = |input: &usize| self.members[*input].state == FileState::New;
        let new = (0..self.members.len()).filter(is_new);
        new.filter(|input| !mentioned.contains(input)).collect()
    }
}
