//! The incoming folder: which files are scans, and when a file is whole.
//!
//! Nothing is deleted. Accepted files stay where they are; refused files move to quarantine.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs,
    io::{self, Read},
    os::unix::{ffi::OsStringExt, fs::MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::{
    domain::{
        dicom_start::{START_BYTES, begins_like_dicom},
        left_alone::LeftAlone,
        scan::FileStamp,
    },
    files::open_regular,
};

/// The patterns by which a file's name makes it a scan.
///
/// `.NII.GZ` names the same format as `.nii.gz`. So the patterns of scans match in upper and lower
/// case. Those of ignored files do so for the ending of NIfTI alone: `sub-1_brain.NII` is a mask,
/// but `T1_BRAIN.nii` is a scan, because only `_brain` marks a mask.
#[derive(Debug, Clone)]
pub struct Patterns {
    accept: GlobSet,
    ignore: GlobSet,
}

impl Patterns {
    /// Compiles shell patterns. The configuration has checked them before.
    pub fn new(accept: &[String], ignore: &[String]) -> Result<Self, globset::Error> {
        Ok(Self { accept: glob_set(accept, true)?, ignore: glob_set(ignore, false)? })
    }

    /// Whether a file with this name is a scan.
    pub fn is_scan(&self, path: &Path) -> bool {
        let Some(name) = path.file_name() else { return false };
        self.accept.is_match(name) && !self.is_ignored(name)
    }

    fn is_ignored(&self, name: &OsStr) -> bool {
        self.ignore.is_match(name) || self.ignore.is_match(with_plain_ending(name))
    }

    /// Whether a file with this name is neither a scan nor ignored: it may be DICOM or a zip.
    fn is_open(&self, path: &Path) -> bool {
        let Some(name) = path.file_name() else { return false };
        !self.accept.is_match(name) && !self.is_ignored(name)
    }
}

fn glob_set(patterns: &[String], any_case: bool) -> Result<GlobSet, globset::Error> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        set.add(GlobBuilder::new(pattern).case_insensitive(any_case).build()?);
    }
    set.build()
}

/// The name with `.nii` or `.nii.gz` in lower case, if it ends like that in any case.
fn with_plain_ending(name: &OsStr) -> OsString {
    let mut bytes = name.as_encoded_bytes().to_vec();
    for ending in [".nii.gz", ".nii"] {
        let start = bytes.len().saturating_sub(ending.len());
        if bytes[start..].eq_ignore_ascii_case(ending.as_bytes()) {
            bytes[start..].make_ascii_lowercase();
            break;
        }
    }
    OsString::from_vec(bytes)
}

/// Size and times of a file. Links are not followed.
pub fn look_at(path: &Path) -> io::Result<FileStamp> {
    let meta = fs::symlink_metadata(path)?;

    // Times after the year 2262, which a sender may set, wrap around. That does no harm, because
    // times are only compared for equality.
    let nanoseconds = |secs: i64, more: i64| secs.wrapping_mul(1_000_000_000).wrapping_add(more);

    Ok(FileStamp {
        size: meta.len(),
        modified_ns: nanoseconds(meta.mtime(), meta.mtime_nsec()),
        changed_ns: nanoseconds(meta.ctime(), meta.ctime_nsec()),
    })
}

/// A file, or a folder with the name of a file, that counts as a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Path of the file, beginning with that of the listed folder.
    pub path: PathBuf,
    /// Its present size and times.
    pub look: FileStamp,
}

/// How a listing treats links to files. Links to folders are never followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// They are passed over: in an incoming folder, a link may lead to anything.
    PassedOver,
    /// A link with the name of a scan is a scan. This is for folders that a person has named: in a
    /// DataLad data set, all files are links.
    ToFiles,
}

/// Levels of subfolders that are searched.
const MAX_DEPTH: usize = 8;

/// Files that are counted in all folders that are not searched: a hidden folder may hold copies of
/// a whole share. Beyond this, each such folder counts as one file.
const MAX_UNSEARCHED: usize = 10_000;

/// Hidden folders of operating systems and tools. Nobody waits for results of their files.
const SYSTEM_FOLDERS: [&str; 11] = [
    ".git",
    ".svn",
    ".datalad",
    ".AppleDouble",
    ".Spotlight-V100",
    ".fseventsd",
    ".TemporaryItems",
    ".Trashes",
    ".snapshot",
    ".snapshots",
    ".zfs",
];

