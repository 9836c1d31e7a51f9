#![doc = include_str!("../README.md")]

mod bounds;
mod classifier;
mod dit;
/// Networks recognised by the names and shapes of their tensors, and the names of diffusers.
pub mod import;
mod mar;
mod presets;
mod sit;
mod width;

pub use classifier::{Classifier, ClassifierConfig};
pub use dit::{DiT, DiTCond, DiTConfig};
pub use mar::{Mar, MarConfig};
pub use presets::{Preset, preset, presets};
pub use sit::{SiT, SiTConfig};
pub use width::BlockWidth;
