use candle_core::Tensor;
use tinyfusion_core::{Error, Result};

use crate::likelihood::{discretized_gaussian_log_likelihood, normal_kl};
use crate::{Clip, GaussianDiffusion, LossKind, Target, Variance};

/// The training loss and its parts, per sample (B,) f32.
#[derive(Debug, Clone)]
pub struct Losses {
    /// What is minimised.
    pub loss: Tensor,
    /// Mean squared error of the estimate; none for [`LossKind::Kl`].
    pub mse: Option<Tensor>,
    /// The variational bound in bits per dimension, as weighted in `loss`; none where the loss has no such part.
    pub vb: Option<Tensor>,
}

/// The output-distillation loss L_KD and its part, per sample (B,) f32.
#[derive(Debug, Clone)]
pub struct Distillation {
    /// What is minimised.
    pub loss: Tensor,
    /// The distillation of the variance in bits per dimension, as weighted in `loss`; none for a fixed variance.
    pub vb: Option<Tensor>,
}

/// What a loss is taken on: a clean batch, its noise and what they make together.
#[derive(Debug, Clone, Copy)]
pub struct Noised<'a> {
    /// Clean samples x_0 (B, C, H, W) f32.
    pub x_start: &'a Tensor,
    /// ε (B, C, H, W) f32.
    pub noise: &'a Tensor,
    /// x_t = `q_sample(x_start, t, noise)` (B, C, H, W).
    pub x_t: &'a Tensor,
    /// Timesteps of the chain, one per sample.
    pub t: &'a [u32],
}

impl GaussianDiffusion {
    /// The training loss of a network's `output` (B, C_out, H, W) for `batch.x_t`.
    ///
    /// With a fixed variance and an MSE loss this is the mean squared error and nothing else. With a learned
    /// variance the variational bound is added, in which the mean is detached: it trains the variance
    /// alone (Nichol & Dhariwal, 2102.09672, §3.1).
    pub fn losses(&self, output: &Tensor, batch: &Noised<'_>) -> Result<Losses> {
        let (estimate, raw_variance) = self.split_output(output, batch.x_t)?;
        let length = self.num_timesteps() as f64;
        if self.config().loss == LossKind::Kl {
            let vb = self.variational_bound(&estimate, raw_variance.as_ref(), batch)?;
            return Ok(Losses {
                loss: (vb * length)?,
                mse: None,
                vb: None,
            });
        }
        let target = match self.config().target {
            Target::Noise => batch.noise,
            Target::XStart => batch.x_start,
        };
        let mse = mean_flat(&(target - &estimate)?.sqr()?)?;
        if self.config().variance != Variance::LearnedRange {
            return Ok(Losses {
                loss: mse.clone(),
                mse: Some(mse),
                vb: None,
            });
        }
        let vb = self.variational_bound(&estimate.detach(), raw_variance.as_ref(), batch)?;
        let vb = self.weighted(vb)?;
        Ok(Losses {
            loss: (&mse + &vb)?,
            mse: Some(mse),
            vb: Some(vb),
        })
    }

    /// L_KD: the mean squared difference of the estimates; where the variance is learned, plus the divergence
    /// KL(teacher ‖ student) of the reverse steps in bits per dimension, which trains only the student's variance.
    ///
    /// At t = 0 there is no reverse step to compare, and the second term is the student's own decoder
    /// likelihood: the variance is not distilled there (as in TinyFusion's `training_losses_kd`).
    /// No gradient reaches the teacher.
    pub fn distillation(
        &self,
        student: &Tensor,
        teacher: &Tensor,
        batch: &Noised<'_>,
    ) -> Result<Distillation> {
        if self.config().loss == LossKind::Kl {
            return Err(Error::usage(
                "output distillation is defined for the losses `mse` and `rescaled_mse`, not for `kl`",
            ));
        }
        let (student_estimate, student_raw) = self.split_output(student, batch.x_t)?;
        let (teacher_estimate, teacher_raw) = self.split_output(&teacher.detach(), batch.x_t)?;
        let mse = mean_flat(&(&student_estimate - &teacher_estimate)?.sqr()?)?;
        if self.config().variance != Variance::LearnedRange {
            return Ok(Distillation {
                loss: mse,
                vb: None,
            });
        }
        let p_student =
            self.reverse_params(&student_estimate.detach(), student_raw.as_ref(), batch)?;
        let p_teacher = self.reverse_params(&teacher_estimate, teacher_raw.as_ref(), batch)?;
        let vb = self.bits_per_dim(
            (&p_teacher.0, &p_teacher.1),
            (&p_student.0, &p_student.1),
            batch,
        )?;
        let vb = self.weighted(vb)?;
        Ok(Distillation {
            loss: (mse + &vb)?,
            vb: Some(vb),
        })
    }

