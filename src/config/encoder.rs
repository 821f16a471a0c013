//! `[encoder]`: the network and its device.

use std::path::PathBuf;

use serde::Deserialize;

use super::check::Checker;
use crate::compute::{Precision, position::PositionResize};

/// Which device encodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceChoice {
    /// CUDA if it works, else the CPU.
    Auto,
    /// CUDA. Without it the daemon does not start.
    Cuda,
    /// The native CPU engine.
    Cpu,
}

/// `[encoder]` after its check.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoder {
    /// File of the weights. `None` means the fetched ones.
    pub weights: Option<PathBuf>,
    /// Where the encoder and the distances run.
    pub device: DeviceChoice,
    /// Blocks, counted from 1, ascending. If empty, preset and depth decide.
    pub layers: Vec<usize>,
    /// Whether the network's final norm is applied to each layer.
    pub final_norm: bool,
    /// How the position embedding is resized.
    pub position_resize: PositionResize,
    /// Number format of the matrix products. With `None` the device decides.
    pub precision: Option<Precision>,
    /// Largest number of slices that the device encodes in one call.
    pub batch_slices: usize,
}

pub(super) fn read(check: &mut Checker) -> Encoder {
    let devices =
        [("auto", DeviceChoice::Auto), ("cuda", DeviceChoice::Cuda), ("cpu", DeviceChoice::Cpu)];
    let resizes = [("offset", PositionResize::Offset), ("size", PositionResize::Size)];
    let precisions = [
        ("auto", None),
        ("f32", Some(Precision::F32)),
        ("bf16", Some(Precision::Bf16)),
        ("f16", Some(Precision::F16)),
    ];
    Encoder {
        layers: layers(check),
        weights: check.named_path("encoder.weights"),
        device: check.word("encoder.device", &devices),
        final_norm: check.flag("encoder.final_norm"),
        position_resize: check.word("encoder.position_resize", &resizes),
        precision: check.word("encoder.precision", &precisions),
        batch_slices: check.whole("encoder.batch_slices", 1..=4096),
    }
}

fn layers(check: &mut Checker) -> Vec<usize> {
    let key = "encoder.layers";
    let listed = check.list(key);
    let mut layers: Vec<usize> =
        listed.iter().map(|layer| check.in_range(key, layer, 1..=64)).collect();
    layers.sort_unstable();
    layers.dedup();
    let is_repeated = |(n, layer)| listed[..n].contains(layer);
    if listed.iter().enumerate().any(is_repeated) {
        check.fault(key, toml::Value::Array(listed), "no block may appear twice");
    }
    layers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, check::faults};

    #[test]
    fn the_number_format_is_left_to_the_device_unless_a_site_names_one() {
        assert_eq!(Config::parse("").unwrap().encoder.precision, None);
        let named = |word: &str| format!("[encoder]\nprecision = \"{word}\"");
        let config = Config::parse(&named("f32")).unwrap();
        assert_eq!(config.encoder.precision, Some(Precision::F32));
        let found = faults(&named("f8"));
        let needed = "\"auto\", \"f32\", \"bf16\" or \"f16\" is needed";
        assert_eq!(found, [format!("encoder.precision = \"f8\": {needed}")]);
    }

    #[test]
    fn each_layer_is_listed_once() {
        let site = "encoder.layers = [9, 3]";
        assert_eq!(Config::parse(site).unwrap().encoder.layers, [3, 9]);
        let found = faults("encoder.layers = [3, 9, 3]");
        assert_eq!(found, ["encoder.layers = [3, 9, 3]: no block may appear twice"]);
    }
}
