//! Latents of a large image set: some packed files and an index, not a file for every image.

mod write;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, LatentBatch, Result, StepRng};

pub use self::write::{Damage, ShardWriter};
use super::{LatentType, PackedLatents, rows};
use crate::Source;

/// The index in a folder of shards.
pub const INDEX_FILE: &str = "latents.json";

/// What the index's `format` says.
const FORMAT: &str = "tinyfusion-latents/1";

/// What is stored of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LatentContent {
    /// Mean and logarithm of the variance of the VAE's posterior: every epoch draws a fresh latent.
    Moments,
    /// One latent, drawn once and scaled, as the public code stores it.
    Samples,
}

/// `latents.json`: what the shards hold, and how far they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentIndex {
    /// `tinyfusion-latents/1`.
    pub format: String,
    /// What is stored of an image.
    pub content: LatentContent,
    /// Whether the latents of the mirrored image are stored beside: mirroring a latent is not mirroring its image.
    pub flips: bool,
    /// (C, H, W) of a latent.
    pub shape: [usize; 3],
    /// Number of classes.
    pub classes: usize,
    /// What a latent is multiplied by for the network (0.18215 for Stable Diffusion's VAE); stored samples are
    /// scaled already, moments are not.
    pub scale: f64,
    /// How values are stored.
    pub dtype: LatentType,
    /// Images in all, also those that are still to come.
    pub images: u64,
    /// Images of a shard; the last has the rest.
    pub shard_images: u64,
    /// Where the latents came from: the hash of the VAE, that of the list of images, their size. Encoding goes on only
    /// where this is the same.
    #[serde(default)]
    pub origin: BTreeMap<String, String>,
    /// The shards that are whole, in order.
    #[serde(default)]
    pub shards: Vec<Shard>,
}

/// One packed file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// Its name in the folder.
    pub file: String,
    /// Images in it.
    pub images: u64,
}

impl LatentIndex {
    /// The index of a folder that has no shard yet. `shape` is (C, H, W) of a latent.
    pub fn new(content: LatentContent, shape: [usize; 3], classes: usize, images: u64) -> Self {
        Self {
            format: FORMAT.into(),
            content,
            flips: false,
            shape,
            classes,
            scale: 1.0,
            dtype: LatentType::F16,
            images,
            shard_images: 512,
            origin: BTreeMap::new(),
            shards: Vec::new(),
        }
    }

    /// Reads the index of a folder.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let path = folder.as_ref().join(INDEX_FILE);
        let wrong = |what: String| Error::file(&path, what);
        let text = fs::read_to_string(&path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
        let index: Self = serde_json::from_str(&text)
            .map_err(|e| wrong(format!("is no index of latents: {e}")))?;
        index.check().map_err(wrong)?;
        Ok(index)
    }

    /// Images that are encoded.
    pub fn written(&self) -> u64 {
        self.shards.iter().map(|s| s.images).sum()
    }

    /// Channels of a stored row: moments are two tensors, flips double them.
    fn channels(&self) -> usize {
        self.views() * self.parts() * self.shape[0]
    }

    fn views(&self) -> usize {
        if self.flips { 2 } else { 1 }
    }

    fn parts(&self) -> usize {
        match self.content {
            LatentContent::Moments => 2,
            LatentContent::Samples => 1,
        }
    }

    /// (V·P·C, H, W): the mean and log-variance of the image, then those of the mirrored one.
    pub fn row_shape(&self) -> [usize; 3] {
        let [_, h, w] = self.shape;
        [self.channels(), h, w]
    }

    /// Bytes of an image's row on disk.
    pub fn row_bytes(&self) -> usize {
        self.row_shape().iter().product::<usize>() * self.dtype.bytes()
    }

    /// Opens and checks one of its shards.
    fn open_shard(&self, folder: &Path, shard: &Shard) -> Result<PackedLatents> {
        let path = folder.join(&shard.file);
        let packed = PackedLatents::open(&path, Some(self.classes))?;
        let (found, expected) = (packed.shape(), self.row_shape());
        if found != expected || packed.len() != Some(shard.images) {
            return Err(Error::file(
                &path,
                format!(
                    "holds {} rows of {found:?}, but {INDEX_FILE} says {} of {expected:?}",
                    packed.y.len(),
                    shard.images
                ),
            ));
        }
        Ok(packed)
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.format != FORMAT {
            return Err(format!(
                "has the format `{}`, expected `{FORMAT}`",
                self.format
            ));
        }
        let sizes = [self.images, self.shard_images, self.classes as u64];
        let row = self.shape.iter().try_fold(4usize, |n, &s| n.checked_mul(s));
        if sizes.contains(&0) || !matches!(row, Some(1..)) {
            return Err(format!(
                "has {} images of shape {:?} in {} classes, {} to a shard; at least one of each is expected",
                self.images, self.shape, self.classes, self.shard_images
            ));
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return Err(format!(
                "has the scale {}, expected a number above 0",
                self.scale
            ));
        }
        let total = self
            .shards
            .iter()
            .try_fold(0u64, |n, s| n.checked_add(s.images));
        if total.is_none_or(|n| n > self.images) {
            return Err(format!(
                "has more images in its shards than the {} of the set",
                self.images
            ));
        }
        // A name from a file must not lead out of the folder.
        let plain = |file: &str| Path::new(file).file_name().is_some_and(|name| name == file);
        match self
            .shards
            .iter()
            .find(|s| s.images == 0 || !plain(&s.file))
        {
            Some(shard) => Err(format!(
                "names the shard `{}` of {} images; a file name and at least one image are expected",
                shard.file, shard.images
            )),
            None => Ok(()),
        }
    }
}

