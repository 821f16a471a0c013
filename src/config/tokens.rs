//! `[tokens]`: how features become tokens.

use std::num::NonZeroUsize;

use super::check::Checker;
use crate::numeric::{geometry::Axis, token::TokenSettings};

/// The projection of each view's features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProjectionSettings {
    /// Channels after the projection. `None` keeps all.
    pub channels: Option<NonZeroUsize>,
    /// Seed of the random projection matrix.
    pub seed: u64,
}

pub(super) fn read_projection(check: &mut Checker) -> ProjectionSettings {
    ProjectionSettings {
        channels: NonZeroUsize::new(check.whole("tokens.projection", 0..=4096)),
        seed: check.integer("tokens.projection_seed") as u64,
    }
}

pub(super) fn read(check: &mut Checker) -> TokenSettings {
    let slices_per_token = check.whole("tokens.slices_per_token", 0..=64);
    let slice_stride = check.whole("tokens.slice_stride", 1..=64);
    if slices_per_token > 0 && slice_stride > slices_per_token {
        let needed = format!("at most tokens.slices_per_token ({slices_per_token}) is needed");
        check.fault("tokens.slice_stride", slice_stride, needed);
    }
    TokenSettings {
        views: views(check),
        join_views: check.flag("tokens.join_views"),
        slices_per_token,
        slice_stride,
        skip_background: check.flag("tokens.skip_background"),
        min_brain_fraction: check.number("tokens.min_brain_fraction", 0.0..=1.0),
        smoothing_patches: check.number("tokens.smoothing_patches", 0.0..=3.0),
    }
}

fn views(check: &mut Checker) -> Vec<Axis> {
    let key = "tokens.views";
    let mut views = Vec::new();
    for name in check.texts(key) {
        match Axis::VIEWS.into_iter().find(|axis| axis.name() == name) {
            Some(axis) if !views.contains(&axis) => views.push(axis),
            _ => {
                let needed = "\"axial\", \"coronal\" and \"sagittal\", each at most once, are \
                              needed";
                check.fault(key, format!("{name:?}"), needed);
            }
        }
    }

    if views.is_empty() {
        check.fault(key, "[]", "at least one view is needed");
    }
    views
}
