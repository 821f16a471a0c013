//! The key of the hashes in results: `state/identity.key`, made once and kept for good.
//!
//! With another key all hashes are others, and a site could no longer link its results. So a key
//! that cannot be read stops the start, and is never replaced.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use crate::{
    domain::{error::ScanError, identity::IdentityKey},
    files,
};

/// Name of the key's file in the state folder.
const NAME: &str = "identity.key";

/// The key of a state folder. The first call makes it.
pub(super) fn open(state: &Path) -> Result<IdentityKey, ScanError> {
    let opened = match read(state) {
        Ok(Some(key)) => Ok(key),
        Ok(None) => make(state),
        Err(error) => Err(error),
    };
    opened.map_err(|source| ScanError::Internal {
        doing: "opening identity.key in the state folder",
        source,
    })
}

/// The key of a state folder; `None` if the folder has none.
///
/// # Errors
/// If the file cannot be read or holds no key.
pub fn read(state: &Path) -> io::Result<Option<IdentityKey>> {
    let bytes = match files::read_small(&state.join(NAME), 1024) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read?,
    };
    let key = std::str::from_utf8(&bytes).ok().and_then(IdentityKey::from_hex);
    key.map(Some).ok_or_else(|| {
        let found = format!(
            "{} bytes that are no key; 64 hex digits are needed. Restore the file from a backup, or \
             remove it: then a new key is made, and the hashes in results change",
            bytes.len()
        );
        io::Error::new(io::ErrorKind::InvalidData, found)
    })
}

/// A key that nobody knows.
pub fn random() -> io::Result<IdentityKey> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(IdentityKey::new(bytes))
}

fn make(state: &Path) -> io::Result<IdentityKey> {
    let key = random()?;
    files::write_private(&state.join(NAME), (key.to_hex() + "\n").as_bytes())?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn a_key_is_made_once_for_its_owner_alone() {
        let [one, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        assert_eq!(read(one.path()).unwrap(), None);
        let key = open(one.path()).unwrap();
        assert_eq!(open(one.path()).unwrap(), key);
        assert_ne!(open(other.path()).unwrap(), key);
        let path = one.path().join(NAME);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read(&path).unwrap().len(), 65);
    }

    #[test]
    fn a_damaged_key_is_refused_with_what_to_do_and_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(NAME);
        for content in ["", "00ff", "no key"] {
            fs::write(&path, content).unwrap();
            let error = open(folder.path()).unwrap_err();
            let cause = std::error::Error::source(&error).unwrap().to_string();
            assert!(cause.contains("Restore the file from a backup"), "{cause}");
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
    }
}
