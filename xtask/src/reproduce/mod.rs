//! `cargo xtask reproduce`: the experiment of a preset, or of each of its parts, stage by stage, through the binary.

mod dry_run;
mod missing;
mod plan;
mod preset;
mod progress;
mod recipe;
mod rows;
mod spec;
mod stage;
mod vocabulary;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tinyfusion_report::{Report, Whole};

use crate::files;
use crate::machine;
use crate::report;
use preset::Preset;
use recipe::Recipe;

pub(crate) use plan::{model_files, say, strings};
pub(crate) use preset::file_of;
pub(crate) use progress::Progress;
pub(crate) use spec::flags;
use stage::Failed;
pub(crate) use stage::{Driver, Interrupted, catch_interrupts};
use tinyfusion_report::Failure;
use vocabulary::Plan;
pub(crate) use vocabulary::{Leftover, Row, Stage};

/// Options of `reproduce`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask reproduce                                   # `tiny`: ten minutes on two cores
  cargo xtask reproduce --preset table3 --seeds 2         # half an hour for a seed
  cargo xtask reproduce --preset paper --dry-run          # what the real experiment does, downloads, lacks and costs

The presets are the files in assets/presets: each begins with what it asks and how long it takes.")]
pub(crate) struct Args {
    /// `tiny`, `table1` and the others of assets/presets, or the path of a .toml
    #[arg(long, default_value = "tiny")]
    preset: String,
    /// How often, under seeds of their own from the preset's on: mean, spread and paired tests over them
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
    /// Folder of the run [default: runs/NAME-OF-THE-PRESET]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Begin again, also where stamps match
    #[arg(long)]
    force: bool,
    /// Drive this binary instead of building one
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Pin what comes from the hub in this file, and keep to what it pins [default: OUT/hub.lock]
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// Run nothing: print every stage with its command, what is downloaded, what is missing, and an estimate of time
    /// and memory from steps that are measured here
    #[arg(long)]
    dry_run: bool,
}

