use std::path::{Path, PathBuf};

use candle_core::Device;
use sha2::{Digest, Sha256};
use tinyfusion_core::{Error, ParamSpec, Result, StateDict};

use crate::dtype::DTypePolicy;
use crate::hash::hex;
use crate::header;
use crate::root::Root;
use crate::save::Metadata;

/// The content of a weight file.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Where it came from.
    pub path: PathBuf,
    /// The tensors.
    pub tensors: StateDict,
    /// Free text from the file's header.
    pub metadata: Metadata,
    /// SHA-256 of the file, in lower-case hexadecimal; of several files, of their contents one after the other in the
    /// order of their names.
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
    let file = header::read(path.as_ref())?;
    let (mut hash, mut tensors) = (Sha256::new(), StateDict::new());
    let own = |name: &str| Some(name.to_string());
    file.read(own, dtype, device, &mut hash, &mut |name, tensor| {
        tensors.insert(name, tensor);
        Ok(())
    })?;
    Ok(Loaded {
        path: file.path,
        tensors,
        metadata: file.metadata,
        sha256: hex(hash),
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
