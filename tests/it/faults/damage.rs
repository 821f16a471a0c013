//! A file of the state folder is damaged while the daemon is stopped. Whichever it is, the daemon
//! starts, and its results are the same: it takes what is gone from elsewhere. Where nothing else
//! has it, the log says so.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{
    Extent, Faults, Random, extent,
    look::{self, files_below, is_idle, n_members},
    replay::restore,
    seeds, side_by_side,
    site::{End, PATIENCE, POLL, Site},
    spread,
    story::{
        MAX_SCANS, Outcome, Reference, Variables, drop_files, phases, reference, settle,
        stop_and_look,
    },
};

/// The phase after which files are damaged: scans have left, and a mask is archived. One scan comes
/// afterwards, so that all results are computed again.
const PHASE: usize = 4;

/// The phase whose state an older copy of a file is from.
const OLDER: usize = 2;

const KEPT: [&str; 3] = ["state", "results", "quarantine"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    Flip,
    Bytes,
    Half,
    Empty,
    Remove,
    Older,
}

const ALL: [Damage; 6] =
    [Damage::Flip, Damage::Bytes, Damage::Half, Damage::Empty, Damage::Remove, Damage::Older];

/// Content of files, and folders, by their path.
type Files = BTreeMap<PathBuf, Option<Vec<u8>>>;

fn copy_of(site: &Site, names: &[&str]) -> Files {
    let mut files = Files::new();
    for name in names {
        files.insert(PathBuf::from(name), None);
        for path in files_below(&site.path(name)) {
            let content = fs::read(site.path(name).join(&path)).unwrap();
            files.insert(Path::new(name).join(&path), Some(content));
            for folder in path.ancestors().skip(1) {
                files.insert(Path::new(name).join(folder), None);
            }
        }
    }
    files
}

/// A place in a file, where it holds something if possible.
fn place(bytes: &[u8], random: &mut Random) -> usize {
    let mut place = 0;
    for _ in 0..40 {
        place = random.below(bytes.len());
        if bytes[place] != 0 {
            break;
        }
    }
    place
}

/// The damaged file. `None` if it is removed.
fn damaged(
    bytes: &[u8],
    older: Option<&[u8]>,
    damage: Damage,
    random: &mut Random,
) -> Option<Vec<u8>> {
    let mut damaged = bytes.to_vec();
    match damage {
        _ if bytes.is_empty() => {}
        Damage::Flip => damaged[place(bytes, random)] ^= 1 << random.below(8),
        Damage::Bytes => {
            let start = place(bytes, random);
            let n_bytes = 1 + random.below(8);
            damaged.iter_mut().skip(start).take(n_bytes).for_each(|byte| *byte ^= 0xa5);
        }
        Damage::Half => damaged.truncate(bytes.len() / 2),
        Damage::Empty => damaged.clear(),
        Damage::Remove => return None,
        Damage::Older => damaged = older?.to_vec(),
    }
    Some(damaged)
}

/// A site after the phase that is damaged, with copies of its folders.
struct Base {
    site: Site,
    files: Files,
    older: Files,
}

fn base(reference: &Reference) -> Base {
    let mut site = Site::new(MAX_SCANS, false);
    let mut older = Files::new();
    for number in 0..=PHASE {
        drop_files(&site, number);
        site.start(&Variables::new());
        let settled = settle(&mut site, &reference.seen[number], &[]);
        assert!(matches!(settled, Ok(Outcome::Settled)), "{}", site.last_words());
        assert_eq!(site.stop(), Some(End::Code(0)));
        if number == OLDER {
            older = copy_of(&site, &["state"]);
        }
    }
    let files = copy_of(&site, &KEPT);
    Base { site, files, older }
}

/// Which files are damaged how. Names of files differ from site to site, their kinds do not.
fn kinds(base: &Base) -> Vec<PathBuf> {
    let is_state = |(path, content): &(&PathBuf, &Option<Vec<u8>>)| {
        path.starts_with("state") && content.as_ref().is_some_and(|bytes| !bytes.is_empty())
    };
    base.files.iter().filter(is_state).map(|(path, _)| path.clone()).collect()
}

fn put_back(base: &Base) {
    restore(base.site.root(), &KEPT, &base.files);
    for (name, _) in &phases()[PHASE + 1].drops {
        fs::remove_file(base.site.path("incoming").join(name)).ok();
    }
    fs::remove_file(base.site.path("log")).ok();
}

fn is_reported(site: &Site) -> bool {
    let log = site.log();
    log.lines().any(|line| line.contains(" WARN ") || line.contains("ERROR"))
}

