#![doc = include_str!("../README.md")]

mod activations;
mod config;
pub mod criteria;
mod delta;
mod held_out;
mod learn;
mod masked;
mod running;
pub mod width;

pub use config::{Blend, DeltaW, LearnConfig, LoraLayers};
pub use learn::{Learned, RunContext, learn};
pub use masked::{Candidates, Drawn, MaskedStack, Teacher, Variables};

pub use activations::{Activations, Beyond, activations};
pub use held_out::{LossEstimate, held_out_loss};
