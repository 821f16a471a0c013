//! Shows what is left alone, and considers it again when it may have become a scan.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::Instant,
};

use tracing::{info, warn};

use super::{
    Intake, PATIENCE, below,
    left_alone::{Rests, by_reason, reason_by_name, write_names},
};
use crate::{
    domain::{error::ScanError, left_alone::LeftAlone},
    ingest::{self, Patterns},
    ledger::{Decision, SeenFiles},
    pipeline::board::{LEFT_ALONE_FILE, LeftAloneNames},
};

impl Intake {
    /// Shows what is left alone: the files of this listing, and the DICOM files that
    /// have been seen.
    pub(super) fn show_left_alone(
        &mut self,
        listed: Vec<(PathBuf, LeftAlone)>,
        seen: &SeenFiles,
        incoming: &Path,
    ) {
        let others = self.bundles.unmarked();
        let others = others.filter_map(|path| Some((path.clone(), reason_by_name(path)?)));
        self.left_alone.look(listed.into_iter().chain(others));

        let listed = self.left_alone.counted();
        let listed = listed.map(|(path, reason)| (below(incoming, path), reason));
        let seen = seen.left_alone.iter();
        let seen = seen.map(|(path, reason)| (Path::new(OsStr::from_bytes(path)), *reason));
        let found = by_reason(listed.chain(seen));

        self.keep_names(&found);
        let n_files = |reason| found.get(&reason).map_or(0, |named| named.n_files);
        for reason in LeftAlone::ALL {
            self.shared.metrics.left_alone(reason, n_files(reason));
        }
        self.shared.board.update().left_alone =
            found.iter().map(|(&reason, named)| (reason, named.n_files)).collect();
    }

    /// Writes the names if they have changed.
    fn keep_names(&mut self, found: &BTreeMap<LeftAlone, LeftAloneNames>) {
        if self.left_alone.written.as_ref() == Some(found) {
            return;
        }
        let file = self.shared.config().directories.state.join(LEFT_ALONE_FILE);
        match write_names(&file, found) {
            Ok(()) => self.left_alone.written = Some(found.clone()),
            Err(error) => {
                warn!(error = %error.kind(), "cannot write the names of files left alone");
            }
        }
    }

    /// Considers files again whose decision has lost one of its files: what is left may now be a
    /// scan, for example without a stray slice. A decision of which files go all the time is
    /// considered again only now and then, because that reads all its files.
    pub(super) fn look_again_at_rest(
        &mut self,
        seen: &SeenFiles,
        patterns: &Patterns,
    ) -> Result<(), ScanError> {
        let (now, pause) = (Instant::now(), self.shared.config().intake.series_settle * PATIENCE);
        let Rests { due, done } = &mut self.rests;
        due.extend(seen.shrunk.iter().cloned());
        done.retain(|_, at| now.duration_since(*at) < pause);

        let is_alone = |path: &[u8]| {
            let path = Path::new(OsStr::from_bytes(path));
            patterns.is_scan(path) || ingest::is_zip(path)
        };
        let ready: HashSet<Decision> = due.extract_if(|rest| !done.contains_key(rest)).collect();
        if ready.is_empty() {
            return Ok(());
        }

        let n_files = self.shared.seen.forget_decisions(&ready, is_alone)?;
        done.extend(ready.into_iter().map(|decision| (decision, now)));
        if n_files > 0 {
            info!(n_files, "a file that was left out is gone; the others are read again");
        }
        Ok(())
    }
}
