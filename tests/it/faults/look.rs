//! What the folders of a site hold, by what users may read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{site::Site, story::refused_until};

/// Keys of a sidecar that differ from run to run.
const VOLATILE: [&str; 5] = ["timings_secs", "revision", "received_at", "encoded_at", "scored_at"];

/// Texts in the names of files that are not whole yet.
const UNFINISHED: [&str; 6] =
    ["draft-", "arriving", "oddscan-tmp", ".partial", ".generating", "oddscan-next"];

/// Hashes of files by name.
type Hashes = BTreeMap<String, String>;

/// What a site shows when nothing is left to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Result files by name, with a hash. Sidecars are hashed without times and revision.
    pub results: Hashes,
    /// Files in quarantine, with a hash; the hash of a reason is that of its words.
    pub quarantine: Hashes,
    /// Names in the incoming folder.
    pub incoming: BTreeSet<String>,
    /// Members of all windows.
    pub n_members: u64,
    /// Hashes of map and mask by scan and window. They depend on nothing else.
    pub maps: BTreeMap<(String, String), String>,
}

pub fn hash(bytes: &[u8]) -> String {
    hex::encode(&Sha256::digest(bytes)[..8])
}

/// All files below a folder, by their path below it.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let to = if is_folder { &mut open } else { &mut found };
            to.push(entry.path());
        }
    }
    found.sort();
    found.iter().map(|path| path.strip_prefix(folder).unwrap().to_owned()).collect()
}

/// The sidecars of a results folder by stem.
pub fn sidecars(folder: &Path) -> Result<BTreeMap<String, Value>, String> {
    let mut found = BTreeMap::new();
    for path in files_below(folder) {
        let name = path.to_string_lossy().into_owned();
        let Some(stem) = name.strip_suffix("_anomaly.json") else { continue };
        if stem.starts_with('.') {
            continue;
        }
        let bytes = fs::read(folder.join(&path)).map_err(|error| format!("{name}: {error}"))?;
        let sidecar = serde_json::from_slice(&bytes)
            .map_err(|error| format!("sidecar {name} of {} bytes: {error}", bytes.len()))?;
        found.insert(stem.to_owned(), sidecar);
    }
    Ok(found)
}

/// The files that a sidecar names, with size and hash.
fn named(sidecar: &Value) -> Vec<(String, u64, String)> {
    let files = sidecar["files"].as_object().into_iter().flatten();
    let file = |(_, facts): (&String, &Value)| {
        let name = facts["name"].as_str()?.to_owned();
        Some((name, facts["n_bytes"].as_u64()?, facts["sha256"].as_str()?.to_owned()))
    };
    files.filter_map(file).collect()
}

/// Hashes of map and mask of all scored scans, by stem and window.
pub fn maps(sidecars: &BTreeMap<String, Value>) -> BTreeMap<(String, String), String> {
    let scored = sidecars.iter().filter(|(_, sidecar)| sidecar["status"] == "scored");
    let entry = |(stem, sidecar): (&String, &Value)| {
        let hashes = ["map", "mask"].map(|file| sidecar["files"][file]["sha256"].to_string());
        ((stem.clone(), sidecar["window"]["id"].to_string()), hashes.concat())
    };
    scored.map(entry).collect()
}

/// Must hold at any instant: every sidecar can be read, and the files that it names are there and
/// have its hashes.
pub fn results_fit(folder: &Path) -> Result<(), String> {
    for (stem, sidecar) in sidecars(folder)? {
        for (name, n_bytes, sha256) in named(&sidecar) {
            let bytes = fs::read(folder.join(&name))
                .map_err(|error| format!("the sidecar of {stem} names {name}: {error}"))?;
            let fits =
                bytes.len() as u64 == n_bytes && hex::encode(Sha256::digest(&bytes)) == sha256;
            if !fits {
                return Err(format!("{name} does not fit the sidecar of {stem}"));
            }
        }
    }
    Ok(())
}

/// Must hold at any instant: the bytes of all files that are refused up to the end of a phase are
/// in the incoming folder or in quarantine.
pub fn still_there(site: &Site, phase: usize) -> Result<(), String> {
    let folders = ["incoming", "quarantine"].map(|name| site.path(name));
    let held: BTreeSet<String> = folders
        .iter()
        .flat_map(|folder| files_below(folder).into_iter().map(|file| folder.join(file)))
        .filter_map(|path| Some(hash(&fs::read(path).ok()?)))
        .collect();
    for (name, bytes) in refused_until(phase) {
        if !held.contains(&hash(bytes)) {
            return Err(format!("{name} is neither in incoming nor in quarantine"));
        }
    }
    Ok(())
}

/// A sidecar without what differs from run to run.
fn steady(site: &Site, sidecar: &Value) -> String {
    let mut sidecar = sidecar.clone();
    if let Some(keys) = sidecar.as_object_mut() {
        for key in VOLATILE {
            keys.remove(key);
        }
    }
    sidecar.to_string().replace(&site.root().display().to_string(), "/site")
}

