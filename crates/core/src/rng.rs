use candle_core::{Device, Shape, Tensor};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::Result;

/// Names of the random streams, so that no two uses of a step share numbers.
pub mod stream {
    /// Initial weights.
    pub const INIT: u64 = 0;
    /// Order of the training samples.
    pub const ORDER: u64 = 1;
    /// Timesteps, noise and label drops of an objective.
    pub const DRAW: u64 = 2;
    /// Gumbel noise of the mask sampler.
    pub const MASK: u64 = 3;
    /// Augmentation.
    pub const AUGMENT: u64 = 4;
    /// Sampling of images.
    pub const SAMPLE: u64 = 5;
    /// Held-out evaluation and calibration.
    pub const HELD_OUT: u64 = 6;
    /// Random masks and other choices of a criterion.
    pub const CRITERION: u64 = 7;
    /// Noise and mirroring of latents that are stored.
    pub const ENCODE: u64 = 8;
}

/// Counter-based randomness: the numbers of (seed, step, stream) are always the same, on every
/// device and after every resume, whatever was drawn before.
#[derive(Debug, Clone)]
pub struct StepRng(ChaCha8Rng);

impl StepRng {
    /// The generator of one step of one stream (see [`stream`]).
    pub fn new(seed: u64, step: u64, stream: u64) -> Self {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&step.to_le_bytes());
        key[16..24].copy_from_slice(&stream.to_le_bytes());
        key[24..].copy_from_slice(b"tinyfusn");
        Self(ChaCha8Rng::from_seed(key))
    }

    /// Standard normal f32 values of `shape`, generated on the host.
    pub fn normal(&mut self, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        let values: Vec<f32> = (0..shape.elem_count())
            .map(|_| StandardNormal.sample(&mut self.0))
            .collect();
        Ok(Tensor::from_vec(values, shape, device)?)
    }

    /// Uniform values in [0, 1).
    pub fn uniform(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.0.random::<f64>()).collect()
    }

    /// Uniform integers in 0..bound.
    ///
    /// # Panics
    /// When `bound` is 0 and `n` is not: there is no such integer.
    pub fn below(&mut self, bound: usize, n: usize) -> Vec<usize> {
        (0..n).map(|_| self.0.random_range(0..bound)).collect()
    }

    /// Standard Gumbel values −ln(E), E ~ Exp(1), of `shape` in f32.
    pub fn gumbel(&mut self, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        let values: Vec<f32> = (0..shape.elem_count())
            // 1 − u is in (0, 1], so the logarithm is finite; its smallest positive value bounds the sample.
            .map(|_| {
                -(-(1.0 - self.0.random::<f64>()).ln())
                    .max(f64::MIN_POSITIVE)
                    .ln() as f32
            })
            .collect();
        Ok(Tensor::from_vec(values, shape, device)?)
    }

    /// A uniformly random order of 0..n (Fisher–Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.0.random_range(0..=i));
        }
        order
    }

    /// The generator itself, for distributions from other crates.
    pub fn inner(&mut self) -> &mut impl Rng {
        &mut self.0
    }
}
