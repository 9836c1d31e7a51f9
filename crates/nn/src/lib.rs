#![doc = include_str!("../README.md")]

mod gradients;
mod kernels;
pub mod layers;
pub mod ops;
mod recompute;
mod scope;
/// In-place updates of parameters: AdamW and the exponential moving average.
pub mod update;

pub use gradients::Gradients;
pub use recompute::recompute;
pub use scope::Scope;