/// Gives a file this content, or removes it.
fn put(site: &Site, path: &Path, content: Option<&[u8]>) {
    let place = site.root().join(path);
    match content {
        Some(bytes) => fs::write(&place, bytes).unwrap(),
        None => fs::remove_file(&place).unwrap(),
    }
}

/// Damages a file, and lets the daemon work with it.
fn try_damage(
    base: &mut Base,
    reference: &Reference,
    path: &Path,
    content: Option<&[u8]>,
) -> Result<(), String> {
    put(&base.site, path, content);

    let site = &mut base.site;
    site.start(&Variables::new());
    if path.ends_with("identity.key") && content.is_some() {
        return must_refuse(site);
    }
    for number in [PHASE, PHASE + 1] {
        if number > PHASE {
            drop_files(site, number);
        }
        match settle(site, &reference.seen[number], &[]) {
            Ok(Outcome::Settled) => {}
            Ok(Outcome::Ended(end)) => return Err(format!("it ended with {end:?}")),
            // A scan that was read again is the newest of its window, and another one leaves.
            Err(_) if number > PHASE && is_rebuilt(site, reference).is_ok() => return Ok(()),
            Err(what) => return Err(what),
        }
    }
    let mut left = Ok(());
    let end =
        stop_and_look(site, &reference.seen[PHASE + 1], &mut |what| left = Err(what.to_owned()))?;
    end.map_or(left, |end| Err(format!("it ended with {end:?}")))
}

/// Whether the log told of the damage, and all is there again: as many members as before, and a
/// result of each scan.
fn is_rebuilt(site: &Site, reference: &Reference) -> Result<(), String> {
    no_result_is_wrong(site, reference)?;
    let n_found = site.status().map_or(0, |status| n_members(&status));
    let n_wanted = reference.seen[PHASE + 1].n_members;
    if !is_reported(site) || n_found != n_wanted {
        return Err(format!("{n_found} members of {n_wanted}"));
    }
    Ok(())
}

/// Every scan that had a result has one that fits, and maps of known windows are the known ones.
fn no_result_is_wrong(site: &Site, reference: &Reference) -> Result<(), String> {
    look::results_fit(&site.path("results"))?;
    let sidecars = look::sidecars(&site.path("results"))?;
    let expected = &reference.seen[PHASE + 1];
    let stems = expected.results.keys().filter_map(|name| name.strip_suffix("_anomaly.json"));
    for stem in stems {
        if sidecars.get(stem).is_none_or(|sidecar| sidecar["status"] != "scored") {
            return Err(format!("the result of {stem} is gone"));
        }
    }
    let known: BTreeMap<_, _> = reference.seen.iter().flat_map(|seen| &seen.maps).collect();
    let is_wrong = |(key, map): &(&(String, String), &String)| {
        known.get(key).is_some_and(|known| known != map)
    };
    match look::maps(&sidecars).iter().find(is_wrong) {
        Some((key, _)) => Err(format!("a wrong map: {key:?}")),
        None => Ok(()),
    }
}

/// A key that is damaged would name all results in another way.
fn must_refuse(site: &mut Site) -> Result<(), String> {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(20) {
        match site.ended() {
            Some(End::Code(code)) if code > 0 && site.log().contains("identity.key") => {
                return Ok(());
            }
            Some(end) => return Err(format!("it ended with {end:?}")),
            None => thread::sleep(POLL),
        }
    }
    Err("it works with a damaged key".to_owned())
}

/// As [`try_damage`], without the originals: what is damaged may be lost, but not silently.
fn try_without_originals(
    base: &mut Base,
    reference: &Reference,
    path: &Path,
    content: Option<&[u8]>,
) -> Result<(), String> {
    put(&base.site, path, content);
    let site = &mut base.site;
    drop_files(site, PHASE + 1);
    site.start(&Variables::new());
    if path.ends_with("identity.key") && content.is_some() {
        return must_refuse(site);
    }

    let (started, stem) = (Instant::now(), "sub-7_T1w");
    let status = loop {
        if let Some(end) = site.ended() {
            return Err(format!("it ended with {end:?}"));
        }
        if started.elapsed() > PATIENCE {
            return Err("not done in time".to_owned());
        }
        thread::sleep(POLL);
        let has_new = || {
            let sidecars = look::sidecars(&site.path("results")).unwrap_or_default();
            sidecars.get(stem).is_some_and(|sidecar| sidecar["status"] == "scored")
        };
        match site.status() {
            Some(status) if is_idle(&status) && has_new() => break status,
            _ => {}
        }
    };

    no_result_is_wrong(site, reference)?;
    let expected = &reference.seen[PHASE + 1];
    if n_members(&status) < expected.n_members && !is_reported(site) {
        return Err(format!("{} members, and not a word of it", n_members(&status)));
    }
    Ok(())
}

