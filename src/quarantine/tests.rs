//! The quarantine as a whole: refused, finished after a kill, looked at again, put back.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
};

use super::{
    draft::Draft,
    leaving::{Leaver, Leaving},
    reason::{LEAVING, RETURNING, look},
    *,
};
use crate::{
    domain::{
        error::{QuarantineReason, Refusal},
        scan::FileStamp,
    },
    files::MARK,
};

/// A refused file as intake has it.
fn now(path: &Path) -> Source<'_> {
    Source { path, look: Some(stamp(path)) }
}

fn stamp(path: &Path) -> FileStamp {
    look(&fs::symlink_metadata(path).unwrap())
}

fn folder_of(refused: io::Result<Refused>) -> PathBuf {
    let Refused::Entry(folder) = refused.unwrap() else { panic!("nothing was refused") };
    folder
}

fn reason_in(entry: &Path) -> ReasonFile {
    serde_json::from_str(&fs::read_to_string(entry.join("reason.json")).unwrap()).unwrap()
}

fn n_entries(quarantine: &Path) -> usize {
    let mut index = Index::default();
    index.refresh(quarantine).unwrap();
    assert_eq!(index.n_entries(), entries(quarantine).unwrap().len());
    index.n_entries()
}

#[test]
fn quarantine_keeps_every_file_apart_and_explains_each() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = Refusal::new(QuarantineReason::Truncated, "9 bytes", "352", "export again");
    let mut places = Vec::new();
    for _ in 0..2 {
        let file = folder.path().join("a.nii");
        fs::write(&file, "x").unwrap();
        let into = folder.path().join("q");
        let refused = quarantine(&into, now(&file), Path::new("sub/a.nii"), &refusal, 7);
        places.push(folder_of(refused));
        assert!(!file.exists());
    }
    assert_ne!(places[0], places[1]);
    assert!(places[1].join("a.nii").is_file());
    let text = fs::read_to_string(places[1].join("reason.json")).unwrap();
    let reason: ReasonFile = serde_json::from_str(&text).unwrap();
    assert_eq!((reason.refusal, reason.moved), (refusal, true));
    assert_eq!(n_entries(&folder.path().join("q")), 2);
}

fn refused(folder: &Path, came_from: &str) -> PathBuf {
    let file = folder.join("some file");
    fs::write(&file, "content").unwrap();
    let refusal = Refusal::new(QuarantineReason::Truncated, "9 bytes", "352", "export again");
    let into = folder.join("q");
    folder_of(quarantine(&into, now(&file), Path::new(came_from), &refusal, 7));
    into
}

#[test]
fn an_entry_goes_back_to_where_it_came_from() {
    let folder = tempfile::tempdir().unwrap();
    let (q, incoming) = (refused(folder.path(), "sub-1/a.nii"), folder.path().join("in"));
    let listed = entries(&q).unwrap();
    assert_eq!(listed[0].name, Path::new("truncated/a.nii"));
    assert_eq!(listed[0].reason.as_ref().unwrap().refusal.found, "9 bytes");
    let place = requeue(&q, &listed[0].name, &incoming).unwrap();
    assert_eq!(place, incoming.join("sub-1/a.nii"));
    assert_eq!(fs::read_to_string(&place).unwrap(), "content");
    assert_eq!(entries(&q).unwrap(), []);
    // Another file of the same name is not put back while the first one is in the folder.
    refused(folder.path(), "sub-1/a.nii");
    let error = requeue(&q, &listed[0].name, &incoming).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(entries(&q).unwrap().len(), 1);
    drop_entry(&q, &listed[0].name).unwrap();
    assert_eq!((entries(&q).unwrap().len(), place.is_file()), (0, true));
}

