//! The layers of the crate: what may know what.

mod cases;
mod rules;
mod source;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    path::{Path, PathBuf},
};

use crate::shipped::repository;
use rules::{FREE, HOMES, KNOWN_CYCLES, ROWS, Row, WATCHED};
use source::{Crate, Target, Use};

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

/// The outside crates that `Cargo.toml` names, as code writes them.
fn dependencies() -> BTreeSet<String> {
    let text = fs::read_to_string(repository().join("Cargo.toml")).unwrap();
    let manifest: toml::Table = text.parse().unwrap();
    let of = |section: &str| manifest[section].as_table().unwrap().keys().cloned();
    of("dependencies").map(|name| name.replace('-', "_")).collect()
}

/// The part of `src` that a file belongs to: `store`, `nifti`.
fn part(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

/// What a path outside of the crate must be allowed as; `None` if all may use it.
fn asked_for(path: &[String]) -> Option<String> {
    let whole = path.join("::");
    let is_below = |parent: &&str| whole == **parent || whole.starts_with(&format!("{parent}::"));
    if path[0] != "std" {
        return Some(path[0].clone());
    }
    if FREE.iter().any(is_below) {
        return None;
    }
    if whole == "std" {
        // Under another name, all of it can be reached.
        return Some("std::*".to_owned());
    }
    if whole == "std::io::*" {
        return Some("std::io::stdin".to_owned());
    }
    WATCHED.iter().find(|watched| is_below(watched)).map(ToString::to_string)
}

/// What the code breaks of an allow-list, and what the list allows though the code does not use it.
fn faults(code: &Crate, rows: &[Row]) -> Vec<String> {
    let words = |list: &'static str| list.split_whitespace().collect::<BTreeSet<_>>();
    let rows: BTreeMap<&str, [BTreeSet<&str>; 2]> =
        rows.iter().map(|row| (row.module, [words(row.modules), words(row.outside)])).collect();
    let mut unused = rows.clone();
    let mut faults = BTreeSet::new();
    for file in code.files.values().filter(|file| *file != "lib.rs") {
        if !rows.contains_key(part(file)) {
            faults.insert(format!("src/{file} has no row in tests/it/layers/rules.rs"));
        }
    }
    for Use { file, target } in code.uses() {
        let own = part(&file);
        let (list, used) = match &target {
            Target::Inside(path) => match code.file_of(path) {
                Some(used) if part(used) != own => (0, part(used).to_owned()),
                _ => continue,
            },
            Target::Outside(path) => match asked_for(path) {
                Some(used) => (1, used),
                None => continue,
            },
        };
        let Some(row) = rows.get(own) else { continue };
        if !row[list].contains(used.as_str()) {
            faults.insert(format!("src/{file} must not use {used} ({target})"));
        }
        unused.get_mut(own).unwrap()[list].remove(used.as_str());
    }
    let unused = unused.into_iter().flat_map(|(module, lists)| {
        let words = lists.into_iter().flatten();
        words.map(move |word| format!("{module} does not use {word}: take it out of its row"))
    });
    faults.into_iter().chain(unused).collect()
}

/// Where dependencies are named outside of their homes.
fn strays(code: &Crate) -> Vec<String> {
    let uses = code.uses();
    let strays = uses.iter().filter_map(|Use { file, target }| {
        let Target::Outside(path) = target else { return None };
        let (dependency, homes) = HOMES.iter().find(|(dependency, _)| *dependency == path[0])?;
        let is_home =
            |home: &&str| file.starts_with(&format!("{home}/")) || *file == format!("{home}.rs");
        let is_stray = !homes.iter().any(is_home);
        is_stray.then(|| format!("src/{file} names {dependency}; its home is {homes:?}"))
    });
    let strays: BTreeSet<String> = strays.collect();
    strays.into_iter().collect()
}

/// Groups of files that use one another, and one way round in each.
fn cycles(code: &Crate) -> Vec<(BTreeSet<String>, String)> {
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for Use { file, target } in code.uses() {
        let Target::Inside(path) = &target else { continue };
        if let Some(used) = code.file_of(path).filter(|used| **used != file) {
            edges.entry(file).or_default().insert(used.clone());
        }
    }
    let reach: BTreeMap<&String, BTreeMap<&String, &String>> =
        edges.keys().map(|file| (file, reached_from(file, &edges))).collect();
    let reaches = |a: &String, b: &String| reach.get(a).is_some_and(|from| from.contains_key(b));
    let mut groups = Vec::new();
    let mut done = BTreeSet::new();
    for file in edges.keys().filter(|file| reaches(file, file)) {
        if !done.contains(file) {
            let group: BTreeSet<String> = edges
                .keys()
                .filter(|other| reaches(file, other) && reaches(other, file))
                .cloned()
                .collect();
            done.extend(group.iter().cloned());
            groups.push((group, way_round(file, &reach[file])));
        }
    }
    groups
}

/// What can be reached from a file, each with the file before it on a shortest way.
fn reached_from<'a>(
    file: &'a String,
    edges: &'a BTreeMap<String, BTreeSet<String>>,
) -> BTreeMap<&'a String, &'a String> {
    let mut before = BTreeMap::new();
    let mut next = VecDeque::from([file]);
    while let Some(file) = next.pop_front() {
        for used in edges.get(file).into_iter().flatten() {
            before.entry(used).or_insert_with(|| {
                next.push_back(used);
                file
            });
        }
    }
    before
}

fn way_round(file: &String, before: &BTreeMap<&String, &String>) -> String {
    let mut way = vec![file.as_str()];
    let mut at = before[file];
    while at != file {
        way.push(at);
        at = before[at];
    }
    way.push(file);
    way.reverse();
    way.join(" -> ")
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
    let is_known = |files: &BTreeSet<String>| {
        KNOWN_CYCLES.iter().any(|known| files.iter().all(|file| part(file) == *known))
    };
    let new = found.iter().filter(|(files, _)| !is_known(files));
    let new = new.map(|(files, way)| format!("{way}, all of them: {files:?}"));
    let is_gone = |known: &&&str| {
        !found.iter().any(|(files, _)| files.iter().all(|file| part(file) == **known))
    };
    let gone = KNOWN_CYCLES.iter().filter(is_gone);
    let gone = gone.map(|known| format!("{known} has no cycle any more: take it out of the list"));
    let faults: Vec<String> = new.chain(gone).collect();
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
