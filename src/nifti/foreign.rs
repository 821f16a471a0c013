//! Formats of images that oddscan does not read, by name, and what to do with them.

/// Endings of names in lower case, the format, and what to do.
const FORMATS: [(&[&str], &str); 6] = [
    (
        &[".mgz", ".mgh", ".mgh.gz"],
        "FreeSurfer .mgz: convert it with mri_convert in.mgz out.nii.gz",
    ),
    (
        &[".nrrd", ".nrrd.gz", ".nhdr"],
        "NRRD (3D Slicer): save it as NIfTI (.nii.gz), for instance in 3D Slicer or with SimpleITK",
    ),
    (
        &[".mha", ".mhd"],
        "MetaImage (ITK): save it as NIfTI (.nii.gz), for instance with SimpleITK or c3d",
    ),
    (
        &[".hdr", ".hdr.gz", ".img", ".img.gz"],
        "Analyze or a NIfTI pair (.hdr and .img): join it to one .nii.gz file with fslchfiletype \
         NIFTI_GZ, and check left and right, which Analyze does not state",
    ),
    (&[".par", ".rec"], "Philips PAR/REC: convert it with dcm2niix, or export the series as DICOM"),
    (&[".mnc", ".mnc.gz"], "MINC: convert it with mnc2nii in.mnc out.nii"),
];

/// The format that a file's name states, with what to do, if it is a format of images that oddscan
/// does not read.
pub fn foreign_format(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    let has = |ending: &&str| name.len() > ending.len() && name.ends_with(*ending);
    let found = FORMATS.iter().find(|(endings, _)| endings.iter().any(has));
    found.map(|(_, advice)| *advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_images_are_named_with_what_to_do() {
        for (name, words) in [
            ("brain.mgz", "mri_convert"),
            ("T1.MGZ", "mri_convert"),
            ("orig.mgh.gz", "mri_convert"),
            ("sub-1_T1w.nrrd", "3D Slicer"),
            ("a.nhdr", "NRRD"),
            ("a.mha", "MetaImage"),
            ("sub-1.hdr", "fslchfiletype"),
            ("sub-1.IMG", ".hdr and .img"),
            ("a.img.gz", "Analyze"),
            ("scan.PAR", "dcm2niix"),
            ("scan.rec", "PAR/REC"),
            ("t1.mnc", "mnc2nii"),
        ] {
            assert!(foreign_format(name).is_some_and(|advice| advice.contains(words)), "{name}");
        }
        for name in ["a.nii", "a.nii.gz", "IM0001.dcm", "readme.txt", ".img", "hdr", "a.tar.gz"] {
            assert_eq!(foreign_format(name), None, "{name}");
        }
    }
}
