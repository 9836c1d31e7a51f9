//! Convolution of one image, channels last, without im2col: for every tile of a few pixels times a few vectors of
//! output channels the sums stay in registers while the kernel's taps go by.
//!
//! The sum of an output value runs over the taps and input channels in one order that depends on nothing else, with
//! fused multiply-adds. So its bits are the same for every batch, number of threads, tile and vector width.

use pulp::{Arch, Simd, WithSimd};

use super::activation::Activation;

/// Shape of a convolution; axes are (rows, columns).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) kernel: [usize; 2],
    pub(crate) stride: usize,
    pub(crate) padding: [usize; 2],
}

/// A convolution with a bias, its weights laid out for this CPU's vectors.
#[derive(Debug)]
pub(crate) struct Conv {
    shape: Shape,
    relu: bool,
    bias: Vec<f32>, // (outputs)
    panels: Vec<Panel>,
}

/// The weights of consecutive output channels.
#[derive(Debug)]
struct Panel {
    first: usize,
    /// Vectors of output channels.
    vectors: usize,
    /// (kernel rows, kernel columns, inputs, vectors × lanes), the channels past the last one zero.
    weights: Vec<f32>,
}

impl Conv {
    /// `weight` is (outputs, inputs, rows, columns), as PyTorch has it; `bias` (outputs).
    pub(crate) fn new(shape: Shape, weight: &[f32], bias: Vec<f32>, relu: bool) -> Self {
        let lanes = Arch::new().dispatch(Lanes);
        let widest = if lanes >= 16 { 4 } else { 2 };
        let mut panels = Vec::new();
        let mut first = 0;
        while first < shape.outputs {
            let left = (shape.outputs - first).div_ceil(lanes);
            // 3 + 3 and 3 + 2 run faster than 4 + 2 and 4 + 1.
            let vectors = match left {
                5 | 6 if widest == 4 => 3,
                _ => left.min(widest),
            };
            panels.push(Panel {
                first,
                vectors,
                weights: pack(shape, weight, first, vectors * lanes),
            });
            first += vectors * lanes;
        }
        Self {
            shape,
            relu,
            bias,
            panels,
        }
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// Height and width of the output for an input of `size`.
    pub(crate) fn output_size(&self, size: [usize; 2]) -> [usize; 2] {
        let Shape {
            kernel,
            stride,
            padding,
            ..
        } = self.shape;
        [0, 1].map(|axis| (size[axis] + 2 * padding[axis] - kernel[axis]) / stride + 1)
    }

    /// Writes the output into the channels `first..` of `out`, which has [`output_size`](Self::output_size).
    /// The margin of `x` must be at least the padding.
    pub(crate) fn run(&self, x: &Activation, out: &mut Activation, first: usize) {
        assert_eq!(x.channels, self.shape.inputs, "input channels");
        assert_eq!(out.size(), self.output_size(x.size()), "output size");
        assert!(
            (0..2).all(|axis| x.margin[axis] >= self.shape.padding[axis]),
            "the margin is the padding"
        );
        assert!(
            first + self.shape.outputs <= out.channels,
            "output channels"
        );
        Arch::new().dispatch(Run {
            conv: self,
            x,
            out,
            first,
        });
    }
}

/// (outputs, inputs, rows, columns) → (rows, columns, inputs, `width` of the outputs from `first` on).
fn pack(shape: Shape, weight: &[f32], first: usize, width: usize) -> Vec<f32> {
    let Shape {
        inputs,
        outputs,
        kernel: [rows, columns],
        ..
    } = shape;
    let mut packed = vec![0f32; rows * columns * inputs * width];
    let taps = rows * columns;
    for output in first..outputs.min(first + width) {
        for input in 0..inputs {
            for tap in 0..taps {
                packed[(tap * inputs + input) * width + output - first] =
                    weight[(output * inputs + input) * taps + tap];
            }
        }
    }
    packed
}

struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

struct Run<'a> {
    conv: &'a Conv,
    x: &'a Activation,
    out: &'a mut Activation,
    first: usize,
}

