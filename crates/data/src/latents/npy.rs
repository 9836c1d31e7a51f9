//! Latents as the public training code keeps them: two `.npy` files for every image.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use npyz::{DType, NpyFile, Order, TypeChar};
use rayon::prelude::*;
use tinyfusion_core::{Error, LatentBatch, Result};

use super::rows;
use crate::Source;

/// A folder with `*_features/NAME.npy`, each (1, C, H, W) or (C, H, W) of floating-point numbers, and `*_labels/NAME.npy` with one
/// whole number: what `extract_features.py` of fast-DiT and TinyFusion writes. The latents are scaled already.
///
/// Two files are opened for every image of a batch: for more than a trial, pack them (`tinyfusion encode`).
#[derive(Debug)]
pub struct NpyLatents {
    features: PathBuf,
    labels: PathBuf,
    /// Names that both folders have, in order.
    names: Vec<String>,
    shape: [usize; 3],
    classes: usize,
}

impl NpyLatents {
    /// Whether a folder is laid out in this way.
    pub fn is_one(folder: impl AsRef<Path>) -> bool {
        let folder = folder.as_ref();
        subfolder(folder, "_features").is_ok() && subfolder(folder, "_labels").is_ok()
    }

    /// Opens a folder whose labels are below `classes`. Every name must be in both subfolders; the files are looked at
    /// when they are drawn.
    pub fn open(folder: impl AsRef<Path>, classes: usize) -> Result<Self> {
        let folder = folder.as_ref();
        let features = subfolder(folder, "_features")?;
        let labels = subfolder(folder, "_labels")?;
        let names = npy_names(&features)?;
        let labelled = npy_names(&labels)?;
        for (has, lacks, at, other) in [
            (&names, &labelled, &labels, &features),
            (&labelled, &names, &features, &labels),
        ] {
            if let Some(name) = has.iter().find(|n| lacks.binary_search(n).is_err()) {
                return Err(Error::file(
                    at.join(name),
                    format!("is missing: {} has a file of this name", other.display()),
                ));
            }
        }
        let Some(first) = names.first() else {
            return Err(Error::file(&features, "holds no .npy file"));
        };
        let shape = shape_of(&features.join(first))?;
        Ok(Self {
            features,
            labels,
            names,
            shape,
            classes,
        })
    }

    fn read(&self, row: usize, out: &mut [f32]) -> Result<u32> {
        let name = &self.names[row];
        let path = self.features.join(name);
        let shape = read(&path, out, self.shape)?;
        if shape != self.shape {
            return Err(Error::file(
                &path,
                format!(
                    "is {shape:?}, but the first file of the folder is {:?}",
                    self.shape
                ),
            ));
        }
        if let Some(at) = out.iter().position(|v| !v.is_finite()) {
            return Err(Error::file(
                &path,
                format!(
                    "holds {} at position {at}; finite values are expected",
                    out[at]
                ),
            ));
        }
        let path = self.labels.join(name);
        let label = label(&path)?;
        u32::try_from(label)
            .ok()
            .filter(|&l| (l as usize) < self.classes)
            .ok_or_else(|| {
                Error::file(
                    &path,
                    format!(
                        "is the label {label}, expected 0..{} ({0} classes)",
                        self.classes
                    ),
                )
            })
    }
}

impl Source for NpyLatents {
    fn len(&self) -> Option<u64> {
        Some(self.names.len() as u64)
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn shape(&self) -> [usize; 3] {
        self.shape
    }

    fn batch(&self, indices: &[u64]) -> Result<LatentBatch> {
        let rows = rows(&self.features, self.names.len(), indices)?;
        let [c, h, w] = self.shape;
        let mut x = vec![0f32; rows.len() * c * h * w];
        let y = x
            .par_chunks_exact_mut(c * h * w)
            .zip(&rows)
            .map(|(out, &row)| self.read(row, out))
            .collect::<Result<Vec<u32>>>()?;
        Ok(LatentBatch {
            x: Tensor::from_vec(x, (rows.len(), c, h, w), &Device::Cpu)?, // (B, C, H, W)
            y: Tensor::from_vec(y, rows.len(), &Device::Cpu)?,            // (B,)
        })
    }
}

/// The one folder in `folder` whose name ends in `ending`.
fn subfolder(folder: &Path, ending: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).map_err(|e| Error::file(folder, e))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.is_dir() && p.to_string_lossy().ends_with(ending))
        .collect();
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => Ok(only),
        (None, _) => Err(Error::file(
            folder,
            format!("has no folder whose name ends in `{ending}`"),
        )),
        (Some(_), false) => Err(Error::file(
            folder,
            format!("has several folders whose names end in `{ending}`; one is expected"),
        )),
    }
}

