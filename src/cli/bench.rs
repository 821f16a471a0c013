//! `oddscan bench`: how fast this machine encodes and compares, which takes most of the time.

mod common;
mod pipeline;
mod window;

use std::{path::PathBuf, time::Instant};

use serde::Serialize;

use self::common::{How, devices, distances_on, options, random_tokens, word};
use super::{CONFIG, Failure, INTERNAL, USAGE};
use crate::{
    compute::{
        Precision,
        cpu::{CpuDistances, CpuEncoder, Instructions},
    },
    domain::{
        GridName, SliceEncoder,
        scan::ScanId,
        weights::{Architecture, VitWeights},
    },
    model::load_weights,
    numeric::{
        projection::Normal,
        scoring::SearchReach,
        slice::{ImageBatch, least_cosine},
        token::TokenGrid,
    },
};

pub(super) use common::limit_instructions;

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Measure how many slices per second the network encodes.
    Encode(Encode),
    /// Measure the distances of one new scan to its window, in seconds.
    Score(Score),
    /// Measure the same with the store on this disk, and with all scores, for several window sizes.
    Window(window::Arguments),
    /// Measure seconds per scan and stage in the whole daemon, with made-up scans.
    Pipeline(pipeline::Arguments),
}

#[derive(clap::Args)]
pub(super) struct Encode {
    /// Network with random weights: dinov2_vits14, dinov2_vitb14 or dinov2_vitl14.
    #[arg(long, default_value = "dinov2_vits14", conflicts_with = "weights")]
    network: String,
    /// A weights file instead of random weights.
    #[arg(long, value_name = "FILE")]
    weights: Option<PathBuf>,
    /// Number format of the matrix products: f16, bf16 or f32. The CPU supports f32 and, if the
    /// processor has it, bf16. Without this option, like "auto" in the settings.
    #[arg(long, value_parser = word::<Precision>)]
    precision: Option<Precision>,
    /// Slices per forward pass.
    #[arg(long, default_value_t = 56)]
    batch: usize,
    /// Slices per repetition.
    #[arg(long, default_value_t = 672)]
    slices: usize,
    /// Slices whose features the device averages, as many as a token pools. --batch and --slices
    /// are rounded up to whole groups.
    #[arg(long, default_value_t = 7)]
    group: usize,
    /// Edge of a slice in pixels.
    #[arg(long, default_value_t = 224)]
    side: usize,
    /// Last block to compute; its features are returned. Default: the last block of the network.
    #[arg(long)]
    layer: Option<usize>,
    #[command(flatten)]
    how: How,
}

#[derive(clap::Args)]
pub(super) struct Score {
    /// Approximate number of tokens per scan.
    #[arg(long, default_value_t = 2300)]
    tokens: usize,
    /// Features per token.
    #[arg(long, default_value_t = 384)]
    channels: usize,
    /// Scans in the window without the new one.
    #[arg(long, default_value_t = 200)]
    window: usize,
    /// Grids of tokens per scan: one for each layer and view.
    #[arg(long, default_value_t = 1)]
    grids: usize,
    /// Patches to search around a token; 0 searches the whole volume.
    #[arg(long, default_value_t = 1)]
    reach: usize,
    /// Only for the CPU and the whole volume: bf16 finds candidates with bf16 products if the
    /// processor has them; f32 does not use them.
    #[arg(long, value_parser = word::<Precision>, default_value = "bf16")]
    precision: Precision,
    #[command(flatten)]
    how: How,
}

/// What was measured.
#[derive(Serialize)]
struct Measured {
    what: &'static str,
    device: String,
    settings: String,
    /// Median seconds of one repetition.
    seconds: f64,
    /// Fastest and slowest repetition.
    range: [f64; 2],
    /// Work per second.
    rate: f64,
    /// Unit of `rate`.
    unit: &'static str,
    /// Additions and multiplications of the matrix products per second, 10^9.
    gflops: f64,
    /// Smallest cosine between the features of a patch here and from the CPU engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    cosine: Option<f64>,
}

pub(super) fn run(command: &Command) -> Result<(), Failure> {
    if let Command::Encode(Encode { how, .. })
    | Command::Score(Score { how, .. })
    | Command::Window(window::Arguments { how, .. }) = command
    {
        how.instructions.limit();
    }
    match command {
        Command::Encode(arguments) => encode(arguments),
        Command::Score(arguments) => score(arguments),
        Command::Window(arguments) => window::run(arguments),
        Command::Pipeline(arguments) => pipeline::run(arguments),
    }
}

