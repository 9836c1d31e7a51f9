use rayon::prelude::*;

use super::dropout::Drop;
use super::matmul::{Into, Mat, matmul};
use super::{dot, exp, simd, sum, unwritten};

/// Query rows worked on at a time. The T×T matrix is never there: only this many of its rows, which stay in the
/// cache (128 rows of 256 values are 128 KiB).
const ROWS: usize = 128;

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
    /// `rows` rows from `first` of `part` (0 = q, 1 = k, 2 = v) of one head, as a view into one sample's (T, 3, H, E).
    fn part<'a>(
        &self,
        qkv: &'a [f32],
        part: usize,
        head: usize,
        first: usize,
        rows: usize,
    ) -> Mat<'a> {
        let stride = 3 * self.width();
        let at = first * stride + part * self.width() + head * self.e;
        Mat::strided(&qkv[at..], rows, self.e, stride)
    }
    /// The whole (T, E) of a part.
    fn whole<'a>(&self, qkv: &'a [f32], part: usize, head: usize) -> Mat<'a> {
        self.part(qkv, part, head, 0, self.t)
    }
    /// Blocks of query rows: (first, rows).
    fn blocks(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.t)
            .step_by(ROWS)
            .map(move |first| (first, ROWS.min(self.t - first)))
    }
    /// Values of a block of probabilities.
    fn block_len(&self) -> usize {
        ROWS.min(self.t) * self.t
    }
}

/// Dropout of the probabilities of one head of one sample.
#[derive(Debug, Clone, Copy)]
struct HeadDrop {
    drop: Drop,
    key: u64,
    head: usize,
}

impl HeadDrop {
    /// Of head `head` of sample `b`, if anything is dropped.
    fn of(dropout: Dropped<'_>, b: usize, head: usize) -> Option<Self> {
        dropout.map(|(drop, keys)| Self {
            drop,
            key: keys[b],
            head,
        })
    }

    /// Drops from p (rows, T), the query rows from `first`: index ((head·T) + row)·T + column of the sample.
    #[inline(always)]
    fn apply(self, p: &mut [f32], first: usize, t: usize) {
        simd(
            #[inline(always)]
            || self.drop.apply(p, self.key, (self.head * t + first) * t),
        );
    }
}

/// What is dropped, and every sample's key.
pub(crate) type Dropped<'a> = Option<(Drop, &'a [u64])>;

