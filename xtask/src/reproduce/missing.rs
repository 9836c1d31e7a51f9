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
        let images = images.chain(preset.by_hand.iter().map(|b| b.path.as_path()));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reproduce::plan::plan;
    use crate::reproduce::recipe::tests::embedded;

    #[test]
    fn the_paper_goes_from_the_hub_to_the_table() {
        let mut recipe = embedded("paper");
        recipe.find_teachers(Path::new("runs/paper")).unwrap();
        let names: Vec<&str> = recipe.parts.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "TinyDiT-D19",
                "TinyDiT-D14",
                "TinyDiT-D7",
                "TinySiT-D14",
                "TinyMAR-D16"
            ]
        );
        let mut made: Vec<PathBuf> = Vec::new();
        for preset in &recipe.parts {
            let out = Path::new("runs/paper").join(&preset.name);
            let plan = plan(preset, &out, Path::new("runs/paper/hub.lock"), 1).unwrap();
            assert_eq!(plan.stages[0].args[0], "encode");
            for stage in &plan.stages {
                let words = stage.args.join(" ");
                // Everything from the hub is pinned by one lock.
                let locked = words.ends_with("--lock runs/paper/hub.lock");
                assert_eq!(words.contains("hub://"), locked, "{words}");
                // What looks at images looks at these.
                const BLIND: [&str; 2] = ["--criterion oracle", "--criterion random "];
                let looks = ["learn", "distill", "loss", "narrow", "score"];
                let looks = looks.contains(&stage.args[0].as_str())
                    && !BLIND.iter().any(|blind| words.contains(blind));
                assert_eq!(words.contains("--data data/latents-"), looks, "{words}");
                if stage.args[0] == "evaluate" {
                    assert!(words.contains("--weights data/pt_inception"), "{words}");
                }
            }
            // What is neither on the hub nor made by a part before is fetched by hand.
            let by_hand: Vec<&Path> = preset.by_hand.iter().map(|b| b.path.as_path()).collect();
            for input in plan.stages.iter().flat_map(|s| &s.inputs) {
                let Some(path) = files::local(input) else {
                    continue;
                };
                made.extend(plan.stages.iter().flat_map(|s| s.outputs.clone()));
                let known =
                    by_hand.contains(&path.as_path()) || made.iter().any(|m| m.starts_with(&path));
                assert!(known, "{}: nothing makes {}", preset.name, path.display());
            }
        }
    }
}
