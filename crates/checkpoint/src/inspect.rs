use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;
use tinyfusion_core::Result;

use crate::blocks::block_index;
use crate::checkpoint::{Checkpoint, Format};
use crate::model_dir::read_config;
use crate::provenance::Provenance;
use crate::root::Root;
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
    /// The weight file; what was looked at, where it has several.
    pub path: PathBuf,
    /// How it is stored.
    pub format: Format,
    /// The dictionaries that it has.
    pub roots: Vec<Root>,
    /// What a PyTorch file holds beside them: `opt`, `args`, …
    pub others: Vec<String>,
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
    /// The config, for a model directory and for a network of diffusers.
    pub config: Option<Value>,
    /// Where the weights came from, for a model directory.
    pub provenance: Option<Provenance>,
    /// The hash that `config.json` expects of the weights, for a model directory. Not compared here;
    /// loading does.
    pub recorded_sha256: Option<String>,
}

/// Looks at a checkpoint of any [`Format`]: its headers, and a model directory's config. `root` picks a dictionary where
/// there are several; without it only the only one is listed.
pub fn inspect_root(path: impl AsRef<Path>, root: Option<Root>) -> Result<Inspection> {
    let checkpoint = Checkpoint::open(path)?;
    let own = match checkpoint.format() {
        Format::ModelDir => Some(read_config(checkpoint.path())?),
        _ => None,
    };
    let root = match (root, checkpoint.roots()) {
        (None, []) => Root::Plain,
        (None, [_, _, ..]) => Root::Plain, // all, each with its root before its name
        _ => checkpoint.choose(root)?,
    };
    let tensors = checkpoint.tensors(root);
    let mut files = checkpoint.files();
    let path = match (files.next(), files.next()) {
        (Some(file), None) => file.to_path_buf(),
        _ => checkpoint.path().to_path_buf(),
    };
    Ok(Inspection {
        path,
        format: checkpoint.format(),
        roots: checkpoint.roots().to_vec(),
        others: checkpoint.others(),
        bytes: checkpoint.bytes(),
        parameters: tensors
            .iter()
            .map(|t| t.shape.iter().product::<usize>())
            .sum(),
        blocks: block_stacks(tensors.iter().map(|t| t.name.as_str())),
        tensors,
        metadata: checkpoint.metadata(),
        provenance: own.as_ref().map(|c| c.provenance.clone()),
        recorded_sha256: own
            .as_ref()
            .and_then(|c| Some(c.weights.as_ref()?.sha256.clone())),
        config: checkpoint.config().cloned(),
    })
}

/// As [`inspect_root`] without a choice.
pub fn inspect(path: impl AsRef<Path>) -> Result<Inspection> {
    inspect_root(path, None)
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
