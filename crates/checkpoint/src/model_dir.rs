use std::fs;
use std::path::Path;

use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tinyfusion_core::{Error, ParamSpec, Result, StateDict};

use crate::atomic::{Staged, stage, write_folder};
use crate::dtype::DTypePolicy;
use crate::load::{Loaded, load_as};
use crate::provenance::Provenance;
use crate::save::{Metadata, write_safetensors};

/// The weights of a model directory.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The description of a model directory.
pub const CONFIG_FILE: &str = "config.json";

/// The content of a model directory.
#[derive(Debug, Clone)]
pub struct LoadedModel {
    /// The weights, their path and their hash.
    pub weights: Loaded,
    /// What was saved as config: `{"architecture": "DiT", "model": {…}}`.
    pub config: Value,
    /// Where the weights came from.
    pub provenance: Provenance,
}

impl LoadedModel {
    /// The same, if the weights have exactly the `expected` names and shapes.
    pub fn checked(mut self, expected: &[ParamSpec]) -> Result<Self> {
        self.weights = self.weights.checked(expected)?;
        Ok(self)
    }
}

/// Everything in `config.json`. Its hash ties it to the weights beside it: the two files cannot be
/// replaced in one step, so a mixture of old and new has to be noticed when it is loaded.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ConfigFile {
    pub(crate) architecture: String,
    pub(crate) model: Map<String, Value>,
    #[serde(default)]
    pub(crate) provenance: Provenance,
    /// Absent in a config that was written by hand: then nothing is compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) weights: Option<WeightsRecord>,
    /// Other keys of the caller's config.
    #[serde(flatten)]
    pub(crate) rest: Map<String, Value>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct WeightsRecord {
    pub(crate) sha256: String,
    pub(crate) parameters: usize,
}

/// Writes a model directory and returns the SHA-256 of its weights.
///
/// `config` is an object with `architecture` (a name) and `model` (an object); the keys `weights` and
/// `provenance` are this function's own. A new directory is written under another name and renamed when
/// whole. In an existing one both files are written beside their places first, then renamed, weights
/// before config: a kill in between is detected when the directory is loaded.
pub fn save_model_dir(
    dir: impl AsRef<Path>,
    tensors: &StateDict,
    config: &Value,
    provenance: &Provenance,
    dtype: DTypePolicy,
) -> Result<String> {
    save_model_dir_with(dir, tensors, config, provenance, dtype, &[])
}

/// As [`save_model_dir`], with other files (name, text) in the directory from the moment that it is there: what `cut`
/// and `narrow` say of their choice.
pub fn save_model_dir_with(
    dir: impl AsRef<Path>,
    tensors: &StateDict,
    config: &Value,
    provenance: &Provenance,
    dtype: DTypePolicy,
    beside: &[(&str, String)],
) -> Result<String> {
    let dir = dir.as_ref();
    let stage_all = |folder: &Path| -> Result<(Vec<Staged>, String)> {
        let ([weights, config], sha256) =
            stage_files(folder, dir, tensors, config, provenance, dtype)?;
        let mut staged = vec![weights];
        for (name, text) in beside {
            staged.push(stage(&folder.join(name), |w| w.write_all(text.as_bytes()))?);
        }
        staged.push(config);
        Ok((staged, sha256))
    };
    if dir.exists() {
        let (staged, sha256) = stage_all(dir)?;
        for file in staged {
            file.commit()?;
        }
        return Ok(sha256);
    }
    let mut written = String::new();
    write_folder(dir, |folder| {
        let (staged, sha256) = stage_all(folder)?;
        written = sha256;
        staged.into_iter().try_for_each(Staged::commit)
    })?;
    Ok(written)
}

/// Weights and config, whole on disk in `folder` but not yet in their places; in the order in which
/// they have to be put there. Errors about the config name `dir`.
fn stage_files(
    folder: &Path,
    dir: &Path,
    tensors: &StateDict,
    config: &Value,
    provenance: &Provenance,
    dtype: DTypePolicy,
) -> Result<([Staged; 2], String)> {
    // Before the weights, which may take minutes.
    let mut config = config_file(config, provenance, tensors).map_err(|e| Error::file(dir, e))?;
    let mut sha256 = String::new();
    let weights = stage(&folder.join(WEIGHTS_FILE), |w| {
        sha256 = write_safetensors(w, tensors, &Metadata::new(), dtype)?;
        Ok(())
    })?;
    if let Some(record) = &mut config.weights {
        record.sha256.clone_from(&sha256);
    }
    let config = stage(&folder.join(CONFIG_FILE), |w| {
        serde_json::to_writer_pretty(&mut *w, &config)?;
        w.write_all(b"\n")
    })?;
    Ok(([weights, config], sha256))
}