fn encode(arguments: &Encode) -> Result<(), Failure> {
    let weights = match &arguments.weights {
        Some(path) => load_weights(path).map_err(|error| Failure::new(CONFIG, error))?,
        None => VitWeights::random(
            Architecture::named(&arguments.network)
                .ok_or_else(|| Failure::new(USAGE, "no such network; see --help"))?,
            0,
        ),
    };
    let weights = weights.into_grey();
    let architecture = weights.architecture;
    let (side, layer) = (arguments.side, arguments.layer.unwrap_or(architecture.depth));
    if side == 0 || !side.is_multiple_of(architecture.patch) {
        let patch = architecture.patch;
        return Err(Failure::new(USAGE, format!("--side {side} is not a multiple of {patch}")));
    }
    if layer == 0 || layer > architecture.depth || arguments.batch == 0 || arguments.group == 0 {
        return Err(Failure::new(USAGE, "--layer, --batch and --group must be at least 1"));
    }

    let options = options(layer, arguments.precision);
    let (mut encoder, _) = devices(&weights, &options, arguments.how.device)?;

    let mut normal = Normal::new(1);
    let image = side * side;
    let group = arguments.group;
    let (batch, slices) =
        (arguments.batch.next_multiple_of(group), arguments.slices.next_multiple_of(group));
    let mut batch_of = |n_images: usize| {
        let pixels = (0..n_images * image).map(|_| normal.uniform() as f32).collect();
        let mut images = ImageBatch::whole(n_images, side, architecture.patch, pixels);
        images.group = group;
        images.patches.truncate(n_images / group);
        images
    };

    let (whole, rest) = (batch_of(batch), batch_of(slices % batch));
    let once = || {
        for _ in 0..slices / batch {
            encoder.encode(&whole)?;
        }
        if rest.n_images() > 0 {
            encoder.encode(&rest)?;
        }
        Ok(())
    };
    let times = repeat(arguments.how.repeats, once)?;
    let device = encoder.device().to_owned();
    let (precision, with) = match device.as_str() {
        "cpu" => {
            let with = format!(" with {}", Instructions::in_use());
            (CpuEncoder::precision(&weights, &options), with)
        }
        _ => (options.precision_on_gpu(), String::new()),
    };
    let cosine = (device != "cpu" || precision != Precision::F32)
        .then(|| cosine_to_cpu(&mut *encoder, &weights, layer, side))
        .transpose()?;

    let n_patches = (side / architecture.patch).pow(2);
    let work = slices as f64;
    report(
        &times,
        work,
        work * architecture.operations(n_patches, layer),
        Measured {
            what: "encode",
            settings: format!(
                "{architecture} to block {layer}, {precision}{with}, {slices} slices of {side} px, batches of \
                 {batch}, averaged by {group}"
            ),
            device,
            cosine,
            unit: "slices/s",
            ..Measured::blank()
        },
        arguments.how.json,
    )
}

/// The smallest cosine between the features of a patch from `encoder` and from the CPU engine. The
/// two images have soft shapes, which are more like scans than noise is.
fn cosine_to_cpu(
    encoder: &mut dyn SliceEncoder,
    weights: &VitWeights,
    layer: usize,
    side: usize,
) -> Result<f64, Failure> {
    let pixel = |at: usize| {
        let (x, y) = (at % side, at / side % side);
        let (x, y, image) = (x as f32, y as f32, (at / (side * side)) as f32);
        0.5 + 0.25 * ((0.05 * x + image).sin() + (0.03 * x * (0.02 * y).cos()).cos())
    };
    let pixels = (0..2 * side * side).map(pixel).collect();

    let images = ImageBatch::whole(2, side, weights.architecture.patch, pixels);
    let mut reference = CpuEncoder::new(weights, &options(layer, Some(Precision::F32)));
    let [found, expected] = [encoder.encode(&images), reference.encode(&images)];
    let unwrapped = found.and_then(|found| Ok((found, expected?)));
    let (found, expected) = unwrapped.map_err(|error| Failure::new(INTERNAL, error))?;
    Ok(least_cosine(&found[0], &expected[0]))
}

