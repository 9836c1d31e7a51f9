#![doc = include_str!("../README.md")]

mod bounds;
mod classifier;
mod dit;
pub mod import;
mod mar;
mod presets;
mod sit;
pub mod vae;
mod width;

pub use classifier::{Classifier, ClassifierConfig};
pub use dit::{DiT, DiTCond, DiTConfig};
pub use mar::{Mar, MarConfig};
pub use presets::{Preset, preset, presets};
pub use sit::{SiT, SiTConfig};
pub use vae::{AutoencoderKl, VaeConfig};
pub use width::BlockWidth;
