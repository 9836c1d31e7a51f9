use std::collections::{BTreeMap, BTreeSet};

use globset::{Glob, GlobSet, GlobSetBuilder};
use tinyfusion_checkpoint::Weights;
use tinyfusion_core::{Error, Result};

/// What a diffusers pipeline has in its root.
const PIPELINE: &str = "model_index.json";

/// What says what a folder's files are: of a pipeline, a network, a set of latents.
const DESCRIPTIONS: [&str; 3] = [PIPELINE, "config.json", "latents.json"];

/// Which files of a repository's folder are wanted.
#[derive(Debug, Clone)]
pub struct Selection(Rule);

#[derive(Debug, Clone)]
enum Rule {
    Model,
    Globs(GlobSet, Vec<String>),
}

impl Selection {
    /// What a model needs: every `.json`, and in each folder the weights that are read of it ([`Weights`]): whole ones before
    /// those in half precision, and of these the best format there is (`.safetensors`, else `.bin`, `.pt`, `.pth` or `.ckpt`).
    ///
    /// Left out are whole checkpoints in the root of a diffusers pipeline, whose models have folders of their own.
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
            Rule::Model => "weights (.safetensors, .bin, .pt, .pth, .ckpt)".into(),
            Rule::Globs(_, texts) => format!("file matching {}", texts.join(" or ")),
        }
    }

    /// The checkpoints in `files` among which nothing tells which is meant: several, and no description beside them. A reader
    /// of the folder would refuse them.
    pub(crate) fn undecided(&self, files: &[&str]) -> Option<Vec<String>> {
        let described = DESCRIPTIONS.iter().any(|f| files.contains(f));
        if described || matches!(self.0, Rule::Globs(..)) {
            return None;
        }
        let here = files.iter().copied().filter(|f| !f.contains('/'));
        let found = Weights::among(here).checkpoints();
        (found.len() > 1).then_some(found)
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
    let pipeline = files.contains(&PIPELINE);
    let mut folders: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for file in files {
        let (folder, name) = split(file);
        folders.entry(folder).or_default().push(name);
    }
    if pipeline {
        folders.remove("");
    }
    let weights = folders.into_iter().flat_map(|(folder, names)| {
        let found = Weights::among(names).files.into_iter();
        found.map(move |name| whole(folder, &name))
    });
    let weights: BTreeSet<String> = weights.collect();
    let is_wanted = |file: &&&str| file.ends_with(".json") || weights.contains(**file);
    (!weights.is_empty()).then(|| files.iter().filter(is_wanted).copied().collect())
}

fn split(file: &str) -> (&str, &str) {
    file.rsplit_once('/').unwrap_or(("", file))
}

fn whole(folder: &str, name: &str) -> String {
    match folder {
        "" => name.to_owned(),
        _ => format!("{folder}/{name}"),
    }
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
        // Half of the precision is worse than another format, and other weights are none.
        assert_eq!(picked(&["a/x.fp16.safetensors", "a/x.bin"]), ["a/x.bin"]);
        assert!(picked(&["x.non_ema.safetensors"]).is_empty());
        // An index and its shards in half precision are read.
        let half = [
            "x-00001-of-00001.fp16.safetensors",
            "x.safetensors.index.fp16.json",
        ];
        assert_eq!(picked(&half), half);
    }

    #[test]
    fn no_weights_is_no_model() {
        assert!(Selection::model().pick(&["config.json"]).is_none());
        assert!(Selection::model().pick(&[]).is_none());
    }

    #[test]
    fn several_checkpoints_without_a_description_are_undecided() {
        let undecided = |files: &[&str]| Selection::model().undecided(files);
        let two = ["DiT-256.pt", "DiT-512.pt"];
        assert_eq!(undecided(&two), Some(two.map(String::from).to_vec()));
        assert_eq!(undecided(&["DiT-256.pt", "vae/x.pt"]), None);
        assert_eq!(undecided(&[&two[..], &["config.json"]].concat()), None);
        let latents = [
            "latents.json",
            "shard-00000.safetensors",
            "shard-00001.safetensors",
        ];
        assert_eq!(undecided(&latents), None);
        assert_eq!(picked(&latents), latents);
        let shards = ["x-1-of-2.safetensors", "x-2-of-2.safetensors"];
        assert_eq!(undecided(&shards), None);
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
