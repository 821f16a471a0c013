//! Writes and removes results so that at any instant, and after a kill at any step, the files that
//! a sidecar names have the sizes and hashes that it states.
//!
//! The first result of a stem gets its files first and its sidecar last. A newer result replaces it
//! in five steps:
//!
//! 1. The new files get hidden names.
//! 2. A new sidecar names them. From here the new result counts.
//! 3. Each file gets the name that users look for as its second name.
//! 4. The sidecar is written again, with these names.
//! 5. Files that the result no longer has are removed, and the hidden names.
//!
//! A step is durable before the next one begins. [`tidy_results`] finishes what a kill interrupted.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{
    place::{N_FILES, Place, SUFFIXES, key, key_of, stem_of},
    set::ResultSet,
    sidecar::{FileFacts, Files, Sidecar},
};
use crate::{
    domain::scan::ScanId,
    files::{
        give_second_name, remove_if_there, remove_leftovers, replace, sha256_of, steps,
        write_atomic,
    },
};

/// Writes a result as `<folder>/<stem>_anomaly...` and replaces an older one.
///
/// Its revision is larger than that of an older result of the same scan.
pub fn write_results(folder: &Path, stem: &str, results: &ResultSet) -> io::Result<()> {
    let place = Place::new(folder, stem);
    let before = settled(&place)?;
    let written = write_set(&place, before.as_ref(), results);
    if written.is_err() || before.is_some_and(|before| before.is_damaged) {
        // If this fails, the next start does it.
        remove_unnamed(&place).ok();
    }
    written
}

/// Writes only a sidecar, for a scan whose window holds too few patients.
pub fn write_sidecar(folder: &Path, stem: &str, sidecar: &Sidecar) -> io::Result<()> {
    let place = Place::new(folder, stem);
    let before = Present::read(&place)?;
    put_sidecar(&place, before.as_ref(), sidecar)?;
    if before.is_some_and(|before| !before.hidden(&place).is_empty()) {
        remove_unnamed(&place)?;
    }
    Ok(())
}

/// Removes the results that a scan has under another stem, once they lie under their new one. Files
/// of another scan stay.
///
/// The sidecar loses its name first, so that nobody follows it any more. Under a hidden name it
/// says, after a kill, that the other files must go.
pub fn remove_results(folder: &Path, stem: &str, scan: ScanId) -> io::Result<()> {
    let place = Place::new(folder, stem);
    match Present::read(&place)? {
        Some(there) if there.scan_id == scan => {
            steps::rename(&place.sidecar(), &place.removed_sidecar())?;
            steps::sync_folder(folder)?;
        }
        None if place.removed_sidecar().exists() => {}
        _ => return Ok(()),
    }
    remove_set(&place)
}

/// Finishes what a kill interrupted in a folder of results, and removes half-written files.
///
/// It lists the folder once, and once more if there is something to finish.
///
/// # Errors
/// The first error. What follows it is tidied all the same.
pub fn tidy_results(folder: &Path) -> io::Result<()> {
    let mut hidden: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let mut done = remove_leftovers(folder, |name| {
        if let Some(key) = name.to_str().and_then(key_of) {
            hidden.entry(key.to_owned()).or_default().push(folder.join(name));
        }
    });
    if hidden.is_empty() {
        return done;
    }

    let mut note = |outcome: io::Result<()>| {
        if done.is_ok() {
            done = outcome;
        }
    };
    for stem in stems_with(folder, &hidden)? {
        note(tidy_result(&Place::new(folder, &stem)));
        hidden.remove(&key(&stem));
    }
    // Nothing names what is left.
    for path in hidden.values().flatten() {
        note(remove_if_there(path));
    }
    done
}

/// The stems of a folder whose keys are among these.
fn stems_with<T>(folder: &Path, keys: &BTreeMap<String, T>) -> io::Result<BTreeSet<String>> {
    let stem = |name: &OsStr| {
        let stem = stem_of(name.to_str()?)?;
        keys.contains_key(&key(stem)).then(|| stem.to_owned())
    };
    let names = fs::read_dir(folder)?.map(|entry| Ok(stem(&entry?.file_name())));
    names.filter_map(io::Result::transpose).collect()
}

fn tidy_result(place: &Place<'_>) -> io::Result<()> {
    match Present::read(place)? {
        None if place.removed_sidecar().exists() => remove_set(place),
        _ => {
            finish(place)?;
            remove_if_there(&place.removed_sidecar())?;
            remove_unnamed(place)
        }
    }
}

/// What the sidecar of a place says, as far as others need it.
#[derive(Deserialize)]
struct Present {
    scan_id: ScanId,
    #[serde(default)]
    revision: u64,
    #[serde(default)]
    files: Option<Files>,
    #[serde(skip)]
    text: String,
    /// It names a file that is missing.
    #[serde(skip)]
    is_damaged: bool,
}

