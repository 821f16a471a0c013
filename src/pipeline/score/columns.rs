//! The distances between scans: computes them from stored tokens, keeps them in the store, and
//! reads them for a scoring.

use std::collections::BTreeMap;

use tracing::warn;

use crate::{
    domain::{
        GridName, PairDistances,
        error::{DeviceError, ScanError},
        scan::ScanId,
        window_scores::WindowDistances,
    },
    numeric::{
        scoring::{PairColumns, SearchReach},
        token::TokenGrid,
    },
    pipeline::{Shared, board::StageName},
    store::{Store, StoreError},
};

/// Number of scans per comparison if the device keeps their tokens.
const KEPT_BATCH: usize = 32;

/// Computes and stores the columns of one grid of a scan with others. The scans whose tokens the
/// device has are first. Then follow the others, whose tokens are read from the store. `goes_on` is
/// called before each pair or batch of pairs. Returns the number of pairs.
pub(crate) fn compare_grid(
    store: &Store,
    distances: &mut dyn PairDistances,
    reach: SearchReach,
    grid: usize,
    id: ScanId,
    others: &[ScanId],
    mut goes_on: impl FnMut() -> bool,
) -> Result<u64, ScanError> {
    let Some(own) = store.tokens(&id, grid)? else { return Ok(0) };
    // This is needed without any others, too: the device may have older tokens of the scan, made
    // with another brain mask.
    distances.keep(GridName { scan: id, grid }, &own)?;

    let mut comparison = Comparison { store, distances, reach, grid, id, own };
    let (mut n_pairs, mut to_read) = (0, Vec::new());
    for batch in others.chunks(KEPT_BATCH) {
        if !goes_on() {
            return Ok(n_pairs);
        }
        let missing = comparison.with_kept(batch)?;
        n_pairs += (batch.len() - missing.len()) as u64;
        to_read.extend(missing);
    }
    Ok(n_pairs + comparison.with_stored(&to_read, goes_on)?)
}

/// One grid of a scan that is compared with others.
struct Comparison<'a> {
    store: &'a Store,
    distances: &'a mut dyn PairDistances,
    reach: SearchReach,
    grid: usize,
    id: ScanId,
    own: TokenGrid,
}

impl Comparison<'_> {
    fn name(&self, scan: ScanId) -> GridName {
        GridName { scan, grid: self.grid }
    }

    /// Compares the scan with those whose tokens the device has. Returns the others.
    fn with_kept(&mut self, others: &[ScanId]) -> Result<Vec<ScanId>, ScanError> {
        let names: Vec<GridName> = others.iter().map(|&other| self.name(other)).collect();
        let found = self.distances.nearest_of_kept(self.name(self.id), &names, self.reach)?;
        let mut missing = Vec::new();
        for (&other, columns) in others.iter().zip(found) {
            match columns {
                Some(columns) => self.store.put_columns(self.id, other, self.grid, &columns)?,
                None => missing.push(other),
            }
        }
        Ok(missing)
    }

    /// Compares the scan with others whose tokens the store has. Returns the number of pairs.
    fn with_stored(
        &mut self,
        others: &[ScanId],
        mut goes_on: impl FnMut() -> bool,
    ) -> Result<u64, ScanError> {
        let (store, grid) = (self.store, self.grid);
        let read = |index: usize| -> Result<Option<TokenGrid>, StoreError> {
            others.get(index).map_or(Ok(None), |other| store.tokens(other, grid))
        };
        let mut n_pairs = 0;
        let mut theirs = read(0)?;
        for (index, &other) in others.iter().enumerate() {
            if !goes_on() {
                break;
            }
            let compute = || theirs.as_ref().map(|theirs| self.with(other, theirs)).transpose();
            let (done, next) = rayon::join(compute, || read(index + 1));
            n_pairs += u64::from(done?.is_some());
            theirs = next?;
        }
        Ok(n_pairs)
    }

    fn with(&mut self, other: ScanId, theirs: &TokenGrid) -> Result<(), ScanError> {
        let (own_name, name) = (self.name(self.id), self.name(other));
        self.distances.keep(name, theirs)?;
        let found = self.distances.nearest_of_kept(own_name, &[name], self.reach)?;
        let columns = match found.into_iter().next().flatten() {
            Some(columns) => columns,
            None => {
                // A device that ran out of memory may have dropped them.
                self.distances.keep(own_name, &self.own)?;
                self.distances.nearest(&self.own, theirs, self.reach)?
            }
        };
        Ok(self.store.put_columns(self.id, other, self.grid, &columns)?)
    }
}

