use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};

use crate::{BetaSchedule, NoiseSchedule, Respacing};

/// Which variance the reverse process p(x_{t−1} | x_t) has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variance {
    /// The network's upper C channels v interpolate between ln β̃_t and ln β_t
    /// (Nichol & Dhariwal, 2102.09672, eq. 15). DiT's choice.
    #[default]
    LearnedRange,
    /// β_t, with β̃_1 at t = 0 for a better decoder likelihood.
    FixedLarge,
    /// β̃_t
    FixedSmall,
}

/// What the network's first C channels estimate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The noise ε.
    #[default]
    Noise,
    /// The clean sample x_0.
    XStart,
}

/// Which loss trains the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// Mean squared error; plus the variational bound where the variance is learned
    /// (2102.09672, eq. 16, with the bound unweighted, as DiT trains).
    #[default]
    Mse,
    /// As [`Mse`](Self::Mse) with the bound weighted by the chain's length / 1000.
    RescaledMse,
    /// The variational bound alone, times the chain's length.
    Kl,
}

/// Whether estimates of x_0 are clamped to [-1, 1]: sound for pixels, wrong for latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clip {
    /// Left as they are.
    #[default]
    Off,
    /// Clamped to [-1, 1].
    Unit,
}

/// Settings of a [`GaussianDiffusion`]. The default is DiT's training setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiffusionConfig {
    /// Length of the trained chain, at most a million.
    pub steps: usize,
    /// Noise schedule of the trained chain.
    pub schedule: BetaSchedule,
    /// Timesteps that are visited; all while training.
    pub respacing: Respacing,
    /// Variance of the reverse process.
    pub variance: Variance,
    /// What the network estimates.
    pub target: Target,
    /// The loss.
    pub loss: LossKind,
}

impl Default for DiffusionConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            schedule: BetaSchedule::default(),
            respacing: Respacing::default(),
            variance: Variance::default(),
            target: Target::default(),
            loss: LossKind::default(),
        }
    }
}

/// A normal distribution per sample; the variances broadcast against the mean.
#[derive(Debug, Clone)]
pub struct Gaussian {
    /// (B, C, H, W)
    pub mean: Tensor,
    /// (B, 1, 1, 1)
    pub variance: Tensor,
    /// (B, 1, 1, 1)
    pub log_variance: Tensor,
}

/// p(x_{t−1} | x_t) as the network sees it.
#[derive(Debug, Clone)]
pub struct ReverseStep {
    /// (B, C, H, W)
    pub mean: Tensor,
    /// (B, C, H, W) when learned, else (B, 1, 1, 1)
    pub variance: Tensor,
    /// (B, C, H, W) when learned, else (B, 1, 1, 1)
    pub log_variance: Tensor,
    /// The estimate of x_0, (B, C, H, W).
    pub pred_xstart: Tensor,
}

/// The discrete Gaussian diffusion process of DiT: tables in f64, formulas on f32 tensors, no weights.
///
/// Shapes are written for images, (B, C, H, W); samples may have any number of axes behind their channels, none for
/// MAR's single tokens (N, C).
///
/// Timesteps are host values `t`, one per sample, and index the (respaced) chain; the network is
/// told [`model_timesteps`](Self::model_timesteps). Tables are looked up and combined in f64 and then cast.
#[derive(Debug, Clone)]
pub struct GaussianDiffusion {
    config: DiffusionConfig,
    schedule: NoiseSchedule,
}

impl GaussianDiffusion {
    /// Computes the tables.
    pub fn new(config: DiffusionConfig) -> Result<Self> {
        let schedule = NoiseSchedule::new(config.schedule, config.steps, &config.respacing)?;
        Ok(Self { config, schedule })
    }

    /// The settings it was made with.
    pub fn config(&self) -> &DiffusionConfig {
        &self.config
    }