/// One worker's share of the damages.
fn run(
    reference: &Reference,
    share: (usize, usize),
    n_damages: Option<usize>,
    seed: u64,
    faults: &Faults,
) {
    let mut base = base(reference);
    let files = kinds(&base);
    let all: Vec<(PathBuf, Damage)> =
        files.iter().flat_map(|path| ALL.map(|damage| (path.clone(), damage))).collect();
    let chosen = n_damages.map_or_else(|| all.clone(), |n| spread(&all, n, seed));
    let away = base.site.root().join("away");
    let mut seen = BTreeSet::new();

    for (index, (path, damage)) in chosen.into_iter().enumerate() {
        if index % share.1 != share.0 {
            continue;
        }
        let mut random = Random(seed << 32 | index as u64);
        let bytes = base.files[&path].clone().expect("files alone are damaged");
        let older = base.older.get(&path).and_then(Option::as_deref);
        let content = damaged(&bytes, older, damage, &mut random);
        if content.as_ref() == Some(&bytes) || !seen.insert((path.clone(), content.clone())) {
            continue;
        }
        faults.count(1);
        put_back(&base);
        // Every second time the original files are gone.
        let has_originals = random.below(2) == 0;
        let result = if has_originals {
            try_damage(&mut base, reference, &path, content.as_deref())
        } else {
            let incoming = base.site.path("incoming");
            fs::rename(&incoming, &away).unwrap();
            fs::create_dir(&incoming).unwrap();
            let result = try_without_originals(&mut base, reference, &path, content.as_deref());
            base.site.kill();
            fs::remove_dir_all(&incoming).unwrap();
            fs::rename(&away, &incoming).unwrap();
            result
        };
        base.site.kill();
        if let Err(what) = result {
            let reported = if is_reported(&base.site) { "reported" } else { "silent" };
            let originals = if has_originals { "with" } else { "without" };
            let run =
                format!("seed {seed}, {damage:?} of {} {originals} originals", path.display());
            faults.add(run, format!("{reported}: {what}\n    | {}", base.site.last_words()));
        }
    }
}

#[test]
fn damage_at_rest_loses_nothing_silently() {
    let Some(extent) = extent() else { return };
    let reference = reference(false, |_| Variables::new());
    let faults = Faults::default();
    for seed in seeds(extent) {
        let n_damages = (extent != Extent::All).then_some(56);
        let shares: Vec<usize> = (0..4).collect();
        side_by_side(&shares, |_, &share| {
            run(&reference, (share, shares.len()), n_damages, seed, &faults);
        });
    }
    faults.assert_none("damaged files");
}

/// The long form alone: hundreds of single bits.
#[test]
fn a_flipped_bit_anywhere_loses_nothing_silently() {
    let Some(extent) = extent() else { return };
    if extent == Extent::Sample {
        crate::support::skip("200 flipped bits take minutes: ODDSCAN_FAULTS=all");
        return;
    }
    let reference = reference(false, |_| Variables::new());
    let faults = Faults::default();
    let shares: Vec<u64> = (0..4).collect();
    side_by_side(&shares, |_, &share| {
        let mut base = base(&reference);
        // Larger files get more of the flips.
        let files: Vec<(PathBuf, usize)> = kinds(&base)
            .into_iter()
            .map(|path| (path.clone(), base.files[&path].as_ref().map_or(0, Vec::len)))
            .collect();
        let mut random = Random(share);
        for number in 0..50 {
            let (path, _) = if number % 2 == 0 {
                files[random.below(files.len())].clone()
            } else {
                let mut at = random.below(files.iter().map(|(_, size)| size).sum());
                let holds = |(_, size): &&(PathBuf, usize)| {
                    let is_in = at < *size;
                    at = at.saturating_sub(*size);
                    is_in
                };
                files.iter().find(holds).expect("within all files").clone()
            };
            let bytes = base.files[&path].clone().expect("files alone are damaged");
            let content = damaged(&bytes, None, Damage::Flip, &mut random);
            faults.count(1);
            put_back(&base);
            let result = try_damage(&mut base, &reference, &path, content.as_deref());
            base.site.kill();
            if let Err(what) = result {
                let reported = if is_reported(&base.site) { "reported" } else { "silent" };
                let run = format!("share {share}, flip {number} in {}", path.display());
                faults.add(run, format!("{reported}: {what}\n    | {}", base.site.last_words()));
            }
        }
    });
    faults.assert_none("flipped bits");
}
