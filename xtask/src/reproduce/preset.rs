//! The preset of an experiment: a TOML under `assets/presets`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tinyfusion_report::Study;

use super::spec::{Budget, DENSE, Masks, Recoveries, flags, merged};

/// Everything that one experiment is made of. The tables of flags hold long flags of the binary's commands and are
/// handed to it as they stand.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Preset {
    /// Name of the preset: the stem of its file.
    #[serde(skip_deserializing)]
    pub(crate) name: String,
    /// The table or figure of the paper that it repeats in small, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) study: Option<Study>,
    /// The dense teacher: a model as the binary's commands take it, also `hub://…`.
    pub(crate) teacher: PathBuf,
    /// Model directory of the classifier whose features are compared, where those of Inception are not
    /// (`evaluate.weights`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) classifier: Option<PathBuf>,
    /// The latents that everything is trained and judged on, where that is not the embedded set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) latents: Option<Latents>,
    /// What no program may download.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) by_hand: Vec<ByHand>,
    /// How much comes from places on the hub, for a day on which it cannot be asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) on_hub: Vec<OnHub>,
    /// The teacher's sizes, by the name of the binary's preset: what `--dry-run` measures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    /// The teacher's blocks, where it was cut from that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) depth: Option<u32>,
    /// Seed of every search and every recovery; random mask i has seed + i.
    pub(crate) seed: u64,
    /// Flags of every `tinyfusion learn`.
    #[serde(default)]
    pub(crate) learn: toml::Table,
    /// Flags of every `tinyfusion score` that looks at images.
    #[serde(default)]
    pub(crate) score: toml::Table,
    /// In the order of the table.
    pub(crate) masks: Vec<Masks>,
    /// Flags of every `tinyfusion distill`: the same budget for every row.
    pub(crate) recover: toml::Table,
    pub(crate) recoveries: Vec<Recoveries>,
    /// Several budgets in place of the one in `recover`.
    #[serde(default)]
    pub(crate) budgets: Vec<Budget>,
    /// Flags of `tinyfusion loss`.
    pub(crate) loss: toml::Table,
    /// Flags of `tinyfusion activations`, which then looks at the dense and every recovered model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) activations: Option<toml::Table>,
    pub(crate) sample: Sample,
    pub(crate) evaluate: Evaluate,
    pub(crate) seconds: Seconds,
}

/// Sampling, the same noise for every row.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sample {
    /// What `steps` and `fewer_steps` count, a flag of `sample`: `steps`, or the `iterations` of a MAR.
    #[serde(default)]
    pub(crate) counted: Counted,
    /// Sampling steps of every row but the controls.
    pub(crate) steps: u64,
    /// Sampling steps of the dense controls; half of `steps` costs what half the depth costs.
    pub(crate) fewer_steps: Vec<u64>,
    pub(crate) flags: toml::Table,
}

/// What half the depth and half the steps save alike: passes of the network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Counted {
    #[default]
    Steps,
    Iterations,
}

impl Counted {
    /// The flag of `sample`.
    pub(crate) fn flag(self) -> &'static str {
        match self {
            Self::Steps => "--steps",
            Self::Iterations => "--iterations",
        }
    }

    /// For people.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Steps => "sampling steps",
            Self::Iterations => "iterations",
        }
    }
}

/// Images that are encoded once, for all presets that name the same folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Latents {
    /// Folder of images by class.
    pub(crate) images: PathBuf,
    /// How many images there are: for the estimate of `--dry-run`.
    pub(crate) count: u64,
    /// The autoencoder, also `hub://…`.
    pub(crate) vae: PathBuf,
    /// Folder that gets the latents.
    pub(crate) folder: PathBuf,
    /// Flags of `tinyfusion encode`.
    #[serde(default)]
    pub(crate) flags: toml::Table,
}

/// A file or folder that people fetch for themselves: because of its licence, or because it is on no hub.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ByHand {
    /// Where it is expected.
    pub(crate) path: PathBuf,
    /// What it is.
    pub(crate) what: String,
    /// Where it is to be had.
    pub(crate) from: String,
    /// Size of the download, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gigabytes: Option<f64>,
}

impl ByHand {
    /// What it is, how large, and where it is to be had.
    pub(crate) fn say(&self) -> String {
        let size = self.gigabytes.map(|size| format!(", {size} GB"));
        format!("{}{}: {}", self.what, size.unwrap_or_default(), self.from)
    }
}

/// A place on the hub that the preset reads.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OnHub {
    /// `hub://OWNER/REPO`.
    pub(crate) place: String,
    /// Size of what a model needs of it.
    pub(crate) gigabytes: f64,
}

