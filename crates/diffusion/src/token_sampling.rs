use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_core::{
    Error, Plan, Result, StepRng, TokenDenoiser, TokenQuery, run as run_plan, stream,
};

use crate::samplers::{DdpmConfig, Step, ddpm};
use crate::tokens::{TokenRows, check_orders, mask_of};
use crate::{GaussianDiffusion, Guidance, GuidedChannels};

/// How guidance grows while tokens appear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CfgSchedule {
    /// From 1 with the share of tokens that are there after the iteration: 1 + (cfg − 1)·(1 − hidden/L).
    #[default]
    Linear,
    /// The same throughout.
    Constant,
}

impl std::str::FromStr for CfgSchedule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "linear" => Ok(Self::Linear),
            "constant" => Ok(Self::Constant),
            other => Err(Error::usage(format!(
                "no guidance schedule is called `{other}`; there are linear, constant"
            ))),
        }
    }
}

/// Settings of [`sample_tokens`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenSampling {
    /// Iterations; in each the network runs once and some more tokens are drawn.
    pub num_iter: usize,
    /// Scale of classifier-free guidance; 1 is none and runs on half the batch.
    pub cfg: f64,
    /// How the scale changes over the iterations.
    pub cfg_schedule: CfgSchedule,
    /// What the noise of the per-token diffusion's steps is multiplied by; 1 for its own distribution.
    pub temperature: f64,
}

impl Default for TokenSampling {
    /// 64 iterations without guidance.
    fn default() -> Self {
        Self {
            num_iter: 64,
            cfg: 1.0,
            cfg_schedule: CfgSchedule::default(),
            temperature: 1.0,
        }
    }
}

impl TokenSampling {
    /// Checks the ranges.
    pub fn validate(&self) -> Result<()> {
        /// No image has more tokens, and every iteration draws at least one.
        const MOST: usize = 1 << 20;
        if !(1..=MOST).contains(&self.num_iter) {
            return Err(Error::usage(format!(
                "num_iter is {}; it must be in 1..={MOST}",
                self.num_iter
            )));
        }
        for (name, value) in [("cfg", self.cfg), ("temperature", self.temperature)] {
            if !value.is_finite() || value < 0.0 {
                return Err(Error::usage(format!(
                    "{name} is {value}, expected a number of at least 0"
                )));
            }
        }
        Ok(())
    }

    /// How many of `len` tokens are hidden after iteration `step` (from 0), when `hidden` were before: the cosine
    /// schedule ⌊L·cos(π/2·(step + 1)/num_iter)⌋ (MaskGIT, 2202.04200, §3), at least one less than before and at
    /// least one. The last iteration draws everything, whatever this says.
    pub fn hidden_after(&self, step: usize, len: usize, hidden: usize) -> usize {
        let angle = std::f64::consts::FRAC_PI_2 * (step + 1) as f64 / self.num_iter as f64;
        let scheduled = (len as f64 * angle.cos()).floor() as usize;
        scheduled.min(hidden.saturating_sub(1)).max(1)
    }

    /// The guidance scale of an iteration after which `hidden` of `len` tokens are still hidden.
    pub fn guidance(&self, len: usize, hidden: usize) -> f64 {
        match self.cfg_schedule {
            CfgSchedule::Constant => self.cfg,
            CfgSchedule::Linear => {
                1.0 + (self.cfg - 1.0) * (len.saturating_sub(hidden)) as f64 / len as f64
            }
        }
    }
}

/// What [`sample_tokens`] makes images of.
#[derive(Debug, Clone)]
pub struct TokenStart {
    /// (B,) u32 classes.
    pub y: Tensor,
    /// The id of the fake latent, which is the unconditional class.
    pub fake: u32,
    /// An order of the L tokens per image: the last ones are drawn first.
    pub orders: Vec<Vec<usize>>,
    /// Channels C of a token.
    pub channels: usize,
}

/// Noise that [`sample_tokens`] asks for.
#[derive(Debug, Clone, Copy)]
pub struct TokenNoise<'a> {
    /// The iteration, from 0.
    pub iteration: usize,
    /// The index of the per-token chain that the step leaves; none for the noise that the chain starts from.
    pub index: Option<usize>,
    /// The tokens that are drawn, sample by sample, equally many of each.
    pub tokens: &'a TokenRows,
}

/// What [`sample_tokens`] reports after each iteration that drew tokens.
#[derive(Debug, Clone, Copy)]
pub struct TokenStep<'a> {
    /// Iterations done, from 1.
    pub done: usize,
    /// Iterations in all.
    pub total: usize,
    /// The guidance scale of the iteration.
    pub guidance: f64,
    /// (B, L), 1 where a token was hidden before the iteration.
    pub mask: &'a Tensor,
    /// The tokens that were drawn, N of them.
    pub drawn: &'a TokenRows,
    /// Their conditions: (N, D), with guidance (2·N, D), the unconditional ones last.
    pub z: &'a Tensor,
    /// What was drawn, (N, C).
    pub latents: &'a Tensor,
    /// The image so far, (B, L, C), 0 where tokens are hidden.
    pub tokens: &'a Tensor,
}

