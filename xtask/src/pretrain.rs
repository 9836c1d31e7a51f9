//! `cargo xtask pretrain`: trains the embedded classifier and teachers again, resumably.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::reproduce::{
    Leftover, Paths, Progress, Stage, catch_interrupts, drive, driver, file_of, flags, model_files,
    say, strings,
};

/// Options of `pretrain`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of a preset, or the path of a .toml
    #[arg(long, default_value = "pretrain")]
    preset: String,
    /// Which models are trained
    #[arg(long, value_enum, default_value = "dit")]
    family: Family,
    /// Folder of the run
    #[arg(long, default_value = "runs/pretrain")]
    out: PathBuf,
    /// Also write the finished models in f16 to assets: classifier, teacher, teacher-sit, teacher-mar
    #[arg(long)]
    export: bool,
    /// Drive this binary instead of building one
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// What one call trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Family {
    /// The classifier and the DiT teacher, all parts of its training
    Dit,
    /// The SiT teacher alone, which begins with the weights of the embedded DiT
    Sit,
    /// The MAR teacher alone
    Mar,
    /// The classifier and the teachers of all families
    All,
}

impl Family {
    fn covers(self, one: Self) -> bool {
        self == one || self == Self::All
    }
}

/// `assets/presets/pretrain.toml`: flags of `tinyfusion pretrain`, once for each model, and of `tinyfusion distill`
/// for each further part of the teacher's training.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Preset {
    seed: u64,
    classifier: toml::Table,
    dit: toml::Table,
    /// Plain training that goes on from the last DiT, with a schedule of its own.
    #[serde(default)]
    then: Vec<toml::Table>,
    sit: toml::Table,
    mar: toml::Table,
    seconds: Seconds,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Seconds {
    classifier: f64,
    dit: f64,
    /// Of each part that follows.
    #[serde(default)]
    then: f64,
    sit: f64,
    mar: f64,
}

/// Trains the models of a family; the same command continues.
pub(crate) fn run(args: &Args) -> Result<()> {
    let paths = Paths::enter()?;
    let file = if args.preset.ends_with(".toml") {
        paths.at_root(Path::new(&args.preset))
    } else {
        file_of(&args.preset, Path::new("."))?
    };
    let text = std::fs::read_to_string(&file)
        .with_context(|| format!("cannot read {}", file.display()))?;
    let preset: Preset =
        toml::from_str(&text).with_context(|| format!("preset {}", file.display()))?;
    let out = paths.at_root(&args.out);
    let export = args.export.then_some(Path::new("assets"));
    let stages = stages(&preset, args.family, &out, export)?;
    let mut driver = driver(args.binary.as_deref(), out, &paths)?;
    // Hours of training go on with a rebuilt binary.
    driver.binary_sha256 = "any".into();
    catch_interrupts()?;
    let mut progress = Progress::new(stages.iter());
    let outcome = drive(&driver, &stages, |_| None, &mut progress);
    progress.close();
    outcome?;
    for stage in &stages {
        let made: Vec<String> = stage.outputs.iter().map(|o| say(o)).collect();
        println!("{}: {}", stage.name, made.join(", "));
    }
    Ok(())
}

fn stages(
    preset: &Preset,
    family: Family,
    out: &Path,
    export: Option<&Path>,
) -> Result<Vec<Stage>> {
    let Preset { seed, seconds, .. } = preset;
    let first = |what, table, seconds| first(what, table, *seed, seconds, out);
    let mut models = Vec::new();
    if family.covers(Family::Dit) {
        let classifier = first("classifier", &preset.classifier, seconds.classifier)?;
        models.push((vec![classifier], "classifier"));
        let mut dit = vec![first("dit", &preset.dit, seconds.dit)?];
        dit.extend(going_on(preset, out)?);
        models.push((dit, "teacher"));
    }
    if family.covers(Family::Sit) {
        let sit = first("sit", &preset.sit, seconds.sit)?;
        models.push((vec![sit], "teacher-sit"));
    }
    if family.covers(Family::Mar) {
        let mar = first("mar", &preset.mar, seconds.mar)?;
        models.push((vec![mar], "teacher-mar"));
    }
    let exported = |(mut stages, asset): (Vec<Stage>, &str)| {
        let target = export.map(|assets| assets.join(asset));
        let exported = target.and_then(|t| Some(exporting(stages.last()?, &t)));
        stages.extend(exported);
        stages
    };
    Ok(models.into_iter().flat_map(exported).collect())
}

/// The further parts of the DiT's training.
fn going_on(preset: &Preset, out: &Path) -> Result<Vec<Stage>> {
    let mut stages = Vec::new();
    let mut from = out.join("dit");
    for (i, table) in preset.then.iter().enumerate() {
        let name = format!("dit-{}", i + 2);
        let folder = out.join(&name);
        let mut args = strings(&["distill", &say(&from.join("model")), &say(&folder)]);
        args.extend(flags("distill", table)?);
        if !table.contains_key("seed") {
            args.extend(strings(&["--seed", &preset.seed.to_string()]));
        }
        let inputs = model_files(&from.join("model"));
        let seconds = preset.seconds.then;
        stages.push(training(&name, args, inputs, folder.clone(), seconds));
        from = folder;
    }
    Ok(stages)
}

/// Training from nothing, or with another family's weights where the table says `from`.
fn first(what: &str, table: &toml::Table, seed: u64, seconds: f64, out: &Path) -> Result<Stage> {
    let folder = out.join(what);
    let mut args = strings(&["pretrain", &say(&folder), "--what", what]);
    args.extend(flags("pretrain", table)?);
    args.extend(strings(&["--seed", &seed.to_string()]));
    let from = table.get("from").and_then(toml::Value::as_str);
    let inputs = from.map_or(Vec::new(), |model| model_files(Path::new(model)));
    Ok(training(what, args, inputs, folder, seconds))
}

