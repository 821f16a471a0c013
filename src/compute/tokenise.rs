//! Makes the tokens of a canonical volume with an encoder.

use std::{
    mem,
    ops::ControlFlow,
    panic::resume_unwind,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rayon::prelude::*;
use thiserror::Error;

use crate::{
    domain::{DeviceMemory, SliceEncoder, error::DeviceError},
    numeric::{
        projection::Projection,
        slice::{ImageBatch, PatchFeatures, slice_pixels},
        token::{SliceGroup, TokenBuilder, TokenGrid, TokenGridError, TokenSettings},
        volume::Volume,
    },
};

/// Progress of the slices of one scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Slices encoded so far.
    pub done: usize,
    /// All slices of the scan.
    pub all: usize,
    /// Slices of the last batch.
    pub batch: usize,
    /// Time that the device took for the last batch.
    pub took: Duration,
}

/// Why a scan has no tokens.
#[derive(Debug, Error)]
pub enum TokeniseError {
    /// The device failed, even with a batch of one slice.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The caller asked to stop.
    #[error("stopped before the scan was encoded")]
    Stopped,
    /// The encoder returned features that are not finite.
    #[error(transparent)]
    Features(#[from] TokenGridError),
}

/// The encoder, and the steps that turn its features into tokens. There is one per device.
pub struct Tokeniser {
    encoder: Box<dyn SliceEncoder>,
    plan: Arc<Plan>,
}

/// The work of the processor for the encoder: it cuts out slices before, and makes tokens from
/// features afterwards.
pub struct Plan {
    projection: Option<Projection>,
    settings: TokenSettings,
    n_layers: usize,
    patch: usize,
    channels: usize,
    /// Slices per batch. The number falls when the device runs out of memory.
    max_batch: AtomicUsize,
    /// Buffers for the pixels of batches. They are kept, because to get new memory takes longer
    /// than to fill it.
    rooms: Mutex<Vec<Vec<f32>>>,
}

/// A volume whose first slices are ready for the encoder.
pub struct StartedVolume<'p> {
    builder: TokenBuilder<'p>,
    groups: Vec<SliceGroup>,
    images: ImageBatch,
}

/// A volume whose slices have all been encoded.
pub struct EncodedVolume<'p> {
    builder: TokenBuilder<'p>,
    last: Option<Encoded>,
}

/// A batch that went through the encoder.
struct Encoded {
    groups: Vec<SliceGroup>,
    /// Patches of each group.
    patches: Vec<Vec<u32>>,
    layers: Vec<PatchFeatures>,
}

impl Encoded {
    fn add_to(self, builder: &mut TokenBuilder<'_>) {
        for (layer, PatchFeatures { channels, values }) in self.layers.iter().enumerate() {
            let mut features = &values[..];
            for (&group, patches) in self.groups.iter().zip(&self.patches) {
                let (own, others) = features.split_at(patches.len() * channels);
                builder.add(group, layer, patches, own);
                features = others;
            }
        }
    }
}

impl Plan {
    /// Cuts out the first slices of a volume.
    pub fn start(&self, volume: &Volume) -> StartedVolume<'_> {
        let Self { projection, settings, n_layers, patch, channels, .. } = self;
        let builder =
            TokenBuilder::new(volume, *patch, *channels, *n_layers, projection.as_ref(), settings);
        let groups = builder.due_groups();
        let images = self.first_images(volume, &builder, &groups);
        StartedVolume { builder, groups, images }
    }

    /// The slices of the groups that go to the device at once.
    fn first_images(
        &self,
        volume: &Volume,
        builder: &TokenBuilder<'_>,
        groups: &[SliceGroup],
    ) -> ImageBatch {
        let room = self.rooms.lock().expect("no holder of the lock can panic").pop();
        let first = first_of(groups, slices_per_group(builder, groups), self.max_batch());
        images_of(volume, builder, first, room.unwrap_or_default())
    }

    fn keep_room(&self, images: ImageBatch) {
        self.rooms.lock().expect("no holder of the lock can panic").push(images.pixels);
    }

    fn max_batch(&self) -> usize {
        self.max_batch.load(Ordering::Relaxed)
    }
}

