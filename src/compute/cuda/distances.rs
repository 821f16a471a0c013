//! Finds the nearest tokens of other scans on an NVIDIA GPU, which keeps tokens for later pairs.
//!
//! Tensor cores compute the products in f16, the format of tokens, and sum them in f32. Distances
//! to the tokens found are computed from the differences in f32 (`nearest.cu`). If two tokens are
//! equally near, within the rounding of products in f32 (some 1e-6 of their squared lengths),
//! either may be chosen.

use std::{collections::HashMap, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig,
    PushKernelArg,
};
use half::f16;

use super::{
    failure::Failure,
    module::{THREADS, compile, threads},
};
use crate::{
    domain::{GridName, PairDistances, error::DeviceError},
    numeric::{
        scoring::{PairColumns, SearchReach},
        token::{TokenGrid, cells_per_patch},
    },
};

/// Tokens per side of a block's tile: `TILE` in `nearest.cu`.
const TILE: usize = 128;
/// Most cells along an axis that a place in `nearest.cu` can hold.
const MAX_CELLS: usize = 1024;
/// Pairs of scans that the GPU gets at once, enough to fill the largest GPUs.
const MAX_PAIRS: usize = 128;
/// Kept tokens may take `1 / SHARE_KEPT` of the GPU's free memory.
const SHARE_KEPT: usize = 4;

/// After the memory ran out, kept tokens may still take this many bytes. With less, tokens would be
/// sent again for each pair.
const LEAST_KEPT: usize = 64 << 20;

/// Nearest distances on one NVIDIA GPU, within reach or over the whole volume.
pub struct CudaDistances {
    gpu: Gpu,
    kept: Kept,
    name: String,
}

/// The GPU with its kernels and buffers.
struct Gpu {
    stream: Arc<CudaStream>,
    kernels: Kernels,
    /// The best candidates of both scans of each pair, scan after scan.
    candidates: CudaSlice<u64>,
    /// Distances, before they are copied to the host.
    found: CudaSlice<f32>,
}

struct Kernels {
    norms: CudaFunction,
    nearest: CudaFunction,
    distances: CudaFunction,
}

/// The tokens of one grid on the GPU.
struct OnGpu {
    /// `[n, width]`, f16.
    features: CudaSlice<f16>,
    norms: CudaSlice<f32>,
    places: CudaSlice<i32>,
    n: usize,
    /// Number of channels, padded with zeros to a multiple of 8.
    width: usize,
    /// Cells per patch along each axis.
    per_patch: [usize; 3],
}

impl OnGpu {
    fn n_bytes(&self) -> usize {
        self.n * (2 * self.width + 8)
    }
}

/// `tokens_t` in `nearest.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct DeviceTokens {
    features: u64,
    norms: u64,
    places: u64,
    n: i32,
    start: i32,
}

// SAFETY: the layout is exactly that which the kernels read.
unsafe impl DeviceRepr for DeviceTokens {}

/// Tokens that stay on the GPU while there is memory for them. Those that were used longest ago are
/// removed first.
struct Kept {
    grids: HashMap<GridName, (u64, OnGpu)>,
    n_uses: u64,
    n_bytes: usize,
    max_bytes: usize,
}

impl Kept {
    fn remove(&mut self, name: GridName) {
        if let Some((_, gone)) = self.grids.remove(&name) {
            self.n_bytes -= gone.n_bytes();
        }
    }

    fn put(&mut self, name: GridName, tokens: OnGpu) {
        self.remove(name);
        if tokens.n_bytes() > self.max_bytes {
            return;
        }
        self.n_bytes += tokens.n_bytes();
        self.n_uses += 1;
        self.grids.insert(name, (self.n_uses, tokens));
        while self.n_bytes > self.max_bytes {
            let oldest = self.grids.iter().min_by_key(|(_, (used, _))| *used);
            let Some((&oldest, _)) = oldest else { break };
            self.remove(oldest);
        }
    }

    fn touch(&mut self, name: GridName) {
        self.n_uses += 1;
        if let Some((used, _)) = self.grids.get_mut(&name) {
            *used = self.n_uses;
        }
    }

    /// Frees kept tokens after the GPU ran out of memory. Returns whether there were any.
    fn give_up(&mut self) -> bool {
        if self.grids.is_empty() {
            return false;
        }
        self.max_bytes = self.max_bytes.min((self.n_bytes / 2).max(LEAST_KEPT));
        self.grids.clear();
        self.n_bytes = 0;
        true
    }
}

impl CudaDistances {
    /// Sets up distances on GPU number `index`. Errors call the GPU `name`.
    ///
    /// # Errors
    /// If the GPU is older than Ampere, or the kernels do not compile.
    pub fn new(index: usize, name: &str) -> Result<Self, DeviceError> {
        Self::try_new(index, name).map_err(|error| error.of_device(name, 0))
    }