#[test]
fn the_picture_of_a_refusal_lies_beside_its_reason_and_goes_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let (q, incoming) = (folder.path().join("q"), folder.path().join("in"));
    let refusal = Refusal::new(QuarantineReason::RegistrationFailed, "20 %", "31 %", "look")
        .with_picture(b"png".to_vec());
    // A DICOM file may have any name.
    for name in ["a.nii", "registration.png"] {
        let file = folder.path().join("some file");
        fs::write(&file, "content").unwrap();
        let place = folder_of(quarantine(&q, now(&file), Path::new(name), &refusal, 7));
        let entry = entries(&q).unwrap().remove(0);
        let picture = Path::new("registration_failed/a.nii/registration.png");
        let expected = (name == "a.nii").then(|| picture.to_owned());
        assert_eq!(entry.picture, expected);
        assert!(!fs::read_to_string(place.join("reason.json")).unwrap().contains("picture"));
        assert_eq!(fs::read(place.join(name)).unwrap(), b"content");
        if let Some(picture) = expected {
            assert_eq!(fs::read(q.join(picture)).unwrap(), b"png");
        }
        let back = requeue(&q, &entry.name, &incoming).unwrap();
        assert_eq!(fs::read(back).unwrap(), b"content");
        assert_eq!(entries(&q).unwrap(), []);
    }
    let file = folder.path().join("some file");
    fs::write(&file, "content").unwrap();
    let place = folder_of(quarantine(&q, now(&file), Path::new("b.nii"), &refusal, 7));
    drop_entry(&q, Path::new("registration_failed/b.nii")).unwrap();
    assert!(!place.exists());
}

#[test]
fn a_refusal_stands_where_its_picture_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("entry");
    fs::create_dir_all(place.join("registration.png/in the way")).unwrap();
    let refusal = Refusal::new(QuarantineReason::RegistrationFailed, "20 %", "31 %", "look");
    let draft = Draft { folder: place.clone() };
    draft.add_picture(&refusal.with_picture(b"png".to_vec()));
    assert_eq!(fs::read_dir(place).unwrap().count(), 1, "nothing half-written is left");
}

#[test]
fn a_series_is_one_entry_and_goes_back_as_one_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (q, incoming) = (folder.path().join("q"), folder.path().join("in"));
    fs::create_dir_all(incoming.join("study")).unwrap();
    let files = ["reason.json", "b.dcm"].map(|name| incoming.join("study").join(name));
    files.iter().for_each(|file| fs::write(file, "x").unwrap());
    let refusal = Refusal::new(QuarantineReason::BadHeader, "a gap", "none", "export again");
    let gone = incoming.join("study/gone.dcm");
    let gone = Source { path: &gone, look: Some(stamp(&files[0])) };
    let sources = [now(&files[0]), now(&files[1]), gone];
    let came_from = Path::new("study/5_T1");
    let place = folder_of(quarantine_series(&q, &sources, came_from, &refusal, 7));
    assert_eq!(n_entries(&q), 1);
    assert!(!reason_in(&place).moved, "one was gone");
    let back = requeue(&q, Path::new("bad_header/5_T1"), &incoming).unwrap();
    assert_eq!(back, incoming.join("study/5_T1"));
    assert!(back.join("reason.json").is_file() && back.join("b.dcm").is_file());
    assert_eq!(n_entries(&q), 0);
    // If all files are gone, there is nothing to refuse.
    let none = quarantine_series(&q, &[gone], Path::new("6_T2"), &refusal, 7).unwrap();
    assert_eq!((none, n_entries(&q)), (Refused::Changed, 0));
    let place = folder_of(quarantine_series(&q, &[], Path::new("6_T2"), &refusal, 7));
    assert!(
        !reason_in(&place).moved && requeue(&q, Path::new("bad_header/6_T2"), &incoming).is_err()
    );
}

#[test]
fn files_of_one_name_from_several_folders_are_kept_apart() {
    let folder = tempfile::tempdir().unwrap();
    let (q, incoming) = (folder.path().join("q"), folder.path().join("in"));
    let files = ["cd/a/IM1", "cd/b/IM1", "cd/b/c/IM2"].map(|name| incoming.join(name));
    for file in &files {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, file.as_os_str().as_encoded_bytes()).unwrap();
    }
    let refusal = Refusal::new(QuarantineReason::BadHeader, "a gap", "none", "export again");
    let sources = [0, 1, 2].map(|n| now(&files[n]));
    let place = folder_of(quarantine_series(&q, &sources, Path::new("cd/5_T1"), &refusal, 7));
    assert!(reason_in(&place).moved);
    assert!(files.iter().all(|file| !file.exists()));

    let back = requeue(&q, Path::new("bad_header/5_T1"), &incoming).unwrap();
    assert_eq!(back, incoming.join("cd/5_T1"));
    for (file, name) in files.iter().zip(["a/IM1", "b/IM1", "b/c/IM2"]) {
        let content = fs::read(back.join(name)).unwrap();
        assert_eq!(content, file.as_os_str().as_encoded_bytes());
    }
}

