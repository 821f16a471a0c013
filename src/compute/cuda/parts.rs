//! The parts of a batch that go through the network together, and the sources of their rows.

use std::ops::Range;

use crate::numeric::slice::ImageBatch;

/// Images that go through the network at a time; more if patches are left out. This fills the
/// largest GPUs (half as many took 3 % longer), and a ViT-L still fits into 4 GB.
pub(in crate::compute) const PART: usize = 112;
/// Limit on the images of a part, however few patches they have.
const MAX_PART: usize = 2 * PART;

/// The size of a part of a batch in the buffers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) n_images: usize,
    /// Tokens of all images.
    pub(super) n_rows: usize,
    /// Patches of all groups.
    pub(super) n_means: usize,
}

impl Extent {
    fn plus(self, other: Self) -> Self {
        Self {
            n_images: self.n_images + other.n_images,
            n_rows: self.n_rows + other.n_rows,
            n_means: self.n_means + other.n_means,
        }
    }

    /// A size that is enough for either of the two.
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            n_images: self.n_images.max(other.n_images),
            n_rows: self.n_rows.max(other.n_rows),
            n_means: self.n_means.max(other.n_means),
        }
    }

    /// Entries of the tables `places`, `sources` and `starts`, which `kernels.cu` reads one after
    /// the other.
    pub(super) fn n_entries(self) -> usize {
        2 * self.n_means + self.n_rows + self.n_images + 1
    }
}

/// Groups of a batch that go through the network together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BatchPart {
    pub(super) groups: Range<usize>,
    pub(super) extent: Extent,
}

/// Cuts a batch into parts of whole groups with about `max_rows` tokens each. Each image has
/// `n_first` tokens before its patches.
pub(super) fn parts(images: &ImageBatch, n_first: usize, max_rows: usize) -> Vec<BatchPart> {
    let mut parts: Vec<BatchPart> = Vec::new();
    for (index, patches) in images.patches.iter().enumerate() {
        let (n_images, n_means) = (images.group, patches.len());
        let own = Extent { n_images, n_rows: n_images * (n_first + n_means), n_means };
        match parts.last_mut() {
            Some(BatchPart { groups, extent })
                if extent.n_rows + own.n_rows <= max_rows
                    && extent.n_images + n_images <= MAX_PART =>
            {
                groups.end += 1;
                *extent = extent.plus(own);
            }
            _ => parts.push(BatchPart { groups: index..index + 1, extent: own }),
        }
    }
    parts
}

/// The tables of a part (see `kernels.cu`), and the number of tokens of its longest image.
pub(super) fn tables(
    images: &ImageBatch,
    part: &BatchPart,
    n_first: usize,
    n_patches: usize,
) -> (Vec<i32>, usize) {
    let (mut places, mut sources, mut starts) = (Vec::new(), Vec::new(), vec![0]);
    let mut longest = 0;
    for patches in &images.patches[part.groups.clone()] {
        let n_tokens = n_first + patches.len();
        longest = longest.max(n_tokens);
        for row in sources.len() + n_first..sources.len() + n_tokens {
            places.extend([row as i32, n_tokens as i32]);
        }
        for _ in 0..images.group {
            let image = starts.len() - 1;
            sources.extend((0..n_first).map(|first| -1 - first as i32));
            sources.extend(patches.iter().map(|&patch| (image * n_patches) as i32 + patch as i32));
            starts.push(sources.len() as i32);
        }
    }
    places.extend(sources);
    places.extend(starts);
    (places, longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Groups of two images with four patches each, of which some are left out.
    fn images() -> ImageBatch {
        let patches = vec![vec![1, 3], vec![], vec![0, 1, 2, 3]];
        ImageBatch { side: 2, pixels: vec![0.0; 6 * 4], group: 2, patches }
    }

    fn extent(n_images: usize, n_rows: usize, n_means: usize) -> Extent {
        Extent { n_images, n_rows, n_means }
    }

    #[test]
    fn parts_are_whole_groups_and_end_where_rows_would_be_too_many() {
        let found = |max_rows| parts(&images(), 1, max_rows);
        let part = |groups, extent| BatchPart { groups, extent };
        assert_eq!(found(18), [part(0..3, extent(6, 18, 6))]);
        assert_eq!(found(17), [part(0..2, extent(4, 8, 2)), part(2..3, extent(2, 10, 4))]);
        assert_eq!(found(1).len(), 3);
        let empty = ImageBatch { patches: vec![vec![]; MAX_PART], ..images() };
        assert_eq!(parts(&empty, 1, usize::MAX).len(), 2);
    }

    #[test]
    fn tables_say_what_each_row_is_and_which_rows_are_averaged() {
        let part = BatchPart { groups: 0..2, extent: extent(4, 12, 2) };
        let (entries, longest) = tables(&images(), &part, 2, 4);
        assert_eq!((entries.len(), longest), (part.extent.n_entries(), 4));
        let (places, rest) = entries.split_at(4);
        let (sources, starts) = rest.split_at(12);
        // The second image's tokens are four rows later.
        assert_eq!(places, [2, 4, 3, 4]);
        assert_eq!(sources, [-1, -2, 1, 3, -1, -2, 5, 7, -1, -2, -1, -2]);
        assert_eq!(starts, [0, 4, 8, 10, 12]);
    }
}
