//! Files that use one another in a circle.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::source::{Crate, Target, Use};

/// For each file, the files that it uses.
type Edges = BTreeMap<String, BTreeSet<String>>;

/// Groups of files that use one another, each with one circular path. A declaration `mod x;` is no
/// use.
pub(super) fn cycles(code: &Crate) -> Vec<(BTreeSet<String>, String)> {
    let edges = edges(code);
    let before: BTreeMap<&String, BTreeMap<&String, &String>> =
        edges.keys().map(|file| (file, reached_from(file, &edges))).collect();
    let reaches = |from: &String, to: &String| before[from].contains_key(to);

    let mut groups: Vec<(BTreeSet<String>, String)> = Vec::new();
    for file in edges.keys().filter(|file| reaches(file, file)) {
        if groups.iter().any(|(group, _)| group.contains(file)) {
            continue;
        }
        let is_in = |other: &&String| reaches(file, other) && reaches(other, file);
        let group = edges.keys().filter(is_in).cloned().collect();
        groups.push((group, way_round(file, &before[file])));
    }
    groups
}

fn edges(code: &Crate) -> Edges {
    let mut edges = Edges::new();
    for Use { file, target } in code.uses() {
        let Target::Inside(path) = &target else { continue };
        if let Some(used) = code.file_of(path).filter(|used| **used != file) {
            edges.entry(file).or_default().insert(used.clone());
        }
    }
    edges
}

/// The files that can be reached from a file, each with the file before it on a shortest path.
fn reached_from<'a>(file: &'a String, edges: &'a Edges) -> BTreeMap<&'a String, &'a String> {
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