/// Names of the `.npy` files in `folder`, sorted.
fn npy_names(folder: &Path) -> Result<Vec<String>> {
    let failed = |e| Error::file(folder, e);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if let Some(name) = name
            .to_str()
            .filter(|n| n.ends_with(".npy") && !n.starts_with('.'))
        {
            names.push(name.to_string());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// The file's bytes: at most as many as the file has, whatever its header claims.
fn bytes(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| Error::file(path, e))
}

fn parsed<'a>(path: &Path, bytes: &'a [u8]) -> Result<NpyFile<&'a [u8]>> {
    // The library multiplies the sizes before it compares them with anything.
    if let Some(shape) = claimed_shape(bytes)
        && !fits(&shape, bytes.len())
    {
        return Err(Error::file(
            path,
            format!(
                "claims the shape ({shape}) in {} bytes; is it truncated?",
                bytes.len()
            ),
        ));
    }
    NpyFile::new(bytes).map_err(|e| Error::file(path, format!("is no .npy file: {e}")))
}

/// The text between the brackets of the header's shape.
fn claimed_shape(bytes: &[u8]) -> Option<String> {
    const MOST: usize = 65_536; // bytes of a header of version 1
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MOST)]);
    let (_, rest) = text.split_once("shape")?;
    let (_, rest) = rest.split_once('(')?;
    Some(rest.split_once(')')?.0.to_string())
}

/// Whether an array of this shape can be in so many bytes.
fn fits(shape: &str, bytes: usize) -> bool {
    let sizes = shape.split(',').map(str::trim).filter(|n| !n.is_empty());
    let product = sizes
        .map(|n| n.parse::<u64>().ok())
        .try_fold(1u64, |product, n| product.checked_mul(n?.max(1)));
    product.is_some_and(|n| n <= bytes as u64)
}

/// (C, H, W) of a file that holds (1, C, H, W) or (C, H, W).
fn latent_shape(path: &Path, file: &NpyFile<&[u8]>) -> Result<[usize; 3]> {
    let place = |n: &u64| usize::try_from(*n).unwrap_or(usize::MAX);
    match file.shape().iter().map(place).collect::<Vec<_>>()[..] {
        [1, c, h, w] | [c, h, w] if c > 0 && h > 0 && w > 0 && file.order() == Order::C => {
            Ok([c, h, w])
        }
        _ => Err(Error::file(
            path,
            format!(
                "is {:?} in {:?} order, expected a latent (1, C, H, W) in C order",
                file.shape(),
                file.order()
            ),
        )),
    }
}

fn shape_of(path: &Path) -> Result<[usize; 3]> {
    let bytes = bytes(path)?;
    latent_shape(path, &parsed(path, &bytes)?)
}

/// Reads a latent into `out`, if it has the shape `expected`; returns its shape.
fn read(path: &Path, out: &mut [f32], expected: [usize; 3]) -> Result<[usize; 3]> {
    let bytes = bytes(path)?;
    let file = parsed(path, &bytes)?;
    let shape = latent_shape(path, &file)?;
    if shape != expected {
        return Ok(shape);
    }
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be read: {e}"));
    let wide = matches!(&file.dtype(), DType::Plain(t) if t.num_bytes() == Some(8));
    if wide {
        let values = file.data::<f64>().map_err(|e| failed(&e))?;
        for (to, value) in out.iter_mut().zip(values) {
            *to = value.map_err(|e| failed(&e))? as f32;
        }
    } else {
        let values = file.data::<f32>().map_err(|e| failed(&e))?;
        for (to, value) in out.iter_mut().zip(values) {
            *to = value.map_err(|e| failed(&e))?;
        }
    }
    Ok(shape)
}

/// The one whole number of a file.
fn label(path: &Path) -> Result<i64> {
    let bytes = bytes(path)?;
    let file = parsed(path, &bytes)?;
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("is no label: {e}"));
    if file.shape().iter().any(|n| *n != 1) {
        return Err(failed(&format!(
            "its shape is {:?}, one number is expected",
            file.shape()
        )));
    }
    let narrow = matches!(
        file.dtype(),
        DType::Plain(t) if t.type_char() == TypeChar::Int && t.num_bytes() == Some(4)
    );
    let found = if narrow {
        let all = file.into_vec::<i32>().map_err(|e| failed(&e))?;
        all.first().copied().map(i64::from)
    } else {
        let all = file.into_vec::<i64>().map_err(|e| failed(&e))?;
        all.first().copied()
    };
    found.ok_or_else(|| failed(&"it is empty"))
}

#[cfg(test)]
mod tests;
