#![doc = include_str!("../README.md")]

mod kernels;
/// Layers in the names and shapes of the official checkpoints.
pub mod layers;
/// The hot operations, each with its own backward.
pub mod ops;
mod scope;

pub use scope::Scope;
/// In-place updates of parameters: AdamW and the exponential moving average.
pub mod update;
