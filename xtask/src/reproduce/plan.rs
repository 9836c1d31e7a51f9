//! From a preset to the commands of the experiment: which stages, in which order, reading and
//! writing what. Pure: nothing is run or read here.

mod mask;
mod measure;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tinyfusion_report::Recovery;

use super::preset::Preset;
use super::spec::{DENSE, Recoveries, flags, merged};
use super::vocabulary::{Files, Leftover, Plan, Row, Stage};
use mask::Mask;

/// Plans the experiment of `preset` in the folder `out`, under so many seeds from the preset's own on. The file `lock`
/// pins what comes from the hub.
///
/// What no seed changes, the dense model's rows and the masks of some criteria, is there once. The
/// first seed's rows have the same ids however many follow, so that a run can be extended.
pub(crate) fn plan(preset: &Preset, out: &Path, lock: &Path, seeds: u64) -> Result<Plan> {
    let mut planner = Planner {
        preset,
        out,
        lock,
        seeds,
        stages: Vec::new(),
        rows: Vec::new(),
        masks: BTreeMap::new(),
        models: BTreeMap::new(),
    };
    planner.encode()?;
    planner.dense()?;
    for repeat in 0..seeds {
        planner.repeat(repeat)?;
    }
    planner.unshared()?;
    Ok(Plan {
        stages: planner.stages,
        rows: planner.rows,
    })
}

/// The names of a mask or row. The first two differ only where the experiment is repeated.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ids {
    /// For files: `learned-1-2-seed-1-kd`.
    own: String,
    /// The same of the first seed: how presets name masks and rows.
    first: String,
    /// Without any seed: what rows share that differ in nothing else.
    group: String,
}

impl Ids {
    fn then(&self, tail: &str) -> Self {
        let then = |id: &str| format!("{id}-{tail}");
        Self {
            own: then(&self.own),
            first: then(&self.first),
            group: then(&self.group),
        }
    }
}

struct Planner<'a> {
    preset: &'a Preset,
    out: &'a Path,
    lock: &'a Path,
    seeds: u64,
    stages: Vec<Stage>,
    rows: Vec<Row>,
    /// By their ids of the first seed, and by repeat.
    masks: BTreeMap<(String, u64), Mask>,
    /// The recovered models of the rows, in the same way.
    models: BTreeMap<(String, u64), PathBuf>,
}

