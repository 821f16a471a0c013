//! An entry that is not whole yet: a folder with a hidden name.

use std::{
    collections::hash_map::RandomState,
    ffi::{OsStr, OsString},
    hash::{BuildHasher, Hasher},
    io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use tracing::warn;

use super::reason::{PICTURE, ReasonFile, is_hidden, partial, write_whole};
use crate::{
    domain::error::Refusal,
    files::{MARK, make_folders, remove_if_there, steps, sync_folder},
};

/// Longest name of a file, bytes (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// So many entries of one name are numbered from 2 on. The next ones have random numbers, because
/// a thousand files may have one name.
const MAX_NUMBERED: u64 = 20;

pub struct Draft {
    /// `<quarantine>/<reason>/.oddscan-tmp-<n>`.
    pub folder: PathBuf,
}

impl Draft {
    /// Makes a hidden folder for an entry.
    pub fn new(quarantine: &Path, refusal: &Refusal) -> io::Result<Self> {
        let parent = quarantine.join(refusal.reason.name());
        make_folders(&parent)?;
        for count in 0_u64.. {
            let folder = parent.join(format!("{MARK}{count}"));
            match steps::make_folder(&folder) {
                Ok(()) => return Ok(Self { folder }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Writes the picture of a refusal. If that fails, the refusal is kept without it.
    pub fn add_picture(&self, refusal: &Refusal) {
        let Some(picture) = &refusal.picture else { return };
        if let Err(error) = write_whole(&self.folder, PICTURE, &picture.0) {
            warn!(error = %error.kind(), "the picture of a refusal cannot be written");
            remove_if_there(&self.folder.join(partial(PICTURE))).ok();
        }
    }

    /// Gives the entry its visible name: `name`, or the next one that is free. Returns the folder.
    ///
    /// A reason that is there already, after a kill before intake remembered it, is not repeated.
    pub fn publish(&self, name: &OsStr, reason: Option<&ReasonFile>) -> io::Result<PathBuf> {
        let parent = self.parent();
        for name in names_for(name) {
            let visible = parent.join(name);
            match steps::rename_new(&self.folder, &visible) {
                Ok(()) => {
                    // An entry with files is found under its hidden name, too.
                    let has_files = reason.is_none_or(|reason| reason.moved);
                    let synced = if has_files { Ok(()) } else { sync_folder(parent) };
                    return synced.map(|()| visible);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
            let there = ReasonFile::read(&visible);
            if reason.zip(there).is_some_and(|(reason, there)| reason.repeats(&there)) {
                self.remove()?;
                return Ok(visible);
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Removes the folder. No scan may be in it that is nowhere else.
    pub fn remove(&self) -> io::Result<()> {
        steps::remove_tree(&self.folder)
    }

    fn parent(&self) -> &Path {
        self.folder.parent().expect("it was made by joining")
    }
}

/// The names that an entry may have, in the order in which they are tried.
fn names_for(name: &OsStr) -> impl Iterator<Item = OsString> {
    // A visible name, and room for a number.
    let plain = if is_hidden(name) { OsStr::from_bytes(&name.as_bytes()[1..]) } else { name };
    let numbered = |number: u64| {
        let ending = format!(".{number}");
        let mut bytes = cut(plain.as_bytes(), MAX_NAME - ending.len()).to_vec();
        bytes.extend(ending.as_bytes());
        OsString::from_vec(bytes)
    };
    let random = || RandomState::new().build_hasher().finish();
    let first = OsString::from_vec(cut(plain.as_bytes(), MAX_NAME).to_vec());
    let more = (2..=MAX_NUMBERED).chain(std::iter::repeat_with(random).take(9));
    std::iter::once(first).chain(more.map(numbered))
}

/// At most so many bytes from the start, without a part of a UTF-8 character at the end.
fn cut(name: &[u8], max: usize) -> &[u8] {
    let is_inner = |byte: &u8| byte & 0xC0 == 0x80;
    let end = (1..=max.min(name.len())).rev().find(|&end| !name.get(end).is_some_and(is_inner));
    &name[..end.unwrap_or(max.min(name.len()))]
}
