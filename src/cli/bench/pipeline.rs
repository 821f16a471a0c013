//! `oddscan bench pipeline`: sends scans through the real daemon and reads the time of each stage
//! from its metrics. Then it encodes some of them while nothing else runs. The difference is the
//! cost of everything around the encoder.

use std::{
    collections::BTreeMap,
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::Serialize;

use super::common::word;
use crate::{
    cli::{
        CONFIG, Failure, INTERNAL, USAGE,
        demo::{
            self,
            daemon::Daemon,
            scans::{self, Scan},
        },
        engine_code, status,
    },
    config::{Config, DeviceChoice},
    domain::weights::{Architecture, VitWeights},
    engine::Engine,
    metrics::Stage,
    nifti::Limits,
    prepare::{canonical, read_and_find_brain},
};

#[derive(clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Number of made-up scans with voxels of 2 mm. All are in the incoming folder from the start.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(2..))]
    scans: u64,
    /// Use the scans of this folder instead, with `<subject>_brain` masks beside them, if there are
    /// any.
    #[arg(long, value_name = "DIR", conflicts_with = "scans")]
    from: Option<PathBuf>,
    /// Network with random weights: dinov2_vits14, dinov2_vitb14 or dinov2_vitl14.
    #[arg(long, default_value = "dinov2_vits14", conflicts_with = "weights")]
    network: String,
    /// A weights file instead of random weights.
    #[arg(long, value_name = "FILE")]
    weights: Option<PathBuf>,
    /// Device: auto, cuda or cpu.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Encode every n-th slice.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=7))]
    slice_stride: u8,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// The time that a scan takes.
#[derive(Serialize)]
struct Cost {
    scans: usize,
    device: String,
    /// From the first file to the last result, without the start of the daemon.
    seconds: f64,
    seconds_per_scan: f64,
    /// Seconds to encode a prepared scan while nothing else runs.
    seconds_encoding_alone: f64,
    /// Seconds that a scan spends in each stage. Stages run in parallel. The time to refresh stale
    /// results counts, too.
    stages: BTreeMap<&'static str, f64>,
    /// Share of the encoder in the time of all stages.
    encoder_share: f64,
    /// Share of busy time between the device's first batch and its last scan. `None` if that was
    /// too short to measure.
    device_busy_share: Option<f64>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let folder =
        tempfile::Builder::new().prefix("oddscan-bench-").tempdir().map_err(Failure::of_file)?;
    let made_up = folder.path().join("scans");
    let scans = scans::of(arguments.from.as_deref(), &made_up, arguments.scans)?;
    let (config, address) = write_settings(arguments, folder.path(), scans.len())?;
    let mut daemon = Daemon::start(&config, address, folder.path())?;
    let started = Instant::now();
    for scan in &scans {
        scan.drop_into(&folder.path().join("incoming")).map_err(Failure::of_file)?;
    }
    let mut rush = Rush::default();
    let (status, page) = loop {
        let status = daemon.status()?;
        let n_out = (status.n_duplicates + status.n_quarantined) as usize;
        let page = status::page(address, "/metrics")?;
        rush.look(Instant::now(), &page, scans.len().saturating_sub(n_out));
        if demo::is_done(&status, scans.len()) {
            break (status, page);
        }
        std::thread::sleep(Duration::from_millis(20));
    };

    let seconds = started.elapsed().as_secs_f64();
    daemon.stop()?;
    if status.n_quarantined > 0 {
        let text = format!("{} scans were refused", status.n_quarantined);
        return Err(Failure::new(INTERNAL, text));
    }

    let alone = encoding_alone(&config, &scans, folder.path())?;
    let cost = cost(scans.len(), seconds, alone, rush.busy_share(), &page);
    print(&cost, arguments.json)
}

const BUSY: &str = "oddscan_device_busy_seconds_total{device=\"";

/// The time from the device's first batch to its last scan. Stale results are refreshed after it.
#[derive(Default)]
struct Rush {
    /// Times of the first and the last look, each with the device's busy seconds until then.
    seen: Option<[(Instant, f64); 2]>,
    is_over: bool,
}

impl Rush {
    fn look(&mut self, now: Instant, page: &str, n_scans: usize) {
        let busy = sum(page, BUSY);
        if busy == 0.0 || self.is_over {
            return;
        }
        let first = self.seen.map_or((now, busy), |[first, _]| first);
        self.seen = Some([first, (now, busy)]);
        self.is_over = of_stage(page, "count", Stage::Encode) >= n_scans as f64;
    }

    fn busy_share(&self) -> Option<f64> {
        let [first, last] = self.seen?;
        let seconds = (last.0 - first.0).as_secs_f64();
        (seconds > 0.0).then(|| (last.1 - first.1) / seconds)
    }
}

/// Number of scans that are encoded again, evenly chosen from all.
const N_ALONE: usize = 4;

/// Seconds per scan from the canonical cube to tokens, with the daemon's settings, in this process.
fn encoding_alone(config: &Path, scans: &[Scan], folder: &Path) -> Result<f64, Failure> {
    let config = Config::load(Some(config)).map_err(|error| Failure::new(CONFIG, error))?;
    let Engine { mut tokeniser, method, .. } =
        Engine::start(&config).map_err(|error| Failure::new(engine_code(&error), error))?;
    let chosen = scans.iter().step_by(scans.len().div_ceil(N_ALONE));
    let mut times = Vec::new();
    for scan in chosen {
        let cube =
            read_and_find_brain(scan.path(), scan.brain(), &Limits::NONE, &method, folder, || {})
                .and_then(|(_, source)| canonical(&source, &method, None))
                .map_err(|error| Failure::new(INTERNAL, error))?;
        let started = Instant::now();
        tokeniser
            .tokens(&cube.volume, |_| ControlFlow::Continue(()))
            .map_err(|error| Failure::new(INTERNAL, error))?;
        times.push(started.elapsed().as_secs_f64());
    }
    Ok(times.iter().sum::<f64>() / times.len() as f64)
}

/// Writes the settings, and the weights if they are random ones.
fn write_settings(
    arguments: &Arguments,
    folder: &Path,
    n_scans: usize,
) -> Result<(PathBuf, std::net::SocketAddr), Failure> {
    word::<DeviceChoice>(&arguments.device)
        .map_err(|_| Failure::new(USAGE, "--device is auto, cuda or cpu"))?;
    let weights = match &arguments.weights {
        Some(path) => path.canonicalize().map_err(Failure::of_file)?,
        None => {
            let network = Architecture::named(&arguments.network)
                .ok_or_else(|| Failure::new(USAGE, "no such network; see --help"))?;
            let path = folder.join("random.safetensors");
            let random = VitWeights::random(network, 0).to_safetensors(true);
            fs::write(&path, random).map_err(Failure::of_file)?;
            path
        }
    };

    let address = demo::free_address().map_err(Failure::of_file)?;
    let settings = demo::settings(folder, address, n_scans, arguments.slice_stride);
    let weights = toml::Value::from(weights.to_string_lossy().into_owned());
    let encoder = format!("[encoder]\nweights = {weights}\ndevice = \"{}\"\n", arguments.device);
    let config = folder.join("config.toml");
    fs::write(&config, settings + &encoder).map_err(Failure::of_file)?;
    Config::load(Some(&config)).map_err(|error| Failure::new(CONFIG, error))?;
    Ok((config, address))
}

/// Reads the costs from the daemon's metrics.
fn cost(
    scans: usize,
    seconds: f64,
    alone: f64,
    device_busy_share: Option<f64>,
    page: &str,
) -> Cost {
    let per_scan = |&stage: &Stage| (stage.name(), of_stage(page, "sum", stage) / scans as f64);
    let stages: BTreeMap<&str, f64> = Stage::ALL.iter().map(per_scan).collect();
    let device = page.lines().find_map(|line| line.strip_prefix(BUSY)?.split('"').next());
    Cost {
        scans,
        device: device.unwrap_or_default().to_owned(),
        seconds,
        seconds_per_scan: seconds / scans as f64,
        seconds_encoding_alone: alone,
        encoder_share: stages[Stage::Encode.name()] / stages.values().sum::<f64>(),
        device_busy_share,
        stages,
    }
}

/// `sum` or `count` of the times of a stage.
fn of_stage(page: &str, what: &str, stage: Stage) -> f64 {
    let name = format!("oddscan_stage_duration_seconds_{what}{{stage=\"{}\"}}", stage.name());
    sum(page, &name)
}

/// Sum of the samples whose names and labels begin with `start`.
fn sum(page: &str, start: &str) -> f64 {
    let samples = page.lines().filter(|line| line.starts_with(start));
    samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

fn print(cost: &Cost, json: bool) -> Result<(), Failure> {
    if json {
        println!("{}", serde_json::to_string(cost).map_err(|e| Failure::new(INTERNAL, e))?);
        return Ok(());
    }
    let (each, alone) = (cost.seconds_per_scan, cost.seconds_encoding_alone);
    println!(
        "{} scans through the daemon on {}: {each:.2} s each, {:.2} times the time of encoding alone ({alone:.2} s)",
        cost.scans,
        cost.device,
        each / alone
    );
    for (stage, seconds) in &cost.stages {
        println!("  {stage:<12} {seconds:>8.3} s per scan");
    }
    let busy = cost.device_busy_share.map_or_else(
        || "too short to measure how busy the device was".to_owned(),
        |share| format!("device busy {:.0} % from its first batch to its last scan", 100.0 * share),
    );
    println!("  encoder {:.0} % of the stages' time; {busy}", 100.0 * cost.encoder_share);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_read_off_the_metrics() {
        let page = "oddscan_stage_duration_seconds_sum{stage=\"encode\"} 6\n\
                    oddscan_stage_duration_seconds_count{stage=\"encode\"} 2\n\
                    oddscan_stage_duration_seconds_sum{stage=\"write\"} 2\n\
                    oddscan_device_busy_seconds_total{device=\"cuda:0\"} 5\n";
        let cost = cost(2, 10.0, 4.0, Some(0.9), page);
        assert_eq!((cost.device.as_str(), cost.seconds_per_scan), ("cuda:0", 5.0));
        assert_eq!(
            (cost.stages["encode"], cost.stages["write"], cost.stages["score"]),
            (3.0, 1.0, 0.0)
        );
        assert_eq!(cost.encoder_share, 0.75);
    }

    #[test]
    fn the_device_is_busy_or_not_from_its_first_batch_to_its_last_scan() {
        let page = |busy: f64, n_encoded: usize| {
            format!(
                "oddscan_device_busy_seconds_total{{device=\"cpu\"}} {busy}\n\
                 oddscan_stage_duration_seconds_count{{stage=\"encode\"}} {n_encoded}\n"
            )
        };
        let start = Instant::now();
        let mut rush = Rush::default();
        for (seconds, busy, n_encoded) in
            [(0, 0.0, 0), (10, 1.0, 0), (12, 2.5, 1), (14, 4.0, 2), (99, 4.0, 2)]
        {
            rush.look(start + Duration::from_secs(seconds), &page(busy, n_encoded), 2);
        }
        assert_eq!(rush.busy_share(), Some(0.75));
        let mut at_once = Rush::default();
        at_once.look(start, &page(4.0, 2), 2);
        assert_eq!(at_once.busy_share(), None);
    }
}