/// The files below a folder, found by [`list`].
#[derive(Debug, Default)]
pub struct Listing {
    /// Scans, sorted by path.
    pub scans: Vec<Candidate>,
    /// What is left alone because of its kind or place, unless its name is ignored: links, pipes
    /// and devices, files in folders that are not searched, and folders that cannot be listed.
    pub left_alone: Vec<(PathBuf, LeftAlone)>,
}

/// A listing that is being made.
struct Listed<'l> {
    patterns: &'l Patterns,
    links: Links,
    found: Listing,
    /// Files that may still be counted in folders that are not searched.
    n_left: usize,
    alive: &'l mut dyn FnMut(),
}

/// All scans below `folder`. `alive` is called for every entry, because a large folder on a slow
/// share takes minutes.
pub fn list(
    folder: &Path,
    patterns: &Patterns,
    links: Links,
    mut alive: impl FnMut(),
) -> io::Result<Listing> {
    let found = Listing::default();
    let mut listed = Listed { patterns, links, found, n_left: MAX_UNSEARCHED, alive: &mut alive };
    listed.collect(folder, MAX_DEPTH)?;
    let mut found = listed.found;
    found.scans.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

impl Listed<'_> {
    fn collect(&mut self, folder: &Path, depth: usize) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            (self.alive)();
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            let scan = self.patterns.is_scan(&path);
            if kind.is_dir() && !scan {
                self.collect_below(&path, depth);
                continue;
            }

            // A link without a target counts, too: reading it gives the error.
            let is_link = kind.is_symlink() && self.links == Links::ToFiles && !path.is_dir();
            if scan && (kind.is_file() || kind.is_dir() || is_link) {
                // The file may already be gone.
                if let Ok(look) = look_at(&path) {
                    self.found.scans.push(Candidate { path, look });
                }
            } else if scan || (!kind.is_file() && !is_link && self.patterns.is_open(&path)) {
                self.found.left_alone.push((path, LeftAlone::NotAFile));
            }
        }
        Ok(())
    }

    /// A folder that cannot be read must not hide its siblings. The next listing tries it again.
    fn collect_below(&mut self, folder: &Path, depth: usize) {
        let is_system =
            || SYSTEM_FOLDERS.iter().any(|name| folder.file_name() == Some(OsStr::new(name)));
        let listed = if hidden(folder) {
            if is_system() { Ok(()) } else { self.count_below(folder, LeftAlone::Hidden) }
        } else if depth == 0 {
            self.count_below(folder, LeftAlone::TooDeep)
        } else {
            self.collect(folder, depth - 1)
        };

        // Another process may have removed the folder meanwhile.
        if listed.is_err_and(|error| error.kind() != io::ErrorKind::NotFound) {
            self.found.left_alone.push((folder.to_owned(), LeftAlone::Unreadable));
        }
    }

    /// Counts the files in a folder that is not searched, and in its subfolders. Only the folder
    /// itself counts if there are too many.
    fn count_below(&mut self, folder: &Path, reason: LeftAlone) -> io::Result<()> {
        if self.links == Links::ToFiles {
            // A person named the folder, and no daemon reports what is left alone.
            return Ok(());
        }

        let n_before = self.found.left_alone.len();
        let mut folders = vec![folder.to_owned()];
        while let Some(inner) = folders.pop() {
            for entry in fs::read_dir(inner)? {
                (self.alive)();
                let entry = entry?;
                if self.n_left == 0 {
                    self.found.left_alone.truncate(n_before);
                    self.found.left_alone.push((folder.to_owned(), reason));
                    return Ok(());
                }
                self.n_left -= 1;

                let path = entry.path();
                let is_wanted = self.patterns.is_scan(&path) || self.patterns.is_open(&path);
                if entry.file_type()?.is_dir() {
                    folders.push(path);
                } else if is_wanted && !describes_a_scan(&path) {
                    self.found.left_alone.push((path, reason));
                }
            }
        }
        Ok(())
    }
}

