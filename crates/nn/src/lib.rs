#![doc = include_str!("../README.md")]

#[cfg(feature = "cuda")]
mod cuda;
mod gradients;
mod kernels;
mod lanes;
pub mod layers;
pub mod ops;
#[cfg(feature = "cuda")]
pub mod parity;
mod recompute;
mod scope;
mod storage;
mod tape;
/// In-place updates of parameters: AdamW and the exponential moving average.
pub mod update;

pub use gradients::Gradients;
pub use lanes::Lanes;
pub use recompute::recompute;
pub use scope::Scope;
pub use tape::record;
