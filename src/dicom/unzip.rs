//! Unpacks the DICOM files of a zip into a folder. They get numbers as names; the names in the zip
//! are never used.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use zip::{ZipArchive, result::ZipError};

use crate::domain::{
    dicom_start::{START_BYTES, begins_like_dicom},
    error::{
        QuarantineReason::{self, Bomb, Corrupt, TooLarge, Truncated, Unsupported},
        Refusal,
    },
};

/// Limits on the content of a zip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZipLimits {
    /// Number of files.
    pub max_members: usize,
    /// Bytes of one file.
    pub max_member_bytes: u64,
    /// Bytes of all files together.
    pub max_bytes: u64,
}

/// The content may be this many times larger than the zip, plus [`FREE_BYTES`]. Scans compress by a
/// factor of 2 to 10, a zip bomb by a thousand.
const MAX_RATIO: u64 = 100;
const FREE_BYTES: u64 = 64 << 20;

/// The content of a zip.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Unzipped {
    /// Files that begin like DICOM or are named so, unpacked.
    pub files: Vec<PathBuf>,
    /// Number of NIfTI files, which stay in the zip.
    pub n_nifti: usize,
    /// Number of zips, which stay in the zip.
    pub n_zips: usize,
    /// Number of all other files.
    pub n_others: usize,
}

/// What a zip holds besides DICOM files.
impl fmt::Display for Unzipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { n_nifti, n_zips, n_others, .. } = self;
        write!(f, "{n_nifti} NIfTI files, {n_zips} packed files and {n_others} other files")
    }
}

/// Unpacks every file that begins like DICOM or is named so into `folder`. A zip without such files
/// is no error.
///
/// # Errors
/// [`io::Error`] if the folder fails, a [`Refusal`] for every other fault.
pub fn unzip(
    mut zip: impl Read + Seek,
    zip_bytes: u64,
    folder: &Path,
    limits: &ZipLimits,
) -> io::Result<Result<Unzipped, Refusal>> {
    let is_cut_off = lacks_end(&mut zip, zip_bytes).unwrap_or(false);
    let mut archive = match ZipArchive::new(zip) {
        Ok(archive) => archive,
        Err(_) if is_cut_off => return Ok(Err(cut_off())),
        Err(error) => return Ok(Err(damaged(error))),
    };
    if archive.len() > limits.max_members {
        let found = format!("{} files in a zip", archive.len());
        let needed = format!("at most {}", limits.max_members);
        return Ok(Err(Refusal::new(TooLarge, found, needed, "export one examination per zip")));
    }

    let by_ratio = zip_bytes.saturating_mul(MAX_RATIO).saturating_add(FREE_BYTES);
    let mut n_all = 0;
    let mut unzipped = Unzipped::default();

    for index in 0..archive.len() {
        let mut member = match archive.by_index(index) {
            Ok(member) => member,
            Err(error) => return Ok(Err(damaged(error))),
        };
        if !member.is_file() {
            continue;
        }

        let mut start = Vec::new();
        if let Err(error) = member.by_ref().take(START_BYTES as u64).read_to_end(&mut start) {
            return Ok(Err(damaged(error)));
        }
        let count = match kind(member.name(), &start) {
            Kind::Dicom => None,
            Kind::Nifti => Some(&mut unzipped.n_nifti),
            Kind::Zip => Some(&mut unzipped.n_zips),
            Kind::Other => Some(&mut unzipped.n_others),
        };
        if let Some(count) = count {
            *count += 1;
            continue;
        }

        let path = folder.join(format!("{index:06}.dcm"));
        let mut file = File::create(&path)?;
        file.write_all(&start)?;

        let mut buffer = vec![0; 1 << 16];
        let mut n_bytes = start.len() as u64;
        loop {
            let n_read = match member.read(&mut buffer) {
                Ok(0) => break,
                Ok(n_read) => n_read,
                Err(error) => return Ok(Err(damaged(error))),
            };
            n_bytes += n_read as u64;
            if n_all + n_bytes > by_ratio {
                return Ok(Err(too_much(Bomb, by_ratio)));
            } else if n_bytes > limits.max_member_bytes {
                return Ok(Err(too_much(TooLarge, limits.max_member_bytes)));
            } else if n_all + n_bytes > limits.max_bytes {
                return Ok(Err(too_much(TooLarge, limits.max_bytes)));
            }
            file.write_all(&buffer[..n_read])?;
        }

        n_all += n_bytes;
        unzipped.files.push(path);
    }
    Ok(Ok(unzipped))
}

