//! The layers of the crate: what may know what.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::shipped::repository;

/// A part of `src`, and words that its code must not contain.
type Rule = (&'static str, &'static [&'static str]);

/// What does input or output, keeps time, or knows the outside.
const OUTSIDE: &[&str] = &[
    "std::fs",
    "std::net",
    "std::process",
    "std::time",
    "std::thread",
    "std::env",
    "tokio",
    "tracing",
    "sled",
    "notify",
    "prometheus",
    "nifti::",
    "axum",
    "burn",
    "systemd",
    "println!",
];

const DAEMON: &[&str] = &[
    "crate::config",
    "crate::pipeline",
    "crate::service",
    "crate::engine",
    "crate::telemetry",
    "crate::cli",
];

const RULES: &[Rule] = &[
    ("numeric", OUTSIDE),
    ("numeric", DAEMON),
    (
        "numeric",
        &[
            "crate::domain",
            "crate::compute",
            "crate::store",
            "crate::report",
            "crate::nifti",
            "crate::dicom",
        ],
    ),
    ("domain", OUTSIDE),
    ("domain", DAEMON),
    (
        "domain",
        &[
            "crate::compute",
            "crate::store",
            "crate::report",
            "crate::nifti",
            "crate::metrics",
            "crate::dicom",
        ],
    ),
    ("compute", DAEMON),
    (
        "compute",
        &["crate::store", "crate::report", "crate::nifti", "crate::metrics", "std::fs::write"],
    ),
    ("store", DAEMON),
    ("store", &["crate::compute", "crate::report", "crate::nifti", "crate::metrics"]),
    ("report", DAEMON),
    ("report", &["crate::compute", "crate::store", "crate::nifti", "crate::metrics"]),
    ("nifti.rs", DAEMON),
    ("nifti.rs", &["crate::compute", "crate::store", "crate::report", "crate::metrics"]),
    ("dicom", DAEMON),
    (
        "dicom",
        &["crate::compute", "crate::store", "crate::report", "crate::nifti", "crate::metrics"],
    ),
    ("metrics", DAEMON),
    ("metrics", &["crate::compute", "crate::store", "crate::report", "crate::nifti"]),
    ("pipeline", &["crate::cli", "crate::service", "crate::telemetry", "burn::"]),
];

/// A dependency, and the only parts that may name it.
const HOMES: &[(&str, &[&str])] = &[
    ("burn::", &["compute/gpu"]),
    ("sled::", &["store"]),
    ("::nifti::", &["nifti.rs"]),
    ("notify::", &["watcher.rs", "service.rs"]),
    ("prometheus::", &["metrics"]),
    ("systemd::", &["service.rs"]),
    ("clap::", &["cli"]),
    ("axum::", &["telemetry.rs"]),
    ("dicom_object::", &["dicom"]),
    ("dicom_pixeldata::", &["dicom"]),
    ("dicom_core::", &["dicom"]),
];

/// All source files under `src`, with their path below it and their code without comments.
fn sources() -> Vec<(String, String)> {
    let src = repository().join("src");
    let mut files = Vec::new();
    collect(&src, &mut files);
    files
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&src).unwrap().to_string_lossy().into_owned();
            let text = fs::read_to_string(&path).unwrap();
            let code: Vec<&str> =
                text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
            (name, code.join("\n"))
        })
        .collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Whether a file of `src` belongs to a part of it, like `store` or `nifti.rs`.
fn belongs(name: &str, part: &str) -> bool {
    name == part || name == format!("{part}.rs") || name.starts_with(&format!("{part}/"))
}

#[test]
fn no_layer_knows_a_layer_above_it() {
    let sources = sources();
    let mut faults = Vec::new();
    for (part, forbidden) in RULES {
        let own: Vec<_> = sources.iter().filter(|(name, _)| belongs(name, part)).collect();
        assert!(!own.is_empty(), "no source file belongs to {part}");
        for (name, code) in own {
            let found = forbidden.iter().filter(|word| code.contains(**word));
            faults.extend(found.map(|word| format!("src/{name} must not know {word}")));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_dependency_is_named_only_where_it_is_wrapped() {
    let mut faults = Vec::new();
    for (name, code) in sources() {
        for (dependency, homes) in HOMES {
            if code.contains(dependency) && !homes.iter().any(|home| belongs(&name, home)) {
                faults.push(format!("src/{name} names {dependency}; its home is {homes:?}"));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn comments_are_no_wider_than_code() {
    let mut files = Vec::new();
    for folder in ["src", "tests", "benches", "scripts"] {
        collect(&repository().join(folder), &mut files);
    }
    let mut faults = Vec::new();
    for path in files {
        let text = fs::read_to_string(&path).unwrap();
        let wide = |line: &&str| line.trim_start().starts_with("//") && line.chars().count() > 100;
        faults.extend(text.lines().filter(wide).map(|line| format!("{}: {line}", path.display())));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
