//! What an experiment is made of: stages, rows, and the plan that holds both.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tinyfusion_report::Recovery;

/// One call of the binary.
#[derive(Debug, Clone)]
pub(crate) struct Stage {
    /// Unique, for example `learned-1-2-kd/recovery`: row or mask, then what is done.
    pub(crate) name: String,
    /// Arguments of the binary.
    pub(crate) args: Vec<String>,
    /// Files and folders whose contents decide the outcome.
    pub(crate) inputs: Vec<PathBuf>,
    /// What has to be there when the stage is done.
    pub(crate) outputs: Vec<PathBuf>,
    /// The folder that the stage fills, if it fills one.
    pub(crate) folder: Option<PathBuf>,
    /// What happens with what an earlier start left behind.
    pub(crate) leftover: Leftover,
    /// Where standard output goes, if it is the result.
    pub(crate) capture: Option<PathBuf>,
    /// Expected seconds: the weight in the progress bar.
    pub(crate) seconds: f64,
}

/// What to do with the outputs of a start that did not finish, or had other settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leftover {
    /// The command begins afresh: they are removed.
    Remove,
    /// The command continues what has the same stamp; anything else is removed.
    Resume,
    /// The same, but hours of training are not removed: other settings are an error.
    Precious,
    /// The command itself knows whether it may go on with what is there: it is never removed.
    Shared,
}

/// One row of the table: a method, and where its numbers stand.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// For files: `learned-1-2-kd`.
    pub(crate) id: String,
    /// The id without any seed: rows of one group differ in their seeds alone.
    pub(crate) group: String,
    /// Which of the repeats under other seeds it belongs to; what no seed changes belongs to the first.
    pub(crate) repeat: u64,
    /// For people: `learned 1:2 (lora), masked KD`.
    pub(crate) name: String,
    pub(crate) criterion: &'static str,
    pub(crate) pattern: Option<String>,
    pub(crate) recovery: Recovery,
    /// How the preset calls the recovery.
    pub(crate) recovery_label: Option<String>,
    /// Steps of the recovery.
    pub(crate) budget_steps: Option<u64>,
    /// Images of the recovery, repeats counted.
    pub(crate) samples_seen: Option<u64>,
    /// On the x axis of the study's plot.
    pub(crate) x: Option<f64>,
    /// In the study's table, by column.
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) seed: u64,
    pub(crate) sampling_steps: u64,
    /// Selections from the teacher to the model that was cut, where that is not the teacher itself.
    pub(crate) ancestors: Vec<PathBuf>,
    pub(crate) files: Files,
    /// What a stage does for this row, and the stage's name.
    pub(crate) stages: Vec<(&'static str, String)>,
}

/// Where a row's numbers and pictures stand.
#[derive(Debug, Clone, Default)]
pub(crate) struct Files {
    pub(crate) selection: Option<PathBuf>,
    pub(crate) history: Option<PathBuf>,
    pub(crate) search_metrics: Option<PathBuf>,
    pub(crate) calibration: Option<PathBuf>,
    pub(crate) metrics: Option<PathBuf>,
    pub(crate) inspect: PathBuf,
    pub(crate) loss: PathBuf,
    pub(crate) sample: PathBuf,
    pub(crate) grid: PathBuf,
    pub(crate) scores: PathBuf,
    pub(crate) activations: Option<PathBuf>,
}

/// The whole experiment.
#[derive(Debug)]
pub(crate) struct Plan {
    /// In the order in which they run.
    pub(crate) stages: Vec<Stage>,
    /// In the order of the table.
    pub(crate) rows: Vec<Row>,
}

impl Plan {
    /// The row that `stage` recovers or measures, if it does that and nothing else: what fails there,
    /// for example because the model diverges, concerns that row alone. The dense rows are what all
    /// others are compared with, and some models are cut again or teach.
    pub(crate) fn concerned(&self, stage: &Stage) -> Option<&Row> {
        const OWN: &[&str] = &["recovery", "loss", "activations", "sampling", "evaluation"];
        let of = |row: &&Row| {
            let mut stages = row.stages.iter();
            stages.any(|(label, name)| *name == stage.name && OWN.contains(label))
        };
        let row = self
            .rows
            .iter()
            .filter(|r| r.recovery != Recovery::None)
            .find(of)?;
        let elsewhere = |other: &&Stage| row.stages.iter().all(|(_, name)| *name != other.name);
        let mut others = self.stages.iter().filter(elsewhere);
        let awaited = others.any(|other| {
            let folder = stage.folder.as_ref();
            folder.is_some_and(|f| other.inputs.iter().any(|i| i.starts_with(f)))
        });
        (!awaited).then_some(row)
    }
}
