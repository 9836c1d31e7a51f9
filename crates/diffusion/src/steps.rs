use candle_core::Tensor;
use tinyfusion_core::Result;

use crate::{Clip, GaussianDiffusion};

/// One step of a sampler.
#[derive(Debug, Clone)]
pub struct Sampled {
    /// The next x, (B, C, H, W).
    pub sample: Tensor,
    /// The estimate of x_0 it was made from, (B, C, H, W).
    pub pred_xstart: Tensor,
}

/// Single steps along the chain, for a network's `output` (B, C_out, H, W) at `x_t` (B, C, H, W). The timesteps
/// may differ between samples.
impl GaussianDiffusion {
    /// x_{t−1} ~ p(x_{t−1} | x_t) (Ho et al., 2006.11239, algorithm 2). `noise` (B, C, H, W) is not used
    /// where t = 0.
    pub fn p_sample(
        &self,
        output: &Tensor,
        x_t: &Tensor,
        t: &[u32],
        clip: Clip,
        noise: Option<&Tensor>,
    ) -> Result<Sampled> {
        let p = self.p_mean_variance(output, x_t, t, clip)?;
        let sample = match noise {
            None => p.mean,
            Some(noise) => {
                let not_last = self.per_sample(t, x_t, |t| if t == 0 { 0.0 } else { 1.0 })?; // (B, 1, 1, 1)
                let spread = (p.log_variance * 0.5)?.exp()?.broadcast_mul(&not_last)?;
                (p.mean + noise.broadcast_mul(&spread)?)?
            }
        };
        Ok(Sampled {
            sample,
            pred_xstart: p.pred_xstart,
        })
    }

    /// x_{t−1} by DDIM (Song et al., 2010.02502, eq. 12), with the share `eta` of the noise of DDPM.
    pub fn ddim_sample(
        &self,
        output: &Tensor,
        x_t: &Tensor,
        t: &[u32],
        config: DdimConfig,
        noise: Option<&Tensor>,
    ) -> Result<Sampled> {
        let (bar, prev) = (
            &self.schedule().alphas_cumprod,
            &self.schedule().alphas_cumprod_prev,
        );
        // eq. 16; zero at t = 0, where ᾱ_{t−1} = 1
        let sigma = |t: usize| {
            config.eta * ((1.0 - prev[t]) / (1.0 - bar[t])).sqrt() * (1.0 - bar[t] / prev[t]).sqrt()
        };
        let (estimate, _) = self.split_output(output, x_t)?;
        let pred_xstart = self.pred_xstart(&estimate, x_t, t, config.clip)?;
        let eps = self.implied_noise(&pred_xstart, x_t, t)?; // differs from the estimate where x̂_0 was clamped
        let of_start = self.per_sample(t, x_t, |t| prev[t].sqrt())?;
        let of_noise = self.per_sample(t, x_t, |t| {
            (1.0 - prev[t] - sigma(t).powi(2)).max(0.0).sqrt()
        })?;
        let mut sample = (pred_xstart.broadcast_mul(&of_start)? + eps.broadcast_mul(&of_noise)?)?;
        if let Some(noise) = noise {
            sample = (sample + noise.broadcast_mul(&self.per_sample(t, x_t, sigma)?)?)?;
        }
        Ok(Sampled {
            sample,
            pred_xstart,
        })
    }

    /// x_{t+1} by DDIM's ordinary differential equation run backwards: towards the noise that would give x_t.
    pub fn ddim_reverse_sample(
        &self,
        output: &Tensor,
        x_t: &Tensor,
        t: &[u32],
        clip: Clip,
    ) -> Result<Sampled> {
        let next = &self.schedule().alphas_cumprod_next;
        let (estimate, _) = self.split_output(output, x_t)?;
        let pred_xstart = self.pred_xstart(&estimate, x_t, t, clip)?;
        let eps = self.implied_noise(&pred_xstart, x_t, t)?;
        let of_start = self.per_sample(t, x_t, |t| next[t].sqrt())?;
        let of_noise = self.per_sample(t, x_t, |t| (1.0 - next[t]).sqrt())?;
        let sample = (pred_xstart.broadcast_mul(&of_start)? + eps.broadcast_mul(&of_noise)?)?;
        Ok(Sampled {
            sample,
            pred_xstart,
        })
    }
}

/// Settings of DDIM. The default draws no noise and does not clamp.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DdimConfig {
    /// 0: deterministic; 1: as much noise as DDPM.
    pub eta: f64,
    /// Whether estimates of x_0 are clamped.
    pub clip: Clip,
}
