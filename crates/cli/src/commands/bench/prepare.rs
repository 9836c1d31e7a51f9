use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use tinyfusion::checkpoint::{DTypePolicy, Provenance, keep_blocks, write_atomic};
use tinyfusion::core::{BlockLayout, Error, StateDict, StepRng, stream};
use tinyfusion::diffusion::DiffusionConfig;
use tinyfusion::mask::{Pattern, random_selection};
use tinyfusion::models::{DiTConfig, preset};

use super::{Case, Kind};
use crate::class_names::ClassNames;
use crate::commands::command_line;
use crate::family::{self, Dit};
use crate::output::say;
use crate::selection_file::write_selection;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder of the case
    case: PathBuf,
    /// The work to time
    #[arg(long)]
    kind: Kind,
    /// Preset of the network (`tinyfusion models` lists them)
    #[arg(long, default_value = "DiT-S/2")]
    model: String,
    /// Samples
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Blocks, if not the preset's
    #[arg(long)]
    depth: Option<usize>,
    /// Side of the latents, if not the preset's
    #[arg(long)]
    input_size: Option<usize>,
    /// Threads (0: one per core)
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Pieces of a training step's batch (0: two per thread)
    #[arg(long, default_value_t = 0)]
    micro_batches: usize,
    /// Seed of weights and inputs
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.batch == 0 {
        return Err(Error::usage("batch must be at least 1").into());
    }
    std::fs::create_dir_all(&args.case).map_err(|e| Error::file(&args.case, e))?;
    let threads = match args.threads {
        0 => rayon::current_num_threads(),
        threads => threads,
    };
    let pieces = match args.micro_batches {
        0 => 2 * threads,
        pieces => pieces,
    };
    let case = Case {
        kind: args.kind,
        model: args.model.clone(),
        batch: args.batch,
        threads,
        seed: args.seed,
        micro_batches: pieces.min(args.batch),
    };
    if !matches!(case.kind, Kind::Matmul | Kind::Copy) {
        network(args)?;
    }
    let text = serde_json::to_string_pretty(&case)?;
    // Last, so that a case that can be read is whole.
    write_atomic(args.case.join("case.json"), |f| {
        f.write_all(text.as_bytes())
    })?;
    say!("{}", args.case.display())?;
    Ok(())
}

/// Weights, half of them as a student where one is wanted, and inputs.
fn network(args: &Args) -> Result<()> {
    let mut config = preset(&args.model)?;
    config.depth = args.depth.unwrap_or(config.depth);
    config.input_size = args.input_size.unwrap_or(config.input_size);
    config.validate()?;
    let mut rng = StepRng::new(args.seed, 1, stream::INIT);
    let weights = everywhere(&config.init(args.seed, &Device::Cpu)?, &mut rng)?;
    save(&args.case.join("model"), &config, &weights)?;

    let pattern: Pattern = "1:2".parse()?;
    if args.kind == Kind::MaskedKd {
        let groups = pattern.groups(&BlockLayout::single(config.depth))?;
        let selection = random_selection(&groups, args.seed, 0)?;
        let student = keep_blocks(&weights, "blocks", &selection.kept)?;
        save(
            &args.case.join("student"),
            &config.with_blocks(&selection.kept),
            &student,
        )?;
        write_selection(&args.case, &selection)?;
    }
    inputs(args, &config, &mut rng)
}

/// A trained network has no zeros: gates that start at 0 would make every block, and every disagreement, vanish.
pub(super) fn everywhere(weights: &StateDict, rng: &mut StepRng) -> Result<StateDict> {
    let mut full = StateDict::new();
    for (name, tensor) in weights.iter() {
        let is_zero = tensor.abs()?.max_all()?.to_scalar::<f32>()? == 0.0;
        let tensor = if is_zero {
            (rng.normal(tensor.dims(), &Device::Cpu)? * 0.02)?
        } else {
            tensor.clone()
        };
        full.insert(name, tensor);
    }
    Ok(full)
}

fn save(path: &Path, config: &DiTConfig, weights: &StateDict) -> Result<()> {
    if path.exists() {
        std::fs::remove_dir_all(path).map_err(|e| Error::file(path, e))?;
    }
    let provenance = Provenance::of_command(command_line());
    family::save(
        path,
        &family::description::<Dit>(config, &DiffusionConfig::default(), &ClassNames::default())?,
        weights,
        &provenance,
        DTypePolicy::F32,
        &[],
    )
}

/// `batch.safetensors`: x, noise (B, C, H, W), t, y (B,) and a 1:2 mask (B, depth).
fn inputs(args: &Args, config: &DiTConfig, rng: &mut StepRng) -> Result<()> {
    let (b, dev) = (args.batch, &Device::Cpu);
    let shape = (b, config.in_channels, config.input_size, config.input_size);
    let whole = |values: Vec<f64>, below: usize| -> Result<Tensor> {
        let values: Vec<i64> = values
            .into_iter()
            .map(|u| (u * below as f64) as i64)
            .collect();
        Ok(Tensor::new(values, dev)?)
    };
    let pick = rng.uniform(b * config.depth.div_ceil(2));
    let mask: Vec<f32> = (0..b * config.depth)
        .map(|at| {
            let (row, block) = (at / config.depth, at % config.depth);
            let second = pick[row * config.depth.div_ceil(2) + block / 2] < 0.5;
            f32::from(u8::from(second == (block % 2 == 1)))
        })
        .collect();
    let tensors = HashMap::from([
        ("x", rng.normal(shape, dev)?),
        ("noise", rng.normal(shape, dev)?),
        ("t", whole(rng.uniform(b), 1000)?),
        ("y", whole(rng.uniform(b), config.num_classes)?),
        (
            "mask",
            Tensor::from_vec(mask, (b, config.depth), dev)?.to_dtype(DType::F32)?,
        ),
    ]);
    let path = args.case.join("batch.safetensors");
    candle_core::safetensors::save(&tensors, &path).map_err(|e| Error::file(&path, e))?;
    Ok(())
}
