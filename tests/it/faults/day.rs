//! A day in an hour: the arrivals of a day at a hospital, much faster, with all that goes wrong.
//! `ODDSCAN_DAY=<file.csv>` asks for it; docs/reliability.md has the command and figures.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    fmt::Write,
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use super::{
    Random,
    look::{self, files_below, is_idle},
    site::{End, PATIENCE, POLL, Site},
};
use crate::support::{scan_bytes, skip};

/// Members of a full window: 2,000 scans turn it twenty times.
const WINDOW: usize = 100;

/// Scans after which everything has been done several times, also by a daemon that ran for long:
/// the window is full, and has turned twice.
const WARM: usize = 300;

const HEAD: &str = "seconds,arrived,results,rss_mib,peak_mib,handles,state_mib,store_mib,\
                    sources,quarantined,starts,kills\n";

struct Day {
    site: Site,
    started: Instant,
    random: Random,
    n_arrived: usize,
    n_starts: usize,
    n_kills: usize,
    refused: usize,
    copies: usize,
    csv: String,
    rows: Vec<Row>,
}

/// Figures at one moment.
struct Row {
    n_arrived: usize,
    peak_mib: f64,
    handles: usize,
    state_mib: f64,
}

fn mib_below(folder: &Path) -> f64 {
    let bytes = |path| fs::metadata(folder.join(path)).map_or(0, |about| about.len());
    files_below(folder).into_iter().map(bytes).sum::<u64>() as f64 / f64::from(1 << 20)
}

