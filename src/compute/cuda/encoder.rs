//! The vision transformer on an NVIDIA GPU.

use std::sync::Arc;

use cudarc::{
    cublaslt::{Activation, CudaBlasLT, Matmul, MatmulConfig},
    driver::{
        CudaContext, CudaEvent, CudaFunction, CudaSlice, CudaStream, CudaView, CudaViewMut,
        DeviceRepr, HostSlice, LaunchConfig, PinnedHostSlice, PushKernelArg, ValidAsZeroBits,
    },
};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::{
    failure::Failure,
    module::{compile, threads},
    parts::{BatchPart, Extent, PART, parts, tables},
};
use crate::{
    compute::{EncoderOptions, position::resize_position_embedding},
    domain::{
        DeviceMemory, SliceEncoder,
        error::DeviceError,
        weights::{Architecture, BlockWeights, LinearWeights, NormWeights, VitWeights},
    },
    numeric::slice::{ImageBatch, PatchFeatures},
};

/// `NORM_THREADS` in `kernels.cu`.
const NORM_THREADS: u32 = 128;
/// `NORM_THREADS * NORM_MOST` in `kernels.cu`.
const MAX_CHANNELS: usize = 2048;
/// `ATTEND_WARPS` in `kernels.cu`, and the queries that each of them holds.
const ATTEND: (u32, usize) = (9, 16);

/// The number of rows of products is rounded up to a multiple of this. For each new number of rows,
/// cuBLASLt searches for a kernel, and with patches left out no two parts have the same number.
const ROW_STEP: usize = 128;

/// The number format that the GPU stores between the kernels: f16 or bf16.
pub trait Half: DeviceRepr + ValidAsZeroBits + Copy + Send + Sync + 'static {
    /// Macros for the compilation of `kernels.cu`.
    const DEFINES: &'static [&'static str];
    /// Rounds `from` into `to`, on all cores.
    fn convert(from: &[f32], to: &mut [Self]);
}

/// Values that one task converts.
const CHUNK: usize = 1 << 16;

impl Half for f16 {
    const DEFINES: &'static [&'static str] = &[];

    fn convert(from: &[f32], to: &mut [Self]) {
        let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
        chunks.for_each(|(to, from)| to.convert_from_f32_slice(from));
    }
}

impl Half for bf16 {
    const DEFINES: &'static [&'static str] = &["-DBF16"];

    fn convert(from: &[f32], to: &mut [Self]) {
        let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
        chunks.for_each(|(to, from)| to.convert_from_f32_slice(from));
    }
}

/// DINOv2 on one GPU, with products in `T`.
///
/// The features of an image do not depend on the other images of its batch, with one exception: for
/// another number of images, cuBLASLt may choose another kernel, which rounds differently.
pub struct CudaEncoder<T: Half>
where
    CudaBlasLT: Matmul<T>,
{
    architecture: Architecture,
    options: EncoderOptions,
    stream: Arc<CudaStream>,
    /// These streams copy images to the GPU, and features back, while the GPU computes others.
    inbound: Arc<CudaStream>,
    outbound: Arc<CudaStream>,
    blas: CudaBlasLT,
    kernels: Kernels,
    /// `[channels, width]`, each row padded with zeros.
    patch_embedding: Linear<T>,
    colours: usize,
    /// The image side in use, the class token with its position and then the registers, `[1 +
    /// registers, channels]`, and the positions of the patches.
    positions: Option<(usize, CudaSlice<f32>, CudaSlice<f32>)>,
    blocks: Vec<Block<T>>,
    norm: Norm,
    /// The weights from which the position embedding is made.
    host: HostWeights,
    workspace: Option<Workspace<T>>,
    results: Option<PinnedHostSlice<f32>>,
    name: String,
}

struct HostWeights {
    class_token: Vec<f32>,
    register_tokens: Vec<f32>,
    position_embedding: Vec<f32>,
}

struct Kernels {
    patches: CudaFunction,
    tokens: CudaFunction,
    add_norm: CudaFunction,
    features: CudaFunction,
    attention: CudaFunction,
}

struct Linear<T> {
    /// `[outputs, inputs]`
    weight: CudaSlice<T>,
    bias: CudaSlice<T>,
    outputs: usize,
    inputs: usize,
}

struct Norm {
    weight: CudaSlice<f32>,
    bias: CudaSlice<f32>,
}

