//! `oddscan bench window`: the cost of a scan that joins a full window, with the store on this
//! disk.

use std::{env, path::PathBuf, process::Command, time::Instant};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::common::{How, distances_on, random_tokens};
use crate::{
    cli::{Failure, INTERNAL, NO_READER, USAGE},
    config::Config,
    domain::{
        PairDistances,
        acquisition::AcquisitionFacts,
        error::ScanError,
        evidence::FineVolumes,
        scan::ScanId,
        window::Membership,
        window_scores::{ScoredMember, WindowDistances, parts_of, score_members},
    },
    numeric::{
        fine::FineVolume,
        geometry::Shape3,
        projection::Normal,
        scoring::PairColumns,
        token::{Foreground, TokenGrid},
    },
    pipeline::compare_grid,
    store::{Store, share_one_heap},
};

#[derive(clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Scans in the window; several sizes show how the cost grows.
    #[arg(long, num_args = 1.., default_values_t = [50, 100, 200])]
    scans: Vec<usize>,
    /// Tokens per grid.
    #[arg(long, default_value_t = 1800)]
    tokens: usize,
    /// Features per token.
    #[arg(long, default_value_t = 384)]
    channels: usize,
    /// Grids of tokens per scan: one for each view.
    #[arg(long, default_value_t = 3)]
    grids: usize,
    /// Folder for the store, which is removed afterwards. 200 scans need 3 GB, 400 need 9 GB.
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Memory for tokens and distances in MiB, like `window.memory_mib`. Default: that of the
    /// settings.
    #[arg(long)]
    memory_mib: Option<u64>,
    /// The one size that a process of its own measures.
    #[arg(long, hide = true)]
    only: Option<usize>,
    #[command(flatten)]
    pub(super) how: How,
}

/// The cost for one window size.
#[derive(Serialize)]
struct Cost {
    scans: usize,
    /// Time for the distances of a new scan to all others, including the store.
    join_seconds: f64,
    /// Time to score the whole window again from the stored distances.
    rescore_seconds: f64,
    disk_bytes: u64,
    /// Largest memory of a process that did only this, including filling the window.
    peak_bytes: u64,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    if arguments.tokens == 0 || arguments.channels == 0 || arguments.grids == 0 {
        return Err(Failure::new(USAGE, "--tokens, --channels and --grids must be at least 1"));
    }
    if arguments.scans.iter().any(|&scans| scans < 2) {
        return Err(Failure::new(USAGE, "--scans must be at least 2"));
    }

    if let Some(scans) = arguments.only {
        return run_one(arguments, scans);
    }
    if !arguments.how.json {
        println!("scans  joins s  scored s  disk MiB  memory MiB");
    }
    arguments.scans.iter().try_for_each(|&scans| run_apart(scans))
}

/// Measures one size in a process of its own. Otherwise memory of other sizes would count, too.
fn run_apart(scans: usize) -> Result<(), Failure> {
    let mut child = Command::new("/proc/self/exe");
    child.args(env::args_os().skip(1)).args(["--only", &scans.to_string()]);
    let status = child.status().map_err(|error| Failure::new(INTERNAL, error))?;
    if status.success() {
        return Ok(());
    }
    let code = if status.code() == Some(NO_READER.into()) { NO_READER } else { INTERNAL };
    Err(Failure::new(code, format!("the window of {scans} scans failed: {status}")))
}

fn run_one(arguments: &Arguments, scans: usize) -> Result<(), Failure> {
    share_one_heap();
    let (_, mut distances) = distances_on(arguments.how.device)?;
    let cost = measure(arguments, scans, distances.as_mut())
        .map_err(|error| Failure::new(INTERNAL, error))?;
    if arguments.how.json {
        let line = serde_json::to_string(&cost).map_err(|e| Failure::new(INTERNAL, e))?;
        println!("{line}");
        return Ok(());
    }
    println!(
        "{scans:>5}  {:>7.2}  {:>8.2}  {:>8}  {:>10}",
        cost.join_seconds,
        cost.rescore_seconds,
        cost.disk_bytes >> 20,
        cost.peak_bytes >> 20
    );
    Ok(())
}

type Error = Box<dyn std::error::Error + Send + Sync>;

