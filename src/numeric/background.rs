//! Which value is the background of a scan, and what to do if tissue lies below 0.
//!
//! Segmentation pipelines scale intensities to mean 0, or to -1..1. There, "above 0" is half of the
//! brain. The tissue is then all that differs from the background, and the scan is lifted until its
//! brain lies above 0. Scans with next to nothing below 0 stay as they are, to the last bit.

use super::{
    geometry::Shape3,
    volume::{RawMask, RawVolume},
};

/// Share of the tissue that may be below 0. Resampling with ringing puts a few voxels there.
pub const MAX_SHARE_BELOW_ZERO: f64 = 0.05;

/// Percentile of the brain's intensities that becomes 0 if the scan is lifted. It mirrors
/// [`super::preprocess::WHITE_PERCENTILE`]: one dark outlier must not flatten the brain.
const BLACK_PERCENTILE: f64 = 0.2;

/// The value that more than half of the voxels at the faces of the grid have.
pub fn value(raw: &RawVolume) -> Option<f32> {
    // The majority vote of Boyer and Moore, and then a count.
    let (mut candidate, mut lead, mut n) = (0.0, 0_usize, 0_usize);
    for voxel in faces(raw) {
        n += 1;
        match lead {
            0 => (candidate, lead) = (voxel, 1),
            _ if voxel == candidate => lead += 1,
            _ => lead -= 1,
        }
    }
    let n_equal = faces(raw).filter(|&voxel| voxel == candidate).count();
    (2 * n_equal > n).then_some(candidate)
}

/// The voxels at the faces of the grid. Those at an edge come more than once.
fn faces(raw: &RawVolume) -> impl Iterator<Item = f32> + '_ {
    let Shape3([nx, ny, nz]) = raw.shape;
    let at = |x, y, z| raw.voxels[raw.shape.offset([x, y, z])];
    let across_x = (0..nz).flat_map(move |z| (0..ny).map(move |y| [at(0, y, z), at(nx - 1, y, z)]));
    let across_y = (0..nz).flat_map(move |z| (0..nx).map(move |x| [at(x, 0, z), at(x, ny - 1, z)]));
    let across_z = (0..ny).flat_map(move |y| (0..nx).map(move |x| [at(x, y, 0), at(x, y, nz - 1)]));
    across_x.chain(across_y).chain(across_z).flatten()
}

/// The voxels with tissue: those above 0. If more than [`MAX_SHARE_BELOW_ZERO`] of what differs
/// from the background is below 0, they are all that differs from the background.
pub fn tissue(raw: &RawVolume) -> Vec<bool> {
    let unlike = below_zero(raw).and_then(|background| unlike(raw, background));
    unlike.unwrap_or_else(|| raw.voxels.iter().map(|&v| v > 0.0).collect())
}

/// The background of a scan that has voxels below 0.
fn below_zero(raw: &RawVolume) -> Option<f32> {
    reaches_below_zero(raw).then(|| value(raw)).flatten()
}

fn reaches_below_zero(raw: &RawVolume) -> bool {
    raw.voxels.iter().any(|&v| v < 0.0)
}

/// The voxels that differ from the background, if too many of them are below 0.
fn unlike(raw: &RawVolume, background: f32) -> Option<Vec<bool>> {
    let tissue: Vec<bool> = raw.voxels.iter().map(|&v| v != background).collect();
    let voxels = raw.voxels.iter().zip(&tissue).filter(|(_, inside)| **inside);
    (share_below_zero(voxels.map(|(v, _)| *v)) > MAX_SHARE_BELOW_ZERO).then_some(tissue)
}

fn share_below_zero(voxels: impl Iterator<Item = f32>) -> f64 {
    let (below, all) =
        voxels.fold((0_usize, 0_usize), |(n, all), v| (n + usize::from(v < 0.0), all + 1));
    below as f64 / all.max(1) as f64
}

/// The share of the voxels below 0, of the brain if that is known, if it is too large and no
/// background explains it.
pub fn share_unexplained(raw: &RawVolume, brain: Option<&RawMask>) -> Option<f64> {
    if !reaches_below_zero(raw) {
        return None;
    }
    let share = match brain {
        None => share_below_zero(raw.voxels.iter().copied()),
        Some(brain) => share_below_zero(brain.values(&raw.voxels).into_iter()),
    };
    (share > MAX_SHARE_BELOW_ZERO && value(raw).is_none()).then_some(share)
}

/// A scan whose background lies below 0, shifted so that the background is 0; `None` of all others.
/// The search for a brain takes 0 for darkness.
pub fn above_background(raw: &RawVolume) -> Option<RawVolume> {
    let background = below_zero(raw).filter(|&background| background < 0.0)?;
    unlike(raw, background)?;
    let voxels = raw.voxels.iter().map(|&v| lifted_by(background, v)).collect();
    Some(RawVolume { voxels, ..*raw })
}

