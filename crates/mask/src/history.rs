use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result, StateDict};

use crate::sampler::{MaskSampler, Temperature};

/// What the mask looked like at one step: one line of a run's history of decisions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistoryRecord {
    /// Steps completed.
    pub step: u64,
    /// τ of that step.
    pub tau: f64,
    /// Scale of that step.
    pub scale: f64,
    /// Blocks that would be kept if the decision fell now.
    pub kept: Vec<usize>,
    /// Per group: the largest of softmax(scale·logits).
    pub confidence: Vec<f64>,
    /// Per block: the probability of being kept under softmax(scale·logits).
    pub keep_probability: Vec<f64>,
}

impl MaskSampler {
    /// The record of `step` for `logits` (those from which the decision will be taken).
    pub fn record(
        &self,
        step: u64,
        logits: &StateDict,
        temperature: Temperature,
    ) -> Result<HistoryRecord> {
        let Temperature { tau, scale } = temperature;
        let decisions = self.decisions(logits, scale)?;
        Ok(HistoryRecord {
            step,
            tau,
            scale,
            kept: self.kept(decisions.iter().map(|d| d.chosen)),
            confidence: decisions.iter().map(|d| d.confidence).collect(),
            keep_probability: self.keep_probability(&decisions),
        })
    }
}

impl HistoryRecord {
    /// The record as one line of JSON with its newline, to be appended to the run's history.
    pub fn to_line(&self) -> Result<String> {
        serde_json::to_string(self)
            .map(|line| line + "\n")
            .map_err(|e| Error::run(format!("history: {e}")))
    }
}

/// Parses a history: one record per line. A last line without its newline is dropped, because a killed
/// run may have written half of it.
pub fn parse_history(text: &str) -> Result<Vec<HistoryRecord>> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .enumerate()
        .map(|(i, line)| {
            serde_json::from_str(line)
                .map_err(|e| Error::usage(format!("history: line {}: {e}", i + 1)))
        })
        .collect()
}
