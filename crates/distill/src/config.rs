use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};
use tinyfusion_train::{FitConfig, LrSchedule};

use crate::FeatureLoss;

/// How to recover a student: how long, how fast, and what a teacher adds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct DistillConfig {
    /// Seed of everything drawn: timesteps, noise, dropped labels.
    pub seed: u64,
    /// Learning rate of every trained parameter.
    pub lr: LrSchedule,
    /// Steps, batch, clipping, averages.
    pub fit: FitConfig,
    /// What is learned from a teacher; without it this is plain fine-tuning.
    pub knowledge: Option<KnowledgeConfig>,
}

impl Default for DistillConfig {
    /// The recovery of TinyFusion's DiT (100K steps at batch 256, learning rate 2e-4 → 1e-4), without a teacher.
    fn default() -> Self {
        Self {
            seed: 0,
            lr: LrSchedule {
                peak: 2e-4,
                last: 1e-4,
                warmup: 0,
            },
            fit: FitConfig {
                steps: 100_000,
                batch_size: 256,
                ema: 0.9999,
                ..FitConfig::default()
            },
            knowledge: None,
        }
    }
}

impl DistillConfig {
    /// Checks the ranges.
    pub fn validate(&self) -> Result<()> {
        self.fit.validate()?;
        for (name, lr) in [("lr.peak", self.lr.peak), ("lr.last", self.lr.last)] {
            check(name, lr, lr >= 0.0, "0 or more")?;
        }
        self.knowledge
            .as_ref()
            .map_or(Ok(()), |k| k.validate(self.fit.steps))
    }
}

/// What is learned from a teacher: L = α·L_KD + (1 − α)·L_diff + β·L_rep (TinyFusion, §3.4).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct KnowledgeConfig {
    /// α, the share of the teacher's output against the data, in [0, 1].
    pub alpha_kd: f64,
    /// Which elements of the hidden states are compared.
    pub features: FeatureLoss,
    /// k: an element within k standard deviations of its sample's mean is an inlier.
    pub sigma: f64,
    /// β at the first step.
    pub beta: f64,
    /// How β falls to 0.
    pub beta_schedule: BetaSchedule,
}

impl Default for KnowledgeConfig {
    /// TinyFusion's masked KD, with β falling by the step.
    fn default() -> Self {
        Self {
            alpha_kd: 0.9,
            features: FeatureLoss::Masked,
            sigma: 2.0,
            beta: 1e-2,
            beta_schedule: BetaSchedule::PerStep,
        }
    }
}

impl KnowledgeConfig {
    /// Checks the ranges for a run of `steps` steps.
    pub fn validate(&self, steps: u64) -> Result<()> {
        check(
            "knowledge.alpha-kd",
            self.alpha_kd,
            (0.0..=1.0).contains(&self.alpha_kd),
            "in [0, 1]",
        )?;
        check("knowledge.sigma", self.sigma, self.sigma > 0.0, "above 0")?;
        check("knowledge.beta", self.beta, self.beta >= 0.0, "0 or more")?;
        match self.beta_schedule {
            BetaSchedule::PerEpoch { steps_per_epoch: 0 } => Err(Error::usage(
                "knowledge.beta-schedule: steps-per-epoch is 0, expected at least 1",
            )),
            // The reference divides by (epochs − 1) and fails on this.
            BetaSchedule::PerEpoch { steps_per_epoch } if steps <= steps_per_epoch => {
                Err(Error::usage(format!(
                    "knowledge.beta-schedule: a run of {steps} steps is not longer than one epoch of {steps_per_epoch}, so β \
                 has no epoch to fall over; use `per-step`"
                )))
            }
            _ => Ok(()),
        }
    }

    /// β of step `step` (from 0) of `steps`.
    pub fn beta_at(&self, step: u64, steps: u64) -> f64 {
        self.beta * self.beta_schedule.factor(step, steps)
    }
}

/// How β falls linearly from its value at the first step to 0 at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum BetaSchedule {
    /// 1 − step/(steps − 1): the same fall however the data is cut into epochs.
    PerStep,
    /// 1 − epoch/(epochs − 1), constant within an epoch, as the reference does: the whole last epoch has β = 0.
    PerEpoch {
        /// Steps that pass the data once.
        steps_per_epoch: u64,
    },
}

impl BetaSchedule {
    /// The factor on β at step `step` (from 0) of `steps`, in [0, 1].
    pub fn factor(self, step: u64, steps: u64) -> f64 {
        let (at, all) = match self {
            Self::PerStep => (step, steps),
            Self::PerEpoch { steps_per_epoch } => {
                let epoch = steps_per_epoch.max(1);
                (step / epoch, steps.div_ceil(epoch))
            }
        };
        1.0 - (at as f64 / all.saturating_sub(1).max(1) as f64).min(1.0)
    }
}

fn check(name: &str, value: f64, in_range: bool, expected: &str) -> Result<()> {
    if in_range && value.is_finite() {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{name} is {value}, expected a number {expected}"
    )))
}
