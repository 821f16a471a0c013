//! What the start had to do before the store could be used.

use serde::{Deserialize, Serialize};

/// A repair: a metric label and a word of the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Repair {
    /// A kill or a full disk had left a half-written snapshot.
    SnapshotRemoved,
    /// The snapshot of the store was damaged.
    SnapshotAside,
    /// The file with the store's own settings was damaged.
    ConfAside,
    /// The store was damaged, and an empty one takes its place.
    StoreAside,
}

impl Repair {
    /// Every repair, for metrics that must exist from the start.
    pub const ALL: [Self; 4] =
        [Self::SnapshotRemoved, Self::SnapshotAside, Self::ConfAside, Self::StoreAside];

    /// Name in labels and in the status.
    pub fn name(self) -> &'static str {
        match self {
            Self::SnapshotRemoved => "snapshot_removed",
            Self::SnapshotAside => "snapshot_aside",
            Self::ConfAside => "conf_aside",
            Self::StoreAside => "store_aside",
        }
    }

    /// What happened, and what it means, for logs and the status.
    pub fn words(self) -> &'static str {
        match self {
            Self::SnapshotRemoved => {
                "a half-written snapshot of the store was removed; nothing is lost"
            }
            Self::SnapshotAside => {
                "the snapshot of the store was damaged and was moved aside; the store was read \
                 without it, and nothing is lost"
            }
            Self::ConfAside => {
                "the store's own settings file (conf) was damaged and was made anew; nothing is \
                 lost"
            }
            Self::StoreAside => {
                "the store was damaged and was moved to lost+found in the state folder; an empty \
                 store took its place; check the disk"
            }
        }
    }
}