#[test]
fn no_name_and_no_reason_leads_out_of_the_folders() {
    let folder = tempfile::tempdir().unwrap();
    let (q, incoming) = (refused(folder.path(), "a.nii"), folder.path().join("in"));
    fs::create_dir_all(folder.path().join("other/thing")).unwrap();
    std::os::unix::fs::symlink(folder.path().join("other/thing"), q.join("truncated/link"))
        .unwrap();
    let outside = folder.path().join("other/thing");
    for name in ["../other/thing", "truncated", "truncated/link", "truncated/..", "", "/etc/ssl"]
        .map(PathBuf::from)
        .into_iter()
        .chain([outside.clone()])
    {
        assert!(drop_entry(&q, &name).is_err(), "{}", name.display());
        assert!(requeue(&q, &name, &incoming).is_err(), "{}", name.display());
    }
    assert!(outside.is_dir());
    let reason = q.join("truncated/a.nii/reason.json");
    let text = fs::read_to_string(&reason).unwrap().replace("\"a.nii\"", "\"../../x/a.nii\"");
    fs::write(&reason, text).unwrap();
    let place = requeue(&q, Path::new("truncated/a.nii"), &incoming).unwrap();
    assert_eq!(place, incoming.join("a.nii"));
}

#[test]
fn what_somebody_put_beside_a_refused_file_is_neither_taken_for_it_nor_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let (q, name) = (refused(folder.path(), "a.nii"), Path::new("truncated/a.nii"));
    let note = q.join("truncated/a.nii/.DS_Store");
    fs::write(&note, "").unwrap();
    let error = requeue(&q, name, folder.path()).unwrap_err();
    assert!(error.to_string().contains("move the others out of"), "{error}");
    assert!(note.is_file() && q.join("truncated/a.nii/a.nii").is_file());
    fs::remove_file(note).unwrap();
    requeue(&q, name, folder.path()).unwrap();
    assert_eq!(entries(&q).unwrap(), []);
}

#[test]
fn a_refused_file_that_grows_is_found_and_one_that_does_not_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let q = refused(folder.path(), "a.nii");
    refused(folder.path(), "b.nii");
    let series = ["1.dcm", "2.dcm"].map(|name| folder.path().join(name));
    series.iter().for_each(|file| fs::write(file, "x").unwrap());
    let refusal = Refusal::new(QuarantineReason::Corrupt, "x", "y", "z");
    let sources = [0, 1].map(|n| now(&series[n]));
    folder_of(quarantine_series(&q, &sources, Path::new("5_T1"), &refusal, 7));
    let mut recheck = Index::default();
    assert!(recheck.changed(&q, folder.path(), 9).unwrap().is_empty(), "a move is no change");

    fs::write(q.join("truncated/b.nii/b.nii"), "content and more").unwrap();
    fs::write(q.join("corrupt/5_T1/5_T1/2.dcm"), "xy").unwrap();
    let grown = ["corrupt/5_T1", "truncated/b.nii"].map(PathBuf::from);
    assert_eq!(recheck.changed(&q, folder.path(), 9).unwrap(), grown);
    // One after the other, and then from the start.
    let mut recheck = Index::default();
    let by_one = [(); 4].map(|()| recheck.changed(&q, folder.path(), 1).unwrap());
    let wanted = [vec![grown[0].clone()], vec![], vec![grown[1].clone()], vec![grown[0].clone()]];
    assert_eq!(by_one, wanted);
    // What somebody has put there is nothing that a sender goes on with.
    fs::write(q.join("truncated/b.nii/note"), "").unwrap();
    fs::remove_dir_all(q.join("corrupt")).unwrap();
    assert!(recheck.changed(&q, folder.path(), 9).unwrap().is_empty());
}

