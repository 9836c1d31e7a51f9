use rayon::prelude::*;

use super::matmul::Into;
use super::{GRAIN, exp, simd, unwritten};

/// √(2/π) and the cubic coefficient of the tanh form of GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415).
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// GELU-tanh: 0.5·x·(1 + tanh u) = x·σ(2u) with u = √(2/π)·(x + 0.044715·x³).
#[inline(always)]
fn gelu_one(x: f32) -> f32 {
    let u = SQRT_2_OVER_PI * (x + CUBIC * x * x * x);
    x / (1.0 + exp(-2.0 * u))
}

/// d GELU-tanh / dx = σ(2u) + x·σ(2u)·(1 − σ(2u))·2u′.
#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    let u = SQRT_2_OVER_PI * (x + CUBIC * x * x * x);
    let du = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
    let s = 1.0 / (1.0 + exp(-2.0 * u));
    s + x * s * (1.0 - s) * 2.0 * du
}

/// Φ(x) = erfc(−x/√2)/2, the normal distribution function, to 1.2e-7 of its value, the lower tail included: Chebyshev
/// fit of erfc (Press et al., Numerical Recipes, §6.2, `erfcc`).
#[inline(always)]
fn normal_cdf(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * z);
    let mut p = 0.170_872_77;
    p = p * t - 0.822_152_23;
    p = p * t + 1.488_515_9;
    p = p * t - 1.135_204;
    p = p * t + 0.278_868_08;
    p = p * t - 0.186_288_06;
    p = p * t + 0.096_784_18;
    p = p * t + 0.374_091_96;
    p = p * t + 1.000_023_7;
    let tail = 0.5 * t * exp(p * t - 1.265_512_2 - z * z);
    if x >= 0.0 { 1.0 - tail } else { tail }
}

/// Exact GELU: x·Φ(x).
#[inline(always)]
fn gelu_erf_one(x: f32) -> f32 {
    x * normal_cdf(x)
}

/// d GELU / dx = Φ(x) + x·φ(x) with the normal density φ.
#[inline(always)]
fn gelu_erf_slope(x: f32) -> f32 {
    /// 1/√(2π)
    const DENSITY_AT_0: f32 = 0.398_942_3;
    normal_cdf(x) + x * DENSITY_AT_0 * exp(-0.5 * x * x)
}

/// SiLU: x·σ(x).
#[inline(always)]
fn silu_one(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[inline(always)]
fn silu_slope(x: f32) -> f32 {
    let s = 1.0 / (1.0 + exp(-x));
    s * (1.0 + x * (1.0 - s))
}

/// An activation with its derivative.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Act {
    GeluTanh,
    GeluErf,
    Silu,
}

/// y = act(x).
pub(crate) fn act(kind: Act, x: &[f32]) -> Vec<f32> {
    let mut y = unwritten(x.len());
    y.par_chunks_mut(GRAIN)
        .zip(x.par_chunks(GRAIN))
        .for_each(|(y, x)| {
            simd(
                #[inline(always)]
                || match kind {
                    Act::GeluTanh => y.iter_mut().zip(x).for_each(|(y, &x)| *y = gelu_one(x)),
                    Act::GeluErf => y.iter_mut().zip(x).for_each(|(y, &x)| *y = gelu_erf_one(x)),
                    Act::Silu => y.iter_mut().zip(x).for_each(|(y, &x)| *y = silu_one(x)),
                },
            );
        });
    y
}

/// dx = dy·act′(x).
pub(crate) fn act_backward(kind: Act, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let mut dx = unwritten(x.len());
    dx.par_chunks_mut(GRAIN)
        .zip(x.par_chunks(GRAIN))
        .zip(dy.par_chunks(GRAIN))
        .for_each(|((dx, x), dy)| {
            simd(
                #[inline(always)]
                || match kind {
                    Act::GeluTanh => {
                        for i in 0..x.len() {
                            dx[i] = dy[i] * gelu_slope(x[i]);
                        }
                    }
                    Act::GeluErf => {
                        for i in 0..x.len() {
                            dx[i] = dy[i] * gelu_erf_slope(x[i]);
                        }
                    }
                    Act::Silu => {
                        for i in 0..x.len() {
                            dx[i] = dy[i] * silu_slope(x[i]);
                        }
                    }
                },
            );
        });
    dx
}

/// x + y.
pub(crate) fn add(x: &[f32], y: &[f32]) -> Vec<f32> {
    let mut out = unwritten(x.len());
    out.par_chunks_mut(GRAIN)
        .zip(x.par_chunks(GRAIN))
        .zip(y.par_chunks(GRAIN))
        .for_each(|((out, x), y)| {
            for i in 0..x.len() {
                out[i] = x[i] + y[i];
            }
        });
    out
}

/// Every row of a (rows, cols) matrix set to `bias`.
pub(crate) fn broadcast_rows(bias: &[f32], rows: usize) -> Vec<f32> {
    let cols = bias.len();
    let mut out = Vec::with_capacity(rows * cols);
    for _ in 0..rows {
        out.extend_from_slice(bias);
    }
    out
}

/// Column sums of a matrix whose rows are as long as `total`.
pub(crate) fn sum_rows(x: &[f32], total: &mut [f32], into: Into) {
    if into == Into::Overwrite {
        total.fill(0.0);
    }
    simd(
        #[inline(always)]
        || {
            for row in x.chunks_exact(total.len()) {
                for (t, v) in total.iter_mut().zip(row) {
                    *t += v;
                }
            }
        },
    );
}

