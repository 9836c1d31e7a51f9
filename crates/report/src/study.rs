//! What the rows of an experiment are to show together.

use serde::{Deserialize, Serialize};

use crate::results::ResultRow;

/// A study: which table its rows make, and which plot.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// Decides the plot, and the table's columns where none are named.
    pub kind: Kind,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// What the table groups rows by, left to right, see [`cell`]; empty: those of the kind.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// The name of [`ResultRow::x`]: `batch size`; none: `x`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_name: Option<String>,
    /// What the others are tested against, each a question of its own; empty: the learned masks are tested against their rivals.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub against: Vec<Against>,
}

/// The baseline of a study: rows with `value` in `column`.
///
/// In a preset: `against = [{ column = "recovery", value = "fine-tuned" }]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Against {
    /// A column, see [`cell`].
    pub column: String,
    /// What the column shows for the baseline.
    pub value: String,
}

/// The paper's table or figure that a study repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Criteria by depth, recovery and budget.
    Table1,
    /// Families of models.
    Table2,
    /// The calibration loss of criteria and of many random masks against the recovered FID.
    Table3,
    /// Pattern by kind of weight update.
    Table4,
    /// Losses of distillation.
    Table5,
    /// Routes to a depth: at once, or by steps.
    Table7,
    /// Speed over depth, with models pruned in width.
    Figure4,
    /// Decisions over the steps of searches.
    Figure6,
    /// Histograms of hidden states.
    Activations,
    /// FID over the batch size.
    BatchSize,
}

impl Kind {
    /// The columns of a table that names none itself.
    fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Table1 | Self::Table2 => &["criterion", "depth", "recovery", "budget"],
            Self::Table3 | Self::Activations => &["criterion", "pattern", "recovery"],
            Self::Table4 | Self::Figure6 => &["pattern", "delta"],
            Self::Table5 => &["loss", "budget"],
            Self::Table7 => &["route", "depth", "budget"],
            Self::Figure4 => &["criterion", "depth", "parameters"],
            Self::BatchSize => &["recovery", "x", "budget", "samples"],
        }
    }
}

impl Study {
    /// The names of the columns that rows are grouped by.
    pub fn columns(&self) -> Vec<&str> {
        match &self.columns[..] {
            [] => self.kind.columns().to_vec(),
            columns => columns.iter().map(String::as_str).collect(),
        }
    }
}

/// What a group column shows of a row.
///
/// `criterion`, `pattern`, `recovery`, `depth`, `budget`, `samples`, `steps` (of the sampler), `parameters` and `x` are
/// fields of the row; any other name is looked up in [`ResultRow::labels`]. A row without it shows `–`.
pub fn cell(row: &ResultRow, column: &str) -> String {
    let number = |n: Option<u64>| n.map(|n| n.to_string());
    let text = match column {
        "criterion" => Some(row.criterion.clone()),
        "pattern" => row.pattern.clone(),
        "recovery" => Some(row.recovery_label().to_string()),
        "depth" => Some(row.depth.to_string()),
        "budget" => number(row.budget_steps),
        "samples" => number(row.samples_seen),
        "steps" => Some(row.sampling_steps.to_string()),
        "parameters" => Some(crate::table::parameters(row.parameters)),
        "x" => row.x.map(crate::svg::short),
        label => row.labels.get(label).cloned(),
    };
    text.unwrap_or_else(|| "–".into())
}
