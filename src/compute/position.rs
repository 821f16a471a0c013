//! Resizing the position embedding from the grid it was trained on to the grid in use.

use serde::{Deserialize, Serialize};

/// How the bicubic resize maps the trained grid onto the grid in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionResize {
    /// By scale `(n + 0.1) / trained`, as Meta's hub code does for the models without registers.
    Offset,
    /// By size, as Hugging Face and ONNX exports do.
    Size,
}
