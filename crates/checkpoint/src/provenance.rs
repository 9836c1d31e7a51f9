use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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
    /// Block indices of the parent that were kept, if it was cut.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Vec<usize>>,
    /// What chose them: `learned`, `oracle`, `random`, `indices`, …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub criterion: Option<String>,
    /// The N:M pattern they obey.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// Training steps behind these weights since the parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Anything else worth knowing (seed, loss, time, …).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub notes: BTreeMap<String, String>,
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
}
