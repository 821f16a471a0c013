//! Compares reading and writing of NIfTI with an independent program: nibabel.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use oddscan::nifti::read_scan;

use crate::{
    hostile::LIMITS,
    shipped::run,
    support::{self, Site, oddscan, said},
};

fn python() -> Option<Command> {
    support::python("nifti_matrix.py", "nibabel")
}

/// The affine of every scan as oddscan reads it, by file name.
fn affines(scans: &Path) -> String {
    let affine = |path: &Path| read_scan(path, &LIMITS).unwrap().volume.affine.rows();
    let files = fs::read_dir(scans).unwrap().map(|entry| entry.unwrap());
    let affines: BTreeMap<_, _> =
        files.map(|file| (file.file_name().into_string().unwrap(), affine(&file.path()))).collect();
    serde_json::to_string(&affines).unwrap()
}

#[test]
fn results_lie_on_the_grid_of_every_kind_of_scan_as_nibabel_reads_it() {
    let (Some(mut make), Some(mut check)) = (python(), python()) else { return };
    let site = Site::new(2, &["volume.min_brain_ml = 10.0"]);
    let scans = site.path("scans");
    run(make.arg("make").arg(&scans));
    let n_scans = fs::read_dir(&scans).unwrap().count();
    assert!(n_scans > 20, "{n_scans}");
    let mut score = oddscan();
    score.args(["score", "--json", "--config"]).arg(site.path("config.toml"));
    let output = score.arg("--out").arg(site.path("results")).arg(&scans).output().unwrap();
    let (stdout, stderr, code) = said(&output);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["scored"].as_array().unwrap().len(), n_scans);
    fs::write(site.path("affines.json"), affines(&scans)).unwrap();
    check.arg("check").arg(&scans).arg(site.path("results")).arg(site.path("affines.json"));
    println!("{}", run(&mut check));
}
