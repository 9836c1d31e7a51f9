use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Plan;
use tinyfusion::recover::held_out_loss;
use tinyfusion::train::Stop;

use crate::compute::ComputeOptions;
use crate::destination::check_report_on;
use crate::family::{Architecture, Family, Model, with_family};
use crate::hub::Inputs;
use crate::output::say;
use crate::selection_file::read_selection_for;
use crate::training_data::DataOptions;

/// The denoising loss on held-out images, with fixed timesteps and noise.
///
/// With --selection the blocks that are not kept are skipped: the calibration loss of that choice.
///
/// Example: tinyfusion loss assets/teacher --selection runs/learned/selection.json --images 2048
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// A model as `inspect` takes it: PATH or hub://OWNER/REPO, with [#WORD,…]
    model: PathBuf,
    /// Blocks to keep; the others are skipped
    #[arg(long, value_name = "FILE")]
    selection: Option<PathBuf>,
    #[command(flatten)]
    data: DataOptions,
    /// Held-out images
    #[arg(long, default_value_t = 2048)]
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
            .and(&mut self.selection)
            .and(self.data.origin())
    }
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    with_family!(Architecture::of(&args.model)?, judge(args, stop))
}

fn judge<F: Family>(args: &Args, stop: &Stop) -> Result<()> {
    if let Some(path) = &args.json {
        check_report_on("--json", path, &args.model, args.data.name())?;
    }
    let model = Model::<F>::load_on(&args.model, &args.compute.open()?)?;
    let depth = model.depth();
    let selection = match &args.selection {
        None => None,
        Some(path) => Some(read_selection_for(path, &model.layout())?),
    };
    let plan = match &selection {
        None => Plan::full(depth),
        Some(selection) => Plan::keep(depth, &selection.kept),
    };
    let images = args.data.held_out(&model, args.images, "loss", stop)?;
    let estimate = held_out_loss(
        &model.network()?,
        &plan,
        &F::objective(&model.config, &model.process, true)?,
        images.batches(),
        args.seed,
    )?;
    images.finish();
    let report = json!({
        "loss": estimate.loss,
        "standard_error": estimate.standard_error,
        "images": estimate.images,
        "seed": args.seed,
        "data": args.data.name(),
        "model": args.model,
        "model_sha256": model.sha256,
        "dtype": model.compute.numbers(),
        "selection": args.selection,
        "kept": selection.map(|s| s.kept),
    });
    let text = format!("{report:#}");
    if let Some(path) = &args.json {
        write_atomic(path, |f| f.write_all(format!("{text}\n").as_bytes()))?;
    }
    Ok(say!("{text}")?)
}
