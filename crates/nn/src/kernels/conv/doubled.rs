//! A 3×3 convolution of an image whose pixels were doubled: of the nine taps at most four lie on different pixels, so each
//! of the four positions inside a doubled pixel is a 2×2 convolution of the small image, whose weights are sums of the nine.
//! Four ninths of the products, and the large image is never there.

use rayon::prelude::*;

use super::gather::Window;
use super::{Shape, band, bands, products, unwritten};

/// Which of three taps lie on the first and which on the second of two pixels, by position inside the doubled pixel:
/// the first position sees the pixel before once and its own twice, the second its own twice and the next once.
const TAPS: [[&[usize]; 2]; 2] = [[&[0], &[1, 2]], [&[0, 1], &[2]]];

/// weight (O, C, 3, 3) → (O, C, 2, 2) of the positions (row, column) 00, 01, 10, 11.
pub(super) fn weights(weight: &[f32]) -> [Vec<f32>; 4] {
    let (kernels, _) = weight.as_chunks::<9>();
    let at = |position: usize| {
        let (rows, columns) = (TAPS[position / 2], TAPS[position % 2]);
        let mut small = Vec::with_capacity(kernels.len() * 4);
        for kernel in kernels {
            for rows in rows {
                for columns in columns {
                    let taps = rows
                        .iter()
                        .flat_map(|r| columns.iter().map(move |c| 3 * r + c));
                    small.push(taps.map(|tap| kernel[tap]).sum());
                }
            }
        }
        small
    };
    [at(0), at(1), at(2), at(3)]
}

/// y (O, 2·H, 2·W) ← the convolution of x (C, H, W).
pub(super) fn conv2d(x: &[f32], weights: &[Vec<f32>; 4], bias: &[f32], s: Shape, y: &mut [f32]) {
    let [height, width] = s.size;
    // Whole rows, so that a task writes whole rows of the result.
    let rows = (band(height * width) / width).clamp(1, height);
    let work = |(first, mut parts): (usize, Vec<&mut [f32]>)| {
        let first = first / 4; // pixel of the small image
        let count = parts[0].len() / 4;
        let (mut left, mut right) = (unwritten(s.outputs * count), unwritten(s.outputs * count));
        for row in 0..2 {
            for (column, sums) in [&mut left, &mut right].into_iter().enumerate() {
                let window = Window {
                    size: s.size,
                    kernel: 2,
                    stride: 1,
                    before: [1 - row, 1 - column],
                    upsample: 1,
                    width,
                };
                let weights = &weights[2 * row + column];
                products(sums, x, weights, bias, window, first);
            }
            let sums = left.chunks_exact(count).zip(right.chunks_exact(count));
            for (part, (left, right)) in parts.iter_mut().zip(sums) {
                let to = part.chunks_exact_mut(2 * width).skip(row).step_by(2);
                let from = left.chunks_exact(width).zip(right.chunks_exact(width));
                for (to, (left, right)) in to.zip(from) {
                    for (to, (l, r)) in to.as_chunks_mut().0.iter_mut().zip(left.iter().zip(right))
                    {
                        *to = [*l, *r];
                    }
                }
            }
        }
    };
    bands(y, 4 * height * width, 4 * rows * width)
        .into_par_iter()
        .for_each(work);
}
