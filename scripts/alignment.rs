//! How well scans are aligned to the template and their brains found, against brain masks that are
//! known.
//!
//! ```sh
//! cargo run --release --example alignment -- --template TEMPLATE --truth _brainmask SCANS...
//! ```
//!
//! For `head.nii.gz` the true brain is `head_brainmask.nii.gz`. Prints a table: the share of the
//! contrast that the template explains, Dice of the template's brain as the affine carries it, and
//! of the brain that was extracted.

use std::{error::Error, path::PathBuf, time::Instant};

use clap::Parser;
use oddscan::{
    nifti::{self, Limits},
    numeric::{
        brain,
        evaluation::Overlap,
        registration::{self, Template},
        volume::RawVolume,
    },
};

#[derive(Parser)]
struct Arguments {
    /// A stripped brain in standard space.
    #[arg(long)]
    template: PathBuf,
    /// What the names of the true brains have before `.nii.gz`.
    #[arg(long, default_value = "_brainmask")]
    truth: String,
    /// The scans hold a brain alone.
    #[arg(long)]
    stripped: bool,
    /// Whole heads.
    #[arg(required = true)]
    scans: Vec<PathBuf>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let template = Template::new(nifti::read_scan(&arguments.template, &Limits::NONE)?.volume);
    println!(
        "| scan | explained | template's brain | extracted | seconds |\n|---|---|---|---|---|"
    );
    for path in &arguments.scans {
        let scan = nifti::read_scan(path, &Limits::NONE)?.volume;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let stem = name.trim_end_matches(".nii.gz");
        let started = Instant::now();
        let found = match registration::register(&scan, &template, !arguments.stripped) {
            Ok(found) => found,
            Err(error) => {
                println!("| {stem} | {error} | | | {:.1} |", started.elapsed().as_secs_f64());
                continue;
            }
        };
        let extracted = brain::extract(&scan, &template, &found).ok_or("no brain")?;
        let took = started.elapsed().as_secs_f64();
        let carried = brain::carried(template.brain(), &found.to_scan, scan.shape, &scan.affine);
        let truth = path.with_file_name(format!("{stem}{}.nii.gz", arguments.truth));
        let (carried, extracted) = match nifti::read_mask(&truth, &Limits::NONE) {
            Ok(truth) => (
                dice(&scan, &carried, &truth.inside),
                dice(&scan, &extracted.inside, &truth.inside),
            ),
            Err(_) => ("no truth".to_owned(), "no truth".to_owned()),
        };
        println!("| {stem} | {:.3} | {carried} | {extracted} | {took:.1} |", found.explained);
    }
    Ok(())
}

fn dice(scan: &RawVolume, found: &[bool], truth: &[bool]) -> String {
    let n = scan.shape.n_voxels();
    let overlap = Overlap::of((0..n).map(|voxel| (found[voxel], truth[voxel])));
    overlap.dice().map_or("no brain".to_owned(), |dice| format!("{dice:.4}"))
}
