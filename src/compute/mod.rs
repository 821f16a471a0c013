//! The encoder and the distances on a device: [`cpu`] natively, [`gpu`] through burn.

pub mod cpu;
#[cfg(feature = "burn")]
pub mod gpu;
pub mod position;
pub mod weights;

use position::PositionResize;

/// What the encoder returns: which layers, and in which form. Shared by both engines.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderOptions {
    /// Blocks whose output is returned, counted from 1, ascending; later blocks are not computed.
    pub layers: Vec<usize>,
    /// Whether the network's final layer norm is applied to each of them (the original's
    /// `get_intermediate_layers` does by default).
    pub final_norm: bool,
    /// How the position embedding is resized.
    pub position: PositionResize,
}