impl Args {
    /// `--preset NAME` alone.
    pub(crate) fn preset(name: &str) -> Self {
        Self {
            preset: name.into(),
            seeds: 1,
            out: None,
            force: false,
            binary: None,
            lock: None,
            dry_run: false,
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

/// An experiment with its plan, in its own folder.
struct Part {
    preset: Preset,
    plan: Plan,
    driver: Driver,
}

/// Runs the experiment, or every part of it, and writes the report.
pub(crate) fn run(args: &Args) -> Result<()> {
    let paths = Paths::enter()?;
    let mut file = file_of(&args.preset, &paths.root)?;
    if args.preset.ends_with(".toml") {
        file = paths.at_root(&file);
    }
    let mut recipe = Recipe::read(&file)?;
    let out = match &args.out {
        Some(out) => paths.at_root(out),
        None => Path::new("runs").join(&recipe.name),
    };
    recipe.find_teachers(&out)?;
    let folder = |part: &Preset| match recipe.alone {
        true => out.clone(),
        false => out.join(&part.name),
    };
    if args.force && !args.dry_run {
        let folders = recipe.parts.iter().map(folder).chain([out.clone()]);
        for folder in folders {
            OURS.iter()
                .try_for_each(|name| files::remove(&folder.join(name)))?;
        }
    }
    let lock = match &args.lock {
        Some(lock) => paths.at_root(lock),
        None => out.join("hub.lock"),
    };
    let driver = driver(args.binary.as_deref(), out.clone(), &paths)?;
    let part = |preset: &Preset| -> Result<Part> {
        let out = folder(preset);
        Ok(Part {
            preset: preset.clone(),
            plan: plan::plan(preset, &out, &lock, args.seeds)?,
            driver: Driver {
                out,
                ..driver.clone()
            },
        })
    };
    let parts: Vec<Part> = recipe.parts.iter().map(part).collect::<Result<_>>()?;
    if args.dry_run {
        return dry_run::run(&parts, &lock);
    }
    missing::check(&parts)?;
    catch_interrupts()?;
    let mut progress = Progress::new(parts.iter().flat_map(|p| &p.plan.stages));
    let reports = parts
        .iter()
        .map(|part| tell(part, recipe.alone, &mut progress))
        .collect::<Result<Vec<_>>>();
    progress.close();
    let reports = reports?;
    match &reports[..] {
        [report] if recipe.alone => report::announce(report, &out),
        _ => report::write_whole(
            &Whole::of(&recipe.name, recipe.title.as_deref(), &reports),
            &out,
        )?,
    }
    check(&parts, &reports)
}

/// Runs a part and writes its own report.
fn tell(part: &Part, alone: bool, progress: &mut Progress) -> Result<Report> {
    let Part {
        preset,
        plan,
        driver,
    } = part;
    if !alone {
        progress.say(&format!("\n== {}", preset.name));
    }
    let concerned = |stage: &Stage| plan.concerned(stage);
    let failures = drive(driver, &plan.stages, concerned, progress)?;
    let results = rows::collect(preset, plan, driver, &failures)?;
    report::write(results, &plan.rows, &driver.out)
}

/// An error where rows could not be measured.
fn check(parts: &[Part], reports: &[Report]) -> Result<()> {
    let (mut stages, mut logs) = (Vec::new(), Vec::new());
    for (part, report) in parts.iter().zip(reports) {
        let rows = &report.results.rows;
        let failed: Vec<String> = rows
            .iter()
            .filter_map(|r| r.failed.as_ref())
            .map(|failed| match parts {
                [_] => failed.stage.clone(),
                _ => format!("{}/{}", part.preset.name, failed.stage),
            })
            .collect();
        if !failed.is_empty() {
            logs.push(say(&part.driver.out.join("logs")));
        }
        stages.extend(failed);
    }
    if stages.is_empty() {
        return Ok(());
    }
    bail!(
        "the report is written, but {} of {} rows could not be measured: {} failed (see the logs in {}); \
         the same command tries again",
        stages.len(),
        reports.iter().map(|r| r.results.rows.len()).sum::<usize>(),
        stages.join(", "),
        logs.join(", ")
    )
}

/// The rows that could not be measured, by their id.
pub(crate) type Failures = BTreeMap<String, Failure>;

/// Runs the stages in order.
///
/// Where `concerned` names the row that alone needs a stage, a failure of the stage ends that row and
/// not the run: it is returned, and the row's other stages are left out. A training that the binary
/// refuses is the preset's mistake, and ends the run; one that fails keeps its folder, to be resumed.
pub(crate) fn drive<'a>(
    driver: &Driver,
    stages: &[Stage],
    concerned: impl Fn(&Stage) -> Option<&'a Row>,
    progress: &mut Progress,
) -> Result<Failures> {
    let mut failures = Failures::new();
    for stage in stages {
        let row = concerned(stage);
        if row.is_some_and(|r| failures.contains_key(&r.id)) {
            driver.forget(stage)?;
            progress.pass(stage, "left out, its row has failed");
            continue;
        }
        let training = stage.leftover == Leftover::Resume;
        let outcome = driver.run(
            stage,
            |command| progress.begin(stage, command),
            |s| progress.tick(stage, s),
        );
        match outcome {
            Ok(outcome) => progress.end(stage, outcome),
            Err(error) => match (row, error.downcast_ref::<Failed>()) {
                (Some(row), Some(failed)) if !(failed.refused && training) => {
                    if !training {
                        driver.forget(stage)?;
                    }
                    let failure = Failure {
                        stage: stage.name.clone(),
                        error: failed.tail.clone(),
                    };
                    failures.insert(row.id.clone(), failure);
                    progress.pass(stage, &failed.to_string());
                }
                _ => return Err(error),
            },
        }
    }
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
    let found = match binary {
        Some(binary) => paths.at_root(binary),
        None => build(paths)?,
    };
    let binary_sha256 = files::hash_path(&found).context("the binary")?;
    Ok(Driver {
        machine: machine::of_here(&binary_sha256, binary.is_none()),
        binary: found,
        binary_sha256,
        out,
    })
}

fn build(paths: &Paths) -> Result<PathBuf> {
    // Of the whole workspace, so that candle is built once for this and for the tests: features are those of all packages.
    const ARGS: &[&str] = &["build", "--release", "--workspace", "--bin", "tinyfusion"];
    println!("$ cargo {}", ARGS.join(" "));
    let status = files::cargo()
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
