#![doc = include_str!("../README.md")]

mod kernels;
pub mod layers;
pub mod ops;
mod scope;
/// In-place updates of parameters: AdamW and the exponential moving average.
pub mod update;

pub use scope::Scope;
