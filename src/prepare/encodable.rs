//! The cube for the encoder, with enough brain in it to be scored.

use super::Source;
use crate::{
    domain::{cohort::CohortKey, error::ScanError, scan::EncodedFacts},
    engine::Method,
    numeric::{
        preprocess::{self, Canonical},
        quality,
        token::{foreground_cells, n_cut_cells},
    },
    refusals,
};

/// One in this many patch-sized cells must be foreground. Then there are also enough of the finer
/// cells of single views. A brain fills about every second cell, and the smallest accepted brain,
/// 200 ml, one in 27. Speckle can have no foreground cell. Such a scan would have no tokens and be
/// reported as normal.
const CELLS_PER_FOREGROUND: usize = 64;

/// A scan ready for the encoder.
pub struct Encodable {
    /// The scan as a cube of one size and one intensity scale.
    pub canonical: Canonical,
    /// Noise as a share of the brain's contrast. `None` if it cannot be measured.
    pub noise: Option<f64>,
    /// Cells with brain that are not scored, because the scanner's field of view cuts them.
    pub n_cut_cells: usize,
}

impl Encodable {
    /// Makes the canonical cube of a source and measures the noise on the scan's own grid.
    ///
    /// # Errors
    /// As [`canonical`].
    pub fn new(source: &Source, method: &Method, cohort: &CohortKey) -> Result<Self, ScanError> {
        let canonical = canonical(source, method, Some(cohort))?;
        let cell = [method.patch; 3];
        let n_cut_cells = n_cut_cells(&canonical.volume, cell, method.min_brain_fraction);
        Ok(Self { canonical, noise: quality::noise(&source.raw, &source.brain), n_cut_cells })
    }

    /// What the ledger stores about the scan, except for token counts and times.
    pub fn facts(&self) -> EncodedFacts {
        EncodedFacts {
            brain_ml: self.canonical.brain_ml,
            cut_fraction: self.canonical.cut_fraction,
            noise: self.noise,
            is_standardised: self.canonical.is_standardised,
            n_cut_cells: self.n_cut_cells,
            ..EncodedFacts::default()
        }
    }
}

/// Makes the canonical cube of a source. It is refused without enough foreground.
///
/// Without a cohort, intensities are not standardised. Refusals do not depend on that.
pub fn canonical(
    source: &Source,
    method: &Method,
    cohort: Option<&CohortKey>,
) -> Result<Canonical, ScanError> {
    let aligned = source.alignment.map(|_| source.cube(method)).transpose()?;
    let Source { raw, brain, .. } = source;
    let landmarks = cohort.and_then(|cohort| method.landmarks.as_ref()?.landmarks(&cohort.name));
    let canonical = preprocess::canonicalise(raw, brain, &method.cube, aligned.as_ref(), landmarks)
        .map_err(refusals::of_preprocessing)?;
    let canonical = match method.scores_cut_cells {
        true => Canonical { volume: canonical.volume.with_cut_cells(), ..canonical },
        false => canonical,
    };

    let n_cells = (method.cube.side / method.patch).pow(3);
    let needed = (n_cells / CELLS_PER_FOREGROUND).max(1);
    let found = foreground_cells(&canonical.volume, [method.patch; 3], method.min_brain_fraction);
    let found = found.cells.len();
    if found < needed {
        return Err(refusals::too_little_brain(found, n_cells, needed).into());
    }
    Ok(canonical)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::error::QuarantineReason,
        engine::tests::method,
        nifti::{self, Limits},
        numeric::{
            geometry::{Affine, Shape3, WorldPoint},
            volume::RawVolume,
        },
        prepare::read_source,
    };

    /// A grid of 4 mm voxels, 160 x 168 x 176 mm. Its brain is the voxels that are `inside`.
    fn source(inside: impl Fn([usize; 3]) -> bool) -> Source {
        let shape = Shape3([40, 42, 44]);
        let affine = Affine::scaling(4.0, WorldPoint([0.0; 3])).unwrap();
        let voxel = |o: usize| if inside(shape.voxel(o)) { 1.0 + (o % 7) as f32 } else { 0.0 };
        let raw = RawVolume { shape, voxels: (0..shape.n_voxels()).map(voxel).collect(), affine };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scan.nii.gz");
        std::fs::write(&path, nifti::encode_volume(&raw)).unwrap();
        let limits = Limits { max_file_bytes: 1 << 24, max_voxels: 1 << 24 };
        read_source(&path, None, &limits).unwrap()
    }

    #[test]
    fn speckle_of_the_volume_of_a_brain_is_no_brain() {
        // One voxel in eight, in a pattern that differs from cell to cell: 590 ml, all in the cube.
        let speckle = source(|[x, y, z]| (3 * x + 5 * y + 6 * z) % 8 == 0);
        let error = canonical(&speckle, &method(), None).unwrap_err();
        let ScanError::Refused(refusal) = error else { panic!("{error}") };
        assert_eq!(refusal.reason, QuarantineReason::NoBrain);
        assert!(refusal.found.starts_with("0 of 512 cells"), "{refusal}");
        assert!(refusal.needed.starts_with("at least 8;"), "{refusal}");
    }

    #[test]
    fn the_smallest_brain_has_foreground_enough() {
        // 15 x 15 x 14 voxels of 64 mm^3: 201.6 ml.
        let small = source(|[x, y, z]| x.max(y) < 15 && z < 14);
        let canonical = canonical(&small, &method(), None).unwrap();
        assert!(canonical.brain_ml < 202.0);
    }
}
