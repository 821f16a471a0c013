//! Optional files for people: brain mask, alignment, and pictures of refusals.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use oddscan::{
    nifti::{self, Limits},
    numeric::{geometry::Affine, projection::Normal, volume::RawVolume},
    report::{FileFacts, Sidecar},
};
use rustix::process::Signal;
use sha2::{Digest, Sha256};

use crate::{
    alignment::{T1, head, placed, template_image},
    shipped::run,
    support::{Site, names, oddscan, python, said, scan_bytes},
};

const BOTH: [&str; 2] = ["results.brain_mask = true", "results.alignment = true"];

/// A site with a template; `more` are further lines of settings.
fn configure(site: &Site, more: &[&str]) {
    let path = site.path("template.nii.gz");
    fs::write(&path, nifti::encode_volume(template_image())).unwrap();
    let template = format!("alignment.template = \"{}\"", path.display());
    site.configure(2, &[&[template.as_str()], more].concat());
}

/// Two poses, far apart.
pub fn poses() -> [Affine; 2] {
    [
        placed(8.0, [0.92, 0.95, 0.9], [8.0, -10.0, 4.0]),
        placed(-10.0, [1.0, 0.98, 0.95], [-5.0, 9.0, -8.0]),
    ]
}

fn heads() -> [RawVolume; 2] {
    let [first, second] = poses();
    [head(1, &first, T1, false), head(2, &second, T1, false)]
}

/// The grid of a head with nothing but noise.
fn noise() -> RawVolume {
    let mut noise = head(9, &placed(0.0, [1.0; 3], [0.0; 3]), T1, false);
    let mut random = Normal::new(5);
    noise.voxels.fill_with(|| (100.0 + 20.0 * random.next()) as f32);
    noise
}

/// The optional files that a sidecar names: brain, picture and transform of the alignment.
fn optional(sidecar: &Sidecar) -> [Option<FileFacts>; 3] {
    let files = sidecar.files.clone().unwrap();
    [files.brain, files.alignment_picture, files.alignment_transform]
}

/// Reads the file that a sidecar names, and checks its size and hash.
fn checked(folder: &Path, file: Option<&FileFacts>) -> Vec<u8> {
    let FileFacts { name, n_bytes, sha256 } = file.unwrap();
    let bytes = fs::read(folder.join(name)).unwrap();
    assert_eq!((*n_bytes, sha256), (bytes.len() as u64, &hex::encode(Sha256::digest(&bytes))));
    bytes
}

fn is_png(bytes: &[u8]) -> bool {
    image::load_from_memory(bytes).is_ok()
}

#[test]
fn brain_and_alignment_are_written_where_they_are_asked_for_and_go_when_they_no_longer_are() {
    let mut site = Site::new(2, &[]);
    configure(&site, &BOTH);
    for (head, name) in heads().iter().zip(["sub-1_T1w", "sub-2_T1w"]) {
        site.drop_in(&format!("{name}.nii.gz"), &nifti::encode_volume(head));
    }
    // Stripped scans are not aligned.
    site.drop_in("sub-3_T1w.nii.gz", &scan_bytes(3));
    site.start();
    let stems = ["sub-1_T1w", "sub-2_T1w", "sub-3_T1w"];
    site.wait_scored(&stems);
    let folder = site.path("results");
    for stem in stems {
        let sidecar = site.sidecar(stem).unwrap();
        let [brain, picture, transform] = optional(&sidecar);
        checked(&folder, brain.as_ref());
        let path = folder.join(format!("{stem}_anomaly-brain.nii.gz"));
        let brain = nifti::read_mask(&path, &Limits::NONE).unwrap();
        let scan = site.path("incoming").join(format!("{stem}.nii.gz"));
        let scan = nifti::read_scan(&scan, &Limits::NONE).unwrap().volume;
        assert_eq!((brain.shape, brain.affine), (scan.shape, scan.affine));
        let inside = bytemuck::cast_slice::<bool, u8>(&brain.inside);
        assert_eq!(sidecar.brain_mask.unwrap().sha256, hex::encode(Sha256::digest(inside)));
        if stem == "sub-3_T1w" {
            assert_eq!((picture, transform), (None, None));
        } else {
            assert!(is_png(&checked(&folder, picture.as_ref())));
            let transform = checked(&folder, transform.as_ref());
            assert!(transform.starts_with(b"#Insight Transform File V1.0\n"));
        }
    }
    assert_eq!(names(&folder).len(), 3 * 4 + 3 + 2 * 2);

    let revision = site.sidecar(stems[0]).unwrap().revision;
    configure(&site, &BOTH[..1]);
    site.signal(Signal::HUP);
    let has = |site: &Site, wanted: [bool; 3]| {
        let named = |stem| optional(&site.sidecar(stem).unwrap()).map(|file| file.is_some());
        stems.iter().all(|stem| named(stem) == wanted)
    };
    site.wait("brains alone", |site| has(site, [true, false, false]));
    configure(&site, &[]);
    site.signal(Signal::HUP);
    site.wait("no more", |site| has(site, [false; 3]) && names(&folder).len() == 3 * 4);
    assert!(site.sidecar(stems[0]).unwrap().revision > revision + 1);
    assert_eq!(site.stop(), Some(0));
}

