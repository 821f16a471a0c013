//! Reports that the incoming folder may have changed, but never what changed.
//!
//! The folder itself is the queue: an event only means "look again". Events can get lost (inotify
//! overflow), and NFS and SMB never send any. So the listener also looks at an interval.

use std::path::Path;

use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};

/// Why the folder must be listed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Something happened in the folder.
    Event,
    /// The system lost events, or reported an error.
    Overflow,
    /// The daemon has read new settings.
    Reload,
}

/// Watches a folder until it is dropped.
pub struct Watcher {
    _inner: RecommendedWatcher,
}

/// Calls `on_change` from a separate thread whenever something may have changed below `folder`.
///
/// # Errors
/// If the system cannot watch (no inotify instance left, folder gone). Listing at an interval still
/// works then.
pub fn watch(
    folder: &Path,
    on_change: impl Fn(Change) + Send + 'static,
) -> Result<Watcher, Box<dyn std::error::Error + Send + Sync>> {
    let mut inner = notify::recommended_watcher(move |event: notify::Result<Event>| match event {
        // On some systems, reading causes access events. To look again for those would never end.
        Ok(event) if matches!(event.kind, EventKind::Access(_)) && !event.need_rescan() => {}
        Ok(event) if event.need_rescan() => on_change(Change::Overflow),
        Ok(_) => on_change(Change::Event),
        Err(_) => on_change(Change::Overflow),
    })?;
    inner.watch(folder, RecursiveMode::Recursive)?;
    Ok(Watcher { _inner: inner })
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    #[test]
    fn a_new_file_deep_in_the_folder_is_a_change() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("sub")).unwrap();
        let (sender, changes) = mpsc::channel();
        let _watcher = watch(folder.path(), move |change| sender.send(change).unwrap()).unwrap();
        std::fs::write(folder.path().join("sub/scan.nii"), "x").unwrap();
        assert_eq!(changes.recv_timeout(Duration::from_secs(20)).unwrap(), Change::Event);
    }
}
