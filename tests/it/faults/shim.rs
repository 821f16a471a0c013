//! The library that stands between the daemon and libc (`shim.c`), for steps that do not go through
//! oddscan's own: those of the store.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use tempfile::TempDir;

use super::{kills::Way, story::Variables, story::variable};
use crate::{shipped::repository, support::is_missing};

/// Compiles the library once. `None` without a C compiler; this prints why.
pub fn library() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<(TempDir, PathBuf)>> = OnceLock::new();
    let build = || {
        if is_missing("cc", "gcc") {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("shim.so");
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-o"]).arg(&library);
        cc.arg(repository().join("tests/it/faults/shim.c")).args(["-ldl", "-lpthread"]);
        let output = cc.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some((folder, library))
    };
    BUILT.get_or_init(build).as_ref().map(|(_, library)| library.as_path())
}

fn preloaded() -> Variables {
    vec![variable("LD_PRELOAD", library().expect("the test asked for it"))]
}

fn text(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

/// Calls on files of the store, also while it is rebuilt beside the old one.
pub const STORE: Way = Way {
    name: "kills within the store",
    is_apart: false,
    watch: |log| {
        let mut variables = preloaded();
        variables.push(text("ODDSCAN_SHIM_PART", "/state/store"));
        variables.push(variable("ODDSCAN_SHIM_LOG", log));
        variables
    },
    inject: |fault| {
        let mut variables = preloaded();
        variables.push(text("ODDSCAN_SHIM_PART", "/state/store"));
        variables.push(text("ODDSCAN_SHIM_FAULT", fault));
        variables
    },
};

/// Variables that record every call below a folder with its data.
pub fn trace(root: &Path, file: &Path) -> Variables {
    let mut variables = preloaded();
    variables.push(variable("ODDSCAN_SHIM_ROOT", root));
    variables.push(variable("ODDSCAN_SHIM_TRACE", file));
    variables
}
