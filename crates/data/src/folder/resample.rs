//! Pillow's `Image.resize` for 8-bit RGB, bit for bit: the reference prepares its images with it.
//!
//! Source: Pillow, `src/libImaging/Resample.c` (`precompute_coeffs`, `normalize_coeffs_8bpc`,
//! `ImagingResampleHorizontal_8bpc`): separable, columns first, weights in 22-bit fixed point, each
//! pass rounded to bytes. This is Pillow up to 11.3 at least, as in the reference's time; 13.0 takes
//! the rows first for some shapes, which moves single bytes by a few levels. The resizing of the `image` crate has no box filter and rounds elsewhere.

use image::RgbImage;

const PRECISION_BITS: i32 = 32 - 8 - 2;

/// A resampling kernel and the half width of its support, in pixels of the smaller image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Filter {
    support: f64,
    weight: fn(f64) -> f64,
}

/// Mean over the pixels that an output pixel covers.
pub(super) const BOX: Filter = Filter {
    support: 0.5,
    weight: |x| if x > -0.5 && x <= 0.5 { 1.0 } else { 0.0 },
};

/// Keys' cubic with a = −1/2.
pub(super) const BICUBIC: Filter = Filter {
    support: 2.0,
    weight: |x| {
        const A: f64 = -0.5;
        let x = x.abs();
        if x < 1.0 {
            ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
        } else if x < 2.0 {
            (((x - 5.0) * x + 8.0) * x - 4.0) * A
        } else {
            0.0
        }
    },
};

/// What one output position adds up: the first input position and the weights from there on.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

fn windows(from: usize, to: usize, filter: Filter) -> Vec<Window> {
    let scale = from as f64 / to as f64;
    // When shrinking, the kernel widens with the scale, which is what prevents aliasing.
    let stretch = scale.max(1.0);
    let support = filter.support * stretch;
    (0..to)
        .map(|position| {
            let centre = (position as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            let weights: Vec<f64> = (first..end)
                .map(|i| (filter.weight)((i as f64 - centre + 0.5) * (1.0 / stretch)))
                .collect();
            let total: f64 = weights.iter().sum();
            let fixed = |w: f64| {
                let scaled =
                    if total == 0.0 { w } else { w / total } * f64::from(1 << PRECISION_BITS);
                (scaled + 0.5_f64.copysign(scaled)) as i32
            };
            Window {
                first,
                weights: weights.into_iter().map(fixed).collect(),
            }
        })
        .collect()
}

/// Sums `input` at `base + i·stride` under the weights, in fixed point, to one byte.
fn weighted(input: &[u8], base: usize, stride: usize, weights: &[i32]) -> u8 {
    let half = 1 << (PRECISION_BITS - 1);
    let sum = weights.iter().enumerate().fold(half, |sum, (i, w)| {
        sum + i32::from(input[base + i * stride]) * w
    });
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// `picture` at `width`×`height` pixels.
pub(super) fn resize(picture: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    let mut picture = picture.clone();
    if picture.width() != width {
        let (from, rows) = (picture.width() as usize, picture.height());
        let windows = windows(from, width as usize, filter);
        let input = picture.as_raw();
        let mut out = RgbImage::new(width, rows);
        for (row, line) in out.chunks_exact_mut(width as usize * 3).enumerate() {
            for (window, rgb) in windows.iter().zip(line.chunks_exact_mut(3)) {
                let base = (row * from + window.first) * 3;
                for (c, value) in rgb.iter_mut().enumerate() {
                    *value = weighted(input, base + c, 3, &window.weights);
                }
            }
        }
        picture = out;
    }
    if picture.height() != height {
        let stride = width as usize * 3;
        let windows = windows(picture.height() as usize, height as usize, filter);
        let input = picture.as_raw();
        let mut out = RgbImage::new(width, height);
        for (window, line) in windows.iter().zip(out.chunks_exact_mut(stride)) {
            for (k, value) in line.iter_mut().enumerate() {
                *value = weighted(input, window.first * stride + k, stride, &window.weights);
            }
        }
        picture = out;
    }
    picture
}