/// The scan as it is, if at most [`MAX_SHARE_BELOW_ZERO`] of its brain is below 0. Otherwise
/// shifted by the darkest intensities of the brain, so that none of it counts as 0; the background
/// becomes 0.
pub fn lifted(raw: RawVolume, brain: &RawMask) -> RawVolume {
    if !reaches_below_zero(&raw) {
        return raw;
    }
    let mut inside = brain.values(&raw.voxels);
    if share_below_zero(inside.iter().copied()) <= MAX_SHARE_BELOW_ZERO {
        return raw;
    }
    let at = ((inside.len() - 1) as f64 * BLACK_PERCENTILE / 100.0) as usize;
    let black = *inside.select_nth_unstable_by(at, f32::total_cmp).1;
    let background = value(&raw);
    let voxels = raw.voxels.iter().zip(&brain.inside).map(|(&voxel, &is_brain)| {
        if !is_brain && Some(voxel) == background { 0.0 } else { lifted_by(black, voxel) }
    });
    RawVolume { voxels: voxels.collect(), ..raw }
}

/// At least 0, and finite: the difference of two f32 may not fit f32.
fn lifted_by(black: f32, voxel: f32) -> f32 {
    (f64::from(voxel) - f64::from(black)).clamp(0.0, f64::from(f32::MAX)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::geometry::{Affine, WorldPoint};

    /// A box of brain in a grid of 9 x 10 x 11 voxels, whose intensities are evenly spread over a
    /// range.
    fn scan(background: f32, [low, high]: [f32; 2]) -> (RawVolume, RawMask) {
        let shape = Shape3([9, 10, 11]);
        let affine = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        let is_brain = |[x, y, z]: [usize; 3]| x.min(y).min(z) >= 2 && x < 7 && y < 8 && z < 9;
        let inside: Vec<bool> = (0..990).map(|offset| is_brain(shape.voxel(offset))).collect();
        let value = |offset: usize| low + (high - low) * ((offset * 7) % 101) as f32 / 100.0;
        let voxel = |offset: usize| if inside[offset] { value(offset) } else { background };
        let voxels = (0..990).map(voxel).collect();
        (RawVolume { shape, voxels, affine }, RawMask { shape, inside, affine })
    }

    #[test]
    fn tissue_is_what_differs_from_the_background_if_much_of_it_is_below_0() {
        for (background, range) in [(0.0, [-2.5, 3.0]), (-1.0, [-0.95, 1.0]), (-3.0, [-2.0, -1.0])]
        {
            let (raw, brain) = scan(background, range);
            assert_eq!(value(&raw), Some(background));
            // No value of the range is exactly 0.
            assert_eq!(tissue(&raw), brain.inside, "{background} {range:?}");
        }
        // A few voxels below 0 are ringing, and stay outside.
        let (raw, _) = scan(0.0, [-4.0, 100.0]);
        let above: Vec<bool> = raw.voxels.iter().map(|&v| v > 0.0).collect();
        assert_eq!(tissue(&raw), above);
    }

    #[test]
    fn a_brain_below_0_is_lifted_and_keeps_its_contrast() {
        let (plain, brain) = scan(0.0, [1.0, 201.0]);
        assert_eq!(lifted(plain.clone(), &brain), plain, "nothing below 0");
        for (background, range) in [(0.0, [-2.0, 2.0]), (-1.0, [-0.9, 1.0])] {
            let (raw, brain) = scan(background, range);
            let lifted = lifted(raw.clone(), &brain);
            assert!(lifted.voxels.iter().all(|&v| v >= 0.0));
            let pairs = lifted.voxels.iter().zip(&raw.voxels).zip(&brain.inside);
            for ((new, old), inside) in pairs {
                let expected = if *inside { old - range[0] } else { 0.0 };
                assert!((new - expected).abs() < 0.05, "{new} {old}");
            }
        }
    }

    #[test]
    fn a_background_below_0_becomes_0_before_the_search_for_a_brain() {
        let (raw, _) = scan(-1.0, [-0.9, 1.0]);
        let shifted = above_background(&raw).unwrap();
        assert_eq!((shifted.voxels[0], value(&shifted)), (0.0, Some(0.0)));
        assert_eq!(above_background(&scan(0.0, [-2.0, 2.0]).0), None);
        assert_eq!(above_background(&scan(-1.0, [5.0, 9.0]).0), None, "no tissue below 0");
    }

    #[test]
    fn tissue_below_0_without_a_background_is_named_with_its_share() {
        let (mut raw, brain) = scan(0.0, [-2.0, 2.0]);
        assert_eq!(share_unexplained(&raw, None), None);
        for (offset, voxel) in raw.voxels.iter_mut().enumerate() {
            *voxel += offset as f32 * 1e-5;
        }
        let share = share_unexplained(&raw, Some(&brain)).unwrap();
        assert!((0.4..0.6).contains(&share), "{share}");
    }
}
