use std::collections::BTreeSet;

use globset::{Glob, GlobSet, GlobSetBuilder};
use tinyfusion_core::{Error, Result};

/// Endings of weight files, the safest first.
const WEIGHTS: [&str; 5] = ["safetensors", "bin", "pt", "pth", "ckpt"];
/// What a diffusers pipeline has in its root.
const PIPELINE: &str = "model_index.json";

/// Which files of a repository's folder are wanted.
#[derive(Debug, Clone)]
pub struct Selection(Rule);

#[derive(Debug, Clone)]
enum Rule {
    Model,
    Globs(GlobSet, Vec<String>),
}

impl Selection {
    /// What a model needs: every `.json`, and in each folder the weights in the best format there is (`.safetensors`,
    /// else `.bin`, `.pt`, `.pth` or `.ckpt`).
    ///
    /// Left out are variants beside their original (`x.fp16.safetensors` beside `x.safetensors`) and whole checkpoints in
    /// the root of a diffusers pipeline, whose models have folders of their own.
    pub fn model() -> Self {
        Self(Rule::Model)
    }

    /// Files that match any of these patterns. `*` matches slashes too, as the Python tools' patterns do.
    pub fn globs(patterns: &[impl AsRef<str>]) -> Result<Self> {
        let mut set = GlobSetBuilder::new();
        let mut texts = Vec::new();
        for pattern in patterns {
            let pattern = pattern.as_ref();
            set.add(
                Glob::new(pattern)
                    .map_err(|e| Error::usage(format!("the pattern {pattern:?}: {e}")))?,
            );
            texts.push(pattern.to_owned());
        }
        let set = set.build().map_err(|e| Error::usage(e.to_string()))?;
        Ok(Self(Rule::Globs(set, texts)))
    }

    /// What is wanted, in words.
    pub(crate) fn wanted(&self) -> String {
        match &self.0 {
            Rule::Model => format!("weights (.{})", WEIGHTS.join(", .")),
            Rule::Globs(_, texts) => format!("file matching {}", texts.join(" or ")),
        }
    }

    /// The wanted ones of `files`, which are relative to the folder; `None` if what is wanted is not among them.
    pub(crate) fn pick<'f>(&self, files: &[&'f str]) -> Option<Vec<&'f str>> {
        match &self.0 {
            Rule::Globs(set, _) => {
                let picked: Vec<_> = files.iter().copied().filter(|f| set.is_match(f)).collect();
                (!picked.is_empty()).then_some(picked)
            }
            Rule::Model => model(files),
        }
    }
}

fn model<'f>(files: &[&'f str]) -> Option<Vec<&'f str>> {
    let all: BTreeSet<&str> = files.iter().copied().collect();
    let pipeline = all.contains(PIPELINE);
    let best = |folder: &str| {
        WEIGHTS.into_iter().find(|ending| {
            files
                .iter()
                .any(|f| split(f).0 == folder && ending_of(f) == *ending)
        })
    };
    let mut weights = 0;
    let picked: Vec<&str> = files
        .iter()
        .copied()
        .filter(|file| {
            let (folder, _) = split(file);
            let ending = ending_of(file);
            if ending == "json" {
                return true;
            }
            let taken = WEIGHTS.contains(&ending)
                && best(folder) == Some(ending)
                && !(pipeline && folder.is_empty())
                && !is_variant(file, &all);
            weights += usize::from(taken);
            taken
        })
        .collect();
    (weights > 0).then_some(picked)
}

fn split(file: &str) -> (&str, &str) {
    file.rsplit_once('/').unwrap_or(("", file))
}

fn ending_of(file: &str) -> &str {
    split(file).1.rsplit_once('.').map_or("", |(_, e)| e)
}

/// `x.fp16.safetensors` where `x.safetensors` stands too.
fn is_variant(file: &str, all: &BTreeSet<&str>) -> bool {
    let Some((stem, ending)) = file.rsplit_once('.') else {
        return false;
    };
    stem.rsplit_once('.').is_some_and(|(original, variant)| {
        !variant.contains('/') && all.contains(format!("{original}.{ending}").as_str())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picked(files: &[&str]) -> Vec<String> {
        let picked = Selection::model().pick(files).unwrap_or_default();
        picked.into_iter().map(str::to_owned).collect()
    }

    #[test]
    fn a_pipeline_gives_its_folders_in_the_best_format() {
        let files = [
            "README.md",
            "model_index.json",
            "scheduler/scheduler_config.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.bin",
            "transformer/diffusion_pytorch_model.fp16.safetensors",
            "transformer/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.bin",
            "whole.safetensors",
        ];
        assert_eq!(
            picked(&files),
            [
                "model_index.json",
                "scheduler/scheduler_config.json",
                "transformer/config.json",
                "transformer/diffusion_pytorch_model.safetensors",
                "vae/config.json",
                "vae/diffusion_pytorch_model.bin",
            ]
        );
    }

    #[test]
    fn shards_and_lone_variants_are_weights() {
        let files = [
            "a-00001-of-00002.safetensors",
            "a-00002-of-00002.safetensors",
        ];
        assert_eq!(picked(&files), files);
        assert_eq!(picked(&["x.fp16.safetensors"]), ["x.fp16.safetensors"]);
        assert_eq!(picked(&["DiT-XL-2-256x256.pt"]), ["DiT-XL-2-256x256.pt"]);
    }

    #[test]
    fn no_weights_is_no_model() {
        assert!(Selection::model().pick(&["config.json"]).is_none());
        assert!(Selection::model().pick(&[]).is_none());
    }

    #[test]
    fn patterns_reach_into_folders() {
        let globs = Selection::globs(&["config.json", "*.pt"]).unwrap();
        let files = ["a.pt", "config.json", "deep/b.pt", "deep/config.json"];
        assert_eq!(
            globs.pick(&files).unwrap(),
            ["a.pt", "config.json", "deep/b.pt"]
        );
        assert!(globs.pick(&["x"]).is_none());
        let message = Selection::globs(&["[a"]).unwrap_err().to_string();
        assert!(message.contains("[a"), "{message}");
    }
}
