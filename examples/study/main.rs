//! Which settings find known lesions best, and what does each part of a map add? This example
//! encodes every scan once for each way of encoding and keeps the tokens and the intensities. It
//! then scores them under each setting with the code of the daemon, and writes `study.md`.
//!
//! ```sh
//! cargo run --release --example study -- --cache CACHE --out docs/quality SCANS...
//! python3 docs/pictures.py
//! ```
//!
//! SCANS are folders. Each folder is one window: `<subject>_<modality>.nii.gz`, beside it
//! `<subject>_brain.nii.gz`, and for patients `<subject>_lesion.nii.gz`. Figures that lie in CACHE
//! are used again. Sections of `study.md` that a run does not measure stay as they are: `--only
//! map:` measures the maps with intensities alone. No test runs this example, because it needs such
//! scans.

mod encodings;
mod figures;
mod left_out;
mod page;
mod report;
mod scans;
mod scoring;
mod variants;

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use clap::Parser;

use self::{
    encodings::Encoding,
    figures::Outcome,
    scans::{Scan, encode, load},
    scoring::score,
    variants::{Variant, variants},
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Parser)]
struct Arguments {
    /// Where tokens, intensities and figures are kept.
    #[arg(long)]
    cache: PathBuf,
    /// Where `study.md` is written.
    #[arg(long)]
    out: PathBuf,
    /// Only variants whose names contain one of these texts. The names of maps with intensities
    /// begin with `map:`.
    #[arg(long)]
    only: Vec<String>,
    /// Folders of scans; each is a window of its own.
    #[arg(required = true)]
    scans: Vec<PathBuf>,
}

impl Arguments {
    fn chosen(&self) -> Vec<Variant> {
        let is_chosen =
            |v: &Variant| self.only.is_empty() || self.only.iter().any(|o| v.name.contains(o));
        variants().into_iter().filter(is_chosen).collect()
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let chosen = arguments.chosen();
    if chosen.is_empty() {
        let names: Vec<String> = variants().into_iter().map(|variant| variant.name).collect();
        let only = arguments.only.join(", ");
        return Err(format!("no variant has a name with {only}; there are: {names:#?}").into());
    }

    fs::create_dir_all(&arguments.cache)?;
    let mut outcomes = Vec::new();
    for folder in &arguments.scans {
        outcomes.extend(measure(&arguments.cache, folder, &chosen)?);
    }

    fs::create_dir_all(&arguments.out)?;
    let path = arguments.out.join("study.md");
    let before = if path.exists() { fs::read_to_string(&path)? } else { String::new() };
    fs::write(&path, page::updated(&before, &report::page(&outcomes)))?;
    Ok(())
}

/// What a window reaches under each variant; figures in the cache are used again.
fn measure(cache: &Path, folder: &Path, chosen: &[Variant]) -> Result<Vec<Outcome>> {
    let window = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut loaded: Option<(&str, Vec<Scan>)> = None;
    let mut outcomes = Vec::new();
    for variant in chosen {
        let path = cache.join(format!("{}-{window}.json", variant.digest()?));
        if !path.exists() {
            if loaded.as_ref().is_none_or(|(encoding, _)| *encoding != variant.encoding) {
                // Before the next scans are read, so that those of one encoding are in memory.
                drop(loaded.take());
                let encoding = Encoding::named(&variant.encoding);
                encode(cache, folder, encoding)?;
                loaded = Some((&variant.encoding, load(cache, folder, encoding)?));
            }
            let scans = loaded.as_ref().map_or(&[][..], |(_, scans)| scans);
            let outcome = score(scans, variant, &window)?;
            println!("{}", report::line(&outcome));
            fs::write(&path, serde_json::to_vec(&outcome)?)?;
        }
        outcomes.push(serde_json::from_slice::<Outcome>(&fs::read(&path)?)?);
    }
    Ok(outcomes)
}
