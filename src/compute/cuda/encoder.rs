//! The vision transformer on an NVIDIA GPU.

use std::sync::Arc;

use cudarc::{
    cublaslt::{CudaBlasLT, Matmul, MatmulConfig, result::CublasError},
    driver::{
        CudaContext, CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, LaunchConfig,
        PinnedHostSlice, PushKernelArg, ValidAsZeroBits, sys::CUresult,
    },
    nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts},
};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use crate::{
    compute::{
        EncoderOptions,
        position::resize_position_embedding,
        weights::{Architecture, BlockWeights, LinearWeights, NormWeights, VitWeights},
    },
    domain::{SliceEncoder, error::DeviceError},
    numeric::slice::{ImageBatch, PatchFeatures},
};

/// Images that go through the network at a time: enough to fill the largest GPUs, few enough for a
/// ViT-L in 4 GB.
const PART: usize = 56;

/// Threads per block of the kernels that treat entries one by one.
const THREADS: u32 = 256;
/// `NORM_THREADS` in `kernels.cu`.
const NORM_THREADS: u32 = 128;
/// `NORM_THREADS * NORM_MOST` in `kernels.cu`.
const MAX_CHANNELS: usize = 2048;
/// `ATTEND_WARPS` in `kernels.cu`, and the queries that each of them holds.
const ATTEND: (u32, usize) = (9, 16);

/// What the GPU stores between the kernels: f16 or bf16.
pub trait Half: DeviceRepr + ValidAsZeroBits + Copy + Send + Sync + 'static {
    /// What `kernels.cu` is compiled with.
    const DEFINES: &'static [&'static str];
    /// Rounds `from` into `to`, on all cores.
    fn convert(from: &[f32], to: &mut [Self]);
}

