//! `cargo xtask bench`: the binary against PyTorch on the same weights, inputs and threads, in turn.

mod cases;
mod chart;
mod fid;
mod files;
mod flops;
mod load;
mod measure;
mod preset;
mod progress;
mod python;
mod results;
mod table;
mod turns;
mod worker;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::reproduce::{Paths, driver, file_of, say};
use cases::{compared, probes, scaled, scaling_name, scalings};
use measure::Lab;
use preset::Preset;
use progress::Progress;
use results::Results;

/// Options of `bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// Name of a preset, or the path of a .toml
    #[arg(long, default_value = "bench")]
    preset: String,
    /// Folder of the run
    #[arg(long, default_value = "runs/bench")]
    out: PathBuf,
    /// Only the cases whose name contains this
    #[arg(long, value_name = "PATTERN")]
    only: Option<String>,
    /// Timed rounds [default: the preset's]
    #[arg(long)]
    rounds: Option<usize>,
    /// Also time ours over depth, batch, tokens and threads
    #[arg(long)]
    scaling: bool,
    /// Measure ours alone, without a Python environment
    #[arg(long)]
    without_python: bool,
    /// Drive this binary instead of building one
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// Other things to measure than the models' work.
#[derive(clap::Subcommand)]
enum What {
    /// The evaluator against torch-fidelity, scipy and numpy
    Fid(fid::Args),
    /// Checkpoints, the autoencoder and the latents' loader against torch, diffusers and fast-DiT's folders
    Files(Box<files::Args>),
}

/// Measures and writes `bench.json`, `bench.md` and `bench.svg`.
pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.what {
        Some(What::Fid(args)) => return fid::run(args),
        Some(What::Files(args)) => return files::run(args),
        None => {}
    }
    let paths = Paths::enter()?;
    let mut file = file_of(&args.preset, Path::new("."))?;
    if args.preset.ends_with(".toml") {
        file = paths.at_root(&file);
    }
    let mut preset = Preset::read(&file)?;
    let wanted = Wanted::of(&preset, args)?;
    if let Some(rounds) = args.rounds {
        if rounds == 0 {
            bail!("--rounds is 0; expected at least 1");
        }
        // What is expected for the bar follows; two rounds are warm-ups, and loading is left out.
        let factor = (rounds + 2) as f64 / (preset.rounds + 2) as f64;
        preset.cases.iter_mut().for_each(|c| c.seconds *= factor);
        preset.rounds = rounds;
        preset.scaling.rounds = rounds;
    }
    let python = if args.without_python {
        None
    } else {
        Some(python::environment()?)
    };
    let driver = driver(args.binary.as_deref(), paths.at_root(&args.out), &paths)?;
    let lab = Lab {
        binary: driver.binary,
        python,
        out: driver.out,
        pause: Duration::from_secs_f64(preset.pause),
    };
    let machine = driver.machine.clone();
    let results = measure(&lab, &preset, &wanted, machine)?;
    println!(
        "\n{}\nreport: {1}/bench.md, {1}/bench.svg, {1}/bench.json",
        table::report(&results),
        say(&lab.out)
    );
    check_difference(&results, preset.tolerance)
}

/// What of the preset was asked for.
struct Wanted {
    /// Places in the preset's list.
    cases: Vec<usize>,
    scalings: Vec<(preset::Kind, &'static str, Vec<usize>)>,
}

impl Wanted {
    fn of(preset: &Preset, args: &Args) -> Result<Self> {
        let fits = |name: &str| args.only.as_ref().is_none_or(|only| name.contains(only));
        let cases: Vec<usize> = (0..preset.cases.len())
            .filter(|i| fits(&preset.cases[*i].name))
            .collect();
        let mut tables = scalings(&preset.scaling);
        tables.retain(|(kind, size, _)| args.scaling && fits(&scaling_name(*kind, size)));
        if cases.is_empty() && tables.is_empty() {
            let names: Vec<&str> = preset.cases.iter().map(|c| c.name.as_str()).collect();
            bail!(
                "no case is called like `{}`; there are: {}",
                args.only.as_deref().unwrap_or_default(),
                names.join("; ")
            );
        }
        Ok(Self {
            cases,
            scalings: tables,
        })
    }

