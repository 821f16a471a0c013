//! `oddscan demo`: runs the real daemon on a folder of its own and gives it one scan after another,
//! like a scanner.

pub(super) mod daemon;
mod phantom;
pub(super) mod scans;

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use super::{CONFIG, Failure, INTERNAL, USAGE, score::percent, status};
use crate::{
    config::Config,
    domain::finding::mask_ml,
    nifti::{self, Limits},
    pipeline::board::Status,
    report::{self, Sidecar, Standing},
};
use daemon::Daemon;
use scans::Scan;

/// The daemon starts to score at half of the scans, or at this number: some may be refused.
const MAX_MIN_SCANS: usize = 5;

/// The demo gives up after this time without any progress.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Use the scans of this folder instead of made-up brains. `<subject>_brain` masks and
    /// `<subject>_lesion` truths beside them are used, too.
    #[arg(long, value_name = "DIR")]
    scans: Option<PathBuf>,
    /// Work in this folder. It is created or must be empty, and everything in it is kept.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Keep everything, including scans, store and log. Otherwise only the results stay.
    #[arg(long)]
    keep: bool,
    /// Encode every n-th slice. A larger number is faster and less exact; the daemon's default is
    /// 2.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u8).range(1..=7))]
    slice_stride: u8,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let started = Instant::now();
    let folder = make_folder(arguments.dir.as_deref())?;
    let source = arguments.scans.as_deref();
    let scans = scans::of(source, &folder.join("scans"), scans::N_MADE_UP)?;

    let config = folder.join("config.toml");
    let address = free_address().map_err(Failure::of_file)?;
    let stride = arguments.slice_stride;
    fs::write(&config, settings(&folder, address, scans.len(), stride))
        .map_err(Failure::of_file)?;
    // The daemon would report the same faults, but only in its log.
    Config::load(Some(&config)).map_err(|error| Failure::new(CONFIG, error))?;

    println!("{} scans; the daemon works in {}", scans.len(), folder.display());
    let mut daemon = Daemon::start(&config, address, &folder)?;
    println!("metrics while it runs: http://{address}/metrics\n");

    feed(&mut daemon, &scans, &folder.join("incoming"))?;
    fs::write(folder.join("metrics.prom"), status::page(address, "/metrics")?)
        .map_err(Failure::of_file)?;
    daemon.stop()?;

    print_table(&scans, &folder.join("results"));
    if !arguments.keep && arguments.dir.is_none() {
        for spent in ["incoming", "scans", "state", "quarantine", "daemon.log", "config.toml"] {
            let path = folder.join(spent);
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.ok();
        }
    }

    println!("\nmaps, masks, pictures, sidecars: {}", folder.join("results").display());
    println!("metrics: {}", folder.join("metrics.prom").display());
    println!("took {:.0} s. Research use only.", started.elapsed().as_secs_f64());
    Ok(())
}

fn make_folder(named: Option<&Path>) -> Result<PathBuf, Failure> {
    let Some(named) = named else {
        let folder =
            tempfile::Builder::new().prefix("oddscan-demo-").tempdir().map_err(Failure::of_file)?;
        return Ok(folder.keep());
    };
    fs::create_dir_all(named).map_err(Failure::of_file)?;
    if fs::read_dir(named).map_err(Failure::of_file)?.next().is_some() {
        let text = format!("{} is not empty; name a new folder", named.display());
        return Err(Failure::new(USAGE, text));
    }
    named.canonicalize().map_err(Failure::of_file)
}

/// A free address on loopback.
pub(super) fn free_address() -> std::io::Result<SocketAddr> {
    TcpListener::bind(("127.0.0.1", 0))?.local_addr()
}

/// Settings for a few scans: short waits, and scoring starts early.
pub(super) fn settings(folder: &Path, address: SocketAddr, n_scans: usize, stride: u8) -> String {
    let path = |name: &str| toml::Value::from(folder.join(name).to_string_lossy().into_owned());
    format!(
        "[directories]\nincoming = {}\nresults = {}\nquarantine = {}\nstate = {}\n\
         [intake]\nsettle_secs = 1.0\nrescan_secs = 1.0\n\
         [tokens]\nslice_stride = {stride}\n\
         [window]\nmin_scans = {}\n\
         [results]\nidentity = \"path\"\n\
         [service]\nlisten = \"{address}\"\nmin_free_mib = 0\n",
        path("incoming"),
        path("results"),
        path("quarantine"),
        path("state"),
        n_scans.div_ceil(2).clamp(2, MAX_MIN_SCANS),
    )
}