/// All DICOM files and zip files below `folder`, sorted by path. Where the name does not tell,
/// `has_mark` decides whether a file is DICOM; see [`has_dicom_mark`].
pub fn list_dicom(
    folder: &Path,
    patterns: &Patterns,
    mut has_mark: impl FnMut(&Candidate) -> bool,
    mut alive: impl FnMut(),
) -> io::Result<Vec<Candidate>> {
    let mut found = Vec::new();
    collect_dicom(folder, patterns, MAX_DEPTH, &mut found, &mut has_mark, &mut alive)?;
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn collect_dicom(
    folder: &Path,
    patterns: &Patterns,
    depth: usize,
    found: &mut Vec<Candidate>,
    has_mark: &mut dyn FnMut(&Candidate) -> bool,
    alive: &mut dyn FnMut(),
) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        alive();
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_dir() {
            if depth > 0 && !hidden(&path) && !patterns.is_scan(&path) {
                collect_dicom(&path, patterns, depth - 1, found, has_mark, alive).ok();
            }
            continue;
        }

        if !kind.is_file() || !patterns.is_open(&path) {
            continue;
        }

        let Ok(look) = look_at(&path) else { continue };
        let candidate = Candidate { path, look };
        let is_named = is_zip(&candidate.path) || has_ending(&candidate.path, &["dcm", "ima"]);
        if is_named || has_mark(&candidate) {
            found.push(candidate);
        }
    }
    Ok(())
}

/// Whether a file is a zip by its name.
pub fn is_zip(path: &Path) -> bool {
    has_ending(path, &["zip"])
}

/// Whether a file's name has one of these endings. Upper and lower case count as equal.
pub fn has_ending(path: &Path, endings: &[&str]) -> bool {
    let ending = path.extension().unwrap_or_default();
    endings.iter().any(|wanted| ending.eq_ignore_ascii_case(wanted))
}

/// Whether a file describes scans beside it by its ending: JSON, and the directions of diffusion.
/// Such a file never becomes a scan itself.
pub fn describes_a_scan(path: &Path) -> bool {
    has_ending(path, &["json", "bval", "bvec"])
}

/// Whether a file begins like DICOM: with the mark (PS3.10, 7.1) or as a bare data set. Many
/// scanners write files without an ending.
pub fn has_dicom_mark(path: &Path) -> bool {
    let mut start = Vec::with_capacity(START_BYTES);
    let read =
        open_regular(path).and_then(|file| file.take(START_BYTES as u64).read_to_end(&mut start));
    read.is_ok() && begins_like_dicom(&start)
}

fn hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// Size and times of the files that are read with a scan: its brain mask and its JSON.
pub type CompanionStamps = [Option<FileStamp>; 2];

type Looks = (FileStamp, CompanionStamps);

/// A file that intake watches until it has not changed for long enough.
#[derive(Debug, Clone, Copy)]
struct Watched {
    looks: Looks,
    first_seen: Instant,
    still_since: Instant,
    is_whole: bool,
}

/// Remembers size and times of files from one listing to the next, until the files are whole.
#[derive(Debug, Default)]
pub struct Settling {
    watched: HashMap<PathBuf, Watched>,
}

/// The result of [`Settling::look`] for one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// The file has changed too recently.
    Waiting,
    /// The file is whole. The time counts from when it was first seen.
    Whole(Duration),
}

impl Settling {
    /// Compares a file and the files beside it with the listing before. The scan is whole when none
    /// of them has appeared, gone or changed for `settle`. Unless `settle` is zero, this needs at
    /// least two listings.
    pub fn look(
        &mut self,
        candidate: &Candidate,
        beside: CompanionStamps,
        now: Instant,
        settle: Duration,
    ) -> Settled {
        let looks = (candidate.look, beside);
        let watched = self.watched.entry(candidate.path.clone()).or_insert(Watched {
            looks,
            first_seen: now,
            still_since: now,
            is_whole: false,
        });
        if watched.looks != looks {
            *watched = Watched { looks, still_since: now, ..*watched };
        }

        watched.is_whole = now.duration_since(watched.still_since) >= settle;
        if watched.is_whole {
            Settled::Whole(now.duration_since(watched.first_seen))
        } else {
            Settled::Waiting
        }
    }

    /// Whether a file was in an earlier listing and still waits.
    pub fn knows(&self, path: &Path) -> bool {
        self.watched.contains_key(path)
    }

    /// How long a file has not changed. `None` for a file that is not watched.
    pub fn still_for(&self, path: &Path, now: Instant) -> Option<Duration> {
        self.watched.get(path).map(|watched| now.duration_since(watched.still_since))
    }

    /// How many files wait, and for how long the oldest of them has been known. With `are_whole`,
    /// whole files that wait to be read count; without it, files that are not whole yet.
    pub fn waiting(&self, are_whole: bool, now: Instant) -> (usize, Option<Duration>) {
        let watched = self.watched.values().filter(|watched| watched.is_whole == are_whole);
        let ages = watched.map(|watched| now.duration_since(watched.first_seen));
        (ages.clone().count(), ages.max())
    }

