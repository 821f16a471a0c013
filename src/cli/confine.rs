//! `oddscan confine`: drops rights, then becomes another program. The daemon starts the site's
//! preprocessing this way, because limits must be set after the start of a process and before the
//! start of its program.

use std::{ffi::OsString, io, os::unix::process::CommandExt, process::Command};

use super::{Failure, INTERNAL};
use crate::process::{
    child::{self, Confines, Memory},
    hook::{CANNOT_EXECUTE, NOT_FOUND},
};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Largest size of each file that the program writes.
    #[arg(long)]
    file_bytes: u64,
    /// Largest memory that the program can write to.
    #[arg(long)]
    data_bytes: Option<u64>,
    /// Program and arguments.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let confines = Confines {
        memory: arguments.data_bytes.map_or(Memory::Unlimited, Memory::Data),
        max_file_bytes: arguments.file_bytes,
    };
    child::confine(&confines).map_err(|error| Failure::new(INTERNAL, error))?;
    let error = Command::new(&arguments.command[0]).args(&arguments.command[1..]).exec();
    // The exit codes of shells.
    let code = if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { CANNOT_EXECUTE };
    Err(Failure::new(code, error))
}