#[test]
fn a_scan_that_cannot_be_aligned_lies_in_quarantine_with_a_picture_and_comes_back_without() {
    let mut site = Site::new(2, &[]);
    configure(&site, &[]);
    site.start();
    site.drop_in("sub-9_T1w.nii.gz", &nifti::encode_volume(&noise()));
    let entry = site.path("quarantine/registration_failed/sub-9_T1w.nii.gz");
    site.wait("refused", |_| entry.join("sub-9_T1w.nii.gz").exists());
    assert_eq!(names(&entry), ["reason.json", "registration.png", "sub-9_T1w.nii.gz"]);
    assert!(is_png(&fs::read(entry.join("registration.png")).unwrap()));
    assert_eq!(site.stop(), Some(0));

    let quarantine = |arguments: &[&str]| {
        let mut command = oddscan();
        command.arg("quarantine").args(arguments).arg("--config").arg(site.path("config.toml"));
        said(&command.output().unwrap())
    };
    let (listed, _, code) = quarantine(&["list"]);
    assert_eq!(code, Some(0));
    let picture = format!("look at {}", entry.join("registration.png").display());
    assert!(listed.contains(&picture), "{listed}");
    let (stdout, stderr, code) = quarantine(&["requeue", "--reason", "registration_failed"]);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    assert_eq!(names(&site.path("incoming")), ["sub-9_T1w.nii.gz"]);
    assert!(!entry.exists());
}

/// Scores two heads and `more` files, with all optional results.
fn score(site: &Site, more: &[PathBuf]) -> (String, String, Option<i32>) {
    configure(site, &BOTH);
    for (head, name) in heads().iter().zip(["sub-1_T1w", "sub-2_T1w"]) {
        let path = site.path("incoming").join(format!("{name}.nii.gz"));
        fs::write(path, nifti::encode_volume(head)).unwrap();
    }
    let mut score = oddscan();
    score.args(["score", "--json", "--config"]).arg(site.path("config.toml"));
    score.arg("--out").arg(site.path("results")).arg(site.path("incoming")).args(more);
    said(&score.output().unwrap())
}

#[test]
fn the_one_shot_command_writes_the_same_and_shows_what_it_refuses() {
    let site = Site::new(2, &[]);
    let folder = site.path("noise");
    fs::create_dir(&folder).unwrap();
    let path = |name: &str| folder.join(name);
    // Two of one stem.
    let noise = [path("sub-9_T1w.nii.gz"), path("sub-9_T1w.nii")];
    fs::write(&noise[0], nifti::encode_volume(&self::noise())).unwrap();
    fs::copy(&noise[0], &noise[1]).unwrap();
    let (stdout, stderr, _) = score(&site, &noise);
    let said: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(said["scored"].as_array().unwrap().len(), 2, "{stdout}{stderr}");
    let results = site.path("results");
    for (index, name) in
        ["sub-9_T1w_registration.png", "sub-9_T1w-2_registration.png"].into_iter().enumerate()
    {
        let picture = results.join("refused").join(name);
        assert!(is_png(&fs::read(&picture).unwrap()));
        assert_eq!(said["refused"][index]["picture"], picture.display().to_string());
    }
    for stem in ["sub-1_T1w", "sub-2_T1w"] {
        let files = optional(&site.sidecar(stem).unwrap());
        files.iter().for_each(|file| drop(checked(&results, file.as_ref())));
    }
    assert_eq!(names(&results).len(), 2 * 7 + 1);
}

#[test]
fn itk_resamples_a_scan_onto_the_template_with_the_transform() {
    let Some(mut check) = python("itk_transform.py", "SimpleITK") else { return };
    let site = Site::new(2, &[]);
    let (stdout, stderr, code) = score(&site, &[]);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    let result = |ending: &str| site.path("results").join(format!("sub-1_T1w_anomaly{ending}"));
    check.arg(result(".json")).arg(result("-alignment.tfm"));
    check.arg(site.path("incoming/sub-1_T1w.nii.gz")).arg(site.path("template.nii.gz"));
    println!("{}", run(&mut check));
}

/// The f32 voxels of a `.nii.gz` that oddscan wrote.
fn voxels(nii_gz: &[u8]) -> Vec<f32> {
    let mut bytes = Vec::new();
    MultiGzDecoder::new(nii_gz).read_to_end(&mut bytes).unwrap();
    let four = bytes[352..].chunks_exact(4);
    four.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

#[test]
fn the_parts_of_a_map_add_up_to_it_and_a_small_window_does_not_say_what_stands_out() {
    let mut site = Site::new(3, &["results.parts = true"]);
    let stems = [1, 2, 3].map(|seed| format!("sub-{seed}_FLAIR"));
    for (seed, stem) in (1..).zip(&stems) {
        site.drop_in(&format!("{stem}.nii.gz"), &scan_bytes(seed));
    }
    site.start();
    site.wait_scored(&stems.each_ref().map(String::as_str));
    assert_eq!(site.stop(), Some(0));

    let sidecar = site.sidecar(&stems[0]).unwrap();
    let (files, results) = (sidecar.files.unwrap(), site.path("results"));
    let map = voxels(&checked(&results, Some(&files.map)));
    let parts = voxels(&checked(&results, files.parts.as_ref()));
    let [tokens, brightness, range] = [0, 1, 2].map(|n| &parts[n * map.len()..][..map.len()]);
    for voxel in 0..map.len() {
        let sum = tokens[voxel] + brightness[voxel] + range[voxel];
        // Each value is rounded to 14 bits.
        let bound = 1e-3 * (1.0 + tokens[voxel].abs() + brightness[voxel].abs());
        assert!((sum - map[voxel]).abs() < bound, "{sum} {} at {voxel}", map[voxel]);
    }
    assert!(brightness.iter().any(|&value| value > 1.0), "brightness counts in FLAIR");

    let scores = sidecar.scores.unwrap();
    assert_eq!((scores.stands_out, scores.least_tail_probability), (None, Some(1.0 / 3.0)));
    assert!(scores.tail_probability.is_some_and(|p| (1.0 / 3.0..=1.0).contains(&p)));
}