/// What the samples are compared with.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Evaluate {
    /// `shapes:N`, or the path of an .npz.
    pub(crate) reference: String,
    /// Weights of Inception, in place of the preset's classifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) weights: Option<PathBuf>,
}

/// Expected seconds of the stages on two cores: weights of the progress bar, nothing else.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Seconds {
    /// Of the latents.
    #[serde(default)]
    pub(crate) encode: f64,
    pub(crate) learn: f64,
    /// A score that looks at images.
    #[serde(default)]
    pub(crate) score: f64,
    pub(crate) fine_tune: f64,
    pub(crate) kd: f64,
    pub(crate) loss: f64,
    pub(crate) sample_dense: f64,
    pub(crate) sample_student: f64,
    pub(crate) evaluate: f64,
    /// A score that draws or looks at weights, cut, inspect.
    pub(crate) other: f64,
}

/// File of the preset `name`: a path if it ends in .toml, else one of `assets/presets`.
pub(crate) fn file_of(name: &str, root: &Path) -> Result<PathBuf> {
    if name.ends_with(".toml") {
        return Ok(PathBuf::from(name));
    }
    let folder = root.join("assets/presets");
    let path = folder.join(format!("{name}.toml"));
    if !path.is_file() {
        let mut known: Vec<String> = std::fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| Some(e.path().file_stem()?.to_string_lossy().into_owned()))
            .collect();
        known.sort();
        bail!(
            "there is no preset `{name}`; there are {}, or give a path that ends in .toml",
            known.join(", ")
        );
    }
    Ok(path)
}

/// The name of the preset in `path`.
pub(crate) fn stem(path: &Path) -> String {
    path.file_stem()
        .map(|s| s.to_string_lossy().into_owned())
        .unwrap_or_default()
}

impl Preset {
    /// Reads and checks the preset.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the preset {}", path.display()))?;
        Self::parse(&text, stem(path)).with_context(|| format!("preset {}", path.display()))
    }

    fn parse(text: &str, name: String) -> Result<Self> {
        let preset = Self {
            name,
            ..toml::from_str(text)?
        };
        check_rows(&preset)?;
        if preset.classifier.is_some() == preset.evaluate.weights.is_some() {
            bail!(
                "expected either `classifier` (a model directory) or `weights` in [evaluate] (Inception's)"
            );
        }
        let Sample {
            steps, fewer_steps, ..
        } = &preset.sample;
        if *steps == 0 {
            bail!("sample.steps is 0; expected at least 1, such as 25");
        }
        if let Some(fewer) = fewer_steps.iter().find(|s| **s == 0 || *s >= steps) {
            bail!(
                "sample.fewer_steps has {fewer}; expected at least 1 and fewer than sample.steps = {steps}"
            );
        }
        for (command, table) in [
            ("learn", &preset.learn),
            ("score", &preset.score),
            ("distill", &preset.recover),
            ("loss", &preset.loss),
            ("sample", &preset.sample.flags),
        ] {
            flags(command, table)?;
        }
        if let Some(table) = &preset.activations {
            flags("activations", table)?;
        }
        if let Some(latents) = &preset.latents {
            flags("encode", &latents.flags)?;
        }
        let counted = preset.sample.counted.flag();
        if preset
            .sample
            .flags
            .contains_key(counted.trim_start_matches('-'))
        {
            bail!("sample.flags has what sample.steps gives already: {counted}");
        }
        Ok(preset)
    }
}

