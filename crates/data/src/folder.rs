//! Pictures on disk, one sub-folder per class.

mod resample;

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use image::{ImageReader, RgbImage};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tinyfusion_core::{Error, LatentBatch, Result, StepRng};

use crate::Source;

/// Endings (in lower case) of the files that count as pictures.
const ENDINGS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// Random change of a picture each time it is drawn for training.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Augment {
    /// None.
    #[default]
    Never,
    /// Mirrored left to right with probability one half, as in the reference's training on ImageNet.
    HorizontalFlip,
}

/// A folder of pictures: every sub-folder is a class, in alphabetical order; its pictures (png, jpg,
/// jpeg, webp, also in deeper folders) are the samples, sorted by path.
///
/// Pictures are read when they are needed, brought to size×size by [`center_crop`], and scaled to
/// [-1, 1]. Names that begin with a dot are left out.
#[derive(Debug, Clone)]
pub struct ImageFolder {
    root: PathBuf,
    classes: Vec<String>,
    files: Vec<(PathBuf, u32)>,
    size: usize,
    augment: Augment,
}

impl ImageFolder {
    /// Lists the pictures below `root`, to be read at size×size pixels.
    ///
    /// # Errors
    /// If the folder cannot be read, has no sub-folder, or a sub-folder has no picture.
    pub fn open(root: impl AsRef<Path>, size: usize, augment: Augment) -> Result<Self> {
        let root = root.as_ref();
        if size == 0 {
            return Err(Error::usage("image size = 0, expected at least 1 pixel"));
        }
        let (mut classes, mut files) = (Vec::new(), Vec::new());
        for folder in entries(root)?.into_iter().filter(|p| p.is_dir()) {
            let class = classes.len() as u32;
            let before = files.len();
            collect(&folder, class, &mut files)?;
            if files.len() == before {
                return Err(Error::file(
                    &folder,
                    format!(
                        "this class has no picture ({}); add some or remove the folder",
                        ENDINGS.join(", ")
                    ),
                ));
            }
            classes.push(name(&folder));
        }
        if classes.is_empty() {
            return Err(Error::file(
                root,
                "found no class: expected one sub-folder of pictures per class",
            ));
        }
        Ok(Self {
            root: root.to_path_buf(),
            classes,
            files,
            size,
            augment,
        })
    }

    /// Names of the classes (their folders); the class id is the position.
    pub fn class_names(&self) -> &[String] {
        &self.classes
    }

    /// The file of sample `index`.
    pub fn path(&self, index: u64) -> Option<&Path> {
        let index = usize::try_from(index).ok()?;
        self.files.get(index).map(|(path, _)| path.as_path())
    }

    /// SHA-256 of the list of pictures in lower-case hexadecimal: which number is which picture of which class. Where the
    /// folder stands, and what is in the pictures, is no part of it.
    pub fn listing_sha256(&self) -> String {
        let mut hash = Sha256::new();
        for (path, _) in &self.files {
            let name = path.strip_prefix(&self.root).unwrap_or(path); // its first part is the class
            for part in name {
                hash.update(part.as_encoded_bytes());
                hash.update(b"/");
            }
            hash.update(b"\n");
        }
        let bytes = hash.finalize();
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn load(
        &self,
        indices: &[u64],
        mirrored: impl Fn(usize) -> bool + Sync,
    ) -> Result<LatentBatch> {
        let size = self.size;
        let chosen: Vec<&(PathBuf, u32)> = indices
            .iter()
            .map(|&i| {
                usize::try_from(i)
                    .ok()
                    .and_then(|i| self.files.get(i))
                    .ok_or_else(|| {
                        Error::usage(format!(
                            "sample {i} of an image folder with {}",
                            self.files.len()
                        ))
                    })
            })
            .collect::<Result<_>>()?;
        let mut x = vec![0f32; chosen.len() * 3 * size * size];
        x.par_chunks_exact_mut(3 * size * size)
            .zip(&chosen)
            .enumerate()
            .try_for_each(|(row, (out, (path, _)))| {
                let picture = center_crop(&read(path)?, size);
                let mirror = mirrored(row);
                for (px, py, rgb) in picture.enumerate_pixels() {
                    let (px, py) = (px as usize, py as usize);
                    let column = if mirror { size - 1 - px } else { px };
                    for (c, &byte) in rgb.0.iter().enumerate() {
                        // ToTensor, then Normalize(0.5, 0.5).
                        out[(c * size + py) * size + column] =
                            (f32::from(byte) / 255.0 - 0.5) / 0.5;
                    }
                }
                Ok::<_, Error>(())
            })?;
        let y: Vec<u32> = chosen.iter().map(|(_, class)| *class).collect();
        Ok(LatentBatch {
            x: Tensor::from_vec(x, (y.len(), 3, size, size), &Device::Cpu)?, // (B, 3, size, size)
            y: Tensor::from_slice(&y, y.len(), &Device::Cpu)?,               // (B,)
        })
    }
}

impl Source for ImageFolder {
    fn len(&self) -> Option<u64> {
        Some(self.files.len() as u64)
    }