    fn try_new(index: usize, name: &str) -> Result<Self, Failure> {
        let context = CudaContext::new(index)?;
        // SAFETY: there is one stream, and the host waits for it before it frees memory.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let kernels = Kernels::compile(&context)?;
        let (n_free, _) = context.mem_get_info()?;
        let max_bytes = n_free / SHARE_KEPT;
        let kept = Kept { grids: HashMap::new(), n_uses: 0, n_bytes: 0, max_bytes };
        let (candidates, found) = (stream.alloc_zeros(1)?, stream.alloc_zeros(1)?);
        let gpu = Gpu { stream, kernels, candidates, found };
        Ok(Self { gpu, kept, name: name.to_owned() })
    }

    /// Runs `work`. If there is too little memory, it frees the kept tokens and runs `work` once
    /// more.
    fn with_room<R>(
        &mut self,
        batch: usize,
        mut work: impl FnMut(&mut Gpu, &Kept) -> Result<R, Failure>,
    ) -> Result<R, DeviceError> {
        let mut done = work(&mut self.gpu, &self.kept);
        if done.as_ref().is_err_and(Failure::is_of_memory) && self.kept.give_up() {
            // Freed memory is available when the GPU no longer uses it. The next call reports an
            // error of this one.
            self.gpu.stream.synchronize().ok();
            done = work(&mut self.gpu, &self.kept);
        }
        done.map_err(|error| error.of_device(&self.name, batch))
    }
}

impl Gpu {
    /// Copies a grid with at least one token to the GPU.
    fn upload(&self, grid: &TokenGrid) -> Result<OnGpu, Failure> {
        assert!(grid.shape().0.iter().all(|&cells| cells <= MAX_CELLS), "cells of a place");
        self.stream.context().bind_to_thread()?;
        let (n, channels) = (grid.n_tokens(), grid.channels());
        let width = channels.next_multiple_of(8);
        let features = if width == channels {
            self.stream.clone_htod(grid.features())?
        } else {
            let mut padded = vec![f16::ZERO; n * width];
            let rows = padded.chunks_exact_mut(width).zip(grid.features().chunks_exact(channels));
            rows.for_each(|(to, from)| to[..channels].copy_from_slice(from));
            self.stream.clone_htod(&padded)?
        };
        let place = |&cell: &u32| {
            let [x, y, z] = grid.shape().voxel(cell as usize);
            (x | y << 10 | z << 20) as i32
        };
        let places: Vec<i32> = grid.cells().iter().map(place).collect();
        let places = self.stream.clone_htod(&places)?;
        // SAFETY: the kernel writes all of it before it is read.
        let mut norms = unsafe { self.stream.alloc(n)? };
        let (n_tokens, n_channels) = (n as i32, width as i32);
        let mut launch = self.stream.launch_builder(&self.kernels.norms);
        launch.arg(&features).arg(&mut norms).arg(&n_tokens).arg(&n_channels);
        // SAFETY: the arguments are those of the kernel, the buffers hold what it reads and writes.
        unsafe { launch.launch(one_warp_each(n))? };
        // If the GPU reads the host's memory directly, the copies may not be complete when the call
        // returns.
        self.stream.synchronize()?;
        Ok(OnGpu { features, norms, places, n, width, per_patch: cells_per_patch(grid.shape()) })
    }

    /// Both directions of each pair of one grid with others, fetched at once.
    fn pairs(
        &mut self,
        first: &OnGpu,
        others: &[&OnGpu],
        reach: SearchReach,
    ) -> Result<Vec<PairColumns>, Failure> {
        self.stream.context().bind_to_thread()?;
        let (mut table, mut n_found, mut most) = (Vec::with_capacity(others.len()), 0, 0);
        for other in others {
            assert_eq!(first.width, other.width, "tokens of one method");
            table.push(self.tokens(other, n_found));
            n_found += first.n + other.n;
            most = most.max(other.n);
        }
        if n_found > self.found.len() {
            self.candidates = self.stream.alloc_zeros(n_found)?;
            self.found = self.stream.alloc_zeros(n_found)?;
        }
        self.search(first, &table, most, reach)?;
        let mut found = vec![0.0; n_found];
        self.stream.memcpy_dtoh(&self.found.slice(..n_found), &mut found)?;
        self.stream.synchronize()?;
        let mut left = &found[..];
        let mut column = |n: usize| {
            let (column, others) = left.split_at(n);
            left = others;
            column.to_vec()
        };
        let columns = |other: &&OnGpu| PairColumns {
            first_to_second: column(first.n),
            second_to_first: column(other.n),
        };
        Ok(others.iter().map(columns).collect())
    }