#[test]
fn a_file_that_was_refused_in_place_has_a_reason_and_no_copy() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = Refusal::new(QuarantineReason::Truncated, "9 bytes", "352", "export again");
    let (q, file) = (folder.path().join("q"), folder.path().join("a.nii"));
    fs::write(&file, "half").unwrap();
    folder_of(refuse_in_place(&q, now(&file), Path::new("a.nii"), &refusal, 7));
    let listed = entries(&q).unwrap();
    assert!(file.is_file() && !listed[0].reason.as_ref().unwrap().moved);
    let error = requeue(&q, &listed[0].name, folder.path()).unwrap_err();
    assert!(error.to_string().contains("is still in the incoming folder"), "{error}");

    let mut recheck = Index::default();
    let mut left = || {
        assert!(recheck.changed(&q, folder.path(), 9).unwrap().is_empty());
        entries(&q).unwrap().len()
    };
    assert_eq!(left(), 1);
    fs::write(&file, "half, and the rest").unwrap();
    assert_eq!(left(), 0, "the reason no longer applies");
}

#[test]
fn a_file_that_was_never_moved_is_said_to_lie_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let q = refused(folder.path(), "a.nii");
    fs::remove_file(q.join("truncated/a.nii/a.nii")).unwrap();
    let error = requeue(&q, Path::new("truncated/a.nii"), folder.path()).unwrap_err();
    assert!(error.to_string().contains("is still in the incoming folder"), "{error}");
}

/// An incoming folder with a file and the quarantine for it.
struct Place {
    folder: tempfile::TempDir,
    /// Holds the quarantine; another file system if there is one.
    other: tempfile::TempDir,
}

const CAME_FROM: &str = "sub/a.nii";

impl Place {
    fn here() -> Self {
        let [folder, other] = [(), ()].map(|()| tempfile::tempdir().unwrap());
        Self { folder, other }.with_file()
    }

    /// With the quarantine on another file system. `None` if this machine has no other one.
    fn across() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir_in("/dev/shm").ok()?;
        let device = |folder: &tempfile::TempDir| fs::metadata(folder.path()).unwrap().dev();
        if device(&folder) == device(&other) {
            eprintln!("skipped: /dev/shm is on the file system of the temporary folder");
            return None;
        }
        Some(Self { folder, other }.with_file())
    }

    fn both() -> impl Iterator<Item = Self> {
        std::iter::once(Self::here()).chain(Self::across())
    }

    fn with_file(self) -> Self {
        fs::create_dir_all(self.file().parent().unwrap()).unwrap();
        fs::write(self.file(), "content").unwrap();
        self
    }

    fn incoming(&self) -> PathBuf {
        self.folder.path().join("in")
    }

    fn file(&self) -> PathBuf {
        self.incoming().join(CAME_FROM)
    }

    fn q(&self) -> PathBuf {
        self.other.path().join("q")
    }

    fn refuse(&self) -> io::Result<Refused> {
        quarantine(&self.q(), now(&self.file()), Path::new(CAME_FROM), &truncated(), 7)
    }

    fn finish(&self) {
        finish(&self.q(), &[&self.incoming()]).unwrap();
    }

    /// All files of incoming folder and quarantine with their content, without reasons.
    fn files(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for root in [self.incoming(), self.q()] {
            collect(&root, &root, &mut found);
        }
        found.retain(|(name, _)| !name.ends_with("reason.json"));
        found.sort();
        found
    }
}

fn collect(root: &Path, folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.symlink_metadata().unwrap().is_dir() {
            collect(root, &path, found);
        } else {
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            found.push((name, fs::read_to_string(&path).unwrap_or_default()));
        }
    }
}

fn truncated() -> Refusal {
    Refusal::new(QuarantineReason::Truncated, "9 bytes", "352", "export again")
}

fn one(name: &str, content: &str) -> Vec<(String, String)> {
    vec![(name.to_owned(), content.to_owned())]
}

const IN_QUARANTINE: &str = "truncated/a.nii/a.nii";

#[test]
fn a_file_goes_to_quarantine_and_back_also_between_file_systems() {
    for place in Place::both() {
        let entry = folder_of(place.refuse());
        assert_eq!(entry, place.q().join("truncated/a.nii"));
        assert!(reason_in(&entry).moved);
        assert_eq!(place.files(), one(IN_QUARANTINE, "content"));
        let mut index = Index::default();
        let changed = index.changed(&place.q(), &place.incoming(), 9).unwrap();
        assert!(changed.is_empty(), "a move is no change");
        requeue(&place.q(), Path::new("truncated/a.nii"), &place.incoming()).unwrap();
        assert_eq!(place.files(), one(CAME_FROM, "content"));
        assert_eq!(n_entries(&place.q()), 0);
    }
}

