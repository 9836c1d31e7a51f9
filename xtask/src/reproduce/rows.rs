//! From the files of a finished run to `results.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Failures;
use super::preset::Preset;
use super::stage::Driver;
use super::vocabulary::{Failure, Plan, Recovery, Row};
use crate::files;
use crate::machine::Machine;

/// Everything that the experiment found: the content of `results.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Results {
    /// Name of the preset.
    pub(crate) preset: String,
    /// The preset itself.
    pub(crate) settings: Value,
    /// `DiT`, `SiT` or `MAR`: the teacher's architecture.
    pub(crate) family: String,
    /// Model directory of the teacher.
    pub(crate) teacher: PathBuf,
    pub(crate) machine: Machine,
    /// What the scores are computed on; not Inception.
    pub(crate) features: String,
    pub(crate) reference_count: Option<u64>,
    pub(crate) sample_count: Option<u64>,
    /// Seconds of all stages, each counted once.
    pub(crate) seconds: f64,
    /// Seconds on the clock, over all sessions that it took to run the stages.
    #[serde(default)]
    pub(crate) wall_seconds: f64,
    /// Largest memory of any stage.
    pub(crate) peak_rss_bytes: Option<u64>,
    /// What the evaluator had to warn of, without repetition.
    pub(crate) warnings: Vec<String>,
    pub(crate) rows: Vec<ResultRow>,
    /// Every command, in order, to be pasted at the repository's root.
    pub(crate) commands: Vec<String>,
    /// The random masks taken together.
    pub(crate) random: Option<Aggregate>,
}

/// One method.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ResultRow {
    pub(crate) id: String,
    pub(crate) name: String,
    /// `dense`, `random`, `oracle` or `learned`.
    pub(crate) criterion: String,
    pub(crate) pattern: Option<String>,
    pub(crate) recovery: Recovery,
    pub(crate) seed: u64,
    pub(crate) sampling_steps: u64,
    /// Blocks of the teacher that are kept.
    pub(crate) kept_layers: Vec<usize>,
    pub(crate) depth: usize,
    pub(crate) parameters: u64,
    /// Denoising loss of the cut model before recovery; none for the dense teacher, and where it is
    /// not a finite number.
    pub(crate) calibration_loss: Option<f64>,
    /// Denoising loss (fixed t and noise) of the model that was sampled, and its standard error; none
    /// where it is not a finite number.
    pub(crate) held_out_loss: Option<f64>,
    pub(crate) held_out_standard_error: Option<f64>,
    pub(crate) fid: Option<f64>,
    /// Does not apply to the classifier's features.
    pub(crate) sfid: Option<f64>,
    pub(crate) inception_score: Option<f64>,
    pub(crate) precision: Option<f64>,
    pub(crate) recall: Option<f64>,
    pub(crate) kid: Option<f64>,
    /// Share of the samples that the classifier takes for their label.
    pub(crate) accuracy: Option<f64>,
    /// None where sampling failed.
    pub(crate) images_per_second: Option<f64>,
    /// What kept the row from being measured.
    pub(crate) failed: Option<Failure>,
    pub(crate) stages: BTreeMap<String, Cost>,
}

impl ResultRow {
    /// The FID that a row may be judged by: none for a model that diverged, whatever it drew.
    pub(crate) fn score(&self) -> Option<f64> {
        self.fid.filter(|f| f.is_finite() && !self.diverged())
    }

    /// Whether the model's loss was measured and is not a number.
    pub(crate) fn diverged(&self) -> bool {
        let unmeasured = |f: &Failure| f.stage.ends_with("/loss");
        self.held_out_loss.is_none() && !self.failed.as_ref().is_some_and(unmeasured)
    }
}

/// What one stage took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cost {
    pub(crate) seconds: f64,
    pub(crate) peak_rss_bytes: Option<u64>,
}

/// Median and spread of one number over the random masks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// Of at least one number, all finite.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut v = values.to_vec();
        v.sort_by(f64::total_cmp);
        let (min, max) = (*v.first()?, *v.last()?);
        let median = f64::midpoint(v[(v.len() - 1) / 2], v[v.len() / 2]);
        Some(Self { median, min, max })
    }

    pub(crate) fn width(self) -> f64 {
        self.max - self.min
    }
}

/// The random masks as one row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Aggregate {
    pub(crate) name: String,
    /// Masks with numbers: those that neither diverged nor failed.
    pub(crate) count: usize,
    pub(crate) calibration_loss: Option<Spread>,
    pub(crate) held_out_loss: Option<Spread>,
    pub(crate) fid: Option<Spread>,
    pub(crate) inception_score: Option<Spread>,
    pub(crate) precision: Option<Spread>,
    pub(crate) recall: Option<Spread>,
    pub(crate) kid: Option<Spread>,
    pub(crate) accuracy: Option<Spread>,
    pub(crate) images_per_second: Option<Spread>,
}

