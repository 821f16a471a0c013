//! Texts of refusals: what was found, what is needed, what to do.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
};

use tracing::warn;

use crate::{
    domain::{
        error::{QuarantineReason, Refusal, ScanError, panic_text},
        head::HeadError,
    },
    numeric::{
        background::MAX_SHARE_BELOW_ZERO,
        brain,
        geometry::Affine,
        preprocess::{MAX_BRAIN_ML, MAX_STRIPPED_CUT_CM2, MIN_SHARE_IN_CUBE, PreprocessError},
        registration::{self, MIN_COVERAGE, MIN_EXTENT_MM, RegistrationError, Template},
        volume::{RawMask, RawVolume},
    },
    report::{AlignmentPicture, alignment_picture},
};

/// The error for a scan that was aligned to a template that is now missing.
pub fn template_gone() -> ScanError {
    let action = "the template is missing; run `oddscan model fetch` and restart";
    ScanError::Internal {
        doing: "reading a scan that was aligned",
        source: io::Error::new(io::ErrorKind::NotFound, action),
    }
}

/// The refusal of a scan that cannot be aligned.
pub fn misaligned(
    error: RegistrationError,
    scan: &RawVolume,
    brain: Option<&RawMask>,
    template: &Template,
) -> Refusal {
    let best = error.best().map(|best| best.to_scan);
    let found = error.to_string();
    let (needed, action) = match error {
        RegistrationError::NoContrast => {
            ("intensities that vary".to_owned(), "check the export: the image may be blank")
        }
        RegistrationError::TooSmall(_) => (
            format!("at least {MIN_EXTENT_MM} mm along each axis"),
            "localisers and slabs do not show the whole brain; export the whole series",
        ),
        RegistrationError::Cut { .. } => (
            format!("at least {:.0} %", 100.0 * MIN_COVERAGE),
            "the field of view cuts the brain; export the whole series",
        ),
        RegistrationError::Unlike { is_head, .. } => (
            format!("a distinctness of at least {}", registration::min_distinctness(is_head)),
            "check that this is a brain and that the header's orientation is correct; or strip the skull \
             with another tool and put <subject>_brain.nii.gz beside the scan",
        ),
        RegistrationError::Geometry(_) => {
            ("an affine that can be inverted".to_owned(), "check the header's sform and qform")
        }
    };

    let refusal = Refusal::new(QuarantineReason::RegistrationFailed, found, needed, action);
    pictured(refusal, scan, brain, template, best)
}

/// The refusal of a head whose brain cannot be found.
pub fn no_head(error: HeadError, scan: &RawVolume, template: &Template) -> ScanError {
    match error {
        HeadError::Misaligned(error) => misaligned(error, scan, None, template).into(),
        HeadError::NoBrain { best } => {
            pictured(no_brain_found(), scan, None, template, Some(best.to_scan)).into()
        }
        HeadError::Device(error) => error.into(),
    }
}

fn no_brain_found() -> Refusal {
    Refusal::new(
        QuarantineReason::NoBrain,
        "nothing bright where the brain should be",
        "tissue that is brighter than the skull around it",
        "check the export; or strip the skull with another tool and put <subject>_brain.nii.gz beside \
         the scan",
    )
}

