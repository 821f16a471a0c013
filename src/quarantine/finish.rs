//! Finishes what a kill or a full disk interrupted.

use std::{
    io,
    path::{Component, Path},
};

use tracing::warn;

use super::{
    draft::Draft,
    entries::{has_refused_file, hidden_entries},
    leaving::Leaving,
    reason::{DROPPED, ReasonFile},
    refuse::{Brought, bring_in, end, working},
};
use crate::files::steps;

/// Completes entries that are not visible yet, or removes them if all their files are in their old
/// place. A file below none of `roots` is left alone.
///
/// # Errors
/// If the quarantine cannot be read. An entry that cannot be completed waits for the next call.
pub fn finish(quarantine: &Path, roots: &[&Path]) -> io::Result<()> {
    let _working = working();
    for folder in hidden_entries(quarantine)? {
        if let Err(error) = finish_one(Draft { folder }, roots) {
            warn!(error = %error.kind(), "an interrupted refusal cannot be finished yet");
        }
    }
    Ok(())
}

fn finish_one(draft: Draft, roots: &[&Path]) -> io::Result<()> {
    let folder = &draft.folder;
    let name = folder.file_name().unwrap_or_default();
    if name.as_encoded_bytes().starts_with(DROPPED.as_bytes()) {
        return steps::remove_tree(folder);
    }
    match Leaving::read(folder).filter(|leaving| are_within(leaving, roots)) {
        Some(leaving) if !leaving.has_begun(folder) => draft.remove(),
        Some(mut leaving) => {
            if bring_in(&draft, &mut leaving)? != Brought::Files {
                return draft.remove();
            }
            end(&draft, &leaving);
            warn!(refusal = %leaving.reason.refusal, "a file went to quarantine after an interruption");
            Ok(())
        }
        // The list goes when all files are in, just before the entry becomes visible.
        None if has_refused_file(folder) => {
            let reason = ReasonFile::read(folder);
            let came_from = reason.as_ref().map(|reason| Path::new(&reason.came_from));
            let named = came_from.and_then(Path::file_name).unwrap_or(name);
            draft.publish(named, reason.as_ref()).map(drop)
        }
        None => draft.remove(),
    }
}

/// Whether all files come from below these folders. oddscan wrote the list, but somebody may have
/// edited it.
fn are_within(leaving: &Leaving, roots: &[&Path]) -> bool {
    let roots: Vec<_> = roots.iter().filter_map(|root| std::path::absolute(root).ok()).collect();
    leaving.files.iter().all(|file| {
        let from = file.from();
        from.components().all(|part| part != Component::ParentDir)
            && roots.iter().any(|root| from.starts_with(root))
    })
}
