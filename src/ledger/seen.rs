//! Which files intake has seen, and what it decided about them: a log of decisions, the last one
//! about a file counts.
//!
//! A line is `<CRC-32 of the JSON, hex> <JSON>`. A line that a kill has cut, or that is damaged, is
//! passed over: its file is read again, and its content is known.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::error::{LedgerError, failed};
use crate::{
    domain::{
        left_alone::LeftAlone,
        scan::{FileStamp, ScanId},
        series_key::SeriesKey,
    },
    files::{self, steps},
};

/// The log is written anew when it has so many times as many lines as decisions, and some more.
const MAX_LINES_PER_DECISION: usize = 2;
const MORE_LINES: usize = 1000;

/// The decision about a file with this size and these times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenFile {
    look: FileStamp,
    /// The decision about the file.
    pub outcome: SeenOutcome,
    /// Series that the DICOM file or zip belongs to; empty if it has no readable header. `None` for
    /// other files, and if it was decided before series were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub series: Option<Vec<SeriesKey>>,
    /// When the file was first found missing, seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    absent_since_secs: Option<u64>,
}

/// A decision about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeenOutcome {
    /// Accepted as this scan.
    Accepted(ScanId),
    /// A copy of this scan.
    Duplicate(ScanId),
    /// Refused. The file is in quarantine, unless it could not be moved. Stores of earlier versions
    /// say this for files that were left alone, too.
    Quarantined,
    /// No scan for oddscan. The file stays where it is.
    LeftAlone(LeftAlone),
    /// The file is being read. If a start finds this, the process died while it read the file.
    Reading {
        /// How often reading began.
        attempts: u32,
    },
}

impl SeenFile {
    /// A decision about a file with this size and these times.
    pub fn new(look: FileStamp, outcome: SeenOutcome) -> Self {
        Self { look, outcome, series: None, absent_since_secs: None }
    }

    /// The same decision about a DICOM file of these series.
    pub fn of_series(self, series: Option<Vec<SeriesKey>>) -> Self {
        Self { series, ..self }
    }

    /// A decision about a file that oddscan itself has moved away at this time, seconds since 1970.
    pub fn moved_away(look: FileStamp, outcome: SeenOutcome, now_secs: u64) -> Self {
        Self { look, outcome, series: None, absent_since_secs: Some(now_secs) }
    }

    /// The files that a decision about this file concerns, too.
    fn fellows(&self, path: &[u8]) -> impl Iterator<Item = Fellows> {
        let keys = self.series.clone().unwrap_or_default();
        let folder = keys.is_empty().then(|| Fellows::Folder(folder_of(path).to_vec()));
        keys.into_iter().map(|key| Fellows::Study(key.study)).chain(folder)
    }

    /// Whether the file still has the same size and times.
    pub fn is_same(&self, look: &FileStamp) -> bool {
        self.look == *look
    }
}

/// A decision that files share: of one study or of one folder, with one outcome.
pub type Decision = (Fellows, SeenOutcome);

/// What the files of a decision have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Fellows {
    /// DICOM files of this study ([`SeriesKey::study`]), wherever they lie.
    Study(u64),
    /// Files whose study is not known, of the folder with this path.
    Folder(Vec<u8>),
}

/// The decisions about the files of the incoming folder, as [`SeenList::forget_missing`] finds
/// them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SeenFiles {
    /// Files that are there and were left alone, with the reason.
    pub left_alone: Vec<(Vec<u8>, LeftAlone)>,
    /// Decisions of which a file has just gone: it had been left alone, or refused where it lay.
    pub shrunk: HashSet<Decision>,
}

/// The path of a file's folder, without a slash at its end. It is empty for the incoming folder.
fn folder_of(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
    &path[..end]
}

/// A line of the log. Without a decision, the file is forgotten.
#[derive(Serialize, Deserialize)]
struct Line {
    path: PathText,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    seen: Option<SeenFile>,
}

/// A path in JSON: as text, or in hex if it is no UTF-8.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PathText {
    Text(String),
    Bytes { hex: String },
}

