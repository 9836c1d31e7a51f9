#![doc = include_str!("../README.md")]

mod bounds;
mod classifier;
mod dit;
pub mod mar;
mod presets;

pub use classifier::{Classifier, ClassifierConfig};
pub use dit::{DiT, DiTConfig};
pub use mar::{Mar, MarConfig};
pub use presets::{Preset, preset, presets};