    /// Expected seconds of everything.
    fn seconds(&self, preset: &Preset) -> f64 {
        let cases: f64 = self.cases.iter().map(|i| preset.cases[*i].seconds).sum();
        preset.probes.seconds + cases + self.scalings.len() as f64 * preset.scaling.seconds
    }
}

fn measure(
    lab: &Lab,
    preset: &Preset,
    wanted: &Wanted,
    machine: tinyfusion_report::Machine,
) -> Result<Results> {
    let threads = preset.threads.unwrap_or(machine.cores);
    let mut progress = Progress::new(wanted.seconds(preset));
    let mut versions = cases::Versions::new();
    progress.begin("the machine's limits", preset.probes.seconds);
    let (limits, probes) = probes(lab, threads, &progress, &mut versions)?;
    progress.end();
    let mut results = Results {
        machine,
        versions,
        threads,
        rounds: preset.rounds,
        peak_flops_per_second: limits.flops,
        bandwidth_bytes_per_second: limits.bandwidth,
        probes,
        cases: Vec::new(),
        scaling: Vec::new(),
    };
    for case in wanted.cases.iter().map(|i| &preset.cases[*i]) {
        progress.begin(&case.name, case.seconds);
        let tick = |share: f64| progress.tick(share);
        let versions = &mut results.versions;
        let result = compared(
            lab,
            case,
            threads,
            preset.rounds,
            Some(limits),
            tick,
            versions,
        )
        .with_context(|| format!("case `{}`", case.name))?;
        results.cases.push(result);
        // After every case: what is measured is not lost when a later one fails.
        write(&results, &lab.out)?;
        progress.end();
    }
    for (kind, size, values) in &wanted.scalings {
        progress.begin(&scaling_name(*kind, size), preset.scaling.seconds);
        let tick = |share: f64| progress.tick(share);
        let result = scaled(lab, &preset.scaling, (*kind, size, values), limits, tick)?;
        results.scaling.push(result);
        write(&results, &lab.out)?;
        progress.end();
    }
    Ok(results)
}

fn write(results: &Results, out: &Path) -> Result<()> {
    crate::files::write_json(&out.join("bench.json"), results)?;
    crate::files::write_atomic(&out.join("bench.md"), table::report(results).as_bytes())?;
    crate::files::write_atomic(&out.join("bench.svg"), chart::draw(results).as_bytes())
}

/// A contender that computes something else is no contender.
fn check_difference(results: &Results, tolerance: f64) -> Result<()> {
    for case in &results.cases {
        for c in &case.contenders {
            if case.kind.has_output() && c.contender.is_python() && c.difference.is_none() {
                bail!("{}: {} compared no output", case.name, c.contender.name());
            }
            // NaN fails too.
            if let Some(d) = c.difference.filter(|d| d.is_nan() || *d > tolerance) {
                bail!(
                    "{}: the output of {} differs from ours by {d:.1e} of the largest value; expected at most {tolerance:.0e}",
                    case.name,
                    c.contender.name()
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &[&str]) -> Args {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let words = std::iter::once("bench").chain(words.iter().copied());
        <Line as clap::Parser>::try_parse_from(words).unwrap().args
    }

    fn preset() -> Preset {
        Preset::read(&crate::files::root().join("assets/presets/bench.toml")).unwrap()
    }

    #[test]
    fn only_what_is_asked_for_is_measured() {
        let preset = preset();
        let of = |words: &[&str]| Wanted::of(&preset, &args(words));
        let all = of(&[]).unwrap();
        assert_eq!(all.cases.len(), preset.cases.len());
        assert!(all.scalings.is_empty());
        let learn = of(&["--only", "learn"]).unwrap();
        assert_eq!(learn.cases.len(), 2);
        assert!(learn.seconds(&preset) < all.seconds(&preset));
        let scaling = of(&["--only", "over depth", "--scaling"]).unwrap();
        assert!(scaling.cases.is_empty());
        assert_eq!(scaling.scalings.len(), 2);
        let said = of(&["--only", "xyz"]).err().unwrap().to_string();
        assert!(
            said.contains("`xyz`; there are: forward DiT-S/2;"),
            "{said}"
        );
    }

    #[test]
    fn an_output_that_differs_or_is_missing_fails() {
        let mut results = results::tests::sample();
        check_difference(&results, 1e-3).unwrap();
        let set = |r: &mut Results, d| r.cases[0].contenders[2].difference = d;
        for (found, part) in [
            (Some(2e-3), "differs from ours by 2.0e-3"),
            (Some(f64::NAN), "differs from ours by NaN"),
            (None, "compared no output"),
        ] {
            set(&mut results, found);
            let said = check_difference(&results, 1e-3).unwrap_err().to_string();
            assert!(said.contains(part), "{said}");
        }
    }
}
