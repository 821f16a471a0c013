//! Nearest distances between the tokens of two scans on a device.
//!
//! The device finds the nearest token by products. The host computes the distance to it from the
//! differences in f32. |a|^2 + |b|^2 - 2ab alone is wrong for close tokens because of cancellation,
//! and a copied token would not get distance 0. The features have the 11 significant bits of f16.
//! TF32 has as many, so tensor cores multiply them exactly and round only the sums.

use burn::{
    prelude::{Backend, Int, Tensor, TensorData},
    tensor::{DType, FloatDType, backend::ExecutionError},
};
use half::{f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::failure::guarded;
use crate::{
    compute::cpu::CpuDistances,
    domain::{PairDistances, error::DeviceError},
    numeric::{
        scoring::{PairColumns, SearchReach},
        token::TokenGrid,
    },
};

/// Entries of the largest block of products: 256 MiB in f32. Two such blocks are in use at a time.
const MAX_BLOCK: usize = 1 << 26;

/// If the device runs out of memory, blocks are halved, down to this number of rows.
const MIN_ROWS: usize = 64;

/// Whole-volume distances on a burn device. A search within a few cells stays on the CPU, because
/// it has some sixty times fewer candidates. Mirrored pairs give mirrored columns, to the last bit.
pub struct BurnDistances<B: Backend> {
    device: B::Device,
    name: String,
    max_block: usize,
    cpu: CpuDistances,
}

impl<B: Backend> BurnDistances<B> {
    /// Distances on `device`, which is called `name` in errors.
    pub fn new(device: B::Device, name: &str) -> Self {
        Self { device, name: name.to_owned(), max_block: MAX_BLOCK, cpu: CpuDistances::new() }
    }

    /// Limits the products that are computed at a time to `max_block`.
    pub fn with_max_block(self, max_block: usize) -> Self {
        Self { max_block, ..self }
    }

    fn whole_volume(
        &mut self,
        first: &BothFormats<'_>,
        second: &BothFormats<'_>,
    ) -> Result<PairColumns, DeviceError> {
        if first.n_tokens() == 0 || second.n_tokens() == 0 {
            return Ok(PairColumns::unmatched(first.n_tokens(), second.n_tokens()));
        }
        loop {
            let rows = (self.max_block / second.n_tokens()).clamp(1, first.n_tokens());
            let found = guarded(&self.name, rows, || self.blocks(first, second, rows));
            match found {
                Err(DeviceError::OutOfMemory { .. }) if rows > MIN_ROWS => {
                    self.max_block = rows / 2 * second.n_tokens();
                }
                found => return found,
            }
        }
    }

    /// Compares all tokens of `second` with `rows` tokens of `first` at a time.
    fn blocks(
        &self,
        first: &BothFormats<'_>,
        second: &BothFormats<'_>,
        rows: usize,
    ) -> Result<PairColumns, ExecutionError> {
        let all = self.upload(second.half, second.channels);
        let all_norms = squared_norms(&all).reshape([1, second.n_tokens()]);
        let mut columns = PairColumns {
            first_to_second: Vec::with_capacity(first.n_tokens()),
            second_to_first: vec![f32::INFINITY; second.n_tokens()],
        };
        for (index, block) in first.half.chunks(rows * first.channels).enumerate() {
            let start = index * rows;
            let block = self.upload(block, first.channels);
            let block_norms = squared_norms(&block);
            let products = (block * -2.0).matmul(all.clone().transpose());
            // All candidates of a row have the same |a|^2, and those of a column the same |b|^2.
            let of_rows = (products.clone() + all_norms.clone()).argmin(1);
            let of_columns = (products + block_norms).argmin(0);
            let winners = indices(of_rows)?;
            let distance =
                |(row, &winner): (usize, &usize)| first.distance(start + row, second, winner);
            columns.first_to_second.par_extend(winners.par_iter().enumerate().map(distance));
            let winners = indices(of_columns)?;
            columns.second_to_first.par_iter_mut().zip(&winners).enumerate().for_each(
                |(column, (nearest, &winner))| {
                    *nearest = nearest.min(second.distance(column, first, start + winner));
                },
            );
        }
        Ok(columns)
    }

    /// Rows of features in f32 on the device. They are sent in half precision.
    fn upload(&self, features: &[f16], channels: usize) -> Tensor<B, 2> {
        let shape = [features.len() / channels, channels];
        let data = TensorData::new(features.to_vec(), shape);
        Tensor::<B, 2>::from_data(data, (&self.device, DType::F16)).cast(FloatDType::F32)
    }
}

impl<B: Backend> PairDistances for BurnDistances<B> {
    fn nearest(
        &mut self,
        first: &TokenGrid,
        second: &TokenGrid,
        reach: SearchReach,
    ) -> Result<PairColumns, DeviceError> {
        if reach != SearchReach::WholeVolume {
            return self.cpu.nearest(first, second, reach);
        }
        assert_eq!(first.channels(), second.channels(), "tokens of one method");
        let (a, b) = (BothFormats::of(first), BothFormats::of(second));
        // A device may round A B^T and B A^T differently, so each pair is computed in one order.
        if in_order(a.half, b.half) {
            return self.whole_volume(&a, &b);
        }
        Ok(self.whole_volume(&b, &a)?.mirrored())
    }
}

/// The tokens of one scan, for the device and for the host.
struct BothFormats<'a> {
    channels: usize,
    half: &'a [f16],
    single: Vec<f32>,
}

impl<'a> BothFormats<'a> {
    fn of(grid: &'a TokenGrid) -> Self {
        let half = grid.features();
        let mut single = vec![0.0; half.len()];
        half.convert_to_f32_slice(&mut single);
        Self { channels: grid.channels(), half, single }
    }

    fn n_tokens(&self) -> usize {
        self.half.len() / self.channels.max(1)
    }

    fn row(&self, token: usize) -> &[f32] {
        &self.single[token * self.channels..(token + 1) * self.channels]
    }

    fn distance(&self, token: usize, other: &BothFormats<'_>, other_token: usize) -> f32 {
        squared_distance(self.row(token), other.row(other_token)).sqrt()
    }
}

/// The squared distance, in sixteen sums that the compiler keeps in vector registers.
fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += (a - b) * (a - b);
        }
    }
    sums.iter().sum()
}

fn in_order(a: &[f16], b: &[f16]) -> bool {
    let (bits_a, bits_b) = (a.iter().map(|f| f.to_bits()), b.iter().map(|f| f.to_bits()));
    a.len().cmp(&b.len()).then_with(|| bits_a.cmp(bits_b)).is_le()
}

/// The squared length of each row, `[n, 1]`.
fn squared_norms<B: Backend>(rows: &Tensor<B, 2>) -> Tensor<B, 2> {
    (rows.clone() * rows.clone()).sum_dim(1)
}

fn indices<B: Backend>(winners: Tensor<B, 2, Int>) -> Result<Vec<usize>, ExecutionError> {
    Ok(winners.try_into_data()?.iter::<i64>().map(|index| index as usize).collect())
}
