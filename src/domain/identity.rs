//! What results say instead of names: the one place that decides which texts of paths and headers
//! leave the state folder, and in which form (`results.identity`).
//!
//! Paths, file names, descriptions and UIDs may name a patient. The ledger has them in clear,
//! because it is patient data anyway. Results have more readers. Whatever goes into a sidecar, into
//! a picture or into the name of a result file goes through [`Pseudonyms`] first.

mod words;

use std::fmt;

use sha2::{Digest, Sha256};

use super::{
    acquisition::{AcquisitionFacts, known_suffix, suffix_of},
    scan::{DicomFacts, ScanRecord},
};

/// In which form results name where a scan came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum IdentityChoice {
    /// In clear.
    Clear,
    /// By a keyed hash. One site can link its own results, and nobody else can try out names.
    #[default]
    Hashed,
    /// Not at all.
    Absent,
}

/// The secret of the keyed hashes: 32 random bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct IdentityKey([u8; 32]);

impl fmt::Debug for IdentityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdentityKey(secret)")
    }
}

impl IdentityKey {
    /// The key of these random bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// All 64 hex digits, for the key's own file.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }

    /// Reads what [`IdentityKey::to_hex`] wrote; spaces and line breaks around it do not matter.
    pub fn from_hex(text: &str) -> Option<Self> {
        Some(Self(hex::decode(text.trim()).ok()?.try_into().ok()?))
    }

    /// The first 16 hex digits of the HMAC-SHA256 of a text (RFC 2104, RFC 4231). Tools like
    /// openssl compute it, too, so that a site can find the results of a name.
    fn hash(&self, text: &str) -> String {
        const BLOCK: usize = 64;
        let padded = |with: u8| {
            let mut block = [with; BLOCK];
            block.iter_mut().zip(self.0).for_each(|(byte, key)| *byte ^= key);
            block
        };
        let inner = Sha256::new().chain_update(padded(0x36)).chain_update(text).finalize();
        let outer = Sha256::new().chain_update(padded(0x5c)).chain_update(inner).finalize();
        hex::encode(&outer[..8])
    }
}

/// Gives texts the form in which results may have them.
#[derive(Debug, Clone, Copy)]
pub struct Pseudonyms {
    choice: IdentityChoice,
    key: IdentityKey,
}

impl Pseudonyms {
    /// The form that the settings choose, with the key of the site.
    pub fn new(choice: IdentityChoice, key: IdentityKey) -> Self {
        Self { choice, key }
    }

    /// A path or a UID: in clear, its hash, or nothing.
    pub fn text(&self, text: &str) -> Option<String> {
        match self.choice {
            _ if text.is_empty() => None,
            IdentityChoice::Clear => Some(text.to_owned()),
            IdentityChoice::Hashed => Some(self.key.hash(text)),
            IdentityChoice::Absent => None,
        }
    }

    /// Free text about the sequence, such as SeriesDescription. Words that only say what a scan is
    /// stay. In place of all others stands one hash of the text, or nothing.
    pub fn description(&self, text: &str) -> Option<String> {
        let cleaned = match self.choice {
            IdentityChoice::Clear => text.to_owned(),
            IdentityChoice::Hashed => cleaned(text, Some(self.key.hash(text)), is_harmless),
            IdentityChoice::Absent => cleaned(text, None, is_harmless),
        };
        (!cleaned.is_empty()).then_some(cleaned)
    }

    /// A file name without its ending. BIDS names stay, because their labels are pseudonyms. In all
    /// other names [`Pseudonyms::description`] holds, and a number in front of a DICOM volume's
    /// name is that of its series. `None` if results have no names.
    pub fn name(&self, stem: &str, is_dicom: bool) -> Option<String> {
        match self.choice {
            IdentityChoice::Clear => Some(stem.to_owned()),
            IdentityChoice::Hashed if is_plain(stem, is_dicom) => Some(stem.to_owned()),
            IdentityChoice::Hashed => {
                let is_harmless = |index, word: &str| is_harmless_in(is_dicom, index, word);
                Some(cleaned(stem, Some(self.key.hash(stem)), is_harmless))
            }
            IdentityChoice::Absent => None,
        }
    }

