//! Layers in the names and shapes of the official checkpoints.
//!
//! A layer works in the type of its input: parameters of another type are rounded to it, differentiably, so that f32
//! weights are trained through bf16 activations with f32 gradients.

mod conv;
mod embed;
mod linear;
mod norm;
mod transformer;

pub use conv::{Conv, GroupNorm, PixelAttention};
pub use embed::{
    LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_2d, timestep_frequencies, unpatchify,
};
pub use linear::{Linear, LoraSpec};
pub use norm::LayerNorm;
pub use transformer::{Attention, Mlp};
