//! The values of every label: what may stand between the braces of a series.

/// An enum whose values are the values of one label.
macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$value_doc])* $value,)+ }

        impl $name {
            /// Every value.
            pub const ALL: &[Self] = &[$(Self::$value,)+];

            /// The value as it stands in the label.
            pub fn name(self) -> &'static str {
                match self { $(Self::$value => $text,)+ }
            }
        }
    };
}

label! {
    /// How a file was first noticed.
    SeenBy {
        /// The file system told.
        Event = "event",
        /// A listing of the folder found it.
        Scan = "scan",
    }
}

label! {
    /// What became of a file at intake.
    IngestResult {
        /// It waits for the encoder.
        Accepted = "accepted",
        /// Its voxels and affine are known.
        Duplicate = "duplicate",
        /// A series that is no structural MR image; it was left alone.
        Ignored = "ignored",
        /// It lies in quarantine.
        Quarantined = "quarantined",
    }
}

label! {
    /// What started a listing of the whole incoming folder.
    RescanTrigger {
        /// The start of the daemon.
        Start = "start",
        /// The interval of the configuration.
        Interval = "interval",
        /// The kernel lost events.
        Overflow = "overflow",
        /// A reload of the configuration.
        Reload = "reload",
    }
}

label! {
    /// Where a study is on its way from file to result.
    Stage {
        /// The file may still grow.
        Settle = "settle",
        /// Read, checked, decoded.
        Decode = "decode",
        /// Made into the canonical volume.
        Preprocess = "preprocess",
        /// Slices go through the encoder.
        Encode = "encode",
        /// Compared with its window.
        Score = "score",
        /// Results are written.
        Write = "write",
    }
}

label! {
    /// Of a device's memory.
    MemoryState {
        /// In use.
        Used = "used",
        /// In all.
        Total = "total",
    }
}

label! {
    /// What the encoder changed to after it failed.
    Fallback {
        /// Fewer slices per forward pass.
        SmallerBatch = "smaller_batch",
        /// The CPU instead of the device.
        Cpu = "cpu",
    }
}

label! {
    /// How a scoring run ended.
    ScoreResult {
        /// Every member has its scores.
        Ok = "ok",
        /// The window holds too few studies.
        SkippedTooFew = "skipped_too_few",
    }
}

label! {
    /// What started a scoring run.
    Trigger {
        /// A study joined the window.
        NewStudy = "new_study",
        /// A start or a changed configuration.
        Reload = "reload",
    }
}

label! {
    /// Kind of a result file.
    OutputKind {
        /// Anomaly score per voxel.
        ScoreMap = "score_map",
        /// Voxels above the threshold.
        Mask = "mask",
        /// The JSON record.
        Sidecar = "sidecar",
        /// The picture for people.
        Picture = "png",
    }
}

label! {
    /// Why a study's tokens were removed.
    EvictionReason {
        /// The window was full.
        Window = "window",
        /// The same, and there had never been enough for a result.
        Unscored = "unscored",
    }
}

label! {
    /// A folder that the daemon uses.
    DirectoryKind {
        /// Where scans arrive.
        Incoming = "incoming",
        /// Store and journal.
        State = "state",
        /// Where results go.
        Output = "output",
        /// Where refused files go.
        Quarantine = "quarantine",
    }
}

label! {
    /// Why the daemon takes no work.
    PauseReason {
        /// Too little space is left.
        DiskLow = "disk_low",
        /// The site's own preprocessing is not there.
        PreprocessGone = "preprocess_gone",
    }
}

/// Values of the label `class`: those of
/// [`ScanError::class`](crate::domain::error::ScanError::class), and `internal` for a panic.
pub(super) const ERROR_CLASSES: [&str; 6] =
    ["io", "input", "out_of_memory", "device", "store", INTERNAL];
pub(super) const INTERNAL: &str = "internal";

/// Label of every cohort beyond the cap.
pub(super) const OTHER_COHORTS: &str = "other";
