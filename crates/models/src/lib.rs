#![doc = include_str!("../README.md")]

mod bounds;
mod classifier;
mod dit;
mod presets;

pub use classifier::{Classifier, ClassifierConfig};
pub use dit::{DiT, DiTConfig};
pub use presets::{Preset, preset, presets};
