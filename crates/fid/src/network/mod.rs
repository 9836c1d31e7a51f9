//! Inception-v3 as FID knows it: images in, features out.

mod activation;
mod conv;
mod layers;
mod pool;
mod resize;

use std::collections::BTreeMap;

use crate::{Result, Weights};
use activation::Activation;
use conv::{Conv, Shape};
use pool::{Pool, halved, max_stride_2, same_size};

pub(crate) use activation::forget_spares;
pub use resize::resize;

/// Added to the variance by every batch normalisation of this graph (not PyTorch's default of 1e-5).
const EPSILON: f64 = 1e-3;

/// Channels of `Mixed_6d.branch1x1` that sFID looks at.
const SPATIAL_CHANNELS: usize = 7;

/// Inception-v3 of December 2015 (`classify_image_graph_def.pb`), the network of Heusel et al. 2017.
///
/// It differs from torchvision's by its weights, its 1008 classes, means that leave the padding out, and a maximum in
/// the pooling branch of the last block. One image is the work of one thread, so that features do not depend on the
/// batch they came in, bit for bit.
#[derive(Debug)]
pub struct Inception {
    layers: BTreeMap<String, Conv>,
    fc: Conv,
    fc_bias: Vec<f32>, // (1008)
}

/// Is shown the name of a stage and a function that makes its mean over the pixels, by channel.
pub type See<'a> = &'a mut dyn FnMut(&str, &dyn Fn() -> Vec<f32>);

/// What the network says of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageFeatures {
    /// `pool_3` (2048), the features of FID.
    pub pool: Vec<f32>,
    /// The first 7 channels of `Mixed_6d` (17 × 17 × 7 = 2023, channels last), the features of sFID.
    pub spatial: Vec<f32>,
    /// Logits without their bias (1008), as the Inception Score of both tools takes them.
    pub logits: Vec<f32>,
}

impl ImageFeatures {
    /// Length of [`pool`](Self::pool).
    pub const POOL: usize = layers::FEATURES;
    /// Length of [`spatial`](Self::spatial).
    pub const SPATIAL: usize = 17 * 17 * SPATIAL_CHANNELS;
    /// Length of [`logits`](Self::logits).
    pub const LOGITS: usize = layers::CLASSES;
}

impl Inception {
    /// The network with `weights`, every batch normalisation folded into its convolution (in f64).
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, or is none of this network.
    pub fn new(weights: &Weights) -> Result<Self> {
        weights.check_inception()?;
        let layers = layers::layers()
            .into_iter()
            .map(|layer| {
                let (weight, bias) = folded(weights, &layer)?;
                let conv = Conv::new(layer.shape, &weight, bias, true);
                Ok((layer.name, conv))
            })
            .collect::<Result<_>>()?;
        let fc = Shape {
            inputs: layers::FEATURES,
            outputs: layers::CLASSES,
            kernel: [1, 1],
            stride: 1,
            padding: [0, 0],
        };
        Ok(Self {
            layers,
            fc: Conv::new(
                fc,
                weights.values("fc.weight")?,
                vec![0.0; fc.outputs],
                false,
            ),
            fc_bias: weights.values("fc.bias")?.to_vec(),
        })
    }

    /// Names and shapes of the 472 tensors that a weight file must have, in PyTorch's order of axes.
    pub fn tensors() -> Vec<(String, Vec<usize>)> {
        layers::tensors()
    }

    /// Features of an image of `size` = (height, width), RGB bytes row by row.
    ///
    /// # Panics
    /// When the image has no pixels or not height × width × 3 bytes.
    pub fn features(&self, image: &[u8], size: [usize; 2]) -> ImageFeatures {
        self.traced(image, size, &mut |_, _| ())
    }