#[test]
fn links_and_folders_stay_and_what_they_lead_to_stays() {
    for place in Place::both() {
        let precious = place.folder.path().join("precious");
        fs::create_dir_all(precious.join("deeper")).unwrap();
        fs::write(precious.join("deeper/result"), "x").unwrap();
        let evil = place.incoming().join("evil.nii");
        fs::create_dir(&evil).unwrap();
        symlink(&precious, evil.join("link")).unwrap();
        let link = place.incoming().join("link.nii");
        symlink(precious.join("deeper/result"), &link).unwrap();
        for (path, name) in [(&evil, "evil.nii"), (&link, "link.nii")] {
            let refused = quarantine(&place.q(), now(path), Path::new(name), &truncated(), 7);
            let entry = folder_of(refused);
            assert!(!reason_in(&entry).moved);
            assert_eq!(fs::read_dir(entry).unwrap().count(), 1, "only the reason");
        }
        let sources = [now(&evil), now(&link)];
        let series = quarantine_series(&place.q(), &sources, Path::new("5_T1"), &truncated(), 7);
        assert!(!reason_in(&folder_of(series)).moved);
        assert!(precious.join("deeper/result").is_file());
        assert!(evil.join("link").is_symlink() && link.is_symlink());
    }
}

#[test]
fn another_file_under_the_name_of_a_refused_one_is_not_touched() {
    for place in Place::both() {
        let (file, was) = (place.file(), stamp(&place.file()));
        let good = place.incoming().join("good");
        fs::write(&good, "a good one").unwrap();
        fs::rename(&good, &file).unwrap();
        let source = Source { path: &file, look: Some(was) };
        let refused = quarantine(&place.q(), source, Path::new(CAME_FROM), &truncated(), 7);
        assert_eq!(refused.unwrap(), Refused::Changed);
        let came_from = Path::new("5_T1");
        let refused = quarantine_series(&place.q(), &[source], came_from, &truncated(), 7);
        assert_eq!(refused.unwrap(), Refused::Changed);
        assert_eq!(place.files(), one(CAME_FROM, "a good one"));
    }
}

/// Makes the draft of an entry, as it is after the list of files has been written.
fn begin(place: &Place) -> (Draft, Leaving) {
    let file = place.file();
    let leaver = Leaver::new(&file, Some(stamp(&file)), Path::new("a.nii")).unwrap().unwrap();
    let reason = ReasonFile::new(&truncated(), Path::new(CAME_FROM), 7);
    let reason = ReasonFile { moved: true, ..reason };
    let name = Path::new("a.nii").as_os_str().into();
    let leaving = Leaving { reason, name, files: vec![leaver] };
    let draft = Draft::new(&place.q(), &truncated()).unwrap();
    leaving.write(&draft.folder).unwrap();
    (draft, leaving)
}

#[test]
fn a_good_scan_that_replaces_a_broken_one_during_its_copy_stays_and_is_read() {
    let place = Place::here();
    let (draft, _) = begin(&place);
    fs::copy(place.file(), draft.folder.join("a.nii")).unwrap();
    let good = place.incoming().join("good");
    fs::write(&good, "a good one").unwrap();
    fs::rename(&good, place.file()).unwrap();
    place.finish();
    let both = [one(CAME_FROM, "a good one"), one(IN_QUARANTINE, "content")].concat();
    assert_eq!(place.files(), both);
    assert!(reason_in(&place.q().join("truncated/a.nii")).moved);
}

#[test]
fn a_broken_file_that_its_sender_goes_on_with_during_its_copy_stays_alone() {
    let place = Place::here();
    let (draft, _) = begin(&place);
    fs::copy(place.file(), draft.folder.join("a.nii")).unwrap();
    fs::OpenOptions::new().append(true).open(place.file()).unwrap().set_len(9).unwrap();
    place.finish();
    assert_eq!(place.files(), one(CAME_FROM, "content\0\0"));
}

