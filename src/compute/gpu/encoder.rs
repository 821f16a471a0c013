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
    compute::{
        EncoderOptions,
        position::resize_position_embedding,
        weights::{Architecture, VitWeights},
    },
    domain::{SliceEncoder, error::DeviceError},
    numeric::slice::{ImageBatch, PatchFeatures},
};

/// DINOv2 on a burn device. On CUDA the rounding of an image's features, though nothing else, can
/// change with the size of its batch.
pub struct BurnEncoder<B: Backend> {
    vit: Vit<B>,
    options: EncoderOptions,
    position_embedding: Vec<f32>,
    /// For the image side in use.
    positions: Option<(usize, Positions<B>)>,
    device: B::Device,
    name: String,
}

impl<B: Backend> BurnEncoder<B> {
    /// The encoder on `device`, which is called `name` in logs and metrics.
    ///
    /// # Errors
    /// If the weights do not fit into the memory of the device, or it fails.
    pub fn new(
        weights: &VitWeights,
        options: &EncoderOptions,
        device: B::Device,
        name: &str,
    ) -> Result<Self, DeviceError> {
        let n_blocks = options.layers.last().copied().unwrap_or(0);
        let vit = guarded(name, 0, || {
            Ok::<_, ExecutionError>(Vit::new(weights, n_blocks, options.precision, &device))
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
        let &ImageBatch { n_images, side, ref pixels } = images;
        self.fit_positions(side);
        let (_, positions) = self.positions.as_ref().expect("was just made to fit");
        let colours = pixels.len() / (n_images * side * side).max(1);
        let data = TensorData::new(pixels.clone(), [n_images, colours, side, side]);
        let images = Tensor::from_data(data, (&self.device, DType::F32));
        let features =
            self.vit.forward(images, positions, &self.options.layers, self.options.final_norm);
        features.into_iter().map(patch_features).collect()
    }
}

fn patch_features<B: Backend>(features: Tensor<B, 3>) -> Result<PatchFeatures, ExecutionError> {
    let [n_images, n_patches, channels] = features.dims();
    let values = features.try_into_data()?.into_vec().expect("features are f32");
    Ok(PatchFeatures { n_images, n_patches, channels, values })
}

impl<B: Backend> SliceEncoder for BurnEncoder<B> {
    fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError> {
        let name = self.name.clone();
        guarded(&name, images.n_images, || self.forward(images))
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
