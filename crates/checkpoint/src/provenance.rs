use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How a model was cut in width.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Narrowed {
    /// Share of the heads and of the MLP channels that was removed from every block, before rounding.
    pub ratio: f64,
    /// What ranked them: `taylor`, `magnitude` or `random`.
    pub importance: String,
}

/// Where a model came from: stored in its `config.json`.
///
/// A record for people and reports: fields that a later version adds are skipped, not refused.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// The command that wrote it, as it can be pasted into a shell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Version of the program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_version: Option<String>,
    /// SHA-256 of the weight file it was made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_sha256: Option<String>,
    /// Blocks that its last cut kept, by their index in the network that was cut: in the parent or, where
    /// training followed the cut, in the parent of the first ancestor with the same list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Vec<usize>>,
    /// What chose them: `learned`, `oracle`, `random`, `indices`, …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub criterion: Option<String>,
    /// The N:M pattern they obey.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// What was cut in width by the last command that did so; like `kept`, training repeats it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub narrowed: Option<Narrowed>,
    /// Training steps behind these weights since the parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Anything else worth knowing (seed, loss, time, …).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub notes: BTreeMap<String, String>,
    /// The records of the models it was made from, the parent's first; each without this list of its own. So
    /// a second cut leaves the first one readable.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ancestors: Vec<Provenance>,
}

impl Provenance {
    /// The record of a model written by `command` with this version of the libraries.
    pub fn of_command(command: impl Into<String>) -> Self {
        Self {
            command: Some(command.into()),
            tool_version: Some(env!("CARGO_PKG_VERSION").into()),
            ..Self::default()
        }
    }

    /// The record of a model made from one of weights `sha256` and record `parent`, which becomes its first
    /// ancestor. A parent that was written by hand and says nothing is left out.
    pub fn with_parent(mut self, sha256: impl Into<String>, parent: &Self) -> Self {
        self.parent_sha256 = Some(sha256.into());
        let mut nearest = parent.clone();
        let older = std::mem::take(&mut nearest.ancestors);
        let known = (nearest != Self::default()).then_some(nearest);
        self.ancestors = known.into_iter().chain(older).collect();
        self
    }

    /// The same, with what `other` says of its cut: for training, which changes no block's place.
    pub fn with_cut_of(mut self, other: &Self) -> Self {
        self.kept.clone_from(&other.kept);
        self.criterion.clone_from(&other.criterion);
        self.pattern.clone_from(&other.pattern);
        self.narrowed.clone_from(&other.narrowed);
        self
    }
}