fn training(
    name: &str,
    args: Vec<String>,
    inputs: Vec<PathBuf>,
    folder: PathBuf,
    seconds: f64,
) -> Stage {
    let mut outputs = model_files(&folder.join("model"));
    outputs.push(folder.join("metrics.jsonl"));
    Stage {
        name: format!("{name}/pretrain"),
        args,
        inputs,
        outputs,
        folder: Some(folder),
        leftover: Leftover::Precious,
        capture: None,
        seconds,
    }
}

/// The command of a finished training again, which returns at once and so only writes the export.
fn exporting(trained: &Stage, target: &Path) -> Stage {
    let mut stage = trained.clone();
    stage.name = trained.name.replace("/pretrain", "/export");
    stage
        .args
        .extend(strings(&["--export", &say(target), "--overwrite"]));
    stage.inputs = trained
        .outputs
        .iter()
        .filter(|o| o.extension().is_some_and(|e| e != "jsonl"))
        .cloned()
        .collect();
    stage.outputs = model_files(target);
    // It must not wipe the run that it reads.
    stage.folder = None;
    stage.leftover = Leftover::Resume;
    stage.seconds = 1.0;
    stage
}

#[cfg(test)]
mod tests {
    use super::*;

    fn embedded() -> Preset {
        toml::from_str(include_str!("../../assets/presets/pretrain.toml")).unwrap()
    }

    #[test]
    fn both_models_are_trained_and_exported_only_when_asked() {
        let out = Path::new("runs/p");
        let plain = stages(&embedded(), Family::Dit, out, None).unwrap();
        assert_eq!(
            plain.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
            ["classifier/pretrain", "dit/pretrain", "dit-2/pretrain"]
        );
        assert!(plain.iter().all(|s| s.args.iter().all(|a| a != "--export") && s.leftover == Leftover::Precious));
        let assets = Some(Path::new("assets"));
        let all = stages(&embedded(), Family::Dit, out, assets).unwrap();
        let names: Vec<&str> = all.iter().map(|s| s.name.as_str()).collect();
        assert_eq!((names[1], names[4]), ("classifier/export", "dit-2/export"));
        let line = all[2].args.join(" ");
        assert!(
            line.starts_with("pretrain runs/p/dit --what dit --batch-size "),
            "{line}"
        );
        assert!(line.ends_with("--seed 0"), "{line}");
        // The part that follows begins with the model of the first, and is what is exported.
        let line = all[4].args.join(" ");
        assert!(
            line.starts_with("distill runs/p/dit/model runs/p/dit-2 --batch-size 32 "),
            "{line}"
        );
        assert!(
            line.contains("--seed 1 ") && line.ends_with("--export assets/teacher --overwrite"),
            "{line}"
        );
        assert_eq!(line.matches("--seed").count(), 1);
        assert_eq!(all[3].inputs, model_files(&out.join("dit/model")));
        assert_eq!(all[4].inputs, model_files(&out.join("dit-2/model")));
        assert_eq!(
            all[4].outputs[0],
            Path::new("assets/teacher/model.safetensors")
        );
        // The export must not wipe the run that it reads.
        assert!(all[4].folder.is_none());
    }

    #[test]
    fn a_family_is_trained_alone_and_all_in_order() {
        let (out, assets) = (Path::new("p"), Some(Path::new("assets")));
        let names = |family, export| -> Vec<String> {
            let stages = stages(&embedded(), family, out, export).unwrap();
            stages.into_iter().map(|s| s.name).collect()
        };
        assert_eq!(names(Family::Sit, None), ["sit/pretrain"]);
        assert_eq!(names(Family::Mar, assets), ["mar/pretrain", "mar/export"]);
        // The SiT begins with the DiT, which is there before it.
        assert_eq!(
            names(Family::All, assets),
            [
                "classifier/pretrain",
                "classifier/export",
                "dit/pretrain",
                "dit-2/pretrain",
                "dit-2/export",
                "sit/pretrain",
                "sit/export",
                "mar/pretrain",
                "mar/export"
            ]
        );
        let sit = stages(&embedded(), Family::Sit, out, assets).unwrap();
        assert_eq!(sit[0].inputs, model_files(Path::new("assets/teacher")));
        let line = sit[1].args.join(" ");
        assert_eq!(
            line,
            "pretrain p/sit --what sit --batch-size 32 --ema 0.999 --from assets/teacher --last-lr 0.00002 --lr 0.001 \
             --num-heads 2 --steps 10000 --warmup 500 --seed 0 --export assets/teacher-sit --overwrite"
        );
        assert_eq!(sit[1].inputs, model_files(Path::new("p/sit/model")));
        let mar = stages(&embedded(), Family::Mar, out, assets).unwrap();
        let line = mar[0].args.join(" ");
        assert!(
            line.starts_with("pretrain p/mar --what mar ") && line.contains(" --steps 8000 "),
            "{line}"
        );
        assert!(mar[0].inputs.is_empty() && !line.contains("--from"));
        assert_eq!(mar[1].outputs, model_files(Path::new("assets/teacher-mar")));
    }

    #[test]
    fn a_teacher_may_be_trained_in_one_part() {
        let mut preset = embedded();
        preset.then.clear();
        let assets = Some(Path::new("assets"));
        let all = stages(&preset, Family::Dit, Path::new("o"), assets).unwrap();
        assert_eq!(all.len(), 4);
        let line = all[3].args.join(" ");
        assert!(
            line.starts_with("pretrain ") && line.ends_with("--export assets/teacher --overwrite"),
            "{line}"
        );
    }
}
