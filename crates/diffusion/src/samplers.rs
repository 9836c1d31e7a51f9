//! Samplers: plain functions from noise to samples over a closure that asks a network.
//!
//! All share one contract. `denoise(x, t)` gets x (B, C, H, W) f32 and the time (B,) f32 in units of the trained
//! chain, and returns the network's raw output (B, C_out, H, W); class labels and
//! [guidance](crate::Guidance) are the closure's business. `noise(i)` gives the noise (B, C, H, W) of the step
//! that leaves chain index i; it is asked in descending order of i and only where noise is used, so that a
//! counter-based generator makes a run repeatable. `on_step` sees every step and ends the run by
//! returning an error. The length of the chain, that is the number of network calls, is set by the
//! process's [`Respacing`](crate::Respacing).
//!
//! The samplers of an [`Interpolant`](crate::Interpolant), [`ode`] and [`sde`], run in continuous time from t = 0 to 1: their
//! `predict(x, t)` gets t in [0, 1], `noise(k)` is asked upwards by step, and [`TimeStep`] says what was done.

mod dormand_prince;
mod flow;
mod ode;
mod sde;

pub use dormand_prince::{Tolerance, dormand_prince};
pub use flow::TimeStep;
pub use ode::{OdeConfig, OdeMethod, ode};
pub use sde::{LastStep, SdeConfig, SdeMethod, sde};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};

use crate::{Clip, DdimConfig, GaussianDiffusion, Sampled};

/// What a sampler reports after each step.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Steps done, from 1.
    pub done: usize,
    /// Steps in all.
    pub total: usize,
    /// Index in the (respaced) chain that this step left.
    pub index: usize,
    /// x after the step, (B, C, H, W).
    pub sample: &'a Tensor,
    /// The estimate of x_0 that the step was made from, (B, C, H, W).
    pub pred_xstart: &'a Tensor,
}

/// Settings of [`ddpm`].
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DdpmConfig {
    /// Whether estimates of x_0 are clamped.
    pub clip: Clip,
}