impl PathText {
    fn of(path: &[u8]) -> Self {
        match std::str::from_utf8(path) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Bytes { hex: hex::encode(path) },
        }
    }

    fn bytes(self) -> Option<Vec<u8>> {
        match self {
            Self::Text(text) => Some(text.into_bytes()),
            Self::Bytes { hex } => hex::decode(hex).ok(),
        }
    }
}

fn line(path: &[u8], seen: Option<&SeenFile>) -> Vec<u8> {
    let line = Line { path: PathText::of(path), seen: seen.cloned() };
    let json = serde_json::to_string(&line).expect("our own types become JSON");
    format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())).into_bytes()
}

/// The reverse of [`line`], without the end of the line.
fn parse(line: &[u8]) -> Option<(Vec<u8>, Option<SeenFile>)> {
    let (sum, json) = line.split_at_checked(9)?;
    let is_whole = sum == format!("{:08x} ", crc32fast::hash(json)).as_bytes();
    let Line { path, seen } = is_whole.then(|| serde_json::from_slice(json).ok())??;
    Some((path.bytes()?, seen))
}

/// The decisions about files, by their path below the incoming folder.
///
/// All of them are in memory: about 300 bytes for each file. A decision survives a kill at once,
/// and a power cut after [`SeenList::flush`].
#[derive(Debug)]
pub struct SeenList {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    log: File,
    n_lines: usize,
    /// A line may have been written in part: the next one needs a new line.
    is_torn: bool,
    seen: BTreeMap<Vec<u8>, SeenFile>,
}

