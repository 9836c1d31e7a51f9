use rayon::prelude::*;

use super::{exp, simd, sum, unwritten};

/// Values summed in f32 before the sum goes on in f64: a group of an image has up to millions of values.
const PIECE: usize = 4096;

/// How GroupNorm divides x (B, C, P), and what follows it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Channels of a group.
    pub(crate) channels: usize,
    /// Groups of a sample.
    pub(crate) groups: usize,
    /// Pixels of a channel.
    pub(crate) pixels: usize,
    pub(crate) eps: f64,
    /// Whether SiLU follows.
    pub(crate) silu: bool,
}

/// Mean and 1/√(var + ε) of a group (biased variance).
#[inline(always)]
fn moments(x: &[f32], eps: f64) -> (f32, f32) {
    let n = x.len() as f64;
    let mean = x.chunks(PIECE).map(|x| f64::from(sum(x))).sum::<f64>() / n;
    // Two passes: the difference of squares loses digits when |mean| is large against σ.
    let centre = mean as f32;
    let var = x
        .chunks(PIECE)
        .map(|x| f64::from(squares(x, centre)))
        .sum::<f64>()
        / n;
    (centre, (1.0 / (var + eps).sqrt()) as f32)
}

/// Σ (xᵢ − mean)²
#[inline(always)]
fn squares(x: &[f32], mean: f32) -> f32 {
    let mut acc = [0f32; 16];
    let (chunks, tail) = x.as_chunks::<16>();
    for c in chunks {
        for l in 0..16 {
            acc[l] += (c[l] - mean) * (c[l] - mean);
        }
    }
    let tail: f32 = tail.iter().map(|v| (v - mean) * (v - mean)).sum();
    acc.iter().sum::<f32>() + tail
}

/// GroupNorm of x (B, G·c, P) with weight and bias (G·c), one group after the other on every core.
pub(crate) fn group_norm(x: &[f32], weight: &[f32], bias: &[f32], s: Shape) -> Vec<f32> {
    let mut y = unwritten(x.len());
    let group = s.channels * s.pixels;
    y.par_chunks_mut(group)
        .zip(x.par_chunks(group))
        .enumerate()
        .for_each(|(i, (y, x))| {
            let first = i % s.groups * s.channels;
            simd(
                #[inline(always)]
                || {
                    let (mean, inv) = moments(x, s.eps);
                    let planes = y.chunks_exact_mut(s.pixels).zip(x.chunks_exact(s.pixels));
                    for (c, (y, x)) in planes.enumerate() {
                        let (a, b) = (inv * weight[first + c], bias[first + c]);
                        if s.silu {
                            for (y, x) in y.iter_mut().zip(x) {
                                let v = (x - mean) * a + b;
                                *y = v / (1.0 + exp(-v));
                            }
                        } else {
                            for (y, x) in y.iter_mut().zip(x) {
                                *y = (x - mean) * a + b;
                            }
                        }
                    }
                },
            );
        });
    y
}