    /// The argument for kernels of this stream. It is valid only while the grid exists.
    fn tokens(&self, grid: &OnGpu, start: usize) -> DeviceTokens {
        DeviceTokens {
            features: grid.features.device_ptr(&self.stream).0,
            norms: grid.norms.device_ptr(&self.stream).0,
            places: grid.places.device_ptr(&self.stream).0,
            n: grid.n as i32,
            start: start as i32,
        }
    }

    /// Writes the distances of all pairs into `found`. The largest of `others` has `most` tokens.
    fn search(
        &mut self,
        first: &OnGpu,
        others: &[DeviceTokens],
        most: usize,
        reach: SearchReach,
    ) -> Result<(), Failure> {
        let own = self.tokens(first, 0);
        let Self { stream, kernels, candidates, found, .. } = self;
        let table = stream.clone_htod(others)?;
        stream.memset_zeros(candidates)?;
        let [x, y, z] = match reach {
            SearchReach::WholeVolume => [MAX_CELLS as i32; 3],
            SearchReach::Patches(n) => first.per_patch.map(|cells| (cells * n.get()) as i32),
        };
        let (width, n_pairs) = (first.width as i32, others.len() as u32);
        let tiles = |n: usize| n.div_ceil(TILE) as u32;
        let shape = LaunchConfig {
            grid_dim: (tiles(most), tiles(first.n), n_pairs),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut launch = stream.launch_builder(&kernels.nearest);
        launch.arg(&own).arg(&table).arg(&width).arg(&x).arg(&y).arg(&z).arg(&mut *candidates);
        // SAFETY: the arguments are those of the kernel, the buffers hold what it reads and writes.
        unsafe { launch.launch(shape)? };
        let per_pair = one_warp_each(first.n + most);
        let shape = LaunchConfig { grid_dim: (per_pair.grid_dim.0, n_pairs, 1), ..per_pair };
        let mut launch = stream.launch_builder(&kernels.distances);
        launch.arg(&own).arg(&table).arg(&width).arg(&*candidates).arg(found);
        // SAFETY: as above; a candidate is a token of the other scan or none.
        unsafe { launch.launch(shape)? };
        Ok(())
    }
}

impl PairDistances for CudaDistances {
    fn nearest(
        &mut self,
        first: &TokenGrid,
        second: &TokenGrid,
        reach: SearchReach,
    ) -> Result<PairColumns, DeviceError> {
        assert_eq!(first.channels(), second.channels(), "tokens of one method");
        assert_eq!(first.shape(), second.shape(), "tokens of one method");
        if first.n_tokens() == 0 || second.n_tokens() == 0 {
            return Ok(PairColumns::unmatched(first.n_tokens(), second.n_tokens()));
        }
        self.with_room(first.n_tokens(), |gpu, _| {
            let (first, second) = (gpu.upload(first)?, gpu.upload(second)?);
            let mut found = gpu.pairs(&first, &[&second], reach)?;
            Ok(found.pop().expect("one for each pair"))
        })
    }

    fn keep(&mut self, name: GridName, tokens: &TokenGrid) -> Result<(), DeviceError> {
        self.kept.remove(name);
        if tokens.n_tokens() == 0 {
            return Ok(());
        }
        match self.with_room(tokens.n_tokens(), |gpu, _| gpu.upload(tokens)) {
            Ok(tokens) => self.kept.put(name, tokens),
            Err(DeviceError::OutOfMemory { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn nearest_of_kept(
        &mut self,
        name: GridName,
        others: &[GridName],
        reach: SearchReach,
    ) -> Result<Vec<Option<PairColumns>>, DeviceError> {
        for &used in others.iter().chain([&name]) {
            self.kept.touch(used);
        }
        self.with_room(others.len(), |gpu, kept| {
            let on_gpu = |name: &GridName| kept.grids.get(name).map(|(_, tokens)| tokens);
            let Some(first) = on_gpu(&name) else {
                return Ok(others.iter().map(|_| None).collect());
            };
            let others: Vec<Option<&OnGpu>> = others.iter().map(on_gpu).collect();
            let held: Vec<&OnGpu> = others.iter().copied().flatten().collect();
            let mut found = Vec::with_capacity(held.len());
            for batch in held.chunks(MAX_PAIRS) {
                found.extend(gpu.pairs(first, batch, reach)?);
            }
            let mut found = found.into_iter();
            Ok(others.iter().map(|held| held.and_then(|_| found.next())).collect())
        })
    }
}

fn one_warp_each(n: usize) -> LaunchConfig {
    threads(32 * n)
}

impl Kernels {
    fn compile(context: &Arc<CudaContext>) -> Result<Self, Failure> {
        let module = compile(context, include_str!("nearest.cu"), &[])?;
        let function = |name| module.load_function(name);
        Ok(Self {
            norms: function("norms")?,
            nearest: function("nearest")?,
            distances: function("distances")?,
        })
    }
}