impl SeenList {
    /// Opens the list, and returns how many of its lines were damaged. A missing one is made. The
    /// last line does not count: a kill may have cut it.
    pub fn open(path: &Path) -> Result<(Self, usize), LedgerError> {
        let doing = "opening the list of seen files";
        let mut seen = BTreeMap::new();
        let (mut n_lines, mut n_damaged, mut is_torn) = (0, 0, false);
        match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(doing)(error)),
            Ok(file) => {
                let mut lines = BufReader::new(file);
                let mut bytes = Vec::new();
                while lines.read_until(b'\n', &mut bytes).map_err(failed(doing))? > 0 {
                    n_lines += 1;
                    is_torn = bytes.pop_if(|last| *last == b'\n').is_none();
                    match parse(&bytes) {
                        Some((path, Some(decision))) => drop(seen.insert(path, decision)),
                        Some((path, None)) => drop(seen.remove(&path)),
                        // An empty line follows one that could not be written.
                        None => n_damaged += usize::from(!is_torn && !bytes.is_empty()),
                    }
                    bytes.clear();
                }
            }
        }

        let log = steps::append(path).map_err(failed(doing))?;
        let mut inner = Inner { path: path.to_owned(), log, n_lines, is_torn, seen };
        if n_damaged > 0 || is_torn || inner.is_long() {
            inner.rewrite()?;
        }
        Ok((Self { inner: Mutex::new(inner) }, n_damaged))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The decision about the file at a path, if there is one.
    pub fn get(&self, path: &[u8]) -> Option<SeenFile> {
        self.inner().seen.get(path).cloned()
    }

    /// Stores the decision about the file at a path.
    pub fn put(&self, path: &[u8], seen: &SeenFile) -> Result<(), LedgerError> {
        self.inner().put(path, seen.clone())
    }

    /// Removes the decision about the file at a path.
    pub fn forget(&self, path: &[u8]) -> Result<(), LedgerError> {
        self.inner().forget(path)
    }

    /// Makes all decisions durable.
    pub fn flush(&self) -> Result<(), LedgerError> {
        let inner = self.inner();
        steps::sync(&inner.log, &inner.path).map_err(failed("syncing the list of seen files"))
    }

    /// Forgets the files that were accepted as this scan or are copies of it, so that they are read
    /// again. Returns how many these are.
    pub fn forget_scan(&self, scan: ScanId) -> Result<usize, LedgerError> {
        let is_of_scan = |seen: &SeenFile| matches!(seen.outcome, SeenOutcome::Accepted(id) | SeenOutcome::Duplicate(id) if id == scan);
        let mut inner = self.inner();
        let all = inner.seen.iter().filter(|(_, seen)| is_of_scan(seen));
        let paths: Vec<Vec<u8>> = all.map(|(path, _)| path.clone()).collect();
        paths.iter().try_for_each(|path| inner.forget(path))?;
        Ok(paths.len())
    }

    /// Looks at all decisions, and removes those about files that have been missing for
    /// `patience_secs`. It waits that long because an unmounted share looks empty: otherwise all
    /// its files would be read again later.
    pub fn forget_missing(
        &self,
        is_there: impl Fn(&[u8]) -> bool,
        now_secs: u64,
        patience_secs: u64,
    ) -> Result<SeenFiles, LedgerError> {
        let mut inner = self.inner();
        let mut found = SeenFiles::default();
        let (mut changed, mut gone) = (Vec::new(), Vec::new());
        for (path, seen) in &inner.seen {
            let absent_since_secs = match (is_there(path), seen.absent_since_secs) {
                (true, _) => None,
                (false, since) => Some(since.unwrap_or(now_secs)),
            };

            if let (SeenOutcome::LeftAlone(reason), None) = (seen.outcome, absent_since_secs) {
                found.left_alone.push((path.clone(), reason));
            }
            let was_there = seen.absent_since_secs.is_none();
            let is_open =
                matches!(seen.outcome, SeenOutcome::LeftAlone(_) | SeenOutcome::Quarantined);
            if is_open && was_there && absent_since_secs.is_some() {
                found.shrunk.extend(seen.fellows(path).map(|fellows| (fellows, seen.outcome)));
            }

            if absent_since_secs.is_some_and(|since| now_secs >= since + patience_secs) {
                gone.push(path.clone());
            } else if absent_since_secs != seen.absent_since_secs {
                changed.push((path.clone(), SeenFile { absent_since_secs, ..seen.clone() }));
            }
        }

        gone.iter().try_for_each(|path| inner.forget(path))?;
        changed.into_iter().try_for_each(|(path, seen)| inner.put(&path, seen))?;
        Ok(found)
    }

    /// Forgets decisions, so that their files are considered again. Returns how many these are.
    /// Files for whose path `is_alone` holds keep theirs: no other file has a part in it.
    pub fn forget_decisions(
        &self,
        decisions: &HashSet<Decision>,
        is_alone: impl Fn(&[u8]) -> bool,
    ) -> Result<usize, LedgerError> {
        let mut inner = self.inner();
        let is_forgotten = |path: &[u8], seen: &SeenFile| {
            let is_there = seen.absent_since_secs.is_none();
            let mut fellows = seen.fellows(path);
            is_there
                && !is_alone(path)
                && fellows.any(|fellows| decisions.contains(&(fellows, seen.outcome)))
        };
        let all = inner.seen.iter().filter(|(path, seen)| is_forgotten(path, seen));
        let paths: Vec<Vec<u8>> = all.map(|(path, _)| path.clone()).collect();
        paths.iter().try_for_each(|path| inner.forget(path))?;
        Ok(paths.len())
    }
}

impl Inner {
    fn put(&mut self, path: &[u8], seen: SeenFile) -> Result<(), LedgerError> {
        self.append(&line(path, Some(&seen)))?;
        self.seen.insert(path.to_vec(), seen);
        Ok(())
    }

    fn forget(&mut self, path: &[u8]) -> Result<(), LedgerError> {
        if self.seen.contains_key(path) {
            self.append(&line(path, None))?;
            self.seen.remove(path);
        }
        Ok(())
    }

    fn append(&mut self, line: &[u8]) -> Result<(), LedgerError> {
        if self.is_long() {
            self.rewrite()?;
        }
        let bytes = if self.is_torn { [b"\n", line].concat() } else { line.to_vec() };
        self.is_torn = true;
        steps::write(&mut self.log, &self.path, &bytes)
            .map_err(failed("writing to the list of seen files"))?;
        self.is_torn = false;
        self.n_lines += 1;
        Ok(())
    }

    fn is_long(&self) -> bool {
        self.n_lines > MAX_LINES_PER_DECISION * self.seen.len() + MORE_LINES
    }

