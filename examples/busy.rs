//! How busy is a device while scans wait for it? A pause plays the device: no GPU is needed.
//! The figure shows how much of a device's time the stages around it can fill. On two cores a pause
//! of 2 ms per slice asks as much of each core as ViT-L on an H100 asks of sixteen cores.
//!
//! ```sh
//! cargo run --release --example busy -- SCANS
//! ```
//!
//! SCANS is a folder of NIfTI files. Heads need their brain masks beside them. Forty scans give a
//! steadier figure than ten. Any weights will do (`ODDSCAN_WEIGHTS`), because the network does not
//! run. No test runs this example, because it needs such scans.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use oddscan::{
    compute::tokenise::Tokeniser,
    config::Config,
    domain::{SliceEncoder, error::DeviceError},
    engine::{Engine, Method},
    metrics::Metrics,
    numeric::slice::{ImageBatch, PatchFeatures},
    pipeline::{Pipeline, Shared},
    store::{self, Store},
};

type Failure = Box<dyn std::error::Error>;

#[derive(Parser)]
struct Arguments {
    /// Folder of scans.
    scans: PathBuf,
    /// Milliseconds that the device takes for a slice.
    #[arg(long, default_value_t = 2.0)]
    per_slice: f64,
    /// Files that are read at once; 0 = as many as suit the processor.
    #[arg(long, default_value_t = 0)]
    read_at_once: usize,
}

/// A patch's features are its first pixels.
struct Pause {
    per_slice: Duration,
}

const PATCH: usize = 14;
const CHANNELS: usize = 384;

impl SliceEncoder for Pause {
    fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError> {
        let until = Instant::now() + self.per_slice * images.n_images() as u32;
        let (side, group) = (images.side, images.group * images.n_pixels());
        let mut values = Vec::new();
        for (pixels, patches) in images.pixels.chunks_exact(group).zip(&images.patches) {
            for &patch in patches {
                let (patch, per_row) = (patch as usize, side / PATCH);
                let first = PATCH * (patch / per_row * side + patch % per_row);
                let pixel = |channel: usize| {
                    let (y, x) = (channel / PATCH % PATCH, channel % PATCH);
                    pixels[first + y * side + x] + 1e-3 * channel as f32
                };
                values.extend((0..CHANNELS).map(pixel));
            }
        }
        thread::sleep(until.saturating_duration_since(Instant::now()));
        Ok(vec![PatchFeatures { channels: CHANNELS, values }])
    }

    fn patch(&self) -> usize {
        PATCH
    }

    fn channels(&self) -> usize {
        CHANNELS
    }

    fn device(&self) -> &str {
        "pause"
    }

    fn is_async(&self) -> bool {
        true
    }
}

fn main() -> Result<(), Failure> {
    let Arguments { scans, per_slice, read_at_once } = Arguments::parse();
    let per_slice = Duration::from_secs_f64(per_slice / 1000.0);
    store::share_one_heap();
    let site = tempfile::tempdir()?;
    let config = Config::parse(&settings(site.path(), read_at_once)?)?;
    for file in fs::read_dir(scans)? {
        let path = file?.path();
        let name = path.file_name().unwrap_or_default();
        fs::copy(&path, config.directories.incoming.join(name))?;
    }
    let engine = Engine::start(&config)?;
    let encoder = Box::new(Pause { per_slice });
    let batch = config.encoder.batch_slices;
    let tokeniser = Tokeniser::new(encoder, None, config.tokens.clone(), 1, batch);
    let store =
        Store::open(&config.directories.state.join("store"), config.window.memory_bytes)?.store;
    let method = Method { device: "pause".to_owned(), ..engine.method.clone() };
    let shared = Arc::new(Shared::new(config, store, Metrics::new(), method)?);
    let pipeline = Pipeline::start(&shared, Engine { tokeniser, ..engine })?;
    println!("{}", watch(&shared));
    shared.request_stop();
    pipeline.join();
    Ok(())
}

fn settings(site: &Path, read_at_once: usize) -> Result<String, Failure> {
    let mut settings = String::from("[directories]\n");
    for name in ["incoming", "results", "quarantine", "state"] {
        fs::create_dir(site.join(name))?;
        settings += &format!("{name} = {:?}\n", site.join(name));
    }
    settings += "[intake]\nsettle_secs = 1.0\nrescan_secs = 1.0\n";
    settings += &format!("read_at_once = {read_at_once}\n[service]\nmin_free_mib = 0\n");
    Ok(settings)
}

/// From the first batch until no scan waits for the device.
fn watch(shared: &Shared) -> String {
    let busy = || {
        let page = shared.metrics.render();
        let line = page.lines().find(|line| line.starts_with("oddscan_device_busy_seconds_total"));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or(0.0)
    };
    let is_done = || {
        let status = shared.board.status();
        let is_idle = status.n_settling == 0 && !shared.board.is_encoding();
        status.n_accepted > 0 && is_idle
    };
    let wait = |is_true: &dyn Fn() -> bool| {
        while !is_true() {
            thread::sleep(Duration::from_millis(5));
        }
        (Instant::now(), busy())
    };
    let first = wait(&|| busy() > 0.0);
    let last = wait(&is_done);
    let seconds = (last.0 - first.0).as_secs_f64();
    let n = shared.board.status().n_accepted as f64;
    format!(
        "{n} scans, {:.2} s each, {:.2} s of the device; busy {:.1} % of the time",
        seconds / n,
        last.1 / n,
        100.0 * (last.1 - first.1) / seconds
    )
}
