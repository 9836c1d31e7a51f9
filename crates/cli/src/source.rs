//! A model of any format: a model directory describes itself, everything else is recognised by its tensors.

use std::path::Path;

use anyhow::Result;
use candle_core::Device;
use serde_json::{Map, Value, json};
use tinyfusion::checkpoint::{
    Checkpoint, DTypePolicy, Format, Loaded, LoadedModel, Provenance, Root, TensorEntry,
    load_model_dir,
};
use tinyfusion::core::Error;
use tinyfusion::models::import::{Recognised, Shapes, Sizes, recognise};

use crate::address::Address;
use crate::class_names::{self, ClassNames};
use crate::family::{Dit, Family, MaskedAutoregressive, Sit};
use crate::model::expected_tensors;

/// The entry of a safetensors file's header that says what `tinyfusion export` wrote there.
pub(crate) const DESCRIPTION: &str = "tinyfusion";

/// A model whose headers were read.
pub(crate) struct Source {
    checkpoint: Checkpoint,
    pub(crate) root: Root,
    /// What a model directory's config.json says beside provenance.
    pub(crate) config: Value,
    /// Where it did not say so itself.
    pub(crate) recognised: Option<Recognised>,
    pub(crate) provenance: Provenance,
}

impl Source {
    /// Reads what stands at an address, but no weights; the config has the names of the classes that lie beside it.
    pub(crate) fn open(address: &Path) -> Result<Self> {
        let mut source = Self::open_alone(address)?;
        match ClassNames::beside(source.checkpoint.path()) {
            Ok(names) if !names.is_empty() => source.config[class_names::KEY] = json!(names),
            Ok(_) => {}
            // It may be somebody else's file of that name, and numbers do without.
            Err(e) => tracing::warn!("{e}"),
        }
        Ok(source)
    }

    fn open_alone(address: &Path) -> Result<Self> {
        let address = Address::parse(address)?;
        let checkpoint = Checkpoint::open(&address.path)?;
        if checkpoint.format() == Format::ModelDir {
            if address.says_more() {
                return Err(Error::usage(format!(
                    "{}: a model directory says itself what it is; nothing may stand behind its path",
                    address.path.display()
                ))
                .into());
            }
            let config = checkpoint.config().cloned().unwrap_or_default();
            return Ok(Self {
                checkpoint,
                root: Root::Plain,
                config,
                recognised: None,
                provenance: Provenance::default(),
            });
        }
        let root = checkpoint.choose(address.root)?;
        if checkpoint.format() == Format::Safetensors
            && let Some(text) = checkpoint.metadata().get(DESCRIPTION)
        {
            let (config, provenance) = described(&address.path, text)?;
            return Ok(Self {
                checkpoint,
                root,
                config,
                recognised: None,
                provenance,
            });
        }
        let recognised = recognised(&checkpoint, root, &address)?;
        Ok(Self {
            config: config_of(&recognised.sizes)?,
            provenance: noted(&checkpoint, root, &recognised),
            checkpoint,
            root,
            recognised: Some(recognised),
        })
    }

    /// Reads the weights onto a device, in f32 and in the official names.
    pub(crate) fn load(self, device: &Device) -> Result<LoadedModel> {
        let path = self.checkpoint.path();
        if self.checkpoint.format() == Format::ModelDir {
            let loaded = load_model_dir(path, DTypePolicy::F32, device)?;
            return Ok(LoadedModel {
                config: self.config,
                ..loaded
            });
        }
        let (root, dtype) = (self.root, DTypePolicy::F32);
        let weights = match &self.recognised {
            None => self.checkpoint.load(root, dtype, device)?,
            Some(recognised) => {
                for note in &recognised.assumed {
                    tracing::info!("{}: {note}", path.display());
                }
                let mut translator = recognised.translator();
                let mut sink = |name, tensor| {
                    translator
                        .push(name, tensor)
                        .map_err(|e| Error::file(path, e))
                };
                let loaded = self.checkpoint.load_each(root, dtype, device, &mut sink)?;
                Loaded {
                    tensors: translator.finish().map_err(|e| Error::file(path, e))?,
                    ..loaded
                }
            }
        };
        Ok(LoadedModel {
            weights,
            config: self.config,
            provenance: self.provenance,
        })
    }
}

/// How many values the network at an address has.
pub(crate) fn parameters_of(address: &Path) -> Result<usize> {
    let source = Source::open(address)?;
    let values = |shape: &[usize]| shape.iter().product::<usize>();
    Ok(match expected_tensors(address, &source.config)? {
        Some(expected) => expected.iter().map(|p| values(&p.shape)).sum(),
        None => {
            let tensors = source.checkpoint.tensors(source.root);
            tensors.iter().map(|t| values(&t.shape)).sum()
        }
    })
}

/// What the tensors under `root` are.
fn recognised(checkpoint: &Checkpoint, root: Root, address: &Address) -> Result<Recognised> {
    let config = match checkpoint.format() {
        Format::Diffusers => checkpoint.config(),
        _ => None,
    };
    let tensors = checkpoint.tensors(root);
    let found = recognise(&shapes(&tensors), config, &address.hints);
    Ok(found.map_err(|e| match e {
        Error::Usage(what) => Error::usage(format!("{}: {what}", address.path.display())),
        other => Error::file(&address.path, other),
    })?)
}

fn shapes(tensors: &[TensorEntry]) -> Shapes<'_> {
    tensors
        .iter()
        .map(|t| (t.name.as_str(), t.shape.as_slice()))
        .collect()
}

/// As a model directory's config.json would describe them.
fn config_of(sizes: &Sizes) -> Result<Value> {
    Ok(match sizes {
        // What the official code makes of a network without learned σ.
        Sizes::Dit(config) if !config.learn_sigma => json!({
            "architecture": Dit::NAME,
            "model": config,
            "diffusion": { "variance": "fixed_large" },
        }),
        Sizes::Dit(config) => json!({ "architecture": Dit::NAME, "model": config }),
        Sizes::Sit(config) => json!({ "architecture": Sit::NAME, "model": config }),
        Sizes::Mar(config) => {
            json!({ "architecture": MaskedAutoregressive::NAME, "model": config })
        }
    })
}

/// What a safetensors file of `tinyfusion export` says of itself: config and provenance.
fn described(path: &Path, text: &str) -> Result<(Value, Provenance)> {
    let wrong = |e: serde_json::Error| {
        Error::file(path, format!("its header's entry `{DESCRIPTION}`: {e}"))
    };
    let mut all: Map<String, Value> = serde_json::from_str(text).map_err(wrong)?;
    let provenance = match all.remove("provenance") {
        None => Provenance::default(),
        Some(value) => serde_json::from_value(value).map_err(wrong)?,
    };
    Ok((Value::Object(all), provenance))
}

/// What was told and taken for granted, for the provenance of what is made of it.
fn noted(checkpoint: &Checkpoint, root: Root, recognised: &Recognised) -> Provenance {
    let mut provenance = Provenance::default();
    let notes = &mut provenance.notes;
    notes.insert("format".into(), checkpoint.format().to_string());
    if root != Root::Plain {
        notes.insert("root".into(), root.to_string());
    }
    notes.insert("inferred".into(), recognised.inferred.join("; "));
    if !recognised.assumed.is_empty() {
        notes.insert("assumed".into(), recognised.assumed.join("; "));
    }
    provenance
}