impl Planner<'_> {
    fn dense(&mut self) -> Result<()> {
        let preset = self.preset;
        let teacher = preset.teacher.clone();
        let folder = self.out.join("rows/dense");
        let mut dense = Row {
            id: "dense".into(),
            group: "dense".into(),
            repeat: 0,
            name: "dense teacher".into(),
            criterion: "dense",
            pattern: None,
            recovery: Recovery::None,
            recovery_label: None,
            budget_steps: None,
            samples_seen: None,
            x: None,
            labels: BTreeMap::new(),
            seed: preset.seed,
            sampling_steps: preset.sample.steps,
            ancestors: Vec::new(),
            files: Files::default(),
            stages: Vec::new(),
        };
        self.inspect(&mut dense, &teacher, &folder);
        self.loss(&mut dense, &teacher, &folder.join("loss.json"), "loss")?;
        let seconds = preset.seconds.sample_dense;
        let fewer: Vec<Row> = preset
            .sample
            .fewer_steps
            .iter()
            .map(|&steps| Row {
                id: format!("dense-{steps}-steps"),
                group: format!("dense-{steps}-steps"),
                name: format!("dense teacher, {steps} {}", preset.sample.counted.words()),
                sampling_steps: steps,
                ..dense.clone()
            })
            .collect();
        self.activations(&mut dense, &teacher, &folder)?;
        self.sample(dense, &teacher, seconds)?;
        for row in fewer {
            let part = row.sampling_steps as f64 / preset.sample.steps as f64;
            self.sample(row, &teacher, seconds * part)?;
        }
        Ok(())
    }

    /// All masks and rows under one seed.
    fn repeat(&mut self, repeat: u64) -> Result<()> {
        let preset = self.preset;
        for masks in &preset.masks {
            let wanted = |r: &&Recoveries| {
                let named = masks.recoveries.as_ref();
                named.is_none_or(|names| names.contains(&r.id))
            };
            let recoveries: Vec<&Recoveries> = preset.recoveries.iter().filter(wanted).collect();
            for extent in masks.extents() {
                for draw in 0..masks.draws {
                    let mask = self
                        .mask(masks, &extent, draw, repeat)
                        .with_context(|| format!("masks `{}`", masks.label()))?;
                    for recovery in &recoveries {
                        self.recover(&mask, recovery, repeat)
                            .with_context(|| format!("recovery `{}`", recovery.id))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The rows of a mask: one for each budget.
    fn recover(&mut self, mask: &Mask, recovery: &Recoveries, repeat: u64) -> Result<()> {
        let preset = self.preset;
        if preset.budgets.is_empty() {
            return self.student(mask, recovery, None, repeat);
        }
        preset
            .budgets
            .iter()
            .try_for_each(|b| self.student(mask, recovery, Some(b.steps), repeat))
    }

    /// A row of the table: the mask's cut model recovered, then measured.
    fn student(
        &mut self,
        mask: &Mask,
        recovery: &Recoveries,
        budget: Option<u64>,
        repeat: u64,
    ) -> Result<()> {
        let preset = self.preset;
        let seed = preset.seed + repeat;
        let mut ids = mask.rows.then(&recovery.id);
        let mut name = format!("{}, {}", mask.row.name, recovery.label);
        let mut base = preset.recover.clone();
        let x_name = preset.study.as_ref().and_then(|s| s.x_name.as_deref());
        if let (Some(x_name), Some(x)) = (x_name, recovery.x) {
            name += &format!(", {x_name} {x}");
        }
        if let Some(steps) = budget {
            ids = ids.then(&format!("{steps}-steps"));
            name += &format!(", {steps} steps");
            base.insert("steps".into(), whole(steps)?);
        }
        let all = merged(&base, &recovery.flags);
        let number = |key: &str| all.get(key).and_then(toml::Value::as_integer);
        let count = |key: &str| number(key).and_then(|n| u64::try_from(n).ok());
        let steps = count("steps").with_context(|| "`steps` is not a number of steps")?;
        let mut row = Row {
            id: ids.own.clone(),
            group: ids.group.clone(),
            repeat,
            name,
            recovery: match (&recovery.teacher, recovery.features()) {
                (None, _) => Recovery::FineTuning,
                (Some(_), Some("none")) => Recovery::OutputKd,
                (Some(_), Some("all")) => Recovery::FeatureKd,
                // By both masks at once or by each for itself.
                (Some(_), _) => Recovery::MaskedKd,
            },
            recovery_label: Some(recovery.label.clone()),
            budget_steps: Some(steps),
            samples_seen: count("batch-size").map(|batch| steps * batch),
            x: recovery.x,
            labels: mask
                .row
                .labels
                .clone()
                .into_iter()
                .chain(recovery.labels.clone())
                .collect(),
            ..mask.row.clone()
        };
        let folder = self.out.join("rows").join(&row.id);
        let recovered = folder.join("recovered");
        let model = recovered.join("model");
        let mut args = strings(&["distill", &say(&mask.cut), &say(&recovered)]);
        base.retain(|key, _| !recovery.flags.contains_key(key));
        args.extend(flags("distill", &base)?);
        let mut inputs = vec![mask.cut.clone()];
        self.on_data(&mut args, &mut inputs);
        if let Some(teacher) = &recovery.teacher {
            let teacher = self.model(teacher, repeat)?;
            args.extend(strings(&["--teacher", &say(&teacher)]));
            if recovery.matches_features() && !recovery.aligns_by_pattern() {
                let selection = aligned(mask, &teacher)?;
                args.extend(strings(&["--selection", &say(&selection)]));
                inputs.push(selection);
            }
            inputs.push(teacher);
        }
        args.extend(flags("distill", &recovery.flags)?);
        args.extend(strings(&["--seed", &seed.to_string()]));
        let metrics = recovered.join("metrics.jsonl");
        let mut outputs = model_files(&model);
        outputs.push(metrics.clone());
        let id = row.id.clone();
        let seconds = match &recovery.teacher {
            Some(_) => preset.seconds.kd,
            None => preset.seconds.fine_tune,
        };
        let longest = preset.budgets.iter().map(|b| b.steps).max();
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
                seconds: seconds * steps as f64 / longest.unwrap_or(steps).max(1) as f64,
            },
        );
        row.files.metrics = Some(metrics);
        self.loss(&mut row, &model, &folder.join("loss.json"), "loss")?;
        self.activations(&mut row, &model, &folder)?;
        self.models.insert((ids.first, repeat), model.clone());
        self.sample(row, &model, preset.seconds.sample_student)
    }

    /// The model that a preset names: `dense`, or the id of a row before.
    fn model(&self, name: &str, repeat: u64) -> Result<PathBuf> {
        if name == DENSE {
            return Ok(self.preset.teacher.clone());
        }
        let found = self.models.get(&(name.to_string(), repeat));
        found.cloned().with_context(|| {
            let known = self.models.keys().filter(|k| k.1 == repeat);
            let known: Vec<&str> = known.map(|k| k.0.as_str()).collect();
            format!(
                "no row `{name}` stands before; there are {DENSE}, {}",
                known.join(", ")
            )
        })
    }

    /// An error where two rows would have the same files.
    fn unshared(&self) -> Result<()> {
        let mut names: Vec<&str> = self.stages.iter().map(|s| s.name.as_str()).collect();
        names.sort_unstable();
        match names.windows(2).find(|w| w[0] == w[1]) {
            None => Ok(()),
            Some(w) => bail!(
                "two rows or masks of the preset are called `{}`; give one of their [[masks]] an `id`",
                w[0].split('/').next().unwrap_or(w[0])
            ),
        }
    }

    fn stage(&mut self, row: &mut Row, label: &'static str, stage: Stage) {
        row.stages.push((label, stage.name.clone()));
        self.push(stage);
    }

    /// A stage that reads from the hub keeps to the lock.
    fn push(&mut self, mut stage: Stage) {
        if stage.args.iter().any(|arg| on_hub(arg)) {
            stage.args.extend(strings(&["--lock", &say(self.lock)]));
        }
        self.stages.push(stage);
    }

    /// Adds the data that a command works on, where it is not the embedded set.
    fn on_data(&self, args: &mut Vec<String>, inputs: &mut Vec<PathBuf>) {
        if let Some(latents) = &self.preset.latents {
            args.extend(strings(&["--data", &say(&latents.folder)]));
            // The index says what the shards hold.
            inputs.push(latents.folder.join(LATENTS));
        }
    }
}

/// The selection that aligns the mask's model with `teacher`.
fn aligned(mask: &Mask, teacher: &Path) -> Result<PathBuf> {
    match &mask.row.files.selection {
        Some(selection) if mask.parent == teacher => Ok(selection.clone()),
        _ => bail!(
            "its hidden states cannot be matched with those of {}, which is not what `{}` was cut from; \
             say align = \"N:M\" (N of its blocks for M of the teacher's) or features = \"none\"",
            teacher.display(),
            mask.rows.first
        ),
    }
}

fn whole(n: u64) -> Result<toml::Value> {
    Ok(toml::Value::Integer(i64::try_from(n)?))
}

/// Whether a word means a place on the Hugging Face hub.
pub(crate) fn on_hub(word: &str) -> bool {
    word.starts_with("hub://")
}

/// Index of a folder of latents.
const LATENTS: &str = "latents.json";

/// The files of a model directory.
pub(crate) fn model_files(folder: &Path) -> Vec<PathBuf> {
    vec![folder.join("model.safetensors"), folder.join("config.json")]
}

pub(crate) fn say(path: &Path) -> String {
    path.display().to_string()
}

pub(crate) fn strings(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|s| (*s).to_string()).collect()
}

#[cfg(test)]
mod tests;