/// Draws images token by token (Li et al. 2024, §3.3): starts with everything hidden, and in every iteration asks the
/// network for the conditions of some more tokens and draws each of them by its own diffusion. Gives (B, L, C).
///
/// `noise` gives the noise (N, C) of a request, see [`TokenRng`]; the start's first, then that of the steps in descending
/// order, where it is used. `on_token_step` sees every step of the tokens' diffusions, `on_step` every iteration; either
/// ends the run by returning an error. Guidance acts on all channels.
pub fn sample_tokens<S: TokenDenoiser>(
    net: &S,
    diffusion: &GaussianDiffusion,
    config: &TokenSampling,
    start: &TokenStart,
    mut noise: impl FnMut(&TokenNoise<'_>) -> Result<Tensor>,
    mut on_token_step: impl FnMut(&Step<'_>) -> Result<()>,
    mut on_step: impl FnMut(&TokenStep<'_>) -> Result<()>,
) -> Result<Tensor> {
    config.validate()?;
    let (b, l, c) = (
        start.y.dim(0)?,
        start.orders.first().map_or(0, Vec::len),
        start.channels,
    );
    check_orders(&start.orders, b, l)?;
    let device = start.y.device();
    let guided = config.cfg != 1.0;
    let plan = Plan::full(net.layout().depth());
    let fakes = Tensor::full(start.fake, b, device)?;

    let mut values = vec![0f32; b * l * c];
    let mut tokens = Tensor::zeros((b, l, c), candle_core::DType::F32, device)?;
    let mut hidden = l;
    for iteration in 0..config.num_iter {
        let next = config.hidden_after(iteration, l, hidden);
        // Hidden are the first ones of an order; the last iteration leaves none.
        let last = iteration + 1 == config.num_iter;
        let first_drawn = if last { 0 } else { next };
        if first_drawn == hidden {
            continue; // more iterations than tokens
        }
        let mut drawn_now = vec![false; b * l];
        for (row, order) in drawn_now.chunks_exact_mut(l).zip(&start.orders) {
            order[first_drawn..hidden]
                .iter()
                .for_each(|&i| row[i] = true);
        }
        let drawn = TokenRows::filter(b, l, |b, i| drawn_now[b * l + i]);
        let mask = mask_of(&start.orders, hidden)?; // (B, L)

        let doubled = |t: &Tensor| {
            if guided {
                Tensor::cat(&[t, t], 0)
            } else {
                Ok(t.clone())
            }
        };
        let query = TokenQuery {
            tokens: doubled(&tokens)?,
            mask: doubled(&mask)?,
            y: if guided {
                Tensor::cat(&[&start.y, &fakes], 0)? // (2·B,)
            } else {
                start.y.clone()
            },
            dropout: None,
        };
        let all = run_plan(net, &query, &plan)?.output.detach(); // (B or 2·B, L, D)
        let mut z = drawn.of(&all)?; // (N, D)
        if guided {
            z = Tensor::cat(&[z, drawn.shifted(b).of(&all)?], 0)?; // (2·N, D)
        }
        let guidance = Guidance {
            scale: config.guidance(l, next),
            channels: GuidedChannels::All,
        };
        let mut ask = |index| {
            let tokens = &drawn;
            noise(&TokenNoise {
                iteration,
                index,
                tokens,
            })
        };
        let from = ask(None)?; // (N, C)
        let latents = ddpm(
            diffusion,
            DdpmConfig::default(),
            &from,
            |x, t| {
                let net = |x: &Tensor, t: &Tensor| net.denoise_tokens(x, t, &z);
                if guided {
                    guidance.guide(x, t, net) // on all rows twice
                } else {
                    net(x, t)
                }
            },
            |index| Ok((ask(Some(index))? * config.temperature)?),
            &mut on_token_step,
        )?; // (N, C)

        let rows = latents.to_vec2::<f32>()?;
        for (&(b, i), row) in drawn.rows.iter().zip(rows) {
            values[(b as usize * l + i as usize) * c..][..c].copy_from_slice(&row);
        }
        tokens = Tensor::from_slice(&values, (b, l, c), device)?;
        hidden = first_drawn;
        on_step(&TokenStep {
            done: iteration + 1,
            total: config.num_iter,
            guidance: guidance.scale,
            mask: &mask,
            drawn: &drawn,
            z: &z,
            latents: &latents,
            tokens: &tokens,
        })?;
    }
    Ok(tokens)
}

/// The random numbers of some images, each from a generator of its own: an image does not depend on the batch it is
/// drawn in.
#[derive(Debug, Clone)]
pub struct TokenRng {
    rngs: Vec<StepRng>,
    channels: usize,
    device: Device,
}

impl TokenRng {
    /// Of the images `numbers` of a run with this seed, for tokens of `channels`.
    pub fn new(seed: u64, numbers: std::ops::Range<u64>, channels: usize, device: &Device) -> Self {
        let of = |number| StepRng::new(seed, number, stream::SAMPLE);
        Self {
            rngs: numbers.map(of).collect(),
            channels,
            device: device.clone(),
        }
    }

    /// An order of `len` tokens per image. To be asked first.
    pub fn orders(&mut self, len: usize) -> Vec<Vec<usize>> {
        self.rngs.iter_mut().map(|r| r.permutation(len)).collect()
    }

    /// The noise (N, C) of a request of [`sample_tokens`].
    pub fn noise(&mut self, request: &TokenNoise<'_>) -> Result<Tensor> {
        let each = request.tokens.rows.len() / self.rngs.len().max(1); // tokens of each image
        let (shape, device) = ((each, self.channels), &self.device);
        let rows = self.rngs.iter_mut().map(|r| r.normal(shape, device));
        Ok(Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)?)
    }
}
