use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde_json::json;
use tinyfusion::core::{Error, LatentQuery, Plan, StepRng, run as run_plan, stream};
use tinyfusion::diffusion::{Clip, GaussianDiffusion, Guidance, GuidedChannels};
use tinyfusion::models::DiT;
use tinyfusion::nn::{Lanes, ops};

use super::turns::repeat;
use super::{Case, Kind, train};
use crate::compute::{Compute, peak_of};
use crate::family::DiTModel;
use crate::output::say;
use crate::resources::peak_rss;

pub(super) fn run(folder: &Path, compute: &Compute) -> Result<()> {
    let case = Case::read(folder)?;
    rayon::ThreadPoolBuilder::new()
        .num_threads(case.threads)
        .stack_size(64 << 20)
        .build_global()?;
    match case.kind {
        Kind::Matmul => matmul(compute)?,
        Kind::Copy => copy(compute)?,
        Kind::Forward => forward(folder, compute)?,
        Kind::Sampling => sampling(folder, compute)?,
        Kind::FineTune | Kind::MaskedKd | Kind::LearnFull | Kind::LearnLora => {
            train::run(folder, &case, compute)?;
        }
    }
    let peak = peak_of(&compute.device);
    say!(
        "{}",
        json!({ "peak_rss_bytes": peak_rss(), "peak_gpu_bytes": peak })
    )?;
    Ok(())
}

fn matmul(compute: &Compute) -> Result<()> {
    let Compute { device, dtype, .. } = compute;
    let (rows, inputs, outputs) = match device {
        Device::Cpu => (2048, 1152, 4608),
        _ => (8192, 8192, 8192),
    };
    // Drawn: a GPU clocks higher on equal numbers.
    let mut rng = StepRng::new(0, 0, stream::SAMPLE);
    let mut drawn = |shape: (usize, usize)| -> Result<Tensor> {
        Ok(rng
            .normal(shape, &Device::Cpu)?
            .to_device(device)?
            .to_dtype(*dtype)?)
    };
    let (x, w) = (drawn((rows, inputs))?, drawn((outputs, inputs))?);
    repeat(device, || {
        ops::linear(&x, &w, None)?;
        Ok(())
    })
}

fn copy(compute: &Compute) -> Result<()> {
    if !compute.device.is_cpu() {
        let from = Tensor::ones(64 << 20, DType::F32, &compute.device)?;
        return repeat(&compute.device, || {
            from.copy()?;
            Ok(())
        });
    }
    const PIECE: usize = 1 << 16;
    let from = vec![1f32; 64 << 20];
    let mut to = vec![0f32; from.len()];
    repeat(&Device::Cpu, || {
        to.par_chunks_mut(PIECE)
            .zip(from.par_chunks(PIECE))
            .for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    })
}

/// The tensors of `batch.safetensors`.
pub(super) struct Batch(HashMap<String, Tensor>);

impl Batch {
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("batch.safetensors");
        Ok(Self(
            candle_core::safetensors::load(&path, &Device::Cpu)
                .map_err(|e| Error::file(&path, e))?,
        ))
    }

    /// A tensor where the work is done.
    fn on(&self, name: &str, device: &Device) -> Result<Tensor> {
        Ok(self.get(name)?.to_device(device)?)
    }

    pub(super) fn get(&self, name: &str) -> Result<&Tensor> {
        self.0
            .get(name)
            .with_context(|| format!("batch.safetensors: no tensor `{name}`"))
    }

    /// A tensor of whole numbers (B,).
    pub(super) fn whole(&self, name: &str) -> Result<Vec<u32>> {
        let values = self.get(name)?.to_vec1::<i64>()?;
        Ok(values.into_iter().map(|v| v as u32).collect())
    }
}

/// [`ask`] in as many pieces as there are threads, side by side, as `tinyfusion sample` runs its batches.
fn ask_side_by_side(
    lanes: &Lanes,
    net: &DiT,
    x: &Tensor,
    t: &Tensor,
    y: &[u32],
) -> tinyfusion::core::Result<Tensor> {
    if !x.device().is_cpu() {
        return ask(net, x, t, y);
    }
    let (rows, pieces) = (y.len(), rayon::current_num_threads().min(y.len()));
    let ranges = (0..pieces)
        .map(|i| rows * i / pieces..rows * (i + 1) / pieces)
        .collect();
    let outputs = lanes.run(ranges, |r: Range<usize>| {
        ask(
            net,
            &x.narrow(0, r.start, r.len())?,
            &t.narrow(0, r.start, r.len())?,
            &y[r],
        )
    })?;
    Ok(Tensor::cat(&outputs, 0)?)
}

/// The network on rows x (B, C, H, W), t and y (B,).
fn ask(net: &DiT, x: &Tensor, t: &Tensor, y: &[u32]) -> tinyfusion::core::Result<Tensor> {
    let query = LatentQuery {
        x: x.clone(),
        t: t.clone(),
        y: Tensor::new(y, x.device())?,
    };
    Ok(run_plan(net, &query, &Plan::full(net.config().depth))?.output)
}

fn forward(folder: &Path, compute: &Compute) -> Result<()> {
    let device = &compute.device;
    let net = DiTModel::load_on(&folder.join("model"), compute)?.network()?;
    let batch = Batch::read(folder)?;
    let (x, y) = (batch.on("x", device)?, batch.whole("y")?);
    let t = batch.on("t", device)?.to_dtype(DType::F32)?;
    let mut first = First::of(folder);
    let lanes = Lanes::new(rayon::current_num_threads())?;
    repeat(device, || {
        first.keep(&ask_side_by_side(&lanes, &net, &x, &t, &y)?)
    })
}

fn sampling(folder: &Path, compute: &Compute) -> Result<()> {
    let device = &compute.device;
    let model = DiTModel::load_on(&folder.join("model"), compute)?;
    let net = model.network()?;
    let process = GaussianDiffusion::new(model.process.clone())?;
    let batch = Batch::read(folder)?;
    let (x, noise) = (batch.on("x", device)?, batch.on("noise", device)?);
    let (t, y) = (batch.whole("t")?, batch.whole("y")?);
    let times = batch.on("t", device)?.to_dtype(DType::F32)?;
    let mut doubled = y.clone();
    doubled.resize(2 * y.len(), model.config.num_classes as u32);
    let guidance = Guidance {
        scale: 4.0,
        channels: GuidedChannels::FirstThree,
    };
    let mut first = First::of(folder);
    let lanes = Lanes::new(rayon::current_num_threads())?;
    repeat(device, || {
        let output = guidance.guide(&x, &times, |x, t| {
            ask_side_by_side(&lanes, &net, x, t, &doubled)
        })?; // (B, 2·C, H, W)
        let sampled = process.p_sample(&output, &x, &t, Clip::Off, Some(&noise))?;
        first.keep(&sampled.sample)
    })
}

/// Writes the first output beside the case, for others to compare theirs with.
pub(super) struct First<'a>(Option<&'a Path>);

impl<'a> First<'a> {
    pub(super) fn of(folder: &'a Path) -> Self {
        Self(Some(folder))
    }

    pub(super) fn keep(&mut self, output: &Tensor) -> Result<()> {
        if let Some(folder) = self.0.take() {
            let path = folder.join("ours.safetensors");
            let tensors =
                HashMap::from([("output", output.to_device(&Device::Cpu)?.contiguous()?)]);
            candle_core::safetensors::save(&tensors, &path).map_err(|e| Error::file(&path, e))?;
        }
        Ok(())
    }
}
