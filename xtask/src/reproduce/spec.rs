//! What a preset says of its rows: how masks are chosen, how cut models recover, for how long.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// How a model is made smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Criterion {
    BlockInfluence,
    FluxLite,
    Sensitivity,
    SensitivityGreedy,
    Oracle,
    Random,
    RandomSearch,
    Magnitude,
    Learned,
    /// Blocks that the preset names.
    Fixed,
    /// Fewer heads and channels in every block, and all blocks.
    Width,
}

impl Criterion {
    /// As `score` and the results spell it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::BlockInfluence => "block-influence",
            Self::FluxLite => "flux-lite",
            Self::Sensitivity => "sensitivity",
            Self::SensitivityGreedy => "sensitivity-greedy",
            Self::Oracle => "oracle",
            Self::Random => "random",
            Self::RandomSearch => "random-search",
            Self::Magnitude => "magnitude",
            Self::Learned => "learned",
            Self::Fixed => "fixed",
            Self::Width => "width",
        }
    }

    /// For people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::BlockInfluence => "ShortGPT (block influence)",
            Self::FluxLite => "Flux-Lite",
            Self::Sensitivity => "sensitivity",
            Self::SensitivityGreedy => "sensitivity, one by one",
            Self::Oracle => "oracle (BK-SDM)",
            Self::Random => "random",
            Self::RandomSearch => "lowest of many random",
            Self::Magnitude => "magnitude",
            Self::Learned => "learned",
            Self::Fixed => "fixed",
            Self::Width => "width (Diff-Pruning)",
        }
    }

    /// Whether another seed may find another mask.
    pub(crate) fn is_seeded(self) -> bool {
        !matches!(self, Self::Oracle | Self::Magnitude | Self::Fixed)
    }

    /// Whether it looks at images, as `[score]` says how many.
    pub(crate) fn looks_at_data(self) -> bool {
        use Criterion::{BlockInfluence, FluxLite, RandomSearch, Sensitivity, SensitivityGreedy};
        matches!(
            self,
            BlockInfluence | FluxLite | Sensitivity | SensitivityGreedy | RandomSearch
        )
    }
}

/// Masks of one criterion: one for every extent (pattern, number or list of blocks) and every draw.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Masks {
    pub(crate) criterion: Criterion,
    /// For files, in place of the criterion's word.
    pub(crate) id: Option<String>,
    /// For people, in place of the criterion's name.
    pub(crate) name: Option<String>,
    /// Patterns such as 2:4.
    #[serde(default)]
    pub(crate) patterns: Vec<String>,
    /// Numbers of blocks, any of all.
    #[serde(default)]
    pub(crate) keep: Vec<usize>,
    /// The blocks themselves (criterion `fixed`).
    #[serde(default)]
    pub(crate) blocks: Vec<usize>,
    /// The id of a mask with as many parameters as this one shall have (criterion `width`).
    pub(crate) parameters_of: Option<String>,
    /// Masks of each extent, under seeds of their own (criterion `random`).
    #[serde(default = "one")]
    pub(crate) draws: u64,
    /// The id of the row whose recovered model is cut, in place of the teacher.
    pub(crate) of: Option<String>,
    /// Flags of `learn`, `score` or `narrow`, over those of `[learn]` and `[score]`.
    #[serde(default)]
    pub(crate) flags: toml::Table,
    /// Ids of the recoveries; without it every one.
    pub(crate) recoveries: Option<Vec<String>>,
    /// What its rows show in the study's table, by column.
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
}

fn one() -> u64 {
    1
}

/// How much of the model a mask keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Extent {
    /// What the criterion or its flags say.
    Own,
    Pattern(String),
    /// So many blocks, any of all.
    Keep(usize),
    /// These blocks.
    Blocks(Vec<usize>),
}

