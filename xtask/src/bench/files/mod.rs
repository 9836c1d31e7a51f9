//! `cargo xtask bench files`: checkpoints, the autoencoder and the latents' loader against torch, safetensors, diffusers and fast-DiT's
//! folders, on the same files and threads, in turn.

mod compare;
mod results;
mod table;
mod tasks;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::cases::probes;
use super::measure::{self, Setting, slug};
use super::preset::Kind;
use super::progress::Progress;
use super::python;
use super::worker::Worker;
use crate::files::{self, absolute};
use crate::reproduce::{Paths, driver, say};
use results::Results;
use tasks::{Contender, Group, Sizes, Task, Who, tasks};

const PEER: &str = "xtask/python/files_peer.py";
/// Untimed rounds: the files come into the page cache, kernels are chosen.
const WARM_UPS: usize = 1;
const PAUSE: Duration = Duration::from_millis(300);
/// Name of the training step's case.
const TRAIN: &str = "training step";
/// Disk space that is left to others.
const MARGIN: u64 = 1 << 30;

/// Options of `bench files`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the run; its gigabytes of test files are removed as soon as they were read
    #[arg(long, default_value = "runs/bench-files")]
    out: PathBuf,
    /// Threads of both sides [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Timed rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only the tasks whose name contains this
    #[arg(long, value_name = "PATTERN")]
    only: Option<String>,
    /// Network of the checkpoint: DiT-S/2, DiT-B/2, DiT-L/2 or DiT-XL/2
    #[arg(long, default_value = "DiT-XL/2")]
    model: String,
    /// Sides of the autoencoder's images in pixels
    #[arg(long, value_delimiter = ',', default_value = "256,512")]
    sizes: Vec<usize>,
    /// Images of the set of latents
    #[arg(long, default_value_t = 32_768)]
    images: usize,
    /// Network of the training step that the loader has to keep ahead of
    #[arg(long, default_value = "DiT-S/2")]
    train_model: String,
    /// Images of that step
    #[arg(long, default_value_t = 16)]
    train_batch: usize,
    /// Drive this binary instead of building one
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// Measures and writes `bench-files.json` and `bench-files.md`.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.rounds == 0 {
        bail!("--rounds is 0; expected at least 1");
    }
    let sizes = Sizes {
        model: args.model.clone(),
        sides: args.sizes.clone(),
        images: args.images,
        train_model: args.train_model.clone(),
        train_batch: args.train_batch,
    };
    sizes.check()?;
    let paths = Paths::enter()?;
    let out = paths.at_root(&args.out);
    let threads = args
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let lab = Lab {
        wanted: wanted(
            tasks(
                &sizes,
                &out.join("files"),
                &out.join("cases").join(slug(TRAIN)),
                threads,
            ),
            args.only.as_deref(),
        )?,
        python: python::environment_with(python::FILES)?,
        binary: PathBuf::new(),
        sizes,
        out: out.clone(),
        threads,
        rounds: args.rounds,
    };
    lab.enough_space()?;
    let driver = driver(args.binary.as_deref(), out, &paths)?;
    let lab = Lab {
        binary: driver.binary,
        ..lab
    };
    let results = lab.measure(driver.machine.clone())?;
    println!(
        "\n{}\nreport: {1}/bench-files.md, {1}/bench-files.json",
        table::report(&results),
        say(&lab.out)
    );
    Ok(())
}

fn wanted(mut all: Vec<Task>, only: Option<&str>) -> Result<Vec<Task>> {
    let names: Vec<String> = all.iter().map(|t| t.name.clone()).collect();
    all.retain(|task| only.is_none_or(|only| task.name.contains(only)));
    match (all.is_empty(), only) {
        (true, Some(only)) => bail!(
            "no task is called like `{only}`; there are: {}",
            names.join("; ")
        ),
        _ => Ok(all),
    }
}

struct Lab {
    binary: PathBuf,
    python: PathBuf,
    /// Folder of the run.
    out: PathBuf,
    sizes: Sizes,
    wanted: Vec<Task>,
    threads: usize,
    rounds: usize,
}

/// Files that are removed when nobody reads them any more.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left-over files are in the way of nobody: the next run begins with removing them.
        files::remove(&self.0).ok();
    }
}

impl Lab {
    fn of(&self, group: Group) -> Vec<&Task> {
        self.wanted.iter().filter(|t| t.group == group).collect()
    }

    /// Groups stand on the disk one after the other.
    fn enough_space(&self) -> Result<()> {
        std::fs::create_dir_all(&self.out)?;
        for group in Group::ALL.into_iter().filter(|g| !self.of(*g).is_empty()) {
            check_space(free_bytes(&self.out), group.bytes(&self.sizes)?, &self.out)?;
        }
        Ok(())
    }

