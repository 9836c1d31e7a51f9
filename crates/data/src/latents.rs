//! Latents computed beforehand, in one memory-mapped file.

mod npy;
mod shards;
mod writer;

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use half::f16;
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, LatentBatch, Result};

pub use self::npy::NpyLatents;
pub use self::shards::{
    Damage, INDEX_FILE, LatentContent, LatentIndex, Shard, ShardWriter, ShardedLatents,
};
pub use self::writer::LatentWriter;
use crate::Source;

/// Key of the file's metadata that says how many classes there are.
const CLASSES_KEY: &str = "classes";

/// How latents are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LatentType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats: half the size, good enough for VAE latents.
    F16,
}

impl LatentType {
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
        }
    }
}

/// A safetensors file with `x` (N, C, H, W) in f32 or f16 and `y` (N,) in i64 or u32.
///
/// `x` is what the network is to see: for DiT, VAE latents already scaled by 0.18215. The file is
/// mapped into memory, so it may be far larger than that; [`LatentWriter`] makes one.
#[derive(Debug)]
pub struct PackedLatents {
    path: PathBuf,
    map: Mmap,
    /// Where the values of `x` lie in the file.
    x: Range<usize>,
    kind: LatentType,
    shape: [usize; 3],
    y: Vec<u32>,
    classes: usize,
}

impl PackedLatents {
    /// Opens and checks a file. `classes` is the number of classes; `None` takes it from the file's
    /// metadata (`classes`), which [`LatentWriter`] writes.
    ///
    /// The file must not be changed in place while it is open; replacing it by a rename is fine.
    ///
    /// # Errors
    /// If the file is truncated or not a safetensors file, if `x` or `y` are missing, of another
    /// type or do not fit each other, or if a label is not in `0..classes`.
    pub fn open(path: impl AsRef<Path>, classes: Option<usize>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |message: String| Error::file(path, message);
        let map = map(path)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
            wrong(format!(
                "not a whole safetensors file ({e}); it may be truncated, write it again"
            ))
        })?;
        let info = |name: &str| {
            metadata.info(name).ok_or_else(|| {
                wrong(format!(
                    "has no tensor `{name}` (found: {}); expected `x` (N, C, H, W) and `y` (N,)",
                    metadata.offset_keys().join(", ")
                ))
            })
        };
        let (x, y) = (info("x")?, info("y")?);
        let kind = match x.dtype {
            Dtype::F32 => LatentType::F32,
            Dtype::F16 => LatentType::F16,
            other => return Err(wrong(format!("`x` is {other:?}, expected F32 or F16"))),
        };
        let &[n, c, h, w] = x.shape.as_slice() else {
            return Err(wrong(format!(
                "`x` has shape {:?}, expected (N, C, H, W)",
                x.shape
            )));
        };
        if y.shape != [n] {
            return Err(wrong(format!(
                "`y` has shape {:?}, expected [{n}] as `x` has {n} samples",
                y.shape
            )));
        }
        if n == 0 || c * h * w == 0 {
            return Err(wrong(format!(
                "`x` has shape {:?}: there is nothing in it",
                x.shape
            )));
        }
        let data = |(from, to): (usize, usize)| 8 + header + from..8 + header + to;
        let labels = &map[data(y.data_offsets)];
        let labels: Vec<i64> = match y.dtype {
            Dtype::I64 => labels
                .as_chunks::<8>()
                .0
                .iter()
                .map(|b| i64::from_le_bytes(*b))
                .collect(),
            Dtype::U32 => labels
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| i64::from(u32::from_le_bytes(*b)))
                .collect(),
            other => return Err(wrong(format!("`y` is {other:?}, expected I64 or U32"))),
        };
        let stated = metadata
            .metadata()
            .as_ref()
            .and_then(|m| m.get(CLASSES_KEY));
        let classes = match (classes, stated) {
            (Some(classes), _) => classes,
            (None, Some(text)) => text.parse().map_err(|_| {
                wrong(format!(
                    "its metadata say `{CLASSES_KEY}` = `{text}`, expected a number"
                ))
            })?,
            (None, None) => {
                return Err(wrong(format!(
                    "its metadata do not say `{CLASSES_KEY}`; give the number of classes"
                )));
            }
        };
        let y = labels
            .into_iter()
            .enumerate()
            .map(|(i, label)| {
                u32::try_from(label).ok().filter(|&l| (l as usize) < classes).ok_or_else(|| {
                    wrong(format!("sample {i} has label {label}, expected 0..{classes} ({classes} classes)"))
                })
            })
            .collect::<Result<Vec<u32>>>()?;
        let x = data(x.data_offsets);
        Ok(Self {
            path: path.to_path_buf(),
            map,
            x,
            kind,
            shape: [c, h, w],
            y,
            classes,
        })
    }

    /// Copies sample `index` into `out`, (C, H, W) values.
    fn read(&self, index: usize, out: &mut [f32]) -> Result<()> {
        self.read_part(index, 0, out)
    }

    /// Copies the values of sample `index` from value `first` on into `out`.
    fn read_part(&self, index: usize, first: usize, out: &mut [f32]) -> Result<()> {
        let size = self.kind.bytes();
        let sample = self.shape.iter().product::<usize>() * size;
        let stored = &self.map[self.x.start + index * sample..][..sample];
        let stored = &stored[first * size..][..out.len() * size];
        match self.kind {
            LatentType::F32 => {
                for (value, b) in out.iter_mut().zip(stored.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*b);
                }
            }
            LatentType::F16 => {
                for (value, b) in out.iter_mut().zip(stored.as_chunks::<2>().0) {
                    *value = f16::from_le_bytes(*b).to_f32();
                }
            }
        }
        // Looking at all values when opening would read the whole file; here they are at hand.
        if out.iter().any(|v| !v.is_finite()) {
            return Err(Error::file(
                &self.path,
                format!("sample {index} has values that are not finite; write the file again"),
            ));
        }
        Ok(())
    }
}

