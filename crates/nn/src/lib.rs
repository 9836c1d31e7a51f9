#![doc = include_str!("../README.md")]

mod gradients;
mod kernels;
mod lanes;
pub mod layers;
pub mod ops;
mod recompute;
mod scope;
/// In-place updates of parameters: AdamW and the exponential moving average.
pub mod update;

pub use gradients::Gradients;
pub use lanes::Lanes;
pub use recompute::recompute;
pub use scope::Scope;