    /// Writes the log anew, with a line for each decision.
    fn rewrite(&mut self) -> Result<(), LedgerError> {
        let doing = "writing the list of seen files anew";
        let lines: Vec<u8> =
            self.seen.iter().flat_map(|(path, seen)| line(path, Some(seen))).collect();
        files::write_atomic(&self.path, &lines).map_err(failed(doing))?;
        self.log = steps::append(&self.path).map_err(failed(doing))?;
        (self.n_lines, self.is_torn) = (self.seen.len(), false);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn id(n: u8) -> ScanId {
        ScanId([n; 32])
    }

    const LOOK: FileStamp = FileStamp { size: 5, modified_ns: 1, changed_ns: 2 };

    fn open(folder: &tempfile::TempDir) -> (SeenList, usize) {
        SeenList::open(&folder.path().join("seen")).unwrap()
    }

    #[test]
    fn decisions_come_back_after_a_restart_and_the_last_one_counts() {
        let folder = tempfile::tempdir().unwrap();
        let (list, _) = open(&folder);
        let key = SeriesKey { study: 7, series: 8 };
        let accepted = SeenFile::new(LOOK, SeenOutcome::Accepted(id(1)));
        let of_series = accepted.clone().of_series(Some(vec![key]));
        list.put(b"a.nii", &accepted).unwrap();
        list.put(b"b\xff\n.dcm", &of_series).unwrap();
        list.put(b"c.nii", &accepted).unwrap();
        list.forget(b"c.nii").unwrap();
        let copy = SeenFile::new(LOOK, SeenOutcome::Duplicate(id(1)));
        list.put(b"a.nii", &copy).unwrap();
        list.flush().unwrap();

        let (list, n_damaged) = open(&folder);
        assert_eq!(n_damaged, 0);
        assert_eq!(list.get(b"a.nii"), Some(copy));
        assert_eq!(list.get(b"b\xff\n.dcm"), Some(of_series));
        assert_eq!(list.get(b"c.nii"), None);
        assert_eq!(list.forget_scan(id(1)).unwrap(), 2);
        assert_eq!(open(&folder).0.get(b"a.nii"), None);
    }

    #[test]
    fn a_decision_of_an_old_version_is_read_and_a_changed_file_is_another() {
        let old = "{\"look\":{\"size\":5,\"modified_ns\":1,\"changed_ns\":2},\"outcome\":\"quarantined\"}";
        let seen: SeenFile = serde_json::from_str(old).unwrap();
        assert_eq!(seen.series, None);
        assert!(seen.is_same(&LOOK) && !seen.is_same(&FileStamp { size: 6, ..LOOK }));
    }

    #[test]
    fn a_cut_line_is_passed_over_and_a_damaged_one_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("seen");
        let (list, _) = open(&folder);
        for name in ["a", "b", "c"] {
            list.put(name.as_bytes(), &SeenFile::new(LOOK, SeenOutcome::Quarantined)).unwrap();
        }
        let whole = fs::read(&at).unwrap();
        for cut in 1..whole.len() / 3 {
            fs::write(&at, &whole[..whole.len() - cut]).unwrap();
            let (list, n_damaged) = open(&folder);
            assert_eq!(n_damaged, 0, "a kill may cut the last line");
            assert!(list.get(b"b").is_some(), "cut by {cut}");
            list.put(b"d", &SeenFile::new(LOOK, SeenOutcome::Quarantined)).unwrap();
            assert!(open(&folder).0.get(b"d").is_some(), "written after a cut by {cut}");
        }
        for position in 0..whole.len() / 3 - 1 {
            let mut changed = whole.clone();
            changed[position] ^= 4;
            fs::write(&at, changed).unwrap();
            let (list, n_damaged) = open(&folder);
            assert!(n_damaged >= 1, "byte {position}");
            assert!(list.get(b"a").is_none() && list.get(b"c").is_some(), "byte {position}");
            assert_eq!(open(&folder).1, 0, "said once");
        }
    }