/// The kind of a file in a zip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Dicom,
    Nifti,
    Zip,
    Other,
}

/// Endings of files that hold other files.
const PACKED: [&str; 9] = [".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".zst", ".7z", ".rar"];

/// The kind of a file, by its name and its first bytes.
fn kind(name: &str, start: &[u8]) -> Kind {
    let name = name.to_ascii_lowercase();
    let has_ending = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    let file_name = name.rsplit(['/', '\\']).next().unwrap_or_default();

    if file_name.starts_with("._") {
        // macOS puts a file of its own attributes beside every file, under the same ending.
        Kind::Other
    } else if begins_like_dicom(start) || has_ending(&[".dcm", ".ima"]) {
        Kind::Dicom
    } else if has_ending(&[".nii", ".nii.gz"]) {
        Kind::Nifti
    } else if has_ending(&PACKED) {
        Kind::Zip
    } else {
        Kind::Other
    }
}

/// Whether a file begins like a zip and has no list of its files at its end, because it was cut off
/// or is still being written.
fn lacks_end(zip: &mut (impl Read + Seek), zip_bytes: u64) -> io::Result<bool> {
    let mut start = [0; 4];
    zip.rewind()?;
    let n_start = zip.by_ref().take(4).read(&mut start)?;
    if !b"PK\x03\x04".starts_with(&start[..n_start]) {
        return Ok(false);
    }

    // The list ends with a record of 22 bytes, and a comment of at most 65,535.
    let mut end = Vec::new();
    zip.seek(SeekFrom::Start(zip_bytes.saturating_sub(22 + 65_535)))?;
    zip.take(22 + 65_535).read_to_end(&mut end)?;
    Ok(!end.windows(4).any(|bytes| bytes == b"PK\x05\x06"))
}

fn cut_off() -> Refusal {
    let found = "a zip without the list of its files, which is at its end";
    Refusal::new(Truncated, found, "a whole zip", "copy it again")
}

fn damaged(error: impl Into<ZipError>) -> Refusal {
    let error = error.into();
    let text: String = error.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
    let is_foreign = matches!(error, ZipError::UnsupportedArchive(_));
    let found = format!("a zip that cannot be read ({text})");
    let needed = "a zip with deflated or stored files, without a password";
    let reason = if is_foreign { Unsupported } else { Corrupt };
    Refusal::new(reason, found, needed, "pack or copy it again")
}

fn too_much(reason: QuarantineReason, most: u64) -> Refusal {
    let found = format!("files in a zip that unpack to more than {most} bytes");
    let needed = format!(
        "at most {MAX_RATIO} times the size of the zip, intake.max_file_mib for each file, and \
         sixteen times that for all files"
    );
    Refusal::new(reason, found, needed, "pack the files without changes")
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Cursor};

    use zip::{ZipWriter, write::SimpleFileOptions};

    use super::*;

    const LIMITS: ZipLimits =
        ZipLimits { max_members: 3, max_member_bytes: 1 << 20, max_bytes: 3 << 20 };

    fn zip(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes) in members {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn dicom(n_bytes: usize) -> Vec<u8> {
        [&[0; 128][..], b"DICM", &vec![7; n_bytes]].concat()
    }

    fn unzipped(zip: Vec<u8>, limits: &ZipLimits) -> Result<Vec<Vec<u8>>, Refusal> {
        let folder = tempfile::tempdir().unwrap();
        let into = folder.path().join("into");
        fs::create_dir(&into).unwrap();
        let n_bytes = zip.len() as u64;
        let files = unzip(Cursor::new(zip), n_bytes, &into, limits).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing leaves the folder");
        files.map(|found| found.files.iter().map(|file| fs::read(file).unwrap()).collect())
    }

    fn unzip_all(zip: Vec<u8>) -> Unzipped {
        let folder = tempfile::tempdir().unwrap();
        let limits = ZipLimits { max_members: 99, ..LIMITS };
        let n_bytes = zip.len() as u64;
        unzip(Cursor::new(zip), n_bytes, folder.path(), &limits).unwrap().unwrap()
    }

    #[test]
    fn only_dicom_files_are_unpacked_and_no_name_is_used() {
        let members = [
            ("../../x.dcm", dicom(9)),
            ("letter.txt", b"to a friend".to_vec()),
            ("/etc/line\nbreak", dicom(5)),
        ];
        assert_eq!(unzipped(zip(&members), &LIMITS).unwrap(), [dicom(9), dicom(5)]);
        assert_eq!(unzipped(zip(&members[1..2]), &LIMITS).unwrap(), [[0_u8; 0]; 0]);
    }

    #[test]
    fn bare_data_sets_and_files_named_dcm_are_unpacked_and_the_others_are_counted() {
        let bare = b"\x08\0\x16\0UI\x04\x001.2\0\x08\0\x18\0UI\x04\x001.3\0".to_vec();
        let members = [
            ("IM1", bare.clone()),
            ("a/IM2.DCM", b"damaged".to_vec()),
            ("IM3.ima", Vec::new()),
            ("a/._IM2.dcm", b"\0\x05\x16\x07".to_vec()),
            ("b/scan.nii.gz", b"\x1f\x8b".to_vec()),
            ("b/scan.NII", vec![0; 400]),
            ("more.zip", zip(&[("IM4", bare)])),
            ("picture.jpg", b"\xff\xd8".to_vec()),
        ];
        let found = unzip_all(zip(&members));
        assert_eq!(found.files.len(), 3);
        assert_eq!((found.n_nifti, found.n_zips, found.n_others), (2, 1, 2));
    }

    #[test]
    fn a_zip_with_a_password_is_refused_and_says_so() {
        let mut locked = zip(&[("x", dicom(9))]);
        let entry = locked.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
        locked[6] |= 1;
        locked[entry + 8] |= 1;
        let refusal = unzipped(locked, &LIMITS).unwrap_err();
        assert_eq!(refusal.reason, Unsupported);
        assert!(refusal.found.contains("assword"), "{refusal}");
    }

    #[test]
    fn too_many_too_large_too_dense_and_damaged_are_told_apart() {
        let reason = |zip: Vec<u8>, limits: &ZipLimits| unzipped(zip, limits).unwrap_err().reason;
        let one = |size| zip(&[("x", dicom(size))]);
        assert_eq!(reason(one(2 << 20), &LIMITS), TooLarge);
        let names = ["a", "b", "c", "d"];
        let four: Vec<_> = names.map(|name| (name, dicom(9))).to_vec();
        assert_eq!(reason(zip(&four), &LIMITS), TooLarge);
        let wide = ZipLimits { max_member_bytes: 1 << 30, max_bytes: 1 << 30, ..LIMITS };
        assert_eq!(reason(one(80 << 20), &wide), Bomb);
        let mut cut = zip(&four[..2]);
        cut.truncate(cut.len() - 30);
        assert_eq!(reason(cut, &LIMITS), Truncated);
        assert_eq!(reason(Vec::new(), &LIMITS), Truncated, "not begun yet");
        assert_eq!(reason(b"no zip".to_vec(), &LIMITS), Corrupt);
        let mut damaged = zip(&four[..2]);
        let list = damaged.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
        damaged[list] = b'x';
        assert_eq!(reason(damaged, &LIMITS), Corrupt, "it has its end");
    }
}
