//! How well heads are aligned to the template and their brains found, against brain masks that are
//! known.
//!
//! ```sh
//! cargo run --release --example alignment -- --template TEMPLATE --truth _brainmask \
//!     [--brain-weights WEIGHTS] [--out DIR] SCANS...
//! ```
//!
//! For `head.nii.gz` the true brain is `head_brainmask.nii.gz`. Prints a table with a row per scan:
//! which way found the brain, how distinct the alignment is, how well both ways agree; Dice of the
//! template's brain as the affine carries it; Dice of the brain and the 95th percentile of the
//! distance between its surface and the true one. `--out` writes the brains.

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use clap::Parser;
use oddscan::{
    compute::cpu::CpuBrainNetwork,
    domain::{
        BrainNetwork,
        head::{HeadBrain, brain_of_head, brain_of_session},
        scan::BrainSource,
    },
    model::load_brain_weights,
    nifti::{self, Limits},
    numeric::{
        brain,
        evaluation::Overlap,
        morphology::Grid,
        registration::{self, Template},
        volume::RawVolume,
    },
    pipeline::steps,
};

#[derive(Parser)]
struct Arguments {
    /// A stripped brain in standard space.
    #[arg(long)]
    template: PathBuf,
    /// What the names of the true brains have before `.nii.gz`.
    #[arg(long, default_value = "_brainmask")]
    truth: String,
    /// Weights of the networks for brain extraction; without them the template finds the brain.
    #[arg(long)]
    brain_weights: Option<PathBuf>,
    /// The scans hold a brain alone; only the alignment is looked at.
    #[arg(long)]
    stripped: bool,
    /// Carry the brain of `<subject>_T1w.nii.gz` over, as `alignment.use_session_t1` does.
    #[arg(long)]
    session: bool,
    /// Where to write the brains that were found.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Whole heads.
    #[arg(required = true)]
    scans: Vec<PathBuf>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let template = Template::new(nifti::read_scan(&arguments.template, &Limits::NONE)?.volume);
    let weights = arguments.brain_weights.as_deref().map(load_brain_weights).transpose()?;
    let network = weights.map(CpuBrainNetwork::new);
    let network = network.as_ref().map(|network| network as &dyn BrainNetwork);

    println!(
        "| scan | brain by | distinctness | agreement | template's brain | Dice | surface, mm | \
         seconds |\n|---|---|---|---|---|---|---|---|"
    );
    for path in &arguments.scans {
        let row = if arguments.stripped {
            stripped(path, &template)?
        } else {
            head(path, &template, network, &arguments)?
        };
        println!("| {} | {row} |", stem(path));
    }
    Ok(())
}

fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.trim_end_matches(".nii.gz").to_owned()
}

fn stripped(path: &Path, template: &Template) -> Result<String, Box<dyn Error>> {
    let scan = nifti::read_scan(path, &Limits::NONE)?.volume;
    let started = Instant::now();
    let found = registration::register(&scan, template, false);
    let took = started.elapsed().as_secs_f64();
    Ok(match found {
        Ok(found) => format!("| {:.2} | | | | | {took:.1}", found.distinctness),
        Err(error) => format!("{error} | | | | | | {took:.1}"),
    })
}

fn head(
    path: &Path,
    template: &Template,
    network: Option<&dyn BrainNetwork>,
    arguments: &Arguments,
) -> Result<String, Box<dyn Error>> {
    let nifti::Scan { volume: scan, grid } = nifti::read_scan(path, &Limits::NONE)?;
    let started = Instant::now();
    let mut found = brain_of_head(&scan, template, network);
    if let Some(t1) = steps::session_t1(path).filter(|_| arguments.session) {
        let t1 = nifti::read_scan(&t1, &Limits::NONE)?.volume;
        let carried = brain_of_session(&scan, &t1, found.as_ref().ok(), template, network)?;
        found = carried.map_or(found, Ok);
    }
    let took = started.elapsed().as_secs_f64();
    let HeadBrain { brain, alignment, from, agreement } = match found {
        Ok(found) => found,
        Err(error) => return Ok(format!("{error} | | | | | | {took:.1}")),
    };

    if let Some(out) = &arguments.out {
        let file = out.join(format!("{}_brain.nii.gz", stem(path)));
        fs::write(file, nifti::encode_mask(&grid, &brain.inside, "brain mask"))?;
    }
    let way = match from {
        BrainSource::Network => "network",
        BrainSource::SessionT1 => "session",
        _ => "template",
    };
    let agreement = agreement.map_or(String::new(), |dice| format!("{dice:.3}"));
    let truth = path.with_file_name(format!("{}{}.nii.gz", stem(path), arguments.truth));
    let carried = brain::carried(template.brain(), &alignment.to_scan, scan.shape, &scan.affine);
    let measured = match nifti::read_mask(&truth, &Limits::NONE) {
        Ok(truth) => format!(
            "{} | {} | {}",
            dice(&carried, &truth.inside),
            dice(&brain.inside, &truth.inside),
            surface(&scan, &brain.inside, &truth.inside)
        ),
        Err(_) => "no truth | | ".to_owned(),
    };
    Ok(format!("{way} | {:.2} | {agreement} | {measured} | {took:.1}", alignment.distinctness))
}

fn dice(found: &[bool], truth: &[bool]) -> String {
    let overlap = Overlap::of(found.iter().copied().zip(truth.iter().copied()));
    overlap.dice().map_or("no brain".to_owned(), |dice| format!("{dice:.4}"))
}

fn surface(scan: &RawVolume, found: &[bool], truth: &[bool]) -> String {
    let grid = Grid { shape: scan.shape, spacing: scan.affine.spacing_mm() };
    let distance = grid.surface_distance_95(found, truth);
    distance.map_or(String::new(), |mm| format!("{mm:.1}"))
}