fn config_file(config: &Value, provenance: &Provenance, tensors: &StateDict) -> Result<ConfigFile> {
    let wrong = |what: String| Error::usage(format!("the model's config {what}"));
    let mut config = config
        .as_object()
        .cloned()
        .ok_or_else(|| wrong(format!("must be an object, found {config}")))?;
    for own in ["weights", "provenance"] {
        if config.contains_key(own) {
            return Err(wrong(format!(
                "must not have the key `{own}`: it is written with the weights"
            )));
        }
    }
    let Some(Value::String(architecture)) = config.remove("architecture") else {
        return Err(wrong(
            "needs `architecture`, the name of the model family".into(),
        ));
    };
    let Some(Value::Object(model)) = config.remove("model") else {
        return Err(wrong(
            "needs `model`, an object with the network's sizes".into(),
        ));
    };
    let weights = Some(WeightsRecord {
        sha256: String::new(),
        parameters: tensors.elem_count(),
    });
    Ok(ConfigFile {
        architecture,
        model,
        provenance: provenance.clone(),
        weights,
        rest: config,
    })
}

/// Loads a model directory, with floating-point tensors converted to `dtype`, and checks that weights
/// and config belong together (where the config records the weights' hash, as every one written here does).
pub fn load_model_dir(
    dir: impl AsRef<Path>,
    dtype: DTypePolicy,
    device: &Device,
) -> Result<LoadedModel> {
    let dir = dir.as_ref();
    let config = read_config(dir)?;
    let path = dir.join(WEIGHTS_FILE);
    let weights = load_as(&path, dtype, device)?;
    let recorded = config.weights.as_ref().map(|w| &w.sha256);
    if let Some(sha256) = recorded.filter(|sha256| **sha256 != weights.sha256) {
        return Err(Error::file(
            &path,
            format!(
                "does not belong to the {CONFIG_FILE} beside it, which expects SHA-256 {sha256}, found {}: a save was \
                 interrupted or a file was exchanged; save the model again",
                weights.sha256
            ),
        ));
    }
    let provenance = config.provenance.clone();
    Ok(LoadedModel {
        weights,
        config: config.into_config(),
        provenance,
    })
}

impl ConfigFile {
    /// The caller's part.
    pub(crate) fn into_config(self) -> Value {
        let mut config = self.rest;
        config.insert("architecture".into(), Value::String(self.architecture));
        config.insert("model".into(), Value::Object(self.model));
        Value::Object(config)
    }
}

pub(crate) fn read_config(dir: &Path) -> Result<ConfigFile> {
    if !dir.is_dir() {
        let what = if dir.exists() {
            "is not a folder"
        } else {
            "does not exist"
        };
        return Err(Error::file(
            dir,
            format!("{what}; a model directory with {WEIGHTS_FILE} and {CONFIG_FILE} is expected"),
        ));
    }
    let path = dir.join(CONFIG_FILE);
    let text = fs::read(&path).map_err(|e| {
        // The folder of a training run is easily taken for the model that it made.
        let inner = dir.join("model");
        let hint = if inner.join(CONFIG_FILE).is_file() {
            format!("; did you mean {}?", inner.display())
        } else {
            String::new()
        };
        Error::file(
            &path,
            format!("could not be read: {e}; every model directory has one{hint}"),
        )
    })?;
    serde_json::from_slice(&text)
        .map_err(|e| Error::file(&path, format!("is not a model's config: {e}")))
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;
    use serde_json::json;

    use super::*;
    use crate::atomic::remove_partials;

    fn weights(value: f32) -> StateDict {
        [(
            "w".to_string(),
            Tensor::full(value, (2, 2), &Device::Cpu).unwrap(),
        )]
        .into_iter()
        .collect()
    }

    fn value(dir: &Path) -> Result<f32> {
        let model = load_model_dir(dir, DTypePolicy::F32, &Device::Cpu)?;
        Ok(model
            .weights
            .tensors
            .require("w")?
            .max_all()?
            .to_scalar::<f32>()?)
    }

    /// A process killed after `commits` of the two renames: leaves the rest behind as partial files.
    fn killed_save(dir: &Path, commits: usize) {
        let config = json!({"architecture": "Toy", "model": {}});
        let (staged, _) = stage_files(
            dir,
            dir,
            &weights(2.0),
            &config,
            &Provenance::default(),
            DTypePolicy::Keep,
        )
        .unwrap();
        for (i, file) in staged.into_iter().enumerate() {
            if i < commits {
                file.commit().unwrap();
            } else {
                std::mem::forget(file);
            }
        }
    }

    #[test]
    fn a_killed_replacement_never_mixes_old_and_new() {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({"architecture": "Toy", "model": {}});
        for (commits, left) in [(0, 2), (1, 1), (2, 0)] {
            let dir = folder.path().join(commits.to_string());
            save_model_dir(
                &dir,
                &weights(1.0),
                &config,
                &Provenance::default(),
                DTypePolicy::Keep,
            )
            .unwrap();
            killed_save(&dir, commits);
            match commits {
                0 => assert_eq!(value(&dir).unwrap(), 1.0),
                1 => {
                    let error = value(&dir).unwrap_err().to_string();
                    assert!(
                        error.contains("does not belong") && error.contains(WEIGHTS_FILE),
                        "{error}"
                    );
                }
                _ => assert_eq!(value(&dir).unwrap(), 2.0),
            }
            assert_eq!(remove_partials(&dir).unwrap().len(), left);
            // Running the same command again mends it.
            save_model_dir(
                &dir,
                &weights(3.0),
                &config,
                &Provenance::default(),
                DTypePolicy::Keep,
            )
            .unwrap();
            assert_eq!(value(&dir).unwrap(), 3.0);
        }
    }
}
