use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};

use crate::Respacing;

/// Longest chain: a thousand times the published ones, and its tables still fit in a few hundred megabytes.
pub(crate) const MAX_STEPS: usize = 1_000_000;

/// Checks the length of a trained chain before anything is allocated for it.
pub(crate) fn check_steps(steps: usize) -> Result<()> {
    if steps == 0 {
        return Err(Error::usage(
            "a diffusion chain needs at least one step, found 0",
        ));
    }
    if steps > MAX_STEPS {
        return Err(Error::usage(format!(
            "a diffusion chain of {steps} steps is too long; use at most {MAX_STEPS}"
        )));
    }
    Ok(())
}

/// How much noise each step of the forward process adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BetaSchedule {
    /// β from 1e-4 to 0.02 for 1000 steps, scaled by 1000 / steps otherwise (Ho et al., 2006.11239, §4).
    #[default]
    Linear,
    /// ᾱ(s) = cos²((s + 0.008) / 1.008 · π/2), β at most 0.999 (Nichol & Dhariwal, 2102.09672, eq. 17);
    /// also known as `squaredcos_cap_v2`.
    Cosine,
}

impl BetaSchedule {
    /// β_t for t in 0..steps.
    pub fn betas(self, steps: usize) -> Result<Vec<f64>> {
        check_steps(steps)?;
        let betas: Vec<f64> = match self {
            Self::Linear => {
                let scale = 1000.0 / steps as f64;
                linspace(scale * 1e-4, scale * 0.02, steps)
            }
            Self::Cosine => {
                let alpha_bar = |s: f64| {
                    ((s + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2)
                        .cos()
                        .powi(2)
                };
                let at = |i: usize| alpha_bar(i as f64 / steps as f64);
                (0..steps)
                    .map(|i| (1.0 - at(i + 1) / at(i)).min(0.999))
                    .collect()
            }
        };
        match betas.iter().find(|b| !(**b > 0.0 && **b < 1.0)) {
            None => Ok(betas),
            Some(b) => Err(Error::usage(format!(
                "{steps} steps are too few for the {self:?} schedule: it would need a beta of {b}, which must be in \
                 (0, 1); use more than 20 steps and respace the chain instead"
            ))),
        }
    }
}

fn linspace(start: f64, stop: f64, n: usize) -> Vec<f64> {
    let step = (stop - start) / (n.max(2) - 1) as f64;
    let mut values: Vec<f64> = (0..n).map(|i| start + i as f64 * step).collect();
    if n > 1 {
        values[n - 1] = stop; // exact at the end, whatever the rounding of `step`
    }
    values
}

/// The tables of a variance-preserving chain, in f64, one entry per timestep t of the (respaced) chain.
///
/// x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε. Formulas: Ho et al., 2006.11239, eqs. 4 and 7.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseSchedule {
    /// Timestep of the trained chain that entry t stands for; what the network is told.
    pub timestep_map: Vec<usize>,
    /// β_t = 1 − ᾱ_t / ᾱ_{t−1}
    pub betas: Vec<f64>,
    /// ᾱ_t
    pub alphas_cumprod: Vec<f64>,
    /// ᾱ_{t−1}, 1 at t = 0
    pub alphas_cumprod_prev: Vec<f64>,
    /// ᾱ_{t+1}, 0 after the last
    pub alphas_cumprod_next: Vec<f64>,
    /// Variance β̃_t = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t) of q(x_{t−1} | x_t, x_0); 0 at t = 0
    pub posterior_variance: Vec<f64>,
    /// ln β̃_t, entry 0 replaced by entry 1, since ln 0 is no use
    pub posterior_log_variance_clipped: Vec<f64>,
    /// Factor of x_0 in the mean of q(x_{t−1} | x_t, x_0): β_t √ᾱ_{t−1} / (1 − ᾱ_t)
    pub posterior_mean_coef1: Vec<f64>,
    /// Factor of x_t in the mean of q(x_{t−1} | x_t, x_0): (1 − ᾱ_{t−1}) √α_t / (1 − ᾱ_t)
    pub posterior_mean_coef2: Vec<f64>,
}

impl NoiseSchedule {
    /// The tables of `schedule` over `steps` steps, thinned out by `respacing`.
    pub fn new(schedule: BetaSchedule, steps: usize, respacing: &Respacing) -> Result<Self> {
        let trained = cumulative_alphas(&schedule.betas(steps)?);
        let timestep_map = respacing.timesteps(steps)?;
        // The thinned chain has the trained chain's ᾱ at the visited timesteps, hence these betas.
        let mut last = 1.0;
        let mut betas = Vec::with_capacity(timestep_map.len());
        for &t in &timestep_map {
            betas.push(1.0 - trained[t] / last);
            last = trained[t];
        }
        Ok(Self::from_betas(betas, timestep_map))
    }

    fn from_betas(betas: Vec<f64>, timestep_map: Vec<usize>) -> Self {
        let n = betas.len();
        let bar = cumulative_alphas(&betas);
        let prev: Vec<f64> = (0..n)
            .map(|t| if t == 0 { 1.0 } else { bar[t - 1] })
            .collect();
        let next: Vec<f64> = (0..n)
            .map(|t| bar.get(t + 1).copied().unwrap_or(0.0))
            .collect();
        let posterior_variance: Vec<f64> = (0..n)
            .map(|t| betas[t] * (1.0 - prev[t]) / (1.0 - bar[t]))
            .collect();
        // A chain of one step has no entry 1; beta_0, the upper bound of the learned range, stands in.
        let first = posterior_variance.get(1).copied().unwrap_or(betas[0]);
        let posterior_log_variance_clipped = (0..n)
            .map(|t| {
                if t == 0 {
                    first.ln()
                } else {
                    posterior_variance[t].ln()
                }
            })
            .collect();
        Self {
            posterior_mean_coef1: (0..n)
                .map(|t| betas[t] * prev[t].sqrt() / (1.0 - bar[t]))
                .collect(),
            posterior_mean_coef2: (0..n)
                .map(|t| (1.0 - prev[t]) * (1.0 - betas[t]).sqrt() / (1.0 - bar[t]))
                .collect(),
            posterior_variance,
            posterior_log_variance_clipped,
            timestep_map,
            betas,
            alphas_cumprod: bar,
            alphas_cumprod_prev: prev,
            alphas_cumprod_next: next,
        }
    }

    /// Number of timesteps.
    pub fn len(&self) -> usize {
        self.betas.len()
    }

    /// Never: a chain has at least one timestep.
    pub fn is_empty(&self) -> bool {
        self.betas.is_empty()
    }

    /// λ_t = ln(√ᾱ_t / √(1 − ᾱ_t)), half the logarithm of the signal-to-noise ratio
    /// (DPM-Solver++, 2211.01095, §2).
    pub fn half_log_snr(&self, t: usize) -> f64 {
        let bar = self.alphas_cumprod[t];
        0.5 * (bar.ln() - (-bar).ln_1p())
    }
}

fn cumulative_alphas(betas: &[f64]) -> Vec<f64> {
    betas
        .iter()
        .scan(1.0, |product, beta| {
            *product *= 1.0 - beta;
            Some(*product)
        })
        .collect()
}
