//! A scan on its own grid, with its brain: what cubes, maps and pictures are made from.

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
        geometry::Affine,
        preprocess::{self, PreprocessError},
        registration::Alignment,
        volume::{RawMask, RawVolume},
    },
    refusals,
};

/// A scan read from its file, with the brain on its own grid.
pub struct Source {
    /// Voxels as scanned.
    pub raw: RawVolume,
    /// The header geometry that results copy.
    pub grid: Grid,
    /// The brain on the scan's grid.
    pub brain: RawMask,
    /// Where the template lies in the scan, if it was looked for.
    pub alignment: Option<Alignment>,
    /// Where the brain is known from; of a scan that is read again, what it was read from.
    pub brain_from: BrainSource,
    /// Dice of the two ways to find the brain of a head, where both were taken.
    pub agreement: Option<f64>,
    /// The T1 of the session that the brain comes from, if it does.
    pub session_t1: Option<ScanId>,
    /// What the site's preprocessing did, if it did anything.
    pub preprocess: Option<PreprocessFacts>,
}

impl Source {
    /// A scan that lies as its header says, with a brain that is known.
    pub(super) fn unaligned(
        raw: RawVolume,
        grid: Grid,
        brain: RawMask,
        brain_from: BrainSource,
    ) -> Self {
        let (alignment, agreement, session_t1, preprocess) = (None, None, None, None);
        Self { raw, grid, brain, alignment, brain_from, agreement, session_t1, preprocess }
    }

    /// The scan's canonical cube: cube voxel -> scan world, mm.
    ///
    /// # Errors
    /// If the brain is empty, or the scan was aligned to a template that is no longer there.
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

    /// What the journal keeps of the alignment.
    pub fn alignment_facts(&self) -> Option<AlignmentFacts> {
        self.alignment.map(|alignment| AlignmentFacts {
            template_to_scan: alignment.to_scan.rows(),
            explained: alignment.explained,
            distinctness: Some(alignment.distinctness),
            coverage: alignment.coverage,
            brain_extracted: self.brain_from.is_extracted(),
        })
    }

    /// What the journal keeps of the brain.
    pub fn brain_facts(&self) -> BrainFacts {
        let bytes = bytemuck::cast_slice::<bool, u8>(&self.brain.inside);
        BrainFacts {
            from: self.brain_from,
            agreement: self.agreement,
            session_t1: self.session_t1,
            sha256: hex::encode(Sha256::digest(bytes)),
        }
    }

    /// The scan as NIfTI, if the site's preprocessing has changed its voxels. It is kept instead of
    /// the file that came, so that the program runs once.
    pub fn changed_scan(&self) -> Option<Vec<u8>> {
        let is_changed = self.preprocess.as_ref().is_some_and(|done| done.scan_replaced);
        is_changed.then(|| nifti::encode_scan(&self.grid, &self.raw.voxels))
    }

    /// The brain as NIfTI, if it had to be looked for. It is kept beside the scan, so that it is
    /// found once: results are written again and again.
    pub fn found_brain(&self) -> Option<Vec<u8>> {
        let brain = || nifti::encode_mask(&self.grid, &self.brain.inside, "brain mask");
        self.brain_from.is_found().then(brain)
    }
}

/// Reads a scan that is in the journal, with the brain and the alignment that were found when it
/// came.
pub fn read_again(
    record: &ScanRecord,
    scan: &Path,
    mask: Option<&Path>,
    limits: &Limits,
) -> Result<Source, ScanError> {
    let alignment = record.alignment.map(alignment_of).transpose()?;
    Ok(Source { alignment, ..read_source(scan, mask, limits)? })
}

/// Reads a scan that lies as its header says.
pub fn read_source(scan: &Path, mask: Option<&Path>, limits: &Limits) -> Result<Source, ScanError> {
    let nifti::Scan { volume: raw, grid } = nifti::read_scan(scan, limits)?;
    let brain = read_brain(&raw, mask, limits)?.map_err(refusals::of_preprocessing)?;
    Ok(Source::unaligned(raw, grid, brain, brain_from(mask)))
}

fn alignment_of(facts: AlignmentFacts) -> Result<Alignment, ScanError> {
    let to_scan = Affine::new(facts.template_to_scan)
        .map_err(|error| refusals::of_preprocessing(error.into()))?;
    let AlignmentFacts { explained, distinctness, coverage, .. } = facts;

    // What was not measured plays no part in what is made of it.
    let distinctness = distinctness.unwrap_or(f64::NAN);
    Ok(Alignment { to_scan, explained, distinctness, coverage })
}

pub(super) fn brain_from(mask: Option<&Path>) -> BrainSource {
    if mask.is_some() { BrainSource::MaskFile } else { BrainSource::AboveZero }
}

/// The brain by a mask, or by what is above zero.
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
