#![doc = include_str!("../README.md")]

mod fit;
mod group;
mod gradients;
mod progress;
mod run_dir;
mod schedule;

pub use fit::{FitConfig, Outcome, StepLoss, TrainStep, fit};
pub use group::ParamGroup;
pub use progress::{Progress, Stop};
pub use run_dir::RunDir;
pub use schedule::LrSchedule;