struct Block<T> {
    norm1: Norm,
    qkv: Linear<T>,
    projection: Linear<T>,
    scale1: CudaSlice<f32>,
    norm2: Norm,
    fc1: Linear<T>,
    fc2: Linear<T>,
    scale2: CudaSlice<f32>,
}

/// Buffers for parts of a batch. Nothing is allocated while they are large enough.
struct Workspace<T> {
    side: usize,
    capacity: Extent,
    /// Two lanes, so that one part is copied while the GPU computes the other.
    lanes: [Lane<T>; 2],
    working: Working<T>,
}

/// The buffers of one part: its input from the host, and its features for the host.
struct Lane<T> {
    staging: PinnedHostSlice<T>,
    staging_tables: PinnedHostSlice<i32>,
    pixels: CudaSlice<T>,
    tables: CudaSlice<i32>,
    /// `[n_layers, n_means, channels]`.
    features: CudaSlice<f32>,
    /// The GPU has pixels and tables. So the host may fill the staging buffers again.
    has_come: CudaEvent,
    is_computed: CudaEvent,
    /// The host has the features. So the next part may start.
    is_done: CudaEvent,
}

/// All work that the GPU got. Its destructor also waits for that work. So even after a panic, the
/// GPU has finished before memory is freed.
struct Sent([Arc<CudaStream>; 3]);

impl Sent {
    fn wait(&self) -> Result<(), Failure> {
        let done = self.0.each_ref().map(|stream| stream.synchronize());
        Ok(done.into_iter().collect::<Result<(), _>>()?)
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        // The caller has already handled an error of this work.
        self.wait().ok();
    }
}

/// The extents of a part.
struct Shape {
    /// Pixels along each edge of an image.
    side: usize,
    extent: Extent,
    /// Images per group.
    group: usize,
    /// Most tokens of an image.
    longest: usize,
}

/// The buffers between the kernels.
struct Working<T> {
    tokens: CudaSlice<f32>,
    normed: CudaSlice<T>,
    branch: CudaSlice<T>,
    /// Query, key and value, or the hidden features, because the two are never needed at the same
    /// time. It also holds the patches before they are embedded.
    wide: CudaSlice<T>,
}

