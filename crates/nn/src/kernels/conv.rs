//! Two-dimensional convolution of NCHW images: bands of output pixels, each gathered into a matrix (im2col) and multiplied
//! by the weight. The matrix of a whole activation, nine times its size, is never there.

use rayon::prelude::*;

use super::matmul::{Into, Mat, matmul_on_one};
use super::unwritten;

/// Values of a band's gathered matrix: 2 MiB, which stay in the cache while they are used.
const BAND: usize = 1 << 19;

/// Fewest pixels of a band: gemm copies the weights once per band.
const FEWEST: usize = 64;

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

    /// Rows of the gathered matrix: values that one output value is a sum over.
    fn terms(&self) -> usize {
        self.inputs * self.kernel * self.kernel
    }
}

/// x (B, C, H, W), weight (O, C, k, k), bias (O) → (B, O, H', W').
///
/// The bands depend on the shape alone, so the bits of an image do not depend on its batch or on threads.
pub(crate) fn conv2d(x: &[f32], weight: &[f32], bias: &[f32], s: Shape, out: [usize; 2]) -> Vec<f32> {
    let pixels = out[0] * out[1];
    let mut y = unwritten(s.batch * s.outputs * pixels);
    let terms = s.terms();
    let band = (BAND / terms).max(FEWEST).min(pixels);
    let image = s.inputs * s.size[0] * s.size[1];
    for (x, y) in x.chunks_exact(image).zip(y.chunks_exact_mut(s.outputs * pixels)) {
        bands(y, pixels, band).into_par_iter().for_each(|(first, mut rows)| {
            let count = rows[0].len();
            let mut columns = unwritten(terms * count);
            gather(&mut columns, x, s, out[1], first, count);
            let mut sums = unwritten(s.outputs * count);
            for (sums, bias) in sums.chunks_exact_mut(count).zip(bias) {
                sums.fill(*bias);
            }
            matmul_on_one(
                &mut sums,
                count,
                Into::Accumulate,
                1.0,
                Mat::new(weight, s.outputs, terms),
                Mat::new(&columns, terms, count),
            );
            for (row, sums) in rows.iter_mut().zip(sums.chunks_exact(count)) {
                row.copy_from_slice(sums);
            }
        });
    }
    y
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

/// columns (C·k·k, `count`) ← for each output pixel from `first` on, what the kernel covers of x (C, H, W).
fn gather(columns: &mut [f32], x: &[f32], s: Shape, width: usize, first: usize, count: usize) {
    let [height, source_width] = s.size;
    let plane = height * source_width;
    let mut rows = columns.chunks_exact_mut(count);
    for x in x.chunks_exact(plane) {
        for dy in 0..s.kernel {
            for dx in 0..s.kernel {
                let Some(row) = rows.next() else { return };
                let (mut at, mut column) = (first / width, first % width);
                let mut done = 0;
                // The output's rows one by one, the first and the last perhaps in part.
                while done < count {
                    let run = (width - column).min(count - done);
                    let to = &mut row[done..done + run];
                    // Row of the upsampled input; below 0 it wraps round and is past the end.
                    let y = (at * s.stride + dy).wrapping_sub(s.padding[0]);
                    if y < height * s.upsample {
                        let source = &x[y / s.upsample * source_width..][..source_width];
                        gather_row(to, source, s, column, dx);
                    } else {
                        to.fill(0.0);
                    }
                    done += run;
                    (at, column) = (at + 1, 0);
                }
            }
        }
    }
}

/// Of one row of the input, what tap `dx` sees from the output's columns `column..`.
fn gather_row(to: &mut [f32], source: &[f32], s: Shape, column: usize, dx: usize) {
    let [before, _] = s.padding;
    let end = source.len() * s.upsample;
    if s.stride == 1 && s.upsample == 1 {
        // A piece of the row, zeros around it.
        let start = column + dx; // in the padded row
        let zeros = before.saturating_sub(start).min(to.len());
        let (left, rest) = to.split_at_mut(zeros);
        left.fill(0.0);
        let from = (start + zeros).saturating_sub(before).min(end);
        let copied = rest.len().min(end - from);
        rest[..copied].copy_from_slice(&source[from..from + copied]);
        rest[copied..].fill(0.0);
        return;
    }
    for (i, to) in to.iter_mut().enumerate() {
        let x = ((column + i) * s.stride + dx).wrapping_sub(before);
        *to = if x < end { source[x / s.upsample] } else { 0.0 };
    }
}
