//! What an experiment found: the content of `results.json`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::aggregate::Aggregate;
use crate::study::{Against, Study};

/// Everything that the experiment found: the content of `results.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Results {
    /// Name of the preset.
    pub preset: String,
    /// The preset itself.
    pub settings: Value,
    /// `DiT`, `SiT` or `MAR`: the teacher's architecture. Files that do not say it are from when DiT was the only one.
    #[serde(default = "dit")]
    pub family: String,
    /// Model directory of the teacher.
    #[serde(default)]
    pub teacher: PathBuf,
    /// Where it was measured.
    pub machine: Machine,
    /// What the scores are computed on; not Inception.
    pub features: String,
    /// Images that the scores compare with.
    pub reference_count: Option<u64>,
    /// Samples per row.
    pub sample_count: Option<u64>,
    /// Seconds of all stages, each counted once.
    pub seconds: f64,
    /// Seconds on the clock, over all sessions that it took to run the stages.
    #[serde(default)]
    pub wall_seconds: f64,
    /// Largest memory of any stage.
    pub peak_rss_bytes: Option<u64>,
    /// What the evaluator had to warn of, without repetition.
    pub warnings: Vec<String>,
    /// One per method and seed, in the order of the table.
    pub rows: Vec<ResultRow>,
    /// Every command, in order, to be pasted at the repository's root.
    pub commands: Vec<String>,
    /// The random masks of each class taken together, see [`Aggregate`]. Older files have one for all classes, which is
    /// read as none: [`crate::merge`] sums them up anew.
    #[serde(default, deserialize_with = "aggregates")]
    pub random: Vec<Aggregate>,
    /// What the rows are to show together; none for an experiment of the kind of `tiny`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub study: Option<Study>,
}

fn dit() -> String {
    "DiT".into()
}

impl Results {
    /// Whether the scores are of Inception's features, and not of the embedded classifier's.
    pub(crate) fn on_inception(&self) -> bool {
        self.features.starts_with("Inception")
    }

    /// What the study holds its rows against; empty without a study, and where it names nothing.
    pub(crate) fn against(&self) -> &[Against] {
        self.study.as_ref().map_or(&[], |s| &s.against)
    }
}

/// A list; anything else is of an older schema.
fn aggregates<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<Aggregate>, D::Error> {
    let value = Value::deserialize(from)?;
    if value.is_array() {
        serde_json::from_value(value).map_err(serde::de::Error::custom)
    } else {
        Ok(Vec::new())
    }
}

/// One method.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ResultRow {
    /// Unique in a run, for files: `learned-1-2-kd`.
    pub id: String,
    /// For people: `learned 1:2 (lora), masked KD`.
    pub name: String,
    /// `dense`, `random`, `oracle` or `learned`.
    pub criterion: String,
    /// N:M pattern of the search.
    pub pattern: Option<String>,
    /// How it was trained after the cut.
    pub recovery: Recovery,
    /// Of the search, or of the random mask.
    pub seed: u64,
    /// Steps of the sampler.
    pub sampling_steps: u64,
    /// Blocks of the teacher that are kept.
    pub kept_layers: Vec<usize>,
    /// Blocks that are left.
    pub depth: usize,
    /// Weights of the sampled model.
    pub parameters: u64,
    /// Denoising loss of the cut model before recovery; none for the dense teacher, and where it is
    /// not a finite number.
    pub calibration_loss: Option<f64>,
    /// Denoising loss (fixed t and noise) of the model that was sampled, and its standard error; none
    /// where it is not a finite number.
    pub held_out_loss: Option<f64>,
    /// Standard error of [`Self::held_out_loss`].
    pub held_out_standard_error: Option<f64>,
    /// Fréchet distance on [`Results::features`]; lower is better.
    pub fid: Option<f64>,
    /// Of Inception's features alone.
    pub sfid: Option<f64>,
    /// On the same features; higher is better.
    pub inception_score: Option<f64>,
    /// Improved precision; higher is better.
    pub precision: Option<f64>,
    /// Improved recall; higher is better.
    pub recall: Option<f64>,
    /// Kernel distance; lower is better.
    pub kid: Option<f64>,
    /// Share of the samples that the classifier takes for their label.
    pub accuracy: Option<f64>,
    /// None where sampling failed.
    pub images_per_second: Option<f64>,
    /// What kept the row from being measured.
    pub failed: Option<Failure>,
    /// What every stage took, by what it does: `search`, `recovery`, `sampling` and so on.
    pub stages: BTreeMap<String, Cost>,
    /// The row's id without its seed: rows of one group are seeds of one method. Ask [`Self::group`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Seed of the whole repetition: rows of equal repetition are paired in tests. Ask [`Self::repetition`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition: Option<u64>,
    /// The recovery in words, where [`Recovery`] is too coarse: `masked KD, warm-up`. Ask [`Self::recovery_label`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_label: Option<String>,
    /// Steps of recovery.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_steps: Option<u64>,
    /// Where the row stands on the x axis of its study's plot: a step, a batch size, a depth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<f64>,
    /// Training samples that the recovery has seen: steps times batch size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples_seen: Option<u64>,
    /// What else tells rows apart, by the name of a table's column: `delta` = `lora`, `route` = `28→21→14`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Files that a study's plots are drawn from.
    #[serde(default, skip_serializing_if = "Traces::is_empty")]
    pub traces: Traces,
}

