//! `[directories]`: the folder of incoming scans, and the folders for everything else.

use std::path::PathBuf;

use super::check::Checker;

/// `[directories]` after its check. All paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directories {
    /// Folder that intake watches for scans.
    pub incoming: PathBuf,
    /// Folder for the results.
    pub results: PathBuf,
    /// Folder for refused files.
    pub quarantine: PathBuf,
    /// Folder for the store and the archived sources.
    pub state: PathBuf,
}

pub(super) fn read(check: &mut Checker) -> Directories {
    let directories = Directories {
        incoming: check.path("directories.incoming"),
        results: check.path("directories.results"),
        quarantine: check.path("directories.quarantine"),
        state: check.path("directories.state"),
    };

    let Directories { incoming, results, quarantine, state } = &directories;
    let written = [
        ("directories.results", results),
        ("directories.quarantine", quarantine),
        ("directories.state", state),
    ];
    for (key, folder) in written {
        if folder.starts_with(incoming) {
            let needed = "a folder outside directories.incoming is needed; otherwise oddscan \
                          would read its own files as scans";
            check.fault(key, format!("{folder:?}"), needed);
        }
    }
    for (key, folder) in [("directories.incoming", incoming)].into_iter().chain(written) {
        if !folder.is_absolute() {
            check.fault(key, format!("{folder:?}"), "an absolute path is needed");
        }
    }

    directories
}

#[cfg(test)]
mod tests {
    use crate::config::check::faults;

    #[test]
    fn results_inside_the_incoming_folder_are_refused() {
        let found = faults("[directories]\nincoming = \"/data\"\nresults = \"/data/results\"");
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("outside directories.incoming"), "{found:?}");
    }
}
