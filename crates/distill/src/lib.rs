#![doc = include_str!("../README.md")]

mod config;
mod recipe;

mod features;
mod layers;

mod losses;

mod distill;

pub use config::{BetaSchedule, DistillConfig, KnowledgeConfig};
pub use recipe::{Average, BetaFall, Recipe};

pub use features::{FeatureLoss, Inliers, feature_loss, inliers};
pub use layers::LayerMap;

pub use losses::{Losses, Teacher, losses};

pub use distill::{Run, Student, distill};