/// A line of `/proc/<id>/status` in MiB.
fn memory(process: u32, line: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let found = text.lines().find_map(|found| found.strip_prefix(line));
    let kib = found.and_then(|rest| rest.trim_start_matches(':').split_whitespace().next());
    kib.and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

fn name(number: usize) -> String {
    format!("sub-{number:05}_T1w.nii.gz")
}

impl Day {
    fn start(&mut self) {
        self.site.start(&[]);
        self.n_starts += 1;
        let started = Instant::now();
        while self.site.status().is_none() {
            let words = self.site.last_words();
            assert!(self.site.ended().is_none() && started.elapsed() < PATIENCE, "{words}");
            thread::sleep(POLL);
        }
    }

    fn record(&mut self) {
        let Some(process) = self.site.process_id() else { return };
        let handles = fs::read_dir(format!("/proc/{process}/fd")).map_or(0, Iterator::count);
        let [rss, peak] = ["VmRSS", "VmHWM"].map(|line| memory(process, line));
        let results = files_below(&self.site.path("results"));
        let is_sidecar =
            |path: &&std::path::PathBuf| path.to_string_lossy().ends_with("_anomaly.json");
        let n_results = results.iter().filter(is_sidecar).count();
        let [state, store] = ["state", "state/store"].map(|name| mib_below(&self.site.path(name)));
        let n_sources = files_below(&self.site.path("state/sources")).len();
        let n_entries = self.entries();
        let Self { n_arrived, n_starts, n_kills, .. } = *self;
        writeln!(
            self.csv,
            "{:.1},{n_arrived},{n_results},{rss:.1},{peak:.1},{handles},{state:.2},{store:.2},\
             {n_sources},{n_entries},{n_starts},{n_kills}",
            self.started.elapsed().as_secs_f64(),
        )
        .unwrap();
        self.rows.push(Row { n_arrived, peak_mib: peak, handles, state_mib: state });
    }

    fn entries(&self) -> usize {
        let files = files_below(&self.site.path("quarantine"));
        files.iter().filter(|path| path.ends_with("reason.json")).count()
    }

    /// Several files at once, and what goes wrong beside them.
    fn arrivals(&mut self, n: usize) {
        for _ in 0..n {
            self.n_arrived += 1;
            let number = self.n_arrived;
            self.site.drop_in(&name(number), &scan_bytes(number as u64));
            if number.is_multiple_of(50) {
                let noise: Vec<u8> = (0..20_000).map(|i| (i * number) as u8).collect();
                self.site.drop_in(&format!("noise-{number}_T1w.nii.gz"), &noise);
                self.refused += 1;
            }
            if number.is_multiple_of(45) {
                let copied = 1 + self.random.below(number);
                let copy = format!("copy-{number}_T1w.nii.gz");
                self.site.drop_in(&copy, &scan_bytes(copied as u64));
                self.copies += 1;
            }
        }
    }

    /// What goes wrong after a group of arrivals.
    fn mishap(&mut self) {
        match self.random.below(40) {
            // The power button.
            0..=3 => {
                thread::sleep(Duration::from_millis(self.random.next() % 900));
                self.site.kill();
                self.n_kills += 1;
                look::results_fit(&self.site.path("results")).unwrap();
                self.start();
            }
            // An update.
            4 => {
                assert_eq!(self.site.stop(), Some(End::Code(0)), "{}", self.site.last_words());
                self.start();
            }
            // The results folder is away.
            5 => {
                let (folder, away) = (self.site.path("results"), self.site.root().join("away"));
                fs::rename(&folder, &away).unwrap();
                thread::sleep(Duration::from_millis(700));
                fs::rename(&away, &folder).unwrap();
            }
            _ => {}
        }
    }

    /// Waits until at most so many scans have no result.
    fn wait_for(&mut self, n_behind: usize) {
        let started = Instant::now();
        loop {
            let words = self.site.last_words();
            assert!(self.site.ended().is_none() && started.elapsed() < 4 * PATIENCE, "{words}");
            let n_left = self.site.status().map_or(usize::MAX, |status| {
                let count = |key: &str| status[key].as_u64().unwrap_or(0) as usize;
                count("n_settling") + count("n_waiting") + count("n_unscored")
            });
            if n_left <= n_behind {
                return;
            }
            thread::sleep(POLL);
        }
    }
}

#[test]
fn a_day_in_an_hour_loses_nothing_and_stays_small() {
    let Some(file) = env::var_os("ODDSCAN_DAY") else {
        skip("a day of arrivals takes 25 minutes: ODDSCAN_DAY=<file.csv>");
        return;
    };
    let n_scans = env::var("ODDSCAN_DAY_SCANS").ok().and_then(|n| n.parse().ok()).unwrap_or(2000);
    let mut day = Day {
        site: Site::new(WINDOW, false),
        started: Instant::now(),
        random: Random(20_261_201),
        n_arrived: 0,
        n_starts: 0,
        n_kills: 0,
        refused: 0,
        copies: 0,
        csv: HEAD.to_owned(),
        rows: Vec::new(),
    };

    day.start();
    while day.n_arrived < n_scans {
        let n = (1 + day.random.below(8)).min(n_scans - day.n_arrived);
        day.arrivals(n);
        day.mishap();
        // Busy hours let files wait, others do not.
        let n_behind = [0, 4, 20][day.random.below(3)];
        day.wait_for(n_behind);
        if day.rows.last().is_none_or(|row| day.n_arrived >= row.n_arrived + 10) {
            day.record();
            fs::write(&file, &day.csv).unwrap();
        }
    }
    finish(&mut day);
    fs::write(&file, &day.csv).unwrap();
    check(&day);
}

fn finish(day: &mut Day) {
    let started = Instant::now();
    loop {
        let is_done = day.site.status().is_some_and(|status| is_idle(&status));
        let n_results = look::sidecars(&day.site.path("results")).unwrap().len();
        if is_done && n_results >= day.n_arrived && day.entries() >= day.refused {
            break;
        }
        assert!(started.elapsed() < 4 * PATIENCE, "{}", day.site.last_words());
        thread::sleep(40 * POLL);
    }
    day.record();
    assert_eq!(day.site.stop(), Some(End::Code(0)));
}

fn check(day: &Day) {
    let folder = day.site.path("results");
    look::results_fit(&folder).unwrap();
    let sidecars = look::sidecars(&folder).unwrap();
    let lost: Vec<String> = (1..=day.n_arrived)
        .map(|number| name(number).replace(".nii.gz", ""))
        .filter(|stem| sidecars.get(stem).is_none_or(|sidecar| sidecar["status"] != "scored"))
        .collect();
    let mut by_scan: BTreeMap<String, usize> = BTreeMap::new();
    for sidecar in sidecars.values() {
        *by_scan.entry(sidecar["scan_id"].to_string()).or_default() += 1;
    }
    let n_twice = by_scan.values().filter(|&&n| n > 1).count() + sidecars.len() - by_scan.len();
    let kept: BTreeSet<_> = files_below(&day.site.path("incoming")).into_iter().collect();
    let n_kept = kept.len();

    let peak =
        |rows: &mut dyn Iterator<Item = &Row>| rows.map(|row| row.peak_mib).fold(0.0, f64::max);
    let until = |n: usize| day.rows.iter().take_while(move |row| row.n_arrived <= n);
    let at_50 = peak(&mut until(60));
    let at_full = peak(&mut until(WARM));
    let overall = peak(&mut day.rows.iter());
    let handles =
        |rows: &mut dyn Iterator<Item = &Row>| rows.map(|row| row.handles).max().unwrap_or(0);
    let (few, many) = (handles(&mut until(WARM)), handles(&mut day.rows.iter()));
    let disk =
        |rows: &mut dyn Iterator<Item = &Row>| rows.map(|row| row.state_mib).fold(0.0, f64::max);
    let (disk_full, disk_most) = (disk(&mut until(WARM)), disk(&mut day.rows.iter()));
    eprintln!(
        "{} scans in {:.0} s, {} starts, {} kills, {} copies: {} lost, {n_twice} twice, {} of {} \
         refused files in quarantine, {n_kept} files in incoming\n\
         peak memory {overall:.0} MiB ({at_50:.0} at scan 50, {at_full:.0} at {WARM}); most \
         handles {many} ({few} at {WARM}); most state {disk_most:.1} MiB \
         ({disk_full:.1} at {WARM})",
        day.n_arrived,
        day.started.elapsed().as_secs_f64(),
        day.n_starts,
        day.n_kills,
        day.copies,
        lost.len(),
        day.entries(),
        day.refused,
    );
    assert!(lost.is_empty(), "lost: {lost:?}");
    assert_eq!(n_twice, 0);
    assert_eq!(day.entries(), day.refused, "one entry per refused file");
    assert_eq!(n_kept, day.n_arrived + day.copies, "originals stay");
    assert!(overall <= 1.2 * at_50.max(at_full), "memory grows");
    assert!(many <= few + 16, "file handles grow");
    assert!(disk_most <= 2.0 * disk_full, "the state grows");
}