    /// Stem of the result files. It is unique, because [`ScanRecord::output_stem`] is, and a hash
    /// covers the whole stem. Without names it is made of the scan's id.
    pub fn stem(&self, record: &ScanRecord) -> String {
        let stem = &record.output_stem;
        let nameless = || {
            let id = record.id.short();
            suffix_of(stem).map_or(format!("scan-{id}"), |suffix| format!("scan-{id}_{suffix}"))
        };
        self.name(stem, record.dicom.is_some()).unwrap_or_else(nameless)
    }

    /// The file's own name; empty if results have no names.
    pub fn source_name(&self, record: &ScanRecord) -> String {
        let (stem, ending) = split_ending(&record.source_name);
        let name = self.name(stem, record.dicom.is_some());
        name.map_or(String::new(), |name| format!("{name}{ending}"))
    }

    /// How the scan was acquired. Scanner and timing stay; they name no patient.
    pub fn acquisition(&self, facts: &AcquisitionFacts) -> AcquisitionFacts {
        let description = |text: &Option<String>| self.description(text.as_deref()?);
        AcquisitionFacts {
            series: description(&facts.series),
            protocol: description(&facts.protocol),
            dimensions: description(&facts.dimensions),
            ..facts.clone()
        }
    }

    /// The identifiers of a DICOM series. The time of the acquisition is there in clear or not at
    /// all, because few hashes of times can be told apart from all of them.
    pub fn dicom(&self, facts: &DicomFacts) -> Option<DicomFacts> {
        let uid = |uid: &Option<String>| self.text(uid.as_deref()?);
        match self.choice {
            IdentityChoice::Clear => Some(facts.clone()),
            IdentityChoice::Hashed => Some(DicomFacts {
                study_instance_uid: uid(&facts.study_instance_uid),
                series_instance_uid: uid(&facts.series_instance_uid),
                frame_of_reference_uid: uid(&facts.frame_of_reference_uid),
                acquisition_datetime: None,
            }),
            IdentityChoice::Absent => None,
        }
    }

    /// A remark for readers of the results. Names of this scan in it are replaced.
    pub fn note(&self, note: &str, record: &ScanRecord) -> String {
        if self.choice == IdentityChoice::Clear {
            return note.to_owned();
        }

        let facts = &record.acquisition;
        let mut names: Vec<&str> = record.came_from.split('/').collect();
        names.extend([record.came_from.as_str(), &record.output_stem, &record.source_name]);
        names.push(split_ending(&record.source_name).0);
        names.extend([&facts.series, &facts.protocol].into_iter().flatten().map(String::as_str));
        names.retain(|name| name.chars().count() > 2 && !is_plain(name, record.dicom.is_some()));

        // The longest first: a path holds the names of its folders.
        names.sort_unstable_by_key(|name| std::cmp::Reverse(name.len()));
        names.into_iter().fold(note.to_owned(), |note, name| {
            note.replace(name, self.text(name).as_deref().unwrap_or("..."))
        })
    }
}

/// A name, and its `.nii` or `.nii.gz`.
fn split_ending(name: &str) -> (&str, &str) {
    let ending = [".nii.gz", ".nii"].into_iter().find(|ending| name.ends_with(ending));
    name.split_at(name.len() - ending.map_or(0, str::len))
}

/// Whether a stem says nothing that could name a patient.
fn is_plain(stem: &str, is_dicom: bool) -> bool {
    is_bids(stem) || words_of(stem).enumerate().all(|(i, word)| is_harmless_in(is_dicom, i, word))
}

fn is_harmless(_: usize, word: &str) -> bool {
    words::is_harmless(word)
}

/// Whether a word of a file name is harmless. The first word of a DICOM volume is the number of its
/// series.
fn is_harmless_in(is_dicom: bool, index: usize, word: &str) -> bool {
    let is_number = word.bytes().all(|byte| byte.is_ascii_digit());
    words::is_harmless(word) || (is_dicom && index == 0 && is_number)
}

