//! Lesions in classes of their volume.

/// Classes of lesion volume in the paper: name, smallest volume, and the volume that is too large,
/// mm^3.
pub const SIZES: [(&str, f64, f64); 3] = [
    ("below 100 mm3", 0.0, 100.0),
    ("100 to 1000 mm3", 100.0, 1000.0),
    ("above", 1000.0, f64::INFINITY),
];

/// A count per class of [`SIZES`].
pub type BySize = [usize; SIZES.len()];

/// The class of a volume: its position in [`SIZES`].
pub fn size_class(volume_mm3: f64) -> usize {
    let is_within = |(_, from, to): &(&str, f64, f64)| (*from..*to).contains(&volume_mm3);
    SIZES.iter().position(is_within).unwrap_or(SIZES.len() - 1)
}

/// Counts volumes, mm^3, by class.
pub fn by_size(volumes: impl IntoIterator<Item = f64>) -> BySize {
    let mut n = [0; SIZES.len()];
    volumes.into_iter().for_each(|volume| n[size_class(volume)] += 1);
    n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_on_a_border_belongs_to_the_larger_class() {
        assert_eq!([0.5, 99.9, 100.0, 999.0, 1000.0, 1e6].map(size_class), [0, 0, 1, 1, 2, 2]);
    }

    #[test]
    fn volumes_are_counted_in_their_classes() {
        assert_eq!(by_size([10.0, 5000.0, 99.0, 100.0]), [2, 1, 1]);
    }
}