#[test]
fn what_a_kill_leaves_is_finished_or_undone() {
    let finished = |place: &Place| {
        place.finish();
        (place.files(), entries(&place.q()).unwrap().len())
    };
    let undone = (one(CAME_FROM, "content"), 0);
    let done = (one(IN_QUARANTINE, "content"), 1);

    let place = Place::here();
    let draft = Draft::new(&place.q(), &truncated()).unwrap();
    fs::write(draft.folder.join(".reason.json.tmp"), "{").unwrap();
    assert_eq!(finished(&place), undone, "before the list");

    let place = Place::here();
    let (draft, _) = begin(&place);
    fs::write(draft.folder.join(".copy"), "cont").unwrap();
    assert_eq!(finished(&place), undone, "within a copy");

    let place = Place::here();
    let (draft, _) = begin(&place);
    fs::copy(place.file(), draft.folder.join("a.nii")).unwrap();
    assert_eq!(finished(&place), done, "after a copy");

    let place = Place::here();
    let (draft, _) = begin(&place);
    fs::copy(place.file(), draft.folder.join("a.nii")).unwrap();
    let number = fs::metadata(place.file()).unwrap().ino();
    let aside = place.file().with_file_name(format!("{MARK}{number}"));
    fs::rename(place.file(), aside).unwrap();
    assert_eq!(finished(&place), done, "within the removal of the source");

    let place = Place::here();
    let (draft, _) = begin(&place);
    fs::rename(place.file(), draft.folder.join("a.nii")).unwrap();
    assert_eq!(finished(&place), done, "after a rename");
    assert_eq!(finished(&place), done, "again");

    let place = Place::here();
    let (draft, leaving) = begin(&place);
    fs::rename(place.file(), draft.folder.join("a.nii")).unwrap();
    leaving.reason.write(&draft.folder).unwrap();
    fs::remove_file(draft.folder.join(LEAVING)).unwrap();
    assert_eq!(finished(&place), done, "before the entry gets its name");
}

#[test]
fn a_list_that_names_files_elsewhere_is_not_followed() {
    let place = Place::here();
    let (draft, _) = begin(&place);
    fs::copy(place.file(), draft.folder.join("a.nii")).unwrap();
    finish(&place.q(), &[&place.incoming().join("other")]).unwrap();
    assert!(place.file().is_file());
    assert_eq!(n_entries(&place.q()), 1, "what is in the entry may be the only copy");
}

#[test]
fn a_reason_that_is_there_is_not_repeated() {
    let place = Place::here();
    place.refuse().unwrap();
    // A kill after the entry became visible, and before intake remembered a file that is gone.
    let file = place.file();
    let source = Source { path: &file, look: None };
    for _ in 0..2 {
        quarantine(&place.q(), source, Path::new(CAME_FROM), &truncated(), 7).unwrap();
    }
    assert_eq!(n_entries(&place.q()), 2);
}

#[test]
fn names_of_full_length_get_shorter_entries() {
    let place = Place::here();
    let name = "ä".repeat(125) + ".nii";
    assert_eq!(name.len(), 254);
    let name = format!("x{name}");
    for n in 0..3 {
        let file = place.incoming().join(&name);
        fs::write(&file, format!("{n}")).unwrap();
        let entry =
            folder_of(quarantine(&place.q(), now(&file), Path::new(&name), &truncated(), 7));
        assert_eq!(fs::read_to_string(entry.join(&name)).unwrap(), format!("{n}"));
        assert!(entry.file_name().unwrap().to_str().is_some(), "characters stay whole");
    }
    for entry in entries(&place.q()).unwrap() {
        let back = requeue(&place.q(), &entry.name, &place.incoming()).unwrap();
        assert_eq!(back.file_name().unwrap().to_str().unwrap(), name);
        fs::remove_file(back).unwrap();
    }
}

#[test]
fn many_files_of_one_name_have_entries_of_their_own() {
    let place = Place::here();
    for n in 0..40 {
        fs::write(place.file(), format!("{n}")).unwrap();
        folder_of(place.refuse());
    }
    assert_eq!(n_entries(&place.q()), 40);
}

#[test]
fn the_count_follows_own_and_other_changes() {
    let place = Place::here();
    let q = place.q();
    fs::create_dir(&q).unwrap();
    let mut index = Index::default();
    for n in 1..=3 {
        fs::write(place.file(), "content").unwrap();
        let entry = folder_of(place.refuse());
        index.added(&q, &entry).unwrap();
        assert_eq!(index.n_entries(), n);
    }
    drop_entry(&q, Path::new("truncated/a.nii.2")).unwrap();
    index.refresh(&q).unwrap();
    assert_eq!(index.n_entries(), 2);
    // Somebody takes one away, and oddscan adds one.
    fs::remove_dir_all(q.join("truncated/a.nii")).unwrap();
    fs::write(place.file(), "content").unwrap();
    let entry = folder_of(place.refuse());
    index.added(&q, &entry).unwrap();
    assert_eq!(index.n_entries(), 2);
    assert!(!index.has_unfinished());
    let place = place.with_file();
    begin(&place);
    index.refresh(&q).unwrap();
    assert_eq!((index.n_entries(), index.has_unfinished()), (2, true));
}

