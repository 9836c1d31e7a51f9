//! `cargo xtask bench fid`: the evaluator against torch-fidelity, scipy and numpy, on the same files and threads, in
//! turn.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::python;
use super::turns::{self, Rhythm, Timed};
use super::worker::Worker;
use crate::files::{self, absolute};
use crate::reproduce::{Paths, driver, say};
use tinyfusion_report::Machine;

const PEER: &str = "xtask/python/fid_peer.py";

/// Untimed repetitions of both sides.
const WARM_UPS: usize = 1;
const PAUSE: Duration = Duration::from_millis(300);

/// Images of the network's task, as the peer prepares them.
const IMAGES: f64 = 32.0;

/// Largest difference between the two sides' results, relative to the largest value.
const TOLERANCE: f64 = 1e-4;

/// A part of the evaluator, and who else does it.
const TASKS: [(&str, &str); 3] = [
    ("network", "torch-fidelity"),
    ("frechet", "scipy.linalg.sqrtm"),
    ("precision-recall", "numpy in blocks"),
];

/// Options of `bench fid`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the run
    #[arg(long, default_value = "runs/bench-fid")]
    out: PathBuf,
    /// Threads of both sides [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Timed rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only the task of this name: network, frechet or precision-recall
    #[arg(long)]
    only: Option<String>,
    /// Drive this binary instead of building one
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// `bench-fid.json`.
#[derive(Serialize)]
struct Results {
    machine: Machine,
    threads: usize,
    versions: BTreeMap<String, String>,
    tasks: Vec<Task>,
}

#[derive(Serialize)]
struct Task {
    task: &'static str,
    against: &'static str,
    ours: Side,
    theirs: Side,
    /// Of the first results, relative to the largest value.
    difference: Option<f64>,
    /// Cores that other programs kept busy meanwhile.
    others: Option<f64>,
}

#[derive(Serialize)]
struct Side {
    seconds: Vec<f64>,
    peak_rss_bytes: u64,
}

impl Side {
    fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.rounds == 0 {
        bail!("--rounds is 0; expected at least 1");
    }
    let paths = Paths::enter()?;
    let wanted: Vec<_> = TASKS
        .into_iter()
        .filter(|(task, _)| args.only.as_ref().is_none_or(|only| task == only))
        .collect();
    if wanted.is_empty() {
        let names = TASKS.map(|(task, _)| task).join(", ");
        let only = args.only.as_deref().unwrap_or_default();
        bail!("no task is called `{only}`; there are: {names}");
    }
    let python = python::environment_with(python::FID)?;
    let driver = driver(args.binary.as_deref(), paths.at_root(&args.out), &paths)?;
    let machine = driver.machine.clone();
    let threads = args.threads.unwrap_or(machine.cores);
    let mut lab = Lab {
        binary: driver.binary,
        python,
        out: driver.out,
        threads,
        rounds: args.rounds,
        versions: BTreeMap::new(),
    };
    println!("preparing weights, images and features");
    lab.prepare()?;
    let mut results = Results {
        machine,
        threads,
        versions: BTreeMap::new(),
        tasks: Vec::new(),
    };
    for (task, against) in wanted {
        println!("{task} against {against}");
        let found = lab.compare(task, against)?;
        results.tasks.push(found);
        results.versions.clone_from(&lab.versions);
        // After every task: what is measured is not lost when a later one fails.
        files::write_json(&lab.out.join("bench-fid.json"), &results)?;
    }
    let table = table(&results);
    files::write_atomic(&lab.out.join("bench-fid.md"), table.as_bytes())?;
    println!(
        "\n{table}\nreport: {0}/bench-fid.md, {0}/bench-fid.json",
        say(&lab.out)
    );
    Ok(())
}

struct Lab {
    binary: PathBuf,
    python: PathBuf,
    out: PathBuf,
    threads: usize,
    rounds: usize,
    versions: BTreeMap<String, String>,
}

impl Lab {
    fn files(&self) -> PathBuf {
        self.out.join("files")
    }

