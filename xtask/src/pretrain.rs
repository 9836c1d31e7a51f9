//! `cargo xtask pretrain`: trains the embedded classifier and teacher again, resumably.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::reproduce::{
    Leftover, Paths, Stage, catch_interrupts, drive, driver, file_of, flags, model_files, say,
    strings,
};

/// Options of `pretrain`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of a preset, or the path of a .toml
    #[arg(long, default_value = "pretrain")]
    preset: String,
    /// Folder of the run
    #[arg(long, default_value = "runs/pretrain")]
    out: PathBuf,
    /// Also write the finished models in f16 to assets/classifier and assets/teacher
    #[arg(long)]
    export: bool,
    /// Drive this binary instead of building one
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// `assets/presets/pretrain.toml`: flags of `tinyfusion pretrain`, once for each model.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Preset {
    seed: u64,
    classifier: toml::Table,
    dit: toml::Table,
    seconds: Seconds,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Seconds {
    classifier: f64,
    dit: f64,
}

/// Trains both models; the same command continues.
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
    let stages = stages(&preset, &out, args.export.then_some(Path::new("assets")))?;
    let mut driver = driver(args.binary.as_deref(), out, &paths)?;
    // Hours of training go on with a rebuilt binary.
    driver.binary_sha256 = "any".into();
    catch_interrupts()?;
    drive(&driver, &stages, |_| None)?;
    for stage in &stages {
        let made: Vec<String> = stage.outputs.iter().map(|o| say(o)).collect();
        println!("{}: {}", stage.name, made.join(", "));
    }
    Ok(())
}

fn stages(preset: &Preset, out: &Path, export: Option<&Path>) -> Result<Vec<Stage>> {
    let models = [
        (
            "classifier",
            "classifier",
            &preset.classifier,
            preset.seconds.classifier,
        ),
        ("dit", "teacher", &preset.dit, preset.seconds.dit),
    ];
    models
        .into_iter()
        .map(|(what, asset, table, seconds)| {
            let folder = out.join(what);
            let mut args = strings(&["pretrain", &say(&folder), "--what", what]);
            args.extend(flags("pretrain", table)?);
            args.extend(strings(&["--seed", &preset.seed.to_string()]));
            let mut outputs = model_files(&folder.join("model"));
            outputs.push(folder.join("metrics.jsonl"));
            let stage = Stage {
                name: format!("{what}/pretrain"),
                args,
                inputs: Vec::new(),
                outputs,
                folder: Some(folder),
                leftover: Leftover::Precious,
                capture: None,
                seconds,
            };
            Ok(match export {
                None => vec![stage],
                Some(assets) => {
                    // A finished run returns at once, so this only writes the export.
                    let mut exported = stage.clone();
                    let target = assets.join(asset);
                    exported.name = format!("{what}/export");
                    exported.args.extend(strings(&["--export", &say(&target)]));
                    exported.inputs = model_files(&out.join(what).join("model"));
                    exported.outputs = model_files(&target);
                    exported.folder = None;
                    exported.leftover = Leftover::Resume;
                    exported.seconds = 1.0;
                    vec![stage, exported]
                }
            })
        })
        .collect::<Result<Vec<_>>>()
        .map(|s| s.into_iter().flatten().collect())
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
        let plain = stages(&embedded(), out, None).unwrap();
        assert_eq!(
            plain.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
            ["classifier/pretrain", "dit/pretrain"]
        );
        assert!(plain.iter().all(|s| s.args.iter().all(|a| a != "--export") && s.leftover == Leftover::Precious));
        let all = stages(&embedded(), out, Some(Path::new("assets"))).unwrap();
        let line = all[3].args.join(" ");
        assert!(
            line.starts_with("pretrain runs/p/dit --what dit --batch-size "),
            "{line}"
        );
        assert!(line.ends_with("--seed 0 --export assets/teacher"), "{line}");
        assert_eq!(
            all[3].outputs[0],
            Path::new("assets/teacher/model.safetensors")
        );
        // The export must not wipe the run that it reads.
        assert!(all[3].folder.is_none());
    }
}