impl Masks {
    /// The extents, one mask (or `draws`) each.
    pub(crate) fn extents(&self) -> Vec<Extent> {
        let patterns = self.patterns.iter().cloned().map(Extent::Pattern);
        let keep = self.keep.iter().copied().map(Extent::Keep);
        let blocks = (!self.blocks.is_empty()).then(|| Extent::Blocks(self.blocks.clone()));
        let all: Vec<Extent> = patterns.chain(keep).chain(blocks).collect();
        match all.is_empty() {
            true => vec![Extent::Own],
            false => all,
        }
    }

    /// The words that stand for all its masks in errors.
    pub(crate) fn label(&self) -> &str {
        self.id.as_deref().unwrap_or(self.criterion.word())
    }

    pub(crate) fn check(&self, recoveries: &[Recoveries]) -> Result<()> {
        let label = self.label();
        let criterion = self.criterion;
        if self.draws == 0 || (self.draws > 1 && criterion != Criterion::Random) {
            bail!(
                "masks `{label}`: draws is {}; expected 1, or more with the criterion `random`",
                self.draws
            );
        }
        if (criterion == Criterion::Fixed) == self.blocks.is_empty() {
            bail!(
                "masks `{label}`: the criterion `fixed`, and no other, needs `blocks`, such as [0, 2, 4, 6]"
            );
        }
        if criterion == Criterion::Learned && (self.patterns.is_empty() || !self.keep.is_empty()) {
            bail!(
                "masks `{label}`: learned masks need `patterns`, such as [\"1:2\"], and no `keep`"
            );
        }
        if criterion == Criterion::Random && self.patterns.is_empty() && self.keep.is_empty() {
            bail!("masks `{label}`: random masks need `patterns` or `keep`");
        }
        if criterion == Criterion::Width && self.id.is_none() {
            bail!("masks `{label}`: the criterion `width` needs an `id`");
        }
        if criterion != Criterion::Width && self.parameters_of.is_some() {
            bail!("masks `{label}`: `parameters_of` is for the criterion `width`");
        }
        if let Some(names) = &self.recoveries {
            if names.is_empty() {
                bail!("masks `{label}`: `recoveries` is empty, so that it has no rows");
            }
            if let Some(unknown) = names
                .iter()
                .find(|n| recoveries.iter().all(|r| r.id != **n))
            {
                let known: Vec<&str> = recoveries.iter().map(|r| r.id.as_str()).collect();
                bail!(
                    "masks `{label}`: there is no recovery `{unknown}`; there are {}",
                    known.join(", ")
                );
            }
        }
        flags(verb(criterion), &self.flags)?;
        Ok(())
    }
}

/// The command that finds a mask.
pub(crate) fn verb(criterion: Criterion) -> &'static str {
    match criterion {
        Criterion::Learned => "learn",
        Criterion::Fixed => "cut",
        Criterion::Width => "narrow",
        _ => "score",
    }
}

/// The teacher of a recovery that is the preset's own.
pub(crate) const DENSE: &str = "dense";

/// A way to train a cut model again.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Recoveries {
    /// For files: `ft`, `kd`.
    pub(crate) id: String,
    /// For people: `fine-tuned`, `masked KD`.
    pub(crate) label: String,
    /// `dense`, or the id of the row whose model teaches; without it this is plain fine-tuning.
    pub(crate) teacher: Option<String>,
    /// Flags of `distill`, over those of `[recover]`.
    #[serde(default)]
    pub(crate) flags: toml::Table,
    /// Where its rows stand on the x axis of the study's plot.
    pub(crate) x: Option<f64>,
    /// What its rows show in the study's table, by column.
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
}

impl Recoveries {
    /// Whether hidden states are matched: unless the flags say otherwise, as the binary has it.
    pub(crate) fn matches_features(&self) -> bool {
        self.teacher.is_some() && self.features() != Some("none")
    }

    pub(crate) fn features(&self) -> Option<&str> {
        self.flags.get("features").and_then(toml::Value::as_str)
    }

