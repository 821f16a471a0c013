//! What a start takes up from an earlier run.

use std::collections::HashSet;

use super::shared::Shared;
use crate::{
    domain::{
        error::ScanError,
        scan::{ScanId, ScanRecord, ScanState},
    },
    process::hook,
};

/// What an earlier run left in the journal, in order of arrival.
#[derive(Default)]
pub(super) struct TakenUp {
    /// Scans that wait for the encoder, and when each was first seen.
    pub(super) pending: Vec<(ScanId, u64)>,
    /// Members of windows.
    pub(super) members: Vec<ScanRecord>,
    /// Output stems of all scans ever.
    pub(super) stems: HashSet<String>,
}

/// Sorts the journal into scans that wait for the encoder and members of windows. Members whose
/// tokens were made by another method are encoded again from their archived source: tokens of two
/// methods cannot be compared.
pub(super) fn take_up(shared: &Shared) -> Result<TakenUp, ScanError> {
    let mut up = TakenUp::default();
    let records = shared.store.records()?;
    shared.archive.keep_only(|id| {
        let holds = |r: &ScanRecord| matches!(r.state, ScanState::Ingested | ScanState::Encoded);
        records.iter().any(|record| record.id == id && holds(record))
    })?;
    for mut record in records {
        up.stems.insert(record.output_stem.clone());
        // Another program, or none, prepared the archived source of this scan. Source and results
        // stay as they are. The scan is a member again when the settings name that program again.
        if !hook::is_prepared_alike(&record, shared.method.hook.as_deref()) {
            continue;
        }
        let outdated = record.cohort.method != shared.method.fingerprint;
        match record.state {
            ScanState::Encoded if !outdated => up.members.push(record),
            ScanState::Encoded | ScanState::Ingested => {
                up.pending.push((record.id, record.first_seen_secs));
                if outdated {
                    record.cohort.method.clone_from(&shared.method.fingerprint);
                    shared.store.forget_tokens(&record)?;
                }
            }
            ScanState::Evicted | ScanState::Quarantined { .. } => {}
        }
    }
    Ok(up)
}
