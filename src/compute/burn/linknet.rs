//! The brain extraction networks in burn: a LinkNet over volumes (see
//! [`brain_weights`](crate::domain::brain_weights)), in f32.

use burn::{
    prelude::{Backend, Tensor, TensorData},
    tensor::{
        DType, FloatDType, StreamId,
        activation::{relu, softmax},
        backend::ExecutionError,
        module::{conv_transpose3d, conv3d, max_pool2d},
        ops::{ConvOptions, ConvTransposeOptions},
    },
};

use super::failure::guarded;
use crate::domain::{
    BrainNetwork, BrainPart,
    brain_weights::{BrainWeights, DownWeights, Kernel, LinkNetWeights, NORM_EPSILON, UpWeights},
    error::DeviceError,
};

/// deepbet's networks on a burn device.
pub struct BurnBrainNetwork<B: Backend> {
    locate: LinkNet<B>,
    outline: LinkNet<B>,
    // Fields are dropped in this order. Memory can be returned only after the weights are dropped.
    place: Place<B>,
}

/// The device of the networks. When this is dropped, the memory that burn keeps for later calls
/// returns to the device.
struct Place<B: Backend> {
    device: B::Device,
    name: String,
    /// One stream for all calls. cubecl 0.10 gives each calling thread its own stream and keeps
    /// memory for each stream. So otherwise every thread of intake would hold the memory of a whole
    /// head.
    stream: StreamId,
}

impl<B: Backend> Place<B> {
    fn guarded<T>(
        &self,
        batch: usize,
        work: impl FnOnce() -> Result<T, ExecutionError>,
    ) -> Result<T, DeviceError> {
        guarded(&self.name, batch, || self.stream.executes(work))
    }
}

impl<B: Backend> Drop for Place<B> {
    fn drop(&mut self) {
        // A device that has failed may fail here, too. There is no caller to report it to.
        let clean_up = || {
            B::memory_cleanup(&self.device);
            Ok(())
        };
        self.guarded(0, clean_up).ok();
    }
}

impl<B: Backend> BurnBrainNetwork<B> {
    /// Copies the networks to `device`. Logs and metrics call the device `name`.
    ///
    /// # Errors
    /// If the weights do not fit into the device's memory, or the device fails.
    pub fn new(weights: &BrainWeights, device: B::Device, name: &str) -> Result<Self, DeviceError> {
        let place = Place { device, name: name.to_owned(), stream: StreamId::current() };
        let network = |part| LinkNet::new(weights.part(part), &place.device);
        let [locate, outline] =
            place.guarded(0, || Ok([BrainPart::Locate, BrainPart::Outline].map(network)))?;
        Ok(Self { locate, outline, place })
    }
}

impl<B: Backend> BrainNetwork for BurnBrainNetwork<B> {
    fn forward(
        &self,
        part: BrainPart,
        image: &[f32],
        side: usize,
    ) -> Result<Vec<f32>, DeviceError> {
        assert_eq!(side % 32, 0, "the side is no multiple of 32");
        let network = match part {
            BrainPart::Locate => &self.locate,
            BrainPart::Outline => &self.outline,
        };
        self.place.guarded(1, || {
            let data = TensorData::new(image.to_vec(), [1, 1, side, side, side]);
            let image = Tensor::from_data(data, (&self.place.device, DType::F32));
            let brain = network.forward(image).try_into_data()?;
            Ok(brain.into_vec().expect("probabilities are f32"))
        })
    }
}

/// One network's weights on a device.
struct LinkNet<B: Backend> {
    stem: Convolution<B>,
    down: [Down<B>; 4],
    up: [Up<B>; 4],
    enlarge: Convolution<B>,
    smooth: Convolution<B>,
    classify: Convolution<B>,
}

impl<B: Backend> LinkNet<B> {
    fn new(weights: &LinkNetWeights, device: &B::Device) -> Self {
        let convolution = |kernel| Convolution::new(kernel, device);
        Self {
            stem: convolution(&weights.stem),
            down: weights.down.each_ref().map(|weights| Down::new(weights, device)),
            up: weights.up.each_ref().map(|weights| Up::new(weights, device)),
            enlarge: convolution(&weights.enlarge),
            smooth: convolution(&weights.smooth),
            classify: convolution(&weights.classify),
        }
    }

    /// The probability of brain, `[1, 1, side, side, side]` like the image.
    fn forward(&self, image: Tensor<B, 5>) -> Tensor<B, 5> {
        let mut decoded = pool(relu(norm(self.stem.forward(image, 2))));
        let mut encoded = Vec::new();
        for down in &self.down {
            encoded.push(decoded.clone());
            decoded = down.forward(decoded);
        }
        for (up, skip) in self.up.iter().zip(encoded.into_iter().rev()) {
            decoded = up.forward(decoded, skip);
        }
        let decoded = relu(norm(self.enlarge.transposed(decoded, 2)));
        let decoded = relu(norm(self.smooth.forward(decoded, 1)));
        softmax(self.classify.transposed(decoded, 2), 1).narrow(1, 1, 1)
    }
}

struct Down<B: Backend> {
    first: [Convolution<B>; 2],
    shortcut: Option<Convolution<B>>,
    second: [Convolution<B>; 2],
}