    /// Whether a pattern says which blocks are compared, so that no selection is needed.
    pub(crate) fn aligns_by_pattern(&self) -> bool {
        let align = self.flags.get("align").and_then(toml::Value::as_str);
        align.is_some_and(|rule| rule.contains(':'))
    }
}

/// How long the recoveries of one mask take: one row each.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Budget {
    /// Steps of every recovery.
    pub(crate) steps: u64,
}

/// `{ batch-size = 64, lr = 5e-4 }` as `--batch-size 64 --lr 0.0005`, for a command of the binary.
///
/// The only flag with the value true or false is `--clip` of `sample`; the only switch that decides a result is
/// `--reference` of `score`. Every other switch changes what is printed or stored, which is not a preset's to choose.
pub(crate) fn flags(command: &str, table: &toml::Table) -> Result<Vec<String>> {
    let mut args = Vec::new();
    for (key, value) in table {
        if key.contains('_') {
            // One spelling, since a preset's numbers are read by others under it, too.
            bail!(
                "`{key}`: the flags of `tinyfusion {command}` have dashes: write `{}`",
                key.replace('_', "-")
            );
        }
        let flag = format!("--{key}");
        match value {
            toml::Value::Boolean(on) if (command, key.as_str()) == ("sample", "clip") => {
                args.extend([flag, on.to_string()]);
            }
            toml::Value::Boolean(true) if (command, key.as_str()) == ("score", "reference") => {
                args.push(flag);
            }
            toml::Value::Boolean(on) => bail!(
                "`{key} = {on}`: `tinyfusion {command}` has no setting `{key}` that is true or false; \
                 give a number or a text (the only settings of this kind are `clip` of `sample` and `reference = true` of \
                 `score`)"
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

/// `over` laid over `base`.
pub(crate) fn merged(base: &toml::Table, over: &toml::Table) -> toml::Table {
    let mut table = base.clone();
    table.extend(over.clone());
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_become_flags() {
        let table: toml::Table =
            toml::from_str("lr = 5e-4\nbatch-size = 64\nwhat = \"dit\"").unwrap();
        assert_eq!(
            flags("pretrain", &table).unwrap(),
            ["--batch-size", "64", "--lr", "0.0005", "--what", "dit"]
        );
        let refused = |command: &str, text: &str| {
            let table: toml::Table = toml::from_str(text).unwrap();
            flags(command, &table).unwrap_err().to_string()
        };
        assert!(refused("learn", "batch_size = 64").contains("write `batch-size`"));
        assert!(refused("loss", "a = [1]").contains("`a` has a value of type array"));
        // `clip` takes a value in `sample`, is a number in training, and one switch is passed on.
        for on in ["true", "false"] {
            let clip: toml::Table = toml::from_str(&format!("clip = {on}")).unwrap();
            assert_eq!(flags("sample", &clip).unwrap(), ["--clip", on]);
        }
        let reference: toml::Table = toml::from_str("reference = true").unwrap();
        assert_eq!(flags("score", &reference).unwrap(), ["--reference"]);
        assert!(refused("score", "reference = false").contains("`reference = false`"));
        let said = refused("distill", "clip = true");
        assert!(
            said.contains("`tinyfusion distill` has no setting `clip`"),
            "{said}"
        );
        assert!(refused("sample", "quiet = false").contains("`quiet = false`"));
    }

    #[test]
    fn what_is_laid_over_wins() {
        let read = |text: &str| toml::from_str::<toml::Table>(text).unwrap();
        let both = merged(&read("a = 1\nb = 2"), &read("b = 3\nc = 4"));
        assert_eq!(both, read("a = 1\nb = 3\nc = 4"));
    }

    #[test]
    fn criteria_are_spelt_alike_everywhere() {
        for word in [
            "block-influence",
            "sensitivity-greedy",
            "random-search",
            "learned",
            "fixed",
        ] {
            let read: Criterion = serde_json::from_value(word.into()).unwrap();
            assert_eq!(read.word(), word);
        }
    }
}
