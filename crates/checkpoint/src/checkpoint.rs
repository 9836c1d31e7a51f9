use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tinyfusion_core::{Error, Result, StateDict};

use crate::dtype::DTypePolicy;
use crate::hash::hex;
use crate::inspect::TensorEntry;
use crate::load::Loaded;
use crate::model_dir::{CONFIG_FILE, WEIGHTS_FILE, read_config};
use crate::root::Root;
use crate::save::Metadata;
use crate::weight_file::WeightFile;
use crate::weight_names::{DIFFUSERS_WEIGHTS, Weights};
use crate::window::first_bytes;
use crate::{header, torch};

/// How a checkpoint is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// A model directory of this program.
    ModelDir,
    /// One safetensors file.
    Safetensors,
    /// Safetensors files with an index.
    Shards,
    /// A file of `torch.save`.
    Torch,
    /// A folder of diffusers: a pipeline with its `transformer/`, or that folder alone.
    Diffusers,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ModelDir => "model directory",
            Self::Safetensors => "safetensors file",
            Self::Shards => "safetensors files with an index",
            Self::Torch => "PyTorch file",
            Self::Diffusers => "diffusers folder",
        })
    }
}

/// A checkpoint of any format whose headers were read, and not yet its weights.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    path: PathBuf,
    format: Format,
    files: Vec<WeightFile>,
    roots: Vec<Root>,
    config: Option<Value>,
}

/// The end of the name of an index of shards.
const INDEX: &str = ".safetensors.index.json";
/// The description of a pipeline of diffusers.
const PIPELINE: &str = "model_index.json";

