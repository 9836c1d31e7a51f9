use candle_core::{DType, Tensor};
use tinyfusion_core::{BlockStack, Error, LatentBatch, LatentQuery, Result, StepRng};

use crate::loss::mean_flat;
use crate::objective::check_timestep;
use crate::{Interpolant, LabelDrop, Objective, Prediction, TimestepObjective, Weighting};

/// SiT's training problem: estimate the velocity (or noise, or score) of a batch on its way between noise
/// and data (Ma et al., 2401.08740, §2).
///
/// Works for every stack that takes a [`LatentQuery`] and puts out (B, C, H, W); times in the query are in [0, 1].
#[derive(Debug, Clone)]
pub struct InterpolantObjective {
    interpolant: Interpolant,
    labels: LabelDrop,
}

/// Times that [`TimestepObjective`] goes through: as many as the chain of a DiT has.
const TIMESTEPS: usize = 1000;

/// A batch on its way, ready: everything random of one step.
#[derive(Debug, Clone)]
pub struct InterpolantDraw {
    /// Times in [0, 1], one per sample, exactly as the network is told them; 1 is data.
    pub t: Vec<f32>,
    /// Clean samples x (B, C, H, W) f32.
    pub x_start: Tensor,
    /// ε (B, C, H, W) f32.
    pub noise: Tensor,
    /// x_t (B, C, H, W) f32.
    pub x_t: Tensor,
    /// (B,) u32 class ids after dropping.
    pub y: Tensor,
}

impl InterpolantDraw {
    fn times(&self) -> Vec<f64> {
        self.t.iter().copied().map(f64::from).collect()
    }
}

impl InterpolantObjective {
    /// The objective over `interpolant` with labels dropped as `labels` says.
    pub fn new(interpolant: Interpolant, labels: LabelDrop) -> Result<Self> {
        labels.validate()?;
        Ok(Self {
            interpolant,
            labels,
        })
    }

    /// The process.
    pub fn interpolant(&self) -> &Interpolant {
        &self.interpolant
    }

    /// How labels are dropped.
    pub fn labels(&self) -> LabelDrop {
        self.labels
    }

    /// Draws ε, then t uniformly over the training interval, then which labels are dropped.
    pub fn draw(&self, batch: &LatentBatch, rng: &mut StepRng) -> Result<InterpolantDraw> {
        let (t0, t1) = self.interpolant.config().train_interval();
        let noise = rng.normal(batch.x.shape().clone(), batch.x.device())?; // (B, C, H, W)
        let t = rng
            .uniform(batch.x.dim(0)?)
            .into_iter()
            .map(|u| (u * (t1 - t0) + t0) as f32)
            .collect();
        self.draw_at(&self.labels.drop_from(batch, rng)?, t, noise)
    }

    /// The draw with given times and noise and with all labels kept: for held-out losses that are compared
    /// between networks.
    pub fn draw_at(
        &self,
        batch: &LatentBatch,
        t: Vec<f32>,
        noise: Tensor,
    ) -> Result<InterpolantDraw> {
        self.labels.check(batch)?;
        if let Some(t) = t.iter().find(|t| !(0.0..=1.0).contains(*t)) {
            return Err(Error::usage(format!(
                "a time of an interpolant must be in [0, 1], found {t}"
            )));
        }
        let times: Vec<f64> = t.iter().copied().map(f64::from).collect();
        let x_t = self.interpolant.x_t(&batch.x, &noise, &times)?; // (B, C, H, W)
        Ok(InterpolantDraw {
            t,
            x_start: batch.x.clone(),
            noise,
            x_t,
            y: batch.y.clone(),
        })
    }

    /// The samples start..start + len.
    pub fn rows(
        &self,
        draw: &InterpolantDraw,
        start: usize,
        len: usize,
    ) -> Result<InterpolantDraw> {
        let t = draw.t.get(start..start + len).ok_or_else(|| {
            Error::usage(format!(
                "rows {start}..{} were asked of a draw of {} samples",
                start + len,
                draw.t.len()
            ))
        })?;
        Ok(InterpolantDraw {
            t: t.to_vec(),
            x_start: draw.x_start.narrow(0, start, len)?, // (len, C, H, W)
            noise: draw.noise.narrow(0, start, len)?,
            x_t: draw.x_t.narrow(0, start, len)?,
            y: draw.y.narrow(0, start, len)?, // (len,)
        })
    }

    /// What the network is asked: x_t, t in [0, 1], the label.
    pub fn query(&self, draw: &InterpolantDraw) -> Result<LatentQuery> {
        Ok(LatentQuery {
            x: draw.x_t.clone(),
            t: Tensor::new(draw.t.as_slice(), draw.x_t.device())?, // (B,)
            y: draw.y.clone(),
        })
    }

