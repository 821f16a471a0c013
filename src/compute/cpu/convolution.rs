//! Convolutions over volumes.
//!
//! Values are stored as `[z, y, x, channel]`. So the inputs of an output voxel are one run of
//! consecutive values for each row that the kernel reaches. A run has the kernel's extent along x
//! times the channels. The same holds for a transposed convolution of stride 2, if both parities of
//! x count as channels of one voxel. It is then one convolution for each parity of z and y. So one
//! kernel computes them all. Each sum is taken in the order of the runs.

use super::{
    features::Features,
    row::{Lanes, Row, convolve_row},
    vectorised::LANES,
};
use crate::domain::brain_weights::Kernel;

/// How a kernel is applied. The padding is half of the kernel's extent, rounded down for odd
/// extents, and 0 for extent 2. This keeps the sides multiples of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// One output for each input.
    Plain,
    /// One output for two inputs along each axis.
    Halving,
    /// The transpose of [`Form::Plain`].
    Transposed,
    /// The transpose of [`Form::Halving`], with one more output at the upper end, so that the side
    /// doubles.
    Doubling,
}

impl Form {
    /// Input voxels from one output voxel to the next.
    fn stride(self) -> usize {
        if self == Self::Halving { 2 } else { 1 }
    }

    /// Output voxels for one input voxel.
    fn spread(self) -> usize {
        if self == Self::Doubling { 2 } else { 1 }
    }

    /// Input voxels along each axis that a kernel of `side` reaches from one place.
    fn reach(self, side: usize) -> usize {
        side.div_ceil(self.spread())
    }

    /// Distance from the first of these voxels to the place itself, voxels.
    fn before(self, side: usize) -> usize {
        if self == Self::Doubling { 0 } else { (side - 1) / 2 }
    }

    /// The entry of the kernel that connects the input `step` voxels after the first with an output
    /// of this parity, if there is one.
    fn tap(self, side: usize, parity: usize, step: usize) -> Option<usize> {
        let tap = match self {
            Self::Plain | Self::Halving => Some(step),
            Self::Transposed => (side - 1).checked_sub(step),
            Self::Doubling => (parity + (side - 1) / 2).checked_sub(2 * step),
        };
        tap.filter(|&tap| tap < side)
    }
}

/// A kernel, prepared for inputs of one shape.
struct Packed {
    /// Outputs of one place along x: channels, for both parities if the side is doubled.
    n_outputs: usize,
    /// `[n_outputs / LANES]`, rounded up.
    bias: Vec<Lanes>,
    /// One entry for each parity of z and y.
    parities: Vec<Parity>,
}

/// The sources of the outputs of one parity of z and y.
struct Parity {
    /// Start of each run of inputs, counted from the first input that the kernel can reach.
    runs: Vec<usize>,
    /// `[n_outputs / LANES, runs, values of a run]`.
    weights: Vec<Lanes>,
}

/// Convolves the input and adds the bias. The result has the border `border`.
///
/// # Panics
/// If the input has too narrow a border, or another number of channels than the kernel.
pub(super) fn convolve(input: &Features, kernel: &Kernel, form: Form, border: usize) -> Features {
    let kernel = Reader { kernel, form };
    let [outputs, inputs] = kernel.channels();
    let (stride, spread, side) = (form.stride(), form.spread(), kernel.side());
    assert_eq!(input.channels, inputs, "the kernel has other inputs");
    assert!(input.border >= form.before(side), "the border is too narrow");
    assert!(spread == 1 || input.border + 1 >= form.reach(side), "the border is too narrow");
    let packed = kernel.packed(input);
    let mut output = Features::zeros(input.side.div_ceil(stride) * spread, outputs, border);
    let first = |at: usize| at / spread * stride + input.border - form.before(side);
    output.for_each_row(|z, y, row| {
        let parity = &packed.parities[z % spread * spread + y % spread];
        let start = first(z) * input.plane_stride()
            + first(y) * input.row_stride()
            + first(0) * input.channels;
        convolve_row(Row {
            inputs: &input.values[start..],
            runs: &parity.runs,
            step: stride * input.channels,
            weights: &parity.weights,
            bias: &packed.bias,
            n_outputs: packed.n_outputs,
            out: row,
        });
    });
    output
}

/// A kernel and how it is applied.
struct Reader<'a> {
    kernel: &'a Kernel,
    form: Form,
}

