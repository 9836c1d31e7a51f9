use std::path::Path;

use anyhow::Result;
use candle_core::Device;
use serde_json::{Value, json};
use tinyfusion::checkpoint::{DTypePolicy, Provenance, load_model_dir, save_model_dir};
use tinyfusion::core::{Error, ParamSpec, StateDict};
use tinyfusion::models::{Classifier, ClassifierConfig};

use crate::family::{Architecture, expected, with_family};

const CLASSIFIER: &str = "shapes-classifier";

/// The tensors of the network that a `config.json` describes, or nothing where it is of a family that this program
/// does not know.
pub(crate) fn expected_tensors(path: &Path, config: &Value) -> Result<Option<Vec<ParamSpec>>> {
    if let Some(architecture) = Architecture::named(config) {
        return Ok(Some(with_family!(architecture, expected(path, config))?));
    }
    if config.get("architecture").and_then(Value::as_str) != Some(CLASSIFIER) {
        return Ok(None);
    }
    let config: ClassifierConfig = section(path, config, CLASSIFIER, "model")?;
    config.validate().map_err(|e| Error::file(path, e))?;
    Ok(Some(config.params()))
}

/// Writes a classifier's model directory.
pub(crate) fn save_classifier(
    path: &Path,
    config: &ClassifierConfig,
    weights: &StateDict,
    provenance: &Provenance,
    dtype: DTypePolicy,
) -> Result<()> {
    make_parent(path)?;
    let description = json!({ "architecture": CLASSIFIER, "model": config });
    save_model_dir(path, weights, &description, provenance, dtype)?;
    Ok(())
}

/// A classifier from a model directory.
pub(crate) struct ClassifierModel {
    pub(crate) config: ClassifierConfig,
    pub(crate) net: Classifier,
    /// Hash of the weight file.
    pub(crate) sha256: String,
}

/// Reads a classifier's model directory.
pub(crate) fn load_classifier(path: &Path) -> Result<ClassifierModel> {
    let loaded = load_model_dir(path, DTypePolicy::F32, &Device::Cpu)?;
    let config: ClassifierConfig = section(path, &loaded.config, CLASSIFIER, "model")?;
    config.validate().map_err(|e| Error::file(path, e))?;
    let weights = loaded.checked(&config.params())?.weights;
    Ok(ClassifierModel {
        net: Classifier::new(&config, &weights.tensors)?,
        config,
        sha256: weights.sha256,
    })
}

pub(crate) fn make_parent(path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|e| Error::file(parent, e))?;
    }
    Ok(())
}

/// `config[key]`, after checking that the directory holds what is wanted.
pub(crate) fn section<T: serde::de::DeserializeOwned>(
    path: &Path,
    config: &Value,
    architecture: &str,
    key: &str,
) -> Result<T> {
    let found = config
        .get("architecture")
        .and_then(Value::as_str)
        .unwrap_or("nothing named");
    if found != architecture {
        return Err(Error::file(
            path,
            format!("config.json describes `{found}`, expected `{architecture}`"),
        )
        .into());
    }
    let value = config.get(key).cloned().unwrap_or(Value::Null);
    Ok(serde_json::from_value(value)
        .map_err(|e| Error::file(path, format!("config.json: {key}: {e}")))?)
}
