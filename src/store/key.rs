//! The keys of tokens and columns.

use crate::domain::scan::ScanId;

/// `id | grid`, big-endian, so that everything of a scan is a prefix, and of a grid.
pub(super) fn grid_key(id: ScanId, grid: usize) -> Vec<u8> {
    [&id.0[..], &(grid as u16).to_be_bytes()].concat()
}

/// The direction of a column, seen from the pair under which it is kept.
#[derive(Clone, Copy)]
pub(super) enum Way {
    There,
    Back,
}

/// `first | way | second`.
///
/// All columns of a scan that joins lie together, since sled writes a page anew for each value that
/// is put into it later; and so do those of one direction, since it reads a page for each value.
pub(super) fn pair_key(first: &[u8], way: Way, second: &[u8]) -> Vec<u8> {
    [first, &[way as u8], second].concat()
}

pub(super) fn column_key(first: ScanId, way: Way, second: ScanId, grid: usize) -> Vec<u8> {
    let mut key = pair_key(&first.0, way, &second.0);
    key.extend((grid as u16).to_be_bytes());
    key
}
