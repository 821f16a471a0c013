//! What a start takes up from an earlier run.

use std::collections::{BTreeMap, HashSet};

use tracing::{info, warn};

use super::{encode, records::LoadedRecords, shared::Shared};
use crate::{
    archive::Archived,
    domain::{
        damage::Damage,
        error::ScanError,
        scan::{ScanId, ScanRecord, ScanState},
    },
    process::hook,
    quarantine,
};

/// What an earlier run left, in order of arrival.
#[derive(Default)]
pub(super) struct TakenUp {
    /// Scans that wait for the encoder, and when each was first seen.
    pub(super) pending: Vec<(ScanId, u64)>,
    /// Members of windows, and whether the store has their tokens. The others are pending, too.
    pub(super) members: Vec<(ScanRecord, bool)>,
    /// Output stems of all scans ever.
    pub(super) stems: HashSet<String>,
}

/// Sorts the records into scans that wait for the encoder and members of windows. Members without
/// tokens are encoded again from their archived source, and so are those whose tokens were made by
/// another method: tokens of two methods cannot be compared.
pub(super) fn take_up(shared: &Shared) -> Result<TakenUp, ScanError> {
    finish_refusals(shared);
    let records = load(shared)?;
    let records = agree_with_archive(shared, records)?;
    let is_member: HashSet<ScanId> =
        records.iter().filter(|record| record.is_member()).map(|record| record.id).collect();
    shared.store.keep_only(|id| is_member.contains(id))?;

    let mut up = TakenUp::default();
    let mut n_rebuilt = 0;
    for mut record in records {
        up.stems.insert(record.output_stem.clone());
        if !matches!(record.state, ScanState::Ingested | ScanState::Encoded) {
            continue;
        }
        // Another program, or none, prepared the archived source of this scan. Source and results
        // stay as they are. The scan is a member again when the settings name that program again.
        if !hook::is_prepared_alike(&record, shared.method.hook.as_deref()) {
            continue;
        }

        let method = &shared.method;
        // After an orderly end a scan that was in hand is not to blame.
        let is_cleared = record.attempts > 0 && !shared.after_crash;
        let is_outdated = record.cohort.method != method.fingerprint;
        if is_cleared {
            record.attempts = 0;
        }
        if is_outdated {
            record.cohort.method.clone_from(&method.fingerprint);
        }
        if is_cleared || is_outdated {
            shared.records.put(&record)?;
        }
        if is_outdated {
            shared.store.remove(&record.id)?;
        }
        let has_tokens =
            shared.store.has_tokens(&record.id, &method.fingerprint, method.n_grids())?;
        if record.is_member() {
            n_rebuilt += usize::from(!has_tokens && !is_outdated);
            up.members.push((record.clone(), has_tokens));
        }
        if !record.is_member() || !has_tokens {
            up.pending.push((record.id, record.first_seen_secs));
        }
    }

    if n_rebuilt > 0 {
        shared.found_damaged(Damage::Tokens, n_rebuilt);
        warn!(n_rebuilt, "the store lacks the tokens of members; they are encoded again");
    }
    Ok(up)
}

/// Finishes refusals that a kill or a full disk interrupted. Intake calls it again while there are
/// some.
pub(super) fn finish_refusals(shared: &Shared) {
    let folders = &shared.config().directories;
    let finished = quarantine::finish(&folders.quarantine, &[&folders.incoming, &folders.state]);
    if let Err(error) = finished {
        warn!(error = %error.kind(), "the quarantine cannot be read");
    }
}

/// Reads the records. What is damaged without a copy goes to `lost+found`.
fn load(shared: &Shared) -> Result<Vec<ScanRecord>, ScanError> {
    let LoadedRecords { records, n_restored, damaged } = shared.records.load(&shared.seen)?;
    if n_restored > 0 {
        warn!(n_restored, "records of the ledger were damaged, gone or old; they are restored");
    }
    for file in &damaged {
        shared.set_aside(file, "a damaged record without a copy")?;
    }
    shared.found_damaged(Damage::Record, n_restored + damaged.len());
    Ok(records)
}

/// Makes archive and records agree: ends what a kill has interrupted, and gives up scans without a
/// source. A source without a record goes to `lost+found`.
fn agree_with_archive(
    shared: &Shared,
    records: Vec<ScanRecord>,
) -> Result<Vec<ScanRecord>, ScanError> {
    let archive = &shared.archive;
    let mut archived: BTreeMap<ScanId, Archived> = archive.scans()?;
    let mut kept = Vec::with_capacity(records.len());
    for record in records {
        let id = record.id;
        let found = archived.remove(&id).unwrap_or_default();
        match &record.state {
            ScanState::Ingested | ScanState::Encoded => {
                if found.is_arriving && !found.is_there {
                    archive.accept(id)?;
                } else if found.is_arriving {
                    archive.take_back(id)?;
                } else if !found.is_there {
                    shared.lose(record, "its archived source is missing")?;
                    continue;
                }
            }
            _ if found == Archived::default() => {}
            ScanState::Evicted => {
                archive.remove(id)?;
                archive.take_back(id)?;
            }
            ScanState::Quarantined { refusal } => {
                archive.take_back(id)?;
                if found.is_there {
                    encode::move_to_quarantine(shared, &record, refusal);
                } else {
                    archive.remove(id)?;
                }
            }
            ScanState::Lost { why } => {
                archive.take_back(id)?;
                for file in archive.files(id) {
                    shared.set_aside(&file, why)?;
                }
            }
        }
        if matches!(record.state, ScanState::Lost { .. }) {
            // A kill may have come between the record and this.
            shared.seen.forget_scan(id)?;
        }
        kept.push(record);
    }

    for (id, found) in archived {
        // Its record was never written, so that its file is read again.
        archive.take_back(id)?;
        if found.is_there {
            shared.found_damaged(Damage::Record, 1);
            shared.seen.forget_scan(id)?;
            for file in archive.files(id) {
                shared.set_aside(&file, "a source without a record")?;
            }
            info!(scan = %id, "to score it again, put it into the incoming folder");
        }
    }
    Ok(kept)
}
