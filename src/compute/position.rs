//! Resizes the position embedding from the grid that it was trained on to the grid in use.
//!
//! The resize is bicubic with a = -0.75, half-pixel centres and no antialias, as in PyTorch's
//! `F.interpolate`.

use serde::{Deserialize, Serialize};

/// How the bicubic resize maps the trained grid onto the grid in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionResize {
    /// By the scale `(n + 0.1) / trained`, as in Meta's hub code for the models without registers.
    Offset,
    /// By the size, as in exports to Hugging Face and ONNX.
    Size,
}

/// Resizes the embedding `[1 + trained_side^2, channels]` to a grid of `side` patches per edge. The
/// result is `[1 + side^2, channels]`. The first row, the class position, stays. A grid of the
/// trained size is returned unchanged.
pub fn resize_position_embedding(
    embedding: &[f32],
    trained_side: usize,
    side: usize,
    channels: usize,
    mode: PositionResize,
) -> Vec<f32> {
    if side == trained_side {
        return embedding.to_vec();
    }
    let scale = match mode {
        PositionResize::Offset => (side as f64 + 0.1) / trained_side as f64,
        PositionResize::Size => side as f64 / trained_side as f64,
    };
    let taps: Vec<_> = (0..side).map(|index| taps(index, scale, trained_side)).collect();
    let (class, grid) = embedding.split_at(channels);
    let mut out = class.to_vec();
    for rows in &taps {
        for columns in &taps {
            for channel in 0..channels {
                let mut sum = 0.0;
                for &(row, row_weight) in rows {
                    for &(column, column_weight) in columns {
                        let value = grid[(row * trained_side + column) * channels + channel];
                        sum += row_weight * column_weight * f64::from(value);
                    }
                }
                out.push(sum as f32);
            }
        }
    }
    out
}

/// The four trained positions that make up position `index`, with their weights. Beyond the border,
/// the position at the border counts.
fn taps(index: usize, scale: f64, trained_side: usize) -> [(usize, f64); 4] {
    let source = (index as f64 + 0.5) / scale - 0.5;
    let floor = source.floor();
    [-1.0, 0.0, 1.0, 2.0].map(|step: f64| {
        let position = (floor + step).clamp(0.0, (trained_side - 1) as f64) as usize;
        (position, cubic((source - floor - step).abs()))
    })
}

/// Keys' cubic kernel with a = -0.75.
fn cubic(distance: f64) -> f64 {
    const A: f64 = -0.75;
    let d = distance;
    if d <= 1.0 {
        ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0
    } else if d < 2.0 {
        ((A * d - 5.0 * A) * d + 8.0 * A) * d - 4.0 * A
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_grid_stays_constant_and_the_class_position_is_kept() {
        let mut embedding = vec![7.0; 2];
        embedding.extend(vec![3.0; 25 * 2]);
        for mode in [PositionResize::Offset, PositionResize::Size] {
            let out = resize_position_embedding(&embedding, 5, 4, 2, mode);
            assert_eq!((out.len(), out[0], out[1]), (34, 7.0, 7.0));
            assert!(out[2..].iter().all(|v| (v - 3.0).abs() < 1e-6));
        }
    }

    #[test]
    fn a_ramp_is_sampled_at_half_pixel_centres() {
        // Rows 0, 1, 2, ... 7 halved: inner rows of the result lie between rows 2i and 2i + 1.
        let mut embedding = vec![0.0];
        embedding.extend((0..64).map(|i| (i / 8) as f32));
        let out = resize_position_embedding(&embedding, 8, 4, 1, PositionResize::Size);
        assert!((out[1 + 4] - 2.5).abs() < 1e-5 && (out[1 + 8] - 4.5).abs() < 1e-5);
        assert_eq!(resize_position_embedding(&embedding, 8, 8, 1, PositionResize::Size), embedding);
    }
}