/// The refusal of a scan that cannot be made into a cube.
pub fn of_preprocessing(error: PreprocessError) -> Refusal {
    let found = error.to_string();
    let (reason, needed, action) = match error {
        PreprocessError::NoBackground { .. } => (
            QuarantineReason::NoBrain,
            "a skull-stripped scan with zero background, or a brain mask beside it".to_owned(),
            "get the template for whole heads (oddscan model fetch) and restart, or strip the skull \
             first, or put <subject>_brain.nii.gz beside the scan",
        ),
        PreprocessError::MeetsEdge { .. } => (
            QuarantineReason::NoBrain,
            format!(
                "at most {MAX_STRIPPED_CUT_CM2} cm^2 for a skull-stripped brain, or a brain mask beside it"
            ),
            "this may be a head that the field of view cuts: get the template for whole heads (oddscan \
             model fetch) and restart. If the skull is stripped, put <subject>_brain.nii.gz beside the scan",
        ),
        PreprocessError::BelowZero { .. } => (
            QuarantineReason::NoBrain,
            format!(
                "at most {:.0} %, or one value in all of the background",
                100.0 * MAX_SHARE_BELOW_ZERO
            ),
            "export the intensities as the scanner gave them, or set the background to one value, or put \
             <subject>_brain.nii.gz beside the scan",
        ),
        PreprocessError::TooSmall { needed_ml, .. } => (
            QuarantineReason::NoBrain,
            format!("at least {needed_ml} ml (volume.min_brain_ml)"),
            "check the export and the brain mask; phantoms and localisers are not supported",
        ),
        PreprocessError::TooLarge { .. } => (
            QuarantineReason::NoBrain,
            format!("at most {MAX_BRAIN_ML} ml"),
            "strip the skull first, or check the header's unit of length and the brain mask",
        ),
        PreprocessError::Scattered { .. } => (
            QuarantineReason::NoBrain,
            format!("at least {:.0} % (volume.field_of_view_mm)", 100.0 * MIN_SHARE_IN_CUBE),
            "check the export and the brain mask: scattered objects are not a brain",
        ),
        PreprocessError::Constant { .. } => (
            QuarantineReason::NoBrain,
            "intensities above zero that vary over the brain".to_owned(),
            "check the export: the image may be blank",
        ),
        PreprocessError::Geometry(_) => (
            QuarantineReason::BadHeader,
            "an affine that spans space".to_owned(),
            "check the header's sform and qform",
        ),
    };
    Refusal::new(reason, found, needed, action)
}

/// The refusal of a cube with too little brain.
pub fn too_little_brain(found: usize, n_cells: usize, needed: usize) -> Refusal {
    Refusal::new(
        QuarantineReason::NoBrain,
        format!("{found} of {n_cells} cells with enough brain in them (tokens.min_brain_fraction)"),
        format!("at least {needed}; a brain fills about half of them"),
        "check the export and the brain mask: speckle and scattered objects are not a brain",
    )
}

/// The refusal of a mask or a map of labels that was taken for a scan.
pub fn label_map(n_values: usize) -> Refusal {
    let found = if n_values == 2 {
        "a binary mask: 2 distinct values".to_owned()
    } else {
        format!("a map of labels: {n_values} distinct values, and most neighbours are equal")
    };
    Refusal::new(
        QuarantineReason::Unsupported,
        found,
        "a scan: intensities with the noise of a scanner",
        "name a brain mask <subject>_brain.nii.gz beside its scan; keep other masks and maps out of the \
         incoming folder, or add a pattern to intake.ignore",
    )
}

/// The refusal of an unusable brain mask.
pub fn of_mask(refusal: Refusal) -> Refusal {
    Refusal { found: format!("an unusable brain mask: {}", refusal.found), ..refusal }
}

/// Adds a picture to the refusal of a scan that cannot be aligned. If known, the picture shows the
/// `best` alignment of the template (template world -> scan world). The refusal stays valid if
/// drawing fails.
fn pictured(
    refusal: Refusal,
    scan: &RawVolume,
    own_brain: Option<&RawMask>,
    template: &Template,
    best: Option<Affine>,
) -> Refusal {
    let draw = || {
        let carried =
            best.map(|best| brain::carried(template.brain(), &best, scan.shape, &scan.affine));
        alignment_picture(&AlignmentPicture {
            scan,
            brain: own_brain.map(|brain| &brain.inside[..]),
            template: carried.as_deref(),
            title: &format!("refused: {}", refusal.reason.name()),
            line: &format!("found {}; needed {}", refusal.found, refusal.needed),
        })
    };

    match catch_unwind(AssertUnwindSafe(draw)) {
        Ok(png) => refusal.with_picture(png),
        Err(panic) => {
            let panic = panic_text(panic.as_ref());
            warn!(panic, "drawing a refused scan crashed; please report it");
            refusal
        }
    }
}
