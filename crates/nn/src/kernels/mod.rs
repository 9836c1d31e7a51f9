//! The arithmetic of the fused operations, on plain slices: no tensors, no autograd.
//!
//! Every kernel is compiled for the vector width found at run time ([`simd`]) and splits its work
//! over rayon's current pool, so a caller that already runs one sample per thread gets serial kernels.

pub(crate) mod attention;
pub(crate) mod conv;
pub(crate) mod dropout;
pub(crate) mod elementwise;
pub(crate) mod group_norm;
pub(crate) mod matmul;
pub(crate) mod norm;

use pulp::{Arch, Simd, WithSimd};

struct Vectorized<F>(F);

impl<F: FnOnce() -> R, R> WithSimd for Vectorized<F> {
    type Output = R;
    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> R {
        (self.0)()
    }
}

/// Runs `f` compiled for the widest vectors this CPU has (AVX-512, AVX2 or the baseline).
///
/// What `f` calls must be `#[inline(always)]` to be compiled with it.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(Vectorized(f))
}

/// A buffer of `n` values, every one of which the caller writes before any is read.
///
/// Zeroing first took a tenth of a training step. Debug builds fill it with NaN, so that a test sees
/// any value that a kernel forgot.
#[allow(unsafe_code, clippy::uninit_vec)]
pub(crate) fn unwritten(n: usize) -> Vec<f32> {
    if cfg!(debug_assertions) {
        return vec![f32::NAN; n];
    }
    let mut buffer = Vec::with_capacity(n);
    // SAFETY: the capacity is n, every bit pattern is an f32, and the callers (all in this crate) write all n
    // values before they read one or hand the buffer out.
    unsafe { buffer.set_len(n) };
    buffer
}

/// Values per parallel task: below this, splitting costs more than it saves.
pub(crate) const GRAIN: usize = 16 * 1024;

/// Lanes of the reductions: partial sums that the compiler can keep in vector registers.
const LANES: usize = 16;

/// Σ aᵢ
#[inline(always)]
pub(crate) fn sum(a: &[f32]) -> f32 {
    let mut acc = [0f32; LANES];
    let chunks = a.chunks_exact(LANES);
    let tail: f32 = chunks.remainder().iter().sum();
    for c in chunks {
        for l in 0..LANES {
            acc[l] += c[l];
        }
    }
    acc.iter().sum::<f32>() + tail
}

/// Σ aᵢ·bᵢ
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0f32; LANES];
    let (ca, cb) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = ca
        .remainder()
        .iter()
        .zip(cb.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in ca.zip(cb) {
        for l in 0..LANES {
            acc[l] += x[l] * y[l];
        }
    }
    acc.iter().sum::<f32>() + tail
}

/// eˣ to about one unit in the last place, in a form the compiler vectorises (Cody–Waite reduction
/// and the Cephes polynomial). Saturates instead of overflowing.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // 1.5·2²³: adding it rounds to an integer and leaves that integer in the low mantissa bits.
    const MAGIC: f32 = 12_582_912.0;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = x - n * LN2_HI - n * LN2_LO;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let y = p * r * r + r + 1.0;
    let two_n = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    y * two_n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_to_a_few_ulp() {
        let mut worst = 0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - want) / want).abs());
        }
        assert!(worst < 2.5e-7, "{worst}");
    }

    #[test]
    fn reductions_agree_with_f64() {
        let a: Vec<f32> = (0..77).map(|i| (i as f32 * 0.37).sin()).collect();
        let b: Vec<f32> = (0..77).map(|i| (i as f32 * 0.11).cos()).collect();
        let want: f64 = a
            .iter()
            .zip(&b)
            .map(|(x, y)| f64::from(*x) * f64::from(*y))
            .sum();
        assert!(
            (f64::from(simd(
                #[inline(always)]
                || dot(&a, &b)
            )) - want)
                .abs()
                < 1e-5
        );
        let want: f64 = a.iter().map(|x| f64::from(*x)).sum();
        assert!(
            (f64::from(simd(
                #[inline(always)]
                || sum(&a)
            )) - want)
                .abs()
                < 1e-5
        );
    }
}
