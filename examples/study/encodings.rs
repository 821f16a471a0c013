//! The ways of encoding a scan.

use oddscan::config::Config;

use crate::Result;

/// What all encodings share, so that every variant can be made from their tokens.
const RAW: &str = "tokens.projection = 0\ntokens.min_brain_fraction = 0.0\n\
                   tokens.smoothing_patches = 0.0\n";

/// A way of encoding; each costs a pass over all slices.
pub(crate) struct Encoding {
    pub(crate) name: &'static str,
    pub(crate) layers: &'static [usize],
    settings: &'static str,
}

/// The way of encoding that oddscan ships. Maps with intensities are made of it.
pub(crate) const SHIPPED: &str = "stride 2, background skipped";

const ALL: &[usize] = &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

pub(crate) const ENCODINGS: [Encoding; 11] = [
    Encoding {
        name: "joined",
        layers: ALL,
        settings: "tokens.join_views = true\ntokens.slices_per_token = 14",
    },
    Encoding { name: "views", layers: &[9], settings: "" },
    Encoding { name: "14 slices", layers: &[9], settings: "tokens.slices_per_token = 14" },
    Encoding { name: "2 slices", layers: &[9], settings: "tokens.slices_per_token = 2" },
    Encoding { name: "no final norm", layers: &[9], settings: "encoder.final_norm = false" },
    Encoding { name: "stride 2", layers: &[9], settings: "tokens.slice_stride = 2" },
    Encoding {
        name: SHIPPED,
        layers: &[9],
        settings: "tokens.slice_stride = 2\ntokens.skip_background = true",
    },
    Encoding { name: "stride 7", layers: &[9], settings: "tokens.slice_stride = 7" },
    // Cheap, so that these can be compared with "stride 7".
    Encoding {
        name: "stride 7, other blocks",
        layers: &[6, 7, 8, 10, 11, 12],
        settings: "tokens.slice_stride = 7",
    },
    Encoding {
        name: "stride 7, field 160 mm",
        layers: &[9],
        settings: "tokens.slice_stride = 7\nvolume.field_of_view_mm = 160.0",
    },
    Encoding {
        name: "stride 7, field 192 mm",
        layers: &[9],
        settings: "tokens.slice_stride = 7\nvolume.field_of_view_mm = 192.0",
    },
];

impl Encoding {
    /// Whether the intensities of each scan are kept beside its tokens.
    pub(crate) fn has_intensities(&self) -> bool {
        self.name == SHIPPED
    }

    pub(crate) fn named(name: &str) -> &'static Self {
        ENCODINGS.iter().find(|encoding| encoding.name == name).expect("a name of the list")
    }

    pub(crate) fn config(&self) -> Result<Config> {
        let Self { layers, settings, .. } = self;
        let or = |key, default| if settings.contains(key) { "" } else { default };
        let stride = or("slice_stride", "tokens.slice_stride = 1\n");
        let background = or("skip_background", "tokens.skip_background = false\n");
        let text = format!("{RAW}encoder.layers = {layers:?}\n{stride}{background}{settings}");
        Ok(Config::parse(&text)?)
    }
}
