//! From a preset to the commands of the experiment: which stages, in which order, reading and
//! writing what. Pure: nothing is run or read here.

use std::path::{Path, PathBuf};

use anyhow::Result;
use tinyfusion_report::Recovery;

use super::preset::{Preset, flags};
use super::vocabulary::{Files, Leftover, Plan, Row, Stage};

/// Plans the experiment of `preset` in the folder `out`.
pub(crate) fn plan(preset: &Preset, out: &Path) -> Result<Plan> {
    let mut planner = Planner {
        preset,
        out,
        stages: Vec::new(),
        rows: Vec::new(),
    };
    planner.dense()?;
    let random = &preset.random;
    for i in 0..random.masks {
        let seed = preset.seed + i;
        let id = format!("random-{}-seed-{seed}", slug(&random.pattern));
        let score = [
            "--criterion",
            "random",
            "--pattern",
            &random.pattern,
            "--seed",
            &seed.to_string(),
        ];
        let mask = planner.mask(Search {
            id,
            name: format!("random {}, seed {seed}", random.pattern),
            criterion: "random",
            pattern: Some(random.pattern.clone()),
            seed,
            command: strings(&score),
        })?;
        planner.student(&mask, Recovery::FineTuning)?;
    }
    let mask = planner.mask(Search {
        id: "oracle".into(),
        name: "oracle (BK-SDM)".into(),
        criterion: "oracle",
        pattern: None,
        seed: preset.seed,
        command: strings(&["--criterion", "oracle"]),
    })?;
    planner.student(&mask, Recovery::FineTuning)?;
    if preset.recover.oracle_kd {
        planner.student(&mask, Recovery::MaskedKd)?;
    }
    for pattern in &preset.learn.patterns {
        let delta = preset
            .learn
            .flags
            .get("delta")
            .and_then(toml::Value::as_str)
            .unwrap_or("lora");
        let mut command = strings(&["--pattern", pattern]);
        command.extend(flags("learn", &preset.learn.flags)?);
        command.extend(strings(&["--seed", &preset.seed.to_string()]));
        let mask = planner.mask(Search {
            id: format!("learned-{}", slug(pattern)),
            name: format!("learned {pattern} ({delta})"),
            criterion: "learned",
            pattern: Some(pattern.clone()),
            seed: preset.seed,
            command,
        })?;
        planner.student(&mask, Recovery::FineTuning)?;
        planner.student(&mask, Recovery::MaskedKd)?;
    }
    Ok(Plan {
        stages: planner.stages,
        rows: planner.rows,
    })
}

/// A criterion with its settings, and the mask that it finds.
struct Search {
    id: String,
    name: String,
    criterion: &'static str,
    pattern: Option<String>,
    seed: u64,
    /// Flags of `learn` or `score`.
    command: Vec<String>,
}

/// A mask that has been found, cut and weighed.
struct Mask {
    id: String,
    /// All that a row inherits from its mask.
    row: Row,
    selection: PathBuf,
    cut: PathBuf,
}

struct Planner<'a> {
    preset: &'a Preset,
    out: &'a Path,
    stages: Vec<Stage>,
    rows: Vec<Row>,
}

