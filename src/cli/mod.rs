//! The commands: one file each.

#[macro_use]
mod print;

mod bench;
mod check_config;
mod confine;
mod demo;
mod dicom;
mod eval;
mod failure;
mod intensity;
mod model;
mod quarantine;
mod score;
mod status;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::service;
use print::{say, until_print_fails};

pub(crate) use failure::{
    CONFIG, Failure, INTERNAL, IO, NO_READER, REFUSED, UNAVAILABLE, USAGE, engine_code,
};

/// Notices unusual brain MRI scans without training anything. Research use only.
///
/// oddscan compares every scan with the other scans of its window, piece by piece, by the features
/// of a frozen vision model (DINOv2). A piece that finds no close match in other patients is
/// anomalous. It writes an anomaly map, a mask, a picture and a JSON file for every scan.
///
/// Start with `oddscan model fetch` and `oddscan demo`.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon: watch the incoming folder, score, write results, serve metrics.
    Run {
        /// Settings file; `config/default.toml` lists every key. Without this option, the defaults
        /// apply.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Score files once, each compared with the others.
    Score(score::Arguments),
    /// Measure how well maps and masks find lesions that are known.
    Eval(eval::Arguments),
    /// Measure how fast this machine encodes and compares.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Convert DICOM series to NIfTI, as the daemon does with what it finds.
    ///
    /// Prints a line of JSON for each series: converted, refused or skipped, with its files.
    Dicom(dicom::Arguments),
    /// Become another program, within limits. The daemon uses it.
    #[command(hide = true)]
    Confine(confine::Arguments),
    /// Learn landmarks for intensity standardisation.
    #[command(subcommand)]
    Intensity(intensity::Command),
    /// Check a settings file; lists all its faults at once, then looks for what it names.
    CheckConfig(check_config::Arguments),
    /// Show what the running daemon does.
    Status(status::Arguments),
    /// List refused files, put them back or delete them.
    #[command(subcommand)]
    Quarantine(quarantine::Command),
    /// Get, convert and show the encoder's weights.
    #[command(subcommand)]
    Model(model::Command),
    /// Try everything on made-up brains: starts the real daemon on a temporary folder.
    Demo(demo::Arguments),
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // clap writes help to stdout and faults to stderr; a closed pipe is no matter.
            error.print().ok();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let result = until_print_fails(|| run(arguments.command));
    let Err(failure) = result else { return ExitCode::SUCCESS };
    if failure.code != NO_READER {
        say(failure.error.as_ref());
    }
    ExitCode::from(failure.code)
}

fn run(command: Command) -> Result<(), Failure> {
    bench::limit_instructions()?;
    match command {
        Command::Run { config } => Ok(service::run(config)?),
        Command::Score(arguments) => score::run(arguments),
        Command::Dicom(arguments) => dicom::run(&arguments),
        Command::Confine(arguments) => confine::run(&arguments),
        Command::Eval(arguments) => eval::run(&arguments),
        Command::Bench(command) => bench::run(&command),
        Command::Intensity(command) => intensity::run(command),
        Command::CheckConfig(arguments) => check_config::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Quarantine(command) => quarantine::run(&command),
        Command::Model(command) => model::run(command),
        Command::Demo(arguments) => demo::run(&arguments),
    }
}
