//! Attention for a few queries at a time, so that their scores never leave the cache.

use super::{
    kernels::{softmax, store_scaled},
    product::{Element, Kernel, MAX_ROWS, Panels, Rows, WIDTH, multiply},
};

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct Scratch<E> {
    keys: Panels<E>,
    values: Panels<E>,
    scores: Vec<f32>,
    weights: Vec<E>,
}

/// softmax(Q K^T / sqrt(width)) V of every head into its columns of `joined`, `[n_tokens,
/// channels]`; `qkv` is `[n_tokens, 3 * channels]`.
pub(super) fn attend<E: Element>(
    kernel: Kernel<E>,
    qkv: &[E],
    heads: usize,
    channels: usize,
    scratch: &mut Scratch<E>,
    joined: &mut [E],
) {
    let (width, stride) = (channels / heads, 3 * channels);
    let n_tokens = joined.len() / channels;
    let padded = E::padded(n_tokens);
    // The row length of the scores: whole tiles, side by side.
    let score_stride = n_tokens.next_multiple_of(WIDTH);
    let Scratch { keys, values, scores, weights } = scratch;
    scores.resize(MAX_ROWS * score_stride, 0.0);
    // Weights beyond the tokens stay zero.
    weights.clear();
    weights.resize(MAX_ROWS * padded, E::default());
    let mut factors = [0.0; MAX_ROWS];
    for head in 0..heads {
        let part = |index: usize| &qkv[index * channels + head * width..];
        let rows = |index| Rows { values: part(index), n: n_tokens, stride };
        keys.set_columns(rows(1), width);
        values.set_rows(rows(2), width);
        for start in (0..n_tokens).step_by(kernel.rows) {
            let n = kernel.rows.min(n_tokens - start);
            let queries = Rows { values: &part(0)[start * stride..], n, stride };
            multiply(kernel, queries, keys, |place, tile| {
                for (row, tile) in tile.0.iter().take(place.rows).enumerate() {
                    let at = (place.row + row) * score_stride + place.column;
                    let scores = &mut scores[at..];
                    *scores.first_chunk_mut().expect("whole tiles") = *tile;
                }
            });
            let scale = (width as f32).sqrt().recip();
            let rows = Rows { values: scores, n, stride: score_stride };
            softmax(rows, n_tokens, scale, weights, padded, &mut factors);
            let weights = Rows { values: weights, n, stride: padded };
            let out = &mut joined[start * channels + head * width..];
            multiply(kernel, weights, values, |place, tile| {
                store_scaled(tile, place, &factors, out, channels);
            });
        }
    }
}
