//! `tinyfusion bench`: what `cargo xtask bench` times against other programs.

mod fid;
mod files;
#[cfg(feature = "cuda")]
mod parity;
mod prepare;
mod stand_in;
mod train;
mod turns;
mod worker;

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tinyfusion::core::Error;

use crate::compute::ComputeOptions;

/// Time the work of a model, one repetition at a time.
///
/// `prepare` writes a case: weights, inputs and settings in plain files, so that other programs can do the same work.
/// `worker` loads it and does one repetition per line `step` on standard input, answering with its seconds.
/// `cargo xtask bench` drives both.
///
/// Example:
///   tinyfusion bench prepare runs/case --kind learn-lora --model DiT-S/2 --batch 8
///   (echo step; echo step; echo step) | tinyfusion bench worker runs/case
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Write a case
    Prepare(prepare::Args),
    /// Repeat the work of a case on demand
    Worker {
        /// Folder of the case
        case: PathBuf,
        #[command(flatten)]
        compute: ComputeOptions,
    },
    /// Compare a GPU with the CPU: every operation, and training and sampling by a network of every family
    #[cfg(feature = "cuda")]
    Parity(parity::Args),
    /// Write a model of random weights with data for it, to find out what a command will cost
    StandIn(stand_in::Args),
    /// Repeat a part of `evaluate` on demand
    Fid(fid::Args),
    /// Repeat on demand what a command does with large files
    Files(files::Args),
}

/// The work of one repetition.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    /// A product of 2048×1152 and 1152×4608 (on a GPU of 8192×8192 and 8192×8192): the rate that the rest is measured by
    Matmul,
    /// A copy of 256 MiB: the memory's bandwidth
    Copy,
    /// The network on a batch, without gradients
    Forward,
    /// A guided DDPM step
    Sampling,
    /// A fine-tuning step
    FineTune,
    /// A step of masked distillation into half the blocks
    MaskedKd,
    /// A step of learning a 1:2 mask with all weights
    LearnFull,
    /// A step of learning a 1:2 mask with LoRA
    LearnLora,
}

/// `case.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Case {
    kind: Kind,
    model: String,
    batch: usize,
    threads: usize,
    seed: u64,
    /// Pieces of a training step's batch.
    micro_batches: usize,
}

impl Case {
    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("case.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
        Ok(serde_json::from_str(&text).map_err(|e| Error::file(&path, e))?)
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Prepare(args) => prepare::run(args),
        What::Fid(args) => fid::run(args),
        What::StandIn(args) => stand_in::run(args),
        What::Files(args) => files::run(args),
        What::Worker { case, compute } => worker::run(case, &compute.open()?),
        #[cfg(feature = "cuda")]
        What::Parity(args) => parity::run(args),
    }
}