impl Reader<'_> {
    fn side(&self) -> usize {
        self.kernel.shape[4]
    }

    /// Outputs and inputs.
    fn channels(&self) -> [usize; 2] {
        let [first, second, ..] = self.kernel.shape;
        match self.form {
            Form::Plain | Form::Halving => [first, second],
            Form::Transposed | Form::Doubling => [second, first],
        }
    }

    /// The weight from an input to an output at one entry `[z, y, x]` of the kernel.
    fn weight(&self, output: usize, input: usize, [z, y, x]: [usize; 3]) -> f32 {
        let (first, second) = match self.form {
            Form::Plain | Form::Halving => (output, input),
            Form::Transposed | Form::Doubling => (input, output),
        };
        let side = self.side();
        let pair = first * self.kernel.shape[1] + second;
        self.kernel.weight[((pair * side + z) * side + y) * side + x]
    }

    fn packed(&self, input: &Features) -> Packed {
        let ([outputs, _], spread) = (self.channels(), self.form.spread());
        let n_outputs = outputs * spread;
        let bias = |output: usize| self.kernel.bias.get(output % outputs).copied().unwrap_or(0.0);
        let parities = (0..spread).flat_map(|z| (0..spread).map(move |y| [z, y]));
        Packed {
            n_outputs,
            bias: (0..n_outputs).step_by(LANES).map(|from| lanes(from, n_outputs, bias)).collect(),
            parities: parities.map(|parity| self.parity(parity, input)).collect(),
        }
    }

    fn parity(&self, [z, y]: [usize; 2], input: &Features) -> Parity {
        let ([outputs, inputs], side) = (self.channels(), self.side());
        let (form, reach) = (self.form, self.form.reach(side));
        let n_outputs = outputs * form.spread();
        let (mut runs, mut rows) = (Vec::new(), Vec::new());
        for (dz, dy) in (0..reach).flat_map(|dz| (0..reach).map(move |dy| (dz, dy))) {
            if let (Some(tap_z), Some(tap_y)) = (form.tap(side, z, dz), form.tap(side, y, dy)) {
                runs.push(dz * input.plane_stride() + dy * input.row_stride());
                rows.push((tap_z, tap_y));
            }
        }

        let mut weights = Vec::new();
        for from in (0..n_outputs).step_by(LANES) {
            for &(tap_z, tap_y) in &rows {
                for value in 0..reach * inputs {
                    let (dx, channel) = (value / inputs, value % inputs);
                    weights.push(lanes(from, n_outputs, |output| {
                        let tap_x = form.tap(side, output / outputs, dx);
                        let taps = tap_x.map(|tap_x| [tap_z, tap_y, tap_x]);
                        taps.map_or(0.0, |taps| self.weight(output % outputs, channel, taps))
                    }));
                }
            }
        }
        Parity { runs, weights }
    }
}

/// The values of [`LANES`] outputs, starting at `from`. Lanes beyond the last output are 0.
fn lanes(from: usize, n_outputs: usize, value: impl Fn(usize) -> f32) -> Lanes {
    Lanes(std::array::from_fn(|lane| {
        let output = from + lane;
        if output < n_outputs { value(output) } else { 0.0 }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::projection::Normal;

    /// Sums over all pairs of voxels, from PyTorch's definition: an entry k of the kernel connects
    /// the fine voxel `stride * coarse + k - padding` with the coarse one.
    fn by_definition(input: &Features, kernel: &Kernel, form: Form) -> Vec<f64> {
        let reader = Reader { kernel, form };
        let [outputs, inputs] = reader.channels();
        let (side, padding) = (reader.side(), (reader.side() - 1) / 2);
        let is_transposed = matches!(form, Form::Transposed | Form::Doubling);
        let stride = form.stride() * form.spread();
        let n = input.side.div_ceil(form.stride()) * form.spread();
        let tap = |from: usize, to: usize| {
            let (fine, coarse) = if is_transposed { (to, from) } else { (from, to) };
            (fine + padding).checked_sub(stride * coarse).filter(|&tap| tap < side)
        };
        let mut out = vec![0.0; n.pow(3) * outputs];
        for (at, sum) in out.iter_mut().enumerate() {
            let (output, x, y, z) =
                (at % outputs, at / outputs % n, at / outputs / n % n, at / outputs / n / n);
            *sum = kernel.bias.get(output).copied().unwrap_or(0.0).into();
            for from in 0..input.side.pow(3) {
                let (s, row) = (input.side, from / input.side);
                let (fx, fy, fz) = (from % s, row % s, row / s);
                let (Some(kx), Some(ky), Some(kz)) = (tap(fx, x), tap(fy, y), tap(fz, z)) else {
                    continue;
                };
                for channel in 0..inputs {
                    let value = input.row(fz, fy)[fx * inputs + channel];
                    *sum +=
                        f64::from(value) * f64::from(reader.weight(output, channel, [kz, ky, kx]));
                }
            }
        }
        out
    }

    fn check(form: Form, side: usize, [inputs, outputs]: [usize; 2], n: usize, with_bias: bool) {
        let mut normal = Normal::new(11);
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| normal.next() as f32).collect() };
        let is_transposed = matches!(form, Form::Transposed | Form::Doubling);
        let [first, second] = if is_transposed { [inputs, outputs] } else { [outputs, inputs] };
        let kernel = Kernel {
            shape: [first, second, side, side, side],
            weight: random(first * second * side.pow(3)),
            bias: if with_bias { random(outputs) } else { Vec::new() },
        };
        let mut input = Features::zeros(n, inputs, 3);
        let values = random(n.pow(3) * inputs);
        input.for_each_row(|z, y, row| {
            row.copy_from_slice(&values[(z * n + y) * n * inputs..][..n * inputs]);
        });
        let found = convolve(&input, &kernel, form, 1);
        let expected = by_definition(&input, &kernel, form);
        let rows = (0..found.side).flat_map(|z| (0..found.side).map(move |y| (z, y)));
        let found: Vec<f32> = rows.flat_map(|(z, y)| found.row(z, y)).copied().collect();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            // Sums of up to 343 products of magnitude 1.
            assert!(
                (f64::from(*found) - expected).abs() < 2e-5 * 343_f64.sqrt(),
                "{form:?} {side}"
            );
        }
    }

    #[test]
    fn every_form_and_kernel_of_the_network_gives_the_sums_of_its_definition() {
        // Sides of 13 and 9 take 8, 4 and 1 places at a time.
        check(Form::Halving, 7, [1, 3], 13, false);
        check(Form::Plain, 3, [2, 17], 5, true);
        check(Form::Plain, 3, [3, 2], 9, false);
        check(Form::Halving, 3, [4, 5], 6, false);
        check(Form::Halving, 1, [5, 4], 6, false);
        check(Form::Plain, 1, [3, 35], 3, false);
        check(Form::Transposed, 3, [3, 2], 5, false);
        check(Form::Doubling, 3, [3, 5], 4, true);
        check(Form::Doubling, 3, [2, 9], 3, false);
        check(Form::Doubling, 2, [4, 1], 3, true);
    }
}
