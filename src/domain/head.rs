//! Finds the brain of a whole head, for any sequence.
//!
//! There are two ways. One uses the aligned template and the scan's intensities ([`brain`]). The
//! other uses the networks of [`super::brain_network`], if their weights are installed. The
//! networks know T1 images, so that another contrast is first mapped to that of the template
//! ([`crate::numeric::contrast`]). If a head cannot be aligned as a whole, the networks find a
//! brain first, and that brain is aligned alone. The brain of the networks is preferred. The
//! agreement of both ways is kept as a measure of confidence.

use super::{
    BrainNetwork, brain_network::brain_probability, error::DeviceError, scan::BrainSource,
};
use crate::numeric::{
    brain,
    contrast::Contrast,
    evaluation::Overlap,
    morphology::Grid,
    registration::{self, Alignment, RegistrationError, Template},
    volume::{RawMask, RawVolume},
};

/// The brain of a head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadBrain {
    /// On the scan's grid.
    pub brain: RawMask,
    /// Position of the template in the scan.
    pub alignment: Alignment,
    /// What found it: template, networks, or one of these in a T1 of the session.
    pub from: BrainSource,
    /// Dice of this brain and that of another way, in [0, 1]; 0 if the other way found none. `None`
    /// if no other way was tried.
    pub agreement: Option<f64>,
}

