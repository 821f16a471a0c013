//! Where the store lies, and the names that it uses beside its folder.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

/// The store's folder, and the names that the store uses beside it.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// The folder itself.
    pub(super) folder: PathBuf,
}

impl Place {
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn beside(&self, ending: &str) -> PathBuf {
        let mut name = OsString::from(self.folder.as_os_str());
        name.push(ending);
        name.into()
    }

    /// A copy that is being made.
    pub(super) fn next(&self) -> PathBuf {
        self.beside(".next")
    }

    /// The store that a copy has replaced.
    pub(super) fn old(&self) -> PathBuf {
        self.beside(".old")
    }

    /// The mark of a store that failed while it was in use.
    pub(super) fn damaged(&self) -> PathBuf {
        self.beside(".damaged")
    }

    /// Number of attempts to open the store that have not ended.
    pub(super) fn tries(&self) -> PathBuf {
        self.beside(".tries")
    }

    /// The folder that holds the store.
    pub(super) fn parent(&self) -> &Path {
        self.folder.parent().unwrap_or(Path::new("/"))
    }
}