impl Checkpoint {
    /// Recognises what stands at `path` by its content: a model directory, a `.safetensors` file, an index of such files or
    /// the folder that has one, a file of `torch.save`, or a folder of diffusers. Reads headers only.
    ///
    /// Weights are mapped into memory while they are read: the files must not be shortened meanwhile.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            return Self::of_folder(path);
        }
        if !path.exists() {
            return Err(Error::file(
                path,
                "does not exist; a model directory, a .safetensors or .pt file, or a folder of diffusers is expected",
            ));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".json") && name.contains(".index.") {
            return Self::of_index(path, path);
        }
        Self::of_file(path)
    }

    fn of_file(path: &Path) -> Result<Self> {
        let (format, file) = weight_file(path)?;
        Self::new(path, format, vec![file], None)
    }

    fn of_folder(path: &Path) -> Result<Self> {
        if path.join(PIPELINE).is_file() {
            let found = json(&path.join(PIPELINE))?;
            let transformer = path.join("transformer");
            if !transformer.is_dir() {
                let class = found.get("_class_name").cloned().unwrap_or_default();
                return Err(Error::file(
                    path,
                    format!(
                        "is a pipeline of diffusers ({class}) without `transformer/`; a DiTPipeline is expected"
                    ),
                ));
            }
            return Self::of_network(path, &transformer);
        }
        let config = path.join(CONFIG_FILE);
        let has_class = || Some(json(&config).ok()?.get("_class_name").is_some());
        if config.is_file() && has_class() == Some(true) {
            return Self::of_network(path, path);
        }
        if !config.is_file()
            && let Some(found) = Self::of_weights(path)?
        {
            return Ok(found);
        }
        let config = read_config(path)?;
        let file = header::read(&path.join(WEIGHTS_FILE))?;
        Self::new(
            path,
            Format::ModelDir,
            vec![file],
            Some(config.into_config()),
        )
    }

    /// The folder `path`, which has no description: a repository of the original code.
    fn of_weights(path: &Path) -> Result<Option<Self>> {
        let all = names(path)?;
        let found = Weights::among(all.iter().map(String::as_str));
        let mut indices = all.iter().filter(|name| name.ends_with(INDEX));
        if let Some(index) = &found.index {
            return Self::of_index(path, &path.join(index)).map(Some);
        }
        if let (Some(index), None) = (indices.next(), indices.next()) {
            return Self::of_index(path, &path.join(index)).map(Some);
        }
        match &found.files[..] {
            [] => Ok(None),
            [only] => {
                let file = Self::of_file(&path.join(only))?;
                // Nothing in its header: weights of a model directory that has lost its config.json.
                let is_lost = only == WEIGHTS_FILE && file.metadata().is_empty();
                Ok((!is_lost).then_some(file))
            }
            _ => Err(several(path, &found)),
        }
    }

    /// The folder `path`, whose network lies in its folder `inner`.
    fn of_network(path: &Path, inner: &Path) -> Result<Self> {
        let config = Some(json(&inner.join(CONFIG_FILE))?);
        let all = names(inner)?;
        let found = Weights::among(all.iter().map(String::as_str));
        let files = match (&found.index, &found.files[..]) {
            (Some(index), _) => shards(&inner.join(index))?,
            (None, [only]) => vec![weight_file(&inner.join(only))?.1],
            (None, []) => {
                return Err(Error::file(
                    inner,
                    format!(
                        "has no {DIFFUSERS_WEIGHTS}.safetensors, {DIFFUSERS_WEIGHTS}{INDEX} or .bin; it has {}",
                        all.join(", ")
                    ),
                ));
            }
            (None, _) => return Err(several(inner, &found)),
        };
        Self::new(path, Format::Diffusers, files, config)
    }

    fn of_index(path: &Path, index: &Path) -> Result<Self> {
        Self::new(path, Format::Shards, shards(index)?, None)
    }

    fn new(
        path: &Path,
        format: Format,
        files: Vec<WeightFile>,
        config: Option<Value>,
    ) -> Result<Self> {
        let mut files = files;
        strip_wrappers(&mut files, "");
        let entries = files.iter().flat_map(|f| &f.entries);
        let names: Vec<&str> = entries.map(|e| e.name.as_str()).collect();
        let roots = Root::among(&names);
        for root in &roots {
            strip_wrappers(&mut files, root.prefix());
        }
        Ok(Self {
            path: path.to_path_buf(),
            format,
            roots,
            files,
            config,
        })
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How it is stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The dictionaries that it has; none where it has no tensors.
    pub fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// The weight files, in the order of their names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|f| f.path.as_path())
    }

    /// Bytes of the weight files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.length).sum()
    }

    /// The `config.json` of a model directory (without provenance) or of a network of diffusers.
    pub fn config(&self) -> Option<&Value> {
        self.config.as_ref()
    }

    /// Free text from the file's header, where it is one file that has such.
    pub fn metadata(&self) -> Metadata {
        match &self.files[..] {
            [file] => file.metadata.clone(),
            _ => Metadata::new(),
        }
    }

    /// What a PyTorch file holds beside tensors under its roots: `opt`, `args`, …
    pub fn others(&self) -> Vec<String> {
        self.files.iter().flat_map(|f| f.others.clone()).collect()
    }

    /// The tensors under `root`, without its prefix, by name.
    pub fn tensors(&self, root: Root) -> Vec<TensorEntry> {
        let entries = self.files.iter().flat_map(|f| &f.entries);
        let mut all: Vec<TensorEntry> = entries
            .filter_map(|e| {
                Some(TensorEntry {
                    name: e.name.strip_prefix(root.prefix())?.to_string(),
                    shape: e.shape.clone(),
                    dtype: e.dtype.clone(),
                })
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// The root `wanted`, which must be there, or the only one; where there are several and none is wanted, an error that
    /// lists them, for raw and averaged weights load equally well and give different images.
    pub fn choose(&self, wanted: Option<Root>) -> Result<Root> {
        let names: Vec<String> = self.roots.iter().map(|r| format!("`{r}`")).collect();
        match (wanted, &self.roots[..]) {
            (_, []) => Err(Error::file(&self.path, "has no tensors at all")),
            (Some(root), all) if all.contains(&root) => Ok(root),
            (Some(root), _) => Err(Error::usage(format!(
                "{}: has no root `{root}`; it has {}",
                self.path.display(),
                names.join(", ")
            ))),
            (None, [only]) => Ok(*only),
            (None, [first, ..]) => {
                // Images are drawn with the average; the raw weights are for training on.
                let averaged = self
                    .roots
                    .iter()
                    .find(|r| [Root::Ema, Root::ModelEma].contains(r));
                Err(Error::usage(format!(
                    "{0}: has the roots {1}, which are different weights; say which is meant: {0}#{2}",
                    self.path.display(),
                    names.join(", "),
                    averaged.unwrap_or(first)
                )))
            }
        }
    }

    /// Reads the weights under `root`, one tensor after the other, converting floating-point ones to `dtype`. NaN and
    /// infinite values are an error. Every file is read once, and hashed on the way.
    pub fn load(&self, root: Root, dtype: DTypePolicy, device: &Device) -> Result<Loaded> {
        let mut tensors = StateDict::new();
        let loaded = self.load_each(root, dtype, device, &mut |name, tensor| {
            tensors.insert(name, tensor);
            Ok(())
        })?;
        Ok(Loaded { tensors, ..loaded })
    }

    /// As [`load`](Self::load), handing each tensor to `sink` as it is read, which need not keep it as it is; the result
    /// has none.
    pub fn load_each(
        &self,
        root: Root,
        dtype: DTypePolicy,
        device: &Device,
        sink: &mut dyn FnMut(String, Tensor) -> Result<()>,
    ) -> Result<Loaded> {
        let mut hash = Sha256::new();
        for file in &self.files {
            let rename = |name: &str| Some(name.strip_prefix(root.prefix())?.to_string());
            file.read(rename, dtype, device, &mut hash, sink)?;
        }
        let path = match &self.files[..] {
            [file] => file.path.clone(),
            _ => self.path.clone(),
        };
        Ok(Loaded {
            path,
            tensors: StateDict::new(),
            metadata: self.metadata(),
            sha256: hex(hash),
        })
    }
}

/// What PyTorch's DistributedDataParallel and `torch.compile` put before every name of a network.
const WRAPPERS: [&str; 2] = ["module.", "_orig_mod."];

/// Takes the wrappers' names away from behind `prefix`, where all names under it have them.
fn strip_wrappers(files: &mut [WeightFile], prefix: &str) {
    let under = |name: &str| name.strip_prefix(prefix).map(str::to_owned);
    loop {
        let names = files.iter().flat_map(|f| &f.entries);
        let names: Vec<String> = names.filter_map(|e| under(&e.name)).collect();
        let wraps =
            |wrapper: &str| !names.is_empty() && names.iter().all(|n| n.starts_with(wrapper));
        let Some(wrapper) = WRAPPERS.into_iter().find(|w| wraps(w)) else {
            return;
        };
        for entry in files.iter_mut().flat_map(|f| &mut f.entries) {
            let inner = under(&entry.name).and_then(|n| Some(n.strip_prefix(wrapper)?.to_owned()));
            if let Some(inner) = inner {
                entry.name = format!("{prefix}{inner}");
            }
        }
    }
}

/// Nothing tells which of a folder's files is meant.
fn several(folder: &Path, found: &Weights) -> Error {
    let all = found.checkpoints();
    let what = match &all[..] {
        [shards] => format!("has the shards {shards}, but not their index: copy that, too"),
        _ => format!(
            "holds several checkpoints ({}); name the one that is meant: {}",
            all.join(", "),
            folder.join(&all[0]).display()
        ),
    };
    Error::usage(format!("{}: {what}", folder.display()))
}

/// One file of weights, and what kind it is.
fn weight_file(path: &Path) -> Result<(Format, WeightFile)> {
    let first = first_bytes(path, 9)?;
    if first.starts_with(torch::MAGIC) {
        return Ok((Format::Torch, torch::read(path)?));
    }
    // PROTO of a pickle that stands alone: PyTorch's format until 1.6, or somebody's own pickle.
    // A safetensors file whose header has such a length has its first brace behind it.
    if matches!(first[..], [0x80, 1..=5, ..]) && first.get(8) != Some(&b'{') {
        return Err(Error::file(
            path,
            "is a bare pickle (torch.save before PyTorch 1.6?), which is not read; write it anew with a newer PyTorch: \
             torch.save(torch.load(FILE, weights_only=True), NEW)",
        ));
    }
    Ok((Format::Safetensors, header::read(path)?))
}

#[derive(Deserialize)]
struct Index {
    /// The shard of each tensor.
    weight_map: BTreeMap<String, String>,
}

/// The files that an index names, which must lie beside it and hold what it says.
fn shards(index: &Path) -> Result<Vec<WeightFile>> {
    let wrong = |what: String| Error::file(index, what);
    let found: Index = serde_json::from_value(json(index)?)
        .map_err(|e| wrong(format!("is not an index of weight files: {e}")))?;
    let names: BTreeSet<&String> = found.weight_map.values().collect();
    if names.is_empty() {
        return Err(wrong("names no file".into()));
    }
    let folder = index.parent().unwrap_or(Path::new("."));
    let mut files = Vec::new();
    for name in names {
        // Nothing outside the folder, whatever the index says.
        if Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(wrong(format!(
                "names `{name}`; the name of a file beside it is expected"
            )));
        }
        let (_, file) = weight_file(&folder.join(name))?;
        for entry in &file.entries {
            match found.weight_map.get(&entry.name) {
                Some(place) if place == name => {}
                place => {
                    return Err(Error::file(
                        &file.path,
                        format!(
                            "has `{}`, which the index {} {}; copy files and index anew",
                            entry.name,
                            index.display(),
                            place.map_or("does not name".into(), |p| format!("places in `{p}`"))
                        ),
                    ));
                }
            }
        }
        files.push(file);
    }
    let held: BTreeSet<&str> = files
        .iter()
        .flat_map(|f| &f.entries)
        .map(|e| e.name.as_str())
        .collect();
    if let Some((name, place)) = found
        .weight_map
        .iter()
        .find(|(n, _)| !held.contains(n.as_str()))
    {
        return Err(wrong(format!(
            "places `{name}` in `{place}`, which does not have it; copy files and index anew"
        )));
    }
    Ok(files)
}

/// A small JSON file.
fn json(path: &Path) -> Result<Value> {
    const MOST: u64 = 64 << 20;
    let bytes = first_bytes(path, MOST)?;
    serde_json::from_slice(&bytes).map_err(|e| Error::file(path, format!("is not JSON: {e}")))
}

/// What a folder holds.
fn names(folder: &Path) -> Result<Vec<String>> {
    let failed = |e: std::io::Error| Error::file(folder, format!("could not be read: {e}"));
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        names.push(
            entry
                .map_err(failed)?
                .file_name()
                .to_string_lossy()
                .into_owned(),
        );
    }
    names.sort();
    Ok(names)
}
