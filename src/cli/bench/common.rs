//! What the measurements share: their arguments, random tokens, and the devices.

use std::env;

use half::f16;
use serde::de::{DeserializeOwned, IntoDeserializer};

use crate::{
    cli::{Failure, USAGE, engine_code},
    compute::{Devices, EncoderOptions, Precision, cpu::Instructions, position::PositionResize},
    config::DeviceChoice,
    domain::{
        PairDistances,
        weights::{Architecture, VitWeights},
    },
    engine::{EngineError, choose_device},
    numeric::{geometry::Shape3, projection::Normal, token::TokenGrid},
};

#[derive(clap::Args)]
pub(super) struct How {
    /// The newest CPU instructions to use: portable, avx2, avx512, avx512_bf16 or amx.
    #[arg(long, value_parser = word::<Instructions>, default_value = "amx")]
    pub(super) instructions: Instructions,
    /// Device: auto, cuda or cpu.
    #[arg(long, value_parser = word::<DeviceChoice>, default_value = "auto")]
    pub(super) device: DeviceChoice,
    /// Number of repetitions; the median counts. One more runs first and does not count.
    #[arg(long, default_value_t = 5)]
    pub(super) repeats: usize,
    /// Print one JSON object.
    #[arg(long)]
    pub(super) json: bool,
}

/// Parses a word as the settings file does.
pub(super) fn word<T: DeserializeOwned>(text: &str) -> Result<T, serde::de::value::Error> {
    T::deserialize(text.into_deserializer())
}

/// Limits the instructions of the CPU where the environment says so, so that results can be
/// compared between processors to the last bit.
pub(in crate::cli) fn limit_instructions() -> Result<(), Failure> {
    const NAME: &str = "ODDSCAN_INSTRUCTIONS";
    let Ok(text) = env::var(NAME) else { return Ok(()) };
    let limit: Instructions = word(&text).map_err(|_| {
        let needed = "portable, avx2, avx512, avx512_bf16 or amx is needed";
        Failure::new(USAGE, format!("{NAME} = {text:?}: {needed}"))
    })?;
    limit.limit();
    Ok(())
}

/// About `n_tokens` random tokens in a ball that fills half of a grid, like a brain.
pub(super) fn random_tokens(seed: u64, n_tokens: usize, channels: usize) -> TokenGrid {
    let side = (2.0 * n_tokens as f64).cbrt().round().max(1.0) as usize;
    let (shape, centre) = (Shape3::cube(side), (side as f64 - 1.0) / 2.0);
    let apart = |cell: u32| -> f64 {
        shape.voxel(cell as usize).iter().map(|&at| (at as f64 - centre).powi(2)).sum()
    };

    let mut cells: Vec<u32> = (0..shape.n_voxels() as u32).collect();
    cells.sort_by(|&a, &b| apart(a).total_cmp(&apart(b)));
    cells.truncate(n_tokens);
    cells.sort_unstable();

    let mut normal = Normal::new(seed);
    let scale = (channels as f64).powf(-0.5);
    let features =
        (0..cells.len() * channels).map(|_| f16::from_f64(scale * normal.next())).collect();
    TokenGrid::new(shape, channels, cells, features).expect("cells are sorted, features finite")
}

/// The name of the device and the distances on it.
pub(super) fn distances_on(
    device: DeviceChoice,
) -> Result<(String, Box<dyn PairDistances>), Failure> {
    // Distances need no network, but the device needs one: one block is enough.
    let named = Architecture::named("dinov2_vits14").expect("is one of the names");
    let tiny = VitWeights::random(Architecture { depth: 1, ..named }, 0);
    let (encoder, distances) = devices(&tiny, &options(1, None), device)?;
    Ok((encoder.device().to_owned(), distances))
}

pub(super) fn devices(
    weights: &VitWeights,
    options: &EncoderOptions,
    device: DeviceChoice,
) -> Result<Devices, Failure> {
    choose_device(device, weights, options, usize::MAX)
        .map_err(|error: EngineError| Failure::new(engine_code(&error), error))
}

pub(super) fn options(layer: usize, precision: Option<Precision>) -> EncoderOptions {
    EncoderOptions {
        layers: vec![layer],
        final_norm: true,
        position: PositionResize::Offset,
        precision,
    }
}