/// Copies the scans into the incoming folder one by one, each after the daemon has accepted the one
/// before. Then waits for the last result.
fn feed(daemon: &mut Daemon, scans: &[Scan], incoming: &Path) -> Result<(), Failure> {
    let bar = progress_bar(scans.len());
    let mut dropped = 0;
    let mut last = (daemon.status()?, Instant::now());
    loop {
        let status = daemon.status()?;
        let n_taken = (status.n_accepted + status.n_duplicates + status.n_quarantined) as usize;
        if dropped < scans.len() && n_taken == dropped && status.n_waiting == 0 {
            scans[dropped].drop_into(incoming).map_err(Failure::of_file)?;
            let line = format!("dropped {}", scans[dropped].name());
            if bar.is_hidden() {
                eprintln!("{line}")
            } else {
                bar.println(line)
            }
            dropped += 1;
        }
        show(&bar, &status);
        if is_done(&status, scans.len()) {
            bar.finish_and_clear();
            return Ok(());
        }
        if last.0 != status {
            last = (status, Instant::now());
        } else if last.1.elapsed() > PATIENCE {
            let text = format!("the daemon makes no progress any more: {}", status.line());
            return Err(Failure::new(INTERNAL, text));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Whether every scan is a member, a duplicate or refused, and every result is up to date.
pub(super) fn is_done(status: &Status, n_scans: usize) -> bool {
    let n_members: usize = status.cohorts.values().map(|cohort| cohort.n_scans).sum();
    let n_outdated: usize = status.cohorts.values().map(|cohort| cohort.n_outdated).sum();
    let n_aside = (status.n_duplicates + status.n_quarantined) as usize;
    n_members + n_aside >= n_scans && n_outdated == 0
}

fn progress_bar(n_scans: usize) -> ProgressBar {
    let bar = ProgressBar::new(n_scans as u64);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}");
    bar.set_style(style.expect("a template without faults"));
    bar
}

fn show(bar: &ProgressBar, status: &Status) {
    let n_members: usize = status.cohorts.values().map(|cohort| cohort.n_scans).sum();
    bar.set_position(n_members as u64);
    bar.set_message(status.line());
}

fn print_table(scans: &[Scan], results: &Path) {
    println!("{:<28} {:>7} {:>11} {:>8}  known lesion", "scan", "score", "percentile", "mask ml");
    for scan in scans {
        let sidecar = report::read_sidecar(&results.join(format!("{}_anomaly.json", scan.stem())));
        match sidecar {
            Ok(sidecar) => println!("{}", row(scan, &sidecar, results)),
            Err(_) => println!("{:<28} refused; see quarantine", scan.stem()),
        }
    }
}

fn row(scan: &Scan, sidecar: &Sidecar, results: &Path) -> String {
    let (Standing::Scored, Some(scores)) = (&sidecar.standing, &sidecar.scores) else {
        return format!("{:<28} waits for more scans of its kind", scan.stem());
    };
    let mask = sidecar.files.as_ref().map(|files| results.join(&files.mask.name));
    let lesion = mask.and_then(|mask| dice(&mask, scan.truth()?)).map_or("-".into(), |dice| {
        let hit = if dice > 0.0 { "hit" } else { "missed" };
        format!("{hit}, Dice {dice:.2}")
    });
    format!(
        "{:<28} {:>7.3} {:>11} {:>8.1}  {lesion}",
        scan.stem(),
        scores.top1_mean,
        percent(scores.percentile),
        mask_ml(&sidecar.clusters),
    )
}

/// Overlap of the mask with the truth, 2 |A and B| / (|A| + |B|). `None` if one cannot be read.
fn dice(mask: &Path, truth: &Path) -> Option<f64> {
    let limits = Limits { max_file_bytes: 1 << 30, max_voxels: 1 << 28 };
    let read = |path| nifti::read_mask(path, &limits).ok();
    let (mask, truth) = (read(mask)?, read(truth)?);

    let count = |inside: &[bool]| inside.iter().filter(|&&inside| inside).count();
    let n_both = mask.inside.iter().zip(&truth.inside).filter(|(a, b)| **a && **b).count();
    let n_all = count(&mask.inside) + count(&truth.inside);
    (mask.shape == truth.shape && n_all > 0).then(|| 2.0 * n_both as f64 / n_all as f64)
}
