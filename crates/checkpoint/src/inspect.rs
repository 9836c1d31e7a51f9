use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;
use tinyfusion_core::Result;

use crate::blocks::block_index;
use crate::header;
use crate::model_dir::{WEIGHTS_FILE, read_config};
use crate::provenance::Provenance;
use crate::save::Metadata;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TensorEntry {
    /// Its key.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The type it is stored in, as safetensors writes it: `F32`, `BF16`, …
    pub dtype: String,
}

/// What can be told about a weight file or a model directory without reading its data.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The weight file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Its tensors, by name.
    pub tensors: Vec<TensorEntry>,
    /// Number of values over all tensors.
    pub parameters: usize,
    /// Stacks of blocks and their depths: `blocks` → 28 if the keys run from `blocks.0.` to `blocks.27.`
    /// without a gap.
    pub blocks: BTreeMap<String, usize>,
    /// Free text from the file's header.
    pub metadata: Metadata,
    /// The config, for a model directory.
    pub config: Option<Value>,
    /// Where the weights came from, for a model directory.
    pub provenance: Option<Provenance>,
    /// The hash that `config.json` expects of the weights, for a model directory. Not compared here;
    /// loading does.
    pub recorded_sha256: Option<String>,
}

/// Reads the header of a safetensors file, or of the one in a model directory with its config.
pub fn inspect(path: impl AsRef<Path>) -> Result<Inspection> {
    let path = path.as_ref();
    let config = if path.is_dir() {
        Some(read_config(path)?)
    } else {
        None
    };
    let path = if config.is_some() {
        path.join(WEIGHTS_FILE)
    } else {
        path.to_path_buf()
    };
    let (mut file, bytes) = header::open(&path)?;
    let header = header::read(&path, &mut file, bytes)?;
    let mut tensors: Vec<TensorEntry> = header
        .entries
        .into_iter()
        .map(|e| TensorEntry {
            name: e.name,
            shape: e.shape,
            dtype: e.dtype.to_string(),
        })
        .collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Inspection {
        bytes,
        parameters: tensors
            .iter()
            .map(|t| t.shape.iter().product::<usize>())
            .sum(),
        blocks: block_stacks(tensors.iter().map(|t| t.name.as_str())),
        tensors,
        metadata: header.metadata,
        provenance: config.as_ref().map(|c| c.provenance.clone()),
        recorded_sha256: config
            .as_ref()
            .and_then(|c| Some(c.weights.as_ref()?.sha256.clone())),
        config: config.map(|c| c.into_config()),
        path,
    })
}

/// Prefixes before the first number of a key and how many numbers they have. Only runs from 0 without
/// a gap count: `mlp.0`, `mlp.2` of a small MLP with an activation in between is no stack.
fn block_stacks<'a>(names: impl Iterator<Item = &'a str>) -> BTreeMap<String, usize> {
    let mut found: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
    for name in names {
        let parts: Vec<&str> = name.split('.').collect();
        let Some(at) = parts.iter().position(|p| block_index(p).is_some()) else {
            continue;
        };
        if let (1.., true, Some(index)) = (at, at + 1 < parts.len(), block_index(parts[at])) {
            found
                .entry(parts[..at].join("."))
                .or_default()
                .insert(index);
        }
    }
    found
        .into_iter()
        .filter(|(_, indices)| indices.iter().copied().eq(0..indices.len()))
        .map(|(prefix, indices)| (prefix, indices.len()))
        .collect()
}