    /// Forgets a file that intake has finished with.
    pub fn forget(&mut self, path: &Path) {
        self.watched.remove(path);
    }

    /// Forgets the files for which `is_there` does not hold.
    pub fn keep_only(&mut self, is_there: impl Fn(&Path) -> bool) {
        self.watched.retain(|path, _| is_there(path));
    }

    /// Number of files that wait, whole or not.
    pub fn n_waiting(&self) -> usize {
        self.watched.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns() -> Patterns {
        let own = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        Patterns::new(
            &own(&["*.nii", "*.nii.gz"]),
            &own(&[".*", "*.partial", "*_brain.nii.gz", "*_anomaly-*"]),
        )
        .unwrap()
    }

    #[test]
    fn scans_are_found_in_subfolders_and_links_only_where_they_are_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("sub-1/anat")).unwrap();
        let ours = ["b_anomaly-brain.nii.gz", "b_anomaly-alignment.tfm"];
        for name in ["sub-1/anat/a_T1w.nii.gz", "b.nii", "c_brain.nii.gz", ".d.nii", "e.txt"]
            .into_iter()
            .chain(ours)
        {
            fs::write(root.join(name), "x").unwrap();
        }
        fs::create_dir(root.join("folder.nii")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", root.join("link.nii")).unwrap();
        std::os::unix::fs::symlink("nowhere", root.join("sub-1/gone.nii")).unwrap();
        std::os::unix::fs::symlink(root.join("sub-1"), root.join("again")).unwrap();
        std::os::unix::fs::symlink(root.join("sub-1"), root.join("again.nii")).unwrap();
        let names = |links| -> Vec<PathBuf> {
            let found = list(root, &patterns(), links, || {}).unwrap();
            found.scans.iter().map(|c| c.path.strip_prefix(root).unwrap().to_owned()).collect()
        };
        let mut left_alone = list(root, &patterns(), Links::PassedOver, || {}).unwrap().left_alone;
        left_alone.sort();
        let links = ["again", "again.nii", "link.nii", "sub-1/gone.nii"];
        let links = links.map(|name| (root.join(name), LeftAlone::NotAFile));
        assert_eq!(left_alone, links);
        let files = ["b.nii", "folder.nii", "sub-1/anat/a_T1w.nii.gz"].map(PathBuf::from);
        assert_eq!(names(Links::PassedOver), files);
        let mut all = [&files[..], &["link.nii", "sub-1/gone.nii"].map(PathBuf::from)].concat();
        all.sort();
        assert_eq!(names(Links::ToFiles), all);
    }

    #[test]
    fn an_ending_in_any_case_is_a_scan_or_a_mask_as_it_is_in_lower_case() {
        for (name, is_scan) in [
            ("a_T1w.NII.GZ", true),
            ("a.Nii", true),
            ("T1_BRAIN.nii.gz", true),
            ("a_brain.NII.GZ", false),
            ("a_brain.nii.Gz", false),
            ("a.NII.GZ.partial", false),
            ("a.gz", false),
        ] {
            assert_eq!(patterns().is_scan(Path::new(name)), is_scan, "{name}");
        }
    }

    #[test]
    fn files_in_folders_that_are_not_searched_are_counted_and_ignored_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let deep = (0..MAX_DEPTH).fold(folder.path().to_owned(), |path, _| path.join("d"));
        for path in [".h/a.nii", ".h/in/b.dcm", ".h/.DS_Store", ".h/a.json", ".git/c.nii"] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        fs::create_dir_all(deep.join("e/f")).unwrap();
        fs::write(deep.join("d.nii"), "x").unwrap();
        fs::write(deep.join("e/f/e.nii"), "x").unwrap();
        let found = list(folder.path(), &patterns(), Links::PassedOver, || {}).unwrap();
        assert_eq!(found.scans.len(), 1, "the last level that is searched");
        let mut left_alone = found.left_alone;
        left_alone.sort();
        let hidden = |name| (folder.path().join(name), LeftAlone::Hidden);
        let too_deep = (deep.join("e/f/e.nii"), LeftAlone::TooDeep);
        assert_eq!(left_alone, [hidden(".h/a.nii"), hidden(".h/in/b.dcm"), too_deep]);

