use rayon::prelude::*;

use super::{dot, simd, sum, unwritten};

/// How the normalised row is scaled and shifted: y = x̂·(base + scale) + shift.
///
/// Rows of `scale` and `shift` belong to groups of `t` consecutive rows of x: one group per sample for
/// adaLN, a single group for an affine LayerNorm.
pub(crate) struct Affine<'a> {
    /// First scale of group 0.
    pub(crate) scale: &'a [f32],
    /// First shift of group 0.
    pub(crate) shift: &'a [f32],
    /// Distance between groups in both slices.
    pub(crate) stride: usize,
    /// 1 for adaLN (1 + scale), 0 for an affine weight.
    pub(crate) base: f32,
}

/// Mean and 1/σ of one row (biased variance, as LayerNorm).
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x) / n;
    // Two passes: the difference of squares loses digits when |mean| is large against σ.
    let mut acc = [0f32; 16];
    let chunks = x.chunks_exact(16);
    let tail: f32 = chunks
        .remainder()
        .iter()
        .map(|v| (v - mean) * (v - mean))
        .sum();
    for c in chunks {
        for l in 0..16 {
            acc[l] += (c[l] - mean) * (c[l] - mean);
        }
    }
    let var = (acc.iter().sum::<f32>() + tail) / n;
    (mean, 1.0 / (var + eps).sqrt())
}

/// LayerNorm of every row of x (rows of `d`), scaled and shifted.
pub(crate) fn layer_norm(x: &[f32], affine: &Affine<'_>, eps: f32, t: usize, d: usize) -> Vec<f32> {
    let mut y = unwritten(x.len());
    y.par_chunks_mut(t * d)
        .zip(x.par_chunks(t * d))
        .enumerate()
        .for_each(|(b, (y, x))| {
            let at = b * affine.stride;
            let (scale, shift) = (&affine.scale[at..at + d], &affine.shift[at..at + d]);
            simd(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                        let (mean, rstd) = moments(x, eps);
                        for i in 0..d {
                            y[i] = (x[i] - mean) * rstd * (affine.base + scale[i]) + shift[i];
                        }
                    }
                },
            );
        });
    y
}

/// Gradients of [`layer_norm`]: dx, and (dscale, dshift) per group written at `places` into rows of
/// `stride` values (zero elsewhere).
pub(crate) fn layer_norm_backward(
    dy: &[f32],
    x: &[f32],
    affine: &Affine<'_>,
    eps: f32,
    (t, d): (usize, usize),
    (scale_at, shift_at): (usize, usize),
    stride: usize,
) -> (Vec<f32>, Vec<f32>) {
    let groups = x.len().div_ceil(t * d);
    let mut dx = unwritten(x.len());
    let mut daffine = vec![0f32; groups * stride];
    dx.par_chunks_mut(t * d)
        .zip(daffine.par_chunks_mut(stride))
        .enumerate()
        .for_each(|(b, (dx, daffine))| {
            let rows = b * t * d..((b + 1) * t * d).min(x.len()); // the last group may be short
            let (x, dy) = (&x[rows.clone()], &dy[rows]);
            let scale = &affine.scale[b * affine.stride..b * affine.stride + d];
            let mut dscale = vec![0f32; d];
            let mut dshift = vec![0f32; d];
            let mut x_hat = vec![0f32; d];
            let mut dx_hat = vec![0f32; d];
            simd(
                #[inline(always)]
                || {
                    for ((dx, x), dy) in dx
                        .chunks_exact_mut(d)
                        .zip(x.chunks_exact(d))
                        .zip(dy.chunks_exact(d))
                    {
                        let (mean, rstd) = moments(x, eps);
                        for i in 0..d {
                            x_hat[i] = (x[i] - mean) * rstd;
                            dx_hat[i] = dy[i] * (affine.base + scale[i]);
                            dscale[i] += dy[i] * x_hat[i];
                            dshift[i] += dy[i];
                        }
                        let mean_dx_hat = sum(&dx_hat) / d as f32;
                        let mean_dot = dot(&dx_hat, &x_hat) / d as f32;
                        for i in 0..d {
                            dx[i] = rstd * (dx_hat[i] - mean_dx_hat - x_hat[i] * mean_dot);
                        }
                    }
                },
            );
            daffine[scale_at..scale_at + d].copy_from_slice(&dscale);
            daffine[shift_at..shift_at + d].copy_from_slice(&dshift);
        });
    (dx, daffine)
}