impl WithSimd for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            conv,
            x,
            out,
            first,
        } = self;
        let Shape {
            kernel: [rows, columns],
            stride,
            padding,
            ..
        } = conv.shape;
        let [height, width] = out.size();
        let reach = Reach {
            rows,
            pitch: x.pitch(),
            run: columns * x.channels,
        };
        for panel in &conv.panels {
            // Accumulators of a tile fill the registers: `most` × vectors of them.
            let most = most_pixels(S::F32_LANES, panel.vectors);
            let tiles = (height * width).div_ceil(most);
            let mut done = 0;
            for tile in 0..tiles {
                // Equal shares: a last tile of one pixel would wait for its own additions.
                let end = (tile + 1) * height * width / tiles;
                let count = end - done;
                let (mut from, mut to) = ([0; MOST_PIXELS], [0; MOST_PIXELS]);
                let (mut y, mut column) = (done / width, done % width);
                for (from, to) in from.iter_mut().zip(&mut to).take(count) {
                    *from = (y * stride + x.margin[0] - padding[0]) * reach.pitch
                        + (column * stride + x.margin[1] - padding[1]) * x.channels;
                    *to = out.at(y, column) + first + panel.first;
                    column += 1;
                    if column == width {
                        (y, column) = (y + 1, 0);
                    }
                }
                let channels = (panel.vectors * S::F32_LANES).min(conv.bias.len() - panel.first);
                let tile = Tile {
                    x: &x.values,
                    from,
                    reach,
                    bias: &conv.bias[panel.first..][..channels],
                    relu: conv.relu,
                    to,
                };
                tile.dispatch(simd, count, panel.vectors, &panel.weights, &mut out.values);
                done = end;
            }
        }
    }
}

/// Most pixels of a tile, whatever the panel.
const MOST_PIXELS: usize = 8;

/// Most pixels of a tile whose sums fit the registers (32 of 16 lanes, 16 of 8 or 4) beside one set of weights.
#[inline(always)]
fn most_pixels(lanes: usize, vectors: usize) -> usize {
    match (lanes >= 16, vectors) {
        (true, 4) => 6,
        (false, 2) => 6,
        _ => 8,
    }
}

/// What a kernel covers of the input: `rows` runs of values, `pitch` apart.
#[derive(Clone, Copy)]
struct Reach {
    rows: usize,
    pitch: usize,
    run: usize,
}

/// Some pixels times the channels of a panel.
struct Tile<'a> {
    x: &'a [f32],
    /// Where the kernel's first tap lies, by pixel.
    from: [usize; MOST_PIXELS],
    reach: Reach,
    bias: &'a [f32],
    relu: bool,
    /// Where the output channels begin, by pixel.
    to: [usize; MOST_PIXELS],
}

impl Tile<'_> {
    /// Sums the tile with the code made for its number of pixels and vectors.
    #[inline(always)]
    fn dispatch<S: Simd>(
        &self,
        simd: S,
        pixels: usize,
        vectors: usize,
        weights: &[f32],
        out: &mut [f32],
    ) {
        macro_rules! tiles {
            ($($vectors:literal: $($pixels:literal)*;)*) => {
                match (vectors, pixels) {
                    $($(($vectors, $pixels) => simd.vectorize(Sums::<$pixels, $vectors> {
                        tile: self,
                        weights,
                        out,
                    }),)*)*
                    _ => unreachable!("{vectors} vectors of {pixels} pixels"),
                }
            };
        }
        tiles! {
            1: 1 2 3 4 5 6 7 8;
            2: 1 2 3 4 5 6 7 8;
            3: 1 2 3 4 5 6 7 8;
            4: 1 2 3 4 5 6;
        }
    }
}

/// A tile of so many pixels and vectors, compiled apart so that it gets the registers to itself.
struct Sums<'a, const PIXELS: usize, const VECTORS: usize> {
    tile: &'a Tile<'a>,
    weights: &'a [f32],
    out: &'a mut [f32],
}

impl<const PIXELS: usize, const VECTORS: usize> WithSimd for Sums<'_, PIXELS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tile, weights, out } = self;
        let Reach { rows, pitch, run } = tile.reach;
        let (weights, _) = S::as_simd_f32s(weights).0.as_chunks::<VECTORS>();
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; PIXELS];
        for row in 0..rows {
            let x: [&[f32]; PIXELS] =
                std::array::from_fn(|pixel| &tile.x[tile.from[pixel] + row * pitch..][..run]);
            for (k, weight) in weights[row * run..][..run].iter().enumerate() {
                for pixel in 0..PIXELS {
                    let value = simd.splat_f32s(x[pixel][k]);
                    for vector in 0..VECTORS {
                        sums[pixel][vector] =
                            simd.mul_add_f32s(value, weight[vector], sums[pixel][vector]);
                    }
                }
            }
        }
        let channels = tile.bias.len();
        for (sums, &to) in sums.iter().zip(&tile.to) {
            let sums: &[f32] = pulp::bytemuck::cast_slice(sums);
            for ((out, sum), bias) in out[to..][..channels].iter_mut().zip(sums).zip(tile.bias) {
                let value = sum + bias;
                *out = if tile.relu && value < 0.0 { 0.0 } else { value };
            }
        }
    }
}
