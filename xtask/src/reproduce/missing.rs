//! What a run reads and does not make itself: it has to be there before anything runs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::Part;
use super::preset::Preset;
use crate::files;

/// Something that is read, made by no stage before, and not there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Missing {
    pub(super) path: PathBuf,
    /// What to do about it.
    pub(super) advice: String,
}

/// All that is missing, each once.
pub(super) fn of(parts: &[Part]) -> BTreeSet<Missing> {
    let mut made: Vec<&Path> = Vec::new();
    let mut missing = BTreeSet::new();
    for Part { preset, plan, .. } in parts {
        let images = preset.latents.iter().map(|l| l.images.as_path());
        let inputs = plan.stages.iter().map(|stage| {
            let read: Vec<&Path> = stage.inputs.iter().map(PathBuf::as_path).collect();
            let outputs: Vec<&Path> = stage.outputs.iter().map(PathBuf::as_path).collect();
            (read, outputs)
        });
        for (read, outputs) in std::iter::once((images.collect(), Vec::new())).chain(inputs) {
            for path in read.into_iter().filter_map(files::local) {
                let path = described(preset, path);
                // A folder is there when a stage writes into it.
                if !path.exists() && !made.iter().any(|m| m.starts_with(&path)) {
                    let advice = advice(preset, &path);
                    missing.insert(Missing { path, advice });
                }
            }
            made.extend(outputs);
        }
    }
    missing
}

/// A model's folder that is there has to describe itself, or it is none.
fn described(preset: &Preset, path: PathBuf) -> PathBuf {
    let is_model = path == preset.teacher || preset.classifier.as_ref() == Some(&path);
    if is_model && path.is_dir() && !path.join("model_index.json").exists() {
        return path.join("config.json");
    }
    path
}

fn advice(preset: &Preset, path: &Path) -> String {
    match preset.by_hand.iter().find(|b| b.path == path) {
        Some(by_hand) => format!("to be fetched by hand: {}", by_hand.say()),
        None => format!(
            "the preset {} reads it, and no stage makes it (`cargo xtask pretrain --family all --export` makes the embedded \
             models; `--preset paper` runs presets that need each other's models in turn)",
            preset.name
        ),
    }
}

/// An error that names all that is missing.
pub(super) fn check(parts: &[Part]) -> Result<()> {
    let missing = of(parts);
    if missing.is_empty() {
        return Ok(());
    }
    let lines = missing
        .iter()
        .map(|m| format!("\n  {}: {}", m.path.display(), m.advice));
    bail!("missing:{}", lines.collect::<String>())
}
