//! What a weight file promises, whatever its format, and how its tensors are read.

use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use sha2::Sha256;
use tinyfusion_core::{Error, Result};

use crate::dtype::{DTypePolicy, first_non_finite};
use crate::save::Metadata;
use crate::window::Forwards;

/// Where tensors go that were read.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(String, Tensor) -> Result<()>;

/// One tensor of a file.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// The stored type as the format writes it.
    pub(crate) dtype: String,
    /// The same, where tensors of it are read.
    pub(crate) kind: Option<DType>,
    /// Bytes of the file that hold it, perhaps together with others.
    pub(crate) bytes: Range<u64>,
    /// Where in them its values are; all of them, in order, where there is none. Checked to lie in `bytes`.
    pub(crate) view: Option<View>,
}

/// A tensor's place among the values of a storage.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) offset: usize,
    pub(crate) stride: Vec<usize>,
}

/// A weight file whose header was read.
#[derive(Debug, Clone)]
pub(crate) struct WeightFile {
    pub(crate) path: PathBuf,
    pub(crate) length: u64,
    /// In the order of their data.
    pub(crate) entries: Vec<Entry>,
    pub(crate) metadata: Metadata,
    /// What else it holds, for people: `opt`, `args`, …
    pub(crate) others: Vec<String>,
}

impl WeightFile {
    /// Hands the tensors to which `rename` gives a name to `sink`, one after the other: the peak is what that keeps and
    /// the largest tensor. The whole file goes into `hash`.
    pub(crate) fn read(
        &self,
        rename: impl Fn(&str) -> Option<String>,
        dtype: DTypePolicy,
        device: &Device,
        hash: &mut Sha256,
        sink: Sink<'_>,
    ) -> Result<()> {
        let mut file = Forwards::new(&self.path, self.length, hash)?;
        let mut wanted = self
            .entries
            .iter()
            .filter_map(|entry| Some((entry, rename(&entry.name)?)))
            .peekable();
        while let Some((entry, name)) = wanted.next() {
            let window = file.window(&entry.bytes)?;
            sink(name, tensor(&self.path, entry, &window, dtype, device)?)?;
            // Tied weights share a storage.
            while let Some((other, name)) = wanted.next_if(|(e, _)| e.bytes == entry.bytes) {
                sink(name, tensor(&self.path, other, &window, dtype, device)?)?;
            }
        }
        file.finish()
    }
}

fn tensor(
    path: &Path,
    entry: &Entry,
    bytes: &[u8],
    dtype: DTypePolicy,
    device: &Device,
) -> Result<Tensor> {
    let Entry {
        name, shape, kind, ..
    } = entry;
    let Some(stored) = *kind else {
        return Err(Error::file(
            path,
            format!(
                "`{name}` {shape:?} is stored as {}; u8, u32, i16, i32, i64, f16, bf16, f32 and f64 are read",
                entry.dtype
            ),
        ));
    };
    let failed = |e: Error| Error::file(path, format!("`{name}` {shape:?}: {e}"));
    let gathered: Vec<u8>;
    let values: &[u8] = match &entry.view {
        None => bytes,
        Some(view) => {
            let width = stored.size_in_bytes();
            let count = shape.iter().product::<usize>() * width;
            if is_row_major(shape, &view.stride) {
                &bytes[view.offset * width..][..count]
            } else {
                gathered = gather(bytes, shape, view, width);
                &gathered
            }
        }
    };
    if let Some((at, value)) = first_non_finite(stored, values) {
        return Err(Error::file(
            path,
            format!(
                "`{name}` {shape:?} holds {value} at position {at}; finite values are expected"
            ),
        ));
    }
    // Converted on the host where possible, so that the device holds one copy.
    let on_host = Tensor::from_raw_buffer(values, stored, shape, &Device::Cpu)
        .map_err(|e| failed(e.into()))?;
    dtype
        .cast(&on_host)
        .map_err(failed)?
        .to_device(device)
        .map_err(|e| failed(e.into()))
}

/// Whether the values lie one behind the other.
fn is_row_major(shape: &[usize], stride: &[usize]) -> bool {
    let mut step = 1usize;
    shape.iter().zip(stride).rev().all(|(&side, &stride)| {
        let here = side == 1 || stride == step;
        step = step.saturating_mul(side);
        here
    }) || shape.contains(&0)
}

/// The values of `storage` that a view shows, row-major.
fn gather(storage: &[u8], shape: &[usize], view: &View, width: usize) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let mut out = Vec::with_capacity(count * width);
    let mut index = vec![0; shape.len()];
    for _ in 0..count {
        let at: usize = index.iter().zip(&view.stride).map(|(i, s)| i * s).sum();
        out.extend_from_slice(&storage[(view.offset + at) * width..][..width]);
        for (i, &side) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < side {
                break;
            }
            *i = 0;
        }
    }
    out
}
