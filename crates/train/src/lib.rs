#![doc = include_str!("../README.md")]

mod fit;
mod gradients;
mod group;
mod pending;
mod progress;
mod run_dir;
mod scaling;
mod schedule;
mod settings;

pub use fit::{FitConfig, Outcome, StepLoss, TrainStep, fit};
pub use group::ParamGroup;
pub use progress::{Progress, Stop};
pub use run_dir::RunDir;
pub use scaling::{LrScaling, ema_decay};
pub use schedule::LrSchedule;
