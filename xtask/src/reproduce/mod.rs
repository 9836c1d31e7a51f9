//! `cargo xtask reproduce`: the experiment of a preset, stage by stage, through the binary.

mod plan;
mod preset;
mod progress;
mod rows;
mod stage;
mod vocabulary;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{files, report};

pub(crate) use plan::{model_files, say, strings};
pub(crate) use preset::{file_of, flags};
pub(crate) use progress::{Progress, duration};
#[cfg(test)]
pub(crate) use rows::{Aggregate, Cost};
pub(crate) use rows::{ResultRow, Results, Spread};
use stage::Failed;
pub(crate) use stage::{Driver, Interrupted, catch_interrupts};
pub(crate) use vocabulary::{Failure, Leftover, Recovery, Row, Stage};

/// Options of `reproduce`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// `tiny`, `smoke`, or the path of a .toml
    #[arg(long, default_value = "tiny")]
    preset: String,
    /// Folder of the run [default: runs/NAME-OF-THE-PRESET]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Begin again, also where stamps match
    #[arg(long)]
    force: bool,
    /// Drive this binary instead of building one
    #[arg(long)]
    binary: Option<PathBuf>,
}

impl Args {
    /// `--preset NAME` alone.
    pub(crate) fn preset(name: &str) -> Self {
        Self {
            preset: name.into(),
            out: None,
            force: false,
            binary: None,
        }
    }
}

/// Everything in a run's folder that is ours to remove.
const OURS: &[&str] = &[
    "stamps",
    "logs",
    "masks",
    "rows",
    "results.json",
    "report.md",
    "report.html",
    "table.md",
];

/// Runs the experiment and writes its report.
pub(crate) fn run(args: &Args) -> Result<()> {
    let paths = Paths::enter()?;
    let mut file = file_of(&args.preset, &paths.root)?;
    if args.preset.ends_with(".toml") {
        file = paths.at_root(&file);
    }
    let preset = preset::Preset::read(&file)?;
    for model in [&preset.teacher, &preset.classifier] {
        if let Some(missing) = model_files(model).iter().find(|f| !f.is_file()) {
            bail!(
                "{} is missing; the preset needs a model directory there (`cargo xtask pretrain --export` makes the embedded ones)",
                missing.display()
            );
        }
    }
    let out = match &args.out {
        Some(out) => paths.at_root(out),
        None => Path::new("runs").join(&preset.name),
    };
    if args.force {
        OURS.iter()
            .try_for_each(|name| files::remove(&out.join(name)))?;
    }
    let driver = driver(args.binary.as_deref(), out, &paths)?;
    let plan = plan::plan(&preset, &driver.out)?;
    catch_interrupts()?;
    let failures = drive(&driver, &plan.stages, |stage| plan.measured(&stage.name))?;
    let results = rows::collect(&preset, &plan, &driver, &failures)?;
    report::write(&results, &plan.rows, &driver.out)?;
    if !failures.is_empty() {
        let stages: Vec<&str> = failures.values().map(|f| f.stage.as_str()).collect();
        bail!(
            "the report is written, but {} of {} rows could not be measured: {} failed (see the logs in {}); \
             the same command tries again",
            failures.len(),
            results.rows.len(),
            stages.join(", "),
            driver.out.join("logs").display()
        );
    }
    Ok(())
}

/// The rows that could not be measured, by their id.
pub(crate) type Failures = BTreeMap<String, Failure>;

/// Runs the stages in order, with one bar over all of them.
///
/// Where `measured` names the row that a stage measures, a failure of the stage ends that row and not
/// the run: it is returned, and the row's other stages are left out.
pub(crate) fn drive<'a>(
    driver: &Driver,
    stages: &[Stage],
    measured: impl Fn(&Stage) -> Option<&'a Row>,
) -> Result<Failures> {
    let mut progress = Progress::new(stages);
    let mut failures = Failures::new();
    for stage in stages {
        let row = measured(stage);
        if row.is_some_and(|r| failures.contains_key(&r.id)) {
            driver.forget(stage)?;
            progress.pass(stage, "left out, its row has failed");
            continue;
        }
        let outcome = driver.run(
            stage,
            |command| progress.begin(stage, command),
            |s| progress.tick(stage, s),
        );
        match outcome {
            Ok(outcome) => progress.end(stage, outcome),
            Err(error) => match (row, error.downcast_ref::<Failed>()) {
                (Some(row), Some(failed)) => {
                    driver.forget(stage)?;
                    let failure = Failure {
                        stage: stage.name.clone(),
                        error: failed.tail.clone(),
                    };
                    failures.insert(row.id.clone(), failure);
                    progress.pass(stage, &failed.to_string());
                }
                _ => {
                    progress.close();
                    return Err(error);
                }
            },
        }
    }
    progress.close();
    Ok(failures)
}

/// The repository's root, where everything runs, and where the user stood.
pub(crate) struct Paths {
    root: PathBuf,
    user: PathBuf,
}

impl Paths {
    /// Goes to the repository's root: printed commands hold there.
    pub(crate) fn enter() -> Result<Self> {
        let paths = Self {
            root: files::root(),
            user: std::env::current_dir()?,
        };
        std::env::set_current_dir(&paths.root)
            .with_context(|| format!("cannot enter {}", paths.root.display()))?;
        Ok(paths)
    }

    /// A path as the user gave it, said from the root.
    pub(crate) fn at_root(&self, path: &Path) -> PathBuf {
        files::from_root(path, &self.user, &self.root)
    }
}

/// Builds the binary (unless one is given) and hashes it.
pub(crate) fn driver(binary: Option<&Path>, out: PathBuf, paths: &Paths) -> Result<Driver> {
    let binary = match binary {
        Some(binary) => paths.at_root(binary),
        None => build(paths)?,
    };
    let binary_sha256 = files::hash_path(&binary).context("the binary")?;
    Ok(Driver {
        binary,
        binary_sha256,
        out,
    })
}

fn build(paths: &Paths) -> Result<PathBuf> {
    const ARGS: &[&str] = &["build", "--release", "-p", "tinyfusion-cli"];
    println!("$ cargo {}", ARGS.join(" "));
    let status = Command::new("cargo")
        .args(ARGS)
        .status()
        .context("cargo cannot be started")?;
    if !status.success() {
        bail!("`cargo {}` failed ({status})", ARGS.join(" "));
    }
    let metadata = cargo_metadata::MetadataCommand::new().no_deps().exec()?;
    let name = format!("release/tinyfusion{}", std::env::consts::EXE_SUFFIX);
    Ok(paths.at_root(metadata.target_directory.join(name).as_std_path()))
}
