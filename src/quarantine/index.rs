//! What is in the quarantine, kept in memory: a quarantine may have many entries, and somebody may
//! take some out at any time.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs, io,
    ops::Bound,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{
    entries::{folders_in, refused_file, remove_reason},
    reason::{Content, ReasonFile, is_hidden, look},
    requeue::settle,
};

/// The names of all entries. A folder is listed again only when it has changed.
#[derive(Debug, Default)]
pub struct Index {
    root: Option<Stamp>,
    reasons: BTreeMap<OsString, Listed>,
    /// The entry that was looked at last.
    last: (OsString, OsString),
}

/// The entries with one reason.
#[derive(Debug, Default)]
struct Listed {
    stamp: Option<Stamp>,
    names: BTreeSet<OsString>,
    has_hidden: bool,
}

/// What changes in a folder when a folder is added to it or removed from it. Two changes may have
/// one time; then the number of links differs, except on file systems that do not count them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified_ns: i64,
    n_links: u64,
}

impl Stamp {
    fn of(folder: &Path) -> io::Result<Self> {
        let about = fs::symlink_metadata(folder)?;
        Ok(Self { modified_ns: look(&about).modified_ns, n_links: about.nlink() })
    }

    /// Whether nothing but the addition of one folder shows.
    fn is_after_one_more(self, before: Self) -> bool {
        let uncounted = 1;
        self.n_links == before.n_links + 1 || self.n_links == uncounted
    }
}

impl Listed {
    fn list(folder: &Path) -> io::Result<Self> {
        // Before the listing, so that a change during it shows next time.
        let stamp = Some(Stamp::of(folder)?);
        let mut names: BTreeSet<OsString> = folders_in(folder)?.into_iter().collect();
        let n_all = names.len();
        names.retain(|name| !is_hidden(name));
        let has_hidden = names.len() < n_all;
        Ok(Self { stamp, names, has_hidden })
    }
}

impl Index {
    /// Number of entries: of refused files and series.
    pub fn n_entries(&self) -> usize {
        self.reasons.values().map(|listed| listed.names.len()).sum()
    }

    /// Whether there were entries, at the last look, that [`finish`](super::finish) has to finish.
    pub fn has_unfinished(&self) -> bool {
        self.reasons.values().any(|listed| listed.has_hidden)
    }

    /// Looks for what others have added or removed.
    ///
    /// # Errors
    /// If the quarantine cannot be read.
    pub fn refresh(&mut self, quarantine: &Path) -> io::Result<()> {
        let root = Stamp::of(quarantine)?;
        if self.root != Some(root) {
            let reasons = folders_in(quarantine)?;
            self.reasons.retain(|reason, _| reasons.contains(reason));
            for reason in reasons {
                self.reasons.entry(reason).or_default();
            }
            self.root = Some(root);
        }
        for (reason, listed) in &mut self.reasons {
            let folder = quarantine.join(reason);
            if listed.stamp != Some(Stamp::of(&folder)?) {
                *listed = Listed::list(&folder)?;
            }
        }
        Ok(())
    }

    /// Notes an entry that oddscan itself has just made, so that its folder need not be listed.
    ///
    /// # Errors
    /// If the quarantine cannot be read.
    pub fn added(&mut self, quarantine: &Path, entry: &Path) -> io::Result<()> {
        let parts = entry.strip_prefix(quarantine).ok().and_then(|name| {
            Some((name.parent()?.as_os_str().to_owned(), name.file_name()?.to_owned()))
        });
        if let Some((reason, name)) = parts
            && let Some(listed) = self.reasons.get_mut(&reason)
            && let Some(before) = listed.stamp
            && !is_hidden(&name)
        {
            let now = Stamp::of(&quarantine.join(reason))?;
            if now.is_after_one_more(before) && listed.names.insert(name) {
                listed.stamp = Some(now);
                return Ok(());
            }
        }
        self.refresh(quarantine)
    }

    /// Looks at the next `max` entries, because a quarantine may have many, and returns the names
    /// of those whose files have changed since they were refused: a sender may still have its file
    /// open, and go on writing after a pause.
    ///
    /// A file that was refused in the incoming folder is read again there when it changes. Its old
    /// reason is removed.
    ///
    /// # Errors
    /// If the quarantine cannot be read.
    pub fn changed(
        &mut self,
        quarantine: &Path,
        incoming: &Path,
        max: usize,
    ) -> io::Result<Vec<PathBuf>> {
        self.refresh(quarantine)?;
        let next: Vec<(OsString, OsString)> = self.next().take(max).collect();
        if let Some(last) = next.last() {
            self.last.clone_from(last);
        }

        let mut names: Vec<PathBuf> =
            next.iter().map(|(reason, name)| Path::new(reason).join(name)).collect();
        for folder in names.iter().map(|name| quarantine.join(name)) {
            // The next round tries again.
            settle(&folder, incoming).ok();
            if is_outdated(&folder, incoming) {
                remove_reason(&folder).ok();
            }
        }
        names.retain(|name| has_changed(&quarantine.join(name)));
        Ok(names)
    }

    /// All entries once, beginning after the last one.
    fn next(&self) -> impl Iterator<Item = (OsString, OsString)> {
        let (reason, name) = &self.last;
        let after = self.names(reason, (Bound::Excluded(name), Bound::Unbounded));
        let up_to = self.names(reason, (Bound::Unbounded, Bound::Included(name)));

        let all = |(reason, _)| self.names(reason, (Bound::Unbounded, Bound::Unbounded));
        let later = self.reasons.range::<OsString, _>((Bound::Excluded(reason), Bound::Unbounded));
        let earlier = self.reasons.range::<OsString, _>(..reason);
        after.chain(later.flat_map(all)).chain(earlier.flat_map(all)).chain(up_to)
    }

    /// Some of the entries with one reason.
    fn names<'i>(
        &'i self,
        reason: &'i OsString,
        names: (Bound<&'i OsString>, Bound<&'i OsString>),
    ) -> impl Iterator<Item = (OsString, OsString)> + 'i {
        let listed = self.reasons.get(reason).into_iter();
        let names = listed.flat_map(move |listed| listed.names.range::<OsString, _>(names));
        names.map(|name| (reason.clone(), name.clone()))
    }
}

/// Whether an entry is about a file of the incoming folder that has changed. A file that is gone
/// may be on a share that is away.
fn is_outdated(folder: &Path, incoming: &Path) -> bool {
    let Some(ReasonFile { moved: false, content: Some(content), came_from, .. }) =
        ReasonFile::read(folder)
    else {
        return false;
    };
    let now = fs::symlink_metadata(incoming.join(came_from));
    let now = now.ok().and_then(|about| Content::of([look(&about)]));
    // The names of a series are not known.
    content.n_files == 1 && now.is_some_and(|now| now != content)
}

/// Whether the file of an entry has changed. What somebody put beside it makes this unknown.
fn has_changed(folder: &Path) -> bool {
    let Some(ReasonFile { moved: true, content: Some(content), .. }) = ReasonFile::read(folder)
    else {
        return false;
    };
    let Ok(file) = refused_file(folder) else { return false };
    Content::at(&folder.join(file)).is_some_and(|now| now != content)
}
