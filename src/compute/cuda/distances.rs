//! The nearest tokens of other scans on an NVIDIA GPU, which keeps the tokens that it has seen.
//!
//! Products are taken by the tensor cores in f16, which is the format of tokens, and summed in f32;
//! distances to the tokens found are taken from the differences in f32 (`nearest.cu`). Of two that
//! are as near to within the rounding of products in f32, some 1e-6 of their squared lengths,
//! either may be taken.

use std::{collections::HashMap, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, LaunchConfig, PushKernelArg,
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

/// Pairs per side of the tile of a block: `TILE` in `nearest.cu`.
const TILE: usize = 128;
/// Cells along an axis that a place in `nearest.cu` has room for.
const MAX_CELLS: usize = 1024;
/// Of the GPU's free memory, one in so many bytes may be taken by tokens that are kept.
const SHARE_KEPT: usize = 4;

/// After it ran out, as much may still be taken: with less, tokens would be sent anew for each
/// pair.
const LEAST_KEPT: usize = 64 << 20;

/// Distances on one GPU.
pub struct CudaDistances {
    gpu: Gpu,
    kept: Kept,
    name: String,
}

/// What computes them.
struct Gpu {
    stream: Arc<CudaStream>,
    kernels: Kernels,
    /// The best candidates of both scans of a pair, one after the other.
    candidates: CudaSlice<u64>,
    /// Distances on their way to the host.
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
    /// Channels, filled up with zeros to a multiple of 8.
    width: usize,
    /// Cells per patch along each axis.
    per_patch: [usize; 3],
}

impl OnGpu {
    fn n_bytes(&self) -> usize {
        self.n * (2 * self.width + 8)
    }
}

/// Tokens that stay on the GPU while there is room; those that were used longest ago go first.
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

    /// The GPU has too little memory for them and for what else is needed; whether there were any.
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
    /// Distances on the GPU number `index`, which is called `name` in errors.
    ///
    /// # Errors
    /// If the GPU is older than Ampere, or the kernels do not compile.
    pub fn new(index: usize, name: &str) -> Result<Self, DeviceError> {
        Self::try_new(index, name).map_err(|error| error.of_device(name, 0))
    }

    fn try_new(index: usize, name: &str) -> Result<Self, Failure> {
        let context = CudaContext::new(index)?;
        let stream = context.new_stream()?;
        let kernels = Kernels::compile(&context)?;
        let (n_free, _) = context.mem_get_info()?;
        let max_bytes = n_free / SHARE_KEPT;
        let kept = Kept { grids: HashMap::new(), n_uses: 0, n_bytes: 0, max_bytes };
        let (candidates, found) = (stream.alloc_zeros(1)?, stream.alloc_zeros(1)?);
        let gpu = Gpu { stream, kernels, candidates, found };
        Ok(Self { gpu, kept, name: name.to_owned() })
    }

    /// Runs `work`, and once more without the tokens that are kept where there is too little memory
    /// for both.
    fn with_room<R>(
        &mut self,
        batch: usize,
        mut work: impl FnMut(&mut Gpu, &Kept) -> Result<R, Failure>,
    ) -> Result<R, DeviceError> {
        let mut done = work(&mut self.gpu, &self.kept);
        if done.as_ref().is_err_and(Failure::is_of_memory) && self.kept.give_up() {
            // What was let go comes back when the GPU is done with it. An error shows in what
            // follows.
            self.gpu.stream.synchronize().ok();
            done = work(&mut self.gpu, &self.kept);
        }
        done.map_err(|error| error.of_device(&self.name, batch))
    }
}