/// Values per task of a conversion.
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
/// The features of an image do not depend on the other images of its batch, except that cuBLASLt may
/// choose another kernel for another number of images, which rounds differently.
pub struct CudaEncoder<T: Half>
where
    CudaBlasLT: Matmul<T>,
{
    architecture: Architecture,
    options: EncoderOptions,
    stream: Arc<CudaStream>,
    blas: CudaBlasLT,
    kernels: Kernels,
    /// `[channels, width]`, each row padded with zeros.
    patch_embedding: Linear<T>,
    colours: usize,
    /// Class token with its position, then registers: `[1 + registers, channels]`, for the image side
    /// in use, and the positions of the patches.
    positions: Option<(usize, CudaSlice<f32>, CudaSlice<f32>)>,
    blocks: Vec<Block<T>>,
    norm: Norm,
    /// What [`Positions`] are made from.
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
    gelu: CudaFunction,
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

/// Buffers for one part of a batch; nothing is allocated while its shape stays the same.
struct Workspace<T> {
    n_images: usize,
    side: usize,
    /// Two, so that one is filled while the other one travels.
    staging: [PinnedHostSlice<T>; 2],
    pixels: CudaSlice<T>,
    tokens: CudaSlice<f32>,
    normed: CudaSlice<T>,
    branch: CudaSlice<T>,
    /// Query, key and value, or the hidden features: the two are never needed at once. Also the
    /// patches before they are embedded.
    wide: CudaSlice<T>,
    features: CudaSlice<f32>,
}

/// What can go wrong on the GPU.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Driver(#[from] DriverError),
    #[error("cuBLASLt: {0}")]
    Blas(#[from] CublasError),
    #[error("NVRTC: {0:?}")]
    Compiler(CompileError),
    #[error("{0}")]
    Unfit(String),
}

impl Failure {
    fn of_device(self, device: &str, batch: usize) -> DeviceError {
        match self {
            Self::Driver(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                DeviceError::OutOfMemory { batch }
            }
            other => DeviceError::Failed { device: device.to_owned(), message: other.to_string() },
        }
    }
}

impl<T: Half> CudaEncoder<T>
where
    CudaBlasLT: Matmul<T>,
{
    /// The encoder on the GPU number `index`, which is called `name` in logs and metrics.
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
        let stream = context.new_stream()?;
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
        let stream = &self.stream;
        self.positions = Some((side, stream.clone_htod(&first)?, stream.clone_htod(patches)?));
        Ok(())
    }

    fn fit_workspace(&mut self, n_images: usize, side: usize) -> Result<(), Failure> {
        let fits = |w: &Workspace<T>| w.side == side && w.n_images == n_images;
        if self.workspace.as_ref().is_some_and(fits) {
            return Ok(());
        }
        // Freed before the next one is made.
        self.workspace = None;
        let Architecture { channels, hidden, patch, .. } = self.architecture;
        let n_patches = n_images * (side / patch).pow(2);
        let rows = n_images * self.n_tokens(side);
        let widest =
            (rows * hidden.max(3 * channels)).max(n_patches * patch_width(self.colours, patch));
        let n_pixels = n_images * self.colours * side * side;
        let (stream, context) = (&self.stream, self.stream.context());
        // SAFETY: every kernel writes what a later one reads of these buffers, and any bits are a number.
        self.workspace = Some(unsafe {
            Workspace {
                n_images,
                side,
                staging: [context.alloc_pinned(n_pixels)?, context.alloc_pinned(n_pixels)?],
                pixels: stream.alloc(n_pixels)?,
                tokens: stream.alloc(rows * channels)?,
                normed: stream.alloc(rows * channels)?,
                branch: stream.alloc(rows * channels)?,
                wide: stream.alloc(widest)?,
                features: stream.alloc(n_patches * channels)?,
            }
        });
        Ok(())
    }

    /// The features of a batch, on their way from the GPU, in memory that it can write to by itself.
    fn fit_results(&mut self, n_values: usize) -> Result<(), Failure> {
        if self.results.as_ref().is_none_or(|results| results.len() < n_values) {
            self.results = None;
            // Not write-combined, as is cudarc's default: that memory is slow to read.
            // SAFETY: the GPU writes what is read, and any bits are a number.
            self.results =
                Some(unsafe { self.stream.context().alloc_pinned_with_flags(n_values, 0)? });
        }
        Ok(())
    }

    /// Class token, registers and patches of an image.
    fn n_tokens(&self, side: usize) -> usize {
        1 + self.architecture.registers + (side / self.architecture.patch).pow(2)
    }

    /// The mean features over each `group` consecutive images. The batch goes through in parts: while the
    /// GPU works on one, the next is converted and sent.
    fn forward(
        &mut self,
        images: &ImageBatch,
        group: usize,
    ) -> Result<Vec<PatchFeatures>, Failure> {
        let &ImageBatch { n_images, side, ref pixels } = images;
        let Architecture { patch, channels, .. } = self.architecture;
        if side % patch != 0 {
            return Err(Failure::Unfit(format!("side {side} is no multiple of the patch {patch}")));
        }
        let n_pixels = self.colours * side * side;
        assert_eq!(pixels.len(), n_images * n_pixels, "images of the network's colours");
        let part = (PART / group * group).clamp(group, n_images);
        let n_patches = (side / patch).pow(2);
        let n_layers = self.options.layers.len();
        let per_layer = n_images / group * n_patches * channels;
        self.stream.context().bind_to_thread()?;
        self.fit_positions(side)?;
        self.fit_workspace(part, side)?;
        self.fit_results(n_layers * per_layer)?;
        let mut workspace = self.workspace.take().expect("was just made to fit");
        let mut results = self.results.take().expect("was just made to fit");
        let sent = self.send_parts(&mut workspace, &mut results, images, group, per_layer);
        // Also after an error: the GPU may still write into what is put back here.
        let done = self.stream.synchronize();
        let values = results.as_slice().map(|all| copies(&all[..n_layers * per_layer], per_layer));
        self.workspace = Some(workspace);
        self.results = Some(results);
        sent?;
        done?;
        let layers = values?.into_iter().map(|values| PatchFeatures {
            n_images: n_images / group,
            n_patches,
            channels,
            values,
        });
        Ok(layers.collect())
    }

    /// Gives all the work to the GPU, which is done once the stream is synchronised. `results` is
    /// `[n_layers, n_images / group, n_patches, channels]`.
    fn send_parts(
        &self,
        workspace: &mut Workspace<T>,
        results: &mut PinnedHostSlice<f32>,
        images: &ImageBatch,
        group: usize,
        per_layer: usize,
    ) -> Result<(), Failure> {
        let n_pixels = self.colours * images.side * images.side;
        let results = results.as_mut_slice()?;
        let mut start = 0;
        for (index, pixels) in images.pixels.chunks(workspace.n_images * n_pixels).enumerate() {
            let n_images = pixels.len() / n_pixels;
            let staging = &mut workspace.staging[index % 2];
            T::convert(pixels, &mut staging.as_mut_slice()?[..pixels.len()]);
            self.stream.memcpy_htod(staging, &mut workspace.pixels)?;
            let place = (start, per_layer);
            start += self.run(workspace, n_images, group, images.side, results, place)?;
        }
        Ok(())
    }

    /// One part through the network; its features go to `results` from `place` on: the offset within a
    /// layer, and the offset of each next layer. Returns how many there are per layer.
    fn run(
        &self,
        workspace: &mut Workspace<T>,
        n_images: usize,
        group: usize,
        side: usize,
        results: &mut [f32],
        (mut place, per_layer): (usize, usize),
    ) -> Result<usize, Failure> {
        let heads = self.architecture.heads;
        let rows = n_images * self.n_tokens(side);
        self.embed(workspace, n_images, side)?;
        let Workspace { tokens, normed, branch, wide, features, .. } = workspace;
        let Some(first) = self.blocks.first() else { return Ok(0) };
        let mut n_values = 0;
        self.add_norm(tokens, None, &first.norm1, normed, rows)?;
        for (index, block) in self.blocks.iter().enumerate() {
            self.product(&block.qkv, normed, wide, rows)?;
            self.attention(wide, normed, n_images, rows / n_images, heads)?;
            self.product(&block.projection, normed, branch, rows)?;
            self.add_norm(tokens, Some((branch, &block.scale1)), &block.norm2, normed, rows)?;
            self.product(&block.fc1, normed, wide, rows)?;
            self.gelu(wide, rows * block.fc1.outputs)?;
            self.product(&block.fc2, wide, branch, rows)?;
            // The norm that follows is the next block's; after the last nobody reads it.
            let next = self.blocks.get(index + 1).map_or(&self.norm, |next| &next.norm1);
            self.add_norm(tokens, Some((branch, &block.scale2)), next, normed, rows)?;
            if self.options.layers.contains(&(index + 1)) {
                n_values = self.features(tokens, features, n_images / group, group, side)?;
                let to = &mut results[place..place + n_values];
                self.stream.memcpy_dtoh(&features.slice(..n_values), to)?;
                place += per_layer;
            }
        }
        Ok(n_values)
    }

    fn embed(
        &self,
        workspace: &mut Workspace<T>,
        n_images: usize,
        side: usize,
    ) -> Result<(), Failure> {
        let Architecture { channels, patch, registers, .. } = self.architecture;
        let (_, first, positions) = self.positions.as_ref().expect("was made to fit before");
        let Workspace { pixels, tokens, branch, wide, .. } = workspace;
        let (n_tokens, n_first) = (self.n_tokens(side), 1 + registers);
        let width = patch_width(self.colours, patch);
        let n_patches = n_images * (n_tokens - n_first);
        let n_entries = (n_patches * width) as i64;
        let (side, patch, width) = (side as i32, patch as i32, width as i32);
        let colours = self.colours as i32;
        let mut launch = self.stream.launch_builder(&self.kernels.patches);
        launch.arg(&*pixels).arg(&mut *wide).arg(&n_entries);
        launch.arg(&side).arg(&patch).arg(&width).arg(&colours);
        // SAFETY: the arguments are those of the kernel, the buffers hold what it reads and writes.
        unsafe { launch.launch(one_thread_each(n_entries))? };
        self.product(&self.patch_embedding, wide, branch, n_patches)?;
        let n_entries = (n_images * n_tokens * channels) as i64;
        let (n_tokens, n_first, channels) = (n_tokens as i32, n_first as i32, channels as i32);
        let mut launch = self.stream.launch_builder(&self.kernels.tokens);
        launch.arg(&*branch).arg(first).arg(positions).arg(&mut *tokens);
        launch.arg(&n_entries).arg(&n_tokens).arg(&n_first).arg(&channels);
        // SAFETY: as above.
        unsafe { launch.launch(one_thread_each(n_entries))? };
        Ok(())
    }

    /// `out = input * weight^T + bias`, `input` with `rows` rows.
    fn product(
        &self,
        layer: &Linear<T>,
        input: &CudaSlice<T>,
        out: &mut CudaSlice<T>,
        rows: usize,
    ) -> Result<(), Failure> {
        let Linear { weight, bias, outputs, inputs } = layer;
        assert!(input.len() >= rows * inputs && out.len() >= rows * outputs, "buffers too short");
        // cuBLASLt counts columns first: its matrices are the transposes of ours.
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
        // SAFETY: the buffers are at least as long as the shapes say, as was just asserted.
        unsafe { self.blas.matmul(shapes, weight, input, out, Some(bias), None)? };
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
        // Without a branch the kernel reads neither of the two that stand for it here.
        let mut launch = self.stream.launch_builder(&self.kernels.add_norm);
        launch.arg(&mut *tokens);
        match branch {
            Some((branch, scale)) => launch.arg(branch).arg(scale),
            None => launch.arg(&norm.weight).arg(&norm.weight),
        };
        launch.arg(&norm.weight).arg(&norm.bias).arg(normed).arg(&channels).arg(&has_branch);
        // SAFETY: the arguments are those of the kernel, the buffers hold what it reads and writes.
        unsafe { launch.launch(blocks_of_norm_threads(rows, 1))? };
        Ok(())
    }

    fn attention(
        &self,
        qkv: &CudaSlice<T>,
        out: &mut CudaSlice<T>,
        n_images: usize,
        n_tokens: usize,
        heads: usize,
    ) -> Result<(), Failure> {
        let width = self.architecture.channels / heads;
        let scale_log2 = std::f32::consts::LOG2_E / (width as f32).sqrt();
        let (warps, queries) = ATTEND;
        let tiles = n_tokens.div_ceil(warps as usize * queries) as u32;
        let shape = LaunchConfig {
            grid_dim: (tiles, heads as u32, n_images as u32),
            block_dim: (32 * warps, 1, 1),
            shared_mem_bytes: 0,
        };
        let (n_tokens, heads) = (n_tokens as i32, heads as i32);
        let mut launch = self.stream.launch_builder(&self.kernels.attention);
        launch.arg(qkv).arg(out).arg(&n_tokens).arg(&heads).arg(&scale_log2);
        // SAFETY: the arguments are those of the kernel, the buffers hold what it reads and writes.
        unsafe { launch.launch(shape)? };
        Ok(())
    }

    fn gelu(&self, values: &mut CudaSlice<T>, n_values: usize) -> Result<(), Failure> {
        let n_eights = (n_values / 8) as i64;
        let mut launch = self.stream.launch_builder(&self.kernels.gelu);
        launch.arg(values).arg(&n_eights);
        // SAFETY: the arguments are those of the kernel; widths are multiples of eight.
        unsafe { launch.launch(one_thread_each(n_eights))? };
        Ok(())
    }

    /// Returns how many features it wrote.
    fn features(
        &self,
        tokens: &CudaSlice<f32>,
        out: &mut CudaSlice<f32>,
        n_groups: usize,
        group: usize,
        side: usize,
    ) -> Result<usize, Failure> {
        let Architecture { channels, registers, .. } = self.architecture;
        let n_patches = self.n_tokens(side) - 1 - registers;
        let [n_tokens, n_first, width, n_pooled] =
            [self.n_tokens(side), 1 + registers, channels, group].map(|n| n as i32);
        let with_norm = i32::from(self.options.final_norm);
        let mut launch = self.stream.launch_builder(&self.kernels.features);
        launch.arg(tokens).arg(&self.norm.weight).arg(&self.norm.bias).arg(out);
        launch.arg(&n_tokens).arg(&n_first).arg(&width).arg(&with_norm).arg(&n_pooled);
        // SAFETY: the arguments are those of the kernel, the buffers hold what it reads and writes.
        unsafe { launch.launch(blocks_of_norm_threads(n_patches, n_groups))? };
        Ok(n_groups * n_patches * channels)
    }
}