/// Files beside `results.json` that plots are drawn from, as paths from its folder.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traces {
    /// The search's `history.jsonl`: lines of [`crate::plots::Decision`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<PathBuf>,
    /// The search's `selection.json`: [`crate::plots::Selection`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selection: Option<PathBuf>,
    /// Histograms of hidden states: [`crate::plots::Activations`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<PathBuf>,
}

impl Traces {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl ResultRow {
    /// The FID that a row may be judged by: none for a model that diverged, whatever it drew.
    pub fn score(&self) -> Option<f64> {
        self.fid.filter(|f| f.is_finite() && !self.diverged())
    }

    /// The method without its seed: [`Self::group`], or the id with `-seed-N` taken out.
    pub fn group(&self) -> String {
        if let Some(group) = &self.group {
            return group.clone();
        }
        let Some((before, after)) = self.id.split_once("-seed-") else {
            return self.id.clone();
        };
        format!(
            "{before}{}",
            after.trim_start_matches(|c: char| c.is_ascii_digit())
        )
    }

    /// The repetition that the row belongs to, by default its own seed.
    pub fn repetition(&self) -> u64 {
        self.repetition.unwrap_or(self.seed)
    }

    /// The recovery for people.
    pub fn recovery_label(&self) -> &str {
        self.recovery_label
            .as_deref()
            .unwrap_or(self.recovery.words())
    }

    /// Whether the model's loss was measured and is not a number. A row that only tells speed has no such stage.
    pub fn diverged(&self) -> bool {
        let unmeasured = |f: &Failure| f.stage.ends_with("/loss");
        let asked = self.stages.contains_key("loss");
        asked && self.held_out_loss.is_none() && !self.failed.as_ref().is_some_and(unmeasured)
    }
}

/// What one stage took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Seconds of the stage.
    pub seconds: f64,
    /// Largest resident memory.
    pub peak_rss_bytes: Option<u64>,
}

/// How a cut model was trained again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recovery {
    /// Nothing was cut, or nothing was trained after the cut.
    #[default]
    None,
    /// The teacher's own training loss.
    FineTuning,
    /// Distillation of the output and, masked, of hidden states.
    MaskedKd,
    /// Distillation of the output alone.
    OutputKd,
    /// Distillation of hidden states without a mask.
    FeatureKd,
}

impl Recovery {
    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::FineTuning => "fine-tuning",
            Self::MaskedKd => "masked KD",
            Self::OutputKd => "output KD",
            Self::FeatureKd => "feature KD",
        }
    }
}

/// Why a row could not be measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// The stage that failed, for example `oracle-kd/sampling`.
    pub stage: String,
    /// The end of its log.
    pub error: String,
}

/// Where the numbers come from.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: Option<String>,
    /// Threads that a process may use.
    pub cores: usize,
    /// Memory in all.
    pub memory_bytes: Option<u64>,
    /// Name and version of the system.
    pub os: String,
    /// `rustc --version`.
    pub rustc: Option<String>,
    /// The working tree's commit.
    pub git_commit: Option<String>,
    /// Whether the working tree differed from that commit.
    pub git_dirty: Option<bool>,
    /// Hash of the binary `tinyfusion`.
    pub binary_sha256: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_the_id_without_its_seed() {
        let row = |id: &str, group: Option<&str>| ResultRow {
            id: id.into(),
            group: group.map(Into::into),
            ..ResultRow::default()
        };
        assert_eq!(row("random-1-2-seed-12-ft", None).group(), "random-1-2-ft");
        assert_eq!(row("learned-2-4-kd", None).group(), "learned-2-4-kd");
        assert_eq!(row("a-seed-1", Some("b")).group(), "b");
    }
}
