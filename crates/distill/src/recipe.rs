use tinyfusion_train::{FitConfig, LrScaling, LrSchedule, ema_decay};

use crate::{BetaSchedule, DistillConfig, FeatureLoss, KnowledgeConfig};

/// How a student is recovered, whatever the batch size: what depends on it is worked out by [`config`](Self::config).
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Learning rate right after the warm-up, at `lr_batch` samples per step.
    pub lr: f64,
    /// Learning rate at the last step, at `lr_batch` samples per step.
    pub last_lr: f64,
    /// Samples per step that the learning rates are meant for.
    pub lr_batch: usize,
    /// How they are carried to another batch size.
    pub lr_scaling: LrScaling,
    /// What the averaged parameters remember.
    pub average: Average,
    /// Which elements of the hidden states are compared.
    pub features: FeatureLoss,
    /// How the weight of the hidden states falls to 0.
    pub beta_fall: BetaFall,
}

/// What averaged parameters remember.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Average {
    /// A decay per step: a larger batch remembers more samples.
    PerStep(f64),
    /// A half-life in samples, the same at every batch size.
    Samples {
        /// Samples after which half is forgotten.
        half_life: f64,
        /// The half-life is at most this share of the samples seen so far.
        rampup: Option<f64>,
    },
}

impl Average {
    /// The decay per step and the ramp-up at `batch` samples per step.
    pub fn at(self, batch: usize) -> (f64, Option<f64>) {
        match self {
            Self::PerStep(decay) => (decay, None),
            Self::Samples { half_life, rampup } => (ema_decay(half_life, batch), rampup),
        }
    }
}

/// How the weight of the hidden states falls to 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BetaFall {
    /// In a line over the whole run.
    Line,
    /// In stairs: the run is cut into at most so many epochs of equally many steps, and the last one has none ([`BetaSchedule::PerEpoch`]).
    Epochs(u64),
}

impl BetaFall {
    /// The schedule of a run of `steps` steps.
    pub fn over(self, steps: u64) -> BetaSchedule {
        match self {
            Self::Line => BetaSchedule::PerStep,
            Self::Epochs(epochs) => BetaSchedule::PerEpoch {
                steps_per_epoch: steps.div_ceil(epochs.max(1)).max(1),
            },
        }
    }
}

impl Recipe {
    /// The recipe of TinyFusion's public code, as it stands: one learning rate and one decay per step at every batch
    /// size, a mask for each side, β falling by (epochs − 1). A larger batch leaves fewer steps, and then the averaged
    /// weights still hold the cut network that they began with.
    pub fn reference() -> Self {
        Self {
            lr: 2e-4,
            last_lr: 1e-4,
            lr_batch: 256,
            lr_scaling: LrScaling::Constant,
            average: Average::PerStep(0.9999),
            features: FeatureLoss::Masked,
            beta_fall: BetaFall::Epochs(20),
        }
    }

    /// A recipe whose averages forget the cut network at every batch size.
    ///
    /// Their half-life is stated in samples and is never more than 5 % of what was seen (see `README.md`). β falls in a line
    /// over the run, and hidden states are compared where both sides are inliers. The learning rate is the same at every
    /// batch size: rates scaled by its root or linearly recovered no better in the embedded experiment, at one base rate.
    pub fn robust() -> Self {
        Self {
            lr: 5e-4,
            last_lr: 5e-5,
            lr_batch: 64,
            lr_scaling: LrScaling::Constant,
            average: Average::Samples {
                half_life: 1.8e6, // of the reference at its own batch: 0.9999 per step of 256
                rampup: Some(0.05),
            },
            features: FeatureLoss::Joint,
            beta_fall: BetaFall::Line,
        }
    }

    /// The settings of a run of `steps` steps of `batch` samples that is taught by a teacher, with the hidden states'
    /// weight `beta` at the first step.
    pub fn config(&self, steps: u64, batch: usize, beta: f64) -> DistillConfig {
        let lr = self.lr_scaling.factor(batch, self.lr_batch);
        let (ema, ema_rampup) = self.average.at(batch);
        DistillConfig {
            seed: 0,
            lr: LrSchedule {
                peak: self.lr * lr,
                last: self.last_lr * lr,
                warmup: 0,
            },
            fit: FitConfig {
                steps,
                batch_size: batch,
                ema,
                ema_rampup,
                ..FitConfig::default()
            },
            knowledge: Some(KnowledgeConfig {
                features: self.features,
                beta,
                beta_schedule: self.beta_fall.over(steps),
                ..KnowledgeConfig::default()
            }),
        }
    }
}