impl Source for PackedLatents {
    fn len(&self) -> Option<u64> {
        Some(self.y.len() as u64)
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn shape(&self) -> [usize; 3] {
        self.shape
    }

    fn batch(&self, indices: &[u64]) -> Result<LatentBatch> {
        let rows = rows(&self.path, self.y.len(), indices)?;
        let [c, h, w] = self.shape;
        let mut x = vec![0f32; rows.len() * c * h * w];
        x.par_chunks_exact_mut(c * h * w)
            .zip(&rows)
            .try_for_each(|(out, &row)| self.read(row, out))?;
        let y: Vec<u32> = rows.iter().map(|&row| self.y[row]).collect();
        Ok(LatentBatch {
            x: Tensor::from_vec(x, (rows.len(), c, h, w), &Device::Cpu)?, // (B, C, H, W)
            y: Tensor::from_vec(y, rows.len(), &Device::Cpu)?,            // (B,)
        })
    }
}

/// `indices` as places in memory; an error where one is not below `len`, the number of samples in `path`.
fn rows(path: &Path, len: usize, indices: &[u64]) -> Result<Vec<usize>> {
    let row = |&i: &u64| {
        let row = usize::try_from(i).ok().filter(|&i| i < len);
        row.ok_or_else(|| Error::usage(format!("sample {i} of {} with {len}", path.display())))
    };
    indices.iter().map(row).collect()
}

#[allow(unsafe_code)]
fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| Error::file(path, format!("cannot be opened: {e}")))?;
    // SAFETY: the mapping is read-only and only ever read as bytes, of which every value is valid. What
    // remains is that another process could shorten the file while it is open; our writer replaces
    // files by a rename, which leaves the mapped one whole, and `open` documents the condition.
    unsafe { Mmap::map(&file) }
        .map_err(|e| Error::file(path, format!("cannot be mapped into memory: {e}")))
}

#[cfg(test)]
mod tests;