/// Entities of BIDS names, besides `sub`.
const ENTITIES: [&str; 19] = [
    "ses", "sample", "task", "acq", "ce", "trc", "stain", "rec", "dir", "run", "mod", "echo",
    "flip", "inv", "mt", "part", "space", "desc", "res",
];

/// Whether a stem is `sub-<label>`, more entities, and a suffix. The id that tells results of one
/// name apart may follow.
fn is_bids(stem: &str) -> bool {
    let is_label =
        |label: &str| !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let is_id = |id: &str| id.len() == 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let stem = stem.rsplit_once('-').filter(|(_, id)| is_id(id)).map_or(stem, |(stem, _)| stem);

    let Some((entities, suffix)) = stem.rsplit_once('_') else { return false };
    let mut entities = entities.split('_').map(|part| part.split_once('-'));
    let is_first = matches!(entities.next(), Some(Some(("sub", label))) if is_label(label));
    let is_known = |part: Option<(&str, &str)>| {
        part.is_some_and(|(entity, label)| ENTITIES.contains(&entity) && is_label(label))
    };
    let is_suffix = known_suffix(suffix).is_some() || words::is_harmless(suffix);
    is_first && entities.all(is_known) && is_suffix
}

fn is_sign(c: char) -> bool {
    !c.is_alphanumeric()
}

fn words_of(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_sign).filter(|word| !word.is_empty())
}