/// Ancestral sampling (Ho et al., 2006.11239, algorithm 2) from noise `z` (B, C, H, W).
pub fn ddpm(
    diffusion: &GaussianDiffusion,
    config: DdpmConfig,
    z: &Tensor,
    denoise: impl FnMut(&Tensor, &Tensor) -> Result<Tensor>,
    mut noise: impl FnMut(usize) -> Result<Tensor>,
    on_step: impl FnMut(&Step<'_>) -> Result<()>,
) -> Result<Tensor> {
    let down = (0..diffusion.num_timesteps()).rev();
    along(
        diffusion,
        down,
        z,
        denoise,
        on_step,
        |output, x, t, index| {
            let noise = if index == 0 {
                None
            } else {
                Some(noise(index)?)
            };
            diffusion.p_sample(output, x, t, config.clip, noise.as_ref())
        },
    )
}

/// DDIM (Song et al., 2010.02502) from noise `z` (B, C, H, W). Noise is asked for only where `config.eta` > 0.
pub fn ddim(
    diffusion: &GaussianDiffusion,
    config: DdimConfig,
    z: &Tensor,
    denoise: impl FnMut(&Tensor, &Tensor) -> Result<Tensor>,
    mut noise: impl FnMut(usize) -> Result<Tensor>,
    on_step: impl FnMut(&Step<'_>) -> Result<()>,
) -> Result<Tensor> {
    if !(0.0..=1.0).contains(&config.eta) {
        return Err(Error::usage(format!(
            "DDIM's eta must be in [0, 1], found {}",
            config.eta
        )));
    }
    let down = (0..diffusion.num_timesteps()).rev();
    along(
        diffusion,
        down,
        z,
        denoise,
        on_step,
        |output, x, t, index| {
            let noise = if index == 0 || config.eta == 0.0 {
                None
            } else {
                Some(noise(index)?)
            };
            diffusion.ddim_sample(output, x, t, config, noise.as_ref())
        },
    )
}

/// DDIM run backwards, from samples `x` (B, C, H, W) to the noise that [`ddim`] with eta 0 would make them from.
pub fn ddim_reverse(
    diffusion: &GaussianDiffusion,
    clip: Clip,
    x: &Tensor,
    denoise: impl FnMut(&Tensor, &Tensor) -> Result<Tensor>,
    on_step: impl FnMut(&Step<'_>) -> Result<()>,
) -> Result<Tensor> {
    let up = 0..diffusion.num_timesteps();
    along(diffusion, up, x, denoise, on_step, |output, x, t, _| {
        diffusion.ddim_reverse_sample(output, x, t, clip)
    })
}

/// Settings of [`dpm_solver_pp_2m`].
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DpmSolverConfig {
    /// Whether estimates of x_0 are clamped.
    pub clip: Clip,
}

/// DPM-Solver++(2M) (Lu et al., 2211.01095, algorithm 2): second order, one network call per step, no noise.
///
/// With λ = ln(α/σ), h_i = λ_i − λ_{i−1} and r_i = h_{i−1}/h_i, the step from s = t_{i−1} to t = t_i is
///
/// * D = (1 + 1/(2 r_i)) x̂(t_{i−1}) − 1/(2 r_i) x̂(t_{i−2}); in the first step D = x̂(t_0)
/// * x_t = (σ_t/σ_s) x_s − α_t (e^{−h_i} − 1) D
///
/// where x̂ is the estimate of x_0. The times are those of the respaced chain, in descending order. The last step
/// goes to σ = 0, where h is infinite: it is of first order and its result is x̂ itself.
pub fn dpm_solver_pp_2m(
    diffusion: &GaussianDiffusion,
    config: DpmSolverConfig,
    z: &Tensor,
    denoise: impl FnMut(&Tensor, &Tensor) -> Result<Tensor>,
    on_step: impl FnMut(&Step<'_>) -> Result<()>,
) -> Result<Tensor> {
    let schedule = diffusion.schedule();
    let alpha = |i: usize| schedule.alphas_cumprod[i].sqrt();
    let sigma = |i: usize| (1.0 - schedule.alphas_cumprod[i]).sqrt();
    let mut previous: Option<(Tensor, f64)> = None; // the estimate of the step before and its h
    let down = (0..diffusion.num_timesteps()).rev();
    along(
        diffusion,
        down,
        z,
        denoise,
        on_step,
        |output, x, t, index| {
            let (estimate, _) = diffusion.split_output(output, x)?;
            let pred_xstart = diffusion.pred_xstart(&estimate, x, t, config.clip)?;
            if index == 0 {
                return Ok(Sampled {
                    sample: pred_xstart.clone(),
                    pred_xstart,
                });
            }
            let next = index - 1;
            let h = schedule.half_log_snr(next) - schedule.half_log_snr(index);
            let direction = match &previous {
                None => pred_xstart.clone(),
                Some((before, h_before)) => {
                    let weight = 0.5 * h / h_before; // 1 / (2 r)
                    ((&pred_xstart * (1.0 + weight))? - (before * weight)?)?
                }
            };
            let kept = (x * (sigma(next) / sigma(index)))?;
            let sample = (kept - (direction * (alpha(next) * (-h).exp_m1()))?)?;
            previous = Some((pred_xstart.clone(), h));
            Ok(Sampled {
                sample,
                pred_xstart,
            })
        },
    )
}

/// Visits the chain's indices in the given order; `step(output, x, t, index)` turns one x into the next.
fn along(
    diffusion: &GaussianDiffusion,
    indices: impl ExactSizeIterator<Item = usize>,
    start: &Tensor,
    mut denoise: impl FnMut(&Tensor, &Tensor) -> Result<Tensor>,
    mut on_step: impl FnMut(&Step<'_>) -> Result<()>,
    mut step: impl FnMut(&Tensor, &Tensor, &[u32], usize) -> Result<Sampled>,
) -> Result<Tensor> {
    let total = indices.len();
    let batch = start.dim(0)?;
    let mut x = start.to_dtype(candle_core::DType::F32)?;
    for (k, index) in indices.enumerate() {
        let t = vec![index as u32; batch];
        // Detached, so that a network of trainable weights does not chain the graphs of all steps.
        let output = denoise(&x, &diffusion.model_timesteps(&t, x.device())?)?.detach();
        let Sampled {
            sample,
            pred_xstart,
        } = step(&output, &x, &t, index)?;
        on_step(&Step {
            done: k + 1,
            total,
            index,
            sample: &sample,
            pred_xstart: &pred_xstart,
        })?;
        x = sample;
    }
    Ok(x)
}