impl Present {
    /// `None` if there is no sidecar, or oddscan did not write it.
    fn read(place: &Place<'_>) -> io::Result<Option<Self>> {
        let text = match fs::read_to_string(place.sidecar()) {
            Ok(text) => text,
            Err(error)
                if [io::ErrorKind::NotFound, io::ErrorKind::InvalidData]
                    .contains(&error.kind()) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let found = serde_json::from_str(&text).ok();
        Ok(found.map(|found| Self { text, ..found }))
    }

    /// The files, in the order of [`SUFFIXES`].
    fn files(&self) -> [Option<&FileFacts>; N_FILES] {
        self.files.as_ref().map_or([None; N_FILES], Files::as_array)
    }

    /// The suffixes of files that have no other name than their hidden one.
    fn hidden(&self, place: &Place<'_>) -> Vec<&'static str> {
        let named = SUFFIXES.into_iter().zip(self.files());
        let is_hidden = |(suffix, file): &(&str, Option<&FileFacts>)| {
            file.is_some_and(|file| file.name == place.hidden_name(suffix))
        };
        named.filter(is_hidden).map(|(suffix, _)| suffix).collect()
    }
}

/// What lies at a place, after an interrupted replacement there is finished.
fn settled(place: &Place<'_>) -> io::Result<Option<Present>> {
    let Some(found) = Present::read(place)? else { return Ok(None) };
    if found.hidden(place).is_empty() {
        return Ok(Some(found));
    }
    match finish(place) {
        Ok(()) => Present::read(place),
        // Somebody has removed a file. Whatever the sidecar names does not fit together any more.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok(Some(Present { files: None, is_damaged: true, ..found }))
        }
        Err(error) => Err(error),
    }
}

fn write_set(place: &Place<'_>, before: Option<&Present>, results: &ResultSet) -> io::Result<()> {
    let mut files = [const { None }; N_FILES];
    for (index, bytes) in results.contents().into_iter().enumerate() {
        let write = |bytes| write_file(place, SUFFIXES[index], bytes, before);
        files[index] = bytes.map(write).transpose()?;
    }
    steps::sync_folder(place.folder)?;

    let files = Files::from_array(files);
    put_sidecar(place, before, &Sidecar { files, ..results.sidecar.clone() })?;
    finish(place)
}

/// Writes one file and makes its content durable. A file of the older result that is equal stays.
fn write_file(
    place: &Place<'_>,
    suffix: &str,
    bytes: &[u8],
    before: Option<&Present>,
) -> io::Result<FileFacts> {
    let sha256 = Sha256::digest(bytes);
    let facts = FileFacts {
        name: place.name(suffix),
        n_bytes: bytes.len() as u64,
        sha256: hex::encode(sha256),
    };
    let path = place.path(suffix);
    let is_equal = || sha256_of(&path).is_ok_and(|found| found.as_slice() == sha256.as_slice());
    if before.is_some_and(|before| before.files().contains(&Some(&facts))) && is_equal() {
        return Ok(facts);
    }

    if before.is_some_and(|before| before.files.is_some()) {
        replace(&place.hidden_path(suffix), bytes)?;
        return Ok(FileFacts { name: place.hidden_name(suffix), ..facts });
    }
    replace(&path, bytes)?;
    Ok(facts)
}

/// Writes a sidecar. Its revision is larger than that of the same scan's sidecar before.
fn put_sidecar(place: &Place<'_>, before: Option<&Present>, sidecar: &Sidecar) -> io::Result<()> {
    let before = before.filter(|before| before.scan_id == sidecar.scan_id);
    let least = before.map_or(0, |before| before.revision.saturating_add(1));
    let sidecar = Sidecar { revision: sidecar.revision.max(least), ..sidecar.clone() };
    let text = serde_json::to_string_pretty(&sidecar).map_err(io::Error::other)? + "\n";
    write_atomic(&place.sidecar(), text.as_bytes())
}

/// Gives the files of a sidecar the names that users look for, and removes others. The hidden names
/// go last, because the start looks for them alone.
fn finish(place: &Place<'_>) -> io::Result<()> {
    let Some(there) = Present::read(place)? else { return Ok(()) };
    let hidden = there.hidden(place);
    if !hidden.is_empty() {
        for suffix in &hidden {
            give_second_name(&place.hidden_path(suffix), &place.path(suffix))?;
        }
        steps::sync_folder(place.folder)?;
        write_atomic(&place.sidecar(), renamed(&there.text, place, &hidden)?.as_bytes())?;
    }

    if there.files.is_some() {
        let absent = SUFFIXES.iter().zip(there.files()).filter(|(_, file)| file.is_none());
        for (suffix, _) in absent {
            remove_if_there(&place.path(suffix))?;
        }
    }
    hidden.iter().try_for_each(|suffix| remove_if_there(&place.hidden_path(suffix)))
}

/// A sidecar's text with the names that users look for. The rest of the text stays as it is, also
/// if another version has written it.
fn renamed(text: &str, place: &Place<'_>, hidden: &[&str]) -> io::Result<String> {
    let mut text = text.to_owned();
    for suffix in hidden {
        let from = serde_json::to_string(&place.hidden_name(suffix))?;
        text = text.replace(&from, &serde_json::to_string(&place.name(suffix))?);
    }
    Ok(text)
}

/// Removes the hidden files of a place that its sidecar does not name.
fn remove_unnamed(place: &Place<'_>) -> io::Result<()> {
    let named = Present::read(place)?.map_or(Vec::new(), |there| there.hidden(place));
    let unnamed = SUFFIXES.iter().filter(|suffix| !named.contains(suffix));
    unnamed.map(|suffix| place.hidden_path(suffix)).try_for_each(|path| remove_if_there(&path))
}

/// Removes all files of a result whose sidecar has lost its name.
fn remove_set(place: &Place<'_>) -> io::Result<()> {
    for suffix in SUFFIXES {
        remove_if_there(&place.path(suffix))?;
        remove_if_there(&place.hidden_path(suffix))?;
    }
    // The removals are durable first: without this file nobody would continue them.
    steps::sync_folder(place.folder)?;
    remove_if_there(&place.removed_sidecar())
}

#[cfg(test)]
mod tests;
