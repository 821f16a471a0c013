//! The files beside a scan that belong to it, and the names that follow from the scan's name.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use crate::domain::scan::ScanId;

/// The brain mask beside a scan: `<stem>_brain` or `<subject>_brain`; see [`companion`].
pub fn companion_mask(scan: &Path) -> Option<PathBuf> {
    companion(scan, "brain")
}

/// The T1 of the same session beside a scan, `<subject>_T1w.nii.gz`, unless the scan is that file.
pub fn session_t1(scan: &Path) -> Option<PathBuf> {
    companion(scan, "T1w").filter(|t1| t1 != scan)
}

/// The endings of a file beside a scan. Upper case occurs where a system knows no lower case.
const ENDINGS: [&str; 6] = [".nii.gz", ".nii", ".NII.GZ", ".NII", ".nii.GZ", ".NII.gz"];

/// A file beside a scan that belongs to it: `<stem>_<what>` or, for `<subject>_<modality>`,
/// `<subject>_<what>`, with `.nii.gz` or `.nii`. Names need not be UTF-8.
///
/// Links do not count: in the incoming folder a link may lead to anything. Beside a scan that is a
/// link itself, links are followed. Only a person can have named such a scan, and some data sets
/// consist of links.
pub fn companion(scan: &Path, what: &str) -> Option<PathBuf> {
    let stem = stem_bytes(scan)?;
    let subject = stem.iter().rposition(|&byte| byte == b'_').map(|end| &stem[..end]);
    let path = |name: &[u8], ending: &str| {
        let name = [name, b"_", what.as_bytes(), ending.as_bytes()].concat();
        scan.with_file_name(OsStr::from_bytes(&name))
    };

    [Some(stem), subject]
        .into_iter()
        .flatten()
        .flat_map(|name| ENDINGS.map(|ending| path(name, ending)))
        .find(|path| lies_beside(scan, path))
}

/// The JSON beside a scan that says how it was acquired: `<stem>.json`. The same rule about links
/// holds. The sidecars that oddscan writes beside maps do not count.
pub fn companion_json(scan: &Path) -> Option<PathBuf> {
    let stem = stem_bytes(scan)?;
    if stem.ends_with(b"_anomaly") {
        return None;
    }
    let path = |ending: &[u8]| scan.with_file_name(OsStr::from_bytes(&[stem, ending].concat()));
    [path(b".json"), path(b".JSON")].into_iter().find(|path| lies_beside(scan, path))
}

fn lies_beside(scan: &Path, path: &Path) -> bool {
    path.is_file() && (scan.is_symlink() || !path.is_symlink())
}

/// The bytes of a file name without `.nii` or `.nii.gz`, in upper or lower case.
fn stem_bytes(scan: &Path) -> Option<&[u8]> {
    let name = scan.file_name()?.as_bytes();
    Some(without(without(name, b".gz"), b".nii"))
}

/// The name without an ending, in upper or lower case.
fn without<'n>(name: &'n [u8], ending: &[u8]) -> &'n [u8] {
    let (start, end) = name.split_at(name.len().saturating_sub(ending.len()));
    if end.eq_ignore_ascii_case(ending) { start } else { name }
}

/// The file name without its folder and without `.nii` or `.nii.gz`, in upper or lower case.
pub fn stem_of(path: &Path) -> String {
    String::from_utf8_lossy(stem_bytes(path).unwrap_or_default()).into_owned()
}

/// A stem for result files. Letters, digits, `.`, `-` and `_` stay, and everything else becomes
/// `_`. So no file name can lead out of the results folder or break a shell line.
pub fn output_stem(stem: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || ".-_".contains(c) { c } else { '_' };
    let stem: String = stem.chars().take(120).map(safe).collect();
    let stem = stem.trim_start_matches('.');
    if stem.is_empty() { "scan".to_owned() } else { stem.to_owned() }
}