impl EncodedVolume<'_> {
    /// The tokens, layer by layer. A layer has one grid per view, or one for all views.
    pub fn into_tokens(mut self) -> Result<Vec<TokenGrid>, TokeniseError> {
        if let Some(last) = self.last {
            last.add_to(&mut self.builder);
        }
        Ok(self.builder.finish()?)
    }
}

impl Tokeniser {
    /// Encodes `max_batch` slices at a time, or fewer after the device has run out of memory.
    pub fn new(
        encoder: Box<dyn SliceEncoder>,
        projection: Option<Projection>,
        settings: TokenSettings,
        n_layers: usize,
        max_batch: usize,
    ) -> Self {
        let (patch, channels) = (encoder.patch(), encoder.channels());
        let (max_batch, rooms) = (max_batch.into(), Mutex::default());
        let plan = Plan { projection, settings, n_layers, patch, channels, max_batch, rooms };
        Self { encoder, plan: Arc::new(plan) }
    }

    /// The encoder's device in words.
    pub fn device(&self) -> &str {
        self.encoder.device()
    }

    /// Used and total memory of the device; `None` if it has no memory of its own.
    pub fn memory(&self) -> Option<DeviceMemory> {
        self.encoder.memory()
    }

    /// See [`SliceEncoder::is_async`].
    pub fn is_async(&self) -> bool {
        self.encoder.is_async()
    }

    /// Slices per batch now in use.
    pub fn max_batch(&self) -> usize {
        self.plan.max_batch()
    }

    /// The steps before the encoder. They can run for the next volume while the encoder works.
    pub fn plan(&self) -> Arc<Plan> {
        Arc::clone(&self.plan)
    }

    /// Encodes a volume. Returns its tokens layer by layer; a layer has one grid per view, or one
    /// for all views. `progress` is called after each batch and may ask to stop.
    pub fn tokens(
        &mut self,
        volume: &Volume,
        progress: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Vec<TokenGrid>, TokeniseError> {
        let plan = self.plan();
        self.encode(volume, plan.start(volume), progress)?.into_tokens()
    }

    /// Encodes the slices of a volume. `progress` is called after each batch and may ask to stop.
    pub fn encode<'p>(
        &mut self,
        volume: &Volume,
        StartedVolume { mut builder, groups, mut images }: StartedVolume<'p>,
        mut progress: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<EncodedVolume<'p>, TokeniseError> {
        let Self { encoder, plan } = self;
        let (apart, all) = (encoder.is_async(), groups.len() * slices_per_group(&builder, &groups));
        let mut done = 0;
        let mut is_encoded = |batch: usize, took: Duration| {
            done += batch;
            match progress(Progress { done, all, batch, took }) {
                ControlFlow::Break(()) if done < all => Err(TokeniseError::Stopped),
                _ => Ok(()),
            }
        };
        let (mut due, mut last) = (&groups[..], None::<Encoded>);
        while !due.is_empty() {
            let (batch, others) = due.split_at(images.patches.len());
            let meanwhile = || {
                if let Some(last) = last.take() {
                    last.add_to(&mut builder);
                }
                plan.first_images(volume, &builder, others)
            };
            let ((found, took), next) = timed(|| encoder.encode(&images), meanwhile, apart);
            let started = Instant::now();
            let Some(layers) = or_smaller(found, encoder.as_mut(), &images, &plan.max_batch)?
            else {
                [next, images].into_iter().for_each(|images| plan.keep_room(images));
                images = plan.first_images(volume, &builder, due);
                continue;
            };
            let (took, n_images) = (took + started.elapsed(), images.n_images());
            let mut done = mem::replace(&mut images, next);
            let patches = mem::take(&mut done.patches);
            last = Some(Encoded { groups: batch.to_vec(), patches, layers });
            plan.keep_room(done);
            due = others;
            is_encoded(n_images, took)?;
        }
        plan.keep_room(images);
        Ok(EncodedVolume { builder, last })
    }
}

/// Slices of each of some groups.
fn slices_per_group(builder: &TokenBuilder<'_>, groups: &[SliceGroup]) -> usize {
    groups.first().map_or(0, |&group| builder.slices(group).len())
}

