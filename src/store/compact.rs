//! When the store is copied into a smaller one.

use std::time::{Duration, Instant};

use super::{
    db::{Size, Store},
    error::StoreError,
    keeper::Progress,
};
use crate::domain::scan::ScanId;

/// Below this size a store is never copied, bytes. sled takes space in steps of half a MiB.
const SMALLEST: u64 = 2 << 20;

/// A store is copied only when it has grown by this factor since it was copied last. Otherwise a
/// store whose other entries outweigh tokens and distances would be copied for ever.
const GROWTH: f64 = 1.25;

/// The pause after a copy that could not be written.
const PAUSE: Duration = Duration::from_secs(600);

/// Size of the store after the last copy, bytes, in the table of facts.
const COPIED: &str = "copied";

/// What a step came to.
#[derive(Debug)]
pub enum Compaction {
    /// There is nothing to do.
    Idle,
    /// More is left to copy.
    Goes,
    /// The store now has this size, bytes; and had that one.
    Done {
        /// Before.
        from: u64,
        /// Now.
        to: u64,
    },
    /// The copy could not be written: the disk is full, or fails. The store is as it was.
    Failed(StoreError),
}

impl Store {
    /// Does a part of what makes the store smaller, about 0.2 s of work, if its size is more than
    /// `above` times the live data of these windows. The last step takes longer: about a second for
    /// a GB.
    ///
    /// # Errors
    /// If the store itself fails. A copy that cannot be written is no error.
    pub fn compact_step(
        &self,
        above: f64,
        windows: &[&[ScanId]],
    ) -> Result<Compaction, StoreError> {
        let mut found = self.size.lock().expect("no holder of the lock can panic");
        let pauses = found.failed_at.is_some_and(|at| at.elapsed() < PAUSE);
        if !self.keeper.is_copying()
            && (pauses || !self.is_too_large(above, windows, &mut found)?)
        {
            return Ok(Compaction::Idle);
        }

        let from = self.size_on_disk()?;
        match self.keeper.copy_step()? {
            Progress::Goes => Ok(Compaction::Goes),
            Progress::Failed(error) => {
                found.failed_at = Some(Instant::now());
                Ok(Compaction::Failed(error.into()))
            }
            Progress::Done => {
                let to = self.size_on_disk()?;
                self.facts.insert(COPIED, to.to_be_bytes())?;
                self.flush()?;
                Ok(Compaction::Done { from, to })
            }
        }
    }

    /// Whether a copy into a smaller store has begun and goes on with the next step.
    pub fn is_compacting(&self) -> bool {
        self.keeper.is_copying()
    }

    fn is_too_large(
        &self,
        above: f64,
        windows: &[&[ScanId]],
        found: &mut Size,
    ) -> Result<bool, StoreError> {
        let (size, n_changes) = (self.size_on_disk()?, self.keeper.n_changes());
        if size < SMALLEST || found.small_at == Some(n_changes) {
            return Ok(false);
        }
        let copied = self.facts.get(COPIED)?;
        let copied = copied.and_then(|value| <[u8; 8]>::try_from(&value[..]).ok());
        let copied = copied.map_or(0, u64::from_be_bytes) as f64;

        let size = size as f64;
        let is_large = size > GROWTH * copied
            && size > above * self.live_bytes(windows.iter().copied())? as f64;
        found.small_at = (!is_large).then_some(n_changes);
        Ok(is_large)
    }
}
