#![doc = include_str!("../README.md")]

mod fit;
mod gradients;
mod group;
mod progress;
mod run_dir;
mod schedule;
mod settings;

pub use fit::{FitConfig, Outcome, StepLoss, TrainStep, fit};
pub use group::ParamGroup;
pub use progress::{Progress, Stop};
pub use run_dir::RunDir;
pub use schedule::LrSchedule;