impl Aggregate {
    /// Of the recovered random masks among `rows`.
    pub(crate) fn of(rows: &[ResultRow]) -> Option<Self> {
        let (random, lost): (Vec<&ResultRow>, Vec<&ResultRow>) = rows
            .iter()
            .filter(|r| r.criterion == "random")
            .partition(|r| !r.diverged() && r.failed.is_none());
        let first = random.first()?;
        let over = |f: &dyn Fn(&ResultRow) -> Option<f64>| {
            Spread::of(
                &random
                    .iter()
                    .filter_map(|r| f(r))
                    .filter(|x| x.is_finite())
                    .collect::<Vec<_>>(),
            )
        };
        let pattern = first.pattern.as_deref().unwrap_or("any");
        let lost = match lost.len() {
            0 => String::new(),
            n => format!(" ({n} more diverged or failed)"),
        };
        Some(Self {
            name: format!(
                "random {pattern}, median of {}{lost}, fine-tuned",
                random.len()
            ),
            count: random.len(),
            calibration_loss: over(&|r| r.calibration_loss),
            held_out_loss: over(&|r| r.held_out_loss),
            fid: over(&|r| r.fid),
            inception_score: over(&|r| r.inception_score),
            precision: over(&|r| r.precision),
            recall: over(&|r| r.recall),
            kid: over(&|r| r.kid),
            accuracy: over(&|r| r.accuracy),
            images_per_second: over(&|r| r.images_per_second),
        })
    }
}

/// `selection.json`, as far as it is needed here.
#[derive(Deserialize)]
struct Selection {
    kept: Vec<usize>,
}

/// What `loss` writes; JSON has no NaN, so that the loss of a diverged model is null.
#[derive(Deserialize)]
struct Loss {
    // Spelt out, a missing key is an error and not a null.
    #[serde(deserialize_with = "Option::deserialize")]
    loss: Option<f64>,
    standard_error: Option<f64>,
}

#[derive(Deserialize)]
struct Sample {
    images_per_second: f64,
}

/// What `evaluate` writes. A score that could not be computed is null.
#[derive(Deserialize)]
struct Scores {
    fid: Option<f64>,
    inception_score: Option<f64>,
    precision: Option<f64>,
    recall: Option<f64>,
    kid: Option<f64>,
    accuracy: Option<f64>,
    features: String,
    reference_count: Option<u64>,
    sample_count: Option<u64>,
    #[serde(default)]
    warnings: Vec<String>,
}

/// Reads what the stages wrote.
pub(crate) fn collect(
    preset: &Preset,
    plan: &Plan,
    driver: &Driver,
    failures: &Failures,
) -> Result<Results> {
    let mut results = Results {
        preset: preset.name.clone(),
        settings: serde_json::to_value(preset)?,
        family: family(plan)?,
        teacher: preset.teacher.clone(),
        machine: Machine::of_here(&driver.binary_sha256),
        features: String::new(),
        reference_count: None,
        sample_count: None,
        seconds: 0.0,
        wall_seconds: 0.0,
        peak_rss_bytes: None,
        warnings: Vec::new(),
        rows: Vec::new(),
        commands: plan.stages.iter().map(|s| driver.command(s)).collect(),
        random: None,
    };
    for stage in &plan.stages {
        // A killed session is on no clock but that of the training which it began.
        if let Some(stamp) = driver.stamp(&stage.name) {
            let seconds = stamp.seconds.unwrap_or(0.0);
            results.wall_seconds += stamp.wall_seconds.unwrap_or(0.0).max(seconds);
        }
        if let Some(cost) = cost(driver, &stage.name) {
            results.seconds += cost.seconds;
            results.peak_rss_bytes = results.peak_rss_bytes.max(cost.peak_rss_bytes);
        }
    }
    for row in &plan.rows {
        let failed = failures.get(&row.id);
        let scores: Option<Scores> = measured(&row.files.scores, failed)?;
        results
            .rows
            .push(result_row(row, scores.as_ref(), failed, driver)?);
        let Some(scores) = scores else { continue };
        for warning in scores.warnings {
            if !results.warnings.contains(&warning) {
                results.warnings.push(warning);
            }
        }
        results.features = scores.features;
        results.reference_count = scores.reference_count;
        results.sample_count = scores.sample_count;
    }
    results.random = Aggregate::of(&results.rows);
    Ok(results)
}

