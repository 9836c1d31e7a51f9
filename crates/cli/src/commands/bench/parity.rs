//! Whether a GPU computes what the CPU does: every operation that has a kernel, then a small network of every family, its
//! loss and all its gradients.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::json;
use tinyfusion::core::{
    BlockStack, Error, LatentBatch, Plan, StateDict, StepRng, run as run_plan, stream,
};
use tinyfusion::diffusion::Objective;
use tinyfusion::models::{DiTConfig, MarConfig, SiTConfig};
use tinyfusion::nn::{Gradients, parity};

use super::prepare::everywhere;
use crate::compute::ComputeOptions;
use crate::family::{Dit, Family, MaskedAutoregressive, Sit};
use crate::output::say;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    compute: ComputeOptions,
}

/// Samples of a small network's batch.
const BATCH: usize = 3;

/// Prints a line of JSON for every check; an error at the end if one failed.
pub(super) fn run(args: &Args) -> Result<()> {
    let device = args.compute.open()?.device;
    if device.is_cpu() {
        return Err(Error::usage("there is no GPU to compare with the CPU").into());
    }
    let mut failed = Vec::new();
    let mut report = |name: String, dtype: DType, found: Result<(f64, f64)>| -> Result<()> {
        let (off, allowed, error) = match found {
            Ok((off, allowed)) => (Some(off), Some(allowed), None),
            // Without the backtrace that candle prints behind its first line.
            Err(error) => (
                None,
                None,
                Some(
                    format!("{error:#}")
                        .lines()
                        .next()
                        .unwrap_or_default()
                        .to_string(),
                ),
            ),
        };
        let is_within = off
            .zip(allowed)
            .is_some_and(|(off, allowed)| off <= allowed);
        if !is_within {
            failed.push(format!("{name} in {}", dtype.as_str()));
        }
        let line = json!({
            "check": name, "dtype": dtype.as_str(), "off": off, "allowed": allowed, "within": is_within, "error": error,
        });
        Ok(say!("{line}")?)
    };
    for check in parity::checks() {
        let found = check.run(&device).map(|d| (d.off, d.allowed));
        report(check.name.clone(), check.dtype, found.map_err(Into::into))?;
    }
    let (dit, mar) = (small_dit(), small_mar());
    for dtype in [DType::F32, DType::BF16] {
        for recompute in [false, true] {
            let name = |family: &str| match recompute {
                true => format!("{family} of two blocks, recomputed"),
                false => format!("{family} of two blocks"),
            };
            let at = (&device, dtype, recompute);
            report(name(Dit::NAME), dtype, compare::<Dit>(&dit, at))?;
            let sit = SiTConfig(dit.clone());
            report(name(Sit::NAME), dtype, compare::<Sit>(&sit, at))?;
            let found = compare::<MaskedAutoregressive>(&mar, at);
            report(name(MaskedAutoregressive::NAME), dtype, found)?;
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::run(format!(
        "{} checks failed: {}",
        failed.len(),
        failed.join(", ")
    ))
    .into())
}

fn small_dit() -> DiTConfig {
    DiTConfig {
        input_size: 8,
        hidden_size: 144, // heads of 72, as DiT-XL has them
        depth: 2,
        num_heads: 2,
        num_classes: 10,
        ..DiTConfig::default()
    }
}

fn small_mar() -> MarConfig {
    MarConfig {
        img_size: 64,
        encoder_embed_dim: 64,
        encoder_depth: 1,
        encoder_num_heads: 2,
        decoder_embed_dim: 64,
        decoder_depth: 1,
        decoder_num_heads: 2,
        class_num: 10,
        buffer_size: 4,
        diffloss_d: 2,
        diffloss_w: 64,
        ..MarConfig::default()
    }
}

/// What a network says of a batch: its losses, and behind them the gradients of their mean.
fn answers<F: Family>(
    config: &F::Config,
    weights: &StateDict,
    (device, dtype, recompute): (&Device, DType, bool),
) -> Result<Vec<Tensor>> {
    let mut weights: StateDict = weights
        .iter()
        .map(|(name, t)| Ok((name.to_string(), t.to_device(device)?)))
        .collect::<candle_core::Result<_>>()?;
    let vars = weights.make_trainable(|name| !F::is_fixed(name))?;
    let net = F::network(config, &weights, 0.0, recompute, dtype)?;
    let objective = F::objective(config, &F::Process::default(), true)?;
    let takes = F::samples(config);
    let mut rng = StepRng::new(1, 0, stream::DRAW);
    let clean = rng.normal(
        (BATCH, takes.channels, takes.size, takes.size),
        &Device::Cpu,
    )?;
    let batch = LatentBatch {
        x: clean,
        y: Tensor::new(vec![1u32; BATCH], &Device::Cpu)?,
    };
    let draw = objective.draw(&batch.to_device(device)?, &mut rng)?;
    let plan = Plan::full(net.layout().depth());
    let output = run_plan(&net, &objective.input(&draw)?, &plan)?.output;
    let losses = objective.loss(&objective.predict(&net, output, &draw)?, &draw)?; // (B,)
    let vars: Vec<&candle_core::Var> = vars.iter().map(|(_, var)| var).collect();
    let mut gradients = Gradients::new(&vars)?;
    gradients.backward(&losses.mean_all()?)?;
    let found = std::iter::once(losses.detach()).chain(gradients.sums()?);
    Ok(found
        .map(|t| t.to_device(&Device::Cpu))
        .collect::<candle_core::Result<_>>()?)
}

/// How far the answers of a device are from the CPU's, and what rounding explains: the length of the difference over the
/// length, of the losses and of all gradients together, whichever is more. (One by one, a tensor whose gradient is nearly
/// nothing says nothing.)
fn compare<F: Family>(config: &F::Config, at: (&Device, DType, bool)) -> Result<(f64, f64)> {
    let mut rng = StepRng::new(0, 1, stream::INIT);
    let weights = everywhere(&F::init(config, 0, &Device::Cpu)?, &mut rng)?;
    let expected = answers::<F>(config, &weights, (&Device::Cpu, DType::F32, false))?;
    let found = answers::<F>(config, &weights, at)?;
    let (losses, gradients) = expected.split_first().context("no answers")?;
    let of_losses = apart(std::slice::from_ref(losses), &found[..1])?;
    let of_gradients = apart(gradients, &found[1..])?;
    let allowed = if at.1 == DType::BF16 { 2e-2 } else { 1e-4 };
    Ok((of_losses.max(of_gradients), allowed))
}

fn apart(expected: &[Tensor], found: &[Tensor]) -> Result<f64> {
    let (mut squares, mut total) = (0.0, 0.0);
    for (a, b) in expected.iter().zip(found) {
        let square = |t: &Tensor| -> Result<f64> {
            Ok(t.to_dtype(DType::F64)?
                .sqr()?
                .sum_all()?
                .to_scalar::<f64>()?)
        };
        squares += square(&(a - b)?)?;
        total += square(a)?;
    }
    Ok((squares / total).sqrt())
}