#[test]
fn an_entry_with_a_link_is_not_put_back() {
    for place in Place::both() {
        let files = ["1.dcm", "2.dcm"].map(|name| place.incoming().join(name));
        files.iter().for_each(|file| fs::write(file, "x").unwrap());
        let sources = [now(&files[0]), now(&files[1])];
        let series = quarantine_series(&place.q(), &sources, Path::new("5_T1"), &truncated(), 7);
        let entry = folder_of(series);
        symlink(place.incoming(), entry.join("5_T1/link")).unwrap();
        let error = requeue(&place.q(), Path::new("truncated/5_T1"), &place.incoming());
        assert!(error.unwrap_err().to_string().contains("is no regular file; remove it first"));
        assert!(entry.join("5_T1/1.dcm").is_file() && !place.incoming().join("5_T1").exists());
        fs::remove_file(entry.join("5_T1/link")).unwrap();
        requeue(&place.q(), Path::new("truncated/5_T1"), &place.incoming()).unwrap();
        assert!(place.incoming().join("5_T1/2.dcm").is_file());
    }
}

#[test]
fn a_return_that_was_killed_leaves_the_file_whole_in_one_place() {
    let place = Place::here();
    let (q, incoming) = (place.q(), place.incoming());
    let entry = folder_of(place.refuse());
    let hidden = place.file().with_file_name(format!("{MARK}1"));
    let begun = serde_json::json!({ "hidden": hidden, "to": place.file() }).to_string() + "\n";
    let look_again = || Index::default().changed(&q, &incoming, 9).unwrap();

    fs::write(entry.join(RETURNING), &begun).unwrap();
    fs::write(&hidden, "cont").unwrap();
    look_again();
    assert_eq!(place.files(), one(IN_QUARANTINE, "content"), "within the copy");

    fs::write(place.file(), "content").unwrap();
    let number = fs::metadata(place.file()).unwrap().ino();
    let content = serde_json::json!(Content::at(&place.file()));
    let copied = serde_json::json!({ "number": number, "content": content }).to_string();
    fs::write(entry.join(RETURNING), begun.clone() + &copied + "\n").unwrap();
    look_again();
    assert_eq!(place.files(), one(CAME_FROM, "content"), "after the copy");
    assert_eq!(n_entries(&q), 0);

    let entry = folder_of(place.refuse());
    fs::write(entry.join(RETURNING), &begun).unwrap();
    fs::rename(entry.join("a.nii"), place.file()).unwrap();
    look_again();
    assert_eq!(place.files(), one(CAME_FROM, "content"), "after the rename");
    assert_eq!(n_entries(&q), 0);
}

#[cfg(feature = "faults")]
mod at_each_step {
    use std::{env, process::Command};

    use super::*;

    const ROOTS: &str = "ODDSCAN_TEST_ROOTS";

    /// What the process does that is killed.
    const ACTS: [&str; 5] = ["file", "series", "in place", "requeue", "drop"];

    fn act(act: &str, incoming: &Path, q: &Path) -> io::Result<()> {
        let file = incoming.join(CAME_FROM);
        let other = incoming.join("sub/b.nii");
        let (came_from, refusal) = (Path::new(CAME_FROM), truncated());
        match act {
            "file" => quarantine(q, now(&file), came_from, &refusal, 7).map(drop),
            "series" => {
                let sources = [now(&file), now(&other)];
                quarantine_series(q, &sources, came_from, &refusal, 7).map(drop)
            }
            "in place" => refuse_in_place(q, now(&file), came_from, &refusal, 7).map(drop),
            "requeue" => requeue(q, Path::new("truncated/a.nii"), incoming).map(drop),
            "drop" => drop_entry(q, Path::new("truncated/a.nii")),
            other => unreachable!("{other}"),
        }
    }