/// out[b, t, :] = x[b, t, :] + gate[b, :]·y[b, t, :].
///
/// `gate` row b starts at `b·gate_stride`.
pub(crate) fn gated_residual(
    x: &[f32],
    y: &[f32],
    gate: &[f32],
    gate_stride: usize,
    t: usize,
    d: usize,
) -> Vec<f32> {
    let mut out = unwritten(x.len());
    out.par_chunks_mut(t * d).enumerate().for_each(|(b, out)| {
        let at = b * t * d;
        let (x, y) = (&x[at..at + t * d], &y[at..at + t * d]);
        let g = &gate[b * gate_stride..b * gate_stride + d];
        simd(
            #[inline(always)]
            || {
                for ((out, x), y) in out
                    .chunks_exact_mut(d)
                    .zip(x.chunks_exact(d))
                    .zip(y.chunks_exact(d))
                {
                    for i in 0..d {
                        out[i] = x[i] + g[i] * y[i];
                    }
                }
            },
        );
    });
    out
}

/// Gradients of [`gated_residual`] for y (B, T, D) and for the gate, the latter written into rows of
/// `dgate_stride` values (zero elsewhere) starting at `dgate_at`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn gated_residual_backward(
    dout: &[f32],
    y: &[f32],
    gate: &[f32],
    gate_stride: usize,
    dgate_at: usize,
    dgate_stride: usize,
    t: usize,
    d: usize,
) -> (Vec<f32>, Vec<f32>) {
    let batch = dout.len() / (t * d);
    let mut dy = unwritten(y.len());
    let mut dgate = vec![0f32; batch * dgate_stride];
    dy.par_chunks_mut(t * d)
        .zip(dgate.par_chunks_mut(dgate_stride))
        .enumerate()
        .for_each(|(b, (dy, dgate))| {
            let at = b * t * d;
            let (dout, y) = (&dout[at..at + t * d], &y[at..at + t * d]);
            let g = &gate[b * gate_stride..b * gate_stride + d];
            let dg = &mut dgate[dgate_at..dgate_at + d];
            simd(
                #[inline(always)]
                || {
                    for ((dy, dout), y) in dy
                        .chunks_exact_mut(d)
                        .zip(dout.chunks_exact(d))
                        .zip(y.chunks_exact(d))
                    {
                        for i in 0..d {
                            dy[i] = g[i] * dout[i];
                            dg[i] += dout[i] * y[i];
                        }
                    }
                },
            );
        });
    (dy, dgate)
}

/// Where shift and scale stand in a row of a packed projection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunks {
    pub(crate) shift: usize,
    pub(crate) scale: usize,
    /// Values of a row of the projection.
    pub(crate) width: usize,
    /// Values of a row of x.
    pub(crate) d: usize,
}

impl Chunks {
    /// Rows that one task works on.
    fn rows(self) -> usize {
        (GRAIN / self.d).max(1)
    }
}

/// y = x·(1 + scale) + shift, row by row.
pub(crate) fn modulate(x: &[f32], m: &[f32], c: Chunks) -> Vec<f32> {
    let mut y = unwritten(x.len());
    y.par_chunks_mut(c.rows() * c.d)
        .zip(x.par_chunks(c.rows() * c.d))
        .zip(m.par_chunks(c.rows() * c.width))
        .for_each(|((y, x), m)| {
            simd(
                #[inline(always)]
                || {
                    let rows = y.chunks_exact_mut(c.d).zip(x.chunks_exact(c.d));
                    for ((y, x), m) in rows.zip(m.chunks_exact(c.width)) {
                        let (shift, scale) = (&m[c.shift..][..c.d], &m[c.scale..][..c.d]);
                        for i in 0..c.d {
                            y[i] = x[i] * (1.0 + scale[i]) + shift[i];
                        }
                    }
                },
            );
        });
    y
}

/// Gradients of [`modulate`]: dx, and dm in rows of the projection's width (zero in its other chunks).
pub(crate) fn modulate_backward(
    dy: &[f32],
    x: &[f32],
    m: &[f32],
    c: Chunks,
) -> (Vec<f32>, Vec<f32>) {
    let (mut dx, mut dm) = (unwritten(x.len()), vec![0f32; m.len()]);
    dx.par_chunks_mut(c.rows() * c.d)
        .zip(dm.par_chunks_mut(c.rows() * c.width))
        .enumerate()
        .for_each(|(task, (dx, dm))| {
            let first = task * c.rows();
            let (x, dy, m) = (&x[first * c.d..], &dy[first * c.d..], &m[first * c.width..]);
            simd(
                #[inline(always)]
                || {
                    let rows = dx.chunks_exact_mut(c.d).zip(dm.chunks_exact_mut(c.width));
                    let given = x.chunks_exact(c.d).zip(dy.chunks_exact(c.d));
                    for ((dx, dm), ((x, dy), m)) in rows.zip(given.zip(m.chunks_exact(c.width))) {
                        let scale = &m[c.scale..][..c.d];
                        for i in 0..c.d {
                            dx[i] = dy[i] * (1.0 + scale[i]);
                        }
                        dm[c.shift..][..c.d].copy_from_slice(dy);
                        let dscale = &mut dm[c.scale..][..c.d];
                        for i in 0..c.d {
                            dscale[i] = dy[i] * x[i];
                        }
                    }
                },
            );
        });
    (dx, dm)
}
