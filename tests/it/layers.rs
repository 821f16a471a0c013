//! The layers of the crate: which module may use which.

mod allowed;
mod cases;
mod cycles;
mod rules;
mod source;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::shipped::repository;
use allowed::{faults, strays};
use cycles::cycles;
use rules::ROWS;
use source::Crate;

/// The files of `src`, with their path below it and their text.
fn sources() -> Vec<(String, String)> {
    let src = repository().join("src");
    let mut files = Vec::new();
    collect(&src, &mut files);
    files
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&src).unwrap().to_string_lossy().into_owned();
            (name, fs::read_to_string(&path).unwrap())
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

/// The outside crates that `Cargo.toml` names, in the spelling of code.
fn dependencies() -> BTreeSet<String> {
    let text = fs::read_to_string(repository().join("Cargo.toml")).unwrap();
    let manifest: toml::Table = text.parse().unwrap();
    let of = |section: &str| manifest[section].as_table().unwrap().keys().cloned();
    of("dependencies").map(|name| name.replace('-', "_")).collect()
}

fn own_code() -> Crate {
    Crate::read(&sources(), &dependencies())
}

#[test]
fn a_module_uses_only_what_its_row_allows() {
    let faults = faults(&own_code(), ROWS);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_dependency_is_named_only_where_it_is_wrapped() {
    let strays = strays(&own_code());
    assert!(strays.is_empty(), "{}", strays.join("\n"));
}

#[test]
fn no_files_use_one_another() {
    let found = cycles(&own_code());
    let faults = found.iter().map(|(files, way)| format!("{way}, all of them: {files:?}"));
    let faults: Vec<String> = faults.collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn comments_are_no_wider_than_code() {
    let folders = ["src", "tests", "benches", "examples", "scripts"];
    let mut files = Vec::new();
    for folder in folders.map(|folder| repository().join(folder)) {
        if folder.is_dir() {
            collect(&folder, &mut files);
        }
    }
    let mut faults = Vec::new();
    for path in files {
        let text = fs::read_to_string(&path).unwrap();
        let wide = |line: &&str| line.trim_start().starts_with("//") && line.chars().count() > 100;
        faults.extend(text.lines().filter(wide).map(|line| format!("{}: {line}", path.display())));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