    fn measure(&self, machine: tinyfusion_report::Machine) -> Result<Results> {
        let models = measure::Lab {
            binary: self.binary.clone(),
            python: Some(self.python.clone()),
            out: self.out.clone(),
            pause: PAUSE,
        };
        const PROBES: f64 = 30.0;
        let expected = |task: &Task| task.seconds * (WARM_UPS + self.rounds) as f64;
        let mut progress = Progress::new(PROBES + self.wanted.iter().map(expected).sum::<f64>());
        let mut versions = BTreeMap::new();
        progress.begin("the machine's limits", PROBES);
        let (limits, _) = probes(&models, self.threads, &progress, &mut versions)?;
        progress.end();
        let mut results = Results {
            machine,
            versions,
            threads: self.threads,
            rounds: self.rounds,
            peak_flops_per_second: limits.flops,
            bandwidth_bytes_per_second: limits.bandwidth,
            tasks: Vec::new(),
        };
        for group in Group::ALL {
            let tasks = self.of(group);
            if tasks.is_empty() {
                continue;
            }
            progress.say(&format!("preparing files: {}", group.folder()));
            let _files = self.prepare(group)?;
            let _case = match group {
                Group::Latents => Some(models.prepare(TRAIN, &self.training_step())?),
                _ => None,
            };
            for task in tasks {
                progress.begin(&task.name, expected(task));
                let found = self.compare(
                    task,
                    limits,
                    |share| progress.tick(share),
                    &mut results.versions,
                );
                results
                    .tasks
                    .push(found.with_context(|| format!("task `{}`", task.name))?);
                // After every task: what is measured is not lost when a later one fails.
                files::write_json(&self.out.join("bench-files.json"), &results)?;
                files::write_atomic(
                    &self.out.join("bench-files.md"),
                    table::report(&results).as_bytes(),
                )?;
                progress.end();
            }
        }
        Ok(results)
    }

    fn training_step(&self) -> Setting {
        Setting {
            kind: Kind::FineTune,
            model: self.sizes.train_model.clone(),
            batch: self.sizes.train_batch,
            threads: self.threads,
            depth: None,
            input_size: None,
            micro_batches: None,
        }
    }

    fn prepare(&self, group: Group) -> Result<Scratch> {
        let scratch = Scratch(self.out.join("files").join(group.folder()));
        files::remove(&scratch.0)?;
        for (who, words) in group.prepare(&scratch.0, &self.sizes) {
            let output = self.command(who, &words).output();
            let output = output
                .with_context(|| format!("`{}` cannot be started", self.line(who, &words)))?;
            if !output.status.success() {
                bail!(
                    "`{}` failed ({})\n{}",
                    self.line(who, &words),
                    output.status,
                    String::from_utf8_lossy(&output.stderr).trim_end()
                );
            }
        }
        Ok(scratch)
    }

    fn command(&self, who: Who, words: &[String]) -> Command {
        let mut command = match who {
            Who::Ours => Command::new(absolute(&self.binary)),
            Who::Python => python::script(&self.python, PEER, self.threads),
        };
        command.args(words);
        command
    }

    /// The same, to be pasted.
    fn line(&self, who: Who, words: &[String]) -> String {
        let words = words.join(" ");
        match who {
            Who::Ours => format!("{} {words}", say(&self.binary)),
            Who::Python => format!("{} {PEER} {words}", say(&self.python)),
        }
    }

    fn start(&self, task: &Task, contender: &Contender) -> Result<Worker> {
        let name = format!("{}, {}", task.name, contender.name);
        let log = self.out.join("logs").join(format!("{}.log", slug(&name)));
        Worker::start(
            &name,
            &mut self.command(contender.who, &contender.words),
            &log,
        )
    }
}

/// Bytes that a folder's file system has left, where it tells.
#[cfg(unix)]
fn free_bytes(folder: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(folder).ok()?;
    found.f_bavail.checked_mul(found.f_frsize)
}

#[cfg(not(unix))]
fn free_bytes(_folder: &Path) -> Option<u64> {
    None
}

fn check_space(free: Option<u64>, needed: u64, folder: &Path) -> Result<()> {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    match free {
        Some(free) if free < needed + MARGIN => bail!(
            "{} has {:.1} GiB left, but the files need {:.1} GiB and 1 GiB is left to others; make room, choose another --out, or a smaller --model \
             or --images",
            folder.display(),
            gib(free),
            gib(needed)
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_asked_for_is_measured() {
        let all = || {
            tasks(
                &tasks::tests::sizes(),
                Path::new("files"),
                Path::new("train"),
                2,
            )
        };
        let count = |only| wanted(all(), only).map(|t| t.len());
        assert_eq!(count(None).unwrap(), 7);
        assert_eq!(count(Some("VAE")).unwrap(), 4);
        assert_eq!(count(Some("load")).unwrap(), 2);
        let said = count(Some("xyz")).unwrap_err().to_string();
        assert!(
            said.contains("there are: load DiT-XL/2, model.pt; "),
            "{said}"
        );
    }

    #[test]
    fn a_full_disk_is_noticed_before_the_work() {
        let check = |free| check_space(free, 5 << 30, Path::new("runs/x"));
        check(None).unwrap();
        check(Some(6 << 30)).unwrap();
        let said = check(Some(5 << 30)).unwrap_err().to_string();
        assert!(
            said.contains("runs/x has 5.0 GiB left, but the files need 5.0 GiB"),
            "{said}"
        );
        #[cfg(unix)]
        assert!(free_bytes(Path::new(".")).is_some_and(|free| free > 0));
    }
}