impl Seen {
    /// Looks at a site whose daemon has nothing to do.
    pub fn of(site: &Site) -> Result<Self, String> {
        let mut seen = Self::default();
        let folder = site.path("results");
        results_fit(&folder)?;
        let sidecars = sidecars(&folder)?;
        seen.maps = maps(&sidecars);
        for path in files_below(&folder) {
            let name = path.to_string_lossy().into_owned();
            let sidecar = name.strip_suffix("_anomaly.json").and_then(|stem| sidecars.get(stem));
            let content = match sidecar {
                Some(sidecar) => hash(steady(site, sidecar).as_bytes()),
                None => hash(&fs::read(folder.join(&path)).map_err(|e| format!("{name}: {e}"))?),
            };
            seen.results.insert(name, content);
        }

        let folder = site.path("quarantine");
        for path in files_below(&folder) {
            let bytes = fs::read(folder.join(&path)).map_err(|e| format!("{path:?}: {e}"))?;
            let content =
                if path.ends_with("reason.json") { reason(&bytes)? } else { hash(&bytes) };
            seen.quarantine.insert(path.to_string_lossy().into_owned(), content);
        }

        let incoming = files_below(&site.path("incoming"));
        seen.incoming = incoming.iter().map(|path| path.to_string_lossy().into_owned()).collect();
        seen.n_members = site.status().map_or(0, |status| n_members(&status));
        Ok(seen)
    }

    /// The first difference from what is expected. Results of the stems in `any` may be of any
    /// window.
    pub fn differs(&self, expected: &Self, any: &[String]) -> Option<String> {
        let is_any = |name: &str| any.iter().any(|stem| name.starts_with(&format!("{stem}_")));
        let of_files = |what: &str, found: &Hashes, expected: &Hashes| {
            let missing = expected.keys().find(|name| !found.contains_key(*name));
            let more = found.keys().find(|name| !expected.contains_key(*name));
            let other = expected.iter().find(|(name, hash)| {
                !is_any(name) && found.get(*name).is_some_and(|found| found != *hash)
            });
            match (missing, more) {
                (Some(missing), Some(more)) => {
                    Some(format!("{what}: {missing} is missing, {more} is too much"))
                }
                (Some(missing), None) => Some(format!("{what}: {missing} is missing")),
                (None, Some(more)) => Some(format!("{what}: {more} is too much")),
                (None, None) => {
                    other.map(|(name, _)| format!("{what}: {name} has another content"))
                }
            }
        };
        of_files("results", &self.results, &expected.results)
            .or_else(|| of_files("quarantine", &self.quarantine, &expected.quarantine))
            .or_else(|| {
                let name = self.incoming.symmetric_difference(&expected.incoming).next()?;
                let has = if self.incoming.contains(name) { "still holds" } else { "lost" };
                Some(format!("incoming {has} {name}"))
            })
            .or_else(|| {
                let (found, wanted) = (self.n_members, expected.n_members);
                (found != wanted).then(|| format!("{found} members, {wanted} expected"))
            })
    }
}

/// The words of a `reason.json` that do not depend on the time.
fn reason(bytes: &[u8]) -> Result<String, String> {
    let reason: Value =
        serde_json::from_slice(bytes).map_err(|error| format!("reason.json: {error}"))?;
    Ok(["reason", "found", "came_from", "moved"].map(|key| reason[key].to_string()).join(" "))
}

pub fn n_members(status: &Value) -> u64 {
    let cohorts = status["cohorts"].as_object().into_iter().flatten();
    cohorts.filter_map(|(_, cohort)| cohort["n_scans"].as_u64()).sum()
}

/// Whether the daemon has nothing to do.
pub fn is_idle(status: &Value) -> bool {
    let is_none = |key: &str| status[key].is_null() || status[key] == 0;
    let mut cohorts = status["cohorts"].as_object().into_iter().flatten();
    ["n_settling", "n_waiting", "n_unscored", "in_hand", "intake"].iter().all(|key| is_none(key))
        && cohorts.all(|(_, cohort)| cohort["n_outdated"] == 0)
}

/// Must hold when a daemon with nothing to do has stopped: no half-written files, and the archive
/// holds as many scans as the windows have members.
pub fn nothing_is_left_over(site: &Site, n_members: u64) -> Result<(), String> {
    for name in ["state", "results", "quarantine"] {
        for path in files_below(&site.path(name)) {
            let text = path.to_string_lossy();
            // A store that was moved aside is kept as it was found.
            if text.starts_with("lost+found") {
                continue;
            }
            if UNFINISHED.iter().any(|part| text.contains(part)) {
                return Err(format!("{name}/{text} is left over"));
            }
        }
    }
    let sources = files_below(&site.path("state/sources"));
    let n_sources = sources.iter().filter(|path| path.extension() == Some("scan".as_ref())).count();
    if n_sources as u64 != n_members {
        return Err(format!("the archive holds {n_sources} scans of {n_members} members"));
    }
    Ok(())
}
