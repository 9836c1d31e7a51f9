mod activations;
mod bench;
mod cut;
mod distill;
mod encode;
mod evaluate;
pub(crate) mod export;
mod inspect;
mod learn;
mod loss;
mod models;
mod narrow;
mod pretrain;
mod pull;
mod report;
pub(crate) mod sample;
mod score;
mod stats;

use std::ffi::OsString;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::Result;
use tinyfusion::train::Stop;

use crate::hub::{self, Inputs};

/// Shown under `tinyfusion --help`.
pub(crate) const EXAMPLES: &str = "\
Examples:
  tinyfusion learn assets/teacher runs/learned --pattern 1:2 --steps 300
  tinyfusion cut assets/teacher runs/cut --selection runs/learned/selection.json
  tinyfusion distill runs/cut runs/student --steps 600 --teacher assets/teacher
  tinyfusion sample runs/student/model runs/images --count 100 --steps 50 --cfg 2.0
  tinyfusion evaluate shapes:1000 runs/images/samples.npz --classifier assets/classifier";

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    Models(models::Args),
    Pull(pull::Args),
    Inspect(inspect::Args),
    Pretrain(pretrain::Args),
    Learn(learn::Args),
    Score(score::Args),
    Cut(cut::Args),
    Narrow(narrow::Args),
    Distill(distill::Args),
    Encode(encode::Args),
    Export(export::Args),
    Loss(loss::Args),
    Activations(activations::Args),
    Sample(sample::Args),
    Evaluate(evaluate::Args),
    Stats(stats::Args),
    Report(report::Args),
    Bench(bench::Args),
}

impl Command {
    /// Downloads what is to be read from the hub, and runs.
    pub(crate) fn run(&mut self, lock: Option<&Path>, stop: &Stop) -> Result<()> {
        // What `pull` is given it reads itself.
        if !matches!(self, Self::Pull(_)) {
            let words = WORDS.get().map(Vec::as_slice).unwrap_or_default();
            hub::fetch(self.inputs(), words, lock, stop)?;
        }
        match self {
            Self::Models(args) => models::run(args),
            Self::Pull(args) => pull::run(args, lock, stop),
            Self::Inspect(args) => inspect::run(args),
            Self::Pretrain(args) => pretrain::run(args, stop),
            Self::Learn(args) => learn::run(args, stop),
            Self::Score(args) => score::run(args, stop),
            Self::Cut(args) => cut::run(args),
            Self::Narrow(args) => narrow::run(args, stop),
            Self::Distill(args) => distill::run(args, stop),
            Self::Encode(args) => encode::run(args, stop),
            Self::Export(args) => export::run(args),
            Self::Loss(args) => loss::run(args, stop),
            Self::Activations(args) => activations::run(args, stop),
            Self::Sample(args) => sample::run(args, stop),
            Self::Evaluate(args) => evaluate::run(args, stop),
            Self::Stats(args) => stats::run(args, stop),
            Self::Report(args) => report::run(args),
            Self::Bench(args) => bench::run(args),
        }
    }

    /// What is left where it was stopped without a checkpoint.
    pub(crate) fn when_stopped(&self) -> &'static str {
        match self {
            Self::Sample(_) | Self::Encode(_) | Self::Pull(_) => {
                "what has come so far is kept, and the same command goes on"
            }
            _ => {
                "no result was written (what was downloaded is kept); the same command begins again"
            }
        }
    }

    /// What is read, and may stand on the hub.
    fn inputs(&mut self) -> Inputs<'_> {
        match self {
            Self::Inspect(args) => args.inputs(),
            Self::Pretrain(args) => args.inputs(),
            Self::Learn(args) => args.inputs(),
            Self::Score(args) => args.inputs(),
            Self::Cut(args) => args.inputs(),
            Self::Narrow(args) => args.inputs(),
            Self::Distill(args) => args.inputs(),
            Self::Encode(args) => args.inputs(),
            Self::Export(args) => args.inputs(),
            Self::Loss(args) => args.inputs(),
            Self::Activations(args) => args.inputs(),
            Self::Sample(args) => args.inputs(),
            Self::Evaluate(args) => args.inputs(),
            Self::Stats(args) => args.inputs(),
            Self::Models(_) | Self::Pull(_) | Self::Report(_) | Self::Bench(_) => Inputs::default(),
        }
    }
}

/// The words of the command line, with the settings of `--config` in the place of the file.
static WORDS: OnceLock<Vec<OsString>> = OnceLock::new();

/// Notes the words that were parsed, the program first.
pub(crate) fn remember(words: Vec<OsString>) {
    // Once, by main; a second time would change nothing.
    let _ = WORDS.set(words);
}

/// This process's command line, quoted so that it can be pasted into a shell, for provenance. Settings files are
/// written out, since they may have changed by then.
pub(crate) fn command_line() -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    let quoted = |word: String| {
        if !word.is_empty() && word.chars().all(plain) {
            word
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    // The program by its name: where it lay on this machine is nobody's business.
    std::iter::once("tinyfusion".into())
        .chain(WORDS.get().into_iter().flatten().skip(1).cloned())
        .map(|a| quoted(a.to_string_lossy().into_owned()))
        .collect::<Vec<_>>()
        .join(" ")
}
