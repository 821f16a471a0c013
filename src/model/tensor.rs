//! Tensors by name, as the readers of other formats return them.

use std::collections::BTreeMap;

use safetensors::{Dtype, tensor::TensorView};

/// A tensor; its values are row-major.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tensor {
    pub(super) shape: Vec<usize>,
    pub(super) values: Vec<f32>,
}

pub(super) type Tensors = BTreeMap<String, Tensor>;

/// The tensors as a safetensors file, so that one loader checks the weights of all formats.
pub(super) fn to_safetensors(tensors: &Tensors) -> Vec<u8> {
    let views = tensors.iter().map(|(name, tensor)| {
        let data: &[u8] = bytemuck::cast_slice(&tensor.values);
        let view = TensorView::new(Dtype::F32, tensor.shape.clone(), data);
        (name, view.expect("the readers check that shape and values fit"))
    });
    safetensors::serialize(views, None).expect("names are unique and data is complete")
}
