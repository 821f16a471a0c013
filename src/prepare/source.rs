//! A scan on its own grid, with its brain: the input for cubes, maps and pictures.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::{
    domain::{
        error::ScanError,
        scan::{AlignmentFacts, BrainFacts, BrainSource, PreprocessFacts, ScanId, ScanRecord},
    },
    engine::Method,
    nifti::{self, Grid, Limits},
    numeric::{
        background,
        geometry::Affine,
        preprocess::{self, PreprocessError},
        registration::Alignment,
        volume::{RawMask, RawVolume},
    },
    refusals,
};

/// A scan read from its file, with the brain on its own grid.
pub struct Source {
    /// Voxels as scanned, or lifted above 0.
    pub raw: RawVolume,
    /// Geometry of the header, which results copy.
    pub grid: Grid,
    /// The brain on the scan's grid.
    pub brain: RawMask,
    /// Alignment of the template to the scan. `None` if the scan was not aligned.
    pub alignment: Option<Alignment>,
    /// How the brain was found. For a scan that is read again, it is where the brain was read from.
    pub brain_from: BrainSource,
    /// Dice of the two brains of a head, if two ways to find it were used.
    pub agreement: Option<f64>,
    /// T1 of the same session, if the brain was found in it.
    pub session_t1: Option<ScanId>,
    /// What the site's preprocessing did. `None` if it did not run.
    pub preprocess: Option<PreprocessFacts>,
}

impl Source {
    /// A scan without alignment, with a known brain. If much of the brain is below 0, the scan is
    /// lifted ([`background::lifted`]).
    pub(super) fn unaligned(
        raw: RawVolume,
        grid: Grid,
        brain: RawMask,
        brain_from: BrainSource,
    ) -> Self {
        let raw = background::lifted(raw, &brain);
        let (alignment, agreement, session_t1, preprocess) = (None, None, None, None);
        Self { raw, grid, brain, alignment, brain_from, agreement, session_t1, preprocess }
    }

    /// The scan's canonical cube: cube voxel -> scan world, mm.
    ///
    /// # Errors
    /// If the brain is empty, or if the template of an aligned scan is missing.
    pub fn cube(&self, method: &Method) -> Result<Affine, ScanError> {
        let cube = match &self.alignment {
            None => preprocess::cube_affine(&self.brain, &method.cube),
            Some(Alignment { to_scan, .. }) => {
                let template = method.template.as_ref().ok_or_else(refusals::template_gone)?;
                preprocess::aligned_cube_affine(template.brain(), to_scan, &method.cube)
            }
        };
        Ok(cube.map_err(|error| refusals::of_preprocessing(error.into()))?)
    }

    /// What the ledger stores about the alignment.
    pub fn alignment_facts(&self) -> Option<AlignmentFacts> {
        self.alignment.map(|alignment| AlignmentFacts {
            template_to_scan: alignment.to_scan.rows(),
            explained: alignment.explained,
            distinctness: Some(alignment.distinctness),
            coverage: alignment.coverage,
            brain_extracted: self.brain_from.is_extracted(),
        })
    }

    /// What the ledger stores about the brain.
    pub fn brain_facts(&self) -> BrainFacts {
        let bytes = bytemuck::cast_slice::<bool, u8>(&self.brain.inside);
        BrainFacts {
            from: self.brain_from,
            agreement: self.agreement,
            session_t1: self.session_t1,
            sha256: hex::encode(Sha256::digest(bytes)),
        }
    }

    /// The scan as NIfTI, if the site's preprocessing has changed its voxels. The archive keeps it
    /// instead of the original file, so that the program runs once.
    pub fn changed_scan(&self) -> Option<Vec<u8>> {
        let is_changed = self.preprocess.as_ref().is_some_and(|done| done.scan_replaced);
        is_changed.then(|| nifti::encode_scan(&self.grid, &self.raw.voxels))
    }

    /// The brain as NIfTI, if oddscan or a program had to find it. The archive keeps it beside the
    /// scan, so that it is found only once although results are written many times.
    pub fn found_brain(&self) -> Option<Vec<u8>> {
        let brain = || nifti::encode_mask(&self.grid, &self.brain.inside, "brain mask");
        // In voxels that a program replaced, another brain might be found the next time.
        let is_replaced = self.preprocess.as_ref().is_some_and(|done| done.scan_replaced);
        (self.brain_from.is_found() || is_replaced).then(brain)
    }
}

/// Reads a scan of the ledger again, with the brain and the alignment that were found at intake.
pub fn read_again(
    record: &ScanRecord,
    scan: &Path,
    mask: Option<&Path>,
    limits: &Limits,
) -> Result<Source, ScanError> {
    let alignment = record.alignment.map(alignment_of).transpose()?;
    Ok(Source { alignment, ..read_source(scan, mask, limits)? })
}

/// The id of a scan in a file.
pub fn id_of(scan: &Path, limits: &Limits) -> Result<ScanId, ScanError> {
    Ok(ScanId::of(&nifti::read_scan(scan, limits)?.volume))
}

/// Reads a scan without alignment.
pub fn read_source(scan: &Path, mask: Option<&Path>, limits: &Limits) -> Result<Source, ScanError> {
    let nifti::Scan { volume: raw, grid } = nifti::read_scan(scan, limits)?;
    let brain = read_brain(&raw, mask, limits)?.map_err(refusals::of_preprocessing)?;
    Ok(Source::unaligned(raw, grid, brain, brain_from(mask)))
}

fn alignment_of(facts: AlignmentFacts) -> Result<Alignment, ScanError> {
    let to_scan = Affine::new(facts.template_to_scan)
        .map_err(|error| refusals::of_preprocessing(error.into()))?;
    let AlignmentFacts { explained, distinctness, coverage, .. } = facts;

    // Nothing here uses a distinctness that was not measured.
    let distinctness = distinctness.unwrap_or(f64::NAN);
    Ok(Alignment { to_scan, explained, distinctness, coverage })
}

pub(super) fn brain_from(mask: Option<&Path>) -> BrainSource {
    if mask.is_some() { BrainSource::MaskFile } else { BrainSource::AboveZero }
}

/// The brain by a mask, or the voxels above zero.
pub(super) fn read_brain(
    raw: &RawVolume,
    mask: Option<&Path>,
    limits: &Limits,
) -> Result<Result<RawMask, PreprocessError>, ScanError> {
    let mask = mask.map(|path| nifti::read_mask(path, limits)).transpose();
    let mask = mask.map_err(|error| match error {
        ScanError::Refused(refusal) => refusals::of_mask(refusal).into(),
        other => other,
    })?;
    Ok(preprocess::brain_mask(raw, mask.as_ref()))
}