/// A folder of shards as one source: each shard is one open, memory-mapped file.
///
/// [`batch`](Source::batch) gives the posterior's mean of the image as it is; [`augmented`](Source::augmented) draws from
/// the posterior and mirrors half of the images, anew at every step.
#[derive(Debug)]
pub struct ShardedLatents {
    folder: PathBuf,
    index: LatentIndex,
    shards: Vec<PackedLatents>,
    /// First image of every shard.
    starts: Vec<usize>,
}

impl ShardedLatents {
    /// Opens and checks a folder.
    ///
    /// # Errors
    /// If the set is not encoded to its end, or a shard is missing, damaged, or not what the index says.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref().to_path_buf();
        let index = LatentIndex::read(&folder)?;
        if index.written() < index.images {
            return Err(Error::file(
                &folder,
                format!(
                    "has {} of {} images: run the command that encodes them again, it goes on where it stopped",
                    index.written(),
                    index.images
                ),
            ));
        }
        let (mut shards, mut starts, mut start) = (Vec::new(), Vec::new(), 0);
        for shard in &index.shards {
            let packed = index.open_shard(&folder, shard)?;
            starts.push(start);
            start += packed.y.len();
            shards.push(packed);
        }
        Ok(Self {
            folder,
            index,
            shards,
            starts,
        })
    }

    /// What the folder says of itself.
    pub fn index(&self) -> &LatentIndex {
        &self.index
    }

    /// The shard of image `row`, and its place there.
    fn place(&self, row: usize) -> (&PackedLatents, usize) {
        let shard = self.starts.partition_point(|start| *start <= row) - 1;
        (&self.shards[shard], row - self.starts[shard])
    }

    /// The images `indices`: of the mirrored view where `flipped` says so, with `noise` (B, C, H, W) or at the mean.
    fn draw(
        &self,
        indices: &[u64],
        flipped: &[usize],
        noise: Option<&Tensor>,
    ) -> Result<LatentBatch> {
        let rows = rows(&self.folder, self.index.images as usize, indices)?;
        let [c, h, w] = self.index.shape;
        let size = c * h * w;
        let mut x = match noise {
            Some(noise) => noise.flatten_all()?.to_vec1::<f32>()?,
            None => vec![0f32; rows.len() * size],
        };
        let view = self.index.parts() * size;
        let scale = self.index.scale as f32;
        let moments = self.index.content == LatentContent::Moments;
        // One scratch for each thread, none for each image.
        x.par_chunks_exact_mut(size)
            .zip(rows.par_iter().zip(flipped))
            .try_for_each_init(
                || vec![0f32; size],
                |scratch, (out, (&row, &flip))| {
                    let (shard, at) = self.place(row);
                    if !moments {
                        return shard.read_part(at, flip * view, out);
                    }
                    // x = (μ + σ ε) · scale, σ = exp(log σ² / 2), as in the VAE's DiagonalGaussianDistribution.
                    if noise.is_some() {
                        shard.read_part(at, flip * view + size, scratch)?;
                        for (value, logvar) in out.iter_mut().zip(&*scratch) {
                            *value *= (0.5 * logvar.clamp(-30.0, 20.0)).exp();
                        }
                    }
                    shard.read_part(at, flip * view, scratch)?;
                    for (value, mean) in out.iter_mut().zip(&*scratch) {
                        *value = (*value + mean) * scale;
                    }
                    Ok(())
                },
            )?;
        let label = |&row: &usize| {
            let (shard, at) = self.place(row);
            shard.y[at]
        };
        let y: Vec<u32> = rows.iter().map(label).collect();
        Ok(LatentBatch {
            x: Tensor::from_vec(x, (rows.len(), c, h, w), &Device::Cpu)?, // (B, C, H, W)
            y: Tensor::from_vec(y, rows.len(), &Device::Cpu)?,            // (B,)
        })
    }
}

impl Source for ShardedLatents {
    fn len(&self) -> Option<u64> {
        Some(self.index.images)
    }

    fn classes(&self) -> usize {
        self.index.classes
    }

    fn shape(&self) -> [usize; 3] {
        self.index.shape
    }

    fn batch(&self, indices: &[u64]) -> Result<LatentBatch> {
        self.draw(indices, &vec![0; indices.len()], None)
    }

    fn augmented(&self, indices: &[u64], rng: &mut StepRng) -> Result<LatentBatch> {
        let flipped = match self.index.flips {
            true => rng.below(2, indices.len()),
            false => vec![0; indices.len()],
        };
        let [c, h, w] = self.index.shape;
        let noise = match self.index.content {
            LatentContent::Moments => Some(rng.normal((indices.len(), c, h, w), &Device::Cpu)?),
            LatentContent::Samples => None,
        };
        self.draw(indices, &flipped, noise.as_ref())
    }
}

#[cfg(test)]
mod tests;
