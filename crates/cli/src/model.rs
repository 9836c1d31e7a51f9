use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::Device;
use serde_json::{Value, json};
use tinyfusion::checkpoint::{DTypePolicy, Provenance, load_model_dir, save_model_dir};
use tinyfusion::core::{Error, ParamSpec, StateDict};
use tinyfusion::diffusion::{DiffusionConfig, GaussianDiffusion};
use tinyfusion::models::{Classifier, ClassifierConfig, DiT, DiTConfig};

/// A diffusion transformer from a model directory, with the process it was trained under.
pub(crate) struct DiTModel {
    pub(crate) config: DiTConfig,
    pub(crate) diffusion: DiffusionConfig,
    pub(crate) weights: StateDict,
    /// Hash of the weight file.
    pub(crate) sha256: String,
    pub(crate) path: PathBuf,
    /// Where it came from.
    pub(crate) provenance: Provenance,
}

const DIT: &str = "DiT";
const CLASSIFIER: &str = "shapes-classifier";

impl DiTModel {
    /// Reads a model directory, its weights in f32.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let loaded = load_model_dir(path, DTypePolicy::F32, &Device::Cpu)?;
        let config: DiTConfig = section(path, &loaded.config, DIT, "model")?;
        config.validate().map_err(|e| Error::file(path, e))?;
        let diffusion = match loaded.config.get("diffusion") {
            None => DiffusionConfig::default(),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|e| Error::file(path, format!("diffusion: {e}")))?,
        };
        let outputs =
            GaussianDiffusion::new(diffusion.clone())?.output_channels(config.in_channels);
        if outputs != config.out_channels() {
            return Err(Error::file(
                path,
                format!(
                    "config.json: the diffusion ({:?}) needs {outputs} output channels, the model has {} (learn_sigma = {}); \
                     a network without learned σ needs \"diffusion\": {{\"variance\": \"fixed_large\"}} or \"fixed_small\" in its config.json",
                    diffusion.variance,
                    config.out_channels(),
                    config.learn_sigma
                ),
            )
            .into());
        }
        let provenance = loaded.provenance.clone();
        let sha256 = loaded.weights.sha256.clone();
        let weights = loaded.checked(&config.params())?.weights.tensors;
        Ok(Self {
            config,
            diffusion,
            weights,
            sha256,
            path: path.to_path_buf(),
            provenance,
        })
    }

    /// The network on this model's own weights; records nothing.
    pub(crate) fn network(&self) -> Result<DiT> {
        Ok(DiT::new(&self.config, &self.weights)?)
    }

    /// What `config.json` says beside provenance.
    pub(crate) fn description(config: &DiTConfig, diffusion: &DiffusionConfig) -> Result<Value> {
        Ok(json!({ "architecture": DIT, "model": config, "diffusion": diffusion }))
    }
}

/// The tensors of the network that a `config.json` describes, or nothing where it is of a family that this program
/// does not know.
pub(crate) fn expected_tensors(path: &Path, config: &Value) -> Result<Option<Vec<ParamSpec>>> {
    let named = config.get("architecture").and_then(Value::as_str);
    Ok(match named {
        Some(DIT) => {
            let config: DiTConfig = section(path, config, DIT, "model")?;
            config.validate().map_err(|e| Error::file(path, e))?;
            Some(config.params())
        }
        Some(CLASSIFIER) => {
            let config: ClassifierConfig = section(path, config, CLASSIFIER, "model")?;
            config.validate().map_err(|e| Error::file(path, e))?;
            Some(config.params())
        }
        _ => None,
    })
}

/// Writes a DiT's model directory.
pub(crate) fn save_dit(
    path: &Path,
    config: &DiTConfig,
    diffusion: &DiffusionConfig,
    weights: &StateDict,
    provenance: &Provenance,
    dtype: DTypePolicy,
) -> Result<()> {
    make_parent(path)?;
    save_model_dir(
        path,
        weights,
        &DiTModel::description(config, diffusion)?,
        provenance,
        dtype,
    )?;
    Ok(())
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

fn make_parent(path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|e| Error::file(parent, e))?;
    }
    Ok(())
}

/// `config[key]`, after checking that the directory holds what is wanted.
fn section<T: serde::de::DeserializeOwned>(
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
