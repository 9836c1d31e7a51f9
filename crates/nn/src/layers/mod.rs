//! Layers in the names and shapes of the official checkpoints.

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
