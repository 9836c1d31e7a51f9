use rayon::prelude::*;

use super::{GRAIN, simd, unwritten};

/// Which values are dropped, as a function of a key and a place: no mask is kept between forward and backward.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Drop {
    /// A value is dropped where its 32 random bits are below this.
    pub(crate) threshold: u32,
    /// 1/(1 − rate), by which kept values are multiplied.
    pub(crate) scale: f32,
}

impl Drop {
    /// 0 for a dropped value, 1/(1 − rate) for a kept one.
    #[inline(always)]
    pub(crate) fn factor(self, key: u64, place: u64) -> f32 {
        let bits = (mix(key.wrapping_add(place.wrapping_mul(GOLDEN))) >> 32) as u32;
        if bits >= self.threshold {
            self.scale
        } else {
            0.0
        }
    }

    /// x times its factors, for values at `first`, first + 1, … of the sample with that key, in place.
    #[inline(always)]
    pub(crate) fn apply(self, x: &mut [f32], key: u64, first: usize) {
        for (place, x) in (first as u64..).zip(x) {
            *x *= self.factor(key, place);
        }
    }
}

/// 2⁶⁴ over the golden ratio, odd: the step of SplitMix64.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64 (Steele, Lea & Flood 2014).
#[inline(always)]
pub(crate) fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(GOLDEN);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// x (B, n) with the values of sample b dropped by its key.
pub(crate) fn dropout(x: &[f32], keys: &[u64], drop: Drop) -> Vec<f32> {
    let n = x.len() / keys.len().max(1);
    let mut y = unwritten(x.len());
    for ((y, x), &key) in y
        .chunks_exact_mut(n.max(1))
        .zip(x.chunks_exact(n.max(1)))
        .zip(keys)
    {
        let parts = y.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN));
        parts.enumerate().for_each(|(part, (y, x))| {
            simd(
                #[inline(always)]
                || {
                    y.copy_from_slice(x);
                    drop.apply(y, key, part * GRAIN);
                },
            );
        });
    }
    y
}