/// Computes the columns of a scan with others that the store does not have yet. Ends early when
/// asked to stop, and the next start continues. Returns the number of pairs.
pub(super) fn compute_missing(
    shared: &Shared,
    distances: &mut dyn PairDistances,
    reach: SearchReach,
    id: ScanId,
    others: &[ScanId],
) -> Result<u64, ScanError> {
    let store = &shared.store;
    let goes_on = || {
        shared.board.heartbeat(StageName::Score);
        !shared.stopping()
    };
    let mut n_pairs = 0;
    for grid in 0..shared.method.n_grids() {
        let mut missing = Vec::new();
        for &other in others {
            if !goes_on() {
                return Ok(n_pairs);
            }
            if !store.has_columns(id, other, grid)? {
                missing.push(other);
            }
        }
        let done = compare_grid(store, distances, reach, grid, id, &missing, goes_on)?;
        // The grids of a scan are compared with the same others.
        n_pairs += if grid == 0 { done } else { 0 };
    }
    Ok(n_pairs)
}

/// Reads the columns from the store. Missing columns are computed.
pub(super) struct StoredColumns<'a> {
    pub(super) shared: &'a Shared,
    pub(super) distances: &'a mut dyn PairDistances,
    pub(super) reach: SearchReach,
    /// Number of tokens in each part of a layer.
    pub(super) n_tokens: BTreeMap<ScanId, Vec<usize>>,
}

impl StoredColumns<'_> {
    /// Number of tokens in one grid of a scan.
    fn n_tokens(&self, of: ScanId, grid: usize) -> usize {
        let parts = &self.n_tokens[&of];
        parts[grid % parts.len()]
    }

    fn tokens(&self, id: ScanId, grid: usize) -> Result<TokenGrid, StoreError> {
        let lost = || StoreError::Damaged { what: "tokens", scan: Some(id) };
        self.shared.store.tokens(&id, grid)?.ok_or_else(lost)
    }

    /// Computes the columns of two scans again.
    fn compute_again(&mut self, one: ScanId, other: ScanId, grid: usize) -> Result<(), ScanError> {
        let store = &self.shared.store;
        let (own, theirs) = (self.tokens(one, grid)?, self.tokens(other, grid)?);
        let columns = self.distances.nearest(&own, &theirs, self.reach)?;
        Ok(store.put_columns(one, other, grid, &columns)?)
    }
}

impl WindowDistances for StoredColumns<'_> {
    fn column(&mut self, of: ScanId, other: ScanId, grid: usize) -> Result<Vec<f32>, ScanError> {
        self.shared.board.heartbeat(StageName::Score);
        let (store, n_tokens) = (&self.shared.store, self.n_tokens(of, grid));
        if let Some(column) = store.column(of, other, grid, n_tokens)? {
            return Ok(column);
        }
        warn!(scan = %of, %other, grid, "distances are lost or damaged; computing them again");
        self.compute_again(of, other, grid)?;
        let lost = || StoreError::Damaged { what: "distances", scan: Some(of) };
        Ok(store.column(of, other, grid, n_tokens)?.ok_or_else(lost)?)
    }

    fn columns(
        &mut self,
        of: ScanId,
        others: &[ScanId],
        grid: usize,
    ) -> Result<Vec<Vec<f32>>, ScanError> {
        self.shared.board.heartbeat(StageName::Score);
        let stored = self.shared.store.columns(of, others, grid, self.n_tokens(of, grid))?;
        stored
            .into_iter()
            .zip(others)
            .map(|(column, &other)| column.map_or_else(|| self.column(of, other, grid), Ok))
            .collect()
    }

    fn column_without(
        &mut self,
        of: ScanId,
        other: ScanId,
        grid: usize,
        excluded: &[usize],
    ) -> Result<Vec<f32>, ScanError> {
        self.shared.board.heartbeat(StageName::Score);
        let own = self.tokens(of, grid)?;
        let theirs = self.tokens(other, grid)?.without(excluded);
        Ok(self.distances.nearest(&own, &theirs, self.reach)?.first_to_second)
    }
}