    fn classes(&self) -> usize {
        self.classes.len()
    }

    fn shape(&self) -> [usize; 3] {
        [3, self.size, self.size]
    }

    fn batch(&self, indices: &[u64]) -> Result<LatentBatch> {
        self.load(indices, |_| false)
    }

    fn augmented(&self, indices: &[u64], rng: &mut StepRng) -> Result<LatentBatch> {
        match self.augment {
            Augment::Never => self.batch(indices),
            Augment::HorizontalFlip => {
                let coins = rng.uniform(indices.len());
                self.load(indices, |row| coins[row] < 0.5)
            }
        }
    }
}

/// The middle of a picture at size×size pixels: halved by averaging while its shorter side is at
/// least twice `size`, then resized (bicubic) so that the shorter side is `size`, then cut.
///
/// Source: `center_crop_arr` of ADM (guided-diffusion, `image_datasets.py`), as used by DiT; on
/// the same pixels equal to it under Pillow 11 bit for bit.
pub fn center_crop(picture: &RgbImage, size: usize) -> RgbImage {
    let size = size as u32;
    let mut picture = picture.clone();
    while picture.width().min(picture.height()) >= 2 * size {
        picture = resample::resize(
            &picture,
            picture.width() / 2,
            picture.height() / 2,
            resample::BOX,
        );
    }
    let scale = f64::from(size) / f64::from(picture.width().min(picture.height()));
    // Python's `round` takes halves to the even neighbour.
    let scaled = |side: u32| (f64::from(side) * scale).round_ties_even() as u32;
    let (width, height) = (scaled(picture.width()), scaled(picture.height()));
    let picture = resample::resize(&picture, width, height, resample::BICUBIC);
    image::imageops::crop_imm(
        &picture,
        (width - size) / 2,
        (height - size) / 2,
        size,
        size,
    )
    .to_image()
}

/// Decodes by content, not by name: ImageNet has PNG files called `.JPEG`. Alpha is dropped.
fn read(path: &Path) -> Result<RgbImage> {
    let unreadable = |e: &dyn std::fmt::Display| {
        Error::file(
            path,
            format!("cannot be read as a picture ({e}); replace or remove it"),
        )
    };
    let picture = ImageReader::open(path)
        .and_then(ImageReader::with_guessed_format)
        .map_err(|e| unreadable(&e))?
        .decode()
        .map_err(|e| unreadable(&e))?
        .into_rgb8();
    if picture.width() == 0 || picture.height() == 0 {
        return Err(unreadable(&"it has no pixels"));
    }
    Ok(picture)
}

fn name(path: &Path) -> String {
    path.file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// What is in a folder, sorted, without names that begin with a dot.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = || -> std::io::Result<Vec<PathBuf>> {
        std::fs::read_dir(folder)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    let mut paths = list().map_err(|e| {
        Error::file(
            folder,
            format!("cannot be read as a folder of pictures: {e}"),
        )
    })?;
    paths.retain(|p| !name(p).starts_with('.'));
    paths.sort();
    Ok(paths)
}

fn collect(folder: &Path, class: u32, files: &mut Vec<(PathBuf, u32)>) -> Result<()> {
    for path in entries(folder)? {
        if path.is_dir() {
            collect(&path, class, files)?;
        } else if path
            .extension()
            .is_some_and(|e| ENDINGS.contains(&e.to_string_lossy().to_lowercase().as_str()))
        {
            files.push((path, class));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