impl<T: Half> CudaEncoder<T>
where
    CudaBlasLT: Matmul<T>,
{
    /// Sets up the encoder on GPU number `index`. Logs and metrics call the GPU `name`.
    ///
    /// # Errors
    /// If the GPU is older than Ampere, the kernels do not compile, or the weights do not fit into
    /// its memory.
    pub fn new(
        weights: &VitWeights,
        options: &EncoderOptions,
        index: usize,
        name: &str,
    ) -> Result<Self, DeviceError> {
        Self::try_new(weights, options, index, name).map_err(|error| error.of_device(name, 0))
    }

    fn try_new(
        weights: &VitWeights,
        options: &EncoderOptions,
        index: usize,
        name: &str,
    ) -> Result<Self, Failure> {
        let architecture = weights.architecture;
        let context = CudaContext::new(index)?;
        // SAFETY: `stream` gets all work on memory that is allocated from here on. The lanes are
        // the exception; they have their own events. The host waits for all streams before it frees
        // memory ([`Sent`]).
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let (inbound, outbound) = (context.new_stream()?, context.new_stream()?);
        let kernels = Kernels::compile(&context, architecture, T::DEFINES)?;
        let upload = Upload { stream: &stream };
        let n_blocks = options.layers.last().copied().unwrap_or(0);
        let blocks = weights.blocks.iter().take(n_blocks);
        let patch_embedding = &weights.patch_embedding;
        let Architecture { channels, patch, .. } = architecture;
        let colours = weights.colours();
        let width = patch_width(colours, patch);
        Ok(Self {
            architecture,
            colours,
            options: options.clone(),
            blas: CudaBlasLT::new(stream.clone())?,
            kernels,
            patch_embedding: upload.linear(&padded(patch_embedding, channels, width))?,
            positions: None,
            blocks: blocks.map(|block| upload.block(block)).collect::<Result<_, _>>()?,
            norm: upload.norm(&weights.norm)?,
            host: HostWeights {
                class_token: weights.class_token.clone(),
                register_tokens: weights.register_tokens.clone(),
                position_embedding: weights.position_embedding.clone(),
            },
            workspace: None,
            results: None,
            name: name.to_owned(),
            stream,
            inbound,
            outbound,
        })
    }

    fn fit_positions(&mut self, side: usize) -> Result<(), Failure> {
        if self.positions.as_ref().is_some_and(|(known, ..)| *known == side) {
            return Ok(());
        }
        let Architecture { patch, position_side, channels, .. } = self.architecture;
        let host = &self.host;
        let resized = resize_position_embedding(
            &host.position_embedding,
            position_side,
            side / patch,
            channels,
            self.options.position,
        );
        let (class, patches) = resized.split_at(channels);
        let class = host.class_token.iter().zip(class).map(|(token, position)| token + position);
        let first: Vec<f32> = class.chain(host.register_tokens.iter().copied()).collect();
        let upload = Upload { stream: &self.stream };
        self.positions = Some((side, upload.single(&first)?, upload.single(patches)?));
        Ok(())
    }

    fn fit_workspace(&mut self, needed: Extent, side: usize) -> Result<(), Failure> {
        let needed = Extent { n_rows: needed.n_rows.next_multiple_of(ROW_STEP), ..needed };
        let known = self.workspace.as_ref().filter(|workspace| workspace.side == side);
        let known = known.map_or(Extent::default(), |workspace| workspace.capacity);
        let capacity = known.or(needed);
        if capacity == known {
            return Ok(());
        }
        // The old workspace is freed before the next one is made.
        self.workspace = None;
        self.sent().wait()?;
        self.workspace = Some(match self.allocate(capacity, side) {
            Err(error) if error.is_of_memory() => self.allocate(needed, side)?,
            made => made?,
        });
        Ok(())
    }

    fn allocate(&self, capacity: Extent, side: usize) -> Result<Workspace<T>, Failure> {
        let Architecture { channels, hidden, patch, .. } = self.architecture;
        let Extent { n_images, n_rows, n_means } = capacity;
        let n_features = self.options.layers.len() * n_means * channels;
        let width = hidden.max(3 * channels).max(patch_width(self.colours, patch));
        let n_pixels = n_images * self.colours * side * side;
        let n_entries = capacity.n_entries();
        let (stream, context) = (&self.stream, self.stream.context());
        // SAFETY: a kernel reads only values of these buffers that an earlier kernel wrote, and any
        // bits are a valid number.
        let lane = || unsafe {
            Ok::<_, Failure>(Lane {
                staging: context.alloc_pinned(n_pixels)?,
                staging_tables: context.alloc_pinned(n_entries)?,
                pixels: stream.alloc(n_pixels)?,
                tables: stream.alloc(n_entries)?,
                features: stream.alloc(n_features)?,
                has_come: context.new_event(None)?,
                is_computed: context.new_event(None)?,
                is_done: context.new_event(None)?,
            })
        };
        let lanes = [lane()?, lane()?];
        // SAFETY: as above.
        let working = unsafe {
            Working {
                tokens: stream.alloc(n_rows * channels)?,
                normed: stream.alloc(n_rows * channels)?,
                branch: stream.alloc(n_rows * channels)?,
                wide: stream.alloc(n_rows * width)?,
            }
        };
        // No other stream may use memory that is not allocated yet.
        stream.synchronize()?;
        Ok(Workspace { side, capacity, lanes, working })
    }

    fn sent(&self) -> Sent {
        Sent([&self.inbound, &self.stream, &self.outbound].map(Arc::clone))
    }

    /// Makes the buffer for the features of a batch. The GPU can write to this memory of the host
    /// directly.
    fn fit_results(&mut self, n_values: usize) -> Result<(), Failure> {
        if self.results.as_ref().is_none_or(|results| results.len() < n_values) {
            self.results = None;
            // cudarc's default is write-combined memory, which is slow to read. So this does not
            // use it. SAFETY: the GPU writes all values that are read, and any bits are a valid
            // number.
            self.results =
                Some(unsafe { self.stream.context().alloc_pinned_with_flags(n_values, 0)? });
        }
        Ok(())
    }

    /// Number of first tokens of an image: class token and registers.
    fn n_first(&self) -> usize {
        1 + self.architecture.registers
    }

    /// Number of patches of a whole image.
    fn n_patches(&self, side: usize) -> usize {
        (side / self.architecture.patch).pow(2)
    }

    /// The features at each layer. The batch is computed in parts. While the GPU computes one part,
    /// the host converts and sends the next.
    fn forward(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, Failure> {
        let side = images.side;
        let Architecture { patch, channels, .. } = self.architecture;
        if !side.is_multiple_of(patch) {
            return Err(Failure::Unfit(format!("side {side} is no multiple of the patch {patch}")));
        }
        assert_eq!(images.n_pixels(), self.colours * side * side, "the network's colours");
        let n_first = self.n_first();
        let parts = parts(images, n_first, PART * (n_first + self.n_patches(side)));
        let largest = parts.iter().fold(Extent::default(), |all, part| all.or(part.extent));
        let n_layers = self.options.layers.len();
        let per_layer = parts.iter().map(|part| part.extent.n_means).sum::<usize>() * channels;
        if per_layer == 0 {
            let empty = || PatchFeatures { channels, values: Vec::new() };
            return Ok((0..n_layers).map(|_| empty()).collect());
        }
        self.stream.context().bind_to_thread()?;
        self.fit_positions(side)?;
        self.fit_workspace(largest, side)?;
        self.fit_results(n_layers * per_layer)?;
        let mut workspace = self.workspace.take().expect("was just made to fit");
        let mut results = self.results.take().expect("was just made to fit");
        // Declared after the buffers that the GPU writes to, so that it is dropped before them.
        let all = self.sent();
        let sent = self.send_parts(&mut workspace, &mut results, images, &parts, per_layer);
        // This also waits after an error, because the GPU may still write to the buffers that are
        // put back here.
        let done = all.wait();
        drop(all);
        let values = results.as_slice().map(|all| copies(&all[..n_layers * per_layer], per_layer));
        self.workspace = Some(workspace);
        self.results = Some(results);
        sent?;
        done?;
        Ok(values?.into_iter().map(|values| PatchFeatures { channels, values }).collect())
    }

    /// Sends all work to the GPU. It is done when the stream is synchronised. `results` is
    /// `[n_layers, per_layer]`.
    fn send_parts(
        &self,
        workspace: &mut Workspace<T>,
        results: &mut PinnedHostSlice<f32>,
        images: &ImageBatch,
        parts: &[BatchPart],
        per_layer: usize,
    ) -> Result<(), Failure> {
        let per_group = images.group * images.n_pixels();
        let n_layers = self.options.layers.len();
        let results = &mut results.as_mut_slice()?[..n_layers * per_layer];
        let mut place = 0;
        let channels = self.architecture.channels;
        for (index, part) in parts.iter().enumerate() {
            let pixels = &images.pixels[part.groups.start * per_group..part.groups.end * per_group];
            let (entries, longest) =
                tables(images, part, self.n_first(), self.n_patches(images.side));
            let Workspace { side, lanes, working, .. } = &mut *workspace;
            let lane = &mut lanes[index % 2];
            lane.has_come.synchronize()?;
            let staged = &mut lane.staging.as_mut_slice()?[..pixels.len()];
            T::convert(pixels, staged);
            let staged_tables = &mut lane.staging_tables.as_mut_slice()?[..entries.len()];
            staged_tables.copy_from_slice(&entries);
            self.inbound.wait(&lane.is_done)?;
            self.inbound.memcpy_htod(staged, &mut lane.pixels)?;
            self.inbound.memcpy_htod(staged_tables, &mut lane.tables)?;
            lane.has_come.record(&self.inbound)?;

            self.stream.wait(&lane.has_come)?;
            let shape = Shape { side: *side, extent: part.extent, group: images.group, longest };
            self.run(lane, working, &shape)?;
            lane.is_computed.record(&self.stream)?;

            self.outbound.wait(&lane.is_computed)?;
            let n_features = part.extent.n_means * channels;
            for (layer, results) in results.chunks_exact_mut(per_layer).enumerate() {
                let from = lane.features.slice(layer * n_features..(layer + 1) * n_features);
                let to = &mut results[place..place + n_features];
                self.outbound.memcpy_dtoh(&from, to)?;
            }
            lane.is_done.record(&self.outbound)?;
            place += n_features;
        }
        Ok(())
    }

    /// Sends one part through the network, from the pixels of a lane to its features.
    fn run(
        &self,
        lane: &mut Lane<T>,
        working: &mut Working<T>,
        shape: &Shape,
    ) -> Result<(), Failure> {
        let Shape { extent, group, longest, .. } = *shape;
        let Extent { n_images, n_rows: rows, n_means } = extent;
        self.embed(lane, working, shape)?;
        let Lane { tables, features, .. } = lane;
        let n_features = n_means * self.architecture.channels;
        let Working { tokens, normed, branch, wide } = working;
        let Some(first) = self.blocks.first() else { return Ok(()) };
        let starts = tables.slice(2 * n_means + rows..extent.n_entries());
        let mut n_given = 0;
        self.add_norm(tokens, None, &first.norm1, normed, rows)?;
        for (index, block) in self.blocks.iter().enumerate() {
            self.product(&block.qkv, normed, wide, rows, None)?;
            self.attention(wide, &starts, normed, n_images, longest)?;
            self.product(&block.projection, normed, branch, rows, None)?;
            self.add_norm(tokens, Some((branch, &block.scale1)), &block.norm2, normed, rows)?;
            // This is the library's approximation of GELU. A separate pass with erf took a tenth of
            // the time.
            self.product(&block.fc1, normed, wide, rows, Some(Activation::Gelu))?;
            self.product(&block.fc2, wide, branch, rows, None)?;
            // The norm that follows belongs to the next block. After the last block, nothing reads
            // it.
            let next = self.blocks.get(index + 1).map_or(&self.norm, |next| &next.norm1);
            self.add_norm(tokens, Some((branch, &block.scale2)), next, normed, rows)?;
            if n_means > 0 && self.options.layers.contains(&(index + 1)) {
                let places = tables.slice(..2 * n_means);
                let mut out = features.slice_mut(n_given * n_features..(n_given + 1) * n_features);
                self.features(tokens, &places, &mut out, n_means, group)?;
                n_given += 1;
            }
        }
        Ok(())
    }

    fn embed(
        &self,
        lane: &Lane<T>,
        working: &mut Working<T>,
        shape: &Shape,
    ) -> Result<(), Failure> {
        let Architecture { channels, patch, .. } = self.architecture;
        let (_, first, positions) = self.positions.as_ref().expect("was made to fit before");
        let Lane { pixels, tables, .. } = lane;
        let Working { tokens, branch, wide, .. } = working;
        let Shape { side, extent: Extent { n_rows, n_means, .. }, .. } = *shape;
        let sources = tables.slice(2 * n_means..2 * n_means + n_rows);
        let width = patch_width(self.colours, patch);
        let n_patches = self.n_patches(side) as i32;
        let n_entries = (n_rows * width) as i64;
        let (side, patch, width) = (side as i32, patch as i32, width as i32);
        let colours = self.colours as i32;
        let mut launch = self.stream.launch_builder(&self.kernels.patches);
        launch.arg(pixels).arg(&sources).arg(&mut *wide).arg(&n_entries);
        launch.arg(&side).arg(&patch).arg(&width).arg(&colours);
        // SAFETY: the arguments are those of the kernel, the buffers hold what it reads and writes.
        unsafe { launch.launch(threads(n_entries as usize))? };
        self.product(&self.patch_embedding, wide, branch, n_rows, None)?;
        let n_entries = (n_rows * channels) as i64;
        let channels = channels as i32;
        let mut launch = self.stream.launch_builder(&self.kernels.tokens);
        launch.arg(&*branch).arg(&sources).arg(first).arg(positions).arg(&mut *tokens);
        launch.arg(&n_entries).arg(&n_patches).arg(&channels);
        // SAFETY: as above.
        unsafe { launch.launch(threads(n_entries as usize))? };
        Ok(())
    }

    /// `out = activation(input * weight^T + bias)`. `input` has `rows` rows; further rows are
    /// computed but never read.
    fn product(
        &self,
        layer: &Linear<T>,
        input: &CudaSlice<T>,
        out: &mut CudaSlice<T>,
        rows: usize,
        activation: Option<Activation>,
    ) -> Result<(), Failure> {
        let Linear { weight, bias, outputs, inputs } = layer;
        let rows = rows.next_multiple_of(ROW_STEP);
        assert!(input.len() >= rows * inputs && out.len() >= rows * outputs, "buffers too short");
        // cuBLASLt is column-major, so its matrices are the transposes of oddscan's.
        let shapes = MatmulConfig {
            transa: true,
            transb: false,
            transc: false,
            m: *outputs as u64,
            n: rows as u64,
            k: *inputs as u64,
            alpha: 1.0,
            lda: *inputs as i64,
            ldb: *inputs as i64,
            beta: 0.0,
            ldc: *outputs as i64,
            stride_a: None,
            stride_b: None,
            stride_c: None,
            stride_bias: None,
            batch_size: None,
        };
        let activation = activation.as_ref();
        // SAFETY: the assertions above show that the buffers are at least as long as the shapes
        // say.
        unsafe { self.blas.matmul(shapes, weight, input, out, Some(bias), activation)? };
        Ok(())
    }

    /// `tokens += scale * branch`, then the layer norm of `tokens` into `normed`.
    fn add_norm(
        &self,
        tokens: &mut CudaSlice<f32>,
        branch: Option<(&CudaSlice<T>, &CudaSlice<f32>)>,
        norm: &Norm,
        normed: &mut CudaSlice<T>,
        rows: usize,
    ) -> Result<(), Failure> {
        let channels = self.architecture.channels as i32;
        let has_branch = i32::from(branch.is_some());
        // Without a branch, the kernel does not read the two buffers that are passed in its place.
        let mut launch = self.stream.launch_builder(&self.kernels.add_norm);
        launch.arg(&mut *tokens);
        match branch {
            Some((branch, scale)) => launch.arg(branch).arg(scale),
            None => launch.arg(&norm.weight).arg(&norm.weight),
        };
        launch.arg(&norm.weight).arg(&norm.bias).arg(normed).arg(&channels).arg(&has_branch);
        // SAFETY: the arguments are those of the kernel, the buffers hold what it reads and writes.
        unsafe { launch.launch(blocks_of_norm_threads(rows))? };
        Ok(())
    }

    fn attention(
        &self,
        qkv: &CudaSlice<T>,
        starts: &CudaView<'_, i32>,
        out: &mut CudaSlice<T>,
        n_images: usize,
        longest: usize,
    ) -> Result<(), Failure> {
        let Architecture { channels, heads, .. } = self.architecture;
        let scale_log2 = std::f32::consts::LOG2_E / ((channels / heads) as f32).sqrt();
        let (warps, queries) = ATTEND;
        let tiles = longest.div_ceil(warps as usize * queries) as u32;
        let shape = LaunchConfig {
            grid_dim: (tiles, heads as u32, n_images as u32),
            block_dim: (32 * warps, 1, 1),
            shared_mem_bytes: 0,
        };
        let heads = heads as i32;
        let mut launch = self.stream.launch_builder(&self.kernels.attention);
        launch.arg(qkv).arg(starts).arg(out).arg(&heads).arg(&scale_log2);
        // SAFETY: the arguments are those of the kernel, the buffers hold what it reads and writes.
        unsafe { launch.launch(shape)? };
        Ok(())
    }

    fn features(
        &self,
        tokens: &CudaSlice<f32>,
        places: &CudaView<'_, i32>,
        out: &mut CudaViewMut<'_, f32>,
        n_means: usize,
        group: usize,
    ) -> Result<(), Failure> {
        let (channels, group) = (self.architecture.channels as i32, group as i32);
        let with_norm = i32::from(self.options.final_norm);
        let mut launch = self.stream.launch_builder(&self.kernels.features);
        launch.arg(tokens).arg(places).arg(&self.norm.weight).arg(&self.norm.bias).arg(out);
        launch.arg(&channels).arg(&with_norm).arg(&group);
        // SAFETY: the arguments are those of the kernel, the buffers hold what it reads and writes.
        unsafe { launch.launch(blocks_of_norm_threads(n_means))? };
        Ok(())
    }
}

/// Cuts a buffer into copies of `size` values. It uses all cores, because getting pages of new
/// memory is the slow part.
fn copies(all: &[f32], size: usize) -> Vec<Vec<f32>> {
    let copy = |layer: &[f32]| {
        let mut copy = vec![0.0; layer.len()];
        let chunks = copy.par_chunks_mut(1 << 18).zip(layer.par_chunks(1 << 18));
        chunks.for_each(|(to, from)| to.copy_from_slice(from));
        copy
    };
    all.chunks(size.max(1)).map(copy).collect()
}

/// Entries of a patch, rounded up so that cuBLASLt can read 16 bytes at a time.
fn patch_width(colours: usize, patch: usize) -> usize {
    (colours * patch * patch).next_multiple_of(8)
}

/// Each row of the weights padded with zeros to `width`.
fn padded(layer: &LinearWeights, outputs: usize, width: usize) -> LinearWeights {
    let inputs = layer.weight.len() / outputs;
    let mut weight = Vec::with_capacity(outputs * width);
    for row in layer.weight.chunks_exact(inputs) {
        weight.extend_from_slice(row);
        weight.resize(weight.len() + width - inputs, 0.0);
    }
    LinearWeights { weight, bias: layer.bias.clone() }
}

fn blocks_of_norm_threads(n: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (n as u32, 1, 1),
        block_dim: (NORM_THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

impl Kernels {
    fn compile(
        context: &Arc<CudaContext>,
        architecture: Architecture,
        defines: &[&str],
    ) -> Result<Self, Failure> {
        let Architecture { channels, heads, .. } = architecture;
        if channels > MAX_CHANNELS || !channels.is_multiple_of(8) {
            return Err(Failure::Unfit(format!(
                "found {channels} channels; needed a multiple of 8, at most {MAX_CHANNELS}"
            )));
        }
        let width = format!("-DWIDTH={}", channels / heads);
        let defines: Vec<String> = defines.iter().map(ToString::to_string).chain([width]).collect();
        let module = compile(context, include_str!("kernels.cu"), &defines)?;
        let function = |name| module.load_function(name);
        Ok(Self {
            patches: function("patches")?,
            tokens: function("tokens")?,
            add_norm: function("add_norm")?,
            features: function("features")?,
            attention: function("attention")?,
        })
    }
}

/// Copies weights to the GPU.
struct Upload<'a> {
    stream: &'a Arc<CudaStream>,
}

impl Upload<'_> {
    /// Copies values to the GPU and waits for the copy, so that the host may free the values
    /// afterwards.
    fn copy<V: DeviceRepr, H: HostSlice<V> + ?Sized>(
        &self,
        values: &H,
    ) -> Result<CudaSlice<V>, Failure> {
        let there = self.stream.clone_htod(values)?;
        self.stream.synchronize()?;
        Ok(there)
    }

    fn single(&self, values: &[f32]) -> Result<CudaSlice<f32>, Failure> {
        self.copy(values)
    }

    fn half<T: Half>(&self, values: &[f32]) -> Result<CudaSlice<T>, Failure> {
        // SAFETY: the whole buffer is written before it is read.
        let mut pinned = unsafe { self.stream.context().alloc_pinned(values.len())? };
        T::convert(values, pinned.as_mut_slice()?);
        self.copy(&pinned)
    }

    fn norm(&self, norm: &NormWeights) -> Result<Norm, Failure> {
        Ok(Norm { weight: self.single(&norm.weight)?, bias: self.single(&norm.bias)? })
    }

    fn linear<T: Half>(&self, layer: &LinearWeights) -> Result<Linear<T>, Failure> {
        let outputs = layer.bias.len();
        let inputs = layer.weight.len() / outputs;
        let (weight, bias) = (self.half(&layer.weight)?, self.half(&layer.bias)?);
        Ok(Linear { weight, bias, outputs, inputs })
    }

    fn block<T: Half>(&self, block: &BlockWeights) -> Result<Block<T>, Failure> {
        Ok(Block {
            norm1: self.norm(&block.norm1)?,
            qkv: self.linear(&block.qkv)?,
            projection: self.linear(&block.projection)?,
            scale1: self.single(&block.scale1)?,
            norm2: self.norm(&block.norm2)?,
            fc1: self.linear(&block.fc1)?,
            fc2: self.linear(&block.fc2)?,
            scale2: self.single(&block.scale2)?,
        })
    }
}

impl<T: Half> SliceEncoder for CudaEncoder<T>
where
    CudaBlasLT: Matmul<T>,
{
    fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError> {
        let batch = images.n_images();
        self.forward(images).map_err(|error| error.of_device(&self.name, batch))
    }

    fn patch(&self) -> usize {
        self.architecture.patch
    }

    fn channels(&self) -> usize {
        self.architecture.channels
    }

    fn device(&self) -> &str {
        &self.name
    }

    fn memory(&self) -> Option<DeviceMemory> {
        let (free, total) = self.stream.context().mem_get_info().ok()?;
        Some(DeviceMemory { used: total.saturating_sub(free) as u64, total: total as u64 })
    }

    fn is_async(&self) -> bool {
        true
    }
}
