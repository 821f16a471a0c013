//! Compares uses with the allow-list.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    rules::{FREE, HOMES, Row, WATCHED},
    source::{Crate, Target, Use},
};

/// The part of `src` that a file belongs to: `store`, `nifti`.
pub(super) fn part(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

/// The name by which a row must allow a path outside of the crate; `None` if all may use it.
fn asked_for(path: &[String]) -> Option<String> {
    let whole = path.join("::");
    let is_below = |parent: &&str| whole == **parent || whole.starts_with(&format!("{parent}::"));
    if path[0] != "std" {
        return Some(path[0].clone());
    }
    if FREE.iter().any(is_below) && !whole.ends_with("::now") {
        return None;
    }
    if whole == "std" {
        // An alias of `std` gives access to all of it.
        return Some("std::*".to_owned());
    }
    if whole == "std::io::*" {
        return Some("std::io::stdin".to_owned());
    }
    WATCHED.iter().find(|watched| is_below(watched)).map(ToString::to_string)
}

/// Something that a module may or may not use.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    Module(String),
    Outside(String),
}

/// What a row must allow for a use; `None` if the use is always allowed.
fn asked(code: &Crate, file: &str, target: &Target) -> Option<Asked> {
    match target {
        Target::Inside(path) => {
            let used = part(code.file_of(path)?);
            (used != part(file)).then(|| Asked::Module(used.to_owned()))
        }
        Target::Outside(path) => asked_for(path).map(Asked::Outside),
    }
}

/// What a row allows.
fn allowed(row: &Row) -> BTreeSet<Asked> {
    let words = |list: &'static str| list.split_whitespace().map(str::to_owned);
    let modules = words(row.modules).map(Asked::Module);
    modules.chain(words(row.outside).map(Asked::Outside)).collect()
}

/// Uses that an allow-list forbids, and entries of the list that the code does not need.
pub(super) fn faults(code: &Crate, rows: &[Row]) -> Vec<String> {
    let allowed: BTreeMap<&str, BTreeSet<Asked>> =
        rows.iter().map(|row| (row.module, allowed(row))).collect();
    let files = code.files.values().filter(|file| *file != "lib.rs");
    let rowless = files.filter(|file| !allowed.contains_key(part(file)));
    let rowless = rowless.map(|file| format!("src/{file} has no row in tests/it/layers/rules.rs"));

    let mut faults: BTreeSet<String> = rowless.collect();
    let mut unused = allowed.clone();
    for Use { file, target } in code.uses() {
        let Some(asked) = asked(code, &file, &target) else { continue };
        let Some(row) = allowed.get(part(&file)) else { continue };
        if !row.contains(&asked) {
            let (Asked::Module(name) | Asked::Outside(name)) = &asked;
            faults.insert(format!("src/{file} must not use {name} ({target})"));
        }
        if let Some(unused) = unused.get_mut(part(&file)) {
            unused.remove(&asked);
        }
    }

    for (module, unused) in unused {
        for Asked::Module(name) | Asked::Outside(name) in unused {
            faults.insert(format!("{module} does not use {name}: take it out of its row"));
        }
    }
    faults.into_iter().collect()
}

/// Where dependencies are named outside of their homes.
pub(super) fn strays(code: &Crate) -> Vec<String> {
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