impl<B: Backend> Down<B> {
    fn new(weights: &DownWeights, device: &B::Device) -> Self {
        let convolution = |kernel| Convolution::new(kernel, device);
        Self {
            first: weights.first.each_ref().map(convolution),
            shortcut: weights.shortcut.as_ref().map(convolution),
            second: weights.second.each_ref().map(convolution),
        }
    }

    fn forward(&self, input: Tensor<B, 5>) -> Tensor<B, 5> {
        let (stride, shortcut) = match &self.shortcut {
            Some(shortcut) => (2, norm(shortcut.forward(input.clone(), 2))),
            None => (1, input.clone()),
        };
        let first = residual(&self.first, input, stride, shortcut);
        residual(&self.second, first.clone(), 1, first)
    }
}

fn residual<B: Backend>(
    [first, second]: &[Convolution<B>; 2],
    input: Tensor<B, 5>,
    stride: usize,
    shortcut: Tensor<B, 5>,
) -> Tensor<B, 5> {
    let branch = relu(norm(first.forward(input, stride)));
    relu(norm(second.forward(branch, 1)) + shortcut)
}

struct Up<B: Backend> {
    narrow: Convolution<B>,
    enlarge: Convolution<B>,
    widen: Convolution<B>,
}

impl<B: Backend> Up<B> {
    fn new(weights: &UpWeights, device: &B::Device) -> Self {
        let convolution = |kernel| Convolution::new(kernel, device);
        Self {
            narrow: convolution(&weights.narrow),
            enlarge: convolution(&weights.enlarge),
            widen: convolution(&weights.widen),
        }
    }

    fn forward(&self, input: Tensor<B, 5>, skip: Tensor<B, 5>) -> Tensor<B, 5> {
        let stride = skip.dims()[2] / input.dims()[2];
        let narrow = relu(norm(self.narrow.forward(input, 1)));
        let enlarged = relu(norm(self.enlarge.transposed(narrow, stride)));
        relu(norm(self.widen.forward(enlarged, 1))) + skip
    }
}

/// A kernel with an odd extent and half of that as padding, or with extent 2 and no padding.
struct Convolution<B: Backend> {
    weight: Tensor<B, 5>,
    bias: Option<Tensor<B, 1>>,
}

impl<B: Backend> Convolution<B> {
    fn new(kernel: &Kernel, device: &B::Device) -> Self {
        let options = (device, FloatDType::F32.into());
        let bias = TensorData::new(kernel.bias.clone(), [kernel.bias.len()]);
        Self {
            weight: Tensor::from_data(
                TensorData::new(kernel.weight.clone(), kernel.shape),
                options,
            ),
            bias: (!kernel.bias.is_empty()).then(|| Tensor::from_data(bias, options)),
        }
    }

    fn padding(&self) -> [usize; 3] {
        [(self.weight.dims()[4] - 1) / 2; 3]
    }

    fn forward(&self, input: Tensor<B, 5>, stride: usize) -> Tensor<B, 5> {
        let options = ConvOptions::new([stride; 3], self.padding(), [1; 3], 1);
        conv3d(input, self.weight.clone(), self.bias.clone(), options)
    }

    /// The transposed convolution. It multiplies the side by the stride.
    fn transposed(&self, input: Tensor<B, 5>, stride: usize) -> Tensor<B, 5> {
        let [padding, ..] = self.padding();
        let more = [padding * (stride - 1); 3];
        let options = ConvTransposeOptions::new([stride; 3], self.padding(), more, [1; 3], 1);
        conv_transpose3d(input, self.weight.clone(), self.bias.clone(), options)
    }
}

/// Scales each channel to mean 0 and variance 1 (biased) over this image. Means are taken plane by
/// plane first, because one sum of millions of values in f32 would lose digits.
fn norm<B: Backend>(input: Tensor<B, 5>) -> Tensor<B, 5> {
    let [_, channels, z, y, x] = input.dims();
    let planes: Tensor<B, 3> = input.reshape([channels, z, y * x]);
    let mean = |values: Tensor<B, 3>| values.mean_dim(2).mean_dim(1);
    let centred = planes.clone() - mean(planes);
    let variance = mean(centred.clone() * centred.clone());
    (centred / (variance + NORM_EPSILON).sqrt()).reshape([1, channels, z, y, x])
}

/// The largest of 3 x 3 x 3 voxels around every second voxel. burn pools at most two axes, so this
/// pools x and y first, then z.
fn pool<B: Backend>(input: Tensor<B, 5>) -> Tensor<B, 5> {
    let [_, channels, z, y, x] = input.dims();
    let planes: Tensor<B, 4> = input.reshape([1, channels * z, y, x]);
    let planes = max_pool2d(planes, [3, 3], [2, 2], [1, 1], [1, 1], false);
    let [_, _, y, x] = planes.dims();
    let columns = planes.reshape([1, channels, z, y * x]);
    let columns = max_pool2d(columns, [3, 1], [2, 1], [1, 0], [1, 1], false);
    let [_, _, z, _] = columns.dims();
    columns.reshape([1, channels, z, y, x])
}
