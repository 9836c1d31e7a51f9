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