fn score(arguments: &Score) -> Result<(), Failure> {
    let Score { tokens, channels, window, grids, reach, .. } = *arguments;
    if tokens == 0 || channels == 0 || window == 0 {
        return Err(Failure::new(USAGE, "--tokens, --channels and --window must be at least 1"));
    }

    let (device, mut distances) = distances_on(arguments.how.device)?;
    if device == "cpu" && arguments.precision == Precision::F32 {
        distances = Box::new(CpuDistances::in_single());
    }

    // Enough different members to exceed the caches. The rest of the window repeats them.
    let n_distinct = window.min(16);
    let new = random_tokens(0, tokens, channels);
    let members: Vec<TokenGrid> =
        (1..=n_distinct as u64).map(|seed| random_tokens(seed, tokens, channels)).collect();
    let search =
        std::num::NonZeroUsize::new(reach).map_or(SearchReach::WholeVolume, SearchReach::Patches);

    // A device that keeps tokens gets them only once, not for each pair.
    let name = |number: usize| GridName { scan: ScanId([number as u8; 32]), grid: 0 };
    let keep = |(number, tokens)| distances.keep(name(number), tokens);
    members
        .iter()
        .chain([&new])
        .enumerate()
        .try_for_each(keep)
        .map_err(|error| Failure::new(INTERNAL, error))?;

    let others: Vec<usize> = (0..window * grids).map(|other| other % n_distinct).collect();
    let names: Vec<GridName> = others.iter().map(|&other| name(other)).collect();
    let once = || {
        let found = distances.nearest_of_kept(name(n_distinct), &names, search)?;
        for (&other, _) in others.iter().zip(found).filter(|(_, found)| found.is_none()) {
            distances.nearest(&new, &members[other], search)?;
        }
        Ok(())
    };
    let times = repeat(arguments.how.repeats, once)?;

    let n_pairs = (window * grids) as f64;
    let n_tokens = new.n_tokens();
    let per_pair = match search {
        SearchReach::WholeVolume => 2.0 * (n_tokens * n_tokens * channels) as f64,
        SearchReach::Patches(_) => 0.0,
    };
    let range = if reach == 0 { "the whole volume".into() } else { format!("{reach} patches") };
    report(
        &times,
        n_pairs,
        n_pairs * per_pair,
        Measured {
            what: "score",
            device,
            settings: format!(
                "one scan against {window}, {grids} grids of {n_tokens} tokens of {channels} \
                 channels, within {range}"
            ),
            unit: "pairs/s",
            ..Measured::blank()
        },
        arguments.how.json,
    )
}

/// Seconds of each repetition, ascending.
fn repeat(
    n: usize,
    mut once: impl FnMut() -> Result<(), crate::domain::error::DeviceError>,
) -> Result<Vec<f64>, Failure> {
    let mut times = Vec::new();
    for _ in 0..=n.max(1) {
        let started = Instant::now();
        once().map_err(|error| Failure::new(INTERNAL, error))?;
        times.push(started.elapsed().as_secs_f64());
    }
    times.remove(0);
    times.sort_by(f64::total_cmp);
    Ok(times)
}

impl Measured {
    fn blank() -> Self {
        Self {
            what: "",
            device: String::new(),
            settings: String::new(),
            seconds: 0.0,
            range: [0.0; 2],
            rate: 0.0,
            unit: "",
            gflops: 0.0,
            cosine: None,
        }
    }
}

fn report(
    times: &[f64],
    work: f64,
    operations: f64,
    named: Measured,
    json: bool,
) -> Result<(), Failure> {
    let seconds = times[times.len() / 2];
    let result = Measured {
        seconds,
        range: [times[0], times[times.len() - 1]],
        rate: work / seconds,
        gflops: operations / seconds / 1e9,
        ..named
    };
    if json {
        println!("{}", serde_json::to_string(&result).map_err(|e| Failure::new(INTERNAL, e))?);
        return Ok(());
    }
    let Measured { what, device, settings, range, rate, unit, gflops, cosine, .. } = result;
    println!("{what} on {device}: {settings}");
    println!("  {rate:.1} {unit}; {seconds:.3} s ({:.3} to {:.3})", range[0], range[1]);
    if gflops > 0.0 {
        println!("  {gflops:.0} GFLOP/s in matrix products");
    }
    if let Some(cosine) = cosine {
        println!("  cosine to the CPU's features at least {cosine:.6}");
    }
    Ok(())
}
