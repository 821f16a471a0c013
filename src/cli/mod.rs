//! The commands: one file each.
//!
//! Exit codes follow sysexits.h, so that systemd can tell what a restart would not mend: 64 wrong
//! arguments, 65 a refused scan, 69 no daemon, 70 a failure inside, 74 input or output, 78
//! settings. A command whose reader goes away ends without a word and with 141, as a shell says it.
//!
//! All modules here print with the macros below. Those of the standard library panic when nobody
//! reads any more, as in `oddscan eval --json | head`.

/// Prints to stdout; ends the command when that fails.
macro_rules! print {
    ($($text:tt)*) => { $crate::cli::print(format_args!($($text)*)) };
}

/// Prints a line to stdout; ends the command when that fails.
macro_rules! println {
    ($($text:tt)*) => { print!("{}\n", format_args!($($text)*)) };
}

/// Writes a line to stderr. A message that nobody can read is no reason to stop.
macro_rules! eprintln {
    ($($text:tt)*) => { $crate::cli::eprint(format_args!("{}\n", format_args!($($text)*))) };
}

mod bench;
mod check_config;
mod confine;
mod demo;
mod dicom;
mod eval;
mod intensity;
mod model;
mod quarantine;
mod score;
mod status;

use std::{
    env,
    error::Error,
    fmt,
    io::{self, Write},
    panic::{self, AssertUnwindSafe},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, Subcommand};

use crate::{
    compute::cpu::Instructions,
    engine::EngineError,
    service::{self, ServiceError},
};

/// Notices unusual brain MRI scans without training anything. Research use only.
///
/// oddscan compares every scan with the other scans of its window, piece by piece, through the eyes
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
        /// Settings; see `config/default.toml` for every key. Without it the defaults.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Score some files once: they are each other's window.
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

/// An error with the exit code that tells the shell and systemd about it.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    error: Box<dyn Error + Send + Sync>,
}

pub(crate) const USAGE: u8 = 64;
pub(crate) const REFUSED: u8 = 65;
pub(crate) const UNAVAILABLE: u8 = 69;
pub(crate) const INTERNAL: u8 = 70;
pub(crate) const IO: u8 = 74;
pub(crate) const CONFIG: u8 = 78;

/// What a shell says of a program that SIGPIPE has ended.
const NO_READER: u8 = 128 + 13;

impl Failure {
    pub(crate) fn new(code: u8, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code, error: error.into() }
    }

    /// Of writing to stdout.
    pub(crate) fn of_output(error: io::Error) -> Self {
        let has_reader = error.kind() != io::ErrorKind::BrokenPipe;
        Self::new(if has_reader { IO } else { NO_READER }, error)
    }
}

/// Unwinds to [`main`] on failure, so that temporary folders go and the daemon of a demo ends: the
/// default of SIGPIPE would leave both.
fn print(text: fmt::Arguments<'_>) {
    if let Err(error) = io::stdout().write_fmt(text) {
        panic::resume_unwind(Box::new(Failure::of_output(error)));
    }
}

fn eprint(text: fmt::Arguments<'_>) {
    io::stderr().write_fmt(text).ok();
}

/// What a command gives, or the failure to print that has ended it.
fn until_print_fails(work: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let failure = payload.downcast::<Failure>();
        Err(*failure.unwrap_or_else(|panic| panic::resume_unwind(panic)))
    })
}

impl From<ServiceError> for Failure {
    fn from(error: ServiceError) -> Self {
        let code = match &error {
            ServiceError::Config(_) => CONFIG,
            ServiceError::Engine(error) => engine_code(error),
            ServiceError::Folder { .. } | ServiceError::Listen { .. } => IO,
            ServiceError::Stage(_) | ServiceError::Crash { .. } | ServiceError::System(_) => {
                INTERNAL
            }
        };
        Self::new(code, error)
    }
}

/// A missing or unfit model is a matter of settings: no restart mends it.
pub(crate) fn engine_code(error: &EngineError) -> u8 {
    match error {
        EngineError::NoWeights(_)
        | EngineError::Weights { .. }
        | EngineError::Template(_)
        | EngineError::BrainNetwork(_)
        | EngineError::Hook(_)
        | EngineError::Landmarks { .. }
        | EngineError::Misfit(_) => CONFIG,
        EngineError::Device(_) => INTERNAL,
    }
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

/// Says what went wrong, and why.
fn say(error: &dyn Error) {
    eprintln!("oddscan: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  because: {error}");
        cause = error.source();
    }
}

/// Limits the instructions of the CPU where the environment says so, so that results can be
/// compared between processors to the last bit.
fn limit_instructions() -> Result<(), Failure> {
    const NAME: &str = "ODDSCAN_INSTRUCTIONS";
    let Ok(text) = env::var(NAME) else { return Ok(()) };
    let limit: Instructions = bench::word(&text).map_err(|_| {
        let needed = "portable, avx2, avx512, avx512_bf16 or amx is needed";
        Failure::new(USAGE, format!("{NAME} = {text:?}: {needed}"))
    })?;
    limit.limit();
    Ok(())
}

fn run(command: Command) -> Result<(), Failure> {
    limit_instructions()?;
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
