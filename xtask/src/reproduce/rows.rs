//! From the files of a finished run to `results.json`.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tinyfusion_report::{Aggregate, Cost, Failure, ResultRow, Results, Traces};

use super::Failures;
use super::preset::Preset;
use super::stage::Driver;
use super::vocabulary::{Plan, Row};
use crate::files;

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
    /// Of Inception alone.
    #[serde(default)]
    sfid: Option<f64>,
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
        machine: driver.machine.clone(),
        features: String::new(),
        reference_count: None,
        sample_count: None,
        seconds: 0.0,
        wall_seconds: 0.0,
        peak_rss_bytes: None,
        warnings: Vec::new(),
        rows: Vec::new(),
        commands: plan.stages.iter().map(|s| driver.command(s)).collect(),
        random: Vec::new(),
        study: preset.study.clone(),
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
            .push(result_row(row, scores.as_ref(), failed, preset, driver)?);
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
    preset: &Preset,
    driver: &Driver,
) -> Result<ResultRow> {
    // Paths in the results are from the folder of the run.
    let beside = |file: &Path| file.strip_prefix(&driver.out).unwrap_or(file).to_path_buf();
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
    let held_out: Option<Loss> = measured(&row.files.loss, failed)?;
    let sample: Option<Sample> = measured(&row.files.sample, failed)?;
    let calibration = match &row.files.calibration {
        Some(file) => files::read_json::<Loss>(file)?.loss,
        None => None,
    };
    let activations = row.files.activations.as_deref().filter(|f| f.exists());
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
        kept_layers: kept_layers(row, depth)?,
        depth,
        parameters: inspected("parameters")?,
        calibration_loss: calibration,
        held_out_loss: held_out.as_ref().and_then(|l| l.loss),
        held_out_standard_error: held_out.and_then(|l| l.standard_error),
        fid: score(|s| s.fid),
        sfid: score(|s| s.sfid),
        inception_score: score(|s| s.inception_score),
        precision: score(|s| s.precision),
        recall: score(|s| s.recall),
        kid: score(|s| s.kid),
        accuracy: score(|s| s.accuracy),
        images_per_second: sample.map(|s| s.images_per_second),
        failed: failed.cloned(),
        stages: costs.collect(),
        group: Some(row.group.clone()),
        repetition: Some(preset.seed + row.repeat),
        recovery_label: row.recovery_label.clone(),
        budget_steps: row.budget_steps,
        x: row.x,
        samples_seen: row.samples_seen,
        labels: row.labels.clone(),
        traces: Traces {
            history: row.files.history.as_deref().map(beside),
            selection: row.files.selection.as_deref().map(beside),
            activations: activations.map(beside),
        },
    })
}

/// The blocks of the teacher that are kept, through all cuts on the way to the row's model.
fn kept_layers(row: &Row, depth: usize) -> Result<Vec<usize>> {
    let mut kept: Option<Vec<usize>> = None;
    for file in row.ancestors.iter().chain(&row.files.selection) {
        let chosen = files::read_json::<Selection>(file)?.kept;
        kept = Some(match kept {
            None => chosen,
            Some(of) => through(&of, &chosen).with_context(|| {
                let (file, blocks) = (file.display(), of.len());
                format!("{file} keeps {chosen:?} of a model of {blocks} blocks")
            })?,
        });
    }
    Ok(kept.unwrap_or_else(|| (0..depth).collect()))
}

/// The blocks `chosen` of a model that itself has the blocks `of`; none where it has too few.
fn through(of: &[usize], chosen: &[usize]) -> Option<Vec<usize>> {
    chosen.iter().map(|&i| of.get(i).copied()).collect()
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
    fn a_second_cut_counts_from_the_teacher() {
        assert_eq!(through(&[0, 3, 9, 15], &[1, 3]), Some(vec![3, 15]));
        assert_eq!(through(&[0, 3], &[2]), None);
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
