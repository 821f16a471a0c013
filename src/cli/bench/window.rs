//! `oddscan bench window`: what a scan that joins a full window costs, with the store on this disk.

use std::{path::PathBuf, time::Instant};

use serde::Serialize;

use super::{How, devices, random_tokens};
use crate::{
    cli::{Failure, INTERNAL, USAGE},
    compute::weights::{Architecture, VitWeights},
    config::Config,
    domain::{
        PairDistances,
        acquisition::AcquisitionFacts,
        cohort::CohortKey,
        error::ScanError,
        scan::{ScanId, ScanRecord, ScanState},
    },
    numeric::{projection::Normal, scoring::PairColumns, token::TokenGrid},
    pipeline::steps::{self, Distances, Member},
    store::Store,
};

#[derive(clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Scans in the window; several sizes show the growth.
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
    /// Where the store is made, and removed afterwards. 200 scans need 3 GB.
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    #[command(flatten)]
    pub(super) how: How,
}

/// What one size of window costs.
#[derive(Serialize)]
struct Cost {
    scans: usize,
    /// Distances of a new scan to all others, with reading and keeping them.
    join_seconds: f64,
    /// All scores of the window again, from the kept distances.
    rescore_seconds: f64,
    disk_bytes: u64,
    /// Largest memory of the process so far.
    peak_bytes: u64,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    if arguments.tokens == 0 || arguments.channels == 0 || arguments.grids == 0 {
        return Err(Failure::new(USAGE, "--tokens, --channels and --grids count from 1"));
    }
    let tiny = Architecture::named("dinov2_vits14").expect("is one of the names");
    let tiny = VitWeights::random(tiny, 0);
    let (encoder, mut distances) = devices(&tiny, 1, None, arguments.how.device)?;
    drop(encoder);
    for &scans in &arguments.scans {
        if scans < 2 {
            return Err(Failure::new(USAGE, "--scans count from 2"));
        }
        let cost = measure(arguments, scans, distances.as_mut())
            .map_err(|error| Failure::new(INTERNAL, error))?;
        if arguments.how.json {
            let line = serde_json::to_string(&cost).map_err(|e| Failure::new(INTERNAL, e))?;
            println!("{line}");
        } else {
            let mib = |bytes: u64| bytes >> 20;
            println!(
                "{scans} scans: a new one joins in {:.2} s, all are scored again in {:.2} s; {} MiB on disk, \
                 {} MiB of memory",
                cost.join_seconds,
                cost.rescore_seconds,
                mib(cost.disk_bytes),
                mib(cost.peak_bytes)
            );
        }
    }
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
    let store = Store::open(folder.path())?;
    let config = Config::parse("")?;
    let ids: Vec<ScanId> = (0..n_scans).map(id).collect();
    let tokens = |index: usize| -> Vec<TokenGrid> {
        let seed = |grid: usize| (index * arguments.grids + grid) as u64;
        (0..arguments.grids)
            .map(|grid| random_tokens(seed(grid), arguments.tokens, arguments.channels))
            .collect()
    };
    let mut members = Vec::new();
    for (index, &id) in ids.iter().enumerate() {
        // The cells are those of every scan; drawing new features for each would take longest.
        let grids = tokens(index % 4);
        store.put_encoded(&record(id, index), &grids)?;
        members.push(Member {
            id,
            parts: steps::parts_of(&grids, arguments.grids),
            is_reference: true,
        });
    }
    let mut normal = Normal::new(9);
    let n_tokens: Vec<usize> = members[0].parts.iter().map(|part| part.cells.len()).collect();
    for (index, &first) in ids[..n_scans - 1].iter().enumerate() {
        for &second in &ids[index + 1..n_scans - 1] {
            for (grid, &n_tokens) in n_tokens.iter().enumerate() {
                let mut column = || (0..n_tokens).map(|_| 1.0 + normal.uniform() as f32).collect();
                let columns = PairColumns { first_to_second: column(), second_to_first: column() };
                store.put_columns(first, second, grid, &columns)?;
            }
        }
    }
    store.flush()?;
    let started = Instant::now();
    let new = ids[n_scans - 1];
    for grid in 0..arguments.grids {
        let own = store.tokens(&new, grid)?.ok_or("tokens of the new scan")?;
        for &other in &ids[..n_scans - 1] {
            let theirs = store.tokens(&other, grid)?.ok_or("tokens of a member")?;
            let columns = distances.nearest(&own, &theirs, config.scoring.reach)?;
            store.put_columns(new, other, grid, &columns)?;
        }
    }
    let join_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let mut kept = Kept { store: &store, n_tokens };
    let scores = steps::score_members(&members, &[9], &config.scoring, &mut kept)?;
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

/// The columns of the store.
struct Kept<'a> {
    store: &'a Store,
    n_tokens: Vec<usize>,
}

impl Distances for Kept<'_> {
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
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&(index as u64).to_be_bytes());
    ScanId(bytes)
}

fn record(id: ScanId, index: usize) -> ScanRecord {
    let cohort = CohortKey { name: "t1w".into(), method: "bench".into() };
    ScanRecord {
        id,
        state: ScanState::Encoded,
        source_name: format!("{index}_T1w.nii.gz"),
        output_stem: format!("{index}_T1w"),
        cohort,
        acquisition: AcquisitionFacts::default(),
        notes: Vec::new(),
        sequence: index as u64,
        first_seen_secs: 0,
        attempts: 0,
        alignment: None,
        preprocess: None,
        encoded: None,
        reported: None,
    }
}

/// Largest resident memory of this process, bytes; 0 where the system does not tell.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