    /// As [`features`](Self::features); `see` is shown the mean behind every block and the two maxima of the stem (`64`
    /// and `192`, as torch-fidelity calls them), to find where two networks part.
    pub fn traced(&self, image: &[u8], size: [usize; 2], see: See<'_>) -> ImageFeatures {
        let mut seen = |name: &str, x: Activation| {
            see(name, &|| x.mean());
            x
        };
        let x = resize::prepare(image, size); // 299 x 299 x 3
        let x = seen("Conv2d_1a_3x3", self.conv("Conv2d_1a_3x3", &x, [0, 0])); // 149 x 149 x 32
        let x = self.conv("Conv2d_2a_3x3", &x, [1, 1]); // 147 x 147 x 32
        let x = self.conv("Conv2d_2b_3x3", &x, [0, 0]); // 147 x 147 x 64
        let x = seen("64", halve(&x)); // 73 x 73 x 64
        let x = self.conv("Conv2d_3b_1x1", &x, [0, 0]); // 73 x 73 x 80
        let x = self.conv("Conv2d_4a_3x3", &x, [0, 0]); // 71 x 71 x 192
        let mut x = seen("192", halve(&x)); // 35 x 35 x 192
        for name in ["Mixed_5b", "Mixed_5c", "Mixed_5d"] {
            x = seen(name, self.block_a(name, &x)); // 35 x 35 x 256, 288, 288
        }
        x = seen("Mixed_6a", self.block_b("Mixed_6a", &x)); // 17 x 17 x 768
        for name in ["Mixed_6b", "Mixed_6c"] {
            x = seen(name, self.block_c(name, &x)); // 17 x 17 x 768
        }
        x = seen("Mixed_6d", self.block_c("Mixed_6d", &x));
        let spatial = first_channels(&x, SPATIAL_CHANNELS); // 17·17·7
        x = seen("Mixed_6e", self.block_c("Mixed_6e", &x));
        x = seen("Mixed_7a", self.block_d("Mixed_7a", &x)); // 8 x 8 x 1280
        x = seen("Mixed_7b", self.block_e("Mixed_7b", &x, Pool::Mean)); // 8 x 8 x 2048
        x = seen("Mixed_7c", self.block_e("Mixed_7c", &x, Pool::Max));
        let pool = x.mean(); // 2048
        let logits = self.logits(&pool);
        ImageFeatures {
            pool,
            spatial,
            logits,
        }
    }

    /// The bias (1008) that [`ImageFeatures::logits`] go without.
    pub fn logit_bias(&self) -> &[f32] {
        &self.fc_bias
    }

    fn logits(&self, pool: &[f32]) -> Vec<f32> {
        let mut x = Activation::new([1, 1], pool.len(), [0, 0]);
        x.values.copy_from_slice(pool);
        let mut out = Activation::new([1, 1], layers::CLASSES, [0, 0]);
        self.fc.run(&x, &mut out, 0);
        std::mem::take(&mut out.values)
    }

    fn layer(&self, name: &str) -> &Conv {
        // Every name in this file is one of the table's; the tests run them all.
        self.layers
            .get(name)
            .unwrap_or_else(|| unreachable!("no layer {name}"))
    }

    /// One convolution; its output gets the `margin` that the next one pads with.
    fn conv(&self, name: &str, x: &Activation, margin: [usize; 2]) -> Activation {
        let conv = self.layer(name);
        let size = conv.output_size(x.size());
        let mut out = Activation::new(size, conv.shape().outputs, margin);
        conv.run(x, &mut out, 0);
        out
    }

    /// A row of convolutions, whose last writes into `out` behind the channels `*filled`.
    fn chain(
        &self,
        block: &str,
        names: &[&str],
        x: &Activation,
        out: &mut Activation,
        filled: &mut usize,
    ) {
        let Some((last, before)) = names.split_last() else {
            return;
        };
        let mut inner: Option<Activation> = None;
        for (i, name) in before.iter().enumerate() {
            let margin = self
                .layer(&format!("{block}.{}", names[i + 1]))
                .shape()
                .padding;
            let y = self.conv(
                &format!("{block}.{name}"),
                inner.as_ref().unwrap_or(x),
                margin,
            );
            inner = Some(y);
        }
        let conv = self.layer(&format!("{block}.{last}"));
        conv.run(inner.as_ref().unwrap_or(x), out, *filled);
        *filled += conv.shape().outputs;
    }

    /// Channels that the layers `names` of `block` make together.
    fn outputs(&self, block: &str, names: &[&str]) -> usize {
        let outputs = |name: &&str| self.layer(&format!("{block}.{name}")).shape().outputs;
        names.iter().map(outputs).sum()
    }

    /// 35 × 35: 1×1 | 1×1, 5×5 | 1×1, 3×3, 3×3 | mean, 1×1.
    fn block_a(&self, block: &str, x: &Activation) -> Activation {
        let ends = ["branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool"];
        let mut out = Activation::new(x.size(), self.outputs(block, &ends), [0, 0]);
        let filled = &mut 0;
        self.chain(block, &["branch1x1"], x, &mut out, filled);
        self.chain(block, &["branch5x5_1", "branch5x5_2"], x, &mut out, filled);
        let double = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"];
        self.chain(block, &double, x, &mut out, filled);
        let pooled = same_size(x, Pool::Mean);
        self.chain(block, &["branch_pool"], &pooled, &mut out, filled);
        out
    }

    /// 35 × 35 to 17 × 17: 3×3 | 1×1, 3×3, 3×3 | maximum.
    fn block_b(&self, block: &str, x: &Activation) -> Activation {
        let channels = self.outputs(block, &["branch3x3", "branch3x3dbl_3"]) + x.channels;
        let mut out = Activation::new(halved(x.size()), channels, [0, 0]);
        let filled = &mut 0;
        self.chain(block, &["branch3x3"], x, &mut out, filled);
        let double = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"];
        self.chain(block, &double, x, &mut out, filled);
        max_stride_2(x, &mut out, *filled);
        out
    }