/// p (rows, T) ← softmax over the last axis of scale·q·kᵀ, for the query rows from `first`.
#[inline(always)]
fn probabilities(p: &mut [f32], qkv: &[f32], head: usize, (first, rows): (usize, usize), s: Shape) {
    let (q, k) = (s.part(qkv, 0, head, first, rows), s.whole(qkv, 1, head));
    matmul(p, s.t, Into::Overwrite, s.scale(), q, k.t());
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

/// out (T, E), its rows `stride` apart, of one head of one sample. `p` is scratch of [`Shape::block_len`].
fn head_forward(
    (out, stride): (&mut [f32], usize),
    qkv: &[f32],
    head: usize,
    s: Shape,
    p: &mut [f32],
    dropout: Option<HeadDrop>,
) {
    for (first, rows) in s.blocks() {
        let p = &mut p[..rows * s.t];
        probabilities(p, qkv, head, (first, rows), s);
        if let Some(dropout) = dropout {
            dropout.apply(p, first, s.t);
        }
        let (p, v) = (Mat::new(p, rows, s.t), s.whole(qkv, 2, head));
        matmul(
            &mut out[first * stride..],
            stride,
            Into::Overwrite,
            1.0,
            p,
            v,
        );
    }
}

/// dQ, dK, dV (T, E) of one head of one sample, at `at` in `d` with rows `stride` apart; dO likewise (T, E) in `dout`.
///
/// With P the probabilities, O = P·V and S the scaled scores: dV = Pᵀ·dO, dP = dO·Vᵀ,
/// dS = P∘(dP − rowsum(P∘dP)), dQ = dS·K/√E, dK = dSᵀ·Q/√E. Where P is dropped by the factors M, O = (P∘M)·V: then
/// dV = (P∘M)ᵀ·dO and dP = (dO·Vᵀ)∘M.
fn head_backward(
    (d, at, stride): (&mut [f32], [usize; 3], usize),
    dout: &[f32],
    qkv: &[f32],
    head: usize,
    s: Shape,
    (p, dp): (&mut [f32], &mut [f32]),
    dropout: Option<HeadDrop>,
) {
    for (first, rows) in s.blocks() {
        let (p, dp) = (&mut p[..rows * s.t], &mut dp[..rows * s.t]);
        let into = if first == 0 {
            Into::Overwrite
        } else {
            Into::Accumulate
        };
        let do_rows = Mat::strided(
            &dout[first * s.width() + head * s.e..],
            rows,
            s.e,
            s.width(),
        );
        probabilities(p, qkv, head, (first, rows), s);
        let kept: &[f32] = match dropout {
            None => p,
            Some(dropout) => {
                dp.copy_from_slice(p);
                dropout.apply(dp, first, s.t);
                dp
            }
        };
        matmul(
            &mut d[at[2]..],
            stride,
            into,
            1.0,
            Mat::new(kept, rows, s.t).t(),
            do_rows,
        );
        matmul(
            dp,
            s.t,
            Into::Overwrite,
            1.0,
            do_rows,
            s.whole(qkv, 2, head).t(),
        );
        if let Some(dropout) = dropout {
            dropout.apply(dp, first, s.t);
        }
        simd(
            #[inline(always)]
            || {
                for (dp, p) in dp.chunks_exact_mut(s.t).zip(p.chunks_exact(s.t)) {
                    let mean = dot(dp, p);
                    for i in 0..s.t {
                        dp[i] = p[i] * (dp[i] - mean);
                    }
                }
            },
        );
        let ds = Mat::new(dp, rows, s.t);
        let dq = &mut d[at[0] + first * stride..];
        matmul(
            dq,
            stride,
            Into::Overwrite,
            s.scale(),
            ds,
            s.whole(qkv, 1, head),
        );
        let q = s.part(qkv, 0, head, first, rows);
        matmul(&mut d[at[1]..], stride, into, s.scale(), ds.t(), q);
    }
}

/// softmax(q·kᵀ/√E)·v for every head: qkv (B, T, 3, H, E) → (B, T, H·E).
///
/// Samples run in parallel; where there are more threads than samples, heads do, each into a buffer of its own.
pub(crate) fn attention(qkv: &[f32], s: Shape, dropout: Dropped<'_>) -> Vec<f32> {
    let (t, e, d) = (s.t, s.e, s.width());
    let mut out = unwritten(qkv.len() / 3);
    let samples = out.par_chunks_mut(t * d).zip(qkv.par_chunks(3 * t * d));
    let samples = samples.enumerate();
    if rayon::current_num_threads() <= samples.len() {
        samples.for_each_init(
            || unwritten(s.block_len()),
            |p, (b, (out, qkv))| {
                for h in 0..s.heads {
                    let dropout = HeadDrop::of(dropout, b, h);
                    head_forward((&mut out[h * e..], d), qkv, h, s, p, dropout);
                }
            },
        );
        return out;
    }
    samples.for_each(|(b, (out, qkv))| {
        let heads = (0..s.heads).into_par_iter().map(|h| {
            let mut own = unwritten(t * e);
            let (mut p, dropout) = (unwritten(s.block_len()), HeadDrop::of(dropout, b, h));
            head_forward((&mut own, e), qkv, h, s, &mut p, dropout);
            own
        });
        for (h, own) in heads.collect::<Vec<_>>().iter().enumerate() {
            put_head(out, d, h * e, own, e);
        }
    });
    out
}

/// Gradient of [`attention`] for the packed qkv. Probabilities are computed again.
pub(crate) fn attention_backward(
    dout: &[f32],
    qkv: &[f32],
    s: Shape,
    dropout: Dropped<'_>,
) -> Vec<f32> {
    let (t, e, d) = (s.t, s.e, s.width());
    let mut dqkv = unwritten(qkv.len());
    let samples = dqkv
        .par_chunks_mut(3 * t * d)
        .zip(qkv.par_chunks(3 * t * d))
        .zip(dout.par_chunks(t * d))
        .enumerate();
    let scratch = || (unwritten(s.block_len()), unwritten(s.block_len()));
    if rayon::current_num_threads() <= samples.len() {
        samples.for_each_init(scratch, |(p, dp), (b, ((dqkv, qkv), dout))| {
            for h in 0..s.heads {
                let at = [0, 1, 2].map(|part| part * d + h * e);
                let dropout = HeadDrop::of(dropout, b, h);
                head_backward((dqkv, at, 3 * d), dout, qkv, h, s, (p, dp), dropout);
            }
        });
        return dqkv;
    }
    samples.for_each(|(b, ((dqkv, qkv), dout))| {
        let heads = (0..s.heads).into_par_iter().map(|h| {
            let mut own = unwritten(3 * t * e); // (3, T, E)
            let (mut p, mut dp) = scratch();
            let at = [0, t * e, 2 * t * e];
            let dropout = HeadDrop::of(dropout, b, h);
            let scratch = (&mut p[..], &mut dp[..]);
            head_backward((&mut own, at, e), dout, qkv, h, s, scratch, dropout);
            own
        });
        for (h, own) in heads.collect::<Vec<_>>().iter().enumerate() {
            for (part, own) in own.chunks_exact(t * e).enumerate() {
                put_head(dqkv, 3 * d, part * d + h * e, own, e);
            }
        }
    });
    dqkv
}

/// Copies rows of `e` values to column `at` of rows of `stride` values.
fn put_head(to: &mut [f32], stride: usize, at: usize, own: &[f32], e: usize) {
    for (to, own) in to.chunks_exact_mut(stride).zip(own.chunks_exact(e)) {
        to[at..at + e].copy_from_slice(own);
    }
}
