//! The embedded dataset: ten filled shapes, drawn on demand, endless.

mod config;
mod outline;
mod scene;

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tinyfusion_core::{LatentBatch, Result, StepRng};

pub use self::config::ShapesConfig;
pub use self::outline::CLASSES;
use self::scene::Scene;
use crate::Source;

/// Height and width of every image, in pixels.
pub const SIZE: usize = 32;

/// Values of one image: 3 channels of 32×32.
const VALUES: usize = 3 * SIZE * SIZE;

/// Which images: the two parts share no random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// For training.
    Train,
    /// For evaluation only.
    HeldOut,
}

impl Split {
    /// A stream apart from those of `tinyfusion_core::stream`, so that a picture never shares numbers
    /// with the noise that a training step of the same number and seed adds to it.
    fn stream(self) -> u64 {
        match self {
            Self::Train => u64::from_le_bytes(*b"shapes_t"),
            Self::HeldOut => u64::from_le_bytes(*b"shapes_h"),
        }
    }
}

/// A class-conditional set of 32×32 RGB images of filled shapes, anti-aliased, endless.
///
/// Image `i` of a seed, split and configuration is always the same, wherever and whenever it is
/// drawn. The class is uniformly random; see [`CLASSES`] for the names.
#[derive(Debug, Clone)]
pub struct Shapes {
    config: ShapesConfig,
    seed: u64,
    split: Split,
}

impl Shapes {
    /// The images of `seed` in `split`; an error if `config` does not make sense.
    pub fn new(config: ShapesConfig, seed: u64, split: Split) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            seed,
            split,
        })
    }

    /// Class id of image `index`, in 0..10.
    pub fn class(&self, index: u64) -> u32 {
        self.scene(index).class
    }

    /// Draws image `index` into `out`, (3, 32, 32) values in [-1, 1], and returns its class id.
    ///
    /// # Errors
    /// If `out` does not hold 3·32·32 values.
    pub fn draw(&self, index: u64, out: &mut [f32]) -> Result<u32> {
        if out.len() != VALUES {
            return Err(tinyfusion_core::Error::usage(format!(
                "an image of shapes has {VALUES} values (3, {SIZE}, {SIZE}); the buffer has {}",
                out.len()
            )));
        }
        let scene = self.scene(index);
        scene.paint(out);
        Ok(scene.class)
    }

    fn scene(&self, index: u64) -> Scene {
        Scene::draw(
            &self.config,
            StepRng::new(self.seed, index, self.split.stream()),
        )
    }
}

impl Source for Shapes {
    fn len(&self) -> Option<u64> {
        None
    }

    fn classes(&self) -> usize {
        CLASSES.len()
    }

    fn shape(&self) -> [usize; 3] {
        [3, SIZE, SIZE]
    }

    fn batch(&self, indices: &[u64]) -> Result<LatentBatch> {
        let mut pixels = vec![0f32; indices.len() * VALUES];
        let classes: Vec<u32> = pixels
            .par_chunks_exact_mut(VALUES)
            .zip(indices)
            .map(|(image, &index)| self.draw(index, image))
            .collect::<Result<_>>()?;
        Ok(LatentBatch {
            x: Tensor::from_vec(pixels, (indices.len(), 3, SIZE, SIZE), &Device::Cpu)?, // (B, 3, 32, 32)
            y: Tensor::from_vec(classes, indices.len(), &Device::Cpu)?,                 // (B,)
        })
    }
}

#[cfg(test)]
mod tests;
