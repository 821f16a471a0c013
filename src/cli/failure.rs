//! How a command fails: the error, and the exit code that tells the shell and systemd about it.
//!
//! Exit codes follow sysexits.h, so that systemd can tell what a restart would not mend: 64 wrong
//! arguments, 65 a refused scan, 69 no daemon, 70 a failure inside, 74 input or output, 78
//! settings. A command whose reader goes away ends quietly with 141, as a shell says it.

use std::{error::Error, io};

use crate::{engine::EngineError, service::ServiceError};

/// An error with the exit code that tells the shell and systemd about it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(super) code: u8,
    pub(super) error: Box<dyn Error + Send + Sync>,
}

pub(crate) const USAGE: u8 = 64;
pub(crate) const REFUSED: u8 = 65;
pub(crate) const UNAVAILABLE: u8 = 69;
pub(crate) const INTERNAL: u8 = 70;
pub(crate) const IO: u8 = 74;
pub(crate) const CONFIG: u8 = 78;

/// Exit code that a shell reports for a program ended by SIGPIPE.
pub(crate) const NO_READER: u8 = 128 + 13;

impl Failure {
    pub(crate) fn new(code: u8, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code, error: error.into() }
    }

    /// Of reading or writing a file.
    pub(crate) fn of_file(error: io::Error) -> Self {
        Self::new(IO, error)
    }

    /// Of writing to stdout.
    pub(crate) fn of_output(error: io::Error) -> Self {
        let has_reader = error.kind() != io::ErrorKind::BrokenPipe;
        Self::new(if has_reader { IO } else { NO_READER }, error)
    }
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
