use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result, StateDict};

/// Which of the dictionaries in a checkpoint is meant: chosen by the caller, never guessed, because
/// the raw and the averaged weights load equally well and give different images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Root {
    /// The keys as they are.
    Plain,
    /// The averaged weights, keys under `ema.`.
    Ema,
    /// The raw weights, keys under `model.`.
    Model,
    /// The averaged weights as MAR's code calls them, keys under `model_ema.`.
    ModelEma,
}

impl Root {
    /// All roots.
    pub const ALL: [Self; 4] = [Self::Plain, Self::Ema, Self::Model, Self::ModelEma];

    /// What stands before the keys.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Ema => "ema.",
            Self::Model => "model.",
            Self::ModelEma => "model_ema.",
        }
    }

    /// The tensors under this root, without its prefix (sharing storage). If there are none, or if a
    /// plain dictionary turns out to have roots, the error says which roots exist.
    pub fn select(self, tensors: &StateDict) -> Result<StateDict> {
        let present = Self::present(tensors);
        if !present.contains(&self) {
            let names: Vec<String> = present.iter().map(|r| format!("`{r}`")).collect();
            let found = if names.is_empty() {
                "no tensors at all".into()
            } else {
                names.join(", ")
            };
            return Err(Error::usage(format!(
                "has no root `{self}`; it has {found}"
            )));
        }
        Ok(tensors
            .iter()
            .filter_map(|(name, t)| {
                Some((name.strip_prefix(self.prefix())?.to_string(), t.clone()))
            })
            .collect())
    }

    /// The roots that a dictionary has: those of `ema`, `model` and `model_ema` that are there, and `plain` where a name
    /// stands under none of them.
    pub fn present(tensors: &StateDict) -> Vec<Self> {
        Self::among(&tensors.names().collect::<Vec<_>>())
    }

    /// As [`present`](Self::present), of the names alone.
    pub(crate) fn among(names: &[&str]) -> Vec<Self> {
        let has = |root: &Self| names.iter().any(|n| n.starts_with(root.prefix()));
        let rooted = [Self::Ema, Self::Model, Self::ModelEma];
        let mut found: Vec<Self> = rooted.into_iter().filter(has).collect();
        let is_rooted = |name: &&str| found.iter().any(|r| name.starts_with(r.prefix()));
        if !names.iter().all(is_rooted) {
            found.push(Self::Plain);
        }
        found
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Ema => "ema",
            Self::Model => "model",
            Self::ModelEma => "model_ema",
        })
    }
}

impl FromStr for Root {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|r| r.to_string() == text)
            .ok_or_else(|| {
                Error::usage(format!(
                    "root `{text}`: expected `plain`, `ema`, `model` or `model_ema`"
                ))
            })
    }
}