/// Masks, recoveries and budgets of a preset, each by itself; what they say of each other is the plan's to check.
fn check_rows(preset: &Preset) -> Result<()> {
    if preset.masks.is_empty() {
        bail!(
            "there is no [[masks]]; give at least one, such as criterion = \"random\" with patterns = [\"1:2\"]"
        );
    }
    if preset.recoveries.is_empty() {
        bail!(
            "there is no [[recoveries]]; give at least one, such as id = \"ft\" with label = \"fine-tuned\""
        );
    }
    for masks in &preset.masks {
        masks.check(&preset.recoveries)?;
    }
    for (i, recovery) in preset.recoveries.iter().enumerate() {
        let id = &recovery.id;
        if preset.recoveries[..i].iter().any(|r| r.id == *id) {
            bail!("[[recoveries]] has `{id}` twice");
        }
        flags("distill", &recovery.flags).with_context(|| format!("recovery `{id}`"))?;
        if recovery.teacher.is_none() && recovery.flags.contains_key("features") {
            bail!("recovery `{id}` matches features without a teacher; add teacher = \"{DENSE}\"");
        }
        let flags = merged(&preset.recover, &recovery.flags);
        if preset.budgets.is_empty() && !flags.contains_key("steps") {
            bail!("recovery `{id}` has no `steps`; give them in [recover], or as [[budgets]]");
        }
        if !preset.budgets.is_empty() && flags.contains_key("steps") {
            bail!("recovery `{id}` has `steps` beside those of [[budgets]]");
        }
    }
    let twice = |(i, b): (usize, &Budget)| preset.budgets[..i].iter().any(|a| a.steps == b.steps);
    if preset.budgets.iter().enumerate().any(twice) || preset.budgets.iter().any(|b| b.steps == 0) {
        bail!("[[budgets]] needs steps that differ and are not 0");
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::reproduce::spec::Criterion;

    pub(crate) fn embedded(name: &str) -> Preset {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        Preset::read(&file_of(name, &root).unwrap()).unwrap()
    }

    #[test]
    fn the_embedded_presets_have_what_an_honest_table_needs() {
        for (name, draws, patterns) in [
            ("tiny", 4, 2),
            ("smoke-dit", 4, 2),
            ("smoke-sit", 1, 1),
            ("smoke-mar", 1, 1),
            ("table2-dit", 3, 1),
            ("table2-sit", 3, 1),
            ("table2-mar", 3, 1),
        ] {
            let preset = embedded(name);
            assert_eq!(preset.name, name);
            let masks = |criterion| {
                let found = preset.masks.iter().find(|m| m.criterion == criterion);
                found.unwrap_or_else(|| panic!("{name} has no {criterion:?}"))
            };
            let (random, learned) = (masks(Criterion::Random), masks(Criterion::Learned));
            assert!(random.draws >= draws, "{name}");
            assert!(learned.patterns.len() >= patterns, "{name}");
            // The random masks are drawn from the set that one of the learned ones is from.
            assert!(learned.patterns.contains(&random.patterns[0]), "{name}");
            assert!(!preset.sample.fewer_steps.is_empty(), "{name}");
            assert_eq!(preset.recoveries[1].features(), Some("masked"), "{name}");
            assert_eq!(preset.learn["delta"].as_str(), Some("lora"), "{name}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let unknown = file_of("tinny", &root).unwrap_err().to_string();
        assert!(
            unknown.contains("`tinny`") && unknown.contains("table1, table2, "),
            "{unknown}"
        );
        let text = std::fs::read_to_string(file_of("smoke-dit", &root).unwrap()).unwrap();
        let broken = |from: &str, to: &str| {
            assert!(text.contains(from), "{from}");
            format!(
                "{:#}",
                Preset::parse(&text.replace(from, to), "x".into()).unwrap_err()
            )
        };
        for (from, to, part) in [
            ("draws = 4", "draws = 0", "masks `random`: draws is 0"),
            ("draws = 4", "drwas = 4", "drwas"),
            ("criterion = \"oracle\"", "criterion = \"orakel\"", "orakel"),
            (
                "criterion = \"oracle\"",
                "criterion = \"oracle\"\ndraws = 2",
                "masks `oracle`: draws is 2",
            ),
            (
                "criterion = \"oracle\"",
                "criterion = \"fixed\"",
                "needs `blocks`",
            ),
            (
                "criterion = \"oracle\"",
                "criterion = \"width\"",
                "needs an `id`",
            ),
            (
                "[\"ft\"]",
                "[\"fit\"]",
                "no recovery `fit`; there are ft, kd",
            ),
            ("[\"ft\"]", "[]", "`recoveries` is empty"),
            (
                "id = \"kd\"",
                "id = \"ft\"",
                "[[recoveries]] has `ft` twice",
            ),
            (
                "teacher = \"dense\"",
                "",
                "`kd` matches features without a teacher",
            ),
            (
                "[loss]",
                "[[budgets]]\nsteps = 3\n[loss]",
                "beside those of [[budgets]]",
            ),
            ("[\"1:2\", \"2:4\"]", "[]", "learned masks need `patterns`"),
        ] {
            let said = broken(from, to);
            assert!(said.contains(part), "{part}: {said}");
        }
        let fewer = broken("fewer_steps = [2]", "fewer_steps = [9]");
        assert!(
            fewer.contains("has 9; expected at least 1 and fewer than sample.steps = 4"),
            "{fewer}"
        );
        let none = broken("steps = 4\nfewer_steps", "steps = 0\nfewer_steps");
        assert!(none.contains("sample.steps is 0"), "{none}");
        let twice = broken("count = 40", "count = 40\nsteps = 3");
        assert!(twice.contains("already: --steps"), "{twice}");
    }
}
