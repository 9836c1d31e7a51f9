use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::recover::{Activations, activations};
use tinyfusion::train::Stop;

use crate::compute::ComputeOptions;
use crate::destination::check_report_on;
use crate::family::{Architecture, Family, Model, with_family};
use crate::hub::Inputs;
use crate::output::say;
use crate::training_data::DataOptions;

/// The distribution of hidden states after every block: where the massive activations are.
///
/// Prints a line per block; --json also writes the histograms. A value is massive at k when it is k standard deviations
/// or more from the mean of its sample: masked feature distillation leaves those out.
///
/// Example: tinyfusion activations assets/teacher --images 256 --json runs/activations.json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// A model as `inspect` takes it: PATH or hub://OWNER/REPO, with [#WORD,…]
    model: PathBuf,
    #[command(flatten)]
    data: DataOptions,
    /// Held-out images
    #[arg(long, default_value_t = 256)]
    images: u64,
    /// Seed of timesteps and noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write the numbers here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    compute: ComputeOptions,
}

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default()
            .and([&mut self.model])
            .and(self.data.origin())
    }
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    with_family!(Architecture::of(&args.model)?, tally(args, stop))
}

fn tally<F: Family>(args: &Args, stop: &Stop) -> Result<()> {
    if let Some(path) = &args.json {
        check_report_on("--json", path, &args.model, args.data.name())?;
    }
    let model = Model::<F>::load_on(&args.model, &args.compute.open()?)?;
    let images = args
        .data
        .held_out(&model, args.images, "activations", stop)?;
    let layers = activations(
        &model.network()?,
        &F::objective(&model.config, &model.process, true)?,
        images.batches(),
        args.seed,
    )?;
    images.finish();
    if let Some(path) = &args.json {
        let report = json!({
            "model": args.model,
            "model_sha256": model.sha256,
            "dtype": model.compute.numbers(),
            "data": args.data.name(),
            "images": images.count,
            "seed": args.seed,
            "layers": layers,
        });
        write_atomic(path, |f| f.write_all(format!("{report:#}\n").as_bytes()))?;
    }
    layers.iter().try_for_each(line)
}

fn line(layer: &Activations) -> Result<()> {
    let beyond: Vec<String> = layer
        .beyond
        .iter()
        .map(|b| format!("{:.3} % beyond {}σ", 100.0 * b.share, b.sigma))
        .collect();
    Ok(say!(
        "block {:>2}  mean {:+9.3}  std {:8.3}  largest {:9.2}  {}",
        layer.layer,
        layer.mean,
        layer.std,
        layer.max_abs,
        beyond.join(", ")
    )?)
}
