//! The encoder on a device.

use burn::{
    prelude::{Backend, Tensor, TensorData},
    tensor::{DType, backend::ExecutionError},
};

use super::{
    failure::guarded,
    vit::{Positions, Vit},
};
use crate::{
    compute::{EncoderOptions, position::resize_position_embedding},
    domain::{
        SliceEncoder,
        error::DeviceError,
        weights::{Architecture, VitWeights},
    },
    numeric::slice::{ImageBatch, PatchFeatures},
};

/// DINOv2 on a burn device. On CUDA, the size of a batch can change the rounding of an image's
/// features, but nothing else.
pub struct BurnEncoder<B: Backend> {
    vit: Vit<B>,
    options: EncoderOptions,
    position_embedding: Vec<f32>,
    /// Position embedding, with the image side that it is for.
    positions: Option<(usize, Positions<B>)>,
    device: B::Device,
    name: String,
}

impl<B: Backend> BurnEncoder<B> {
    /// Copies the encoder to `device`. Logs and metrics call the device `name`.
    ///
    /// # Errors
    /// If the weights do not fit into the device's memory, or the device fails.
    pub fn new(
        weights: &VitWeights,
        options: &EncoderOptions,
        device: B::Device,
        name: &str,
    ) -> Result<Self, DeviceError> {
        let n_blocks = options.layers.last().copied().unwrap_or(0);
        let vit = guarded(name, 0, || {
            let precision = options.precision_on_gpu();
            Ok::<_, ExecutionError>(Vit::new(weights, n_blocks, precision, &device))
        })?;
        Ok(Self {
            vit,
            options: options.clone(),
            position_embedding: weights.position_embedding.clone(),
            positions: None,
            device,
            name: name.to_owned(),
        })
    }

    fn fit_positions(&mut self, side: usize) {
        if self.positions.as_ref().is_some_and(|(known, _)| *known == side) {
            return;
        }
        let Architecture { patch, position_side, channels, .. } = *self.vit.architecture();
        let (embedding, mode) = (&self.position_embedding, self.options.position);
        let resized =
            resize_position_embedding(embedding, position_side, side / patch, channels, mode);
        self.positions = Some((side, self.vit.positions(&resized, &self.device)));
    }

    fn forward(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, ExecutionError> {
        self.fit_positions(images.side);
        let n_pixels = images.n_pixels();
        let channels = self.vit.architecture().channels;
        let empty = || PatchFeatures { channels, values: Vec::new() };
        let mut features: Vec<PatchFeatures> =
            self.options.layers.iter().map(|_| empty()).collect();
        let mut pixels = &images.pixels[..];
        // All rows of a tensor have one length, so only groups with the same patches are encoded
        // together.
        for alike in images.patches.chunk_by(|a, b| a == b) {
            let n_images = alike.len() * images.group;
            let (own, others) = pixels.split_at(n_images * n_pixels);
            let run = self.run(own, n_images, images.side, &alike[0])?;
            for (all, part) in features.iter_mut().zip(run) {
                all.values.extend(part);
            }
            pixels = others;
        }
        Ok(features.into_iter().map(|features| features.pooled(images)).collect())
    }

    /// Encodes images with the same patches. Returns the features at each layer, `[n_images,
    /// patches.len(), channels]`.
    fn run(
        &self,
        pixels: &[f32],
        n_images: usize,
        side: usize,
        patches: &[u32],
    ) -> Result<Vec<Vec<f32>>, ExecutionError> {
        let (_, positions) = self.positions.as_ref().expect("was just made to fit");
        let colours = pixels.len() / (n_images * side * side).max(1);
        let data = TensorData::new(pixels.to_vec(), [n_images, colours, side, side]);
        let images = Tensor::from_data(data, (&self.device, DType::F32));
        let places: Vec<i32> = patches.iter().map(|&patch| patch as i32).collect();
        let places =
            Tensor::from_data(TensorData::new(places, [patches.len()]), (&self.device, DType::I32));
        let Self { vit, options, .. } = self;
        let features = vit.forward(images, positions, places, &options.layers, options.final_norm);
        let values =
            |layer: Tensor<B, 3>| Ok(layer.try_into_data()?.into_vec().expect("features are f32"));
        features.into_iter().map(values).collect()
    }
}

impl<B: Backend> SliceEncoder for BurnEncoder<B> {
    fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError> {
        let name = self.name.clone();
        guarded(&name, images.n_images(), || self.forward(images))
    }

    fn patch(&self) -> usize {
        self.vit.architecture().patch
    }

    fn channels(&self) -> usize {
        self.vit.architecture().channels
    }

    fn device(&self) -> &str {
        &self.name
    }
}
