use rayon::prelude::*;

use super::matmul::{Into, Mat, matmul};
use super::{dot, exp, simd, sum, unwritten};

/// Sizes of a packed qkv (B, T, 3, H, E) with E values per head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) t: usize,
    pub(crate) heads: usize,
    pub(crate) e: usize,
}

impl Shape {
    fn width(&self) -> usize {
        self.heads * self.e
    }
    /// 1/√E
    fn scale(&self) -> f32 {
        1.0 / (self.e as f32).sqrt()
    }
    /// Rows of `part` (0 = q, 1 = k, 2 = v) of one head: a (T, E) view into one sample's (T, 3, H, E).
    fn head<'a>(&self, qkv: &'a [f32], part: usize, head: usize) -> Mat<'a> {
        Mat::strided(
            &qkv[self.at(part, head)..],
            self.t,
            self.e,
            3 * self.width(),
        )
    }
    fn at(&self, part: usize, head: usize) -> usize {
        part * self.width() + head * self.e
    }
}

/// p (T, T) ← softmax over the last axis of scale·q·kᵀ, for one head.
#[inline(always)]
fn probabilities(p: &mut [f32], qkv: &[f32], head: usize, s: Shape) {
    matmul(
        p,
        s.t,
        Into::Overwrite,
        s.scale(),
        s.head(qkv, 0, head),
        s.head(qkv, 1, head).t(),
    );
    simd(
        #[inline(always)]
        || {
            for row in p.chunks_exact_mut(s.t) {
                // Lane-wise maximum: order does not matter, so it vectorises.
                let mut lanes = [f32::NEG_INFINITY; 16];
                let chunks = row.chunks_exact(16);
                let tail = chunks
                    .remainder()
                    .iter()
                    .copied()
                    .fold(f32::NEG_INFINITY, f32::max);
                for c in chunks {
                    for l in 0..16 {
                        lanes[l] = if c[l] > lanes[l] { c[l] } else { lanes[l] };
                    }
                }
                let max = lanes.iter().copied().fold(tail, f32::max);
                row.iter_mut().for_each(|v| *v = exp(*v - max));
                let inv = 1.0 / sum(row);
                row.iter_mut().for_each(|v| *v *= inv);
            }
        },
    );
}

/// softmax(q·kᵀ/√E)·v for every head: qkv (B, T, 3, H, E) → (B, T, H·E).
///
/// The T×T matrix exists for one head at a time; backward computes it again.
pub(crate) fn attention(qkv: &[f32], s: Shape) -> Vec<f32> {
    let (t, d) = (s.t, s.width());
    let mut out = unwritten(qkv.len() / 3);
    out.par_chunks_mut(t * d)
        .zip(qkv.par_chunks(3 * t * d))
        .for_each_init(
            || unwritten(t * t),
            |p, (out, qkv)| {
                for h in 0..s.heads {
                    probabilities(p, qkv, h, s);
                    matmul(
                        &mut out[h * s.e..],
                        d,
                        Into::Overwrite,
                        1.0,
                        Mat::new(p, t, t),
                        s.head(qkv, 2, h),
                    );
                }
            },
        );
    out
}

/// Gradient of [`attention`] for the packed qkv.
///
/// With P the probabilities, O = P·V and S the scaled scores: dV = Pᵀ·dO, dP = dO·Vᵀ,
/// dS = P∘(dP − rowsum(P∘dP)), dQ = dS·K/√E, dK = dSᵀ·Q/√E.
pub(crate) fn attention_backward(dout: &[f32], qkv: &[f32], s: Shape) -> Vec<f32> {
    let (t, d) = (s.t, s.width());
    let mut dqkv = unwritten(qkv.len());
    dqkv.par_chunks_mut(3 * t * d)
        .zip(qkv.par_chunks(3 * t * d))
        .zip(dout.par_chunks(t * d))
        .for_each_init(
            || (unwritten(t * t), unwritten(t * t)),
            |(p, dp), ((dqkv, qkv), dout)| {
                for h in 0..s.heads {
                    let do_h = Mat::strided(&dout[h * s.e..], t, s.e, d);
                    probabilities(p, qkv, h, s);
                    matmul(
                        &mut dqkv[s.at(2, h)..],
                        3 * d,
                        Into::Overwrite,
                        1.0,
                        Mat::new(p, t, t).t(),
                        do_h,
                    );
                    matmul(dp, t, Into::Overwrite, 1.0, do_h, s.head(qkv, 2, h).t());
                    simd(
                        #[inline(always)]
                        || {
                            for (dp, p) in dp.chunks_exact_mut(t).zip(p.chunks_exact(t)) {
                                let mean = dot(dp, p);
                                for i in 0..t {
                                    dp[i] = p[i] * (dp[i] - mean);
                                }
                            }
                        },
                    );
                    let ds = Mat::new(dp, t, t);
                    matmul(
                        &mut dqkv[s.at(0, h)..],
                        3 * d,
                        Into::Overwrite,
                        s.scale(),
                        ds,
                        s.head(qkv, 1, h),
                    );
                    matmul(
                        &mut dqkv[s.at(1, h)..],
                        3 * d,
                        Into::Overwrite,
                        s.scale(),
                        ds.t(),
                        s.head(qkv, 0, h),
                    );
                }
            },
        );
    dqkv
}
