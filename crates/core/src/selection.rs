use serde::{Deserialize, Serialize};

use crate::{BlockLayout, Error, Result};

/// One group of an N:M pattern: keep `n` of `m` consecutive blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Blocks kept.
    pub n: usize,
    /// Blocks in the group.
    pub m: usize,
}

/// How one group was decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupDecision {
    /// Probability of every candidate mask, in lexicographic order of the kept indices.
    pub probabilities: Vec<f64>,
    /// Index of the candidate taken.
    pub chosen: usize,
    /// Probability of the candidate taken.
    pub confidence: f64,
}

/// Which blocks to keep and how that was found out: the content of `selection.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selection {
    /// Blocks of the network that the selection is for.
    pub depth: usize,
    /// Kept block indices, strictly ascending.
    pub kept: Vec<usize>,
    /// The groups, in order; their `m` sum to `depth`. The group ends align teacher and student
    /// when features are distilled.
    pub groups: Vec<Group>,
    /// What found it: `learned`, `oracle`, `random`, `indices`, …
    pub criterion: String,
    /// Settings and seed of the criterion, for the record.
    #[serde(default)]
    pub settings: serde_json::Value,
    /// Per group, for criteria that have probabilities.
    #[serde(default)]
    pub decisions: Vec<GroupDecision>,
    /// SHA-256 of the network's weight file, if it came from a file.
    #[serde(default)]
    pub source_sha256: Option<String>,
}

impl Selection {
    /// A selection by explicit indices, each stage of the network as one group.
    pub fn from_indices(layout: &BlockLayout, kept: Vec<usize>) -> Result<Self> {
        let stages = layout.ranges();
        let groups = stages
            .map(|stage| Group {
                n: kept.iter().filter(|k| stage.contains(k)).count(),
                m: stage.len(),
            })
            .collect();
        Self {
            depth: layout.depth(),
            kept,
            groups,
            criterion: "indices".into(),
            settings: serde_json::Value::Null,
            decisions: Vec::new(),
            source_sha256: None,
        }
        .validated()
    }

    /// Checks every promise of the fields.
    pub fn validated(self) -> Result<Self> {
        let Self {
            depth,
            kept,
            groups,
            ..
        } = &self;
        let fail = |what: String| Err(Error::usage(format!("selection: {what}")));
        if kept.is_empty() {
            return fail("no block is kept".into());
        }
        if let Some(pair) = kept.windows(2).find(|w| w[0] >= w[1]) {
            return fail(format!(
                "kept blocks must ascend, found {} before {}",
                pair[0], pair[1]
            ));
        }
        if let Some(last) = kept.last().filter(|last| *last >= depth) {
            return fail(format!(
                "block {last} does not exist: the network has {depth} (0 to {})",
                depth.saturating_sub(1)
            ));
        }
        let total = groups
            .iter()
            .try_fold(0usize, |sum, g| sum.checked_add(g.m));
        if total != Some(*depth) {
            return fail(format!(
                "its groups do not cover the network's {depth} blocks"
            ));
        }
        let mut start = 0;
        for (g, group) in groups.iter().enumerate() {
            let found = kept
                .iter()
                .filter(|k| (start..start + group.m).contains(*k))
                .count();
            if found != group.n {
                return fail(format!(
                    "group {g} keeps {found} blocks, its pattern says {}:{}",
                    group.n, group.m
                ));
            }
            start += group.m;
        }
        Ok(self)
    }

    /// Checks that this is a selection for a network of `layout`: as many blocks, and no group in two stages.
    pub fn check_layout(&self, layout: &BlockLayout) -> Result<()> {
        if self.depth != layout.depth() {
            return Err(Error::usage(format!(
                "made for {} blocks, the network has {}",
                self.depth,
                layout.depth()
            )));
        }
        let ends: Vec<usize> = self
            .groups
            .iter()
            .scan(0, |end, group| {
                *end += group.m;
                Some(*end)
            })
            .collect();
        match layout.ranges().find(|stage| !ends.contains(&stage.end)) {
            None => Ok(()),
            Some(stage) => Err(Error::usage(format!(
                "a group goes beyond the end of a stage at block {}: the network's stages have {:?} blocks",
                stage.end,
                layout.stage_depths()
            ))),
        }
    }

    /// Parses and checks the text of a `selection.json`.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str::<Self>(text)
            .map_err(|e| Error::usage(format!("selection: {e}")))?
            .validated()
    }

    /// The text of a `selection.json`.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|e| Error::run(format!("selection: {e}")))
    }
}