fn measure(
    arguments: &Arguments,
    n_scans: usize,
    distances: &mut dyn PairDistances,
) -> Result<Cost, Error> {
    let folder = match &arguments.folder {
        Some(parent) => tempfile::tempdir_in(parent)?,
        None => tempfile::tempdir()?,
    };

    let config = Config::parse("")?;
    let memory = arguments.memory_mib.map_or(config.window.memory_bytes, |mib| mib << 20);
    let store = Store::open(&folder.path().join("store"), memory)?.store;
    let ids: Vec<ScanId> = (0..n_scans).map(id).collect();
    let parts = fill(&store, arguments, &ids)?;
    let n_tokens: Vec<usize> = parts.iter().map(|part| part.cells.len()).collect();
    let member = |&id: &ScanId| ScoredMember {
        id,
        parts: parts.clone(),
        membership: Membership::REFERENCE,
        weights: config.evidence.weights(&AcquisitionFacts::of("scan_FLAIR", [1.0; 3])),
    };
    let members: Vec<ScoredMember> = ids.iter().map(member).collect();
    let started = Instant::now();

    let new = ids[n_scans - 1];
    for grid in 0..arguments.grids {
        let (reach, others) = (config.scoring.reach, &ids[..n_scans - 1]);
        let n_pairs = compare_grid(&store, distances, reach, grid, new, others, || true)?;
        assert_eq!(n_pairs, others.len() as u64, "a pair for each of the others");
    }

    let join_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();

    let mut kept = Kept { store: &store, n_tokens };
    let scores = score_members(&members, &[9], &config.scoring, &mut kept, &KeptVolumes(&store))?;
    let rescore_seconds = started.elapsed().as_secs_f64();
    assert_eq!(scores.scans.len(), n_scans, "every scan has scores");
    Ok(Cost {
        scans: n_scans,
        join_seconds,
        rescore_seconds,
        disk_bytes: store.size_on_disk()?,
        peak_bytes: peak_memory(),
    })
}

/// Fills a store with scans of random tokens and with the distances between them, in the order in
/// which scans arrive at a daemon. The last scan has no distances yet.
fn fill(store: &Store, arguments: &Arguments, ids: &[ScanId]) -> Result<Vec<Foreground>, Error> {
    // Drawing features for each scan would take most of the time. Repeated features make no pair
    // faster.
    let drawn = |scan: u64| -> Vec<TokenGrid> {
        let seeds = (0..arguments.grids as u64).map(|grid| scan * arguments.grids as u64 + grid);
        seeds.map(|seed| random_tokens(seed, arguments.tokens, arguments.channels)).collect()
    };
    let drawn = [0, 1, 2].map(drawn);

    let parts = parts_of(&drawn[0], arguments.grids);
    let mut normal = Normal::new(9);
    let mut column = |part: &Foreground| -> Vec<f32> {
        part.cells.iter().map(|_| 1.0 + normal.uniform() as f32).collect()
    };

    let fine = random_volume();
    for (index, &new) in ids.iter().enumerate() {
        store.put_tokens(new, "bench", &drawn[index % drawn.len()], Some(&fine))?;
        let others = if index + 1 < ids.len() { &ids[..index] } else { &[] };
        for (grid, part) in parts.iter().enumerate() {
            for &other in others {
                let (first_to_second, second_to_first) = (column(part), column(part));
                let columns = PairColumns { first_to_second, second_to_first };
                store.put_columns(new, other, grid, &columns)?;
            }
        }
    }
    store.flush()?;
    Ok(parts)
}

/// Intensities of a ball of the size of a brain, in a cube of 176 mm.
fn random_volume() -> FineVolume {
    const SIDE: usize = 224;
    let shape = Shape3::cube(SIDE);
    let mut normal = Normal::new(7);
    let intensities: Vec<f32> = (0..shape.n_voxels()).map(|_| normal.uniform() as f32).collect();
    let is_inside = |offset: usize| {
        let centre = SIDE as f64 / 2.0;
        let apart = shape.voxel(offset).map(|at| (at as f64 - centre).powi(2));
        apart.iter().sum::<f64>() < 90.0_f64.powi(2)
    };
    let brain: Vec<bool> = (0..shape.n_voxels()).map(is_inside).collect();
    FineVolume::of(&intensities, &brain, None, SIDE, 176.0 / SIDE as f64)
}

/// The intensities of the store.
struct KeptVolumes<'a>(&'a Store);

impl FineVolumes for KeptVolumes<'_> {
    fn fine(&self, scan: ScanId) -> Result<FineVolume, ScanError> {
        Ok(self.0.fine(&scan)?.expect("all intensities were kept"))
    }
}

/// The columns of the store.
struct Kept<'a> {
    store: &'a Store,
    n_tokens: Vec<usize>,
}

impl WindowDistances for Kept<'_> {
    fn column(&mut self, of: ScanId, other: ScanId, grid: usize) -> Result<Vec<f32>, ScanError> {
        let column = self.store.column(of, other, grid, self.n_tokens[grid])?;
        Ok(column.expect("all columns were kept"))
    }

    fn columns(
        &mut self,
        of: ScanId,
        others: &[ScanId],
        grid: usize,
    ) -> Result<Vec<Vec<f32>>, ScanError> {
        let columns = self.store.columns(of, others, grid, self.n_tokens[grid])?;
        Ok(columns.into_iter().map(|column| column.expect("all columns were kept")).collect())
    }

    fn column_without(
        &mut self,
        of: ScanId,
        other: ScanId,
        grid: usize,
        _: &[usize],
    ) -> Result<Vec<f32>, ScanError> {
        self.column(of, other, grid)
    }
}

fn id(index: usize) -> ScanId {
    // In no order, like hashes of scans.
    ScanId(Sha256::digest(index.to_be_bytes()).into())
}

/// Largest resident memory of this process, bytes. 0 if the system does not report it.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
