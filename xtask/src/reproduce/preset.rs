//! The preset of an experiment: a TOML under `assets/presets`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Everything that one experiment is made of. The tables named `flags` hold long flags of the
/// binary's commands and are handed to it as they stand.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Preset {
    /// Name of the preset: the stem of its file.
    #[serde(skip_deserializing)]
    pub(crate) name: String,
    /// Model directory of the dense teacher.
    pub(crate) teacher: PathBuf,
    /// Model directory of the classifier whose features are compared.
    pub(crate) classifier: PathBuf,
    /// Seed of every search and every recovery; random mask i has seed + i.
    pub(crate) seed: u64,
    pub(crate) learn: Learn,
    pub(crate) random: Random,
    pub(crate) recover: Recover,
    /// Flags of `tinyfusion loss`.
    pub(crate) loss: toml::Table,
    pub(crate) sample: Sample,
    pub(crate) evaluate: Evaluate,
    pub(crate) seconds: Seconds,
}

/// The learned masks: one search per pattern.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Learn {
    pub(crate) patterns: Vec<String>,
    pub(crate) flags: toml::Table,
}

/// The random masks, the control of every criterion.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Random {
    pub(crate) pattern: String,
    pub(crate) masks: u64,
}

/// The recovery, with the same budget for every row.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Recover {
    /// For every row.
    pub(crate) flags: toml::Table,
    /// Added for the rows with knowledge distillation.
    pub(crate) kd: toml::Table,
    /// Whether the oracle's mask is also recovered with knowledge distillation, as the learned ones are.
    #[serde(default = "yes")]
    pub(crate) oracle_kd: bool,
}

fn yes() -> bool {
    true
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

/// What the samples are compared with.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Evaluate {
    /// `shapes:N`, or the path of an .npz.
    pub(crate) reference: String,
}

/// Expected seconds of the stages on two cores: weights of the progress bar, nothing else.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Seconds {
    pub(crate) learn: f64,
    pub(crate) fine_tune: f64,
    pub(crate) kd: f64,
    pub(crate) loss: f64,
    pub(crate) sample_dense: f64,
    pub(crate) sample_student: f64,
    pub(crate) evaluate: f64,
    /// score, cut, inspect
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
        if preset.learn.patterns.is_empty() {
            bail!("learn.patterns is empty; give at least one pattern, such as \"1:2\"");
        }
        if preset.random.masks == 0 {
            bail!("random.masks is 0; without random masks no criterion can be judged");
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
            ("learn", &preset.learn.flags),
            ("distill", &preset.recover.flags),
            ("distill", &preset.recover.kd),
            ("loss", &preset.loss),
            ("sample", &preset.sample.flags),
        ] {
            flags(command, table)?;
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

/// `{ batch-size = 64, lr = 5e-4 }` as `--batch-size 64 --lr 0.0005`, for a command of the binary.
///
/// The only flag with the value true or false is `--clip` of `sample`; every other boolean of the
/// binary is a switch that changes what is printed or stored, which is not a preset's to choose.
pub(crate) fn flags(command: &str, table: &toml::Table) -> Result<Vec<String>> {
    let mut args = Vec::new();
    for (key, value) in table {
        let flag = format!("--{}", key.replace('_', "-"));
        match value {
            toml::Value::Boolean(on) if (command, key.as_str()) == ("sample", "clip") => {
                args.extend([flag, on.to_string()]);
            }
            toml::Value::Boolean(on) => bail!(
                "`{key} = {on}`: `tinyfusion {command}` has no setting `{key}` that is true or false; \
                 give a number or a text (the only setting of this kind is `clip` of `sample`)"
            ),
            toml::Value::String(s) => args.extend([flag, s.clone()]),
            toml::Value::Integer(n) => args.extend([flag, n.to_string()]),
            toml::Value::Float(x) => args.extend([flag, x.to_string()]),
            other => bail!(
                "`{key}` has a value of type {}; a flag's value is a number or a text",
                other.type_str()
            ),
        }
    }
    Ok(args)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn embedded(name: &str) -> Preset {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        Preset::read(&file_of(name, &root).unwrap()).unwrap()
    }

    #[test]
    fn the_embedded_presets_have_what_an_honest_table_needs() {
        for (name, masks, patterns) in [
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
            assert!(preset.random.masks >= masks, "{name}");
            let learned = &preset.learn.patterns;
            assert!(learned.len() >= patterns, "{name}");
            // The random masks are drawn from the set that one of the learned ones is from.
            assert!(learned.contains(&preset.random.pattern), "{name}");
            assert!(!preset.sample.fewer_steps.is_empty(), "{name}");
            assert_eq!(
                preset.recover.kd["features"].as_str(),
                Some("masked"),
                "{name}"
            );
            assert_eq!(preset.learn.flags["delta"].as_str(), Some("lora"), "{name}");
        }
    }

    #[test]
    fn tables_become_flags() {
        let table: toml::Table =
            toml::from_str("lr = 5e-4\nbatch_size = 64\nwhat = \"dit\"").unwrap();
        assert_eq!(
            flags("pretrain", &table).unwrap(),
            ["--batch-size", "64", "--lr", "0.0005", "--what", "dit"]
        );
        let refused = |command: &str, text: &str| {
            let table: toml::Table = toml::from_str(text).unwrap();
            flags(command, &table).unwrap_err().to_string()
        };
        assert!(refused("loss", "a = [1]").contains("`a` has a value of type array"));
        // `clip` takes a value in `sample`, is a number in training, and no switch is passed on.
        for on in ["true", "false"] {
            let clip: toml::Table = toml::from_str(&format!("clip = {on}")).unwrap();
            assert_eq!(flags("sample", &clip).unwrap(), ["--clip", on]);
        }
        let said = refused("distill", "clip = true");
        assert!(
            said.contains("`tinyfusion distill` has no setting `clip`"),
            "{said}"
        );
        assert!(refused("sample", "quiet = false").contains("`quiet = false`"));
    }

    #[test]
    fn mistakes_are_named() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let unknown = file_of("tinny", &root).unwrap_err().to_string();
        assert!(
            unknown.contains("`tinny`") && unknown.contains("table2-sit, tiny"),
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
        assert!(broken("masks = 4", "masks = 0").contains("random.masks"));
        let fewer = broken("fewer_steps = [2]", "fewer_steps = [9]");
        assert!(
            fewer.contains("has 9; expected at least 1 and fewer than sample.steps = 4"),
            "{fewer}"
        );
        let none = broken("steps = 4\nfewer_steps", "steps = 0\nfewer_steps");
        assert!(none.contains("sample.steps is 0"), "{none}");
        assert!(
            broken("patterns = [\"1:2\", \"2:4\"]", "patterns = []").contains("learn.patterns")
        );
        assert!(broken("masks = 4", "maks = 4").contains("maks"));
        let twice = broken("count = 40", "count = 40\nsteps = 3");
        assert!(twice.contains("already: --steps"), "{twice}");
    }
}