    fn prepare(&self) -> Result<()> {
        let output = self
            .peer("prepare")
            .output()
            .context("Python cannot be started")?;
        if !output.status.success() {
            bail!(
                "{PEER} prepare failed ({})\n{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }

    fn peer(&self, task: &str) -> Command {
        let mut command = python::script(&self.python, PEER, self.threads);
        let threads = self.threads.to_string();
        command.args([&say(&self.files()), task, "--threads", &threads]);
        command
    }

    fn compare(&mut self, task: &'static str, against: &'static str) -> Result<Task> {
        let mut ours = Command::new(absolute(&self.binary));
        ours.args([
            "bench",
            "fid",
            &say(&self.files()),
            task,
            "--threads",
            &self.threads.to_string(),
        ]);
        let log = |side: &str| self.out.join("logs").join(format!("{task}-{side}.log"));
        let ours = Worker::start(&format!("{task}, ours"), &mut ours, &log("ours"))?;
        let name = format!("{task}, {against}");
        let theirs = Worker::start(&name, &mut self.peer(task), &log("theirs"))?;
        self.versions.extend(theirs.versions.clone());
        let rhythm = Rhythm {
            warm_ups: WARM_UPS,
            rounds: self.rounds,
            pause: PAUSE,
        };
        let mut workers = [ours, theirs];
        let Timed { seconds, others } = turns::take(&mut workers, rhythm, |_| ())?;
        let [ours, theirs] = workers.map(Worker::finish);
        let (ours, theirs) = (ours?, theirs?);
        let difference = theirs.difference;
        // NaN and none fail too.
        if difference.is_none_or(|d| d.is_nan() || d > TOLERANCE) {
            bail!(
                "{task}: the result of {against} differs from ours by {difference:?} of the largest value; expected at most {TOLERANCE:.0e}"
            );
        }
        Ok(Task {
            task,
            against,
            ours: Side {
                seconds: seconds[0].clone(),
                peak_rss_bytes: ours.peak_rss_bytes,
            },
            theirs: Side {
                seconds: seconds[1].clone(),
                peak_rss_bytes: theirs.peak_rss_bytes,
            },
            difference,
            others,
        })
    }
}

fn table(results: &Results) -> String {
    let mut lines = vec![
        format!("{} threads, medians of the rounds.", results.threads),
        String::new(),
        "| task | ours | other | other's time | times faster (least to largest) | ours, peak | other's peak | difference | others' cores |".into(),
        "|---|--:|---|--:|--:|--:|--:|--:|--:|".into(),
    ];
    for task in &results.tasks {
        let (ours, theirs) = (task.ours.median(), task.theirs.median());
        // Round against round: a machine that drifts hurts both of one round.
        let ratios = task.theirs.seconds.iter().zip(&task.ours.seconds);
        let (least, largest) = ratios
            .map(|(theirs, ours)| theirs / ours)
            .fold((f64::INFINITY, 0f64), |(l, h), r| (l.min(r), h.max(r)));
        let say = |seconds: f64| match task.task {
            "network" => format!("{:.2} images/s", IMAGES / seconds),
            _ => format!("{seconds:.2} s"),
        };
        let gib =
            |side: &Side| format!("{:.2} GiB", side.peak_rss_bytes as f64 / f64::from(1 << 30));
        lines.push(format!(
            "| {} | {} | {} | {} | {:.2} ({:.2} to {:.2}) | {} | {} | {:.1e} | {} |",
            task.task,
            say(ours),
            task.against,
            say(theirs),
            theirs / ours,
            least,
            largest,
            gib(&task.ours),
            gib(&task.theirs),
            task.difference.unwrap_or(f64::NAN),
            task.others.map_or("–".into(), |o| format!("{o:.2}")),
        ));
    }
    lines.push(String::new());
    let versions: Vec<String> = results
        .versions
        .iter()
        .map(|(name, v)| format!("{name} {v}"))
        .collect();
    lines.push(format!(
        "Against {}. Measured on: {}.",
        versions.join(", "),
        crate::machine::place(&results.machine)
    ));
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_rates_and_ratios() {
        let side = |seconds: &[f64]| Side {
            seconds: seconds.to_vec(),
            peak_rss_bytes: 1 << 29,
        };
        let task = |task| Task {
            task,
            against: "other",
            ours: side(&[3.0, 1.0, 2.0]),
            theirs: side(&[4.0]),
            difference: Some(1e-7),
            others: Some(0.125),
        };
        let results = Results {
            machine: crate::machine::of_here("x", true),
            threads: 2,
            versions: BTreeMap::from([("numpy".into(), "2".into())]),
            tasks: vec![task("network"), task("frechet")],
        };
        let table = table(&results);
        assert!(
            table
                .contains("| network | 16.00 images/s | other | 8.00 images/s | 2.00 (1.33 to 1.33) | 0.50 GiB |"),
            "{table}"
        );
        assert!(
            table.contains("| frechet | 2.00 s | other | 4.00 s | 2.00 (1.33 to 1.33) |"),
            "{table}"
        );
    }
}
