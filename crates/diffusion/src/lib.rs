#![doc = include_str!("../README.md")]

mod respacing;
mod schedule;

mod gaussian;
mod likelihood;
mod loss;

mod denoising;
mod labels;
mod objective;

mod interpolant;
mod mar;
mod tokens;

mod guidance;
pub mod samplers;
mod steps;
mod token_sampling;

pub use respacing::Respacing;
pub use schedule::{BetaSchedule, NoiseSchedule};

pub use gaussian::{
    Clip, DiffusionConfig, Gaussian, GaussianDiffusion, LossKind, ReverseStep, Target, Variance,
};
pub use likelihood::{discretized_gaussian_log_likelihood, normal_kl};
pub use loss::{Distillation, Losses, Noised};

pub use denoising::{DenoisingDraw, DenoisingObjective};
pub use labels::LabelDrop;
pub use mar::{MarDraw, MarObjective, MarPrediction, MarRandomness, MarTraining, token_diffusion};
pub use objective::{Objective, TimestepObjective};
pub use tokens::{TokenRows, patchify, unpatchify};

pub use interpolant::{
    DiffusionForm, Interpolant, InterpolantConfig, InterpolantDraw, InterpolantObjective, Path,
    Prediction, Weighting,
};

pub use guidance::{Guidance, GuidedChannels};
pub use steps::{DdimConfig, Sampled};
pub use token_sampling::{
    CfgSchedule, TokenNoise, TokenRng, TokenSampling, TokenStart, TokenStep, sample_tokens,
};
