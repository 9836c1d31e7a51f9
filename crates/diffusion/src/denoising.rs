use candle_core::Tensor;
use tinyfusion_core::{BlockStack, Error, LatentBatch, LatentQuery, Result, StepRng};

use crate::loss::{Distillation, Losses, Noised};
use crate::objective::check_timestep;
use crate::{GaussianDiffusion, LabelDrop, Objective, TimestepObjective};

/// DiT's training problem: predict the noise of a noised latent (or pixel) batch.
///
/// Works for every stack that takes a [`LatentQuery`]; the network's prediction is its output,
/// (B, 2C, H, W) with a learned variance and (B, C, H, W) with a fixed one.
#[derive(Debug, Clone)]
pub struct DenoisingObjective {
    diffusion: GaussianDiffusion,
    labels: LabelDrop,
}

/// A batch noised and ready: everything random of one step.
#[derive(Debug, Clone)]
pub struct DenoisingDraw {
    /// Timesteps of the (respaced) chain, one per sample.
    pub t: Vec<u32>,
    /// Clean samples x_0 (B, C, H, W) f32.
    pub x_start: Tensor,
    /// ε (B, C, H, W) f32.
    pub noise: Tensor,
    /// x_t (B, C, H, W) f32.
    pub x_t: Tensor,
    /// (B,) u32 class ids after dropping.
    pub y: Tensor,
}

impl DenoisingDraw {
    fn noised(&self) -> Noised<'_> {
        Noised {
            x_start: &self.x_start,
            noise: &self.noise,
            x_t: &self.x_t,
            t: &self.t,
        }
    }
}

impl DenoisingObjective {
    /// The objective over `diffusion` with labels dropped as `labels` says.
    pub fn new(diffusion: GaussianDiffusion, labels: LabelDrop) -> Result<Self> {
        labels.validate()?;
        Ok(Self { diffusion, labels })
    }

    /// The process.
    pub fn diffusion(&self) -> &GaussianDiffusion {
        &self.diffusion
    }

    /// How labels are dropped.
    pub fn labels(&self) -> LabelDrop {
        self.labels
    }

    /// Draws t uniformly over the chain, then ε, then which labels are dropped.
    pub fn draw(&self, batch: &LatentBatch, rng: &mut StepRng) -> Result<DenoisingDraw> {
        let b = batch.x.dim(0)?;
        let chain = self.diffusion.num_timesteps();
        let t = rng.below(chain, b).into_iter().map(|t| t as u32).collect();
        let noise = rng.normal(batch.x.shape().clone(), batch.x.device())?;
        self.draw_at(&self.labels.drop_from(batch, rng)?, t, noise)
    }

    /// The draw with given timesteps and noise and with all labels kept: for held-out losses that are
    /// compared between networks.
    pub fn draw_at(
        &self,
        batch: &LatentBatch,
        t: Vec<u32>,
        noise: Tensor,
    ) -> Result<DenoisingDraw> {
        self.labels.check(batch)?;
        let x_t = self.diffusion.q_sample(&batch.x, &t, &noise)?;
        Ok(DenoisingDraw {
            t,
            x_start: batch.x.clone(),
            noise,
            x_t,
            y: batch.y.clone(),
        })
    }

    /// The samples start..start + len.
    pub fn rows(&self, draw: &DenoisingDraw, start: usize, len: usize) -> Result<DenoisingDraw> {
        let t = draw.t.get(start..start + len).ok_or_else(|| {
            Error::usage(format!(
                "rows {start}..{} were asked of a draw of {} samples",
                start + len,
                draw.t.len()
            ))
        })?;
        Ok(DenoisingDraw {
            t: t.to_vec(),
            x_start: draw.x_start.narrow(0, start, len)?, // (len, C, H, W)
            noise: draw.noise.narrow(0, start, len)?,
            x_t: draw.x_t.narrow(0, start, len)?,
            y: draw.y.narrow(0, start, len)?, // (len,)
        })
    }

    /// What the network is asked: x_t, the timestep of the trained chain, the label.
    pub fn query(&self, draw: &DenoisingDraw) -> Result<LatentQuery> {
        let t = self.diffusion.model_timesteps(&draw.t, draw.x_t.device())?; // (B,)
        Ok(LatentQuery {
            x: draw.x_t.clone(),
            t,
            y: draw.y.clone(),
        })
    }

    /// The training loss with its parts; see [`GaussianDiffusion::losses`].
    pub fn losses(&self, output: &Tensor, draw: &DenoisingDraw) -> Result<Losses> {
        self.diffusion.losses(output, &draw.noised())
    }

    /// The distillation loss with its parts; see [`GaussianDiffusion::distillation`].
    pub fn distillation(
        &self,
        student: &Tensor,
        teacher: &Tensor,
        draw: &DenoisingDraw,
    ) -> Result<Distillation> {
        self.diffusion
            .distillation(student, teacher, &draw.noised())
    }
}

impl<S: BlockStack<Input = LatentQuery>> Objective<S> for DenoisingObjective {
    type Batch = LatentBatch;
    type Draw = DenoisingDraw;
    type Prediction = Tensor;

    fn draw(&self, batch: &LatentBatch, rng: &mut StepRng) -> Result<DenoisingDraw> {
        self.draw(batch, rng)
    }

    fn rows(&self, draw: &DenoisingDraw, start: usize, len: usize) -> Result<DenoisingDraw> {
        self.rows(draw, start, len)
    }

    fn input(&self, draw: &DenoisingDraw) -> Result<LatentQuery> {
        self.query(draw)
    }

    /// x_0, and as in the public code a timestep below the 250 of its sampler: t/1000 of the way through them.
    fn noise_free(&self, draw: &DenoisingDraw) -> Result<LatentQuery> {
        const SAMPLING_STEPS: u64 = 250;
        let chain = self.diffusion.num_timesteps() as u64;
        let t = draw
            .t
            .iter()
            .map(|&t| (u64::from(t) * SAMPLING_STEPS / chain) as f32);
        Ok(LatentQuery {
            x: draw.x_start.clone(),
            t: Tensor::from_iter(t, draw.x_start.device())?, // (B,)
            y: draw.y.clone(),
        })
    }

    fn predict(&self, _net: &S, output: Tensor, _draw: &DenoisingDraw) -> Result<Tensor> {
        Ok(output)
    }

    fn loss(&self, prediction: &Tensor, draw: &DenoisingDraw) -> Result<Tensor> {
        Ok(self.losses(prediction, draw)?.loss)
    }

    fn distill(&self, student: &Tensor, teacher: &Tensor, draw: &DenoisingDraw) -> Result<Tensor> {
        Ok(self.distillation(student, teacher, draw)?.loss)
    }
}

impl<S: BlockStack<Input = LatentQuery>> TimestepObjective<S> for DenoisingObjective {
    fn timesteps(&self) -> usize {
        self.diffusion.num_timesteps()
    }

    fn draw_timestep(
        &self,
        batch: &LatentBatch,
        t: usize,
        rng: &mut StepRng,
    ) -> Result<DenoisingDraw> {
        check_timestep(t, self.diffusion.num_timesteps())?;
        let noise = rng.normal(batch.x.shape().clone(), batch.x.device())?; // (B, C, H, W)
        let batch = self.labels.drop_from(batch, rng)?;
        self.draw_at(&batch, vec![t as u32; batch.x.dim(0)?], noise)
    }
}
