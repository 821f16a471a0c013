//! The ways of scoring that the study compares.

use oddscan::numeric::fusion::Weights;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    Result,
    encodings::{ENCODINGS, SHIPPED},
};

/// One way of scoring.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Variant {
    pub(crate) name: String,
    pub(crate) encoding: String,
    pub(crate) layers: Vec<usize>,
    /// Views kept, as positions in axial, coronal, sagittal.
    pub(crate) views: Vec<usize>,
    pub(crate) projection: usize,
    pub(crate) seed: u64,
    pub(crate) min_fraction: f64,
    pub(crate) smoothing: f64,
    pub(crate) reach: usize,
    pub(crate) keep: f64,
    /// Share of what its place scores in the other scans that is taken from a score.
    pub(crate) positional_correction: f64,
    /// Whether shared anomalies are filtered.
    pub(crate) filter: bool,
    /// Seven layers are pooled into one token: per channel the mean of this many largest values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pooled_top: Option<usize>,
    /// Whether scores are z-scores against those of the same cell in the other scans.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) z_score: bool,
    /// What the map joins. `None` if it is scored by the tokens alone, before there is a map.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) map: Option<Map>,
}

/// What the map of a scan joins.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) enum Map {
    /// Tokens, brightness and range with the default weights, faded towards the rim.
    Default,
    TokensAlone,
    BrightnessAlone,
    /// Distance of the intensity from the median of the other scans.
    Deviation,
    WithoutTokens,
    WithoutBrightness,
    WithoutRange,
    NotFaded,
}

impl Map {
    /// The weights of a scan whose default weights are `default`.
    pub(crate) fn weights(self, default: Weights) -> Weights {
        match self {
            Self::Default => default,
            // The scores of tokens are not used for the deviation.
            Self::TokensAlone | Self::Deviation => Weights::OF_TOKENS_ALONE,
            Self::BrightnessAlone => {
                Weights { tokens: 0.0, brightness: 1.0, range: 0.0, rim_mm: 0.0 }
            }
            Self::WithoutTokens => Weights { tokens: 0.0, ..default },
            Self::WithoutBrightness => Weights { brightness: 0.0, ..default },
            Self::WithoutRange => Weights { range: 0.0, ..default },
            Self::NotFaded => Weights { rim_mm: 0.0, ..default },
        }
    }
}

impl Variant {
    /// Names the figures of the variant in the cache.
    pub(crate) fn digest(&self) -> Result<String> {
        Ok(hex::encode(&Sha256::digest(serde_json::to_vec(self)?)[..8]))
    }
}

/// The default that scores by tokens alone.
pub(crate) const DEFAULT: &str = "default";
/// The default map with intensities.
pub(crate) const DEFAULT_MAP: &str = "map: default";

const MAPS: [(&str, Map); 8] = [
    (DEFAULT_MAP, Map::Default),
    ("map: tokens alone", Map::TokensAlone),
    ("map: brightness alone", Map::BrightnessAlone),
    ("map: deviation", Map::Deviation),
    ("map: without tokens", Map::WithoutTokens),
    ("map: without brightness", Map::WithoutBrightness),
    ("map: without range", Map::WithoutRange),
    ("map: not faded", Map::NotFaded),
];

/// The defaults, and what is changed in them, one thing at a time.
pub(crate) fn variants() -> Vec<Variant> {
    let base = Variant {
        name: DEFAULT.into(),
        encoding: "views".into(),
        layers: vec![9],
        views: vec![0, 1, 2],
        projection: 0,
        seed: 20_260_211,
        min_fraction: 0.3,
        smoothing: 0.4,
        reach: 1,
        keep: 0.4,
        positional_correction: 0.3,
        filter: false,
        pooled_top: None,
        z_score: false,
        map: None,
    };
    let joined = Variant { encoding: "joined".into(), ..base.clone() };
    let plain = Variant {
        projection: 128,
        smoothing: 0.0,
        keep: 0.3,
        positional_correction: 0.0,
        reach: 0,
        ..joined.clone()
    };
    let mut all = vec![base.clone()];
    let mut add = |from: &Variant, name: String, change: &dyn Fn(&mut Variant)| {
        let mut variant = Variant { name, ..from.clone() };
        change(&mut variant);
        all.push(variant);
    };
    for block in [6, 7, 8, 10, 11, 12] {
        add(&base, format!("stride 7, block {block}"), &|v| {
            v.encoding = "stride 7, other blocks".into();
            v.layers = vec![block];
        });
    }
    for views in [vec![0], vec![1], vec![2], vec![0, 1], vec![0, 2], vec![1, 2]] {
        add(&base, format!("views {views:?}"), &|v| v.views = views.clone());
    }
    for smoothing in [0.0, 0.2, 0.6] {
        add(&base, format!("smoothing {smoothing}"), &|v| v.smoothing = smoothing);
    }
    for keep in [0.1, 0.2, 0.3, 0.5, 0.8] {
        add(&base, format!("K {keep}"), &|v| v.keep = keep);
    }
    for share in [0.0, 0.5, 1.0] {
        add(&base, format!("place share {share}"), &|v| v.positional_correction = share);
    }
    for fraction in [0.0, 0.1, 0.5] {
        add(&base, format!("brain fraction {fraction}"), &|v| v.min_fraction = fraction);
    }
    for reach in [2, 0] {
        add(&base, format!("reach {reach}"), &|v| v.reach = reach);
    }
    add(&base, "projection 128".into(), &|v| v.projection = 128);
    add(&base, "filter".into(), &|v| v.filter = true);
    add(&base, "z-score against the other scans".into(), &|v| {
        v.positional_correction = 0.0;
        v.z_score = true;
    });
    for (top, name) in [(7, "mean"), (3, "mean of the top 3"), (1, "maximum")] {
        add(&base, format!("14 slices, {name} of 7 pairs of slices"), &|v| {
            v.encoding = "2 slices".into();
            v.pooled_top = Some(top);
        });
    }
    for encoding in ENCODINGS.iter().filter(|e| e.layers == [9] && e.name != "views") {
        add(&base, encoding.name.into(), &|v| v.encoding = encoding.name.into());
    }
    add(&joined, "views joined, 14 slices".into(), &|_| {});
    add(&joined, "views joined, 14 slices, K 0.3, scores not levelled".into(), &|v| {
        v.keep = 0.3;
        v.positional_correction = 0.0;
    });
    add(&plain, "plain: block 9 as in the paper".into(), &|_| {});
    add(&plain, "plain, reach 1".into(), &|v| v.reach = 1);
    for seed in 1..=2 {
        add(&plain, format!("plain, reach 1, projection seed {seed}"), &|v| {
            v.reach = 1;
            v.seed = seed;
        });
    }
    for layer in [3, 6, 7, 8, 10, 11, 12] {
        add(&plain, format!("plain, reach 1, block {layer}"), &|v| {
            v.reach = 1;
            v.layers = vec![layer];
        });
    }
    for layers in [vec![3, 6, 9, 12], vec![6, 9]] {
        add(&plain, format!("plain, blocks {layers:?}"), &|v| v.layers = layers.clone());
    }
    for (name, map) in MAPS {
        add(&base, name.into(), &|v| {
            v.encoding = SHIPPED.into();
            v.map = Some(map);
        });
    }
    all
}