/// The architecture of the dense model.
fn family(plan: &Plan) -> Result<String> {
    let dense = plan.rows.iter().find(|r| r.criterion == "dense");
    let file = &dense.context("there is no dense row")?.files.inspect;
    let model: Value = files::read_json(file)?;
    let name = model
        .pointer("/config/architecture")
        .and_then(Value::as_str);
    name.map(String::from)
        .with_context(|| format!("{} has no text `config.architecture`", file.display()))
}

/// A measurement; a row that failed has only those from before it did.
fn measured<T: DeserializeOwned>(file: &Path, failed: Option<&Failure>) -> Result<Option<T>> {
    if failed.is_some() && !file.exists() {
        return Ok(None);
    }
    files::read_json(file).map(Some)
}

fn result_row(
    row: &Row,
    scores: Option<&Scores>,
    failed: Option<&Failure>,
    driver: &Driver,
) -> Result<ResultRow> {
    let model: Value = files::read_json(&row.files.inspect)?;
    let inspected = |key: &str| {
        number(&model, key)
            .with_context(|| format!("{} has no number `{key}`", row.files.inspect.display()))
    };
    // A MAR has its blocks in two stages.
    let stages = number(&model, "encoder_depth").zip(number(&model, "decoder_depth"));
    let depth = match stages {
        Some((encoder, decoder)) => encoder + decoder,
        None => inspected("depth")?,
    } as usize;
    let kept_layers = match &row.files.selection {
        Some(file) => files::read_json::<Selection>(file)?.kept,
        None => (0..depth).collect(),
    };
    let held_out: Option<Loss> = measured(&row.files.loss, failed)?;
    let sample: Option<Sample> = measured(&row.files.sample, failed)?;
    let calibration = match &row.files.calibration {
        Some(file) => files::read_json::<Loss>(file)?.loss,
        None => None,
    };
    let score = |of: fn(&Scores) -> Option<f64>| scores.and_then(of);
    let costs = row
        .stages
        .iter()
        .filter_map(|(label, name)| Some(((*label).to_string(), cost(driver, name)?)));
    Ok(ResultRow {
        id: row.id.clone(),
        name: row.name.clone(),
        criterion: row.criterion.into(),
        pattern: row.pattern.clone(),
        recovery: row.recovery,
        seed: row.seed,
        sampling_steps: row.sampling_steps,
        kept_layers,
        depth,
        parameters: inspected("parameters")?,
        calibration_loss: calibration,
        held_out_loss: held_out.as_ref().and_then(|l| l.loss),
        held_out_standard_error: held_out.and_then(|l| l.standard_error),
        fid: score(|s| s.fid),
        sfid: None,
        inception_score: score(|s| s.inception_score),
        precision: score(|s| s.precision),
        recall: score(|s| s.recall),
        kid: score(|s| s.kid),
        accuracy: score(|s| s.accuracy),
        images_per_second: sample.map(|s| s.images_per_second),
        failed: failed.cloned(),
        stages: costs.collect(),
    })
}

fn cost(driver: &Driver, stage: &str) -> Option<Cost> {
    let stamp = driver.stamp(stage)?;
    Some(Cost {
        seconds: stamp.seconds?,
        peak_rss_bytes: stamp.peak_rss_bytes,
    })
}

/// The number under `key`, at the top or else in the first object that has it.
fn number(value: &Value, key: &str) -> Option<u64> {
    let object = value.as_object()?;
    object
        .get(key)
        .and_then(Value::as_u64)
        .or_else(|| object.values().find_map(|v| number(v, key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_is_that_of_sorted_numbers() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(
            (spread.median, spread.min, spread.max, spread.width()),
            (2.5, 1.0, 4.0, 3.0)
        );
        assert_eq!(Spread::of(&[7.0, 5.0, 9.0]).unwrap().median, 7.0);
        assert!(Spread::of(&[]).is_none());
    }

    #[test]
    fn a_loss_that_is_no_number_is_null_and_a_missing_one_is_an_error() {
        let read = |text: &str| serde_json::from_str::<Loss>(text).map(|l| l.loss);
        assert_eq!(read(r#"{"loss": 0.5}"#).unwrap(), Some(0.5));
        assert_eq!(
            read(r#"{"loss": null, "standard_error": null}"#).unwrap(),
            None
        );
        assert!(read(r#"{"standard_error": 0.1}"#).is_err());
    }

    #[test]
    fn numbers_of_inspect_are_found() {
        let value = serde_json::json!({"parameters": 7, "config": {"depth": 8}, "name": "x"});
        assert_eq!(
            (number(&value, "parameters"), number(&value, "depth")),
            (Some(7), Some(8))
        );
        assert_eq!(number(&value, "heads"), None);
    }
}
