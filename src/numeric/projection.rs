//! The fixed random projection that shortens features (Le-Gia and Ahn 2026, eq. 2).
//!
//! The generator is written here and not taken from a crate, because the matrix must stay the same
//! as long as stored tokens exist: SplitMix64 (Steele et al. 2014) for uniform numbers, Box-Muller
//! for normal ones. `tests/reference` pins its values.

/// A Gaussian matrix `[n_inputs, n_outputs]`, row-major, entries N(0, 1/n_outputs).
#[derive(Debug, Clone, PartialEq)]
pub struct Projection {
    n_inputs: usize,
    n_outputs: usize,
    entries: Vec<f32>,
}

impl Projection {
    /// The matrix that belongs to `seed`.
    pub fn new(seed: u64, n_inputs: usize, n_outputs: usize) -> Self {
        let mut normal = Normal::new(seed);
        let scale = (n_outputs as f64).sqrt();
        let entries = (0..n_inputs * n_outputs).map(|_| (normal.next() / scale) as f32).collect();
        Self { n_inputs, n_outputs, entries }
    }

    /// Features before the projection.
    pub fn n_inputs(&self) -> usize {
        self.n_inputs
    }

    /// Features after the projection.
    pub fn n_outputs(&self) -> usize {
        self.n_outputs
    }

    /// All entries, `[n_inputs, n_outputs]`, row-major.
    pub fn entries(&self) -> &[f32] {
        &self.entries
    }

    /// Writes `features * R` to `out`; lengths `n_inputs` and `n_outputs`.
    pub fn apply(&self, features: &[f32], out: &mut [f32]) {
        assert_eq!((features.len(), out.len()), (self.n_inputs, self.n_outputs));
        out.fill(0.0);
        for (feature, row) in features.iter().zip(self.entries.chunks_exact(self.n_outputs)) {
            for (sum, entry) in out.iter_mut().zip(row) {
                *sum += feature * entry;
            }
        }
    }
}

/// SplitMix64 with Box-Muller: a stream of standard normal numbers.
pub struct Normal {
    state: u64,
    spare: Option<f64>,
}

impl Normal {
    /// The stream that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed, spare: None }
    }

    /// The next standard normal number.
    #[expect(clippy::should_implement_trait, reason = "an endless stream needs no Option")]
    pub fn next(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        // 1 - u lies in (0, 1], so that the logarithm is finite.
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        let angle = 2.0 * std::f64::consts::PI * self.uniform();
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }

    /// The next uniform number in [0, 1), 53 bits.
    pub fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 * 2.0_f64.powi(-53)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uniform_stream_is_splitmix64() {
        // First output of SplitMix64 with state 0 is 0xE220A8397B1DCDAF (Vigna's reference code).
        let expected = (0xE220_A839_7B1D_CDAF_u64 >> 11) as f64 * 2.0_f64.powi(-53);
        assert_eq!(Normal::new(0).uniform(), expected);
    }

    #[test]
    fn lengths_are_kept_on_average() {
        let projection = Projection::new(1, 384, 128);
        let mut mean = 0.0;
        for seed in 0..50 {
            let mut normal = Normal::new(seed);
            let x: Vec<f32> = (0..384).map(|_| normal.next() as f32).collect();
            let mut y = vec![0.0; 128];
            projection.apply(&x, &mut y);
            let length = |v: &[f32]| v.iter().map(|e| e * e).sum::<f32>();
            mean += length(&y) / length(&x) / 50.0;
        }
        // The ratio has standard deviation sqrt(2 / 128) = 0.125 for one vector, 0.018 for 50.
        assert!((mean - 1.0).abs() < 0.07, "{mean}");
    }

    #[test]
    fn a_unit_vector_picks_a_row() {
        let projection = Projection::new(7, 5, 3);
        let mut out = [0.0; 3];
        projection.apply(&[0.0, 0.0, 1.0, 0.0, 0.0], &mut out);
        assert_eq!(out, projection.entries()[6..9]);
    }
}
