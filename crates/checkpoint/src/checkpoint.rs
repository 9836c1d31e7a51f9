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

/// What diffusers calls the weights of a model.
const DIFFUSERS_WEIGHTS: &str = "diffusion_pytorch_model";
/// The end of the name of an index of shards.
const INDEX: &str = ".safetensors.index.json";
/// The end of the name of weights that were published in half precision, alone or beside the whole ones.
const HALF: &str = ".fp16.safetensors";
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
        if path.to_string_lossy().ends_with(INDEX) {
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
            return Self::of_transformer(path, &transformer);
        }
        let config = path.join(CONFIG_FILE);
        let has_class = || Some(json(&config).ok()?.get("_class_name").is_some());
        if config.is_file() && has_class() == Some(true) {
            return Self::of_transformer(path, path);
        }
        let mut indices = names(path)?.into_iter().filter(|n| n.ends_with(INDEX));
        if !config.is_file()
            && let (Some(index), None) = (indices.next(), indices.next())
        {
            return Self::of_index(path, &path.join(index));
        }
        if !config.is_file()
            && let Some(file) = only_weights(path)?
        {
            let found = Self::of_file(&file)?;
            // Nothing in its header: weights of a model directory that has lost its config.json.
            if !file.ends_with(WEIGHTS_FILE) || !found.metadata().is_empty() {
                return Ok(found);
            }
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

    /// The folder `path`, whose network lies in its folder `transformer`.
    fn of_transformer(path: &Path, transformer: &Path) -> Result<Self> {
        let config = Some(json(&transformer.join(CONFIG_FILE))?);
        let at = |end: &str| transformer.join(format!("{DIFFUSERS_WEIGHTS}{end}"));
        let files = if at(".safetensors").is_file() {
            vec![header::read(&at(".safetensors"))?]
        } else if at(INDEX).is_file() {
            shards(&at(INDEX))?
        } else if at(".bin").is_file() {
            vec![weight_file(&at(".bin"))?.1]
        } else if at(HALF).is_file() {
            vec![header::read(&at(HALF))?]
        } else {
            let found = names(transformer)?.join(", ");
            return Err(Error::file(
                transformer,
                format!(
                    "has no {DIFFUSERS_WEIGHTS}.safetensors, {DIFFUSERS_WEIGHTS}{INDEX} or .bin; it has {found}"
                ),
            ));
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
        let entries = files.iter().flat_map(|f| &f.entries);
        let names: Vec<&str> = entries.map(|e| e.name.as_str()).collect();
        Ok(Self {
            path: path.to_path_buf(),
            format,
            roots: Root::among(&names),
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
            (None, [first, ..]) => Err(Error::usage(format!(
                "{0}: has the roots {1}, which are different weights; say which is meant: {0}#{first}",
                self.path.display(),
                names.join(", ")
            ))),
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

/// The weight file of a folder that has one and no description: a repository of the original code.
fn only_weights(folder: &Path) -> Result<Option<PathBuf>> {
    let is_weights = |name: &String| {
        let ending = Path::new(name).extension().and_then(|e| e.to_str());
        ending.is_some_and(|e| ["safetensors", "pt", "pth", "ckpt", "bin"].contains(&e))
    };
    let mut found = names(folder)?.into_iter().filter(is_weights);
    Ok(match (found.next(), found.next()) {
        (Some(name), None) => Some(folder.join(name)),
        _ => None,
    })
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
        .map_err(|e| wrong(format!("is not an index of safetensors files: {e}")))?;
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
        let file = header::read(&folder.join(name))?;
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