    #[test]
    fn the_log_stays_short() {
        let folder = tempfile::tempdir().unwrap();
        let (list, _) = open(&folder);
        for turn in 0..3000 {
            let look = FileStamp { size: turn, ..LOOK };
            list.put(b"a", &SeenFile::new(look, SeenOutcome::Reading { attempts: 1 })).unwrap();
        }
        let n_lines = fs::read(folder.path().join("seen")).unwrap();
        let n_lines = n_lines.iter().filter(|&&byte| byte == b'\n').count();
        assert!(n_lines <= MORE_LINES + 3, "{n_lines} lines for one decision");
        assert!(open(&folder).0.get(b"a").unwrap().is_same(&FileStamp { size: 2999, ..LOOK }));
    }

    #[test]
    fn a_share_that_was_away_for_a_while_is_not_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let (list, _) = open(&folder);
        list.put(b"a.nii", &SeenFile::new(LOOK, SeenOutcome::Quarantined)).unwrap();
        let is_known = || list.get(b"a.nii").is_some_and(|seen| seen.is_same(&LOOK));
        for (is_there, now, known) in
            [(false, 100, true), (false, 199, true), (true, 250, true), (false, 300, true)]
        {
            list.forget_missing(|_| is_there, now, 100).unwrap();
            assert_eq!(is_known(), known, "at {now}");
        }
        list.forget_missing(|_| false, 400, 100).unwrap();
        assert!(!is_known());
    }

    #[test]
    fn a_decision_of_which_a_file_goes_is_found_once_and_only_its_own_files_are_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let (list, _) = open(&folder);
        let localiser = SeenOutcome::LeftAlone(LeftAlone::Localiser);
        for (path, outcome) in [
            ("a/1", localiser),
            ("a/2", localiser),
            ("a/2.zip", localiser),
            ("a/3", SeenOutcome::LeftAlone(LeftAlone::Derived)),
            ("a/b/4", localiser),
            ("ab/5", localiser),
            ("6", SeenOutcome::Accepted(id(1))),
        ] {
            list.put(path.as_bytes(), &SeenFile::new(LOOK, outcome)).unwrap();
        }
        // oddscan has moved this one itself, so that no series has changed.
        let moved = SeenFile::moved_away(LOOK, SeenOutcome::Quarantined, 10);
        list.put(b"a/7", &moved).unwrap();
        let is_there = |path: &[u8]| ![&b"a/1"[..], b"a/7", b"6"].contains(&path);

        let found = list.forget_missing(is_there, 20, 100).unwrap();
        assert_eq!(found.left_alone.len(), 5);
        assert_eq!(found.shrunk, [(Fellows::Folder(b"a".to_vec()), localiser)].into());
        let n = list.forget_decisions(&found.shrunk, |path| path == b"a/2.zip").unwrap();
        assert_eq!(n, 1);
        let is_known = |path: &str| list.get(path.as_bytes()).is_some();
        let known = ["a/1", "a/2", "a/2.zip", "a/3", "a/b/4", "ab/5", "a/7"].map(is_known);
        assert_eq!(known, [true, false, true, true, true, true, true]);
        assert!(list.forget_missing(is_there, 30, 100).unwrap().shrunk.is_empty(), "said once");
    }

    #[test]
    fn a_decision_about_a_study_is_forgotten_wherever_its_files_lie() {
        let folder = tempfile::tempdir().unwrap();
        let (list, _) = open(&folder);
        let stray = SeenOutcome::LeftAlone(LeftAlone::Stray);
        for (path, study) in [("a/1", 1), ("b/2", 1), ("a/3", 2)] {
            let key = SeriesKey { study, series: 7 };
            let seen = SeenFile::new(LOOK, stray).of_series(Some(vec![key]));
            list.put(path.as_bytes(), &seen).unwrap();
        }
        let found = list.forget_missing(|path| path != b"a/1", 20, 100).unwrap();
        assert_eq!(found.shrunk, [(Fellows::Study(1), stray)].into());
        assert_eq!(list.forget_decisions(&found.shrunk, |_| false).unwrap(), 1);
        let is_known = |path: &str| list.get(path.as_bytes()).is_some();
        assert_eq!(["a/1", "b/2", "a/3"].map(is_known), [true, false, true]);
    }
}
