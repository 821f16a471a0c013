//! Files that appear whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

const MARK: &str = ".oddscan-tmp-";

/// Writes `bytes` to `path`: a temporary file in the same folder, made durable, renamed over
/// `path`, the folder made durable. After an error the old file stands as it was.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut draft = tempfile::Builder::new()
        .prefix(MARK)
        // The umask of the service decides who may read results, as for any other file.
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
        .tempfile_in(folder)?;
    draft.write_all(bytes)?;
    draft.as_file().sync_all()?;
    draft.persist(path).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

/// Removes temporary files that a kill left in `folder`.
pub fn remove_leftovers(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(MARK.as_bytes()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_leftover() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("result");
        write_atomic(&path, b"old").unwrap();
        // A folder in the way: the rename fails after a complete temporary file.
        let blocked = folder.path().join("blocked");
        fs::create_dir_all(blocked.join("full")).unwrap();
        write_atomic(&blocked, b"new").unwrap_err();
        write_atomic(&path.join("below-a-file"), b"new").unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn leftovers_of_a_kill_are_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        for name in [".oddscan-tmp-x1", "scan_anomaly.png", ".hidden"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        remove_leftovers(folder.path()).unwrap();
        assert!(!folder.path().join(".oddscan-tmp-x1").exists());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
