//! Whether a GPU computes what the CPU does: every operation that has a kernel, training steps of small networks of every
//! family with all their gradients, a block at DiT-XL's width, the autoencoder, and samplers.

mod inference;
mod training;

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use serde_json::json;
use tinyfusion::core::{Error, StateDict};
use tinyfusion::models::{DiTConfig, MarConfig};
use tinyfusion::nn::parity;

use crate::compute::{Compute, ComputeOptions};
use crate::output::say;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    compute: ComputeOptions,
    /// Also compare a whole DiT-XL/2 and the autoencoder of Stable Diffusion (10 GB of the machine's memory and of the GPU's)
    #[arg(long)]
    large: bool,
}

/// What a network says: tensors on the CPU in groups that are judged one by one.
type Answers = Vec<Vec<Tensor>>;

type Run = Box<dyn Fn(&Compute) -> Result<Answers>>;

/// Work of which the CPU's answers in f32 are the truth.
struct Check {
    name: String,
    /// What the GPU does it in.
    dtypes: &'static [DType],
    run: Run,
}

const BOTH: &[DType] = &[DType::F32, DType::BF16];

impl Check {
    /// How far the device is off in each type.
    fn compare(&self, device: &Device) -> Vec<(DType, Result<f64>)> {
        let expected = (self.run)(&Compute::on_cpu());
        let compare = |&dtype: &DType| {
            let compute = Compute::on(device.clone(), dtype);
            let off = match &expected {
                Ok(expected) => (self.run)(&compute).and_then(|found| worst(expected, &found)),
                Err(error) => Err(anyhow::anyhow!("on the CPU: {error:#}")),
            };
            (dtype, off)
        };
        self.dtypes.iter().map(compare).collect()
    }
}

/// Of every group the length of the difference over the length, and of those the largest. (One by one, a tensor whose
/// gradient is nearly nothing says nothing.)
fn worst(expected: &Answers, found: &Answers) -> Result<f64> {
    if expected.len() != found.len() {
        bail!("{} groups instead of {}", found.len(), expected.len());
    }
    let mut worst: f64 = 0.0;
    for (expected, found) in expected.iter().zip(found) {
        let off = apart(expected, found)?;
        if off.is_nan() {
            return Ok(off); // `max` would drop it
        }
        worst = worst.max(off);
    }
    Ok(worst)
}

/// NaN where one is, and where nothing but zeros is expected.
fn apart(expected: &[Tensor], found: &[Tensor]) -> Result<f64> {
    if expected.len() != found.len() {
        bail!("{} tensors instead of {}", found.len(), expected.len());
    }
    let square = |t: &Tensor| -> candle_core::Result<f64> {
        t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()
    };
    let (mut squares, mut total) = (0.0, 0.0);
    for (a, b) in expected.iter().zip(found) {
        squares += square(&(a - b)?)?;
        total += square(a)?;
    }
    Ok((squares / total).sqrt())
}

/// Prints a line of JSON for every check; an error at the end if one failed.
pub(super) fn run(args: &Args) -> Result<()> {
    let device = args.compute.open()?.device;
    if device.is_cpu() {
        return Err(Error::usage("there is no GPU to compare with the CPU").into());
    }
    let mut failed = Vec::new();
    for check in parity::checks() {
        let found = check.run(&device).map(|d| (d.off, d.allowed));
        let found = found.map_err(Into::into);
        failed.extend(report(&check.name, check.dtype, found)?);
    }
    for check in training::checks(args.large)?
        .into_iter()
        .chain(inference::checks(args.large))
    {
        for (dtype, off) in check.compare(&device) {
            let found = off.map(|off| (off, parity::allowed(dtype)));
            failed.extend(report(&check.name, dtype, found)?);
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

/// Prints what was found, (off, allowed); what has failed is returned.
fn report(name: &str, dtype: DType, found: Result<(f64, f64)>) -> Result<Option<String>> {
    let (off, allowed, error) = match found {
        Ok((off, allowed)) => (Some(off), Some(allowed), None),
        Err(error) => (None, None, Some(format!("{error:#}"))),
    };
    // Without the backtrace that candle prints behind its first line.
    let error = error.as_deref().and_then(|text| text.lines().next());
    let is_within = off
        .zip(allowed)
        .is_some_and(|(off, allowed)| off <= allowed); // false for NaN
    let line = json!({
        "check": name, "dtype": dtype.as_str(), "off": off, "allowed": allowed, "within": is_within, "error": error,
    });
    say!("{line}")?;
    Ok((!is_within).then(|| format!("{name} in {}", dtype.as_str())))
}

fn small_dit(depth: usize) -> DiTConfig {
    DiTConfig {
        input_size: 8,
        hidden_size: 144, // heads of 72, as DiT-XL has them
        depth,
        num_heads: 2,
        num_classes: 10,
        ..DiTConfig::default()
    }
}

/// With half of the blocks in the encoder.
fn small_mar(depth: usize) -> MarConfig {
    MarConfig {
        img_size: 64,
        encoder_embed_dim: 64,
        encoder_depth: depth / 2,
        encoder_num_heads: 2,
        decoder_embed_dim: 64,
        decoder_depth: depth / 2,
        decoder_num_heads: 2,
        class_num: 10,
        buffer_size: 4,
        diffloss_d: 2,
        diffloss_w: 64,
        ..MarConfig::default()
    }
}

fn moved(weights: &StateDict, device: &Device) -> Result<StateDict> {
    let moved = weights
        .iter()
        .map(|(name, t)| Ok((name.to_string(), t.to_device(device)?)))
        .collect::<candle_core::Result<_>>()?;
    Ok(moved)
}

fn on_cpu(tensors: impl IntoIterator<Item = Tensor>) -> Result<Vec<Tensor>> {
    let moved = tensors
        .into_iter()
        .map(|t| t.to_device(&Device::Cpu))
        .collect::<candle_core::Result<_>>()?;
    Ok(moved)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn group(values: [f32; 2]) -> Vec<Tensor> {
        vec![Tensor::new(&values, &Device::Cpu).unwrap()]
    }

    #[test]
    fn the_group_that_is_off_most_decides() {
        let expected = vec![group([3.0, 4.0]), group([1.0, 0.0])];
        let found = vec![group([3.0, 4.0]), group([1.0, 0.5])];
        assert_eq!(worst(&expected, &expected).unwrap(), 0.0);
        assert_eq!(worst(&expected, &found).unwrap(), 0.5);
        assert!(worst(&expected, &found[..1].to_vec()).is_err());
    }

    #[test]
    fn what_is_not_finite_is_off_wherever_it_stands() {
        let expected = vec![group([3.0, 4.0]); 3];
        for at in 0..3 {
            let mut found = expected.clone();
            found[at] = group([3.0, f32::NAN]);
            assert!(worst(&expected, &found).unwrap().is_nan(), "{at}");
        }
        let nothing = vec![group([0.0, 0.0])];
        assert!(worst(&nothing, &nothing).unwrap().is_nan());
    }
}
