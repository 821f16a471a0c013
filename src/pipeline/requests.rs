//! Lists by which one stage asks another for something. No stage waits for an answer.

use std::{
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::domain::scan::ScanId;

/// What one stage asks of another, which looks here from time to time.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// Scans to be encoded from the archive, not before a time. Intake queues them.
    encode: Mutex<Vec<(ScanId, Instant)>>,
    /// Scans that are members no more. The score stage removes them from their windows.
    gone: Mutex<Vec<ScanId>>,
}

fn lock<T>(list: &Mutex<T>) -> MutexGuard<'_, T> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Requests {
    /// Asks for a scan to be encoded from the archive, after a pause.
    pub(super) fn encode_again(&self, id: ScanId, pause: Duration) {
        lock(&self.encode).push((id, Instant::now() + pause));
    }

    /// The scans that are to be encoded now.
    pub(super) fn to_encode(&self, now: Instant) -> Vec<ScanId> {
        lock(&self.encode).extract_if(.., |(_, due)| *due <= now).map(|(id, _)| id).collect()
    }

    /// Tells the score stage that a scan is no member any more.
    pub(super) fn leaves_its_window(&self, id: ScanId) {
        lock(&self.gone).push(id);
    }

    /// The scans that are members no more.
    pub(super) fn gone(&self) -> Vec<ScanId> {
        mem::take(&mut lock(&self.gone))
    }
}