/// The text without its words that are not harmless. `replacement` stands in place of the first.
fn cleaned(
    text: &str,
    mut replacement: Option<String>,
    is_harmless: impl Fn(usize, &str) -> bool,
) -> String {
    if words_of(text).enumerate().all(|(index, word)| is_harmless(index, word)) {
        return text.to_owned();
    }
    let (mut cleaned, mut index) = (String::new(), 0);
    for piece in text.split_inclusive(is_sign) {
        let word = piece.trim_end_matches(is_sign);
        if word.is_empty() || is_harmless(index, word) {
            cleaned += piece;
        } else if let Some(replacement) = replacement.take() {
            cleaned += &replacement;
            cleaned += &piece[word.len()..];
        }
        index += usize::from(!word.is_empty());
    }
    cleaned.trim_matches(is_sign).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        cohort::{CohortKey, CohortRule},
        scan::ScanId,
    };

    const KEY: IdentityKey = IdentityKey([7; 32]);

    fn hashed() -> Pseudonyms {
        Pseudonyms::new(IdentityChoice::Hashed, KEY)
    }

    fn record(stem: &str) -> ScanRecord {
        let facts = AcquisitionFacts::of(stem, [1.0; 3]);
        let (cohort, _) = CohortKey::choose(&[] as &[CohortRule], &facts, stem, 0.0, "m");
        ScanRecord {
            source_name: format!("{stem}.nii.gz"),
            came_from: "ROE^RITA MRN9001 19700101/20240102 MR HEAD/1 t1".to_owned(),
            output_stem: stem.to_owned(),
            acquisition: AcquisitionFacts { series: Some("T1 Roe, Rita".to_owned()), ..facts },
            ..ScanRecord::new(ScanId([7; 32]), cohort)
        }
    }

    /// Every text that results have of a scan.
    fn all(names: &Pseudonyms, record: &ScanRecord) -> String {
        let note = format!("left out: {}/9.dcm and {}", record.came_from, record.source_name);
        let facts = names.acquisition(&record.acquisition);
        format!(
            "{:?} {} {} {facts:?} {:?} {}",
            names.text(&record.came_from),
            names.source_name(record),
            names.stem(record),
            record.dicom.as_ref().map(|dicom| names.dicom(dicom)),
            names.note(&note, record),
        )
    }

    #[test]
    fn hashes_are_those_of_rfc_4231_and_another_key_gives_another() {
        let mut bytes = [0; 32];
        bytes[..20].fill(0x0b);
        let key = IdentityKey::new(bytes);
        assert_eq!(key.hash("Hi There"), "b0344c61d8db3853");
        assert_ne!(KEY.hash("Hi There"), key.hash("Hi There"));
        assert_eq!(IdentityKey::from_hex(&(key.to_hex() + "\n")), Some(key));
        assert_eq!(IdentityKey::from_hex("0b0b"), None);
        assert!(!format!("{key:?}").contains("0b"));
    }

    #[test]
    fn no_text_of_a_result_names_the_patient_unless_the_site_wants_it() {
        let named = ["Roe", "ROE", "Rita", "RITA", "9001", "1970", "20240102", "1.2.840"];
        let dicom = DicomFacts {
            study_instance_uid: Some("1.2.840.1".to_owned()),
            series_instance_uid: Some("1.2.840.2".to_owned()),
            frame_of_reference_uid: None,
            acquisition_datetime: Some("1970-01-02T03:04:05".to_owned()),
        };
        for (stem, dicom) in [("ROE_RITA_MRN9001_T1w", None), ("1_t1_Roe_T1w", Some(dicom))] {
            let record = ScanRecord { dicom, ..record(stem) };
            for choice in [IdentityChoice::Hashed, IdentityChoice::Absent] {
                let all = all(&Pseudonyms::new(choice, KEY), &record);
                assert!(!named.iter().any(|name| all.contains(name)), "{choice:?}: {all}");
            }
            let clear = all(&Pseudonyms::new(IdentityChoice::Clear, KEY), &record);
            assert!(clear.contains("ROE^RITA MRN9001 19700101/20240102 MR HEAD/1 t1"), "{clear}");
            assert!(clear.contains(stem) && clear.contains("T1 Roe, Rita"), "{clear}");
        }
    }

    #[test]
    fn names_that_say_what_a_scan_is_stay_and_others_keep_what_is_harmless() {
        let name = |stem: &str| hashed().name(stem, false).unwrap();
        for plain in [
            "sub-01_T1w",
            "sub-RR01_ses-2_acq-highres_run-1_FLAIR",
            "sub-01_T1w-3fa94711beef",
            "FLAIR",
            "scan-3",
            "t1_mprage_sag_p2_1mm",
        ] {
            assert_eq!(name(plain), plain);
        }
        for (stem, start, end) in [
            ("ROE_RITA_T1w", "", "_T1w"),
            ("sub-01_name-ROE_T1w", "sub-01_", "-T1w"),
            ("t1_19700101", "t1_", ""),
            ("t1_M\u{fc}ller_sag", "t1_", "_sag"),
        ] {
            assert_eq!(name(stem), format!("{start}{}{end}", KEY.hash(stem)), "{stem}");
        }
        assert_eq!(name("50100_t1_T1w"), format!("{}_t1_T1w", KEY.hash("50100_t1_T1w")));
        assert_eq!(hashed().name("50100_t1_T1w", true).unwrap(), "50100_t1_T1w");
    }

    #[test]
    fn stems_stay_unique_and_one_without_a_name_is_that_of_the_id() {
        let stems = ["ROE_T1w", "DOE_T1w", "ROE_DOE_T1w", "T1w"];
        let found: std::collections::BTreeSet<String> =
            stems.iter().map(|stem| hashed().stem(&record(stem))).collect();
        assert_eq!(found.len(), stems.len());
        let nameless = Pseudonyms::new(IdentityChoice::Absent, KEY);
        assert_eq!(nameless.stem(&record("ROE_T1w")), "scan-070707070707_T1w");
        assert_eq!(nameless.stem(&record("sub-1")), "scan-070707070707");
        assert_eq!(nameless.source_name(&record("sub-1_T1w")), "");
    }

    #[test]
    fn a_description_keeps_its_words_of_the_trade() {
        let text = "T1_mprage Roe Rita sag";
        let found = hashed().description(text);
        assert_eq!(found, Some(format!("T1_mprage {} sag", KEY.hash(text))));
        assert_eq!(hashed().description("T2* (tra)").as_deref(), Some("T2* (tra)"));
        let nameless = Pseudonyms::new(IdentityChoice::Absent, KEY);
        assert_eq!(nameless.description("Roe"), None);
        assert_eq!(nameless.description("T2 FLAIR Roe").as_deref(), Some("T2 FLAIR"));
        assert_eq!(hashed().description("t2_tse_tra 3mm").as_deref(), Some("t2_tse_tra 3mm"));
    }
}
