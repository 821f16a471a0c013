//! The values of every label.

/// An enum whose values are the values of one label.
macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$value_doc])* $value,)+ }

        impl $name {
            /// Every value, in the order of declaration.
            pub const ALL: &[Self] = &[$(Self::$value,)+];

            /// The text of the value in the label.
            pub fn name(self) -> &'static str {
                match self { $(Self::$value => $text,)+ }
            }
        }
    };
}

label! {
    /// How a file was first noticed.
    SeenBy {
        /// The file system sent an event.
        Event = "event",
        /// A listing of the folder found it.
        Scan = "scan",
    }
}

label! {
    /// What intake decided about a file.
    IngestResult {
        /// Accepted: it waits for the encoder.
        Accepted = "accepted",
        /// A scan with the same voxels and affine is already known.
        Duplicate = "duplicate",
        /// A DICOM series that is no structural MR image. It stays where it is.
        Ignored = "ignored",
        /// Refused and moved to quarantine.
        Quarantined = "quarantined",
    }
}

label! {
    /// Whether anything stands out in a scan.
    Verdict {
        /// A region is unusual for the window.
        StandsOut = "stands_out",
        /// None is.
        NothingStandsOut = "nothing_stands_out",
        /// The window is too small to say, or its maps are of tokens alone.
        NotJudged = "not_judged",
    }
}

label! {
    /// What started a listing of the whole incoming folder.
    RescanTrigger {
        /// The start of the daemon.
        Start = "start",
        /// `intake.rescan_secs` has passed since the last one.
        Interval = "interval",
        /// The kernel lost events.
        Overflow = "overflow",
        /// A reload of the configuration.
        Reload = "reload",
    }
}

label! {
    /// The steps of a scan from file to result.
    Stage {
        /// The file may still grow.
        Settle = "settle",
        /// The file is read, checked and decoded.
        Decode = "decode",
        /// It becomes a canonical volume.
        Preprocess = "preprocess",
        /// Slices go through the encoder.
        Encode = "encode",
        /// The scan is compared with its window.
        Score = "score",
        /// Results are written.
        Write = "write",
    }
}

label! {
    /// Which part of a device's memory.
    MemoryState {
        /// In use by any program.
        Used = "used",
        /// Used and free together.
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
        /// The window holds scans of too few patients.
        SkippedTooFew = "skipped_too_few",
    }
}

label! {
    /// What started a scoring run.
    Trigger {
        /// A scan joined the window.
        NewScan = "new_study",
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
        /// The JSON with scores and facts.
        Sidecar = "sidecar",
        /// The PNG picture.
        Picture = "png",
    }
}

label! {
    /// Why a scan's tokens were removed.
    EvictionReason {
        /// The window was full, and the scan had a result.
        Window = "window",
        /// The window was full, and it never held enough patients to score the scan.
        Unscored = "unscored",
    }
}

label! {
    /// A folder that the daemon uses.
    DirectoryKind {
        /// `directories.incoming`, where scans arrive.
        Incoming = "incoming",
        /// The folder of store, ledger and archive.
        State = "state",
        /// The folder of the results.
        Output = "output",
        /// The folder of refused files.
        Quarantine = "quarantine",
    }
}

/// Values of the label `class`: those of
/// [`ScanError::class`](crate::domain::error::ScanError::class), and `internal` for a panic.
pub(super) const ERROR_CLASSES: [&str; 6] =
    ["io", "input", "out_of_memory", "device", "store", INTERNAL];
pub(super) const INTERNAL: &str = "internal";

/// Label of every cohort beyond the cap.
pub(super) const OTHER_COHORTS: &str = "other";