        let named = list(folder.path(), &patterns(), Links::ToFiles, || {}).unwrap();
        assert!(named.left_alone.is_empty());
    }

    #[test]
    fn a_huge_folder_that_is_not_searched_counts_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let hidden = folder.path().join(".h");
        fs::create_dir(&hidden).unwrap();
        (0..3).for_each(|name| fs::write(hidden.join(format!("{name}.nii")), "x").unwrap());
        let count = |n_left| {
            let (patterns, links) = (&patterns(), Links::PassedOver);
            let found = Listing::default();
            let mut listed = Listed { patterns, links, found, n_left, alive: &mut || {} };
            listed.collect(folder.path(), MAX_DEPTH).unwrap();
            listed.found.left_alone
        };
        assert_eq!(count(3).len(), 3);
        assert_eq!(count(2), [(hidden.clone(), LeftAlone::Hidden)]);
    }

    #[test]
    fn dicom_files_are_found_by_name_or_mark() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let marked = [&[0; 128][..], b"DICM"].concat();
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::create_dir_all(root.join(".hidden")).unwrap();
        for name in ["a/x.dcm", "a/2.IMA", "b.zip", "a/b/y.dcm", ".hidden/z.dcm", "c.nii", "t.txt"]
        {
            fs::write(root.join(name), "x").unwrap();
        }
        for name in ["a/IM001", "a/line\nbreak", "a/.dot", "a/x.partial", "d.nii"] {
            fs::write(root.join(name), &marked).unwrap();
        }
        let bare = b"\x08\0\x16\0UI\x04\x001.2\0\x08\0\x18\0UI\x04\x001.3\0";
        fs::write(root.join("a/bare"), bare).unwrap();
        std::os::unix::fs::symlink(root.join("a/x.dcm"), root.join("a/link.dcm")).unwrap();
        std::os::unix::fs::symlink(root.join("a"), root.join("link")).unwrap();
        let found =
            list_dicom(root, &patterns(), |file| has_dicom_mark(&file.path), || {}).unwrap();
        let names: Vec<&Path> =
            found.iter().map(|file| file.path.strip_prefix(root).unwrap()).collect();
        let wanted =
            ["a/2.IMA", "a/IM001", "a/b/y.dcm", "a/bare", "a/line\nbreak", "a/x.dcm", "b.zip"];
        assert_eq!(names, wanted.map(Path::new));
    }

    #[test]
    fn a_growing_file_is_whole_only_once_it_and_what_lies_beside_it_are_still() {
        let mut settling = Settling::default();
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let look = |size| FileStamp { size, modified_ns: 0, changed_ns: 0 };
        let file = |size| Candidate { path: "a.nii".into(), look: look(size) };
        let settle = Duration::from_secs(10);
        const NONE: CompanionStamps = [None; 2];
        assert_eq!(settling.look(&file(1), NONE, at(0), settle), Settled::Waiting);
        assert_eq!(settling.look(&file(2), NONE, at(9), settle), Settled::Waiting);
        assert_eq!(settling.look(&file(2), NONE, at(18), settle), Settled::Waiting);
        let mask = [Some(look(5)), None];
        assert_eq!(settling.look(&file(2), mask, at(20), settle), Settled::Waiting);
        let both = [Some(look(5)), Some(look(6))];
        assert_eq!(settling.look(&file(2), both, at(29), settle), Settled::Waiting);
        let whole = settling.look(&file(2), both, at(39), settle);
        assert_eq!(whole, Settled::Whole(Duration::from_secs(39)));
        assert_eq!(settling.still_for(Path::new("a.nii"), at(40)), Some(Duration::from_secs(11)));
        assert_eq!(settling.waiting(true, at(40)), (1, Some(Duration::from_secs(40))));
        assert_eq!(settling.waiting(false, at(40)), (0, None));
        settling.keep_only(|_| false);
        assert_eq!(settling.n_waiting(), 0);
    }

    #[test]
    fn a_file_from_the_far_future_can_be_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "x").unwrap();
        let mut looks = Vec::new();
        // Years 2286 and 2318. A file system without such times stores its last time.
        for secs in [0, 10_000_000_000, 11_000_000_000] {
            let time = std::time::UNIX_EPOCH + Duration::from_secs(secs);
            fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
            looks.push(look_at(&path).unwrap());
        }
        assert!(looks[0] != looks[1] && looks[1] != looks[2], "{looks:?}");
    }
}