/// Why a head has no brain.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// It cannot be aligned.
    #[error(transparent)]
    Misaligned(#[from] RegistrationError),
    /// There is nothing bright where the brain should be.
    #[error("nothing bright where the brain should be")]
    NoBrain {
        /// Where the template fits best.
        best: Box<Alignment>,
    },
    /// The device of the networks failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Finds the brain of a head.
///
/// # Errors
/// If no way finds a brain. For a head that cannot be aligned, the error gives the reason.
pub fn brain_of_head(
    scan: &RawVolume,
    template: &Template,
    network: Option<&dyn BrainNetwork>,
) -> Result<HeadBrain, HeadError> {
    let aligned = registration::register(scan, template, true);

    let Some(network) = network else {
        let alignment = aligned?;
        let brain =
            brain::extract(scan, template, &alignment).ok_or_else(|| no_brain(alignment))?;
        return Ok(HeadBrain { brain, alignment, from: BrainSource::Template, agreement: None });
    };

    match aligned {
        Ok(alignment) => {
            let like_t1 = foreign_like_t1(scan, template, &alignment);
            let by_network = outlined(network, like_t1.as_ref().unwrap_or(scan))?;
            let by_template = brain::extract(scan, template, &alignment);
            chosen(by_network, by_template, alignment)
        }
        Err(error) => {
            let found = found_by_network_alone(scan, template, network)?;
            let (brain, alignment) = found.ok_or(error)?;
            let by_template = brain::extract(scan, template, &alignment);
            let agreement = Some(by_template.map_or(0.0, |other| dice(&brain, &other)));
            Ok(HeadBrain { brain, alignment, from: BrainSource::Network, agreement })
        }
    }
}

/// Below this Dice the networks have outlined something other than the brain under the template.
/// Measured 0.92 to 0.98 on heads that are aligned as a whole.
const MIN_DICE_OF_NETWORK: f64 = 0.7;

/// The brain of the networks if it agrees with the template's, else that of the template. If one
/// way finds nothing, the other is used and the agreement is 0.
fn chosen(
    by_network: Option<RawMask>,
    by_template: Option<RawMask>,
    alignment: Alignment,
) -> Result<HeadBrain, HeadError> {
    let found = |brain, from, agreement| {
        Ok(HeadBrain { brain, alignment, from, agreement: Some(agreement) })
    };
    match (by_network, by_template) {
        (Some(network), Some(template)) => match dice(&network, &template) {
            agreement if agreement < MIN_DICE_OF_NETWORK => {
                found(template, BrainSource::Template, agreement)
            }
            agreement => found(network, BrainSource::Network, agreement),
        },
        (Some(network), None) => found(network, BrainSource::Network, 0.0),
        (None, Some(template)) => found(template, BrainSource::Template, 0.0),
        (None, None) => Err(no_brain(alignment)),
    }
}

fn no_brain(alignment: Alignment) -> HeadError {
    HeadError::NoBrain { best: Box::new(alignment) }
}

/// Carries the brain of a T1 over to another scan of the same session: through the headers, refined
/// by a rigid alignment. `None` if no brain is found in the T1, or if it cannot be aligned to the
/// scan.
///
/// `own` is the brain found in the scan itself, if any.
///
/// # Errors
/// If the device of the networks fails.
pub fn brain_of_session(
    scan: &RawVolume,
    t1: &RawVolume,
    own: Option<&HeadBrain>,
    template: &Template,
    network: Option<&dyn BrainNetwork>,
) -> Result<Option<HeadBrain>, DeviceError> {
    let found = match brain_of_head(t1, template, network) {
        Ok(found) => found,
        Err(HeadError::Device(error)) => return Err(error),
        Err(HeadError::Misaligned(_) | HeadError::NoBrain { .. }) => return Ok(None),
    };
    let t1_brain = Template::new(t1.within(&found.brain));
    let Ok(moved) = registration::register_same_head(scan, &t1_brain) else { return Ok(None) };

    let inside = brain::carried(&found.brain, &moved.to_scan, scan.shape, &scan.affine);
    let brain = RawMask { shape: scan.shape, inside, affine: scan.affine };
    // The figures are those of the worse of the two steps.
    let alignment = Alignment {
        to_scan: moved.to_scan.after(&found.alignment.to_scan),
        distinctness: moved.distinctness.min(found.alignment.distinctness),
        coverage: moved.coverage.min(found.alignment.coverage),
        ..moved
    };
    let with_own = own.map(|own| dice(&own.brain, &brain));
    let agreement = [with_own, found.agreement].into_iter().flatten().reduce(f64::min);
    Ok(Some(HeadBrain { brain, alignment, from: BrainSource::SessionT1, agreement }))
}

/// The brain that the networks find without an alignment, and the alignment of that brain.
fn found_by_network_alone(
    scan: &RawVolume,
    template: &Template,
    network: &dyn BrainNetwork,
) -> Result<Option<(RawMask, Alignment)>, HeadError> {
    let align = |brain: &RawMask| registration::register(&scan.within(brain), template, false).ok();

    let Some(first) = outlined(network, scan)? else { return Ok(None) };
    let Some(alignment) = align(&first) else { return Ok(None) };
    let Some(image) = foreign_like_t1(scan, template, &alignment) else {
        return Ok(Some((first, alignment)));
    };
    let Some(second) = outlined(network, &image)? else { return Ok(None) };
    Ok(align(&second).map(|alignment| (second, alignment)))
}

/// The scan with the contrast of a T1; `None` if it already looks like one.
fn foreign_like_t1(
    scan: &RawVolume,
    template: &Template,
    alignment: &Alignment,
) -> Option<RawVolume> {
    let contrast = Contrast::of(scan, template, &alignment.to_scan)?;
    contrast.is_foreign().then(|| contrast.applied(scan))
}

/// The largest connected part with a probability above 0.5, its holes filled.
fn outlined(network: &dyn BrainNetwork, image: &RawVolume) -> Result<Option<RawMask>, DeviceError> {
    let Some(found) = brain_probability(network, image)? else { return Ok(None) };
    let grid = Grid { shape: image.shape, spacing: image.affine.spacing_mm() };
    let likely: Vec<bool> = found.values.iter().map(|&probability| probability > 0.5).collect();
    let brain = grid.largest(&likely).map(|brain| grid.filled(&brain));
    Ok(brain.map(|inside| RawMask { shape: image.shape, inside, affine: image.affine }))
}

fn dice(one: &RawMask, other: &RawMask) -> f64 {
    let pairs = one.inside.iter().copied().zip(other.inside.iter().copied());
    Overlap::of(pairs).dice().unwrap_or(0.0)
}
