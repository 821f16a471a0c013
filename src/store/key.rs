//! The keys of tokens and columns.

use crate::domain::scan::ScanId;

/// `id | grid`, big-endian. So all values of a scan share a prefix, and so do all values of a grid.
pub(super) fn grid_key(id: ScanId, grid: usize) -> Vec<u8> {
    [&id.0[..], &(grid as u16).to_be_bytes()].concat()
}

/// The direction of a column, as seen from the scan under which the pair is stored.
#[derive(Clone, Copy)]
pub(super) enum Way {
    There,
    Back,
}

/// `first | way | second`.
///
/// All columns of a new scan are stored together, because sled rewrites a page for each value that
/// is added to it later. Columns of one direction are together, too, because sled reads a page for
/// each value.
pub(super) fn pair_key(first: &[u8], way: Way, second: &[u8]) -> Vec<u8> {
    [first, &[way as u8], second].concat()
}

pub(super) fn column_key(first: ScanId, way: Way, second: ScanId, grid: usize) -> Vec<u8> {
    let mut key = pair_key(&first.0, way, &second.0);
    key.extend((grid as u16).to_be_bytes());
    key
}