    /// The term of the variational bound at `batch.t`, in bits per dimension, (B,):
    /// KL(q(x_{t−1} | x_t, x_0) ‖ p) for t > 0, the decoder's negative log likelihood at t = 0
    /// (2006.11239, eq. 5).
    fn variational_bound(
        &self,
        estimate: &Tensor,
        raw: Option<&Tensor>,
        batch: &Noised<'_>,
    ) -> Result<Tensor> {
        let p = self.reverse_params(estimate, raw, batch)?;
        let q = self.q_posterior(batch.x_start, batch.x_t, batch.t)?;
        self.bits_per_dim((&q.mean, &q.log_variance), (&p.0, &p.1), batch)
    }

    /// KL(from ‖ p) for t > 0 and the negative log likelihood of x_0 under p at t = 0, as bits per dimension, (B,).
    fn bits_per_dim(
        &self,
        from: (&Tensor, &Tensor),
        p: (&Tensor, &Tensor),
        batch: &Noised<'_>,
    ) -> Result<Tensor> {
        let kl = (mean_flat(&normal_kl(from, p)?)? / std::f64::consts::LN_2)?;
        let first: Vec<u32> = (0u32..)
            .zip(batch.t)
            .filter(|(_, t)| **t == 0)
            .map(|(row, _)| row)
            .collect();
        if first.is_empty() {
            return Ok(kl);
        }
        let device = kl.device();
        let rows = Tensor::new(first, device)?; // (R,)
        let log_scale = (p.1.index_select(&rows, 0)? * 0.5)?;
        let decoder = discretized_gaussian_log_likelihood(
            &batch.x_start.index_select(&rows, 0)?, // (R, C, H, W)
            &p.0.index_select(&rows, 0)?,
            &log_scale,
        )?;
        let decoder = (mean_flat(&decoder)? / -std::f64::consts::LN_2)?;
        let decoder = kl.zeros_like()?.index_add(&rows, &decoder, 0)?; // (B,), zero where t > 0
        let is_first: Vec<u8> = batch.t.iter().map(|t| u8::from(*t == 0)).collect();
        Ok(Tensor::new(is_first, device)?.where_cond(&decoder, &kl)?)
    }

    /// (mean, log variance) of p(x_{t−1} | x_t), without clamping.
    fn reverse_params(
        &self,
        estimate: &Tensor,
        raw: Option<&Tensor>,
        batch: &Noised<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let x_start = self.pred_xstart(estimate, batch.x_t, batch.t, Clip::Off)?;
        let mean = self.posterior_mean(&x_start, batch.x_t, batch.t)?;
        Ok((mean, self.reverse_log_variance(raw, batch.x_t, batch.t)?))
    }

    fn weighted(&self, vb: Tensor) -> Result<Tensor> {
        match self.config().loss {
            LossKind::RescaledMse => Ok((vb * (self.num_timesteps() as f64 / 1000.0))?),
            LossKind::Mse | LossKind::Kl => Ok(vb),
        }
    }
}

/// (B, …) → (B,)
pub(crate) fn mean_flat(x: &Tensor) -> Result<Tensor> {
    Ok(x.flatten_from(1)?.mean(1)?)
}
