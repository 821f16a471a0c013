//! What is left alone in the incoming folder: counted by reason, and named in a file of the state
//! folder until somebody has dealt with it.
//!
//! Names can name a patient. They are in that file, which only the service may read, and in the log
//! at debug.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io, mem,
    path::{Path, PathBuf},
    time::Instant,
};

use tracing::{debug, info};

use crate::{
    domain::left_alone::LeftAlone, files, ingest, ledger::Decision, nifti::foreign_format,
    pipeline::board::LeftAloneNames,
};

/// Names of one reason that are written to the file; the count has no limit.
const MAX_NAMES: usize = 1000;

/// Decisions that have lost a file.
#[derive(Default)]
pub(super) struct Rests {
    /// Those whose other files must be considered again.
    pub(super) due: HashSet<Decision>,
    /// Those whose other files were considered again lately, and when.
    pub(super) done: HashMap<Decision, Instant>,
}

/// Files of a listing that are left alone because of their name, kind or place.
#[derive(Default)]
pub(super) struct LeftAloneFiles {
    /// For each, the reason, and whether the log has named it.
    known: HashMap<PathBuf, (LeftAlone, bool)>,
    /// What was written to the file last.
    pub(super) written: Option<BTreeMap<LeftAlone, LeftAloneNames>>,
}

impl LeftAloneFiles {
    /// Records the files of this listing. Those that were there at the last listing count: the
    /// others may still get another name.
    pub(super) fn look(&mut self, now: impl Iterator<Item = (PathBuf, LeftAlone)>) {
        let known = mem::take(&mut self.known);
        let mut n_unnamed = 0;
        for (path, reason) in now {
            let was_said = known.get(&path).map(|(_, was_said)| *was_said);
            if was_said == Some(false) {
                debug!(path = %path.display(), %reason, "left alone");
                n_unnamed += 1;
            }
            self.known.insert(path, (reason, was_said.is_some()));
        }
        if n_unnamed > 0 {
            info!(
                files = n_unnamed,
                "left alone in the incoming folder; `oddscan status --names` names them"
            );
        }
    }

    /// The counted files.
    pub(super) fn counted(&self) -> impl Iterator<Item = (&Path, LeftAlone)> {
        let said = self.known.iter().filter(|(_, (_, was_said))| *was_said);
        said.map(|(path, (reason, _))| (path.as_path(), *reason))
    }
}

/// Why a file that is neither NIfTI by its name nor DICOM is left alone. `None` for files that
/// describe scans beside them.
pub(super) fn reason_by_name(path: &Path) -> Option<LeftAlone> {
    if ingest::describes_a_scan(path) {
        None
    } else if foreign_format(&path.to_string_lossy()).is_some() {
        Some(LeftAlone::ForeignFormat)
    } else {
        Some(LeftAlone::NotAScan)
    }
}

/// Counts and names files by reason.
pub(super) fn by_reason<'f>(
    files: impl Iterator<Item = (&'f Path, LeftAlone)>,
) -> BTreeMap<LeftAlone, LeftAloneNames> {
    let mut found: BTreeMap<LeftAlone, LeftAloneNames> = BTreeMap::new();
    for (path, reason) in files {
        let named = found.entry(reason).or_default();
        named.n_files += 1;
        named.names.push(path.to_string_lossy().into_owned());
    }
    for named in found.values_mut() {
        named.names.sort();
        named.names.truncate(MAX_NAMES);
    }
    found
}

/// Writes a file that no other user may read. It is made again at each start, so that it need not
/// survive a power cut.
pub(super) fn write_names(
    file: &Path,
    found: &BTreeMap<LeftAlone, LeftAloneNames>,
) -> io::Result<()> {
    files::replace_private(file, &serde_json::to_vec(found)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_counts_from_its_second_listing_on_and_until_it_is_gone() {
        let mut files = LeftAloneFiles::default();
        let file = |name: &str| (PathBuf::from(name), LeftAlone::NotAScan);
        let counted = |files: &LeftAloneFiles| by_reason(files.counted());
        files.look([file("a")].into_iter());
        assert!(counted(&files).is_empty());
        files.look([file("b"), file("a")].into_iter());
        let names = |names: &[&str]| LeftAloneNames {
            n_files: names.len(),
            names: names.iter().map(ToString::to_string).collect(),
        };
        assert_eq!(counted(&files), [(LeftAlone::NotAScan, names(&["a"]))].into());
        files.look([file("a"), file("b")].into_iter());
        assert_eq!(counted(&files), [(LeftAlone::NotAScan, names(&["a", "b"]))].into());
        files.look([].into_iter());
        assert!(counted(&files).is_empty());
    }

    #[test]
    fn a_name_tells_a_foreign_format_from_other_files_and_from_companions() {
        for (name, reason) in [
            ("a.mgz", Some(LeftAlone::ForeignFormat)),
            ("a.NRRD", Some(LeftAlone::ForeignFormat)),
            ("notes.txt", Some(LeftAlone::NotAScan)),
            ("a_dwi.bval", None),
            ("a.json", None),
        ] {
            assert_eq!(reason_by_name(Path::new(name)), reason, "{name}");
        }
    }

    #[test]
    fn many_files_are_all_counted_and_some_are_named() {
        let paths: Vec<PathBuf> = (0..MAX_NAMES + 5).map(|n| format!("{n}").into()).collect();
        let found = by_reason(paths.iter().map(|path| (path.as_path(), LeftAlone::NotMr)));
        let named = &found[&LeftAlone::NotMr];
        assert_eq!((named.n_files, named.names.len()), (MAX_NAMES + 5, MAX_NAMES));
    }

    #[test]
    fn only_the_service_may_read_the_names() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("names");
        write_names(&file, &BTreeMap::new()).unwrap();
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
