//! What went wrong with a scan, classed by what happens next.

use std::{any::Any, error::Error, fmt, io};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a scan can never work: the name of its quarantine folder and a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuarantineReason {
    /// The file ends before its header says.
    Truncated,
    /// A checksum, a compressed stream or trailing data contradict the content.
    Corrupt,
    /// The header contradicts itself or the format.
    BadHeader,
    /// A valid file of a kind that is not supported.
    Unsupported,
    /// More voxels or bytes than the limits allow.
    TooLarge,
    /// Decompresses to far more than its header announces.
    Bomb,
    /// NaN or infinite voxels or geometry.
    NonFinite,
    /// No brain can be found: constant, empty, or hardly any foreground.
    NoBrain,
    /// It cannot be aligned to the template: it shows no brain, or one in an unusual pose.
    RegistrationFailed,
    /// The site's own preprocessing failed, or its output does not fit the scan.
    PreprocessFailed,
    /// The daemon crashed repeatedly while it processed the scan.
    Poison,
    /// The file exists but cannot be read.
    Io,
}

impl QuarantineReason {
    /// Every reason, for metrics that must exist from the start.
    pub const ALL: [Self; 12] = [
        Self::Truncated,
        Self::Corrupt,
        Self::BadHeader,
        Self::Unsupported,
        Self::TooLarge,
        Self::Bomb,
        Self::NonFinite,
        Self::NoBrain,
        Self::RegistrationFailed,
        Self::PreprocessFailed,
        Self::Poison,
        Self::Io,
    ];

    /// Folder name and metric label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::Corrupt => "corrupt",
            Self::BadHeader => "bad_header",
            Self::Unsupported => "unsupported",
            Self::TooLarge => "too_large",
            Self::Bomb => "bomb",
            Self::NonFinite => "non_finite",
            Self::NoBrain => "no_brain",
            Self::RegistrationFailed => "registration_failed",
            Self::PreprocessFailed => "preprocess_failed",
            Self::Poison => "poison",
            Self::Io => "io",
        }
    }
}

/// A PNG that shows a person why a scan was refused.
#[derive(Clone, PartialEq, Eq)]
pub struct RefusalPicture(pub Vec<u8>);

impl fmt::Debug for RefusalPicture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RefusalPicture({} bytes)", self.0.len())
    }
}

/// A refusal that a person can act on: the content of `reason.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Class of the refusal; names its folder.
    pub reason: QuarantineReason,
    /// What was found, with its value.
    pub found: String,
    /// What was needed, with its limit.
    pub needed: String,
    /// What the person can do.
    pub action: String,
    /// A picture for the person. It is a file beside `reason.json`; neither that file nor the
    /// ledger contains it.
    #[serde(skip)]
    pub picture: Option<RefusalPicture>,
}

impl Refusal {
    /// A refusal in four parts; none of them ends in a full stop.
    pub fn new(
        reason: QuarantineReason,
        found: impl Into<String>,
        needed: impl Into<String>,
        action: impl Into<String>,
    ) -> Self {
        let (found, needed, action) = (found.into(), needed.into(), action.into());
        Self { reason, found, needed, action, picture: None }
    }

    /// The same refusal with a PNG to look at.
    #[must_use]
    pub fn with_picture(self, png: Vec<u8>) -> Self {
        Self { picture: Some(RefusalPicture(png)), ..self }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reason, found, needed, action, picture: _ } = self;
        write!(f, "{}: found {found}; needed {needed}; {action}", reason.name())
    }
}

impl Error for Refusal {}

/// How the encoder or the distances can fail.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The device has too little memory for the batch.
    #[error("the device ran out of memory with a batch of {batch}")]
    OutOfMemory {
        /// Images in the batch.
        batch: usize,
    },
    /// Anything else; the device cannot be trusted afterwards.
    #[error("the device {device} failed: {message}")]
    Failed {
        /// Device in words.
        device: String,
        /// What the driver or the library said.
        message: String,
    },
}

/// What can go wrong between a file and its result.
#[derive(Debug, Error)]
pub enum ScanError {
    /// This scan will never work.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The outside world failed and may recover.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done, without a path (paths can name a patient).
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// One of our own folders failed; no scan is to blame.
    #[error("{doing}: {source}")]
    Internal {
        /// What was being done.
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// What the archive has of a scan is damaged or gone.
    #[error("{why}; put the scan into the incoming folder again")]
    Lost {
        /// What was found.
        why: String,
    },
    /// The store failed.
    #[error("the store failed")]
    Store(#[source] Box<dyn Error + Send + Sync>),
    /// The ledger failed; to continue could lose or duplicate a scan.
    #[error("the ledger failed")]
    Ledger(#[source] Box<dyn Error + Send + Sync>),
}

/// What the pipeline does after an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Try again later; the file stays where it is.
    Retry,
    /// Move the scan away with a reason.
    Quarantine,
    /// Give up what oddscan kept of the scan. Its file is read again if it is still there.
    Lose,
    /// Stop the service; the service manager starts it again.
    Fatal,
}

impl ScanError {
    /// What happens next.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Refused(_) => Disposition::Quarantine,
            Self::Io { .. } | Self::Internal { .. } => Disposition::Retry,
            Self::Lost { .. } => Disposition::Lose,
            Self::Device(_) | Self::Store(_) | Self::Ledger(_) => Disposition::Fatal,
        }
    }

    /// Label of the metric `stage_errors_total{class}`.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Refused(_) => "input",
            Self::Io { .. } | Self::Internal { .. } => "io",
            Self::Device(DeviceError::OutOfMemory { .. }) => "out_of_memory",
            Self::Device(DeviceError::Failed { .. }) => "device",
            Self::Lost { .. } | Self::Store(_) | Self::Ledger(_) => "store",
        }
    }
}

/// The message of a panic that was caught.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown").to_owned()
}
