//! A result as bytes.

use super::{place::N_FILES, sidecar::Sidecar};

/// The files of one result before they are written.
#[derive(Debug, Clone, PartialEq)]
pub struct ResultSet {
    /// Anomaly map, `.nii.gz`.
    pub map_nii_gz: Vec<u8>,
    /// Anomaly mask, `.nii.gz`.
    pub mask_nii_gz: Vec<u8>,
    /// Picture, PNG.
    pub picture_png: Vec<u8>,
    /// The brain on the scan's grid, `.nii.gz`, if the settings ask for it.
    pub brain_nii_gz: Option<Vec<u8>>,
    /// What each kind of evidence adds to the map, `.nii.gz`, if the settings ask for it.
    pub parts_nii_gz: Option<Vec<u8>>,
    /// The volume that was converted from DICOM files, `.nii.gz`, if the settings ask for it.
    pub scan_nii_gz: Option<Vec<u8>>,
    /// The template's place, if the settings ask for it and the scan was aligned.
    pub alignment: Option<AlignmentFiles>,
    /// The sidecar. `write_results` fills in its `files`.
    pub sidecar: Sidecar,
}

/// The template's place in a scan, as files.
#[derive(Debug, Clone, PartialEq)]
pub struct AlignmentFiles {
    /// Output of `alignment_picture`.
    pub picture_png: Vec<u8>,
    /// Output of `itk_transform`.
    pub transform_tfm: Vec<u8>,
}

impl ResultSet {
    /// The bytes of each file but the sidecar, in the order of `SUFFIXES`.
    pub(super) fn contents(&self) -> [Option<&[u8]>; N_FILES] {
        let alignment = self.alignment.as_ref();
        [
            Some(self.map_nii_gz.as_slice()),
            Some(&self.mask_nii_gz),
            Some(&self.picture_png),
            self.brain_nii_gz.as_deref(),
            self.parts_nii_gz.as_deref(),
            self.scan_nii_gz.as_deref(),
            alignment.map(|files| files.picture_png.as_slice()),
            alignment.map(|files| files.transform_tfm.as_slice()),
        ]
    }
}