/// Cuts a buffer into copies of `size`, on all cores: pages of new memory are the slow part.
fn copies(all: &[f32], size: usize) -> Vec<Vec<f32>> {
    let copy = |layer: &[f32]| {
        let mut copy = vec![0.0; layer.len()];
        let chunks = copy.par_chunks_mut(1 << 18).zip(layer.par_chunks(1 << 18));
        chunks.for_each(|(to, from)| to.copy_from_slice(from));
        copy
    };
    all.chunks(size.max(1)).map(copy).collect()
}

/// Entries of a patch, rounded up so that cuBLASLt may read 16 bytes at a time.
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

fn one_thread_each(n_entries: i64) -> LaunchConfig {
    let blocks = (n_entries as u64).div_ceil(u64::from(THREADS)) as u32;
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 }
}

fn blocks_of_norm_threads(x: usize, y: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x as u32, y as u32, 1),
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
        let (major, minor) = context.compute_capability()?;
        if major < 8 {
            return Err(Failure::Unfit(format!(
                "found compute capability {major}.{minor}; needed 8.0; set encoder.precision = \"f32\""
            )));
        }
        let Architecture { channels, heads, .. } = architecture;
        if channels > MAX_CHANNELS || !channels.is_multiple_of(8) {
            return Err(Failure::Unfit(format!(
                "found {channels} channels; needed a multiple of 8, at most {MAX_CHANNELS}"
            )));
        }
        let mut options = vec![
            format!("--gpu-architecture=compute_{major}{minor}"),
            format!("-DWIDTH={}", channels / heads),
        ];
        options.extend(defines.iter().map(ToString::to_string));
        let options = CompileOptions { options, ..CompileOptions::default() };
        let compiled = compile_ptx_with_opts(include_str!("kernels.cu"), options)
            .map_err(Failure::Compiler)?;
        let module = context.load_module(compiled)?;
        let function = |name| module.load_function(name);
        Ok(Self {
            patches: function("patches")?,
            tokens: function("tokens")?,
            add_norm: function("add_norm")?,
            features: function("features")?,
            gelu: function("gelu")?,
            attention: function("attention")?,
        })
    }
}

/// Weights to the GPU.
struct Upload<'a> {
    stream: &'a Arc<CudaStream>,
}

impl Upload<'_> {
    fn single(&self, values: &[f32]) -> Result<CudaSlice<f32>, Failure> {
        Ok(self.stream.clone_htod(values)?)
    }

    fn half<T: Half>(&self, values: &[f32]) -> Result<CudaSlice<T>, Failure> {
        // SAFETY: all of it is written before it is read.
        let mut pinned = unsafe { self.stream.context().alloc_pinned(values.len())? };
        T::convert(values, pinned.as_mut_slice()?);
        Ok(self.stream.clone_htod(&pinned)?)
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
        self.encode_pooled(images, 1)
    }

    fn encode_pooled(
        &mut self,
        images: &ImageBatch,
        group: usize,
    ) -> Result<Vec<PatchFeatures>, DeviceError> {
        assert!(group > 0 && images.n_images.is_multiple_of(group), "whole groups");
        self.forward(images, group).map_err(|error| error.of_device(&self.name, images.n_images))
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
}