    /// The training loss of a network's `prediction` (B, C, H, W), per sample (B,) f32:
    ///
    /// * velocity: mean (v − dx_t/dt)²
    /// * noise: weight · mean (prediction − ε)²
    /// * score: weight · mean (σ·prediction + ε)²
    pub fn losses(&self, prediction: &Tensor, draw: &InterpolantDraw) -> Result<Tensor> {
        self.interpolant.check_output(prediction, &draw.x_t)?;
        let (prediction, t) = (prediction.to_dtype(DType::F32)?, draw.times());
        let path = self.interpolant.config().path;
        let error = match self.interpolant.config().prediction {
            Prediction::Velocity => {
                let target = self
                    .interpolant
                    .velocity_target(&draw.x_start, &draw.noise, &t)?; // (B, C, H, W)
                return mean_flat(&(prediction - target)?.sqr()?);
            }
            Prediction::Noise => (prediction - &draw.noise)?, // (B, C, H, W)
            Prediction::Score => {
                let sigma = self
                    .interpolant
                    .per_sample(&t, &draw.x_t, "σ", |t| path.sigma(t))?; // (B, 1, 1, 1)
                (prediction.broadcast_mul(&sigma)? + &draw.noise)? // (B, C, H, W)
            }
        };
        let mse = mean_flat(&error.sqr()?)?; // (B,)
        let weight = |t: f64| {
            let (w, sigma) = (path.score_weight(t), path.sigma(t));
            match self.interpolant.config().weighting {
                Weighting::None => 1.0,
                Weighting::Velocity => (w / sigma).powi(2),
                Weighting::Likelihood => w / sigma.powi(2),
            }
        };
        let weight = self.interpolant.per_sample(&t, &mse, "weight", weight)?; // (B,)
        Ok((mse * weight)?)
    }

    /// L_KD: the mean squared difference of the predictions, per sample (B,) f32; no gradient reaches the teacher.
    pub fn distillation(&self, student: &Tensor, teacher: &Tensor) -> Result<Tensor> {
        self.interpolant.check_output(student, teacher)?;
        let (student, teacher) = (
            student.to_dtype(DType::F32)?,
            teacher.detach().to_dtype(DType::F32)?,
        );
        mean_flat(&(student - teacher)?.sqr()?) // (B,)
    }
}

impl<S: BlockStack<Input = LatentQuery>> Objective<S> for InterpolantObjective {
    type Batch = LatentBatch;
    type Draw = InterpolantDraw;
    type Prediction = Tensor;

    fn draw(&self, batch: &LatentBatch, rng: &mut StepRng) -> Result<InterpolantDraw> {
        self.draw(batch, rng)
    }

    fn rows(&self, draw: &InterpolantDraw, start: usize, len: usize) -> Result<InterpolantDraw> {
        self.rows(draw, start, len)
    }

    fn input(&self, draw: &InterpolantDraw) -> Result<LatentQuery> {
        self.query(draw)
    }

    /// x_1, the data, at the drawn times.
    fn noise_free(&self, draw: &InterpolantDraw) -> Result<LatentQuery> {
        Ok(LatentQuery {
            x: draw.x_start.clone(),
            ..self.query(draw)?
        })
    }

    fn predict(&self, _net: &S, output: Tensor, _draw: &InterpolantDraw) -> Result<Tensor> {
        Ok(output)
    }

    fn loss(&self, prediction: &Tensor, draw: &InterpolantDraw) -> Result<Tensor> {
        self.losses(prediction, draw)
    }

    fn distill(
        &self,
        student: &Tensor,
        teacher: &Tensor,
        _draw: &InterpolantDraw,
    ) -> Result<Tensor> {
        self.distillation(student, teacher)
    }
}

impl<S: BlockStack<Input = LatentQuery>> TimestepObjective<S> for InterpolantObjective {
    /// The training interval in a thousand equal parts: time is continuous here.
    fn timesteps(&self) -> usize {
        TIMESTEPS
    }

    /// At the middle of part `t`, counted from the end where the data is.
    fn draw_timestep(
        &self,
        batch: &LatentBatch,
        t: usize,
        rng: &mut StepRng,
    ) -> Result<InterpolantDraw> {
        check_timestep(t, TIMESTEPS)?;
        let (t0, t1) = self.interpolant.config().train_interval();
        let time = t1 - (t as f64 + 0.5) / TIMESTEPS as f64 * (t1 - t0);
        let noise = rng.normal(batch.x.shape().clone(), batch.x.device())?; // (B, C, H, W)
        let batch = self.labels.drop_from(batch, rng)?;
        self.draw_at(&batch, vec![time as f32; batch.x.dim(0)?], noise)
    }
}
