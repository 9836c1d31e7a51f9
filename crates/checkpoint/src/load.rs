use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use tinyfusion_core::{Error, ParamSpec, Result, StateDict};

use crate::dtype::{DTypePolicy, first_non_finite, from_file};
use crate::hash::Hashing;
use crate::root::Root;
use crate::save::Metadata;
use crate::{header, header::Entry};

/// The content of a weight file.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Where it came from.
    pub path: PathBuf,
    /// The tensors.
    pub tensors: StateDict,
    /// Free text from the file's header.
    pub metadata: Metadata,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
}

/// Loads the safetensors file `path`; every tensor keeps the type it is stored in.
///
/// NaN and infinite values are an error, as is anything else wrong with the file.
pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Loaded> {
    load_as(path, DTypePolicy::Keep, device)
}

/// As [`load`], converting floating-point tensors to `dtype`.
pub fn load_as(path: impl AsRef<Path>, dtype: DTypePolicy, device: &Device) -> Result<Loaded> {
    let path = path.as_ref();
    let (file, length) = header::open(path)?;
    let mut reader = Hashing::new(file);
    let header = header::read(path, &mut reader, length)?;
    let mut tensors = StateDict::new();
    for entry in &header.entries {
        // One tensor after the other: the peak is the model and its largest tensor, not the model twice.
        let tensor = read_tensor(path, &mut reader, entry, dtype, device)?;
        tensors.insert(&entry.name, tensor);
    }
    Ok(Loaded {
        path: path.to_path_buf(),
        tensors,
        metadata: header.metadata,
        sha256: reader.hex(),
    })
}

/// As [`load_as`], and the file must hold exactly the `expected` names and shapes; one error lists
/// everything missing, unexpected and mismatched.
pub fn load_expected(
    path: impl AsRef<Path>,
    expected: &[ParamSpec],
    dtype: DTypePolicy,
    device: &Device,
) -> Result<Loaded> {
    load_as(path, dtype, device)?.checked(expected)
}

impl Loaded {
    /// Only the tensors under `root`, without its prefix.
    pub fn select(mut self, root: Root) -> Result<Self> {
        self.tensors = root
            .select(&self.tensors)
            .map_err(|e| Error::file(&self.path, e))?;
        Ok(self)
    }

    /// The same, if it has exactly the `expected` names and shapes.
    pub fn checked(self, expected: &[ParamSpec]) -> Result<Self> {
        self.tensors
            .check(expected)
            .map_err(|e| Error::file(&self.path, e))?;
        Ok(self)
    }
}

fn read_tensor(
    path: &Path,
    reader: &mut impl Read,
    entry: &Entry,
    dtype: DTypePolicy,
    device: &Device,
) -> Result<Tensor> {
    let Entry {
        name,
        shape,
        dtype: stored,
        len,
    } = entry;
    let Some(stored) = from_file(*stored) else {
        return Err(Error::file(
            path,
            format!(
                "`{name}` {shape:?} is stored as {stored}; u8, u32, i16, i32, i64, f16, bf16, f32 and f64 are read"
            ),
        ));
    };
    let mut bytes = vec![0u8; *len];
    reader
        .read_exact(&mut bytes)
        .map_err(|e| Error::file(path, format!("`{name}` could not be read: {e}")))?;
    if let Some((at, value)) = first_non_finite(stored, &bytes) {
        return Err(Error::file(
            path,
            format!(
                "`{name}` {shape:?} holds {value} at position {at}; finite values are expected"
            ),
        ));
    }
    let failed = |e: Error| Error::file(path, format!("`{name}` {shape:?}: {e}"));
    // Converted on the host where possible, so that the device holds one copy.
    let on_host = Tensor::from_raw_buffer(&bytes, stored, shape, &Device::Cpu)
        .map_err(|e| failed(e.into()))?;
    drop(bytes);
    dtype
        .cast(&on_host)
        .map_err(failed)?
        .to_device(device)
        .map_err(|e| failed(e.into()))
}