/// The columns of one grid of tokens with each of `others`, all of them in memory. A device that
/// keeps tokens gets those of each scan only once. For that, each scan must first be `own` and only
/// later be among `others`.
pub(crate) fn nearest_of_each(
    distances: &mut dyn PairDistances,
    reach: SearchReach,
    own: (GridName, &TokenGrid),
    others: &[(GridName, &TokenGrid)],
) -> Result<Vec<PairColumns>, DeviceError> {
    distances.keep(own.0, own.1)?;
    let names: Vec<GridName> = others.iter().map(|(name, _)| *name).collect();
    let kept = distances.nearest_of_kept(own.0, &names, reach)?;
    let pairs = kept.into_iter().zip(others);
    pairs
        .map(|(columns, (_, theirs))| {
            columns.map_or_else(|| distances.nearest(own.1, theirs, reach), Ok)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, num::NonZeroUsize};

    use half::f16;

    use super::*;
    use crate::{
        compute::cpu::CpuDistances,
        numeric::{geometry::Shape3, projection::Normal},
        store::MIN_MEMORY,
    };

    /// Keeps tokens like a GPU, and counts how many it received.
    #[derive(Default)]
    struct Keeping {
        cpu: CpuDistances,
        kept: HashMap<GridName, TokenGrid>,
        n_given: usize,
    }

    impl PairDistances for Keeping {
        fn nearest(
            &mut self,
            first: &TokenGrid,
            second: &TokenGrid,
            reach: SearchReach,
        ) -> Result<PairColumns, DeviceError> {
            self.cpu.nearest(first, second, reach)
        }

        fn keep(&mut self, name: GridName, tokens: &TokenGrid) -> Result<(), DeviceError> {
            self.n_given += 1;
            self.kept.insert(name, tokens.clone());
            Ok(())
        }

        fn nearest_of_kept(
            &mut self,
            name: GridName,
            others: &[GridName],
            reach: SearchReach,
        ) -> Result<Vec<Option<PairColumns>>, DeviceError> {
            let Self { cpu, kept, .. } = self;
            let pair = |other: &GridName| Some((kept.get(&name)?, kept.get(other)?));
            let columns = |other| pair(other).map(|(a, b)| cpu.nearest(a, b, reach)).transpose();
            others.iter().map(columns).collect()
        }
    }

    fn id(n: u8) -> ScanId {
        ScanId([n; 32])
    }

    fn store_of(folder: &std::path::Path, n_scans: u8) -> Store {
        let store = Store::open(&folder.join("store"), MIN_MEMORY).unwrap().store;
        for n in 0..n_scans {
            let cells: Vec<u32> = (0..125).filter(|cell| cell % 5 != u32::from(n) % 5).collect();
            let mut normal = Normal::new(u64::from(n));
            let features =
                (0..cells.len() * 24).map(|_| f16::from_f64(normal.next())).collect::<Vec<_>>();
            let tokens = TokenGrid::new(Shape3::cube(5), 24, cells, features).unwrap();
            store.put_tokens(id(n), "m", &[tokens], None).unwrap();
        }
        store
    }

    #[test]
    fn scans_in_memory_are_given_to_a_device_once_and_columns_are_the_same() {
        let reach = SearchReach::Patches(NonZeroUsize::MIN);
        let folder = tempfile::tempdir().unwrap();
        let store = store_of(folder.path(), 4);
        let tokens: Vec<TokenGrid> =
            (0..4).map(|n| store.tokens(&id(n), 0).unwrap().unwrap()).collect();
        let named = |n: u8| (GridName { scan: id(n), grid: 0 }, &tokens[usize::from(n)]);
        let (mut cpu, mut device) = (CpuDistances::new(), Keeping::default());
        for own in 0..4 {
            let others: Vec<_> = (0..own).map(named).collect();
            let found = nearest_of_each(&mut cpu, reach, named(own), &others).unwrap();
            assert_eq!(found.len(), usize::from(own));
            assert_eq!(nearest_of_each(&mut device, reach, named(own), &others).unwrap(), found);
        }
        assert_eq!(device.n_given, 4);
    }

    #[test]
    fn tokens_that_the_device_keeps_are_not_read_again_and_columns_are_the_same() {
        let reach = SearchReach::Patches(NonZeroUsize::MIN);
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let [plain, keeping] = folders.each_ref().map(|folder| store_of(folder.path(), 5));
        let (mut cpu, mut device) = (CpuDistances::new(), Keeping::default());
        for new in 1..5 {
            let others: Vec<ScanId> = (0..new).map(id).collect();
            let compare = |store: &Store, distances: &mut dyn PairDistances| {
                compare_grid(store, distances, reach, 0, id(new), &others, || true).unwrap()
            };
            assert_eq!(compare(&plain, &mut cpu), u64::from(new));
            assert_eq!(compare(&keeping, &mut device), u64::from(new));
            // The new scan's tokens, and at first the only other one's.
            assert_eq!(device.n_given, usize::from(new) + 1);
        }
        for (of, other) in (0..5).flat_map(|of| (0..5).map(move |other| (of, other))) {
            let column = |store: &Store| store.column(id(of), id(other), 0, 100).unwrap();
            assert_eq!(column(&plain), column(&keeping), "{of} {other}");
            assert_eq!(column(&plain).is_some(), of != other);
        }
    }

    #[test]
    fn a_comparison_that_is_asked_to_stop_says_how_far_it_came() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_of(folder.path(), 4);
        let others = [id(0), id(1), id(2)];
        let mut n_left = 3;
        let goes_on = || {
            n_left -= 1;
            n_left > 0
        };
        let reach = SearchReach::WholeVolume;
        let mut cpu = CpuDistances::new();
        // Asked once for the batch that the device might have, then before each pair.
        assert_eq!(compare_grid(&store, &mut cpu, reach, 0, id(3), &others, goes_on).unwrap(), 1);
        assert!(store.has_columns(id(3), id(0), 0).unwrap());
        assert!(!store.has_columns(id(3), id(1), 0).unwrap());
    }
}