    /// The tables.
    pub fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }

    /// Number of timesteps of the (respaced) chain.
    pub fn num_timesteps(&self) -> usize {
        self.schedule.len()
    }

    /// Channels the network must put out for samples of `channels` channels.
    pub fn output_channels(&self, channels: usize) -> usize {
        match self.config.variance {
            Variance::LearnedRange => 2 * channels,
            Variance::FixedLarge | Variance::FixedSmall => channels,
        }
    }

    /// What the network is told for timesteps `t` of the chain: (B,) f32, in units of the trained chain.
    pub fn model_timesteps(&self, t: &[u32], device: &candle_core::Device) -> Result<Tensor> {
        self.check_timesteps(t)?;
        let times: Vec<f32> = t
            .iter()
            .map(|&t| self.schedule.timestep_map[t as usize] as f32)
            .collect();
        Ok(Tensor::new(times, device)?)
    }

    /// `value(t)` per sample, computed in f64, as f32 (B, 1, …) that broadcasts against `like` (B, …).
    pub(crate) fn per_sample(
        &self,
        t: &[u32],
        like: &Tensor,
        value: impl Fn(usize) -> f64,
    ) -> Result<Tensor> {
        self.check_timesteps(t)?;
        if like.dim(0)? != t.len() {
            return Err(Error::usage(format!(
                "{} timesteps were given for a batch of shape {:?}",
                t.len(),
                like.dims()
            )));
        }
        let values: Vec<f32> = t.iter().map(|&t| value(t as usize) as f32).collect();
        let mut shape = vec![1; like.rank()];
        shape[0] = t.len();
        Ok(Tensor::from_vec(values, shape, like.device())?)
    }

    fn check_timesteps(&self, t: &[u32]) -> Result<()> {
        match t.iter().find(|&&t| t as usize >= self.schedule.len()) {
            None => Ok(()),
            Some(t) => Err(Error::usage(format!(
                "timestep {t} does not exist: the chain has timesteps 0..{}",
                self.schedule.len()
            ))),
        }
    }

    /// x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · noise (2006.11239, eq. 4), all (B, C, H, W).
    pub fn q_sample(&self, x_start: &Tensor, t: &[u32], noise: &Tensor) -> Result<Tensor> {
        let bar = &self.schedule.alphas_cumprod;
        let signal = self.per_sample(t, x_start, |t| bar[t].sqrt())?;
        let spread = self.per_sample(t, x_start, |t| (1.0 - bar[t]).sqrt())?;
        Ok((x_start.broadcast_mul(&signal)? + noise.broadcast_mul(&spread)?)?)
    }

    /// q(x_t | x_0).
    pub fn q_mean_variance(&self, x_start: &Tensor, t: &[u32]) -> Result<Gaussian> {
        let bar = &self.schedule.alphas_cumprod;
        Ok(Gaussian {
            mean: x_start.broadcast_mul(&self.per_sample(t, x_start, |t| bar[t].sqrt())?)?,
            variance: self.per_sample(t, x_start, |t| 1.0 - bar[t])?,
            log_variance: self.per_sample(t, x_start, |t| (-bar[t]).ln_1p())?,
        })
    }

    /// q(x_{t−1} | x_t, x_0) (2006.11239, eq. 7).
    pub fn q_posterior(&self, x_start: &Tensor, x_t: &Tensor, t: &[u32]) -> Result<Gaussian> {
        let s = &self.schedule;
        Ok(Gaussian {
            mean: self.posterior_mean(x_start, x_t, t)?,
            variance: self.per_sample(t, x_start, |t| s.posterior_variance[t])?,
            log_variance: self.per_sample(t, x_start, |t| s.posterior_log_variance_clipped[t])?,
        })
    }

    /// The mean of q(x_{t−1} | x_t, x_0).
    pub(crate) fn posterior_mean(
        &self,
        x_start: &Tensor,
        x_t: &Tensor,
        t: &[u32],
    ) -> Result<Tensor> {
        let s = &self.schedule;
        let of_start = self.per_sample(t, x_start, |t| s.posterior_mean_coef1[t])?;
        let of_noised = self.per_sample(t, x_start, |t| s.posterior_mean_coef2[t])?;
        Ok((x_start.broadcast_mul(&of_start)? + x_t.broadcast_mul(&of_noised)?)?)
    }

    /// The reverse step p(x_{t−1} | x_t) that a network's `output` (B, C_out, H, W) for `x_t` (B, C, H, W) means.
    pub fn p_mean_variance(
        &self,
        output: &Tensor,
        x_t: &Tensor,
        t: &[u32],
        clip: Clip,
    ) -> Result<ReverseStep> {
        let (estimate, raw_variance) = self.split_output(output, x_t)?;
        let pred_xstart = self.pred_xstart(&estimate, x_t, t, clip)?;
        let mean = self.posterior_mean(&pred_xstart, x_t, t)?;
        let log_variance = self.reverse_log_variance(raw_variance.as_ref(), x_t, t)?;
        let variance = match self.config.variance {
            Variance::LearnedRange => log_variance.exp()?,
            Variance::FixedLarge => self.per_sample(t, x_t, |t| self.large_variance(t))?,
            Variance::FixedSmall => {
                self.per_sample(t, x_t, |t| self.schedule.posterior_variance[t])?
            }
        };
        Ok(ReverseStep {
            mean,
            variance,
            log_variance,
            pred_xstart,
        })
    }

    /// The network's output (B, C_out, H, W) as f32: the estimate (B, C, H, W) and, where the variance is
    /// learned, its raw value v (B, C, H, W).
    pub(crate) fn split_output(
        &self,
        output: &Tensor,
        x_t: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let channels = x_t.dim(1)?;
        let mut expected = x_t.dims().to_vec();
        expected[1] = self.output_channels(channels);
        if output.dims() != expected {
            return Err(Error::usage(format!(
                "the network put out {:?}, but with variance {:?} its output must be {expected:?}",
                output.dims(),
                self.config.variance
            )));
        }
        let output = output.to_dtype(DType::F32)?;
        match self.config.variance {
            Variance::LearnedRange => Ok((
                output.narrow(1, 0, channels)?,
                Some(output.narrow(1, channels, channels)?),
            )),
            Variance::FixedLarge | Variance::FixedSmall => Ok((output, None)),
        }
    }

    /// The estimate of x_0 behind the network's `estimate`:
    /// x̂_0 = √(1/ᾱ_t) · x_t − √(1/ᾱ_t − 1) · ε̂ (2006.11239, eq. 15).
    pub(crate) fn pred_xstart(
        &self,
        estimate: &Tensor,
        x_t: &Tensor,
        t: &[u32],
        clip: Clip,
    ) -> Result<Tensor> {
        let x_start = match self.config.target {
            Target::XStart => estimate.clone(),
            Target::Noise => {
                let (of_noised, of_noise) = self.xstart_coefficients(x_t, t)?;
                (x_t.broadcast_mul(&of_noised)? - estimate.broadcast_mul(&of_noise)?)?
            }
        };
        match clip {
            Clip::Off => Ok(x_start),
            Clip::Unit => Ok(x_start.clamp(-1.0, 1.0)?),
        }
    }

    /// The noise that turns `pred_xstart` into `x_t`: the inverse of [`pred_xstart`](Self::pred_xstart).
    pub(crate) fn implied_noise(
        &self,
        pred_xstart: &Tensor,
        x_t: &Tensor,
        t: &[u32],
    ) -> Result<Tensor> {
        let (of_noised, of_noise) = self.xstart_coefficients(x_t, t)?;
        Ok((x_t.broadcast_mul(&of_noised)? - pred_xstart)?.broadcast_div(&of_noise)?)
    }

    fn xstart_coefficients(&self, x_t: &Tensor, t: &[u32]) -> Result<(Tensor, Tensor)> {
        let bar = &self.schedule.alphas_cumprod;
        Ok((
            self.per_sample(t, x_t, |t| (1.0 / bar[t]).sqrt())?,
            self.per_sample(t, x_t, |t| (1.0 / bar[t] - 1.0).sqrt())?,
        ))
    }

    /// ln of the reverse process's variance; `raw` is the network's v, which is not clamped.
    pub(crate) fn reverse_log_variance(
        &self,
        raw: Option<&Tensor>,
        x_t: &Tensor,
        t: &[u32],
    ) -> Result<Tensor> {
        let s = &self.schedule;
        match (self.config.variance, raw) {
            (Variance::LearnedRange, Some(raw)) => {
                let low = self.per_sample(t, x_t, |t| s.posterior_log_variance_clipped[t])?;
                let high = self.per_sample(t, x_t, |t| s.betas[t].ln())?;
                let frac = ((raw + 1.0)? / 2.0)?; // v = -1 means the lower end, 1 the upper
                Ok((frac.broadcast_mul(&high)? + (1.0 - frac)?.broadcast_mul(&low)?)?)
            }
            (Variance::LearnedRange, None) => Err(Error::usage(
                "a learned variance needs the network's variance channels",
            )),
            (Variance::FixedLarge, _) => self.per_sample(t, x_t, |t| self.large_variance(t).ln()),
            (Variance::FixedSmall, _) => {
                self.per_sample(t, x_t, |t| s.posterior_log_variance_clipped[t])
            }
        }
    }

    fn large_variance(&self, t: usize) -> f64 {
        match t {
            0 => self
                .schedule
                .posterior_variance
                .get(1)
                .copied()
                .unwrap_or(self.schedule.betas[0]),
            t => self.schedule.betas[t],
        }
    }
}