    /// 17 × 17: 1×1 | 1×1, 1×7, 7×1 | 1×1, 7×1, 1×7, 7×1, 1×7 | mean, 1×1.
    fn block_c(&self, block: &str, x: &Activation) -> Activation {
        let ends = ["branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool"];
        let mut out = Activation::new(x.size(), self.outputs(block, &ends), [0, 0]);
        let filled = &mut 0;
        self.chain(block, &["branch1x1"], x, &mut out, filled);
        let single = ["branch7x7_1", "branch7x7_2", "branch7x7_3"];
        self.chain(block, &single, x, &mut out, filled);
        let double = [
            "branch7x7dbl_1",
            "branch7x7dbl_2",
            "branch7x7dbl_3",
            "branch7x7dbl_4",
            "branch7x7dbl_5",
        ];
        self.chain(block, &double, x, &mut out, filled);
        let pooled = same_size(x, Pool::Mean);
        self.chain(block, &["branch_pool"], &pooled, &mut out, filled);
        out
    }

    /// 17 × 17 to 8 × 8: 1×1, 3×3 | 1×1, 1×7, 7×1, 3×3 | maximum.
    fn block_d(&self, block: &str, x: &Activation) -> Activation {
        let channels = self.outputs(block, &["branch3x3_2", "branch7x7x3_4"]) + x.channels;
        let mut out = Activation::new(halved(x.size()), channels, [0, 0]);
        let filled = &mut 0;
        self.chain(block, &["branch3x3_1", "branch3x3_2"], x, &mut out, filled);
        let long = [
            "branch7x7x3_1",
            "branch7x7x3_2",
            "branch7x7x3_3",
            "branch7x7x3_4",
        ];
        self.chain(block, &long, x, &mut out, filled);
        max_stride_2(x, &mut out, *filled);
        out
    }

    /// 8 × 8: 1×1 | 1×1, (1×3 and 3×1) | 1×1, 3×3, (1×3 and 3×1) | pool, 1×1.
    fn block_e(&self, block: &str, x: &Activation, pool: Pool) -> Activation {
        let ends = [
            "branch1x1",
            "branch3x3_2a",
            "branch3x3_2b",
            "branch3x3dbl_3a",
            "branch3x3dbl_3b",
            "branch_pool",
        ];
        let mut out = Activation::new(x.size(), self.outputs(block, &ends), [0, 0]);
        let filled = &mut 0;
        self.chain(block, &["branch1x1"], x, &mut out, filled);
        let y = self.conv(&format!("{block}.branch3x3_1"), x, [1, 1]);
        self.chain(block, &["branch3x3_2a"], &y, &mut out, filled);
        self.chain(block, &["branch3x3_2b"], &y, &mut out, filled);
        let y = self.conv(&format!("{block}.branch3x3dbl_1"), x, [1, 1]);
        let y = self.conv(&format!("{block}.branch3x3dbl_2"), &y, [1, 1]);
        self.chain(block, &["branch3x3dbl_3a"], &y, &mut out, filled);
        self.chain(block, &["branch3x3dbl_3b"], &y, &mut out, filled);
        let pooled = same_size(x, pool);
        self.chain(block, &["branch_pool"], &pooled, &mut out, filled);
        out
    }
}

/// 3 × 3 maximum with stride 2.
fn halve(x: &Activation) -> Activation {
    let mut out = Activation::new(halved(x.size()), x.channels, [0, 0]);
    max_stride_2(x, &mut out, 0);
    out
}

/// The first `count` channels of every pixel, row by row.
fn first_channels(x: &Activation, count: usize) -> Vec<f32> {
    (0..x.height)
        .flat_map(|y| (0..x.width).flat_map(move |column| &x.pixel(y, column)[..count]))
        .copied()
        .collect()
}

/// Weight (outputs, inputs, rows, columns) and bias (outputs) of a convolution with its normalisation folded in:
/// y = (w·x − mean) / √(variance + ε) · scale + shift.
fn folded(weights: &Weights, layer: &layers::Layer) -> Result<(Vec<f32>, Vec<f32>)> {
    let name = &layer.name;
    let [scale, shift, mean, variance] =
        layers::NORM.map(|ending| weights.values(&format!("{name}.bn.{ending}")));
    let (scale, shift, mean, variance) = (scale?, shift?, mean?, variance?);
    let weight = weights.values(&format!("{name}.conv.weight"))?;
    let taps = weight.len() / layer.shape.outputs;
    let factor = |o: usize| f64::from(scale[o]) / (f64::from(variance[o]) + EPSILON).sqrt();
    let folded = weight
        .iter()
        .enumerate()
        .map(|(i, &w)| (f64::from(w) * factor(i / taps)) as f32)
        .collect();
    let bias = (0..layer.shape.outputs)
        .map(|o| (f64::from(shift[o]) - f64::from(mean[o]) * factor(o)) as f32)
        .collect();
    Ok((folded, bias))
}