/// The groups that go to the device at once. They are whole groups, because the device pools their
/// features. Batches have nearly equal sizes, because a last batch of a few slices would leave the
/// device idle.
fn first_of(groups: &[SliceGroup], slices: usize, max_batch: usize) -> &[SliceGroup] {
    let most = (max_batch / slices.max(1)).max(1);
    let n_batches = groups.len().div_ceil(most).max(1);
    &groups[..groups.len().div_ceil(n_batches)]
}

/// Does two things and returns how long the first took. They run in parallel if the first runs
/// `apart` from this processor; otherwise both need its cores. The second runs in a thread, which
/// uses the thread pool of the other stages. In the pool of the first, small tasks of the first
/// might have to wait for it.
fn timed<A, B: Send>(
    work: impl FnOnce() -> A,
    meanwhile: impl FnOnce() -> B + Send,
    apart: bool,
) -> ((A, Duration), B) {
    let work = || {
        let started = Instant::now();
        (work(), started.elapsed())
    };
    if !apart {
        let other = meanwhile();
        return (work(), other);
    }
    thread::scope(|scope| {
        let meanwhile = scope.spawn(meanwhile);
        (work(), meanwhile.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

/// Cuts out the slices of some groups, of one or several axes, into the given buffer.
fn images_of(
    volume: &Volume,
    builder: &TokenBuilder<'_>,
    groups: &[SliceGroup],
    mut room: Vec<f32>,
) -> ImageBatch {
    let side = volume.side();
    let group = groups.first().map_or(1, |&group| builder.slices(group).len());
    let n_pixels = group * side * side;
    room.resize(groups.len() * n_pixels, 0.0);
    let images = room.par_chunks_mut(n_pixels.max(1)).zip(groups);
    images.for_each(|(pixels, &group)| {
        slice_pixels(volume, group.axis(), &builder.slices(group), pixels);
    });
    let patches = groups.iter().map(|&group| builder.patches(group)).collect();
    ImageBatch { side, pixels: room, group, patches }
}

/// The outcome of a batch. It is the features, if the device has enough memory. If one group is too
/// large, it is encoded in parts. If several are, there is no result, and the caller tries fewer.
fn or_smaller(
    found: Result<Vec<PatchFeatures>, DeviceError>,
    encoder: &mut dyn SliceEncoder,
    images: &ImageBatch,
    max_batch: &AtomicUsize,
) -> Result<Option<Vec<PatchFeatures>>, TokeniseError> {
    match found {
        Err(DeviceError::OutOfMemory { .. }) if images.patches.len() > 1 => {
            max_batch.fetch_min(images.n_images() / 2, Ordering::Relaxed);
            Ok(None)
        }
        Err(DeviceError::OutOfMemory { .. }) if images.group > 1 => {
            let (layers, fits) = encode_in_parts(encoder, images, images.group / 2)?;
            max_batch.fetch_min(fits, Ordering::Relaxed);
            Ok(Some(layers))
        }
        done => Ok(Some(done?)),
    }
}

/// Encodes one group for which the device has too little memory. It encodes `max_batch` images at a
/// time, fewer after each out-of-memory error, and pools them here. It also returns how many images
/// fit.
fn encode_in_parts(
    encoder: &mut dyn SliceEncoder,
    images: &ImageBatch,
    mut max_batch: usize,
) -> Result<(Vec<PatchFeatures>, usize), TokeniseError> {
    let (side, n_pixels) = (images.side, images.n_pixels());
    let mut joined: Vec<PatchFeatures> = Vec::new();
    let mut start = 0;
    while start < images.n_images() {
        let n_images = max_batch.clamp(1, images.n_images() - start);
        let pixels = images.pixels[start * n_pixels..(start + n_images) * n_pixels].to_vec();
        let patches = vec![images.patches[0].clone(); n_images];
        match encoder.encode(&ImageBatch { side, pixels, group: 1, patches }) {
            Ok(features) => {
                join(&mut joined, features);
                start += n_images;
            }
            Err(DeviceError::OutOfMemory { .. }) if n_images > 1 => max_batch = n_images / 2,
            Err(error) => return Err(error.into()),
        }
    }
    Ok((joined.into_iter().map(|features| features.pooled(images)).collect(), max_batch))
}

fn join(joined: &mut Vec<PatchFeatures>, part: Vec<PatchFeatures>) {
    if joined.is_empty() {
        *joined = part;
        return;
    }
    for (all, part) in joined.iter_mut().zip(part) {
        all.values.extend(part.values);
    }
}

/// Number of tokens of all parts of one layer.
pub fn tokens_per_layer(grids: &[TokenGrid], n_parts: usize) -> usize {
    grids.iter().take(n_parts).map(TokenGrid::n_tokens).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::{
        geometry::{Affine, Axis, Shape3, WorldPoint},
        preprocess::{CubeSettings, brain_mask, canonicalise},
        volume::RawVolume,
    };

    /// Features are the mean of the patch; runs out of memory above `limit` images.
    struct Mean {
        limit: usize,
        apart: bool,
    }

    impl SliceEncoder for Mean {
        fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError> {
            if images.n_images() > self.limit {
                return Err(DeviceError::OutOfMemory { batch: images.n_images() });
            }
            let side = images.side / 4;
            let mut values = Vec::new();
            for (index, image) in images.pixels.chunks_exact(images.n_pixels()).enumerate() {
                for &patch in &images.patches[index / images.group] {
                    let (row, column) = (patch as usize / side, patch as usize % side);
                    values.extend([image[row * 4 * images.side + column * 4], 1.0]);
                }
            }
            Ok(vec![PatchFeatures { channels: 2, values }.pooled(images)])
        }

        fn patch(&self) -> usize {
            4
        }

        fn channels(&self) -> usize {
            2
        }

        fn device(&self) -> &str {
            "test"
        }

        fn is_async(&self) -> bool {
            self.apart
        }
    }

    fn volume() -> Volume {
        let shape = Shape3([12, 13, 14]);
        let voxels = (0..shape.n_voxels())
            .map(|offset| {
                let v = shape.voxel(offset);
                let inside = (0..3).all(|a| (2..11).contains(&v[a]));
                if inside { (v[0] + 2 * v[1] + 3 * v[2]) as f32 } else { 0.0 }
            })
            .collect();
        let affine = Affine::scaling(1.0, WorldPoint([0.0; 3])).unwrap();
        let raw = RawVolume { shape, voxels, affine };
        let cube = CubeSettings { side: 16, field_of_view_mm: 16.0, min_brain_ml: 0.0 };
        canonicalise(&raw, &brain_mask(&raw, None).unwrap(), &cube, None, None).unwrap().volume
    }

    fn tokeniser(limit: usize, max_batch: usize) -> Tokeniser {
        tokeniser_on(Mean { limit, apart: true }, max_batch)
    }

    fn tokeniser_on(encoder: Mean, max_batch: usize) -> Tokeniser {
        let settings = TokenSettings {
            views: Axis::VIEWS.to_vec(),
            join_views: true,
            slices_per_token: 4,
            slice_stride: 1,
            skip_background: true,
            min_brain_fraction: 0.3,
            smoothing_patches: 0.0,
        };
        Tokeniser::new(Box::new(encoder), None, settings, 1, max_batch)
    }

    #[test]
    fn smaller_batches_after_out_of_memory_give_the_same_tokens() {
        let go_on = |_| ControlFlow::Continue(());
        let whole = tokeniser(usize::MAX, 1000).tokens(&volume(), go_on).unwrap();
        let mut small = tokeniser(3, 1000);
        assert_eq!(small.tokens(&volume(), go_on).unwrap(), whole);
        assert!(small.max_batch() <= 3);
        let mut in_turn = tokeniser_on(Mean { limit: 3, apart: false }, 7);
        assert_eq!(in_turn.tokens(&volume(), go_on).unwrap(), whole);
        assert!(whole[0].n_tokens() > 0);
    }

    #[test]
    fn a_device_too_small_for_one_slice_is_an_error() {
        let error = tokeniser(0, 8).tokens(&volume(), |_| ControlFlow::Continue(()));
        assert!(matches!(error, Err(TokeniseError::Device(DeviceError::OutOfMemory { batch: 1 }))));
    }

    #[test]
    fn a_stop_between_batches_is_honoured() {
        let stopped = tokeniser(99, 4).tokens(&volume(), |_| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(TokeniseError::Stopped)));
    }
}