/// The stem of a scan's results. It is the stem of the scan's file. If another scan uses that
/// already, the short id is added, so that the other scan keeps its results.
pub fn output_stem_among(scan: &Path, id: ScanId, is_taken: impl Fn(&str) -> bool) -> String {
    let stem = output_stem(&stem_of(scan));
    if is_taken(&stem) { format!("{stem}-{}", id.short()) } else { stem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_found_by_stem_and_by_subject() {
        let folder = tempfile::tempdir().unwrap();
        let scan = folder.path().join("sub-1_FLAIR.nii.gz");
        assert_eq!(companion_mask(&scan), None);
        let subject = folder.path().join("sub-1_brain.nii.gz");
        std::fs::write(&subject, "").unwrap();
        assert_eq!(companion_mask(&scan), Some(subject));
        let stem = folder.path().join("sub-1_FLAIR_brain.nii");
        std::fs::write(&stem, "").unwrap();
        assert_eq!(companion_mask(&scan), Some(stem));
    }

    #[test]
    fn a_mask_and_a_json_are_found_whatever_the_case_of_the_endings() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["SUB_T1w_brain.NII.GZ", "SUB_T1w.JSON"] {
            std::fs::write(at(name), "{}").unwrap();
        }
        for scan in ["SUB_T1w.NII.GZ", "SUB_T1w.nii"].map(at) {
            assert_eq!(companion_mask(&scan), Some(at("SUB_T1w_brain.NII.GZ")));
            assert_eq!(companion_json(&scan), Some(at("SUB_T1w.JSON")));
        }
    }

    #[test]
    fn a_name_that_is_not_utf_8_finds_its_mask_and_a_link_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &[u8]| folder.path().join(OsStr::from_bytes(name));
        let (scan, mask) = (path(b"M\xfcller_T1w.nii.gz"), path(b"M\xfcller_brain.nii.gz"));
        std::fs::write(&mask, "").unwrap();
        assert_eq!(companion_mask(&scan), Some(mask.clone()));
        std::fs::rename(&mask, path(b"elsewhere")).unwrap();
        std::os::unix::fs::symlink(path(b"elsewhere"), &mask).unwrap();
        assert_eq!(companion_mask(&scan), None);
    }

    #[test]
    fn a_link_is_a_mask_beside_a_scan_that_is_one() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["elsewhere", "sub-1_T1w.nii"] {
            std::fs::write(at(name), "").unwrap();
        }
        symlink(at("elsewhere"), at("sub-1_brain.nii")).unwrap();
        symlink(at("elsewhere"), at("sub-1_FLAIR.nii")).unwrap();
        assert_eq!(companion_mask(&at("sub-1_FLAIR.nii")), Some(at("sub-1_brain.nii")));
        assert_eq!(companion_mask(&at("sub-1_T1w.nii")), None);
        // A mask that is no link counts for every scan.
        std::fs::write(at("sub-1_FLAIR_brain.nii"), "").unwrap();
        assert_eq!(companion_mask(&at("sub-1_FLAIR.nii")), Some(at("sub-1_FLAIR_brain.nii")));
    }

    #[test]
    fn a_json_is_found_by_stem_and_neither_a_link_nor_a_result_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["sub-1.json", "a_anomaly.json", "elsewhere"] {
            std::fs::write(at(name), "{}").unwrap();
        }
        assert_eq!(companion_json(&at("a_anomaly.nii.gz")), None);
        assert_eq!(companion_json(&at("sub-1_T1w.nii.gz")), None, "not of the whole subject");
        std::os::unix::fs::symlink(at("elsewhere"), at("sub-1_T1w.json")).unwrap();
        assert_eq!(companion_json(&at("sub-1_T1w.nii.gz")), None);
        std::os::unix::fs::symlink(at("elsewhere"), at("sub-1_T1w.nii")).unwrap();
        assert_eq!(companion_json(&at("sub-1_T1w.nii")), Some(at("sub-1_T1w.json")));
        std::fs::write(at("sub-2_T1w.json"), "{}").unwrap();
        assert_eq!(companion_json(&at("sub-2_T1w.nii.gz")), Some(at("sub-2_T1w.json")));
    }

    #[test]
    fn hostile_names_become_harmless_stems() {
        assert_eq!(output_stem("sub-01_T1w"), "sub-01_T1w");
        assert_eq!(output_stem("../../etc/passwd"), "_.._etc_passwd");
        assert_eq!(output_stem("a b\n;rm"), "a_b__rm");
        assert_eq!(output_stem(""), "scan");
        assert_eq!(output_stem(&"x".repeat(400)).len(), 120);
    }

    #[test]
    fn the_stem_loses_only_the_nifti_ending() {
        assert_eq!(stem_of(Path::new("/in/a.b.nii.gz")), "a.b");
        assert_eq!(stem_of(Path::new("a.nii")), "a");
        assert_eq!(stem_of(Path::new("a_T1w.NII.GZ")), "a_T1w");
        assert_eq!(stem_of(Path::new("a.Nii.gz")), "a");
    }
}