impl Planner<'_> {
    fn dense(&mut self) -> Result<()> {
        let preset = self.preset;
        let teacher = preset.teacher.clone();
        let folder = self.out.join("rows/dense");
        let row = Row {
            id: "dense".into(),
            name: "dense teacher".into(),
            criterion: "dense",
            pattern: None,
            recovery: Recovery::None,
            seed: preset.seed,
            sampling_steps: preset.sample.steps,
            files: Files::default(),
            stages: Vec::new(),
        };
        let mut dense = row.clone();
        self.inspect(&mut dense, &teacher, &folder);
        self.loss(&mut dense, &teacher, &folder.join("loss.json"), "loss")?;
        let seconds = preset.seconds.sample_dense;
        let fewer: Vec<Row> = preset
            .sample
            .fewer_steps
            .iter()
            .map(|&steps| Row {
                id: format!("dense-{steps}-steps"),
                name: format!("dense teacher, {steps} {}", preset.sample.counted.words()),
                sampling_steps: steps,
                ..dense.clone()
            })
            .collect();
        self.sample(dense, &teacher, seconds)?;
        for row in fewer {
            let part = row.sampling_steps as f64 / preset.sample.steps as f64;
            self.sample(row, &teacher, seconds * part)?;
        }
        Ok(())
    }

    /// The mask of a criterion: search or score, cut, and its loss before any recovery.
    fn mask(&mut self, search: Search) -> Result<Mask> {
        let Search {
            id,
            name,
            criterion,
            pattern,
            seed,
            command,
        } = search;
        let preset = self.preset;
        let folder = self.out.join("masks").join(&id);
        let (found, cut) = (folder.join("search"), folder.join("cut"));
        let selection = found.join("selection.json");
        let learned = criterion == "learned";
        let verb = if learned { "learn" } else { "score" };
        let mut args = strings(&[verb, &say(&preset.teacher), &say(&found)]);
        args.extend(command);
        let mut row = Row {
            id: id.clone(),
            name,
            criterion,
            pattern,
            recovery: Recovery::None,
            seed,
            sampling_steps: preset.sample.steps,
            files: Files {
                selection: Some(selection.clone()),
                history: learned.then(|| found.join("history.jsonl")),
                search_metrics: learned.then(|| found.join("metrics.jsonl")),
                ..Files::default()
            },
            stages: Vec::new(),
        };
        let mut outputs = vec![selection.clone()];
        outputs.extend(row.files.history.clone());
        outputs.extend(row.files.search_metrics.clone());
        self.stage(
            &mut row,
            "search",
            Stage {
                name: format!("{id}/search"),
                args,
                inputs: vec![preset.teacher.clone()],
                outputs,
                folder: Some(found),
                leftover: if learned {
                    Leftover::Resume
                } else {
                    Leftover::Remove
                },
                capture: None,
                seconds: if learned {
                    preset.seconds.learn
                } else {
                    preset.seconds.other
                },
            },
        );
        self.stage(
            &mut row,
            "cut",
            Stage {
                name: format!("{id}/cut"),
                args: strings(&[
                    "cut",
                    &say(&preset.teacher),
                    &say(&cut),
                    "--selection",
                    &say(&selection),
                ]),
                inputs: vec![preset.teacher.clone(), selection.clone()],
                outputs: model_files(&cut),
                folder: Some(cut.clone()),
                leftover: Leftover::Remove,
                capture: None,
                seconds: preset.seconds.other,
            },
        );
        self.inspect(&mut row, &cut, &folder);
        let calibration = folder.join("calibration.json");
        self.loss(&mut row, &cut, &calibration, "calibration")?;
        row.files.calibration = Some(calibration);
        Ok(Mask {
            id,
            row,
            selection,
            cut,
        })
    }

    /// A row of the table: the mask's cut model recovered, then measured.
    fn student(&mut self, mask: &Mask, recovery: Recovery) -> Result<()> {
        let preset = self.preset;
        let kd = recovery == Recovery::MaskedKd;
        let mut row = Row {
            id: format!("{}-{}", mask.id, if kd { "kd" } else { "ft" }),
            name: format!(
                "{}, {}",
                mask.row.name,
                if kd { "masked KD" } else { "fine-tuned" }
            ),
            recovery,
            ..mask.row.clone()
        };
        let folder = self.out.join("rows").join(&row.id);
        let recovered = folder.join("recovered");
        let model = recovered.join("model");
        let mut args = strings(&["distill", &say(&mask.cut), &say(&recovered)]);
        args.extend(flags("distill", &preset.recover.flags)?);
        let mut inputs = vec![mask.cut.clone()];
        if kd {
            args.extend(strings(&["--teacher", &say(&preset.teacher)]));
            args.extend(strings(&["--selection", &say(&mask.selection)]));
            args.extend(flags("distill", &preset.recover.kd)?);
            inputs.extend([preset.teacher.clone(), mask.selection.clone()]);
        }
        args.extend(strings(&["--seed", &preset.seed.to_string()]));
        let metrics = recovered.join("metrics.jsonl");
        let mut outputs = model_files(&model);
        outputs.push(metrics.clone());
        let id = row.id.clone();
        self.stage(
            &mut row,
            "recovery",
            Stage {
                name: format!("{id}/recovery"),
                args,
                inputs,
                outputs,
                folder: Some(recovered),
                leftover: Leftover::Resume,
                capture: None,
                seconds: if kd {
                    preset.seconds.kd
                } else {
                    preset.seconds.fine_tune
                },
            },
        );
        row.files.metrics = Some(metrics);
        self.loss(&mut row, &model, &folder.join("loss.json"), "loss")?;
        self.sample(row, &model, preset.seconds.sample_student)
    }

    fn inspect(&mut self, row: &mut Row, model: &Path, folder: &Path) {
        let file = folder.join("inspect.json");
        let id = row.id.clone();
        self.stage(
            row,
            "inspect",
            Stage {
                name: format!("{id}/inspect"),
                args: strings(&["inspect", &say(model), "--json"]),
                inputs: vec![model.to_path_buf()],
                outputs: vec![file.clone()],
                folder: None,
                leftover: Leftover::Remove,
                capture: Some(file.clone()),
                seconds: self.preset.seconds.other,
            },
        );
        row.files.inspect = file;
    }

    fn loss(
        &mut self,
        row: &mut Row,
        model: &Path,
        file: &Path,
        label: &'static str,
    ) -> Result<()> {
        let mut args = strings(&["loss", &say(model)]);
        args.extend(flags("loss", &self.preset.loss)?);
        args.extend(strings(&["--json", &say(file)]));
        let id = row.id.clone();
        self.stage(
            row,
            label,
            Stage {
                name: format!("{id}/{label}"),
                args,
                inputs: vec![model.to_path_buf()],
                outputs: vec![file.to_path_buf()],
                folder: None,
                leftover: Leftover::Remove,
                capture: None,
                seconds: self.preset.seconds.loss,
            },
        );
        row.files.loss = file.to_path_buf();
        Ok(())
    }

    /// Samples and scores, which completes the row.
    fn sample(&mut self, mut row: Row, model: &Path, seconds: f64) -> Result<()> {
        let preset = self.preset;
        let folder = self.out.join("rows").join(&row.id);
        let (samples, scores) = (folder.join("samples"), folder.join("scores.json"));
        let npz = samples.join("samples.npz");
        row.files.sample = samples.join("sample.json");
        row.files.grid = samples.join("grid.png");
        row.files.scores = scores.clone();
        let mut args = strings(&["sample", &say(model), &say(&samples)]);
        let counted = preset.sample.counted.flag();
        args.extend(strings(&[counted, &row.sampling_steps.to_string()]));
        args.extend(flags("sample", &preset.sample.flags)?);
        let id = row.id.clone();
        let outputs = vec![
            npz.clone(),
            row.files.sample.clone(),
            row.files.grid.clone(),
        ];
        self.stage(
            &mut row,
            "sampling",
            Stage {
                name: format!("{id}/sampling"),
                args,
                inputs: vec![model.to_path_buf()],
                outputs,
                folder: Some(samples),
                leftover: Leftover::Remove,
                capture: None,
                seconds,
            },
        );
        let reference = &preset.evaluate.reference;
        let classifier = &preset.classifier;
        let mut inputs = vec![npz.clone(), classifier.clone()];
        if !reference.starts_with("shapes:") {
            inputs.push(reference.into());
        }
        let mut args = strings(&["evaluate", reference, &say(&npz)]);
        args.extend(strings(&[
            "--classifier",
            &say(classifier),
            "--json",
            &say(&scores),
        ]));
        self.stage(
            &mut row,
            "evaluation",
            Stage {
                name: format!("{id}/evaluation"),
                args,
                inputs,
                outputs: vec![scores],
                folder: None,
                leftover: Leftover::Remove,
                capture: None,
                seconds: preset.seconds.evaluate,
            },
        );
        self.rows.push(row);
        Ok(())
    }

    fn stage(&mut self, row: &mut Row, label: &'static str, stage: Stage) {
        row.stages.push((label, stage.name.clone()));
        self.stages.push(stage);
    }
}

/// The files of a model directory.
pub(crate) fn model_files(folder: &Path) -> Vec<PathBuf> {
    vec![folder.join("model.safetensors"), folder.join("config.json")]
}

/// A pattern in a file's name: `2:4x7,3:4` as `2-4x7_3-4`.
fn slug(pattern: &str) -> String {
    pattern.replace(':', "-").replace(',', "_")
}

pub(crate) fn say(path: &Path) -> String {
    path.display().to_string()
}

pub(crate) fn strings(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|s| (*s).to_string()).collect()
}

#[cfg(test)]
mod tests;