impl Gpu {
    /// A grid with at least one token.
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
        // Where GPUs read the host's memory directly, copies may not be done when the call returns.
        self.stream.synchronize()?;
        Ok(OnGpu { features, norms, places, n, width, per_patch: cells_per_patch(grid.shape()) })
    }

    /// Both directions of each pair, given to the GPU one after the other and fetched at once.
    fn pairs(
        &mut self,
        pairs: &[(&OnGpu, &OnGpu)],
        reach: SearchReach,
    ) -> Result<Vec<PairColumns>, Failure> {
        let Some(most) = pairs.iter().map(|(a, b)| a.n + b.n).max() else {
            return Ok(Vec::new());
        };
        let all = pairs.iter().map(|(a, b)| a.n + b.n).sum();
        self.stream.context().bind_to_thread()?;
        if self.candidates.len() < most {
            self.candidates = self.stream.alloc_zeros(most)?;
        }
        if self.found.len() < all {
            self.found = self.stream.alloc_zeros(all)?;
        }
        let mut start = 0;
        for (first, second) in pairs {
            self.search(first, second, reach, start)?;
            start += first.n + second.n;
        }
        let mut found = vec![0.0; all];
        self.stream.memcpy_dtoh(&self.found.slice(..all), &mut found)?;
        self.stream.synchronize()?;
        let mut left = &found[..];
        let mut column = |n: usize| {
            let (column, others) = left.split_at(n);
            left = others;
            column.to_vec()
        };
        Ok(pairs
            .iter()
            .map(|(first, second)| PairColumns {
                first_to_second: column(first.n),
                second_to_first: column(second.n),
            })
            .collect())
    }

    /// Writes the distances of a pair into `found` from `start` on.
    fn search(
        &mut self,
        first: &OnGpu,
        second: &OnGpu,
        reach: SearchReach,
        start: usize,
    ) -> Result<(), Failure> {
        assert_eq!(first.width, second.width, "tokens of one method");
        let Self { stream, kernels, candidates, found, .. } = self;
        let mut candidates = candidates.slice_mut(..first.n + second.n);
        stream.memset_zeros(&mut candidates)?;
        let (mut of_first, mut of_second) = candidates.split_at_mut(first.n);
        let [n_first, n_second, width] = [first.n, second.n, first.width].map(|n| n as i32);
        let [x, y, z] = match reach {
            SearchReach::WholeVolume => [MAX_CELLS as i32; 3],
            SearchReach::Patches(n) => first.per_patch.map(|cells| (cells * n.get()) as i32),
        };
        let shape = LaunchConfig {
            grid_dim: (second.n.div_ceil(TILE) as u32, first.n.div_ceil(TILE) as u32, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut launch = stream.launch_builder(&kernels.nearest);
        launch.arg(&first.features).arg(&first.norms).arg(&first.places).arg(&n_first);
        launch.arg(&second.features).arg(&second.norms).arg(&second.places).arg(&n_second);
        launch.arg(&width).arg(&x).arg(&y).arg(&z).arg(&mut of_first).arg(&mut of_second);
        // SAFETY: the arguments are those of the kernel, the buffers hold what it reads and writes.
        unsafe { launch.launch(shape)? };
        let mut found = found.slice_mut(start..start + first.n + second.n);
        let (mut to_second, mut to_first) = found.split_at_mut(first.n);
        for (own, other, candidates, n, out) in [
            (first, second, &mut of_first, n_first, &mut to_second),
            (second, first, &mut of_second, n_second, &mut to_first),
        ] {
            let mut launch = stream.launch_builder(&kernels.distances);
            launch
                .arg(&own.features)
                .arg(&other.features)
                .arg(candidates)
                .arg(out)
                .arg(&n)
                .arg(&width);
            // SAFETY: as above; a candidate is a token of the other scan or none.
            unsafe { launch.launch(one_warp_each(own.n))? };
        }
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
            let mut found = gpu.pairs(&[(&first, &second)], reach)?;
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
            let pair = |other: &GridName| Some((on_gpu(&name)?, on_gpu(other)?));
            let pairs: Vec<Option<_>> = others.iter().map(pair).collect();
            let held: Vec<_> = pairs.iter().copied().flatten().collect();
            let mut found = gpu.pairs(&held, reach)?.into_iter();
            Ok(pairs.iter().map(|pair| pair.and_then(|_| found.next())).collect())
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
