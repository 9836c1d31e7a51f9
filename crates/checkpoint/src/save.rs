use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, View};
use serde_json::json;
use tinyfusion_core::{Error, Result, StateDict};

use crate::atomic::{stage_seek, write_atomic};
use crate::dtype::{DTypePolicy, first_non_finite, from_file};
use crate::hash::Hashing;
use crate::root::Root;
use crate::torch::write_torch;

/// Free text stored in a file's header (safetensors' `__metadata__`), in order of the keys.
pub type Metadata = BTreeMap<String, String>;

/// Writes `tensors` to the safetensors file `path`, atomically, and returns the file's SHA-256.
///
/// Equal tensors and metadata give equal bytes. Refuses NaN and infinite values, also those that
/// only arise in the chosen type (f16 ends at 65504): such a file could not be loaded again.
pub fn save(
    path: impl AsRef<Path>,
    tensors: &StateDict,
    metadata: &Metadata,
    dtype: DTypePolicy,
) -> Result<String> {
    let mut sha256 = String::new();
    write_atomic(path, |w| {
        sha256 = write_safetensors(w, tensors, metadata, dtype)?;
        Ok(())
    })?;
    Ok(sha256)
}

/// Writes `tensors` to the PyTorch file `path` (what `torch.load` reads, with `weights_only` too), atomically: a plain
/// dictionary, or one under each of the `roots`. Refuses NaN and infinite values as [`save`] does.
pub fn save_torch(
    path: impl AsRef<Path>,
    tensors: &StateDict,
    roots: &[Root],
    dtype: DTypePolicy,
) -> Result<()> {
    let roots: Vec<String> = roots.iter().map(Root::to_string).collect();
    let roots: Vec<&str> = roots.iter().map(String::as_str).collect();
    stage_seek(path.as_ref(), |w| write_torch(w, tensors, &roots, dtype))?.commit()
}

/// Writes the format itself, one tensor in memory at a time, and returns the hash of what was written.
///
/// The library's own writer keeps metadata in a hash map, so two entries would come out in random
/// order and equal weights would not hash equally. Reading is the library's.
pub(crate) fn write_safetensors(
    to: &mut dyn Write,
    tensors: &StateDict,
    metadata: &Metadata,
    dtype: DTypePolicy,
) -> io::Result<String> {
    const META: &str = "__metadata__";
    let mut entries: Vec<(&str, &Tensor, DType)> = tensors
        .iter()
        .map(|(name, t)| (name, t, dtype.apply(t.dtype())))
        .collect();
    // Wide types first keeps every tensor aligned; within a type, alphabetical.
    entries.sort_by_key(|&(name, _, stored)| (Reverse(stored.size_in_bytes()), name));

    let mut header = BTreeMap::new();
    if !metadata.is_empty() {
        header.insert(META, json!(metadata));
    }
    let mut end = 0;
    for &(name, tensor, stored) in &entries {
        if name == META {
            return Err(io::Error::other(format!(
                "a tensor must not be called `{META}`"
            )));
        }
        let file_type = Dtype::from(stored);
        if from_file(file_type).is_none() {
            return Err(io::Error::other(format!(
                "`{name}` is {stored:?}, which is not stored; convert it"
            )));
        }
        let start = end;
        end += tensor.elem_count() * stored.size_in_bytes();
        header.insert(
            name,
            json!({"dtype": file_type, "shape": tensor.dims(), "data_offsets": [start, end]}),
        );
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut to = Hashing::new(to);
    to.write_all(&(header.len() as u64).to_le_bytes())?;
    to.write_all(&header)?;
    for (name, tensor, _) in entries {
        write_values(&mut to, name, tensor, dtype)?;
    }
    Ok(to.hex())
}

/// Writes the values of a tensor, a piece after the other, so that no copy of a whole tensor is made.
pub(crate) fn write_values(
    to: &mut dyn Write,
    name: &str,
    tensor: &Tensor,
    dtype: DTypePolicy,
) -> io::Result<()> {
    const PIECE: usize = 1 << 20;
    let failed = |e: Error| io::Error::other(format!("`{name}`: {e}"));
    let flat = tensor.flatten_all().map_err(|e| failed(e.into()))?;
    for start in (0..flat.elem_count()).step_by(PIECE) {
        let piece = || -> Result<Tensor> {
            let piece = flat.narrow(0, start, PIECE.min(flat.elem_count() - start))?;
            // On the host and contiguous from here on, so the view below cannot fail.
            Ok(dtype.cast(&piece)?.to_device(&Device::Cpu)?.contiguous()?)
        };
        let piece = piece().map_err(failed)?;
        let bytes = piece.data();
        if let Some((at, value)) = first_non_finite(piece.dtype(), &bytes) {
            return Err(io::Error::other(format!(
                "`{name}` holds {value} at position {} (stored as {:?})",
                start + at,
                piece.dtype()
            )));
        }
        to.write_all(&bytes)?;
    }
    Ok(())
}
