//! What people get to see of an alignment: the picture beside a refusal, and the files of
//! `results.alignment`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tracing::warn;

use super::{panic_text, steps::Source};
use crate::{
    domain::{error::Refusal, scan::ScanRecord},
    numeric::{
        brain,
        geometry::Affine,
        registration::Template,
        volume::{RawMask, RawVolume},
    },
    report::{AlignmentFiles, AlignmentPicture, alignment_picture, itk_transform},
};

/// The refusal of a scan that cannot be aligned, with a picture of where the template fits `best`
/// (template world -> scan world), if that is known. The refusal stands whatever becomes of the
/// picture.
pub(super) fn pictured(
    refusal: Refusal,
    scan: &RawVolume,
    brain: Option<&RawMask>,
    template: &Template,
    best: Option<Affine>,
) -> Refusal {
    let draw = || {
        let carried = best.map(|best| carried(template, &best, scan));
        alignment_picture(&AlignmentPicture {
            scan,
            brain: brain.map(|brain| &brain.inside[..]),
            template: carried.as_deref(),
            title: &format!("refused: {}", refusal.reason.name()),
            line: &format!("found {}; needed {}", refusal.found, refusal.needed),
        })
    };
    match catch_unwind(AssertUnwindSafe(draw)) {
        Ok(png) => refusal.with_picture(png),
        Err(panic) => {
            let panic = panic_text(panic.as_ref());
            warn!(panic, "a crash while a refused scan was drawn; please report it");
            refusal
        }
    }
}

/// Picture and transform of a scan that was aligned.
pub(super) fn alignment_files(
    record: &ScanRecord,
    source: &Source,
    template: &Template,
) -> Option<AlignmentFiles> {
    let found = source.alignment.as_ref()?;
    let facts = record.alignment?;
    let within =
        format!("{:.0} % of the template's brain lie within the scan", 100.0 * facts.coverage);
    let line = match facts.distinctness {
        Some(distinctness) => format!("distinctness of the alignment {distinctness:.2}; {within}"),
        None => within,
    };
    let carried = carried(template, &found.to_scan, &source.raw);
    let picture_png = alignment_picture(&AlignmentPicture {
        scan: &source.raw,
        brain: Some(&source.brain.inside),
        template: Some(&carried),
        title: &format!("{}   ({})", record.output_stem, record.cohort.label()),
        line: &line,
    });
    Some(AlignmentFiles { picture_png, transform_tfm: itk_transform(&found.to_scan).into_bytes() })
}

/// The template's brain on the grid of a scan.
fn carried(template: &Template, to_scan: &Affine, scan: &RawVolume) -> Vec<bool> {
    brain::carried(template.brain(), to_scan, scan.shape, &scan.affine)
}