    /// Not a test of its own: the process that the test below kills.
    #[test]
    fn child() {
        let Ok(roots) = env::var(ROOTS) else { return };
        let [what, incoming, q] = roots.split('|').collect::<Vec<_>>()[..] else { panic!() };
        if act(what, Path::new(incoming), Path::new(q)).is_err() {
            std::process::exit(9);
        }
    }

    /// Exit code; none if it was killed.
    fn run(what: &str, place: &Place, fault: &str) -> Option<i32> {
        let [incoming, q] = [place.incoming(), place.q()].map(|path| path.display().to_string());
        let mut child = Command::new(env::current_exe().unwrap());
        child.args(["--exact", "quarantine::tests::at_each_step::child", "--nocapture"]);
        child.env(ROOTS, format!("{what}|{incoming}|{q}")).env("ODDSCAN_FAULT", fault);
        child.output().unwrap().status.code()
    }

    fn prepare(what: &str, place: &Place) {
        fs::write(place.incoming().join("sub/b.nii"), "second").unwrap();
        if ["requeue", "drop"].contains(&what) {
            folder_of(place.refuse());
        }
    }

    /// What a start does after a kill: it finishes, and does again what is not done.
    fn start_again(what: &str, place: &Place) {
        finish(&place.q(), &[&place.incoming()])
            .unwrap_or_else(|error| assert_eq!(error.kind(), io::ErrorKind::NotFound));
        Index::default().changed(&place.q(), &place.incoming(), 9).ok();
        let is_done = match what {
            "in place" => false,
            "requeue" => place.file().is_file(),
            "drop" => entries(&place.q()).unwrap().is_empty(),
            _ => !place.file().exists(),
        };
        if !is_done {
            act(what, &place.incoming(), &place.q()).unwrap();
        }
    }

    fn check(what: &str, place: &Place, when: &str) {
        let other = one("sub/b.nii", "second");
        let expected = match what {
            "file" => [other, one(IN_QUARANTINE, "content")].concat(),
            "series" => {
                let file = |name| format!("truncated/a.nii/a.nii/{name}");
                [one(&file("a.nii"), "content"), one(&file("b.nii"), "second")].concat()
            }
            "drop" => other,
            _ => [one(CAME_FROM, "content"), other].concat(),
        };
        assert_eq!(place.files(), expected, "{what}: {when}");
        let n_expected = usize::from(!["requeue", "drop"].contains(&what));
        let found = entries(&place.q()).unwrap();
        assert_eq!(found.len(), n_expected, "{what}: {when}: {found:?}");
        let is_moved = what != "in place";
        assert!(
            found.iter().all(|e| e.reason.as_ref().unwrap().moved == is_moved),
            "{what}: {when}"
        );
    }

    #[test]
    fn a_kill_loses_and_doubles_nothing() {
        for what in ACTS {
            let mut n_steps = 0;
            let killed_at = |kind: &str, nth: usize| {
                let killed = Place::both().map(|place| {
                    prepare(what, &place);
                    let code = run(what, &place, &format!("{kind} {nth}"));
                    start_again(what, &place);
                    check(what, &place, &format!("{kind} {nth}"));
                    code.is_none()
                });
                killed.fold(false, |any, one| any | one)
            };
            while killed_at("kill_before", n_steps + 1) {
                n_steps += 1;
            }
            eprintln!("{what}: {n_steps} steps");
            assert!(n_steps > 1);
            for nth in 1..=n_steps {
                killed_at("kill_half", nth);
                assert!(killed_at("kill_after", nth));
            }
        }
    }

    #[test]
    fn a_failing_disk_loses_and_doubles_nothing() {
        for what in ACTS {
            for kind in ["enospc", "eio", "sync_eio"] {
                // Later steps than any act has.
                for nth in 1..40 {
                    let mut has_failed = false;
                    for place in Place::both() {
                        prepare(what, &place);
                        let code = run(what, &place, &format!("{kind} {nth}"));
                        if code == Some(9) && ["file", "series", "archived"].contains(&what) {
                            let found = entries(&place.q()).unwrap_or_default();
                            assert_eq!(found, [], "{what}: {kind} {nth}: nothing half is visible");
                        }
                        start_again(what, &place);
                        check(what, &place, &format!("{kind} {nth}"));
                        has_failed |= code != Some(0);
                    }
                    if kind != "sync_eio" && !has_failed {
                        break;
                    }
                }
            }
        }
    }
}
