//! Two-dimensional convolution of NCHW images: bands of output pixels, each gathered into a matrix (im2col) and multiplied
//! by the weight, some channels at a time. The matrix of a whole activation, nine times its size, is never there.

mod doubled;
mod gather;

use gather::{Window, gather};
use rayon::prelude::*;

use super::matmul::{Into, Mat, matmul_on_one};
use super::unwritten;

/// Most pixels of a band. Gemm copies the weights once per band, so it should be long; its sums, 512 channels of it, should
/// stay in the cache.
const BAND: usize = 512;

/// Fewest pixels of a band, where a small image is cut for the cores.
const SHORTEST: usize = 128;

/// Rows of the gathered matrix at a time: with [`BAND`] pixels 1 MiB, which stays in the cache while it is used.
const TERMS: usize = 512;

/// Sizes of a convolution; kernels are square, axes (rows, columns).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) batch: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Height and width of the input, before upsampling.
    pub(crate) size: [usize; 2],
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    /// Zeros before the first and after the last row (and column).
    pub(crate) padding: [usize; 2],
    /// Every input pixel counts as a square of so many equal ones (nearest-neighbour upsampling).
    pub(crate) upsample: usize,
}

impl Shape {
    /// Height and width of the output; none when the kernel does not fit.
    pub(crate) fn output_size(&self) -> Option<[usize; 2]> {
        let along = |size: usize| {
            let padded = size * self.upsample + self.padding[0] + self.padding[1];
            Some(padded.checked_sub(self.kernel)? / self.stride + 1)
        };
        Some([along(self.size[0])?, along(self.size[1])?])
    }

    /// Whether it is the usual one behind an upsampling: twice the size, then 3×3 that keeps it.
    fn is_doubling(&self) -> bool {
        (self.upsample, self.kernel, self.stride) == (2, 3, 1) && self.padding == [1, 1]
    }
}

/// x (B, C, H, W), weight (O, C, k, k), bias (O) → (B, O, H', W').
///
/// The bands depend on the shape alone, so the bits of an image do not depend on its batch or on threads.
pub(crate) fn conv2d(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    s: Shape,
    out: [usize; 2],
) -> Vec<f32> {
    let pixels = out[0] * out[1];
    let mut y = unwritten(s.batch * s.outputs * pixels);
    let images = x.chunks_exact(s.inputs * s.size[0] * s.size[1]);
    let outputs = y.chunks_exact_mut(s.outputs * pixels);
    if s.is_doubling() {
        let weights = doubled::weights(weight);
        images
            .zip(outputs)
            .for_each(|(x, y)| doubled::conv2d(x, &weights, bias, s, y));
        return y;
    }
    let window = Window {
        size: s.size,
        kernel: s.kernel,
        stride: s.stride,
        before: [s.padding[0]; 2],
        upsample: s.upsample,
        width: out[1],
    };
    let band = band(pixels).min(pixels);
    for (x, y) in images.zip(outputs) {
        let work = |(first, mut rows): (usize, Vec<&mut [f32]>)| {
            let count = rows[0].len();
            let mut sums = unwritten(s.outputs * count);
            products(&mut sums, x, weight, bias, window, first);
            for (row, sums) in rows.iter_mut().zip(sums.chunks_exact(count)) {
                row.copy_from_slice(sums);
            }
        };
        bands(y, pixels, band).into_par_iter().for_each(work);
    }
    y
}

/// Pixels of a band of an image of so many.
fn band(pixels: usize) -> usize {
    (pixels / 8).clamp(SHORTEST, BAND)
}

/// sums (O, P) ← the convolution of x (C, H, W) at the P output pixels from `first` on; weight (O, C, k, k), bias (O).
fn products(
    sums: &mut [f32],
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    window: Window,
    first: usize,
) {
    let (plane, taps) = (window.plane(), window.kernel * window.kernel);
    let (outputs, count, inputs) = (bias.len(), sums.len() / bias.len(), x.len() / plane);
    // Equal shares of the channels.
    let shares = inputs.div_ceil((TERMS / taps).max(1));
    let share = inputs.div_ceil(shares);
    let mut columns = unwritten(share * taps * count);
    for (sums, bias) in sums.chunks_exact_mut(count).zip(bias) {
        sums.fill(*bias);
    }
    for (i, x) in x.chunks(share * plane).enumerate() {
        let some = x.len() / plane * taps; // of the terms, from i·share·taps on
        gather(&mut columns[..some * count], x, window, first, count);
        matmul_on_one(
            sums,
            count,
            Into::Accumulate,
            1.0,
            Mat::strided(&weight[i * share * taps..], outputs, some, inputs * taps),
            Mat::new(&columns, some, count),
        );
    }
}

/// The planes of `y`, `pixels` long each, cut into bands: (first pixel, its part of every plane).
fn bands(y: &mut [f32], pixels: usize, band: usize) -> Vec<(usize, Vec<&mut [f32]>)> {
    let mut bands: Vec<(usize, Vec<&mut [f32]>)> = (0..pixels)
        .step_by(band)
        .map(|first| (first, Vec::new()))
        .collect();
    for plane in y.chunks_exact_mut(pixels) {
        for ((_, rows), part) in bands.iter_mut().zip(plane.chunks_mut(band)) {
            rows.push(part);
        }
    }
    bands
}
