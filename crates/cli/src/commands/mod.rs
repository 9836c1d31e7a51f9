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
mod report;
pub(crate) mod sample;
mod score;
mod stats;

use std::ffi::OsString;
use std::sync::OnceLock;

use anyhow::Result;
use tinyfusion::train::Stop;

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
    pub(crate) fn run(&self, stop: &Stop) -> Result<()> {
        match self {
            Self::Models(args) => models::run(args),
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
