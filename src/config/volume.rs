//! `[volume]`: the canonical cube.

use super::check::Checker;
use crate::numeric::preprocess::CubeSettings;

pub(super) fn read(check: &mut Checker) -> CubeSettings {
    CubeSettings {
        side: check.whole("volume.side", 28..=1024),
        field_of_view_mm: check.number("volume.field_of_view_mm", 10.0..=400.0),
        min_brain_ml: check.number("volume.min_brain_ml", 0.0..=3000.0),
    }
}
